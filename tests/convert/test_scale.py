"""Memory and throughput with the shapes of the released models; `scale.py` does the work in a process of its own."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.destination import flush_to_disk
from convert.huggingface import open_folder
from deepseek_coder.config import RELEASED

ROOT = Path(__file__).parents[2]
BASES = [name for name in RELEASED if "base" in name]
# Published counts, computed from the official configs.
PARAMETERS = {
    "deepseek-coder-1.3b-base": 1_346_471_936,
    "deepseek-coder-5.7bmqa-base": 5_700_325_376,
    "deepseek-coder-6.7b-base": 6_740_512_768,
    "deepseek-coder-33b-base": 33_342_991_360,
    "deepseek-coder-7b-base-v1.5": 6_910_365_696,
}


def scale(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("scale.py")), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print({key: value for key, value in report.items() if key != "digests"})
    # The promise: whatever the model's size.
    assert report["peak_anonymous"] < 1.2 * report["largest_shard"] + 2**30
    return report


def test_33b_shaped_layers(tmp_path: Path) -> None:
    """Two of the 62 layers, hashed: 2.98 GB with embedding and head, in shards of 0.8 GB."""
    report = scale("deepseek-coder-33b-base", tmp_path / "out", "--sink", "--layers", 2, "--shard", "800MB")
    assert report["shards"] == 5
    assert len(report["digests"]) == 2 * 9 + 3
    # More than a shard was in memory, so the measurement sees what it is to see.
    assert report["peak_anonymous"] > 0.9 * report["largest_shard"]


@pytest.mark.large
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", BASES)
def test_every_released_shape(tmp_path: Path, name: str) -> None:
    report = scale(name, tmp_path / "out", "--sink")
    assert report["parameters"] == PARAMETERS[name]
    assert len(report["digests"]) == RELEASED[name].num_layers * 9 + 3
    for tensor, count in (("model.norm.weight", 1), ("lm_head.weight", 1)):
        assert sum(key == tensor for key in report["digests"]) == count


@pytest.mark.large
def test_training_checkpoint_of_33b_shape(tmp_path: Path) -> None:
    """A layer, head and embedding in pieces of up to 1.1 GB, larger than the shards that are written."""
    report = scale("deepseek-coder-33b-base", tmp_path / "out", "--sink", "--layers", 1, "--shard", "1GB", "--training")
    assert report["largest_shard"] < 10**9
    shutil.rmtree(tmp_path / "training")
    plain = scale("deepseek-coder-33b-base", tmp_path / "plain", "--sink", "--layers", 1, "--shard", "1GB")
    assert report["digests"] == plain["digests"]


@pytest.mark.large
@pytest.mark.timeout(3000)
def test_real_write_of_6_7b(tmp_path: Path) -> None:
    """13.5 GB written to a real disk with the right bytes, and converted once more about as fast as they are copied."""
    report = scale("deepseek-coder-6.7b-base", tmp_path / "out")
    assert report["shards"] == 3
    digests = scale("deepseek-coder-6.7b-base", tmp_path / "sink", "--sink")["digests"]
    with open_folder(tmp_path / "out") as folder:
        for name, digest in digests.items():
            raw = folder.tensor(name).reshape(-1).view(torch.uint8).numpy()
            assert hashlib.sha256(memoryview(raw)).hexdigest() == digest, name

    def seconds(copy: Callable[[Path, Path], None]) -> float:
        for file in (tmp_path / "out").iterdir():
            # So that both read from the disk.
            flush_to_disk(file)
        begin = time.monotonic()
        copy(tmp_path / "out", tmp_path / "copy")
        taken = time.monotonic() - begin
        shutil.rmtree(tmp_path / "copy")
        return taken

    def plainly(source: Path, destination: Path) -> None:
        shutil.copytree(source, destination)
        for file in destination.iterdir():
            flush_to_disk(file)

    def convert(source: Path, destination: Path) -> None:
        subprocess.run([sys.executable, "-m", "convert", str(source), str(destination)], cwd=ROOT, check=True)

    plain, converted = seconds(plainly), seconds(convert)
    print(f"made and written in {report['seconds']} s, converted in {converted:.1f} s, copied in {plain:.1f} s")
    assert converted < 1.5 * plain
