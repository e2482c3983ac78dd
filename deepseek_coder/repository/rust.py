"""Edges between Rust files.

`mod x;` makes x.rs or x/mod.rs a module below the file's own: a strong edge to it. `use` paths count from the crate's
root (`crate`), from the file's module (`self`, `super`, or a module below it) or from another crate of the workspace,
whose name is in its Cargo.toml (where that cannot be read: its folder's name). A path that stops at a crate's root
names something that the root declares or passes on: weak, like every path outside of a `use`.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping

from .graph import Edges
from .paths import DEPTH, Nearest, ancestors, folder_of, join, name_of, normal, stem_of
from .text import matches

_VISIBLE = r"[ \t]*+(?:pub(?:\([^)\n]*\))?[ \t]+)?"
_MOD = re.compile(_VISIBLE + r"mod[ \t]+(?:r#)?(?P<name>\w+)[ \t]*;")
_USE = re.compile(r"(?P<indent>[ \t]*+)(?:pub(?:\([^)\n]*\))?[ \t]+)?use[ \t]+(?P<tree>[^;]{1,20000}+);")
_EXTERN = re.compile(_VISIBLE + r"extern[ \t]+crate[ \t]+(?P<name>\w+)")
_AT_PATH = re.compile(r'#\[path\s*=\s*"([^"\n]+)"\]')
_IN_CODE = re.compile(r"crate(?:::\w+)+")
_TOKEN = re.compile(r"\w+|[{},*]|::")
_ROOTS = ("lib.rs", "main.rs")


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    crates = _Crates(files, present)
    return {path: _dependencies(path, text, crates) for path, text in files.items()}


def _dependencies(path: str, text: str, crates: "_Crates") -> dict[str, bool]:
    found: dict[str, bool] = {}

    def add(target: str | None, strong: bool) -> None:
        if target is not None:
            found[target] = found.get(target, False) or strong

    for match in matches(text, "mod", _MOD):
        add(crates.below(_module(path), match["name"]), True)
    for name in _AT_PATH.findall(text):
        target = normal(folder_of(path), name)
        add(target if target in crates.files else None, True)
    for match in matches(text, "use", _USE):
        for parts in _paths(match["tree"]):
            if match["indent"] and parts[0] == "super":
                parts = ["self", *parts[1:]]  # of a module written inside the file, such as its tests
            add(*crates.resolve(parts, path))
    for match in matches(text, "extern", _EXTERN):
        add(*crates.resolve([match["name"]], path))
    for name in set(_IN_CODE.findall(text)):
        add(crates.resolve(name.split("::", DEPTH)[:DEPTH], path)[0], False)
    return found


def _paths(tree: str) -> Iterator[list[str]]:
    """`a::{b, c::{D, E as F}}` is a::b, a::c::D, a::c::E."""
    stack: list[list[str]] = [[]]
    current: list[str] = []
    renamed = False
    for token in [*_TOKEN.findall(tree), ","]:
        if token == "{":
            stack.append((stack[-1] + current)[:DEPTH])
            current = []
        elif token in (",", "}"):
            if current:
                yield (stack[-1] + current)[:DEPTH]
            current = []
            if token == "}" and len(stack) > 1:
                stack.pop()
            renamed = False
        elif token == "as":
            renamed = True
        elif token != "::" and not renamed and len(current) < DEPTH:
            current.append(token)


def _module(path: str) -> str:
    """The folder in which a file's submodules lie: "a/b" for a/b.rs, "a" for a/mod.rs and for a crate's root in a."""
    return folder_of(path) if name_of(path) in (*_ROOTS, "mod.rs") else stem_of(path)


class _Crates:
    def __init__(self, files: Mapping[str, str], present: Mapping[str, str]):
        self.files = files
        self.roots: dict[str, str] = {}  # folder -> the crate's root file in it; a library before a program
        for path in sorted(path for path in files if name_of(path) in _ROOTS):
            self.roots.setdefault(folder_of(path), path)
        self.names = Nearest()
        for folder, path in self.roots.items():
            if name_of(path) == "lib.rs":
                home = folder_of(folder) if name_of(folder) == "src" else folder
                for name in self._names_of(home, present):
                    self.names.add(name, path)

    def _names_of(self, home: str, present: Mapping[str, str]) -> set[str]:
        try:
            manifest = tomllib.loads(present[join(home, "Cargo.toml")])
            names = [manifest.get(section, {}).get("name") for section in ("lib", "package")]
        except (KeyError, ValueError, AttributeError, RecursionError):
            names = []
        known = {name.replace("-", "_") for name in names if isinstance(name, str)}
        return known or {name_of(home).replace("-", "_")}

    def below(self, module: str, name: str) -> str | None:
        for path in (join(module, f"{name}.rs"), join(module, f"{name}/mod.rs")):
            if path in self.files:
                return path
        return None

    def resolve(self, parts: list[str], importer: str) -> tuple[str | None, bool]:
        """(the file of the longest beginning of a path that is a module, whether the edge is strong)"""
        first, rest = parts[0], parts[1:]
        module = _module(importer)
        start: str | None
        if first in ("self", "super"):
            while first == "super":
                module = folder_of(module)
                first, rest = (rest[0], rest[1:]) if rest and rest[0] == "super" else ("", rest)
            start = self._file_of(module)
        elif first == "crate":
            folder = next((at for at in ancestors(folder_of(importer)) if at in self.roots), None)
            if folder is None:
                return None, False
            start, module = self.roots[folder], folder
        elif self.below(module, first):
            start, rest = None, parts
        elif (start := self.names.find(first, importer)) is not None:
            module = folder_of(start)
        else:
            return None, False
        target, strong = start, False
        for name in rest:
            file = self.below(module, name)
            if file is None:
                break
            target, strong, module = file, True, join(module, name)
        return target, strong or (target is not None and name_of(target) not in (*_ROOTS, "mod.rs"))

    def _file_of(self, module: str) -> str | None:
        candidates = (f"{module}.rs", *(join(module, name) for name in ("mod.rs", *_ROOTS)))
        return next((path for path in candidates if path in self.files), None)
