"""The files of a repository's folder, and which of them somebody else wrote.

What the corpus leaves out for that, no prompt shows to the model either.

Vendored are files by GitHub linguist's rules (lib/linguist/vendor.yml), as tables of names. Left out of linguist's list
are rules that serve language statistics and would take hand-written code from a corpus: `tools/`, `deps/`, `cache/`,
`env/`, `debian/`, `vignettes/`, `.d.ts`, `Jenkinsfile`, `Vagrantfile`, `fabfile.py`, `*import.css`. Added are the
folders of package managers, virtual environments and caches of tools.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

MAX_FILE_BYTES = 1 << 20  # hardly anything above it is written by hand
OWN_RECORDS = frozenset((".git", ".hg", ".svn"))  # not files of the repository

# Folders, wherever they stand. In `_FOLDERS` are those with variants.
# fmt: off
VENDORED = frozenset((
    "node_modules", "bower_components", "vendor", "vendors", "Vendor", "vendored", "third_party", "thirdparty",
    "third-party", "3rdparty", "3rd_party", "3rd-party", "extern", "external", "Godeps", "Pods", "Carthage", "dist",
    "site-packages", "dist-packages", "__pycache__", ".venv", "venv", ".tox", ".nox", ".eggs", ".gradle", ".yarn",
    ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", "bootstrap-datepicker", "ace-builds",
    "MathJax", "Sparkle", "admin_media", "extjs", ".google_apis", "puphpet",
))

_SCRIPTS = (  # JavaScript and CSS that projects copy in, with or without version or variant behind the name
    "bootstrap", "jquery", "angular", "react", "d3", "modernizr", "mootools", "yui", "yahoo", "cordova", "knockout",
    "tiny_mce", "fontello", "foundation", "prototype",
)
_EXACT = (
    "ckeditor", "dojo", "MochiKit", "Chart", "html5shiv", "effects", "controls", "dragdrop", "shCore", "shLegacy",
    "fuelux", "normalize", "animate", "font-awesome", "octicons", "leaflet.draw", "leaflet.spin", "wicket-leaflet",
    "Control.FullScreen", "Microsoft(Mvc)?(Ajax|Validation)(.debug)?",
)
_AUTOCONF = ("configure", "config.guess", "config.sub", "aclocal.m4", "libtool.m4", r"lt[a-z~]+.m4")
_NAMES = ("cpplint.py", "erlang.mk", "rebar", "waf", "gradlew", "gradlew.bat", "mvnw", "mvnw.cmd", "activator",
          "activator.bat", "proguard-rules.pro", "run.n")
# fmt: on


def _any(names: tuple[str, ...]) -> str:
    return "|".join(name.replace(".", r"\.") for name in names)


_PATTERN = re.compile(
    rf"""(?:^|/)(?:
          (?:{_any(_SCRIPTS)})(?:[-.][a-z]+|[-.]?v?\d[\w.]*)*?\.(?:js|css|less|scss|styl)
        | (?:{_any(_EXACT)})(?:-src|\.src)?\.(?:js|css|less|scss|styl)
        | jquery[.-][^/]*\.(?:js|css)
        | shBrush[^/.]*\.js
        | (?:{_any(_AUTOCONF)}) | (?:{_any(_NAMES)})
        )$
      | [.-]min\.(?:js|css)$
      | (?:-vsdoc|\.intellisense)\.js$
      | (?:^|/)gradle/wrapper/
      | (?:^|/)\.mvn/wrapper/
      | (?:^|/)tiny_mce/(?:langs|plugins|themes|utils)/
      | (?:^|/)[Cc]ode[Mm]irror/(?:\d+\.\d+/)?(?:lib|mode|theme|addon|keymap|demo)/
      | (?:^|/)docs?/_?(?:build|themes?|static)/
      | (?:Crashlytics|Fabric)\.framework/
      | ^[Pp]ackages/.+\.\d+/
      | ^(?:[Tt]ests?|[Ss]pecs?)/fixtures/
    """,
    re.VERBOSE,
)


def walk(root: Path, passed: Callable[[Path], bool]) -> Iterator[tuple[str, os.DirEntry[str] | str]]:
    """(path under root, entry) of every regular file, and (path, reason) of what is passed over, always in one order.

    passed: of a folder, whether it is passed over without a word. Vendored folders are not entered.
    Without recursion: a folder may be nested more deeply than Python's calls.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            yield folder + "/", "unreadable"
            continue
        below = []
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                yield path, "symbolic link"
            elif entry.is_dir():
                if entry.name in VENDORED:
                    yield path + "/", "vendored folder"
                elif entry.name not in OWN_RECORDS and not passed(Path(entry.path)):
                    below.append(path)
            elif entry.is_file():
                yield path, entry
            else:
                yield path, "not a regular file"
        folders += reversed(below)


def vendored(path: str) -> bool:
    """Whether a file, by its path in the repository, is somebody else's. (Folders: VENDORED.)"""
    return _PATTERN.search(path) is not None
