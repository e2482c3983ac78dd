"""Edges between PHP files: `use` and qualified names, through the namespaces and types that files declare, or through
the folders that composer.json gives to namespaces (PSR-4); `require` and `include` with a path.
"""

import json
import re
from collections.abc import Iterator, Mapping

from .graph import Edges
from .paths import Nearest, folder_of, join, name_of, normal, suffixes
from .text import Declarations, matches

_NAMESPACE = re.compile(r"(?:[ \t]|<\?php)*+namespace[ \t]+(?P<name>[\w\\]+)")
_USE = re.compile(r"[ \t]*+use[ \t]+(?:(?:function|const)[ \t]+)?(?P<name>[\w\\]+)(?:\{(?P<several>[^{}]*)\})?[^;\n]*;")
_TYPE = re.compile(
    r"\n[ \t]*+(?:(?:abstract|final|readonly)[ \t]+)*+(?:class|interface|trait|enum|function)[ \t]+(\w+)"
)
_QUALIFIED = re.compile(r"\\[A-Za-z_]\w*(?:\\\w+)+")
_REQUIRE = re.compile(
    r"(?:require|include)(?:_once)?\b[ \t(]*+"
    r"(?P<here>(?:__DIR__|dirname[ \t]*\([ \t]*(?:__FILE__|__DIR__)[ \t]*\))[ \t]*\.)?"
    r"[ \t]*['\"](?P<path>[^'\"\n]+)['\"]"
)


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    declared = Declarations()
    spaces = {}
    for path, text in files.items():
        first = next(matches(text, "namespace", _NAMESPACE), None)
        spaces[path] = _dots(first["name"]) if first else ""
        for name in _TYPE.findall("\n" + text):
            declared.add(spaces[path], name, path, implicit=name[0].isupper())
    required = {path: [(m["here"], m["path"]) for m in _REQUIRE.finditer(text)] for path, text in files.items()}
    wanted = {name.lstrip("./") for some in required.values() for _, name in some}
    by_suffix = Nearest()
    for path in files:
        for suffix in suffixes(path, wanted):
            by_suffix.add(suffix, path)
    folders = _psr4(present)
    found: Edges = {}
    for path, text in files.items():
        found[path] = {}
        for name, strong in _names(text):
            target = declared.find(name, path, 1) or _autoloaded(name, folders, files)
            if target is not None:
                found[path][target] = found[path].get(target, False) or strong
        for here, name in required[path]:
            target = _required(path, here, name, files) or by_suffix.find(name.lstrip("./"), path)
            if target is not None:
                found[path][target] = True
        for _, target in declared.used(text, (spaces[path],), path):
            found[path].setdefault(target, False)
    return found


def _dots(name: str) -> str:
    return name.strip("\\").replace("\\", ".")


def _names(text: str) -> Iterator[tuple[str, bool]]:
    for match in matches(text, "use", _USE):
        if match["several"] is not None:
            for part in match["several"].split(","):
                if part.split():
                    yield f"{_dots(match['name'])}.{_dots(part.split()[0])}", True
        else:
            yield _dots(match["name"]), True
    for name in _QUALIFIED.findall(text):
        yield _dots(name), False


def _required(path: str, here: str | None, name: str, files: Mapping[str, str]) -> str | None:
    folder = folder_of(path)
    if here and "__DIR__" in here and "dirname" in here:
        folder = folder_of(folder)
    for base in (folder, ""):
        target = normal(base, name.lstrip("/") if here else name)
        if target in files:
            return target
    return None


def _psr4(present: Mapping[str, str]) -> dict[str, list[str]]:
    """namespace -> folders, of every composer.json."""
    folders: dict[str, list[str]] = {}
    for path, text in present.items():
        if name_of(path) == "composer.json":
            try:
                composer = json.loads(text)
                for section in ("autoload", "autoload-dev"):
                    for prefix, below in composer.get(section, {}).get("psr-4", {}).items():
                        for folder in [below] if isinstance(below, str) else below:
                            at = normal(folder_of(path), folder)
                            folders.setdefault(_dots(prefix), []).extend([] if at is None else [at])
            except (ValueError, AttributeError, TypeError, RecursionError):
                continue  # not a composer.json
    return folders


def _autoloaded(name: str, folders: dict[str, list[str]], files: Mapping[str, str]) -> str | None:
    prefix = name
    while prefix:
        for folder in folders.get(prefix, ()):
            target = join(folder, name[len(prefix) + 1 :].replace(".", "/") + ".php")
            if target in files:
                return target
        prefix = prefix.rpartition(".")[0]
    return None
