"""`python -m kernels.bench attention [--out DIR]`; needs a GPU."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure an op beside its peers on one GPU.")

Out = Annotated[Path, typer.Option(help="Folder for the JSON and the plot.")]


@app.callback()
def check() -> None:
    if not torch.cuda.is_available():
        print("error: no CUDA GPU is visible; run the benchmark on a machine that has one", file=sys.stderr)
        raise typer.Exit(2)


@app.command()
def attention(out: Out = Path("docs/results")) -> None:
    """Forward and backward, dense and packed, beside whichever peers are installed."""
    from . import attention

    attention.run(out)


if __name__ == "__main__":
    app()
