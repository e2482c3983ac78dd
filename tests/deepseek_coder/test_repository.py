"""Import edges, against Python's own syntax tree on real packages; dependency order, against the paper's algorithm."""

import ast
import asyncio
import email
import http
import importlib
import importlib.util
import json
import logging
import multiprocessing
import random
import time
import unittest
import xml
from pathlib import Path

import pygments
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_coder import repository
from deepseek_coder.repository import METHODS, components, concatenate, is_test, order, path_comment, pieces

PACKAGES = [asyncio, email, http, importlib, json, logging, multiprocessing, unittest, xml, pygments]


def imports(files):
    """{path: {dependency, ...}}, strong and weak."""
    return {path: set(found) for path, found in repository.imports(files).items()}


def read(package, inside=False):
    """{path: text} of an installed package; inside: the package's own folder is the repository."""
    root = Path(package.__file__).parent
    base = root if inside else root.parent
    return {
        path.relative_to(base).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(root.rglob("*.py"))
    }


def edges_by_syntax_tree(files):
    """What Python itself would import, for a repository that has one package on its top level."""

    def file(name):
        stem = name.replace(".", "/")
        return next((path for path in (f"{stem}/__init__.py", f"{stem}.py") if path in files), None)

    def longest(name):
        while name and not file(name):
            name = name.rpartition(".")[0]
        return file(name) if name else None

    edges = {}
    for path, text in files.items():
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {longest(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = path.rpartition("/")[0].replace("/", ".")
                module = node.module or ""
                base = importlib.util.resolve_name("." * node.level + module, package) if node.level else module
                found |= {file(f"{base}.{alias.name}") or longest(base) for alias in node.names}
        edges[path] = found - {None, path}
    return edges


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_imports_of_real_packages(package):
    files = read(package)
    assert imports(files) == edges_by_syntax_tree(files)


@pytest.mark.parametrize("package", [email, importlib, json, multiprocessing, pygments], ids=lambda p: p.__name__)
def test_a_repository_whose_folder_is_the_package(package):
    top = package.__name__ + "/"
    expected = edges_by_syntax_tree(read(package))
    found = imports(read(package, inside=True))
    assert {top + path: {top + name for name in names} for path, names in found.items()} == expected


CASES = {
    "plain": ({"a.py": "import b", "b.py": ""}, {"a.py": {"b.py"}}),
    "space around dots": (
        {"p/a.py": "from . b import c\nfrom.d import e\nfrom .\timport  f", "p/b.py": "", "p/d.py": ""}
        | {"p/f.py": ""},
        {"p/a.py": {"p/b.py", "p/d.py", "p/f.py"}},
    ),
    "itself": ({"a.py": "import a\nfrom . import a"}, {}),
    "several": ({"a.py": "import os, b as x, c.d", "b.py": "", "c/d.py": ""}, {"a.py": {"b.py", "c/d.py"}}),
    "indented, after a semicolon": (
        {"a.py": "def f():\n    import b; import c", "b.py": "", "c.py": ""},
        {"a.py": {"b.py", "c.py"}},
    ),
    "many lines": (
        {"a.py": "from p import (  # a (bracket\n    b,  # :)\n    c as d,\n)\n", "p/b.py": "", "p/c.py": ""},
        {"a.py": {"p/b.py", "p/c.py"}},
    ),
    "backslash": ({"a.py": "from p import b, \\\n    c", "p/b.py": "", "p/c.py": ""}, {"a.py": {"p/b.py", "p/c.py"}}),
    "backslash before import": (
        {"a.py": "from p \\\n    import b", "b.py": "", "p/b.py": ""},
        {"a.py": {"p/b.py"}},
    ),
    "name of a package": (
        {"a.py": "from p import name, b", "p/__init__.py": "", "p/b.py": ""},
        {"a.py": {"p/__init__.py", "p/b.py"}},
    ),
    "star": ({"a.py": "from p import *", "p/__init__.py": "", "p/b.py": ""}, {"a.py": {"p/__init__.py"}}),
    "longest prefix": ({"a.py": "import p.b.Thing.x", "p/b.py": "", "p/__init__.py": ""}, {"a.py": {"p/b.py"}}),
    "relative": (
        {
            "p/q/a.py": "from . import b\nfrom ..c import x\nfrom .. import d",
            "p/q/b.py": "",
            "p/c.py": "",
            "p/d.py": "",
        },
        {"p/q/a.py": {"p/q/b.py", "p/c.py", "p/d.py"}},
    ),
    "relative to the package": (
        {"p/__init__.py": "from .a import x", "p/a.py": "from . import y"},
        {"p/__init__.py": {"p/a.py"}, "p/a.py": {"p/__init__.py"}},
    ),
    "dots beyond the repository": ({"p/a.py": "from .... import b", "b.py": ""}, {}),
    "src": ({"tests/t.py": "import p.a", "src/p/__init__.py": "", "src/p/a.py": ""}, {"tests/t.py": {"src/p/a.py"}}),
    "a project below": (
        {"libs/x/setup.py": "", "libs/x/p/__init__.py": "", "libs/x/p/a.py": "import json", "libs/x/json.py": ""},
        {"libs/x/p/a.py": {"libs/x/json.py"}},
    ),
    "sibling of a script": (
        {"tools/run.py": "import help2", "tools/help2.py": ""},
        {"tools/run.py": {"tools/help2.py"}},
    ),
    "Python 2 sibling": (
        {"p/__init__.py": "", "p/a.py": "import b", "p/b.py": ""},
        {"p/a.py": {"p/b.py"}},
    ),
    "nearest of several": (
        {"x/run.py": "import util", "x/util.py": "", "y/util.py": ""},
        {"x/run.py": {"x/util.py"}},
    ),
    "what others call like a file somewhere": (
        {"src/p/a.py": "import yaml, redis.client", "plugins/yaml.py": "", "examples/redis.py": "", "setup.py": ""},
        {},
    ),
    "a module at a root above": (
        {"tests/unit/t.py": "import helpers", "tests/helpers.py": "", "setup.py": "", "other/helpers.py": ""},
        {"tests/unit/t.py": {"tests/helpers.py"}},
    ),
    "standard library, shadowed elsewhere": (
        {"p/__init__.py": "", "p/a.py": "import json, abc", "p/abc.py": "", "docs/json.py": ""},
        {},
    ),
    "standard library, shadowed at the top": ({"a.py": "import json", "json.py": ""}, {"a.py": {"json.py"}}),
    "not there": ({"a.py": "import numpy\nfrom torch.nn import Module"}, {}),
    "stub beside its source": ({"a.py": "import b", "b.py": "", "b.pyi": ""}, {"a.py": {"b.py"}}),
    "stub only": ({"a.py": "import b", "b.pyi": ""}, {"a.py": {"b.pyi"}}),
    "package before module": ({"a.py": "import b", "b.py": "", "b/__init__.py": ""}, {"a.py": {"b/__init__.py"}}),
    "other languages": ({"a.js": "import b", "b.js": "", "b.py": "", "README.md": "import b"}, {}),
    "no imports": ({"a.py": "important = 1\nfromage = 2\nx = 'import'", "b.py": ""}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_import_forms(name):
    files, expected = CASES[name]
    found = imports(files)
    assert found.keys() == files.keys()
    assert {path: names for path, names in found.items() if names} == expected


@pytest.mark.parametrize(
    "text",
    [
        "from a import (\n" * 50_000,
        "from a import (" + "# x\n" * 100_000,
        "from a import " * 40_000,
        "from" + " " * 500_000,
        "from " + "." * 500_000,
        (" " * 1000 + "from a \n") * 500,
        "import " + "a," * 250_000,
        ";" * 500_000,
        "from a \\\n" * 100_000 + "import b\n" * 1000,
        "import b \\\n" * 100_000,
    ],
    ids=range(10),
)
def test_no_text_takes_long(text):
    began = time.process_time()
    imports({"a.py": text, "b.py": "import a"})
    assert time.process_time() - began < 5


def slow_order(paths, edges):
    """Algorithm 1 as the paper prints it: the minimum is looked for among all unused files."""
    result = []
    for component in components(paths, edges):
        unused = set(component)
        degree = {path: len(edges[path].keys() & unused) for path in component}
        ordered = []
        while unused:
            path = min(unused, key=lambda p: (degree[p], p))
            unused.remove(path)
            ordered.append(path)
            for other in unused:
                degree[other] -= path in edges[other]
        result.append(ordered)
    return result


NAMES = [f"{letter}.py" for letter in "abcdefghijkl"]


@st.composite
def graphs(draw, acyclic=False):
    paths = draw(st.lists(st.sampled_from(NAMES), unique=True))
    edges = {}
    for number, path in enumerate(paths):
        candidates = paths[:number] if acyclic else [other for other in paths if other != path]
        found = draw(st.dictionaries(st.sampled_from(candidates), st.booleans(), max_size=4)) if candidates else {}
        edges[path] = found
    return paths, edges


@given(graphs())
def test_order_is_the_papers_algorithm(graph):
    paths, edges = graph
    ordered = order(paths, edges, "paper")
    assert ordered == slow_order(paths, edges)
    assert sorted(path for component in ordered for path in component) == sorted(paths)


@pytest.mark.parametrize("method", ["feedback", "paper"])
@given(graph=graphs(acyclic=True))
def test_without_cycles_every_dependency_comes_first(method, graph):
    paths, edges = graph
    for ordered in order(paths, edges, method):
        place = {path: number for number, path in enumerate(ordered)}
        assert all(place[dependency] < place[path] for path in ordered for dependency in edges[path])


def share_first(found, edges, strong=(True, False)):
    """(edges whose dependency stands first, all edges), of those that are strong or not."""
    place = {path: number for component in found for number, path in enumerate(component)}
    pairs = [(path, other) for path in edges for other, is_strong in edges[path].items() if is_strong in strong]
    return sum(place[other] < place[path] for path, other in pairs), len(pairs)


@given(graphs())
def test_only_edges_inside_cycles_are_given_up(graph):
    paths, edges = graph
    reached = {path: {path} for path in paths}
    for _ in paths:
        for path in paths:
            reached[path] |= {far for other in edges[path] for far in reached[other]}
    found = order(paths, edges, "feedback")
    place = {path: number for component in found for number, path in enumerate(component)}
    for path in paths:
        for other in edges[path]:
            assert place[other] < place[path] or path in reached[other]


@given(graphs())
def test_at_least_half_of_what_counts_is_satisfied(graph):
    paths, edges = graph
    found = order(paths, edges, "feedback")
    (first, total), (strong_first, strong) = share_first(found, edges), share_first(found, edges, [True])
    weight = repository.graph.STRONG - 1
    assert first + weight * strong_first >= (total + weight * strong) / 2


@pytest.mark.parametrize("method", METHODS)
@given(graph=graphs(), random=st.randoms())
def test_every_order_is_of_the_same_files_and_needs_no_order_of_its_input(method, graph, random):
    paths, edges = graph
    found = order(paths, edges, method, seed=3)
    assert [sorted(component) for component in found] == components(paths, edges)
    shuffled = random.sample(paths, len(paths))
    turned = {path: dict(sorted(edges[path].items(), reverse=True)) for path in shuffled}
    assert order(shuffled, turned, method, seed=3) == found


def test_random_follows_its_seed_and_nothing_else():
    paths = [f"{number}.py" for number in range(50)]
    edges = {path: {paths[0]: True} for path in paths}
    one = order(paths, edges, "random", seed=1)
    random.seed(0)
    assert order(paths, edges, "random", seed=1) == one != order(paths, edges, "random", seed=2)
    with pytest.raises(ValueError, match="'alphabet' is no order of files; known: feedback, paper, path, random"):
        order(paths, edges, "alphabet")


def test_a_cycle_gives_up_its_weak_edge():
    files = ["a.py", "b.py", "c.py"]
    for weak in range(3):
        edges = {path: {files[(i + 1) % 3]: i != weak} for i, path in enumerate(files)}
        assert order(files, edges)[0] == [files[(weak - i) % 3] for i in range(3)]


def test_tests_come_last_where_nothing_depends_on_them():
    files = ["a_test.py", "app.py", "main.py", "tests/help.py"]
    edges = {"a_test.py": {"app.py": True}, "main.py": {"app.py": True}, "tests/help.py": {"app.py": True}}
    assert order(files, edges) == [["app.py", "main.py", "a_test.py", "tests/help.py"]]
    edges["main.py"]["tests/help.py"] = True
    assert order(files, edges) == [["app.py", "tests/help.py", "main.py", "a_test.py"]]
    named = ["x/test/a.c", "src/FooTest.java", "a.spec.ts", "b_spec.rb", "test_a.py", "p/conftest.py", "a_test.go"]
    assert all(map(is_test, named))
    assert not any(map(is_test, ["latest.py", "contest/a.c", "Attest.java", "test.py.txt", "src/testify.go"]))


@given(graphs(), st.randoms())
def test_components_partition_the_files(graph, random):
    paths, edges = graph
    found = components(paths, edges)
    assert sorted(path for component in found for path in component) == sorted(paths)
    home = {path: number for number, component in enumerate(found) for path in component}
    assert all(home[path] == home[dependency] for path in paths for dependency in edges[path])
    assert found == sorted(found, key=lambda component: component[0])
    # No component falls apart: from its first file every other is reached, in either direction.
    for component in found:
        reached, frontier = {component[0]}, [component[0]]
        while frontier:
            path = frontier.pop()
            near = (edges[path].keys() | {other for other in paths if path in edges[other]}) - reached
            reached |= near
            frontier += near
        assert reached == set(component)
    random.shuffle(paths)
    assert components(paths, edges) == found


def test_edges_to_files_that_are_gone_are_ignored():
    edges = {"a.py": {"gone.py": True, "b.py": True}, "gone.py": {"b.py": True}}
    for method in METHODS:
        assert sorted(order(["a.py", "b.py"], edges, method)[0]) == ["a.py", "b.py"]
    assert order({"a.py": "", "b.py": ""}, edges) == [["b.py", "a.py"]]


@pytest.mark.parametrize("package", [asyncio, unittest, email], ids=lambda package: package.__name__)
def test_cycles_of_real_packages_are_ordered(package):
    files = read(package)
    edges = repository.imports(files)
    ordered = order(files)
    assert sorted(path for component in ordered for path in component) == sorted(files)
    first, total = share_first(ordered, edges)
    paper, _ = share_first(order(files, edges, "paper"), edges)
    assert 0.9 < first / total < 1  # they have cycles; path order has 0.6
    assert paper <= first


def test_installed_packages(capsys):
    """The mark: every installed package of 20 files or more, the paper's algorithm on the same edges."""
    site = Path(pytest.__file__).parents[1]
    satisfied = dict.fromkeys(METHODS, 0)
    total = size = seconds = packages = 0
    for folder in sorted(path for path in site.iterdir() if path.is_dir()):
        sources = [path for path in sorted(folder.rglob("*.py")) if path.stat().st_size <= 1 << 20]
        if len(sources) < 20:
            continue
        files = {path.relative_to(site).as_posix(): path.read_text("utf-8", errors="replace") for path in sources}
        began = time.process_time()
        edges = repository.imports(files)
        seconds += time.process_time() - began
        size += sum(map(len, files.values()))
        packages += 1
        for method in METHODS:
            first, count = share_first(order(files, edges, method), edges)
            satisfied[method] += first
        total += count
    shares = {method: round(first / total, 4) for method, first in satisfied.items()}
    with capsys.disabled():
        print(f"\n{packages} packages, {total} edges, {size / 1e6 / seconds:.0f} MB/s; satisfied: {shares}")
    assert shares["feedback"] >= 0.94
    assert shares["paper"] < 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["one cycle", "chain", "star"])
def test_a_large_repository_is_ordered_in_little_time(method, shape):
    count = 20_000
    paths = [f"m{number:05}.py" for number in range(count)]
    edges = {
        "one cycle": lambda n: {paths[(n * 7919) % count]: True, paths[n - 1]: n % 3 > 0},
        "chain": lambda n: {paths[n + 1]: True} if n + 1 < count else {},
        "star": lambda n: dict.fromkeys(paths[1:], True) if n == 0 else {paths[0]: False},
    }[shape]
    began = time.process_time()
    ordered = order(paths, {path: edges(number) for number, path in enumerate(paths)}, method)
    assert sum(map(len, ordered)) == count
    assert time.process_time() - began < 8


def test_form_of_a_document():
    files = [("a.py", "x = 1"), ("p/__init__.py", ""), ("main.cpp", "int main() {}\n"), ("a.css", "a {}")]
    assert pieces(files) == [
        "#a.py\nx = 1\n\n",
        "#p/__init__.py\n\n\n",
        "//main.cpp\nint main() {}\n\n",
        "/*a.css*/\na {}\n",
    ]
    assert concatenate(files) == "".join(pieces(files))
    assert concatenate([]) == ""
    assert concatenate(files[2:3], "hash") == "#main.cpp\nint main() {}\n"
    assert path_comment("a\\b.py") == "#a/b.py\n"
    signs = {
        "a.bat": "REM a.bat",
        "a.rst": ".. a.rst",
        "a.ml": "(*a.ml*)",
        "a.json": "#a.json",
        "a.unknown": "#a.unknown",
    }
    assert {path: path_comment(path).rstrip("\n") for path in signs} == signs
