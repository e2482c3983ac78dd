"""`python -m convert SOURCE DESTINATION` and `python -m convert --inspect PATH`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import run

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoint, Deferred

app = typer.Typer(add_completion=False)


class Format(StrEnum):
    huggingface = "huggingface"
    gguf = "gguf"


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    q8_0 = "q8_0"


@app.command()
def convert(
    source: Annotated[
        Path | None,
        typer.Argument(help="a Hugging Face folder, a .gguf file, a training checkpoint, Meta's or llama2.c's weights"),
    ] = None,
    destination: Annotated[Path | None, typer.Argument(help="the folder or .gguf file to write")] = None,
    to: Annotated[Format | None, typer.Option(help="default: by the ending of DESTINATION")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="convert every weight to this (q8_0: GGUF only); default: as stored")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest weight file, such as 5GB or 500MB")] = "5GB",
    merge_adapter: Annotated[Path | None, typer.Option(help="a LoRA adapter in PEFT's layout to merge")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="read everything again and compare with SOURCE")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing model")] = False,
    inspect: Annotated[Path | None, typer.Option(help="describe this model instead of converting one")] = None,
) -> None:
    """Convert a model to a Hugging Face folder or a GGUF file, or describe one.

    A conversion to a folder that was interrupted goes on behind its last finished shard when it is given again. A GGUF
    file is written anew. Either appears as a whole or not at all.
    """
    if inspect is not None:
        if source is not None:
            raise ValueError("--inspect PATH stands alone, without SOURCE and DESTINATION")
        from .description import print_description

        print_description(inspect)
        return
    if source is None or destination is None:
        raise ValueError("give SOURCE and DESTINATION, or --inspect PATH (--help tells more)")
    to_gguf = destination.suffix == ".gguf" if to is None else to is Format.gguf
    if to_gguf != (destination.suffix == ".gguf"):
        raise ValueError(f"{destination}: GGUF files end in .gguf, folders do not; name the destination accordingly")
    if dtype is Dtype.q8_0 and not to_gguf:
        raise ValueError("--dtype q8_0 is a format of GGUF files; add --to gguf and a destination that ends in .gguf")
    _convert(source, destination, to_gguf, dtype, max_shard_size, merge_adapter, verify, force)


def _convert(
    source: Path,
    destination: Path,
    to_gguf: bool,
    dtype: Dtype | None,
    max_shard_size: str,
    merge_adapter: Path | None,
    verify: bool,
    force: bool,
) -> None:
    from . import open_checkpoint
    from .gguf_writer import write_gguf
    from .provenance import fingerprint, model_card
    from .writer import parse_size, write_folder, write_tokenizer

    size = parse_size(max_shard_size)
    with open_checkpoint(source) as checkpoint:
        if any(path.resolve().is_relative_to(destination.resolve()) for path in (source, merge_adapter) if path):
            raise ValueError(f"{destination}: holds the source itself; choose another destination")
        if not checkpoint.shapes:
            if to_gguf or merge_adapter:
                raise ValueError(f"{source}: holds a vocabulary only, no weights; give a complete model")
            write_tokenizer(destination, checkpoint.tokenizer_files, force)
            print(f"{destination}: tokenizer written; {source} holds no weights")
            return
        if merge_adapter is not None:
            from .adapter import Merged, open_adapter

            checkpoint = Merged(checkpoint, open_adapter(merge_adapter, checkpoint.config))
        try:
            tokenizer_files = checkpoint.tokenizer_files
        except ValueError as error:
            print(f"warning: written without tokenizer, because {error}", file=sys.stderr)
            tokenizer_files = {}
        if to_gguf:
            if not tokenizer_files:
                print("warning: a GGUF file without vocabulary runs on token ids only", file=sys.stderr)
            kind = dtype.value if dtype else _usual_dtype(checkpoint)
            write_gguf(
                destination,
                checkpoint.config,
                _stream(checkpoint, None, "converting"),
                kind,
                tokenizer_files=tokenizer_files,
                generation_config=checkpoint.generation_config,
                force=force,
            )
        else:
            write_folder(
                destination,
                checkpoint.config,
                _stream(checkpoint, dtype, "converting"),
                tokenizer_files=tokenizer_files,
                generation_config=checkpoint.generation_config or None,
                model_card=model_card(checkpoint, destination.resolve().name, dtype, merge_adapter),
                max_shard_size=size,
                force=force,
                resume=fingerprint(checkpoint, dtype, size),
            )
        print(f"{destination}: {len(checkpoint.shapes)} tensors written")
        if verify:
            _verify(checkpoint, destination, dtype, kind if to_gguf else None)
            print(f"{destination}: {len(checkpoint.shapes)} tensors verified")


def _usual_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most matrices, as a name."""
    matrices = [checkpoint.dtypes[name] for name, shape in checkpoint.shapes.items() if len(shape) == 2]
    return str(max(sorted(set(matrices), key=str), key=matrices.count)).removeprefix("torch.")


def _stream(checkpoint: Checkpoint, dtype: Dtype | None, what: str) -> Iterator[tuple[str, Deferred]]:
    """Name after name in model order with its tensor, cast when it is made; a progress bar with ETA on stderr."""
    import math

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from . import names
    from .checkpoint import Deferred, cast

    target: torch.dtype | None = getattr(torch, dtype) if dtype else None
    shapes = names.huggingface(checkpoint.config)
    size = {name: math.prod(shapes[name]) * (target or checkpoint.dtypes[name]).itemsize for name in shapes}
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # Where stderr is no terminal, a bar would still leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=sum(size.values()))
        for name in shapes:
            to = target or checkpoint.dtypes[name]
            yield name, Deferred(size[name], lambda name=name, to=to: cast(name, checkpoint.tensor(name), to))  # type: ignore[misc]
            progress.advance(task, size[name])


def _verify(checkpoint: Checkpoint, destination: Path, dtype: Dtype | None, kind: str | None) -> None:
    """Open what was written and compare every byte with the source; ValueError names the first tensor that differs.

    kind    of a GGUF file, which has its own encoding; None for a folder
    """
    import numpy as np
    import torch

    from . import open_checkpoint
    from .gguf import GGUFFile
    from .gguf_writer import encode

    with open_checkpoint(destination) as written:
        for name, deferred in _stream(checkpoint, None if kind else dtype, "verifying"):
            if isinstance(written, GGUFFile):
                expected = encode(name, deferred.make(), checkpoint.config, str(kind)).reshape(-1).view(np.uint8)
                same = np.array_equal(written.raw(name), expected)
            else:
                bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (written.tensor(name), deferred.make())]
                same = torch.equal(*bits)
            if not same:
                raise ValueError(
                    f"{destination}: tensor {name} differs from the source, the disk or the memory of this machine "
                    "damaged it; convert again with --force"
                )


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
