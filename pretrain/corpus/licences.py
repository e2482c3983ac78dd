"""Licences as SPDX ids: found in a repository's licence files, and whether one is permissive."""

import re
from functools import lru_cache

from licenseclassifier import identify_license

_FILE = re.compile(r"(?:un)?licen[cs]e(?:[-_.].*)?|copying(?:[-_.].*)?|mit-licen[cs]e(?:\..*)?", re.IGNORECASE)
_PARENTHESES = re.compile(r"\(([^()]*)\)")
MAX_BYTES = 256 << 10  # of a licence file

# Those of the Blue Oak Council's list that code is published under: use, change and pass on, with notices at most.
# fmt: off
PERMISSIVE = frozenset(licence.lower() for licence in (
    "0BSD", "AFL-3.0", "Apache-1.1", "Apache-2.0", "Artistic-2.0", "BlueOak-1.0.0", "BSD-1-Clause", "BSD-2-Clause",
    "BSD-2-Clause-Patent", "BSD-3-Clause", "BSD-3-Clause-Clear", "BSD-3-Clause-LBNL", "BSD-4-Clause", "BSL-1.0",
    "bzip2-1.0.6", "CC0-1.0", "CECILL-B", "curl", "ECL-2.0", "EFL-2.0", "FTL", "HPND", "ICU", "IJG", "ISC", "JSON",
    "libpng-2.0", "Libpng", "MIT", "MIT-0", "MIT-CMU", "MIT-Modern-Variant", "MS-PL", "MulanPSL-2.0", "NCSA", "NTP",
    "OpenSSL", "PHP-3.01", "PostgreSQL", "PSF-2.0", "Python-2.0", "Python-2.0.1", "Ruby", "TCL", "Unicode-3.0",
    "Unicode-DFS-2016", "Unlicense", "UPL-1.0", "Vim", "W3C", "WTFPL", "X11", "Zlib", "ZPL-2.1",
))
# fmt: on


def is_licence_file(path: str) -> bool:
    """Whether a path is a licence file in the root of its repository."""
    return _FILE.fullmatch(path) is not None


def detect(texts: list[str]) -> str:
    """The ids of all licences in a repository's licence files, joined by AND; "" when none is recognised.

    All of them, because what is between two files (dual licensing, or a second licence for a part) is not written in
    them: whoever follows every one is safe.
    """
    return " AND ".join(sorted({licence for text in texts for licence in _identify(text)}))


@lru_cache(maxsize=1024)
def _identify(text: str) -> tuple[str, ...]:
    return tuple(match.id for match in identify_license(text))


def permissive(licence: str | None) -> bool:
    """Of an SPDX expression: of alternatives (OR) one must be permissive, of joined ones (AND) each.

    AND binds closer than OR. Parentheses are worked out from within, each as a licence that is permissive or is not.
    """
    expression, before = licence or "", None
    while expression != before:
        before = expression
        expression = _PARENTHESES.sub(lambda match: " MIT " if permissive(match[1]) else " NONE ", expression)
    alternatives = re.split(r"(?<!\S)OR(?!\S)", expression, flags=re.IGNORECASE)
    return any(
        all(map(_one_permissive, re.split(r"(?<!\S)AND(?!\S)", some, flags=re.IGNORECASE))) for some in alternatives
    )


def _one_permissive(licence: str) -> bool:
    return licence.split()[:1] != [] and licence.split()[0].lower() in PERMISSIVE
