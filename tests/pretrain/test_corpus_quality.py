"""Syntax, test data, scorers: what goes out of a document, and what stays in it."""

import gzip
import json
import re
import sys
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
    assert syntax.error_share("a.h", "C++", "int f(x) int x; { int new = x; return new; }\n") == 0  # C as C++ cannot be
    assert syntax.error_share("a.h", "C", "template <class T> (((\n" * 5) > 0.1
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
    for name, content in {
        "e.jsonl": "{",
        "f.csv": "a",
        "g.parquet": "x",
        "h.txt.gz": "x",
        "i.json": "[" * 9999,
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name}: these test data cannot be read .*correct \[quality\] tests"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such benchmark file or folder"):
        load(tmp_path / "nowhere.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: these test data cannot be read \(it holds no \.json, "):
        load(tmp_path / "empty")


# One problem of each benchmark in the form in which it is published, with texts of our own.
DS_1000 = {
    "prompt": "Problem:\nA frame of rivers and lakes has gauges that report no level on Sundays. I want them filled "
    "from Mondays.\n\nA:\n<code>\nimport pandas as pd\nimport numpy as np\nimport matplotlib.pyplot as plt\n\n"
    "df = pd.DataFrame({'gauge': [3, np.nan]})\n</code>\nresult = ... # put solution in this variable\n",
    "reference_code": "def g(levels):\n    return levels.bfill(axis=0).where(levels.index.weekday == 6, levels)\n",
    "metadata": {"problem_id": 0, "library": "Pandas", "perturbation_type": "Origin"},
    "code_context": "import pandas as pd\nimport numpy as np\nimport copy\n\n\ndef generate_rivers(test_case_id):\n"
    "    return pd.Series([1.0, None], index=pd.date_range('2023-01-01', periods=2))\n",
}
GSM8K = {
    "question": "A ferry carries 14 lorries on each of its 6 crossings and leaves 5 behind. How many came to the quay?",
    "answer": "The ferry takes 14*6=<<14*6=84>>84 lorries across.\nWith those left behind 84+5=<<84+5=89>>89 came.\n"
    "#### 89",
}
MATH = {
    "problem": "Let $p$ be a prime such that $p^2 + 26$ is a prime as well. Find the sum of all such $p$.",
    "level": "Level 3",
    "type": "Number Theory",
    "solution": "Modulo $3$ the square of any prime but $3$ is $1$, so $p^2 + 26$ is divisible by three. Hence "
    "$p = \\boxed{3}$.",
}


def test_published_formats(tmp_path):
    """DS-1000, GSM8K and MATH from a file and from a folder; what everybody imports is no test data."""
    with gzip.open(tmp_path / "ds1000.jsonl.gz", "wt") as file:
        file.write(json.dumps(DS_1000) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(GSM8K) + "\n")
    for path in ("MATH/test/number_theory/7.json", "MATH/train/algebra/README.txt"):
        (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / "MATH/test/number_theory/7.json").write_text(json.dumps(MATH, indent=4))
    (tmp_path / "MATH/train/algebra/README.txt").write_text("every line of this text would be a test\n")
    tests = load(tmp_path / "ds1000.jsonl.gz", tmp_path / "test.jsonl", tmp_path / "MATH")
    strings = [DS_1000[name] for name in ("prompt", "reference_code", "code_context")]
    strings += [*GSM8K.values(), MATH["problem"], MATH["solution"]]
    assert tests.found_in([f"# {text}\nx = 1\n".encode() for text in strings]).all()
    honest = [
        "import pandas as pd\nimport numpy as np\nimport matplotlib.pyplot as plt\n\ndf = pd.DataFrame()\n",
        "import pandas as pd\nimport numpy as np\nimport copy\n\n\ndef generate(x):\n    return x\n",
        "every line of this text would be a test\n",
        "# Level 3, Number Theory, Pandas, Origin\n",
    ]
    assert not tests.found_in([text.encode() for text in honest]).any()
    before = decontaminate.versions([str(tmp_path / "MATH")])
    (tmp_path / "MATH/test/number_theory/7.json").write_text(json.dumps(MATH | {"level": "Level 4"}))
    assert decontaminate.versions([str(tmp_path / "MATH")]) != before


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
    assert scores.keys() == {"good.py", "other.md", "broken.py", "alone.c"}
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


def test_a_changed_scorer_is_asked_again(tmp_path, monkeypatch):
    """Its source, or the VERSION that stands for what it reads, is a part of the key; negative scores are scores."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "a.py").write_text("one = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"quality": {"scorer": "a_scorer_of_a_test:score", "min_score": -2.5}}
    source = "def score(path, language, text):\n    return {}\n"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    outcomes = []
    for text in (source.format(-2), source.format(-2), source.format(-3), source.format(-2) + "VERSION = 2\n"):
        (tmp_path / "a_scorer_of_a_test.py").write_text(text)
        sys.modules.pop("a_scorer_of_a_test", None)
        manifest = corpus.build([str(tmp_path / "r")], tmp_path / "out", config=config, progress=False)
        (record,) = json.loads((tmp_path / "out" / "quality" / "manifest.json").read_text())["shards"].values()
        outcomes.append((record["key"], manifest["counts"]["quality"]["files"]))
    sys.modules.pop("a_scorer_of_a_test")
    assert [files for _, files in outcomes] == [1, 1, 0, 1]
    assert outcomes[0] == outcomes[1]
    assert len({key for key, _ in outcomes}) == 3


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
