"""Import edges of JavaScript and TypeScript files.

A specifier is a path beside the file (extension and `index` left out, or `.js` written for a `.ts`), a path alias or a
path from `baseUrl` of the nearest tsconfig.json or jsconfig.json, or the name of a package of the same repository (a
workspace of a monorepo). Imports of types only, dynamic imports and `require` inside a function are weak.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .graph import Edges
from .paths import Nearest, ancestors, folder_of, join, name_of, normal, stem_of

# One expression for each word: one that begins with a fixed text is found ten times faster than one that may begin
# with any of three.
_QUOTED = r"""["'`](?P<name>[^"'`\n]{1,500})["'`]"""
_FROM = re.compile(r"from\s*+" + _QUOTED)
_CALLS = (re.compile(r"import\s*+(?P<call>\(\s*+)?" + _QUOTED), re.compile(r"require\s*+(?P<call>\(\s*+)" + _QUOTED))
_STATEMENT_START = 2000  # characters before `from` in which its `import` is looked for
_TYPE_ONLY = re.compile(r"(?:import|export)\s+type\b(?!\s*(?:,|from\s*[\"']))")

# In the order of preference: a source before what may be compiled from it.
_EXTENSIONS = (".ts", ".tsx", ".mts", ".cts", ".js", ".jsx", ".mjs", ".cjs", ".jsm")
_COMPILED = re.compile(r"(?:\.d)?\.(?:js|jsx|mjs|cjs|ts|mts|cts)$|\.d$")
_PUBLISHED = re.compile(r"^(?:\./)?(?:dist|lib|build|out)/(?:(?:esm|cjs|es|types)/)?")


class _Config(NamedTuple):
    """What a tsconfig.json says about names. patterns: (before the star, behind it, targets), longest first."""

    base: str | None
    patterns: list[tuple[str, str, list[str]]]


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    modules = _Modules(files, present)
    found: Edges = {}
    for path, text in files.items():
        found[path] = {}
        for name, strong in specifiers(text):
            target = modules.resolve(name, path)
            if target is not None:
                found[path][target] = found[path].get(target, False) or strong
    return found


def specifiers(text: str) -> Iterator[tuple[str, bool]]:
    """(what is imported, whether strongly); not what stands in a comment, where examples are."""
    done = 0
    for match in _FROM.finditer(text):
        low = max(done, match.start() - _STATEMENT_START)
        begin = max(text.rfind(word, low, match.start()) for word in ("import", "export"))
        done = match.end()
        if begin != -1 and not _in_comment(text, low, begin):
            yield match["name"], not _TYPE_ONLY.match(text, begin)
    for pattern in _CALLS:
        done = 0
        for match in pattern.finditer(text):
            start = match.start()
            low = max(done, start - _STATEMENT_START)
            done = match.end()
            if not _in_comment(text, low, start):
                line = text.rfind("\n", low, start) + 1
                late = text[line : line + 1].isspace() or text.startswith("import", start)
                yield match["name"], not (match["call"] and late)


def _in_comment(text: str, low: int, at: int) -> bool:
    """Whether the line of position `at` is one of a comment; it is looked at from position `low`."""
    line = text.rfind("\n", low, at) + 1
    return line > 0 and text[line:at].lstrip().startswith(("*", "//", "/*"))


class _Modules:
    def __init__(self, files: Mapping[str, str], present: Mapping[str, str]):
        self.files: dict[str, str] = {}  # how a file can be named -> file; the first in the order of preference wins
        for path in sorted(files, key=_preference):
            stem = _without_extension(path)
            self.files.setdefault(path, path)
            self.files.setdefault(stem, path)
            if name_of(stem) == "index":
                self.files.setdefault(folder_of(stem), path)
        self.packages = Nearest()  # name of a package -> its package.json
        self.entries: dict[str, list[str]] = {}
        configs: dict[str, Any] = {}
        for path, text in present.items():
            name = name_of(path)
            if name == "package.json":
                self._add_package(path, _json(text))
            elif name.endswith(".json") and "config" in name:
                configs[path] = _json(text)
        self.configs = {
            folder_of(path): _names_of(path, configs)
            for path in sorted(configs, key=lambda path: (len(path), path), reverse=True)
            if name_of(path).startswith(("tsconfig", "jsconfig"))
        }
        self._nearest: dict[str, _Config | None] = {}

    def _add_package(self, path: str, package: Any) -> None:
        if not isinstance(package, dict):
            return
        if isinstance(package.get("name"), str):
            self.packages.add(package["name"], path)
        entries = [package[key] for key in ("source", "types", "module", "main") if isinstance(package.get(key), str)]
        self.entries[path] = [*entries, "src/index", "index", "lib/index", "src/main"]

    def resolve(self, name: str, importer: str) -> str | None:
        folder = folder_of(importer)
        if name.startswith((".", "/")):
            base = folder if name[0] == "." else ""
            return self._file(base, name) or self._entry(join(normal(base, name) or "", "package.json"))
        config = self._config(folder)
        if config is not None:
            for before, behind, targets in config.patterns:
                if name.startswith(before) and name.endswith(behind) and len(name) >= len(before) + len(behind):
                    star = name[len(before) : len(name) - len(behind)]
                    for target in targets:
                        file = self._file("", target.replace("*", star, 1))
                        if file is not None:
                            return file
            if config.base is not None and (file := self._file(config.base, name)):
                return file
        if name.startswith(("@/", "~/")):  # what bundlers' templates set these to
            return self._nearest_source(folder, name[2:])
        return self._of_package(name, importer)

    def _file(self, folder: str, relative: str) -> str | None:
        path = normal(folder, relative)
        if path is None:
            return None
        return self.files.get(path) or self.files.get(_COMPILED.sub("", path))

    def _nearest_source(self, folder: str, relative: str) -> str | None:
        for root in ancestors(folder):
            file = self._file(join(root, "src"), relative) or self._file(root, relative)
            if file is not None:
                return file
        return None

    def _of_package(self, name: str, importer: str) -> str | None:
        parts = name.split("/", 2)
        count = 2 if name.startswith("@") else 1
        manifest = self.packages.find("/".join(parts[:count]), importer)
        if manifest is None:
            return None
        folder, below = folder_of(manifest), name.split("/", count)[count:]
        if below:
            return self._file(folder, below[0]) or self._file(join(folder, "src"), below[0])
        return self._entry(manifest)

    def _entry(self, manifest: str) -> str | None:
        """The file that a package.json names for the package as a whole; rather its source than what is made of it."""
        folder = folder_of(manifest)
        for entry in self.entries.get(manifest, ()):
            file = self._file(folder, _PUBLISHED.sub("src/", entry)) or self._file(folder, entry)
            if file is not None:
                return file
        return None

    def _config(self, folder: str) -> _Config | None:
        passed = []
        config = None
        for at in ancestors(folder):
            if at in self._nearest:
                config = self._nearest[at]
                break
            passed.append(at)
            if at in self.configs:
                config = self.configs[at]
                break
        for at in passed:
            self._nearest[at] = config
        return config


def _preference(path: str) -> tuple[bool, int, str]:
    declares = stem_of(path).endswith(".d")  # a .d.ts
    return declares, next((i for i, ext in enumerate(_EXTENSIONS) if path.endswith(ext)), len(_EXTENSIONS)), path


def _without_extension(path: str) -> str:
    stem = stem_of(path)
    return stem[:-2] if stem.endswith(".d") else stem


def _json(text: str) -> Any:
    """JSON as tsconfig.json has it, with comments and commas too many; None for anything else."""
    keep = re.compile(r'("(?:\\.|[^"\\])*+")|//[^\n]*+|/\*.*?\*/', re.DOTALL)
    try:
        try:
            return json.loads(text)
        except ValueError:
            plain = keep.sub(lambda match: match[1] or "", text)
            return json.loads(re.sub(r",(\s*[}\]])", r"\1", plain))
    except (ValueError, RecursionError):
        return None


def _names_of(path: str, configs: Mapping[str, Any]) -> _Config:
    """baseUrl and paths of a configuration; what it lacks comes from the one that it extends."""
    base: str | None = None
    patterns: list[tuple[str, str, list[str]]] = []
    at: str | None = path
    for _ in range(8):
        config = configs.get(at) if at is not None else None
        if at is None or not isinstance(config, dict):
            break
        options = config.get("compilerOptions")
        options = options if isinstance(options, dict) else {}
        if base is None and isinstance(options.get("baseUrl"), str):
            base = normal(folder_of(at), options["baseUrl"])
        if not patterns and isinstance(options.get("paths"), dict):
            origin = normal(folder_of(at), options["baseUrl"]) if isinstance(options.get("baseUrl"), str) else base
            origin = folder_of(at) if origin is None else origin
            for name, targets in list(options["paths"].items())[:200]:
                before, star, behind = name.partition("*")
                wanted = [normal(origin, t) for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
                patterns.append((before, behind if star else "", [t for t in wanted if t is not None]))
        extends = config.get("extends")
        extends = extends[0] if isinstance(extends, list) and extends else extends
        if not isinstance(extends, str) or not extends.startswith("."):
            break
        at = normal(folder_of(at), extends if extends.endswith(".json") else f"{extends}.json")
    return _Config(base, sorted(patterns, key=lambda pattern: -len(pattern[0])))
