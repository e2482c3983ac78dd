"""Edges between C# files.

`using` names a namespace, not a file. So the types of every namespace are tabled, and a file depends on those that it
can see and whose names occur in its text: strongly through a `using`, weakly in its own namespace and the ones around
it. The parts of a partial type depend weakly on the first of them.
"""

import re
from collections.abc import Mapping

from .graph import Edges
from .paths import ancestors, folder_of
from .text import Declarations, matches

_USING = re.compile(
    r"[ \t]*+(?P<everywhere>global[ \t]+)?using[ \t]+(?:static[ \t]+)?(?:(?P<alias>\w+)[ \t]*=[ \t]*)?"
    r"(?:global::)?(?P<name>[\w.]+)(?:<[^;\n]*>)?[ \t]*;"
)
_NAMESPACE = re.compile(r"(?P<indent>[ \t]*+)namespace[ \t]+(?P<name>[\w.]+)")
_TYPE = re.compile(
    r"\n[ \t]*+(?:\[[^\]\n]*\][ \t]*)*+"
    r"(?:(?:public|internal|private|protected|static|sealed|abstract|readonly|ref|unsafe|file|new|partial)[ \t]+)*+"
    r"(?:class|struct|interface|enum|record(?:[ \t]+(?:class|struct))?"
    r"|delegate[ \t]+[\w.]+(?:<[^()\n]*>)?[\[\],?]*)[ \t]+@?(\w+)"
)


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    declared = Declarations()
    own: dict[str, set[str]] = {}
    parts: dict[str, list[str]] = {}  # partial type -> files that declare it
    for path, text in files.items():
        spaces = _namespaces(text)
        own[path] = {name for _, name in spaces} or {""}
        for match in _TYPE.finditer("\n" + text):
            while len(spaces) > 1 and spaces[1][0] < match.start():
                spaces.pop(0)
            space = spaces[0][1] if spaces else ""
            declared.add(space, match[1], path)
            if match[1].endswith("Attribute"):
                declared.add(space, match[1].removesuffix("Attribute"), path)  # as it is written in brackets
            if "partial" in match[0]:
                parts.setdefault(f"{space}.{match[1]}", []).append(path)
    usings = {path: _usings(text) for path, text in files.items()}
    projects = {folder_of(path) for path in present if path.endswith(".csproj")}
    everywhere: dict[str, set[str]] = {}
    for path, some in usings.items():
        everywhere.setdefault(_project(path, projects), set()).update(name for name, all_ in some if all_)
    found = {}
    for path, text in files.items():
        opened = {name for name, _ in usings[path]} | everywhere.get(_project(path, projects), set())
        found[path] = _dependencies(path, text, opened, own[path], declared)
    for several in parts.values():
        first = min(several, key=lambda path: (len(path), path))
        for path in several:
            found[path].setdefault(first, False)
    return found


def _namespaces(text: str) -> list[tuple[int, str]]:
    """(where it begins, full name) of each; one that is further to the right stands inside the one before."""
    found: list[tuple[int, str]] = []
    around: list[tuple[int, str]] = []
    for match in matches(text, "namespace", _NAMESPACE):
        indent, name = len(match["indent"].expandtabs(4)), match["name"].strip(".")
        while around and around[-1][0] >= indent:
            around.pop()
        name = f"{around[-1][1]}.{name}" if around else name
        around.append((indent, name))
        found.append((match.start(), name))
    return found


def _usings(text: str) -> list[tuple[str, bool]]:
    return [(match["name"].strip("."), bool(match["everywhere"])) for match in matches(text, "using", _USING)]


def _project(path: str, projects: set[str]) -> str:
    return next((folder for folder in ancestors(folder_of(path)) if folder in projects), "")


def _dependencies(path: str, text: str, opened: set[str], own: set[str], declared: Declarations) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for name in sorted(opened):  # `using X = A.B.Type`, `using static A.B.Type`
        file = declared.find(name, path, 0)
        if file is not None:
            found[file] = True
    around = {outer.replace("/", ".") for name in own for outer in ancestors(name.replace(".", "/"))}
    for space, file in declared.used(text, opened | around, path):
        found[file] = found.get(file, False) or space not in around
    return found
