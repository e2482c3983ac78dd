"""Training as it is run: whole processes, on the CPU, in fp32."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

from convert import open_checkpoint
from convert.dcp import read_metadata
from deepseek_coder import generate, load
from pretrain import checkpoint, metrics

SIZES = (
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "data.window=128",
    "optimizer.learning_rate=3e-3",
    "optimizer.warmup_steps=2",
    "train.batch=4",
    "train.steps=20",
    "train.log_every=5",
    "train.device=cpu",
)


def command(prepared, run, *changes, processes=1):
    recipe = run.parent / "empty.toml"
    recipe.write_text("")
    program = ["-m", "pretrain", "train", str(recipe)]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        program = [*launch, "--no-python", sys.executable, *program]
    settings = (*SIZES, f"data.tokens={prepared / 'tokens'}", f"train.run={run}", *changes)
    return [sys.executable, *program, *(part for s in settings for part in ("--set", s))]


def train(*args, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*args, **kwargs), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(run):
    return [row["loss"] for row in metrics.read(run / "metrics.jsonl") if "loss" in row]


def weights(run):
    newest = checkpoint.latest(run)
    stored = read_metadata(newest).state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    torch.distributed.checkpoint.load(state, checkpoint_id=newest, no_dist=True)
    return state


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("train") / "run"
    train(prepared, run, "train.validate_every=10", "train.checkpoint_every=6", "train.keep_checkpoints=9")
    return run


def test_it_learns(finished):
    made = losses(finished)
    assert len(made) == 20
    assert made[-1] < made[0] - 1
    valid = [row for row in metrics.read(finished / "metrics.jsonl") if "valid_loss" in row]
    assert [row["step"] for row in valid] == [0, 9, 19]
    assert valid[-1]["valid_loss"] < valid[0]["valid_loss"] - 1
    assert 0 < valid[-1]["bits_per_byte"] < valid[0]["bits_per_byte"]


def test_the_same_command_gives_the_same_weights(prepared, finished, tmp_path):
    train(prepared, tmp_path / "run", "train.validate_every=0")
    assert losses(tmp_path / "run") == losses(finished)


@pytest.mark.parametrize("changes", [("train.micro_batch=1",), ("train.micro_batch=4",), ("data.workers=2",)])
def test_micro_batches_and_workers_change_nothing(prepared, finished, tmp_path, changes):
    train(prepared, tmp_path / "run", *changes)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(finished), rtol=1e-5, atol=0)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_equal_one(prepared, finished, tmp_path, processes):
    train(prepared, tmp_path / "run", "train.validate_every=10", processes=processes)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(finished), rtol=1e-5, atol=0)
    rows = [
        [row["valid_loss"] for row in metrics.read(run / "metrics.jsonl") if "valid_loss" in row]
        for run in (tmp_path / "run", finished)
    ]
    torch.testing.assert_close(rows[0][0], rows[1][0], rtol=1e-5, atol=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_no_thread_of_the_process_group_outlives_training(prepared, tmp_path):
    """One that frees its last tensors while Python shuts down aborts the process, now and then."""
    code = """if True:
        import pathlib, sys, time
        from pretrain import parallel, recipe
        from pretrain.train import train
        gloo = lambda: [t for t in pathlib.Path("/proc/self/task").iterdir() if "gloo" in (t / "comm").read_text()]
        with parallel.process_group("cpu"):
            while not gloo():  # a thread gives itself its name, when it first runs
                time.sleep(0.01)
        train(recipe.load(sys.argv[1], sys.argv[2:]))
        assert not gloo(), [(t / "comm").read_text() for t in gloo()]
        """
    recipe, *changes = command(prepared, tmp_path / "run", "train.steps=2")[4:]
    changes = [part for part in changes if part != "--set"]
    done = subprocess.run([sys.executable, "-c", code, recipe, *changes], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_killed_run_goes_on_bit_for_bit(prepared, finished, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(prepared, run, "train.checkpoint_every=6"),
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while checkpoint.latest(run) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.step_of(checkpoint.latest(run)) < 20
    output = train(prepared, run, "train.checkpoint_every=6")
    assert "going on from" in output
    assert losses(run) == losses(finished)
    one, other = weights(run), weights(finished)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resume_at_another_world_size(prepared, finished, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(finished / "checkpoints" / "step-00000006", run / "checkpoints" / "step-00000006")
    train(prepared, run, processes=2)
    torch.testing.assert_close(losses(run), losses(finished)[6:], rtol=1e-5, atol=0)


def test_export_loads_and_generates(finished, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "export", str(finished), str(tmp_path / "model")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(tmp_path / "model")
    trained = weights(finished)
    assert all(torch.equal(p, trained[f"model.{name}"]) for name, p in model.named_parameters())
    assert isinstance(generate(model, tokenizer, "import ", max_new_tokens=8), str)
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("def f(x):\n    return x\n", bos=True)])
    with torch.no_grad():
        wanted, made = theirs(ids).logits, model(ids)
    assert (made - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_show_prints_windows_with_infilling(prepared):
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "show", str(prepared / "tokens"), "-n", "40"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "infilling document" in done.stdout
    assert "<｜fim▁hole｜>" in done.stdout
    assert "plain document" in done.stdout


@pytest.mark.parametrize(
    "change, message",
    [
        ("train.batch=3", "train.micro_batch"),
        ("data.tokens=nowhere", "nowhere: no finished token folder"),
        ("train.sheps=3", "train.sheps is not a known key"),
        ("optimizer.learning_rate=1e30", "Nothing was updated; lower optimizer.learning_rate"),
        ("data.window=2", "data.window is 2"),
        *([] if torch.cuda.is_available() else [("train.device=cuda", "torch finds no GPU here")]),
        ("model.num_heads=3", "num_heads 3 is not a multiple of num_kv_heads 2"),
    ],
)
def test_mistakes_are_one_line(prepared, tmp_path, change, message):
    changes = (change, "train.micro_batch=2") if "batch" in change else (change,)
    done = subprocess.run(command(prepared, tmp_path / "run", *changes), capture_output=True, text=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr


@pytest.fixture
def resumable(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_validation_that_a_kill_prevented_is_made_up_for(prepared, resumable, finished):
    file = resumable / "metrics.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    assert "valid_loss" in rows[-1]
    file.write_text("".join(rows[:-1]))
    for _ in range(2):  # once only
        train(prepared, resumable, "train.validate_every=10")
        assert metrics.read(file) == metrics.read(finished / "metrics.jsonl")


def test_another_model_does_not_go_on(prepared, resumable):
    done = subprocess.run(command(prepared, resumable, "model.num_layers=1"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "step-00000020: holds a model with num_hidden_layers 2, the recipe's has 1; go on with" in done.stderr


def test_a_damaged_checkpoint_is_one_line(prepared, resumable):
    (damaged,) = checkpoint.latest(resumable).glob("*.distcp")
    os.truncate(damaged, 1000)
    export = [sys.executable, "-m", "pretrain", "export", str(resumable), str(resumable / "model")]
    for program in (command(prepared, resumable), export):
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 2
        assert "step-00000020: damaged (" in done.stderr.splitlines()[-1]
        assert "delete this folder" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line(prepared, tmp_path):
    import resource

    done = subprocess.run(
        command(prepared, tmp_path / "run", "train.steps=1"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert checkpoint.latest(tmp_path / "run") is None


def test_a_checkpoint_cannot_run_code(finished, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    bad = tmp_path / "step-00000020"
    shutil.copytree(checkpoint.latest(finished), bad)
    (bad / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="no checkpoint needs"):
        open_checkpoint(bad)
    assert not (tmp_path / "owned").exists()
