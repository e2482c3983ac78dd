"""Import edges of Python files.

A name counts from a root: a folder that may be on `sys.path`. Which are is not written anywhere, so every folder
without `__init__.py` is one (a namespace package, a folder of scripts). *Strong* roots (the repository, a project with
setup.py or pyproject.toml, its src/) hold real top-level names. At another root a single module is believed only from
files below it, and one with a name of the standard library (of the running Python) only from a script beside it: what
is called yaml.py somewhere is hardly ever the yaml that the others import.
"""

import re
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice

from .graph import Edges
from .paths import DEPTH, Nearest, ancestors, folder_of, join, name_of, stem_of
from .text import matches

# (strong, leading dots, module, names); names is None for `import module`
Statement = tuple[bool, int, str, list[str] | None]

# Statements are found by regular expression, as the paper did: 20 times faster than a parser, and it reads files that
# do not parse. The 1.4% it finds too much, in strings, mostly name nothing in the repository. Inside the parentheses
# only names and comments are allowed, so that an unclosed one cannot make the search run over the rest of the file.
_STATEMENT = re.compile(
    r"""(?P<indent>[ \t]*+)(?:
        import[ \t]+(?P<modules>(?:[^\n#;\\]|\\\n)+)
      | from\b(?P<dots>[. \t]*+)(?P<module>(?:(?!import\b)[\w.]++)?)(?:[ \t]|\\\n)*+import\b[ \t]*
        (?:\((?P<many>(?:[\w\s,.*\\]|\#[^\n]*+)*+)\)|(?P<names>(?:[^\n#;(\\]|\\\n)+))
    )""",
    re.VERBOSE,
)
_COMMENT = re.compile(r"#[^\n]*")
# What opens a block on the top level, and whether an import inside it waits until after the module was imported.
_BLOCK = re.compile(
    r"\n(?:(?P<later>(?:async[ \t]+)?def\b|class\b|if[ \t]+(?:\w+\.)?TYPE_CHECKING\b)"
    r"|(?:if|elif|else|try|except|finally|with|for|while)\b)"
)
_SUFFIXES = (".py", ".pyi", ".pyw")


def statements(text: str) -> list[Statement]:
    """The imports of one file, `import a, b` as two. Weak are those inside a function or `if TYPE_CHECKING`."""
    found: list[Statement] = []
    blocks: tuple[list[int], list[bool]] | None = None
    for match in matches(text, "import", _STATEMENT):
        strong = True
        if match["indent"]:
            blocks = blocks or _blocks(text)
            at = bisect_right(blocks[0], match.start()) - 1
            strong = at < 0 or not blocks[1][at]
        if match["modules"] is not None:
            found += [(strong, 0, name, None) for name in _first_words(match["modules"])]
        else:
            names = _first_words(match["names"] if match["many"] is None else _COMMENT.sub("", match["many"]))
            found.append((strong, match["dots"].count("."), match["module"], names))
    return found


def _blocks(text: str) -> tuple[list[int], list[bool]]:
    found = [(match.start(), match["later"] is not None) for match in _BLOCK.finditer(text)]
    return [start for start, _ in found], [later for _, later in found]


def _first_words(names: str) -> list[str]:
    """The names of `a.b as c, d`: what stands before `as`."""
    return [words[0] for part in names.split(",") if (words := part.replace("\\\n", " ").split())]


class _Modules:
    """Which file a dotted name means, seen from another file."""

    def __init__(self, paths: Iterable[str], present: Collection[str], wanted: Collection[str]):
        """wanted: the dotted names that are going to be asked for; others are not indexed."""
        # path without suffix -> file: "a/b" -> "a/b/__init__.py". The last one written wins: a package before a module,
        # as in Python, and a source before its stub.
        sources = sorted((path for path in paths if path.endswith(_SUFFIXES)), key=_precedence)
        self.files: dict[str, str] = {_stem(path): path for path in sources}
        self.packages = {stem for stem, path in self.files.items() if _is_package(path)}
        projects = {folder_of(path) for path in present if name_of(path) in ("setup.py", "pyproject.toml")}
        strong = ({""} | projects | {join(project, "src") for project in projects}) - self.packages
        self.anywhere, self.at_strong = Nearest(), Nearest()
        for stem, path in self.files.items():
            for root, name in _roots(stem):
                if name in wanted and root not in self.packages:
                    if root in strong:
                        self.at_strong.add(name, path)
                    if root in strong or "." in name or _is_package(path):
                        self.anywhere.add(name, path)

    def resolve(self, name: str, importer: str) -> str | None:
        """The file of exactly this absolute name; of several the one nearest to the importer."""
        folder = folder_of(importer)
        if name.partition(".")[0] in sys.stdlib_module_names:
            beside = self._at(folder, name, importer) if folder not in self.packages else None
            return beside or self.at_strong.find(name, importer)
        # Inside a package names begin further up; but the repository itself is always a root, and files of a package
        # may name their siblings without dots (Python 2, and scripts kept inside a package).
        return (
            self._above(name, importer)
            or self.anywhere.find(name, importer)
            or (self._at(folder, name, importer) if "." not in name else None)
            or self._at("", name, importer)
        )

    def _above(self, name: str, importer: str) -> str | None:
        """A top-level name at the nearest root that the importer lies below."""
        roots = [] if "." in name else islice(ancestors(folder_of(importer)), DEPTH)
        return next(
            (path for root in roots if root not in self.packages and (path := self._at(root, name, importer))), None
        )

    def _at(self, root: str, name: str, importer: str) -> str | None:
        path = self.files.get(join(root, name.replace(".", "/")))
        return None if path == importer else path

    def resolve_longest(self, name: str, importer: str) -> str | None:
        """`a.b.c` may name a thing inside the module `a.b`: the longest prefix that is a file."""
        for prefix in _prefixes(name):
            path = self.resolve(prefix, importer)
            if path is not None:
                return path
        return None

    def resolve_relative(self, level: int, module: str, importer: str) -> tuple[str | None, str | None]:
        """The stem ("a/b") that `..module` means, and its file; (None, None) when the dots leave the repository."""
        parts = importer.split("/")[:-1]
        if level - 1 > len(parts):
            return None, None
        stem = "/".join(parts[: len(parts) - level + 1] + [part for part in module.split(".") if part])
        return stem, self.files.get(stem)


