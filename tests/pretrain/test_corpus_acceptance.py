"""Twelve published repositories in seven languages, from archives to token files: the same bytes whatever happens.

The large tests print what docs/corpus.md reports: the peak of memory for much more input, and the rate of encoding.
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from deepseek_coder.tokenizer import Tokenizer
from pretrain import corpus, tokenizer, tokens
from pretrain.corpus.executors import Run

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "cffi==2.1.1",
    "cryptography==42.0.8",
    "hiredis==3.5.0",
    "jpype1==1.7.1",
    "npm:@reduxjs/toolkit@2.14.0",
    "npm:rxjs@7.8.2",
    "psutil==7.2.2",
    "pygments==2.21.0",
    "pythonnet==3.2.1",
    "requests==2.34.2",
    "sentencepiece==0.2.3",
    "tree-sitter-python==0.25.0",
)
# Shards small enough that twelve repositories make some.
CONFIG = {"crawl": {"shard_bytes": 2 << 20}}


def data(out):
    """Data files, and the manifests less what names the folder."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.suffix in (".parquet", ".ids", ".files", ".documents") or path.name == "manifest.json"
    }


@pytest.fixture(scope="module")
def archives(source):
    files = []
    for package in PACKAGES:
        source(package)  # leaves the archive in .cache
        (archive,) = (ROOT / ".cache" / "sources" / re.sub(r"[^\w.=-]", "_", package)).iterdir()
        files.append(str(archive))
    return files


@pytest.fixture(scope="module")
def made(archives, tmp_path_factory):
    """`corpus`, `tokenizer` and `tokens`, in one process and without interruption."""
    folder = tmp_path_factory.mktemp("made")
    manifest = corpus.build(archives, folder / "corpus", config=CONFIG, progress=False)
    assert manifest["failed"] == ""
    tokenizer.save(tokenizer.train(tokenizer.sample(folder / "corpus", 2_000_000), 2000), folder / "tokenizer")
    tokens.build(folder / "corpus", Tokenizer.load(folder / "tokenizer"), folder / "tokens", 0.1, progress=False)
    return folder


@pytest.mark.network
def test_what_twelve_repositories_become(made):
    counts = json.loads((made / "corpus" / "manifest.json").read_text())["counts"]
    assert set(counts["documents"]["languages"]) >= {"C", "C++", "C#", "Java", "Python", "Rust", "TypeScript"}
    assert len(list((made / "corpus" / "documents").glob("part-*.parquet"))) > 3
    totals = json.loads((made / "tokens" / "manifest.json").read_text())["splits"]
    assert sum(split["bytes"] for split in totals.values()) > 5_000_000


@pytest.mark.network
@pytest.mark.parametrize("shard_bytes", [CONFIG["crawl"]["shard_bytes"], 64 << 20])
def test_workers_and_shards(archives, made, tmp_path, shard_bytes):
    """Two runs of two workers, sources named in another order; with other shards the token files are the same."""
    config = {"crawl": {"shard_bytes": shard_bytes}}
    corpus.build(archives[::-1], tmp_path / "corpus", 2, config, progress=False)
    if config == CONFIG:
        first, second = data(made / "corpus"), data(tmp_path / "corpus")
        assert first.pop("manifest.json") != second.pop("manifest.json")  # the sources as they were named
        assert first == second
    reference = Tokenizer.load(made / "tokenizer")
    tokens.build(tmp_path / "corpus", reference, tmp_path / "tokens", 0.1, Run(workers=2), progress=False)
    for name, digest in data(made / "tokens").items():
        if not name.endswith((".parquet", ".json")):
            assert digest == data(tmp_path / "tokens")[name], name


PROGRAM = """
import json, sys
from pathlib import Path
from deepseek_coder.tokenizer import Tokenizer
from pretrain import corpus, tokens
from pretrain.corpus.executors import Run
if __name__ == "__main__":
    archives, config, out, tokenizer = sys.argv[1:]
    corpus.build(json.loads(archives), Path(out) / "corpus", 2, json.loads(config), progress=False)
    tokens.build(Path(out) / "corpus", Tokenizer.load(tokenizer), Path(out) / "tokens", 0.1, Run(workers=2), False)
"""


