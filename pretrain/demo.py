"""`make demo`: from real repositories to a model that completes and infills code, on any machine, in minutes.

The repositories are the packages of the running Python's standard library. Every command is printed, so that each can
be repeated by hand. With a GPU the same commands train a larger model on more steps.
"""

import json
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

from . import metrics

FOLDER = Path("demo")
RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
# What a GPU adds to the recipe: about 50M parameters and ten times the tokens.
ON_A_GPU = (
    "model.hidden_size=512",
    "model.intermediate_size=1376",
    "model.num_layers=12",
    "model.num_heads=8",
    "model.num_kv_heads=8",
    "data.window=2048",
    "train.steps=1000",
    "train.batch=32",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=100",
)
FUNCTION = '''def read_lines(path):
    """Return the lines of a file."""
    with open(path'''
PREFIX = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items."""
SUFFIX = """

    def pop(self):
        return self.items.pop()
"""


def repositories() -> list[str]:
    """The packages of the standard library that hold code, not tests or data."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "site-packages", "dist-packages", "ensurepip", "lib2to3", "turtledemo"}
    skipped |= {"encodings", "pydoc_data"}  # tables, not code
    return sorted(str(p.parent) for p in library.glob("*/__init__.py") if p.parent.name not in skipped)


def call(*command: str) -> None:
    """Run one of the project's commands, after printing it."""
    print(f"\n$ python -m {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, "-m", *command])
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    started = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    gpu = torch.cuda.is_available()
    sources, corpus, tokenizer, tokens = (
        str(FOLDER / name) for name in ("repositories.jsonl", "corpus", "tokenizer", "tokens")
    )
    run, model = FOLDER / "run", FOLDER / "model"
    Path(sources).write_text("".join(json.dumps({"path": path}) + "\n" for path in repositories()))
    call("pretrain", "corpus", sources, "--out", corpus)
    call("pretrain", "tokenizer", corpus, "--vocab-size", "4096", "--out", tokenizer, "--force")
    call("pretrain", "tokens", corpus, "--tokenizer", tokenizer, "--out", tokens, "--valid", "0.06")
    changes = [part for change in ON_A_GPU if gpu for part in ("--set", change)]
    call("pretrain", "train", str(RECIPE), *changes)
    call("pretrain", "plot", str(run))
    call("pretrain", "export", str(run), str(model), "--force")
    call("deepseek_coder", "info", str(model))
    print("\nThe model continues this function:\n" + FUNCTION, end="")
    call("deepseek_coder", "complete", str(model), FUNCTION, "--max-new-tokens", "48")
    (FOLDER / "prefix.py").write_text(PREFIX)
    (FOLDER / "suffix.py").write_text(SUFFIX)
    print(f"\n\nThe model fills the hole:\n{PREFIX}<HOLE>{SUFFIX}", end="")
    files = ("--prefix-file", str(FOLDER / "prefix.py"), "--suffix-file", str(FOLDER / "suffix.py"))
    call("deepseek_coder", "fill", str(model), *files, "--max-new-tokens", "24")

    rows = [row for row in metrics.read(run / "metrics.jsonl") if "valid_loss" in row]
    before, after = rows[0], rows[-1]
    print(
        f"""

Held-out files, before training: {before["valid_loss"]:.3f} nats a token, {before["bits_per_byte"]:.3f} bits a byte
                after training: {after["valid_loss"]:.3f} nats a token, {after["bits_per_byte"]:.3f} bits a byte
Loss curve: {run / "loss.png"}      Model: {model}      Time: {time.monotonic() - started:.0f} s

A model of this size, trained for minutes, has learned what Python looks like: indentation, keywords, common names.
It does not know what code does. The same commands with the recipes in pretrain/recipes train the real sizes."""
    )


if __name__ == "__main__":
    main()
