"""Import edges of Java, Kotlin and Scala files, which use each other's classes.

A file's package is what its `package` line says, whatever folder it lies in. An import names a class, or something in
it, or opens a whole package; classes of the own package need none. So the classes of every package are tabled, and of
those that a file can see without an import, the ones whose names occur in its text are its (weak) dependencies.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice

from .graph import Edges
from .paths import name_of, stem_of
from .text import Declarations, matches

_PACKAGE = re.compile(r"[ \t]*+package[ \t]+(?!object\b)(?P<name>[\w.`]+)")
_IMPORT = re.compile(
    r"[ \t]*+import[ \t]+(?:static[ \t]+)?(?P<name>[\w.`]+)(?:\{(?P<several>[^{}]*)\}|(?P<all>\*))?(?:,[^\n]*)?"
)
_DECLARED = re.compile(
    r"\n(?:@[\w.]+(?:\([^()\n]*\))?[ \t]+)*+"
    r"(?:(?:public|(?:private|protected)(?:\[\w+\])?|internal|abstract|final|sealed|non-sealed|strictfp|static|open"
    r"|data|inline|value|case|implicit|lazy|override|suspend|annotation|enum(?=[ \t]+class)|expect|actual"
    r"|fun(?=[ \t]+interface)|transparent|opaque|const|lateinit|external|tailrec|infix|operator|package)[ \t]+)*+"
    r"(?:class|@?interface|object|trait|enum|record|typealias|type|def|fun|val|var|given)[ \t]+"
    r"(?:<[^>\n]*>[ \t]*)?(?:[\w.]+(?:<[^()=\n]*>)?\??\.)?`?(\w+)"
)


def edges(files: Mapping[str, str], present: Mapping[str, str]) -> Edges:
    """See `repository.imports`."""
    declared = Declarations()
    packages = {path: _package(path, text) for path, text in files.items()}
    for path, text in files.items():
        stem = stem_of(name_of(path))
        names = {stem, *_DECLARED.findall("\n" + text)} if text else set()
        if text and path.endswith(".kt"):
            names.add(f"{stem[0].upper()}{stem[1:]}Kt")  # what Java calls the class of its functions
        for name in names:
            declared.add(packages[path], name, path, implicit=name[0].isupper())
    return {path: _dependencies(path, text, packages[path], declared) for path, text in files.items()}


def _package(path: str, text: str) -> str:
    # Scala may write `package a.b` and `package c` for a.b.c.
    lines = islice(matches(text, "package", _PACKAGE), 4 if path.endswith(".scala") else 1)
    return ".".join(match["name"].replace("`", "").strip(".") for match in lines)


def _dependencies(path: str, text: str, package: str, declared: Declarations) -> dict[str, bool]:
    found: dict[str, bool] = {}
    opened = {package}
    for name, everything in _imports(text):
        # Scala's imports may count from the own package.
        file = declared.find(name, path) or declared.find(f"{package}.{name}", path, 0)
        if file is not None:
            found[file] = True
        if everything:
            opened.add(name)
    for _, file in declared.used(text, opened, path):
        found.setdefault(file, False)
    return found


def _imports(text: str) -> Iterator[tuple[str, bool]]:
    """(name, whether all that is in it): `a.b.{C, D => E, _}` is a.b.C, a.b.D, and all of a.b."""
    for match in matches(text, "import", _IMPORT):
        name = match["name"].replace("`", "").strip(".")
        if match["several"] is not None:
            for part in match["several"].split(","):
                selected = part.replace("`", "").split()
                if selected and selected[0] in ("_", "*", "given"):
                    yield name, True
                elif selected:
                    yield f"{name}.{selected[0]}", False
        elif match["all"] or name.endswith("._"):
            yield name.removesuffix("._"), True
        else:
            yield name, False
