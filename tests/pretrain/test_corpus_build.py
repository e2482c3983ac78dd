"""The whole corpus: real packages in, documents out; exact duplicates, order, configuration, what ends in an error."""

import asyncio
import email
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pygments
import pytest

from deepseek_coder import repository
from pretrain import corpus
from pretrain.corpus.order import Settings, repository_documents

PACKAGES = {package.__name__: Path(package.__file__).parent for package in (asyncio, email, importlib, json, pygments)}


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def rows(out, stage, kind="part"):
    return [row for path in sorted((out / stage).glob(f"{kind}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def tables(out):
    """The bytes of everything a build wrote, manifests included, but for the records (seconds) and the report."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(("shard-", "report."))
    }


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The corpus of five real packages, one as an archive and one as a git URL, and their sources."""
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(folder / "email.tar.gz", "w:gz") as archive:
        archive.add(PACKAGES["email"], "email")
    clone = folder / "json"
    write(clone, {path.name: path.read_bytes() for path in PACKAGES["json"].glob("*.py")})
    for command in ("init", "add -A", "-c user.name=t -c user.email=t@example.org commit -m first"):
        subprocess.run(["git", "-C", clone, *command.split()], check=True, capture_output=True)
    folders = [str(PACKAGES[name]) for name in ("asyncio", "importlib", "pygments")]
    sources = [*folders, str(folder / "email.tar.gz"), f"file://{clone}"]
    manifest = corpus.build(sources, folder / "out", progress=False)
    return sources, folder / "out", manifest


def test_real_packages(real):
    _, out, manifest = real
    crawled = rows(out, "crawl")
    assert [(row["repo"], row["path"]) for row in crawled] == sorted((row["repo"], row["path"]) for row in crawled)
    assert {row["repo"] for row in crawled} == set(PACKAGES)
    assert {row["path"] for row in crawled if row["repo"] == "email"} == {
        path.relative_to(PACKAGES["email"]).as_posix()
        for path in PACKAGES["email"].rglob("*")
        if path.suffix in (".py", ".rst") and "__pycache__" not in path.parts
    }
    documents = list(corpus.documents(out))
    kept = {(row["repo"], row["path"]): row["text"] for row in rows(out, "dedup")}
    assert sorted((d.repo, path) for d in documents for path in d.paths) == sorted(kept)
    for document in documents:
        assert "".join(document.texts) == repository.concatenate(
            (path, kept[document.repo, path]) for path in document.paths
        )
    counts = manifest["counts"]
    assert counts["documents"]["documents"] == len(documents)
    assert counts["documents"]["files"] == counts["dedup"]["files"] == len(kept)
    assert counts["dedup"]["bytes"] == sum(len(text.encode()) for text in kept.values())
    assert counts["crawl"]["files"] - counts["filter"]["files"] == sum(counts["filter"]["dropped"].values())
    assert counts["documents"]["dependencies_first"] / counts["documents"]["dependencies"] > 0.9
    largest = max(documents, key=lambda document: len(document.paths))
    assert (largest.repo, largest.language) == ("pygments", "Python")
    assert len(largest.paths) > 300


def test_the_same_sources_give_the_same_bytes(real, tmp_path):
    """With other folders, another order of sources, several workers and nothing to do."""
    sources, out, _ = real
    config = {"crawl": {"shard_bytes": 64 << 20}}
    corpus.build(list(reversed(sources)), tmp_path / "again", workers=2, config=config, progress=False)
    expected = {name: digest for name, digest in tables(out).items() if name != "manifest.json"}
    assert {name: digest for name, digest in tables(tmp_path / "again").items() if name != "manifest.json"} == expected
    before = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}
    manifest = (out / "manifest.json").read_bytes()
    corpus.build(sources, out, progress=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")} == before
    assert (out / "manifest.json").read_bytes() == manifest


def test_workers_and_shards_do_not_change_the_documents(real, tmp_path):
    sources, out, _ = real
    corpus.build(sources, tmp_path / "out", workers=2, config={"crawl": {"shard_bytes": 0}}, progress=False)
    assert len(list((tmp_path / "out" / "documents").glob("part-*.parquet"))) == 5
    assert list(corpus.documents(tmp_path / "out")) == list(corpus.documents(out))


def test_summary(real):
    _, out, manifest = real
    text = corpus.summary(out)
    assert "Python" in text
    assert f"{manifest['counts']['crawl']['files_in']:,}" in text
    assert "vendored folder" in text
    assert "imports between kept files" in text


def test_progress_goes_to_stderr_if_that_is_a_terminal(real, tmp_path, capfd, monkeypatch):
    sources, _, _ = real
    corpus.build(sources[:1], tmp_path / "out", progress=True)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    corpus.build(sources[:1], tmp_path / "out", progress=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert all(stage in said.err for stage in ("crawl", "filter", "digests", "dedup", "documents"))


def test_exact_duplicates(tmp_path):
    text = "def double(x):\n    return x + x\n"
    write(tmp_path / "a", {"two.py": text, "x.py": "import two\n", "y/three.py": text})
    write(tmp_path / "b", {"one.py": text.replace("\n", "\r\n"), "two.py": "def two():\n    return 2\n"})
    config = {"crawl": {"shard_bytes": 0}}
    corpus.build([str(tmp_path / "b"), str(tmp_path / "a")], tmp_path / "out", config=config, progress=False)
    assert rows(tmp_path / "out", "dedup", "dropped") == [
        {"repo": "a", "path": "y/three.py", "reason": "exact duplicate", "original": "a/two.py"},
        {"repo": "b", "path": "one.py", "reason": "exact duplicate", "original": "a/two.py"},
    ]
    assert [(document.repo, document.paths) for document in corpus.documents(tmp_path / "out")] == [
        ("a", ["two.py", "x.py"]),
        ("b", ["two.py"]),
    ]


def test_documents_of_a_repository():
    def row(path, language, text):
        return {"path": path, "language": language, "text": text}

    kept = [
        row("lib/core.c", "C", '#include "core.h"\n#include "gone.h"\n'),
        row("lib/core.h", "C", "int core;\n"),
        row("p/a.py", "Python", "import json\nfrom . import b, gone\n"),
        row("p/b.py", "Python", "B = 1"),
        row("p/use.cc", "C++", '#include "core.h"\n'),
        row("web/a.ts", "TypeScript", "import { b } from 'shared/b'\n"),
        row("web/b.ts", "TypeScript", "export const b = 1\n"),
        row("z.py", "Python", "Z = 1\n"),
    ]
    gone = dict.fromkeys(["p/__init__.py", "p/json.py", "p/gone.py", "lib/gone.h"], "")
    gone["web/package.json"] = '{"name": "shared"}'
    documents, counts = repository_documents("r", kept, gone, Settings())
    assert [(document.language, document.paths) for document in documents] == [
        ("C", ["lib/core.h", "lib/core.c", "p/use.cc"]),
        ("Python", ["p/b.py", "p/a.py"]),
        ("TypeScript", ["web/b.ts", "web/a.ts"]),
        ("Python", ["z.py"]),
    ]
    assert documents[1].texts == ["#p/b.py\nB = 1\n\n", "#p/a.py\nimport json\nfrom . import b, gone\n"]
    assert documents[0].texts[0] == "//lib/core.h\nint core;\n\n"
    # p is a package although its __init__.py was dropped, so `import json` is not p/json.py.
    one = {"all": 1, "first": 1, "strong": 1, "strong_first": 1}
    assert counts == {
        "dependencies": 4,
        "dependencies_first": 4,
        "dependencies_dropped": 2,
        "edges": {"C": one, "C++": one, "Python": one, "TypeScript": one},
    }
    documents, counts = repository_documents("r", kept, gone, Settings(order="path", path_comment="hash"))
    assert [document.paths for document in documents][:2] == [
        ["lib/core.c", "lib/core.h", "p/use.cc"],
        ["p/a.py", "p/b.py"],
    ]
    assert documents[0].texts[0].startswith("#lib/core.c\n")
    assert (counts["dependencies"], counts["dependencies_first"]) == (4, 1)


def test_manifests_of_no_language_name_modules(tmp_path):
    """Two Go modules and two crates, whose folders do not tell their names: go.mod and Cargo.toml are not trained on,
    but read."""
    root = write(
        tmp_path / "r",
        {
            "one/go.mod": "module example.org/first\n",
            "one/util/util.go": "package util\n\nfunc Used() int { return 1 }\n",
            "two/go.mod": "module example.org/second\n",
            "two/a.go": 'package two\n\nimport "example.org/first/util"\n\nvar X = util.Used()\n',
            "two/b/b.go": 'package b\n\nimport "example.org/second"\n\nvar Y = two.X\n',
            "crates/x/Cargo.toml": '[package]\nname = "engine-core"\n',
            "crates/x/src/lib.rs": "pub struct Engine;\n",
            "crates/y/Cargo.toml": '[package]\nname = "other"\n',
            "crates/y/src/lib.rs": "use engine_core::Engine;\n\npub fn f(e: Engine) {}\n",
        },
    )
    corpus.build([str(root)], tmp_path / "out", config={"dedup": {"near": False}}, progress=False)
    assert sorted(document.paths for document in corpus.documents(tmp_path / "out")) == [
        ["crates/x/src/lib.rs", "crates/y/src/lib.rs"],
        ["one/util/util.go", "two/a.go", "two/b/b.go"],
    ]
    reasons = {row["path"]: row["reason"] for row in rows(tmp_path / "out", "crawl", "dropped")}
    assert reasons["one/go.mod"] == reasons["crates/x/Cargo.toml"] == "unknown language"


def test_the_filter_records_its_reasons(tmp_path):
    write(
        tmp_path / "r",
        {"a.py": "one = 1\n", "b.py": "1234567\n", "c.json": '{"name": "b"}', "d.py": "\n", "e.py": b"x = 1\0"},
    )
    manifest = corpus.build([str(tmp_path / "r")], tmp_path / "out", progress=False)
    assert rows(tmp_path / "out", "filter", "dropped") == [
        {"repo": "r", "path": "b.py", "reason": "alphabetic share"},
        {"repo": "r", "path": "c.json", "reason": "JSON or YAML length"},
        {"repo": "r", "path": "d.py", "reason": "empty"},
    ]
    assert rows(tmp_path / "out", "crawl", "dropped") == [{"repo": "r", "path": "e.py", "reason": "binary"}]
    assert manifest["counts"]["crawl"]["dropped"] == {"binary": 1}
    assert manifest["counts"]["filter"] == {
        "files_in": 4,
        "files": 1,
        "bytes": 8,
        "languages": {"Python": {"files": 1, "bytes": 8}},
        "dropped": {"alphabetic share": 1, "JSON or YAML length": 1, "empty": 1},
    }


def test_an_empty_corpus_says_what_was_dropped_for_what(tmp_path):
    write(tmp_path / "r", {"a.py": "1 = 1\n", "b.txt": "x", "c.txt": "x", "d.py": b"\0"})
    with pytest.raises(ValueError) as error:
        corpus.build([str(tmp_path / "r")], tmp_path / "out", progress=False)
    assert "4 files found, dropped for crawl: unknown language 2, binary 1; filter: alphabetic share 1" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing is left for the corpus .*: no files found"):
        corpus.build([str(tmp_path / "nothing")], tmp_path / "out2", progress=False)
    with pytest.raises(FileNotFoundError, match="an unfinished corpus; finish it with"):
        corpus.documents(tmp_path / "out2")


def test_configuration(tmp_path):
    write(tmp_path / "r", {"a.py": "x" * 101})
    (tmp_path / "c.toml").write_text("[filter]\nmean_line_length = 101\n[crawl]\nmax_file_bytes = 101\n")
    config = corpus.load_config(tmp_path / "c.toml")
    manifest = corpus.build([str(tmp_path / "r")], tmp_path / "out", config=config, progress=False)
    assert manifest["config"]["filter"]["rules"]["mean_line_length"] == 101
    assert manifest["config"]["filter"]["rules"]["longest_line"] == 1000


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "[filter]\nmean_line = 1",
            r"c\.toml: unknown key 'mean_line' in \[filter\].*known: preset, mean_line_length, longest_line",
        ),
        ("[filter]\npreset = 'other'", r"preset in \[filter\] is 'other'; it must be one of deepseek, starcoder"),
        (
            "[filters]",
            r"unknown section 'filters' in the corpus configuration; known: crawl, filter, documents, dedup, quality",
        ),
        ("filter = 3", r"\[filter\] of the corpus configuration is 3; it must be a table"),
        ("[filter]\nlongest_line = 1.5", r"longest_line in \[filter\].* is 1\.5; it must be a whole number >= 0"),
        ("[filter]\nalphabetic_share = -0.1", r"alphabetic_share .* is -0\.1; it must be a number >= 0"),
        ("[filter]\nalphabetic_share = nan", r"alphabetic_share .* is nan"),
        ("[filter]\nalphabetic_share = true", r"alphabetic_share .* is True"),
        ("[crawl]\nclone_seconds = 'x'", r"clone_seconds .* is 'x'"),
        (
            "[documents]\norder = 'best'",
            r"order in \[documents\].* is 'best'; it must be one of feedback, paper, path, random",
        ),
        ("[documents]\npath_comment = ''", r"path_comment in \[documents\].* must be one of language, hash"),
        ("[documents]\nseed = -1", r"seed in \[documents\].* is -1"),
        ("[crawl", r"c\.toml: "),
        ("[crawl]\ncreated_until = 2023-01-31", r"created_until in \[crawl\].* must be a text"),
        ("[dedup]\nngram = 65", r"ngram in \[dedup\] is 65; it must be from 1 to 64"),
        ("[dedup]\npermutations = 0", r"permutations in \[dedup\] is 0"),
        ("[dedup]\nthreshold = 70", r"threshold in \[dedup\] is 70; it must be from 0\.01 to 1"),
        ("[quality]\nshortest = 11", r"ngram and shortest in \[quality\] are 10 and 11"),
        ("[quality]\nmin_score = 'x'", r"min_score in \[quality\].* it must be a number$"),
    ],
)
def test_bad_configuration(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        corpus.load_config(tmp_path / "c.toml")
    with pytest.raises(FileNotFoundError, match=r"d\.toml: no such corpus configuration"):
        corpus.load_config(tmp_path / "d.toml")


def test_bad_calls(tmp_path):
    write(tmp_path / "r", {"a.py": "one = 1\n"})
    with pytest.raises(ValueError, match="0 workers cannot build a corpus"):
        corpus.build([str(tmp_path / "r")], tmp_path / "out", workers=0, progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere: no such source"):
        corpus.build([str(tmp_path / "nowhere")], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: no corpus can be written there"):
        corpus.build([str(tmp_path / "r")], tmp_path / "file", progress=False)


def test_documents_of_what_is_no_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a corpus; finish it with python -m pretrain corpus"):
        corpus.documents(tmp_path)
    write(tmp_path / "r", {"a.py": "one = 1\n"})
    out = tmp_path / "out"
    corpus.build([str(tmp_path / "r")], out, progress=False)
    part = out / "quality" / "part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"part-00000\.parquet: damaged"):
        list(corpus.documents(out))
    os.unlink(part)
    with pytest.raises(FileNotFoundError, match=r"part-00000\.parquet is missing; run python -m pretrain corpus again"):
        corpus.documents(out)
    corpus.build([str(tmp_path / "r")], out, progress=False)
    assert [document.paths for document in corpus.documents(out)] == [["a.py"]]
    for damaged in ("", "[]", '{"format": 2}'):
        (out / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json: not a corpus manifest of format 1"):
            corpus.documents(out)


def test_the_configuration_of_the_readme(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (tmp_path / "c.toml").write_text(readme.split("```toml\n", 1)[1].split("```", 1)[0])
    config = corpus.load_config(tmp_path / "c.toml")
    assert sorted(config) == ["crawl", "dedup", "filter", "quality"]
    assert config["filter"]["preset"] == "starcoder"
