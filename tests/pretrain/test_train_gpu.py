"""A real training run on a GPU: the kernels learn what the plain PyTorch reference learns."""

import os
import statistics
import subprocess
import sys

import pytest

from pretrain import metrics

# 49M parameters, 16,384 tokens a step.
SIZES = (
    "model.hidden_size=576",
    "model.intermediate_size=1536",
    "model.num_layers=12",
    "model.num_heads=9",
    "model.num_kv_heads=3",
    "model.head_dim=64",
    "model.init_std=0.02",
    "data.window=1024",
    "optimizer.learning_rate=5e-4",
    "optimizer.warmup_steps=60",
    "train.batch=16",
    "train.micro_batch=16",
    "train.steps=200",
)


def last_losses(prepared, run, backend, seed):
    recipe = run.parent / "empty.toml"
    recipe.write_text("")
    settings = (*SIZES, f"data.tokens={prepared / 'tokens'}", f"train.run={run}", f"train.seed={seed}")
    command = [sys.executable, "-m", "pretrain", "train", str(recipe), *(p for s in settings for p in ("--set", s))]
    environment = {**os.environ, "DEEPSEEK_CODER_KERNELS": backend}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["loss"] for row in metrics.read(run / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 200
    print(backend, seed, losses[::20], metrics.read(run / "metrics.jsonl")[-1])
    return statistics.mean(losses[-20:])


@pytest.mark.gpu
def test_kernels_train_like_the_reference(whole_library, tmp_path):
    kernels = last_losses(whole_library, tmp_path / "kernels", "auto", 0)
    reference = last_losses(whole_library, tmp_path / "reference", "reference", 0)
    other_seed = last_losses(whole_library, tmp_path / "seed", "auto", 1)
    print(f"last 20 steps: kernels {kernels:.4f}, reference {reference:.4f}, another seed {other_seed:.4f}")
    assert abs(kernels / reference - 1) < 0.005
    assert abs(kernels - reference) < abs(kernels - other_seed)