def _prefixes(name: str) -> Iterator[str]:
    """a.b.c, a.b, a"""
    name = ".".join(name.split(".", DEPTH)[:DEPTH])
    while name:
        yield name
        name = name.rpartition(".")[0]


def _roots(stem: str) -> Iterator[tuple[str, str]]:
    """Every folder above a file, with the dotted name that the file has from there."""
    at = len(stem)
    for _ in range(DEPTH):
        at = stem.rfind("/", 0, max(at, 0))
        if stem:
            yield stem[: max(at, 0)], stem[at + 1 :].replace("/", ".")
        if at == -1:
            break


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    found = {path: statements(text) for path, text in files.items()}
    wanted: set[str] = set()
    for _, level, module, names in (statement for some in found.values() for statement in some):
        if not level:
            wanted.update(_prefixes(module))
            wanted.update(f"{module}.{name}" for name in names or ())
    modules = _Modules(files, present, wanted)
    own_name = _own_name(modules, found)
    return {path: _dependencies(path, some, modules, own_name) for path, some in found.items()}


def _dependencies(path: str, found: list[Statement], modules: _Modules, own_name: str | None) -> dict[str, bool]:
    dependencies: dict[str, bool] = {}
    for strong, level, module, names in found:
        importer = path
        if level == 0 and own_name is not None and module.partition(".")[0] == own_name:
            # The repository is the package itself: its name counts from the repository's folder.
            level, importer = 1, "__init__.py"
            module = module.partition(".")[2]
            if names is None:  # `import own.a.b`
                module, _, last = module.rpartition(".")
                names = [last] if last else []
        wanted: list[str | None] = [*names] if names else [None]
        for name in wanted:
            file = _target(modules, level, module, name, importer)
            if file is not None:
                # Of a package as a whole, mostly only a name is wanted that it passes on.
                dependencies[file] = dependencies.get(file, False) or (strong and not _is_package(file))
    return dependencies


def _target(modules: _Modules, level: int, module: str, name: str | None, importer: str) -> str | None:
    if level:
        stem, file = modules.resolve_relative(level, module, importer)
        return modules.files.get(join(stem, name), file) if stem is not None and name else file
    exact = modules.resolve(f"{module}.{name}", importer) if name not in (None, "*") else None
    return exact or modules.resolve_longest(module, importer)


def _own_name(modules: _Modules, found: Mapping[str, list[Statement]]) -> str | None:
    """The name of a repository whose folder is itself a package.

    The folder's name is not part of the paths, but the package's files use it: it is the unresolved first name whose
    rest most often is a file here.
    """
    if "" not in modules.packages:
        return None
    votes: dict[str, int] = defaultdict(int)
    for path, some in found.items():
        for _, level, module, names in some:
            first, _, rest = module.partition(".")
            if level or not first or modules.resolve(first, path):
                continue
            stem = rest.replace(".", "/")
            if (rest and stem in modules.files) or any(join(stem, name) in modules.files for name in names or ()):
                votes[first] += 1
    return max(sorted(votes), key=lambda name: votes[name], default=None)


def _is_package(path: str) -> bool:
    return name_of(path).startswith("__init__.")


def _precedence(path: str) -> tuple[bool, bool, str]:
    return _is_package(path), path.endswith(".py"), path


def _stem(path: str) -> str:
    """What imports call a file: "a/b" for a/b.py and for a/b/__init__.py, "" for the repository's own __init__.py."""
    return folder_of(path) if _is_package(path) else stem_of(path)
