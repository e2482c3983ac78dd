"""The README's training commands, one after another, each a process of its own."""

import json
import subprocess
import sys
import tarfile

import pytest

from pretrain.metrics import read


def run(*arguments, cwd=None):
    program = [sys.executable, "-m", "pretrain", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, cwd=cwd, timeout=300)


def done(*arguments, cwd=None):
    result = run(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def refused(result, *words):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in result.stderr


def test_from_repositories_to_a_completion(library, tmp_path):
    done("corpus", library / "json", library / "wsgiref", library / "curses", "--out", "corpus", cwd=tmp_path)
    assert "tokens" in done("tokenizer", "corpus", "--vocab-size", 512, "--out", "tokenizer", cwd=tmp_path)
    refused(run("tokenizer", "corpus", "--out", "tokenizer", cwd=tmp_path), "exists already")
    done("tokens", "corpus", "--tokenizer", "tokenizer", "--out", "tokens", "--valid", 0.2, cwd=tmp_path)
    assert "===== window 3" in done("show", "tokens", "-n", 4, cwd=tmp_path)
    (tmp_path / "recipe.toml").write_text(
        "[model]\nhidden_size = 32\nintermediate_size = 48\nnum_layers = 1\nnum_heads = 2\nnum_kv_heads = 1\n"
        "head_dim = 16\n[data]\nwindow = 128\n[train]\nsteps = 4\nbatch = 2\nvalidate_every = 4\n"
    )
    done("train", "recipe.toml", "--set", "train.steps=2", cwd=tmp_path)
    assert done("plot", "run", cwd=tmp_path).strip() == "run/loss.png"
    done("export", "run", "model", cwd=tmp_path)
    refused(run("export", "run", "model", cwd=tmp_path), "exists")
    program = [sys.executable, "-m", "deepseek_coder", "complete", "model", "import ", "--max-new-tokens", "4"]
    assert subprocess.run(program, cwd=tmp_path, timeout=120).returncode == 0
    assert len([row for row in read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]) == 2
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["train"]["steps"] == 2


def test_without_arguments_there_is_only_the_help():
    result = run()
    assert result.returncode == 2
    assert "Usage:" in result.stdout + result.stderr
    assert "error:" not in result.stderr


def test_without_the_extra():
    code = "import runpy, sys; sys.modules['pyarrow'] = None; runpy.run_module('pretrain', run_name='__main__')"
    refused(
        subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True),
        'pyarrow is not installed; pip install "deepseek-coder-torch[corpus]"',
    )


def test_an_empty_corpus(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "binary.py").write_bytes(b"x = '\0'\n" * 50)
    refused(run("corpus", tmp_path / "repo", "--out", tmp_path / "corpus"), "nothing is left")


def test_a_part_that_fails_and_the_report(library, tmp_path):
    (tmp_path / "noise.zip").write_bytes(b"noise")
    (tmp_path / "c.toml").write_text("[crawl]\nshard_bytes = 0\n[run]\nworkers = 2\n")
    command = ("corpus", library / "json", library / "wsgiref", tmp_path / "noise.zip", "--out", tmp_path / "corpus")
    result = run(*command, "--config", tmp_path / "c.toml", "--executor", "local")
    refused(result, "noise.zip", "the corpus holds the others, and the same command tries these again")
    assert "Python" in result.stdout
    assert "noise.zip" in (tmp_path / "corpus" / "report.md").read_text()
    (tmp_path / "noise.zip").unlink()
    done(*command[:3], *command[4:], "--config", tmp_path / "c.toml")
    assert "noise.zip" not in (tmp_path / "corpus" / "report.md").read_text()
    done(
        "tokenizer", tmp_path / "corpus", "--vocab-size", 600, "--out", tmp_path / "tokenizer", "--sample-bytes", 50_000
    )
    command = ("tokens", tmp_path / "corpus", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "tokens")
    done(*command, "--workers", 2)
    assert "<｜fim▁hole｜>" in (tmp_path / "tokens" / "report.md").read_text()
    refused(run(*command, "--executor", "cluster"), "unknown executor 'cluster'")


def test_an_archive_that_climbs_out(tmp_path):
    (tmp_path / "evil.py").write_text("x = 1\n")
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "evil.py", "../../evil.py")
    refused(run("corpus", tmp_path / "evil.tar.gz", "--out", tmp_path / "corpus"), "evil.tar.gz")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("corpus", "nowhere", "--out", "c"), "nowhere"),
        (("tokens", "nowhere", "--tokenizer", "nowhere", "--out", "t"), "nowhere"),
        (("show", "nowhere"), "nowhere: no finished token folder"),
        (("train", "nowhere.toml"), "no such recipe"),
        (("export", "nowhere", "m"), "no checkpoint"),
        (("plot", "nowhere"), "no metrics.jsonl"),
        (("plod", "nowhere"), "plod"),
    ],
)
def test_what_is_not_there(tmp_path, arguments, word):
    refused(run(*arguments, cwd=tmp_path), word)
    assert not any(tmp_path.glob("*/*"))
