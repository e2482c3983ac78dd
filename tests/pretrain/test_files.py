"""Outputs are whole or not there; a full disk and a folder in the way are one sentence."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from pretrain import metrics, tokenizer, tokens
from pretrain.files import replacing, write_json, writing


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() does: without a file's name


def test_a_refused_write_names_the_file_and_leaves_nothing(tmp_path):
    there = r"there: cannot be written \(No space left on device\); free space"
    with pytest.raises(ValueError, match=there), writing(tmp_path / "there"):
        full()
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    with pytest.raises(ValueError, match=r"a\.json: cannot be written"), replacing(file) as temporary:
        full(temporary.write_text("half"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert "old" in file.read_text()


@pytest.mark.parametrize(
    "arguments, file",
    [
        (("tokens", "corpus", "--tokenizer", "tokenizer", "--out", "{out}/tokens"), "tokens/tokenizer"),
        (("tokenizer", "corpus", "--vocab-size", "1024", "--out", "{out}/tokenizer"), "out/tokenizer"),
        (("plot", "{out}/run"), "run/loss.png"),
    ],
)
def test_a_full_disk(prepared, tmp_path, arguments, file):
    """No file may grow beyond 1000 bytes, which to the writer is a disk without room."""
    out = tmp_path / "out"
    (out / "run").mkdir(parents=True)
    (out / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "learning_rate": 1.0}\n')
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *(argument.format(out=out) for argument in arguments)],
        cwd=prepared,
        env={**os.environ, "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 2, done.stderr
    assert f"{file}: cannot be written (File too large); free space there" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.tmp"))


def test_a_disk_that_is_full_after_the_tokens(prepared, tmp_path, monkeypatch):
    made = tokenizer.Tokenizer.load(prepared / "tokenizer")
    monkeypatch.setattr(made, "save", full)
    with pytest.raises(ValueError, match="t/tokenizer: cannot be written"):
        tokens.build(prepared / "corpus", made, tmp_path / "t", progress=False)


def test_a_full_disk_while_training_writes_its_metrics(tmp_path, monkeypatch):
    log = metrics.MetricsFile(tmp_path / "metrics.jsonl", 0)
    monkeypatch.setattr(metrics.json, "dumps", full)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be written"):
        log.write({"step": 0})


def test_only_a_tokenizer_is_replaced(prepared, tmp_path):
    made = tokenizer.Tokenizer.load(prepared / "tokenizer")
    for name in ("home/notes.txt", "model/tokenizer.json", "model/model.safetensors", "nested/tokenizer.json/file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    for name in ("home", "model", "nested", "home/notes.txt"):
        with pytest.raises(FileExistsError, match="is not replaced; choose another --out"):
            tokenizer.save(made, tmp_path / name)
    command = ("tokenizer", str(prepared / "corpus"), "--force", "--out", str(tmp_path / "home"))
    done = subprocess.run([sys.executable, "-m", "pretrain", *command], capture_output=True, text=True)
    assert (done.returncode, "not replaced" in done.stderr) == (2, True)
    assert (tmp_path / "home" / "notes.txt").read_text() == "precious"


def test_a_tokenizer_is_replaced_as_a_whole(prepared, tmp_path, monkeypatch):
    made = tokenizer.Tokenizer.load(prepared / "tokenizer")
    out = tmp_path / "t"
    out.mkdir()
    (out / "tokenizer.json").write_text("old")
    (tmp_path / ".t.tmp").mkdir()  # of a killed run
    with monkeypatch.context() as broken:
        broken.setattr(made, "save", full)
        with pytest.raises(ValueError, match="t: cannot be written"):
            tokenizer.save(made, out)
    assert (out / "tokenizer.json").read_text() == "old"
    tokenizer.save(made, out)
    assert tokenizer.Tokenizer.load(out).files == made.files
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
