"""The rule filter of DeepSeek-Coder's paper (section 2.1): cheap rules about a file's text that dropped two thirds.

The rules come from StarCoder's filter, with two differences that are easy to miss: the 25% are letters, not letters and
digits, and the lower bound for JSON and YAML is 50 characters, as in both papers, not 100 as in StarCoder's code.
A line's length does not count its newline. The last newline of a file does not begin another line.
"""

import html
import re
import string
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from .stage import DROPPED, FILES, Result, Shard, read_rows, tally


@dataclass(frozen=True)
class Rules:
    """All numbers: paper, section 2.1 "GitHub data crawling and filtering". Lengths are in characters."""

    mean_line_length: float = 100.0  # a file with a higher mean is dropped
    longest_line: int = 1000  # and so is one with a longer line
    alphabetic_share: float = 0.25  # fewer letters among all characters, white space included: dropped
    xml_head: int = 100  # `<?xml version=` within this many characters: dropped, unless XSLT
    html_text_share: float = 0.20  # HTML with less visible text than this share of the file: dropped
    html_text_length: int = 100  # and so is HTML with less visible text than this
    data_shortest: int = 50  # JSON and YAML outside of these two lengths: dropped
    data_longest: int = 5000


_NOT_ASCII_LETTERS = bytes(c for c in range(128) if chr(c) not in string.ascii_letters)


def drop_reason(text: str, language: str, rules: Rules) -> str | None:
    """Why this file is dropped, as a short constant phrase; None when it is kept."""
    if not text.strip():
        return "empty"  # not in the paper: all its shares are 0 / 0 here
    lines = text.removesuffix("\n").split("\n")
    if sum(map(len, lines)) > rules.mean_line_length * len(lines):
        return "mean line length"
    if max(map(len, lines)) > rules.longest_line:
        return "longest line"
    if _letters(text) < rules.alphabetic_share * len(text):
        return "alphabetic share"
    if language != "XSLT" and "<?xml version=" in text[: rules.xml_head]:
        return "XML"
    if language == "HTML":
        visible = len(visible_text(text))
        if visible < rules.html_text_share * len(text) or visible < rules.html_text_length:
            return "HTML visible text"
    if language in ("JSON", "YAML") and not rules.data_shortest <= len(text) <= rules.data_longest:
        return "JSON or YAML length"
    return None


def _letters(text: str) -> int:
    if text.isascii():  # deleting bytes is a hundred times faster than asking every character
        return len(text.encode().translate(None, _NOT_ASCII_LETTERS))
    return sum(map(str.isalpha, text))


# Comments, scripts and styles with their content, tags. Python's own HTML parser takes minutes for 100 kB of `<a <a`;
# here whatever is not closed reaches to the end, and nothing is read twice.
_INVISIBLE = re.compile(
    r"""<!--.*?(?:-->|\Z)
      | <(script|style)\b.*?(?:</\1\b[^>]*>?|\Z)
      | <[a-z/!?](?:"[^"]*"|'[^']*'|[^>"'])*+>?""",
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)


def visible_text(page: str) -> str:
    """An HTML page without tags, comments, scripts and styles; each run of white space is one space."""
    return " ".join(html.unescape(_INVISIBLE.sub(" ", page)).split())


def filter_shard(out: Path, shard: Shard, rules: Rules) -> Result:
    kept, dropped = [], []
    for row in read_rows(out / shard.inputs[0]):
        reason = drop_reason(row["text"], row["language"], rules)
        if reason is None:
            kept.append(row)
        else:
            dropped.append({"repo": row["repo"], "path": row["path"], "reason": reason})
    tables = {"part": pa.Table.from_pylist(kept, FILES), "dropped": pa.Table.from_pylist(dropped, DROPPED)}
    return Result(tables, tally(kept, dropped))
