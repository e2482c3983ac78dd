"""Syntax, test data, scorers: what goes out of a document, and what stays in it."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import networkx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import corpus
from pretrain.corpus import decontaminate, signals, syntax

HEALTHY = {
    "Python": "def double(x):\n    return 2 * x\n",
    "C": "#include <math.h>\nint twice(int x) { return 2 * x; }\n",
    "C++": "template <class T> T twice(T x) { return 2 * x; }\n",
    "C#": "class A { int Twice(int x) => 2 * x; }\n",
    "Java": "class A { int twice(int x) { return 2 * x; } }\n",
    "JavaScript": "export const twice = (x) => 2 * x;\n",
    "TypeScript": "export const twice = (x: number): number => 2 * x;\n",
    "Go": "package a\n\nfunc twice(x int) int { return 2 * x }\n",
    "Rust": "fn twice(x: i32) -> i32 { 2 * x }\n",
    "PHP": "<?php function twice(int $x): int { return 2 * $x; }\n",
    "Ruby": "def twice(x)\n  2 * x\nend\n",
    "Kotlin": "fun twice(x: Int): Int = 2 * x\n",
    "Scala": "object A { def twice(x: Int): Int = 2 * x }\n",
}


@pytest.mark.parametrize("language", HEALTHY)
def test_syntax(language):
    assert syntax.error_share("a", language, HEALTHY[language]) == 0
    broken = ("<?php " if language == "PHP" else "") + ") ] } = = ( ; ; } ) @@ ))\n" * 3
    assert syntax.error_share("a", language, broken) > 0.1


def test_syntax_of_others():
    assert syntax.error_share("a.hs", "Haskell", "(((") is None
    assert syntax.error_share("a.tsx", "TypeScript", "const a = <p>text</p>;\n") == 0
    assert syntax.error_share("a.h", "C", "namespace a { class B { public: int c() const; }; }\n") == 0
    assert syntax.error_share("a.c", "C", "namespace a { class B { public: int c() const; }; }\n") > 0
    assert syntax.error_share("a.py", "Python", "") == 0
    assert syntax.error_share("a.py", "Python", "(" * 100_000) >= 0


def test_a_file_is_read_by_its_own_grammar(tmp_path):
    """Not by that of most of its document: types are no errors in a TypeScript file among JavaScript ones."""
    source = tmp_path / "repo"
    source.mkdir()
    (source / "types.ts").write_text("export interface A { readonly b: Map<string, number>; c?: (d: A) => void }\n" * 5)
    for name in ("one", "two", "three"):
        (source / f"{name}.js").write_text("import {A} from './types';\nexport const value = new A();\n" * 9)
    corpus.build([str(source)], tmp_path / "out", progress=False)
    (document,) = corpus.documents(tmp_path / "out")
    assert (document.language, document.paths[0], len(document.paths)) == ("JavaScript", "types.ts", 2)


def test_syntax_of_real_files():
    files = sorted(Path(networkx.__file__).parent.rglob("*.py"))[:60]
    assert all(syntax.error_share(path.name, "Python", path.read_text()) == 0 for path in files)


def sequences(text, n):
    found = re.findall(r"[0-9a-z_\x80-\U0010ffff]+", re.sub("[A-Z]", lambda m: m[0].lower(), text))
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def expected(tests, text):
    """The rule, said plainly."""
    for test in tests:
        words = sequences(test, 1)
        n = min(len(words), 10)
        telling = [s for s in (sequences(test, n) if n >= 3 else []) if len({w for w in s if not w.isdigit()}) >= 3]
        if set(telling) & set(sequences(text, n)):
            return True
    return False


TEXT = st.lists(st.sampled_from(["ab", "cd", "ef", "1", "2", "Gh\n"]), max_size=30).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, max_size=4), st.lists(TEXT, max_size=4))
def test_decontamination_is_the_rule(tests, texts):
    found = decontaminate.Tests(tests).found_in([text.encode() for text in texts])
    assert found.tolist() == [expected(tests, text) for text in texts]


def test_a_sequence_does_not_cross_two_files():
    tests = decontaminate.Tests(["one two three four five six seven eight nine ten"])
    assert tests.found_in([b"x one two three four five", b"six seven eight nine ten"]).tolist() == [False, False]
    assert tests.found_in([b"", b"x One, two(three)\nfour five six seven eight nine-ten y"]).tolist() == [False, True]


def load(*files):
    names = tuple(map(str, files))
    return decontaminate.load(names, decontaminate.versions(names), 10, 3)


def test_kinds_of_files(tmp_path):
    text = "def candidate(first, second): return first plus second divided by two"
    rows = [{"task": 1, "nested": {"tests": [text]}}]
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(rows[0]) + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(rows[0]))
    (tmp_path / "c.txt").write_text(f"other words\n{text}\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for path in tmp_path.iterdir():
        tests = load(path)
        assert tests.found_in([text.encode(), b"nothing of it"]).tolist() == [True, False]
    for name, content in {"e.jsonl": "{", "f.json": "{}", "g.parquet": "x", "h.txt.gz": "x"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name}: these test data cannot be read .*correct \[quality\] tests"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such benchmark file"):
        load(tmp_path / "nowhere.txt")


def test_benchmarks(benchmarks):
    """Every solution of HumanEval and MBPP that is long enough is found in a file that holds it, re-indented."""
    files = (str(benchmarks / "human-eval" / "HumanEval.jsonl.gz"), str(benchmarks / "mbpp" / "mbpp.jsonl"))
    tests = load(*files)
    with gzip.open(files[0], "rt") as lines:
        solutions = [row["prompt"] + row["canonical_solution"] for row in map(json.loads, lines)]
    solutions += [json.loads(line)["code"] for line in Path(files[1]).read_text().splitlines()]
    texts = [("class A:\n" + s.replace("\n", "\n        ")).encode() for s in solutions if len(sequences(s, 10)) > 3]
    assert len(texts) > 950
    assert tests.found_in(texts).mean() > 0.995  # of a few the numbers leave no telling sequence
    clean = [path.read_bytes() for path in sorted(Path(networkx.__file__).parent.rglob("*.py"))]
    assert tests.found_in(clean).mean() < 0.05


def shortness(path, language, text):
    return float("nan") if "nan" in text else 1 / len(text)


def test_the_stage(tmp_path, monkeypatch):
    source = tmp_path / "r"
    source.mkdir()
    files = {
        "good.py": "import copied\nimport broken\nvalue = 1\n",
        "broken.py": "letters_and_more ) ] } = = ( ; ; } ) @@ ))\n" * 5,
        "copied.py": "def one_two(three, four, five):\n    return six + seven * eight - nine\n",
        "alone.c": ") ] } = = ( ; ; } ) @@ )) letters letters\n" * 3,
        "other.md": "# A title\nwords\n",
    }
    for path, text in files.items():
        (source / path).write_text(text)
    (tmp_path / "tests.txt").write_text("def one_two(three, four, five): return six + seven * eight\n")
    config = {"quality": {"tests": [str(tmp_path / "tests.txt")], "signals": True}}
    out = tmp_path / "out"
    manifest = corpus.build([str(source)], out, config=config, progress=False)
    assert {document.language: document.paths for document in corpus.documents(out)} == {
        "Python": ["good.py"],
        "Markdown": ["other.md"],
    }
    dropped = pq.read_table(out / "quality" / "dropped-00000.parquet").to_pylist()
    assert {row["path"]: row["reason"] for row in dropped} == {
        "broken.py": "syntax errors",
        "copied.py": "test data",
        "alone.c": "syntax errors",
    }
    scores = {row["path"]: row for row in pq.read_table(out / "quality" / "scores-00000.parquet").to_pylist()}
    assert scores["good.py"]["error_share"] == 0
    assert scores["other.md"]["error_share"] is None
    assert (scores["good.py"]["lines"], scores["other.md"]["words"]) == (3, 3)
    assert manifest["counts"]["quality"]["dropped"] == {"syntax errors": 2, "test data": 1}
    assert manifest["counts"]["quality"]["files_in"] == 5
    (tmp_path / "tests.txt").write_text("nothing of the kind\n")  # the same name, other contents
    corpus.build([str(source)], out, config=config, progress=False)
    assert "copied.py" in next(d.paths for d in corpus.documents(out) if d.language == "Python")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    config = {"quality": {"syntax": False, "scorer": "test_corpus_quality:shortness", "min_score": 1 / 50}}
    corpus.build([str(source)], out, config=config, progress=False)
    assert sorted(path for d in corpus.documents(out) for path in d.paths) == ["good.py", "other.md"]


@pytest.mark.parametrize("scorer", ["nowhere:f", "json:nothing", "json:__name__", "x"])
def test_bad_scorers(tmp_path, scorer):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "a.py").write_text("one = 1\n")
    with pytest.raises(ValueError, match=r"scorer .* in \[quality\] .*write module:function"):
        corpus.build([str(tmp_path / "r")], tmp_path / "out", config={"quality": {"scorer": scorer}}, progress=False)


def test_places_of_a_set():
    members = np.array([3, 1 << 63, 77], dtype=np.uint64)
    known = decontaminate._Set([members])
    assert known.places(np.array([77, 4, 1 << 63, 3], dtype=np.uint64)).tolist() == [0, 2, 3]
    assert decontaminate._Set([]).places(members).tolist() == []


@settings(max_examples=80, deadline=None)
@given(st.text("aB1 \n_.é漢", max_size=120))
def test_signals_counted_plainly(text):
    found = signals.signals("Python", text)
    lines = text.removesuffix("\n").split("\n")
    assert found["characters"] == len(text)
    assert found["lines"] == len(lines)
    assert found["longest_line"] == max(map(len, lines))
    visible = [character for character in text if not character.isspace()]
    assert found["letters"] == pytest.approx(sum(map(str.isalpha, visible)) / max(len(visible), 1))
    assert found["digits"] == pytest.approx(text.count("1") / max(len(text), 1))
    filled = [line.strip() for line in lines if line.strip()]
    assert found["repeated_lines"] == pytest.approx(1 - len(set(filled)) / max(len(filled), 1))
    assert found["words"] == len(sequences(text, 1))
    pairs = Counter(sequences(text, 2)).most_common(1)
    top = 2 * pairs[0][1] / found["words"] if pairs and pairs[0][1] > 1 else 0
    assert found["top_2grams"] == pytest.approx(top)
    grams = sequences(text, 5)
    assert found["repeated_5grams"] == pytest.approx(1 - len(set(grams)) / max(len(grams), 1))


def test_signals_of_statements():
    lines = ["import a", "from b import c", "important = 1", "async def f():", "    pass", "    assert c  # TODO"]
    python = "\n".join([*lines, "password = 2", "print(1)", ""])
    found = signals.signals("Python", python)
    counts = {
        "import_lines": 2,
        "pass_lines": 1,
        "print_lines": 1,
        "function_lines": 1,
        "assert_lines": 1,
        "todos": 1,
    }
    assert {name: round(found[name] * 8) for name in counts} == counts
    assert found["preprocessor_lines"] is None
    c = "#include <a.h>\nint main(void) { return 0; }\nint x = 0xdeadbeef12;\nint abcdefghijklmnopqrstuvwxyz;\n"
    found = signals.signals("C", c)
    assert (found["main_functions"], found["preprocessor_lines"], found["import_lines"]) == (1, 0.25, None)
    assert found["hex_words"] == pytest.approx(len("0xdeadbeef12") / len(c))
    assert found["long_words"] == pytest.approx(26 / len(c))
