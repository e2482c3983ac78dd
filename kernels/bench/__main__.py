"""`python -m kernels.bench attention|decode|norm|rope|swiglu|loss|sampling|all [--out DIR]`; needs a GPU."""

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


@app.command()
def decode(out: Out = Path("docs/results")) -> None:
    """One token for each sequence over a paged cache."""
    from . import decode

    decode.run(out)


@app.command()
def norm(out: Out = Path("docs/results")) -> None:
    """RMSNorm, with and without the residual addition, forward and backward."""
    from . import layers

    layers.run("norm", out)


@app.command()
def rope(out: Out = Path("docs/results")) -> None:
    """Rotary positions in place, forward and backward."""
    from . import layers

    layers.run("rope", out)


@app.command()
def swiglu(out: Out = Path("docs/results")) -> None:
    """SwiGLU, forward and backward."""
    from . import layers

    layers.run("swiglu", out)


@app.command()
def loss(out: Out = Path("docs/results")) -> None:
    """The head's product with the cross-entropy, and both gradients."""
    from . import loss

    loss.run(out)


@app.command()
def sampling(out: Out = Path("docs/results")) -> None:
    """Temperature, top-k and top-p."""
    from . import sampling

    sampling.run(out)


@app.command("all")
def everything(out: Out = Path("docs/results")) -> None:
    """All of them, one after the other."""
    for op in (attention, decode, norm, rope, swiglu, loss, sampling):
        op(out)


if __name__ == "__main__":
    app()
