"""Import edges of Go files.

An import names a folder: the module path of a go.mod, and the way from there (several modules in one repository are
common). Where no go.mod can be read, the module path is the beginning of import paths whose rest most often is a
folder here. Of the folder's files a file depends on those that declare what it uses (`package.Name`), strongly; on
those of its own package that declare a name which occurs in it, weakly: they need no import.
"""

import re
from collections.abc import Iterator, Mapping

from .graph import Edges
from .paths import DEPTH, ancestors, folder_of, join, name_of
from .text import matches, words

_PACKAGE = re.compile(r"[ \t]*+package[ \t]+(?P<name>\w+)")
_IMPORT = re.compile(r"import[ \t]*+(?:\((?P<several>[^)]*+)\)|(?P<one>(?:[\w.]+[ \t]+)?\"[^\"\n]+\"))")
_SPEC = re.compile(r"^\s*+(?P<alias>[\w.]+[ \t]+)?[\"`](?P<path>[^\"`\n]+)[\"`]", re.MULTILINE)
_DECLARED = re.compile(r"\n(?:func|type|var|const)[ \t]+(?:\([^)\n]*\)[ \t]*\w+|(\w+))")
_GROUP = re.compile(r"\n(?:type|var|const)[ \t]*\((?P<body>[^)]*+)")
_MEMBER = re.compile(r"\n\t(\w+)")
_MODULE = re.compile(r"^module[ \t]+\"?([^\s\"]+)", re.MULTILINE)


class _Package:
    """The files of one folder: its package's name, and where each name is declared."""

    def __init__(self) -> None:
        self.name = ""
        self.files: list[str] = []
        self.declared: dict[bytes, str] = {}


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    packages: dict[str, _Package] = {}
    for path in sorted(files, key=lambda path: (path.endswith("_test.go"), path)):
        package = packages.setdefault(folder_of(path), _Package())
        package.files.append(path)
        clause = next(matches(files[path], "package", _PACKAGE), None)
        package.name = package.name or (clause["name"] if clause else "")
        for name in _declared(files[path]):
            package.declared.setdefault(name.encode(), path)
    imported = {path: list(_imports(text)) for path, text in files.items()}
    modules = _modules(present) or _inferred(imported, packages)
    found: Edges = {}
    for path, some in imported.items():
        found[path] = _dependencies(path, files[path], some, packages, modules)
    return found


def _declared(text: str) -> Iterator[str]:
    yield from (name for name in _DECLARED.findall("\n" + text) if name not in ("", "main", "init", "_"))
    for group in _GROUP.finditer("\n" + text):
        yield from _MEMBER.findall(group["body"])


def _imports(text: str) -> Iterator[tuple[str, str]]:
    """(alias or "", import path)"""
    for match in matches(text, "import", _IMPORT):
        for spec in _SPEC.finditer(match["several"] or match["one"] or ""):
            yield (spec["alias"] or "").strip(), spec["path"]


def _modules(present: Mapping[str, str]) -> dict[str, str]:
    """module path -> folder, of every go.mod whose text is known; of two copies the one nearer to the top."""
    modules: dict[str, str] = {}
    for path in sorted(present, key=lambda path: (path.count("/"), path)):
        if name_of(path) == "go.mod" and (match := _MODULE.search(present[path])):
            modules.setdefault(match[1], folder_of(path))
    return modules


def _inferred(imported: Mapping[str, list[tuple[str, str]]], packages: Mapping[str, _Package]) -> dict[str, str]:
    votes: dict[str, int] = {}
    for _, name in (one for some in imported.values() for one in some):
        parts = name.split("/", DEPTH)
        if "." in parts[0]:  # else of the standard library
            for count in range(1, len(parts)):
                if "/".join(parts[count:]) in packages:
                    module = "/".join(parts[:count])
                    votes[module] = votes.get(module, 0) + 1
    best = max(sorted(votes), key=lambda module: votes[module], default=None)
    return {} if best is None else {best: ""}


def _folder(name: str, importer: str, packages: Mapping[str, _Package], modules: Mapping[str, str]) -> str | None:
    below = ""
    prefix = name
    for _ in range(DEPTH):
        if prefix in modules and (folder := join(modules[prefix], below)) in packages:
            return folder
        prefix, _, last = prefix.rpartition("/")
        below = join(last, below)
        if not prefix:
            break
    if "." in name.partition("/")[0]:
        for root in ancestors(folder_of(importer)):
            if (folder := join(root, f"vendor/{name}")) in packages:
                return folder
    return None


def _dependencies(
    path: str,
    text: str,
    imported: list[tuple[str, str]],
    packages: Mapping[str, _Package],
    modules: Mapping[str, str],
) -> dict[str, bool]:
    found: dict[str, bool] = {}
    used: dict[bytes, set[bytes]] = {}  # what stands before a dot -> what stands behind it
    alone: set[bytes] = set()
    for word in words(text):
        first, dot, rest = word.partition(b".")
        alone.add(first)
        if dot:
            used.setdefault(first, set()).add(rest.partition(b".")[0])
    for alias, name in imported:
        folder = _folder(name, path, packages, modules)
        if folder is None or folder == folder_of(path):
            continue
        package = packages[folder]
        names = alone if alias == "." else used.get((alias or package.name).encode(), set())
        targets = {package.declared[word] for word in names & package.declared.keys()}
        targets = {target for target in targets if not target.endswith("_test.go")}
        for target in targets:
            found[target] = True
        if not targets:  # for its effects, or under a name that was not understood
            found[package.files[0]] = False
    own = packages[folder_of(path)].declared
    for word in alone & own.keys():
        if path.endswith("_test.go") or not own[word].endswith("_test.go"):
            found.setdefault(own[word], False)
    return found
