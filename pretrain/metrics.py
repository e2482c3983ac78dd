"""What a run reports: one JSON line a step in `metrics.jsonl`, and the arithmetic behind tokens/s and MFU."""

import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepseek_coder.config import ModelConfig

from .files import replacing, writing

# Dense bf16 peak, FLOP/s, from the vendors' data sheets. No default: an unknown device gets no MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def flops_per_token(config: ModelConfig, window: int, causal: bool = False) -> float:
    """Training FLOPs of one token: 6 per matmul weight (head included) plus attention.

    The usual convention (PaLM, appendix B) counts attention over the whole window, 12 L H D T; `causal` counts the
    half that a causal kernel does. Document borders make the real work smaller still.
    """
    weights = config.num_matmul_parameters + config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * window
    return 6 * weights + attention / (2 if causal else 1)


def mfu(config: ModelConfig, window: int, tokens_per_second: float, device_name: str, causal: bool) -> float | None:
    """Model FLOPs utilisation of one device, or None for a device whose peak is not known."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)
    return None if peak is None else flops_per_token(config, window, causal) * tokens_per_second / peak


def bits_per_byte(nll: float, num_bytes: float) -> float:
    """nll: summed negative log-likelihood in nats of text that is `num_bytes` long in UTF-8."""
    return nll / math.log(2) / num_bytes


def progress_bar(shown: bool) -> Progress:
    """Steps done and the time that the rest takes, on stderr where that is a terminal; gone when it ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Lines for a terminal pass above the bar; redirected to a file they must stay on stdout.
    terminal = sys.stdout.isatty()
    console = Console(stderr=True)
    shown = shown and console.is_terminal
    return Progress(*columns, console=console, transient=True, redirect_stdout=terminal, disable=not shown)


class MetricsFile:
    """`metrics.jsonl`: append-only; on resume, lines at or after the resumed step are dropped."""

    def __init__(self, path: Path, first_step: int):
        kept = [row for row in read(path) if row["step"] < first_step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._path = path

    def write(self, row: dict) -> None:
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict]:
    """The rows of a metrics file; a last line that a killed run left half-written is ignored."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot(run: Path, out: Path) -> None:
    """Loss (with validation loss) and learning rate over steps, as a PNG."""
    rows = read(run / "metrics.jsonl")
    if not rows:
        raise FileNotFoundError(f"{run}: no metrics.jsonl with steps in it; train first, or name the run's folder")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 1], layout="constrained"
    )
    train = [row for row in rows if "loss" in row]
    valid = [row for row in rows if "valid_loss" in row]
    top.plot([r["step"] for r in train], [r["loss"] for r in train], linewidth=1, label="training")
    if valid:
        top.plot([r["step"] for r in valid], [r["valid_loss"] for r in valid], "o-", markersize=4, label="validation")
    top.set_ylabel("loss (nats a token)")
    top.legend()
    top.grid(alpha=0.3)
    bottom.plot([r["step"] for r in train], [r["learning_rate"] for r in train], color="tab:green", linewidth=1)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