@pytest.mark.network
def test_killed_at_random_points(archives, made, tmp_path):
    """kill -9 three times, each after another random number of finished files; then to the end."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    command += [json.dumps(archives), json.dumps(CONFIG), str(tmp_path), str(made / "tokenizer")]
    chance = random.Random(0)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def finished():
        return len(list(tmp_path.glob("*/*/shard-*.json")))

    for _ in range(3):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        target = finished() + chance.randint(1, 8)
        while process.poll() is None and finished() < target:
            time.sleep(0.005)
        time.sleep(chance.random() / 5)
        before = finished()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert finished() >= before
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert data(tmp_path / "corpus") == data(made / "corpus")
    assert data(tmp_path / "tokens") == data(made / "tokens")


def packages(total):
    """Folders of installed Python packages as repositories, none larger than 4 MB, until they hold `total` bytes."""
    import torch

    site, chosen, held = Path(torch.__file__).parents[1], [], 0
    for folder in sorted(site.glob("*/*/")):
        size = sum(path.stat().st_size for path in folder.rglob("*.py"))
        if 10_000 < size <= 4 << 20 and "__pycache__" not in folder.parts:
            chosen.append(folder)
            held += size
            if held >= total:
                return chosen
    raise AssertionError(f"only {held} bytes are installed")


def peak(command):
    """The most memory that a command and its workers held together, pages that they share counted once."""
    most = 0
    with subprocess.Popen([sys.executable, "-m", "pretrain", *map(str, command)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            held = 0
            with suppress(psutil.Error):  # one that ends while it is looked at
                for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                    held += each.memory_full_info().pss
            most = max(most, held)
            time.sleep(0.05)
    assert process.returncode == 0
    return most


@pytest.mark.large
def test_memory(tmp_path, capsys):
    """Folders -> tokens with two workers: fifteen times the input in less than 1.3 times the memory."""
    texts = (path.read_text() for folder in packages(3_000_000) for path in sorted(folder.rglob("*.py")))
    tokenizer.save(tokenizer.train(texts, 32000), tmp_path / "tokenizer")
    (tmp_path / "c.toml").write_text(f"[crawl]\nshard_bytes = {4 << 20}\n[run]\nworkers = 2\n")
    peaks = {}
    for total in (8_000_000, 120_000_000):
        sources, out = tmp_path / f"{total}.jsonl", tmp_path / str(total)
        sources.write_text("".join(json.dumps({"path": str(folder)}) + "\n" for folder in packages(total)))
        how = ("--config", tmp_path / "c.toml")
        made = peak(["corpus", sources, "--out", out, *how])
        encoded = peak(["tokens", out, "--tokenizer", tmp_path / "tokenizer", "--out", out / "tokens", *how])
        peaks[total] = made, encoded
        with capsys.disabled():
            print(f"\n{total / 1e6:.0f} MB: corpus {made / 1e6:.0f} MB of memory, tokens {encoded / 1e6:.0f} MB")
    small, large = peaks.values()
    assert all(more < 1.3 * less for less, more in zip(small, large, strict=True))


@pytest.mark.large
def test_encoding_rate(library, tmp_path, capsys, monkeypatch):
    """kitoken beside the tokenizers library, DeepSeek's pre-tokenizer, a vocabulary of 32,000, CPU time, best of 3."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    texts = [path.read_text(errors="replace") for path in sorted(library.glob("*/*.py"))]
    texts = [text for text in texts if "\ufffd" not in text][:600]
    made = tokenizer.train(texts, 32000)
    encoders = {"kitoken": tokens._kitoken(made), "tokenizers": made.encode_batch}
    assert encoders["kitoken"](texts) == encoders["tokenizers"](texts)
    best = dict.fromkeys(encoders, float("inf"))
    for _ in range(3):
        for name, encode in encoders.items():
            started = time.process_time()
            encode(texts)
            best[name] = min(best[name], time.process_time() - started)
    size = sum(len(text.encode()) for text in texts) / 1e6
    ratio = best["tokenizers"] / best["kitoken"]
    with capsys.disabled():
        rates = ", ".join(f"{name} {size / seconds:.2f} MB/s" for name, seconds in best.items())
        print(f"\n{size:.1f} MB: {rates}, ratio {ratio:.1f}")
    assert ratio >= 8
