"""Edges between Ruby files: `require_relative` from the file, `require` from the nearest lib/ (or any other folder that
may be on the load path). What autoload finds by the name of a constant leaves no trace in the text."""

import re
from collections.abc import Mapping

from .graph import Edges
from .paths import Nearest, folder_of, normal, suffixes
from .text import matches

_REQUIRE = re.compile(
    r"[ \t]*+(?:(?P<relative>require_relative)|(?P<load>require|load|autoload[ \t(]+:\w+[ \t]*,))[ \t(]*+"
    r"(?P<here>File\.(?:expand_path|join)\([ \t]*+(?:File\.dirname\(__FILE__\)|__dir__)?[ \t,]*+)?"
    r"['\"](?P<name>[^'\"\n]+)['\"]"
)
_WORDS = ("require", "load")


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    found = {
        path: [match for word in _WORDS for match in matches(text, word, _REQUIRE)] for path, text in files.items()
    }
    names = {match["name"] for some in found.values() for match in some}
    wanted = {_file(name) for name in names}
    by_suffix, in_lib = Nearest(), Nearest()
    for path in files:
        for suffix in suffixes(path, wanted):
            by_suffix.add(suffix, path)
            if path.endswith(f"lib/{suffix}"):
                in_lib.add(suffix, path)
    edges: Edges = {path: {} for path in files}
    for path, some in found.items():
        for match in some:
            name = _file(match["name"])
            beside = normal(folder_of(path), name)
            if (match["relative"] or match["here"] or name.startswith(".")) and beside in files:
                target: str | None = beside
            elif match["relative"]:
                continue
            else:
                target = in_lib.find(name, path) or by_suffix.find(name, path)
            if target is not None:
                strong = not match["load"] or not match["load"].startswith("autoload")
                edges[path][target] = edges[path].get(target, False) or strong
    return edges


def _file(name: str) -> str:
    return name if name.endswith((".rb", ".rake")) else f"{name}.rb"
