"""`python -m convert SOURCE DESTINATION` and `python -m convert --inspect PATH`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import run

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoint

app = typer.Typer(add_completion=False)


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def convert(
    source: Annotated[Path | None, typer.Argument(help="a Hugging Face folder or a .gguf file")] = None,
    destination: Annotated[Path | None, typer.Argument(help="the Hugging Face folder to write")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="convert every weight to this; default: as stored")] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest weight file, such as 5GB or 500MB")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="replace an existing model folder")] = False,
    inspect: Annotated[Path | None, typer.Option(help="describe this model instead of converting one")] = None,
) -> None:
    """Convert a model to a Hugging Face folder, or describe one."""
    if inspect is not None:
        if source is not None:
            raise ValueError("--inspect PATH stands alone, without SOURCE and DESTINATION")
        _print_description(inspect)
        return
    if source is None or destination is None:
        raise ValueError("give SOURCE and DESTINATION, or --inspect PATH (--help tells more)")
    _convert(source, destination, dtype, max_shard_size, force)


def _convert(source: Path, destination: Path, dtype: Dtype | None, max_shard_size: str, force: bool) -> None:
    from . import open_checkpoint
    from .writer import parse_size, write_folder

    size = parse_size(max_shard_size)
    with open_checkpoint(source) as checkpoint:
        if not checkpoint.shapes:
            raise ValueError(f"{source}: holds a vocabulary only, no weights; give a complete model")
        if source.resolve().is_relative_to(destination.resolve()):
            raise ValueError(f"{destination}: holds the source itself; choose another destination")
        try:
            tokenizer_files = checkpoint.tokenizer_files
        except ValueError as error:
            print(f"warning: written without tokenizer, because {error}", file=sys.stderr)
            tokenizer_files = {}
        write_folder(
            destination,
            checkpoint.config,
            _stream(checkpoint, dtype),
            tokenizer_files=tokenizer_files,
            generation_config=checkpoint.generation_config or None,
            max_shard_size=size,
            force=force,
        )
        print(f"{destination}: {len(checkpoint.shapes)} tensors written")


def _stream(checkpoint: Checkpoint, dtype: Dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors one after the other, cast, with a progress bar on stderr."""
    import torch
    from rich.console import Console
    from rich.progress import track

    target = getattr(torch, dtype) if dtype else None
    console = Console(stderr=True)
    # Where stderr is no terminal, a bar would still leave an empty line.
    disable = not console.is_terminal
    for name in track(list(checkpoint.shapes), "converting", console=console, transient=True, disable=disable):
        tensor = checkpoint.tensor(name)
        yield name, tensor.to(target) if target else tensor


def _print_description(path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", str(path), title_justify="left")
    for what, value in _describe(path):
        table.add_row(what, value)
    Console().print(table)


def _describe(path: Path) -> list[tuple[str, str]]:
    """Rows of the table: what, value. Whatever is missing becomes a row, as long as there is a config."""
    from . import open_checkpoint
    from .checkpoint import TOKENIZER_FILES
    from .huggingface import read_config

    if path.suffix == ".gguf" and not path.is_dir():
        with open_checkpoint(path) as checkpoint:
            missing = [] if checkpoint.shapes else ["weights: this file holds a vocabulary only"]
            try:
                tokenizer = list(checkpoint.tokenizer_files)
            except ValueError as error:
                tokenizer, missing = [], [*missing, f"tokenizer: {error}"]
            return _rows(checkpoint.config, checkpoint if checkpoint.shapes else None, tokenizer, missing)
    folder = path.parent if path.name == "config.json" else path
    config = read_config(folder)
    tokenizer = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    missing = [] if {"tokenizer.json", "tokenizer.model"} & set(tokenizer) else ["tokenizer.json"]
    try:
        with open_checkpoint(folder) as checkpoint:
            return _rows(config, checkpoint, tokenizer, missing)
    except (ValueError, OSError) as error:
        return _rows(config, None, tokenizer, [*missing, str(error)])


def _rows(
    config: dict[str, Any], checkpoint: Checkpoint | None, tokenizer: list[str], missing: list[str]
) -> list[tuple[str, str]]:
    import math

    from . import names

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    scaling = config["rope_scaling"]
    parameters = sum(math.prod(shape) for shape in names.huggingface(config).values())
    rows = [
        ("architecture", config["architectures"][0]),
        ("layers", f"{config['num_hidden_layers']} of width {config['hidden_size']} / {config['intermediate_size']}"),
        ("attention", f"{heads} heads of {names.head_dim(config)}, {kv_heads} for keys and values"),
        (
            "positions",
            f"{config['max_position_embeddings']}, rope theta {config['rope_theta']:g}"
            + (f", linear factor {scaling['factor']:g}" if scaling else ""),
        ),
        ("vocabulary", f"{config['vocab_size']}{', tied head' if config['tie_word_embeddings'] else ''}"),
        ("parameters", f"{parameters:,}"),
    ]
    if checkpoint is not None:
        counts = Counter(checkpoint.stored.values())
        size = sum(file.stat().st_size for file in checkpoint.weight_files)
        rows += [
            ("dtypes", ", ".join(f"{kind} ({count} tensors)" for kind, count in counts.most_common())),
            ("shards", f"{len(checkpoint.weight_files)}, {size / 1e9:,.2f} GB"),
        ]
    else:
        rows.append(("dtypes", config.get("torch_dtype", "unknown")))
    rows.append(("tokenizer", ", ".join(tokenizer) or "none"))
    rows.append(("missing", "\n".join(missing) or "nothing"))
    return rows


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
