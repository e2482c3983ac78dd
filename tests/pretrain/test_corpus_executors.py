"""The same stages on datatrove's executors: the same bytes. Slurm is a stand-in that runs the submitted scripts."""

import asyncio
import email
import hashlib
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from pretrain import corpus
from pretrain.corpus import executors, stage
from pretrain.corpus.executors import Run
from pretrain.corpus.stage import Result, Shard

SOURCES = [str(Path(package.__file__).parent) for package in (asyncio, email, importlib, json)]
CONFIG = {"crawl": {"shard_bytes": 0}}

# What Slurm does with a job array, one task after another. Options count from the script and from the command line.
SBATCH = """#!{python}
import os, re, subprocess, sys
*options, script = sys.argv[1:]
text = open(script).read()
first, last = re.search("#SBATCH --array=([0-9]+)-([0-9]+)", text).groups()
assert "#SBATCH --wait" in text, "the next stage would start before this one ends"
offset = next(o.partition("RUN_OFFSET=")[2] for o in options if o.startswith("--export"))
status = 0
for task in range(int(first), int(last) + 1):
    environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": offset, "SLURM_NODELIST": "localhost"}}
    status = max(status, subprocess.run(["bash", script], env=environment).returncode)
print("Submitted batch job 7")
sys.exit(status)
"""
SRUN = '#!/bin/sh\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'
SCANCEL = '#!/bin/sh\necho "$@" >> "$(dirname "$0")/cancelled"\n'
SCONTROL = "#!/bin/sh\necho localhost\n"


def contents(out):
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(("shard-", "report.")) and "logs" not in path.parts
    }


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "out"
    corpus.build(SOURCES, out, config=CONFIG, progress=False)
    return out


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's programs, first on the path."""
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("sbatch", SBATCH.format(python=sys.executable)),
        ("srun", SRUN),
        ("scancel", SCANCEL),
        ("scontrol", SCONTROL),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((os.getcwd(), os.path.dirname(__file__))))


def test_local_processes(local, tmp_path):
    config = CONFIG | {"run": {"workers": 2}}
    corpus.build(SOURCES, tmp_path / "out", config=config, progress=False)
    assert contents(tmp_path / "out") == contents(local)


@pytest.mark.large
def test_ray(local, tmp_path):
    config = CONFIG | {"run": {"executor": "ray", "workers": 2}}
    corpus.build(SOURCES, tmp_path / "out", config=config, progress=False)
    assert contents(tmp_path / "out") == contents(local)


def one(out, shard, settings):
    """A stage of which one shard fails and one takes its process with it."""
    if shard.name == "00001":
        raise ValueError("a full sentence")
    if shard.name == "00002":
        os._exit(9)
    return Result({"part": pa.table({"x": [int(shard.name)]})}, {"files": 1})


SHARDS = [Shard(f"{number:05}", (), str(number)) for number in range(4)]


@pytest.fixture
def function(monkeypatch):
    """`one` by the name under which a worker can import it."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    return __import__("test_corpus_executors").one


def test_datatrove(function, tmp_path):
    with executors.running(Run("datatrove", workers=2)) as works:
        manifest = stage.run("test", tmp_path / "a", function, SHARDS[:2], executor=works)
    assert manifest["shards"] == stage.run("test", tmp_path / "b", function, SHARDS[:2])["shards"]
    assert manifest["failed"]["00001"]["failed"] == "a full sentence"
    assert contents(tmp_path / "a").keys() == {"test/part-00000.parquet", "test/manifest.json"}
    assert not (tmp_path / "a" / "logs" / "test" / "jobs").exists()  # of a crawl they may hold logins


def test_slurm(slurm, function, tmp_path, monkeypatch):
    """Scripts, job arrays past Slurm's limit, failures, and a second run that does what is left."""
    monkeypatch.setattr(executors, "GRACE", 0)
    with executors.running(Run("slurm", workers=2, partition="cpu", memory_gb=3)) as works:
        works.options["max_array_size"] = 2
        manifest = stage.run("test", tmp_path, function, SHARDS, executor=works)
    assert list(manifest["shards"]) == ["00000", "00003"]
    assert manifest["failed"]["00001"]["failed"] == "a full sentence"
    assert manifest["failed"]["00002"]["failed"].startswith("its task ended without a record")
    script = (tmp_path / "logs" / "test" / "launch_script.slurm").read_text()
    for line in ("array=0-1%2", "partition=cpu", "mem-per-cpu=3G", "time=24:00:00", "wait", "cpus-per-task=1"):
        assert f"#SBATCH --{line}\n" in script
    # What a killed run has left in the queue is cancelled by the job's name, which this folder's stage alone has.
    (name,) = re.findall(r"#SBATCH --job-name=(corpus-\w{12})\n", script)
    assert (tmp_path / "bin" / "cancelled").read_text() == f"--quiet --name={name}\n"
    with executors.running(Run("slurm")) as works:
        manifest = stage.run("test", tmp_path, function, [SHARDS[0], SHARDS[3]], executor=works)
    assert manifest["failed"] == {}
    assert json.loads((tmp_path / "logs" / "test" / "ranks_to_run.json").read_text()) == [
        0,
        1,
        2,
        3,
    ]  # nothing was left


def test_what_cannot_run(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown executor 'cluster'; known: local, datatrove, ray, slurm"):
        corpus.build(SOURCES, tmp_path / "out", config={"run": {"executor": "cluster"}}, progress=False)
    with pytest.raises(ValueError, match=r"time in \[run\] .* is 3; it must be a text"):
        corpus.build(SOURCES, tmp_path / "out", config={"run": {"time": 3}}, progress=False)
    with pytest.raises(ValueError, match=r"\[run\] of the corpus configuration is 3; it must be a table"):
        corpus.build(SOURCES, tmp_path / "out", config={"run": 3}, progress=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="sbatch is not on this machine"):
        corpus.build(SOURCES, tmp_path / "out", config={"run": {"executor": "slurm"}}, progress=False)
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(ValueError, match="the executor ray needs datatrove"):
        corpus.build(SOURCES, tmp_path / "out", config={"run": {"executor": "ray"}}, progress=False)
