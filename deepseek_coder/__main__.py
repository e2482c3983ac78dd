"""The `deepseek-coder` command: complete, fill, chat, info. Only the model's text goes to stdout."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import convert
from convert.command import run

from . import folders, generation, prompts, repository
from .config import ModelConfig
from .languages import language_of
from .model import Decoder
from .tokenizer import Tokenizer
from .weights import config_of, load

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Complete, infill and chat with DeepSeek-Coder models."
)

ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face model folder or a .gguf file.")]
MaxNewTokens = Annotated[int, typer.Option(help="How many tokens to write at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher draws more freely.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
Repo = Annotated[Path | None, typer.Option(help="Put the other files of this folder before the prompt.")]
PathComment = Annotated[
    str,
    typer.Option(
        help="With --repo, the sign of the comments with the files' paths: hash (#, as the released models have it), "
        "or language, for a model trained on a corpus with that setting."
    ),
]


@app.command()
def complete(
    model: ModelPath,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue ('-' or nothing: from stdin).")] = None,
    file: Annotated[Path | None, typer.Option(help="Continue this file instead.")] = None,
    repo: Repo = None,
    path_comment: PathComment = "hash",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
) -> None:
    """Continue a text, from left to right. Prints the completion only."""
    if prompt is not None and file is not None:
        raise ValueError("give PROMPT or --file, not both")
    if repo is not None and file is None:
        raise ValueError("--repo needs --file: the file within the repository that is to be continued")
    text = _read(file) if file else sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    decoder, tokenizer = load(model)
    if repo is not None and file is not None:
        ids = _with_repository(decoder, tokenizer, repo, file, text, None, max_new_tokens, path_comment)
    else:
        ids = prompts.completion(tokenizer, text)
    _print(decoder, tokenizer, ids, max_new_tokens, temperature, top_p, seed, stop)


@app.command()
def fill(
    model: ModelPath,
    file: Annotated[Path | None, typer.Argument(help="The file with the hole.")] = None,
    at: Annotated[str | None, typer.Option(metavar="LINE:COLUMN", help="Where the hole is; both count from 1.")] = None,
    prefix_file: Annotated[Path | None, typer.Option(help="The text before the hole.")] = None,
    suffix_file: Annotated[Path | None, typer.Option(help="The text after the hole.")] = None,
    repo: Repo = None,
    path_comment: PathComment = "hash",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
) -> None:
    """Fill a hole in a file (FIM). Prints the middle only."""
    if file is not None and at is not None and prefix_file is None and suffix_file is None:
        prefix, suffix = split_at(_read(file), at, str(file))
    elif file is None and at is None and prefix_file is not None and suffix_file is not None and repo is None:
        prefix, suffix = _read(prefix_file), _read(suffix_file)
    else:
        raise ValueError("name the hole by FILE --at LINE:COLUMN, or by --prefix-file P and --suffix-file S")
    decoder, tokenizer = load(model)
    if repo is not None and file is not None:
        ids = _with_repository(decoder, tokenizer, repo, file, prefix, suffix, max_new_tokens, path_comment)
    else:
        ids = prompts.fim(tokenizer, prefix, suffix)
    _print(decoder, tokenizer, ids, max_new_tokens, temperature, top_p, seed, stop)


@app.command()
def chat(
    model: ModelPath,
    message: Annotated[str | None, typer.Option(help="Ask this and stop; without it, a conversation.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk with an instruct model. An empty line or Ctrl-D ends the conversation."""
    decoder, tokenizer = load(model)
    messages: list[dict[str, str]] = []
    while True:
        said = message if message is not None else _ask()
        if not said:
            return
        messages.append({"role": "user", "content": said})
        ids = prompts.chat(tokenizer, messages)
        answer = _print(decoder, tokenizer, ids, max_new_tokens, temperature, top_p, seed, None)
        print()
        if message is not None:
            return
        messages.append({"role": "assistant", "content": answer.rstrip("\n")})


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file or a released name.")],
) -> None:
    """Describe a model: sizes, RoPE, special tokens, memory. Reads no weights."""
    if not Path(model).exists() and model.startswith("deepseek-coder-"):
        try:
            config, tokenizer = ModelConfig.released(model), None
        except KeyError as error:
            raise ValueError(error.args[0]) from None
    else:
        with convert.open_checkpoint(model) as checkpoint:
            config = config_of(checkpoint)
            tokenizer = Tokenizer(checkpoint.tokenizer_files, model) if checkpoint.tokenizer_files else None
    kind = "MHA" if config.num_kv_heads == config.num_heads else "MQA" if config.num_kv_heads == 1 else "GQA"
    heads = f"{config.num_heads} query, {config.num_kv_heads} KV ({kind}), head_dim {config.head_dim}"
    table = Table(show_header=False, title=model)
    for name, value in {
        "parameters": f"{config.num_parameters:,}",
        "layers x hidden x intermediate": f"{config.num_layers} x {config.hidden_size} x {config.intermediate_size}",
        "attention heads": heads,
        "RoPE": f"theta {config.rope_theta:g}, positions / {config.rope_factor:g}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "embedding rows": f"{config.vocab_size:,}{', tied with the head' if config.tie_embeddings else ''}",
        "weights in bf16": f"{2 * config.num_parameters / 2**30:.2f} GiB",
        "KV cache in bf16": f"{config.kv_bytes_per_token:,} bytes a token, "
        f"{config.kv_bytes_per_token * config.max_position_embeddings / 2**30:.2f} GiB at full context",
        "BOS, EOS ids": f"{config.bos_token_id}, {', '.join(map(str, config.eos_token_ids))}",
    }.items():
        table.add_row(name, value)
    if tokenizer is not None:
        table.add_row("tokens", f"{tokenizer.vocab_size:,}")
        table.add_row("infilling", "yes" if tokenizer.fim_ids else "no FIM tokens in the vocabulary")
        table.add_row("chat", "has a chat template" if tokenizer.chat_template else "no chat template (a base model)")
    Console().print(table)


def split_at(text: str, at: str, name: str) -> tuple[str, str]:
    """(text before, text after) LINE:COLUMN, both counted from 1; a column may be one past the line's end."""
    line_text, _, column_text = at.partition(":")
    if not (line_text.isdecimal() and column_text.isdecimal()):
        raise ValueError(f"--at {at}: write LINE:COLUMN, such as 12:5")
    line, column = int(line_text), int(column_text)
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise ValueError(f"{name}: the hole is at line {line}, the file has lines 1 to {len(lines)}")
    if not 1 <= column <= len(lines[line - 1]) + 1:
        raise ValueError(
            f"{name}: the hole is at column {column}, line {line} has columns 1 to {len(lines[line - 1]) + 1}"
        )
    offset = sum(len(before) + 1 for before in lines[: line - 1]) + column - 1
    return text[:offset], text[offset:]


def _with_repository(
    decoder: Decoder,
    tokenizer: Tokenizer,
    repo: Path,
    file: Path,
    prefix: str,
    suffix: str | None,
    max_new_tokens: int,
    sign: str = "hash",
) -> list[int]:
    """`prompts.repository` from a folder on disk: its other files of the languages that a file can depend on, and the
    manifests by which their imports are read; as in the corpus, neither vendored nor very large ones."""
    if not repo.is_dir():
        raise FileNotFoundError(f"{repo}: no such folder; --repo names the root of a repository")
    if not file.resolve().is_relative_to(repo.resolve()):
        raise ValueError(f"{file} lies outside the repository {repo}")
    name = file.resolve().relative_to(repo.resolve()).as_posix()
    context = decoder.config.max_position_embeddings
    alone = len(prompts.repository(tokenizer, {}, name, prefix, suffix, sys.maxsize, sign))
    if alone > context - max_new_tokens:
        raise ValueError(
            f"{file}: the text around the cursor makes {alone} tokens and {max_new_tokens} are kept for "
            f"--max-new-tokens, more than the model's context of {context}; lower that option or pass less of the file"
        )
    languages = repository.related(file.name)
    files: dict[str, str] = {}
    # Files of unknown language share none.
    for path, entry in folders.walk(repo, lambda folder: folder.name.startswith(".")) if languages else []:
        language = language_of(path)
        known = (language is not None and language.name in languages) or repository.is_manifest(path)
        if isinstance(entry, str) or not known or entry.name.startswith(".") or folders.vendored(path):
            continue
        if entry.stat().st_size > folders.MAX_FILE_BYTES:
            continue
        try:
            files[path] = Path(entry.path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            print(f"warning: {entry.path} is not UTF-8 and is left out", file=sys.stderr)
    return prompts.repository(tokenizer, files, name, prefix, suffix, context - max_new_tokens, sign)


def _print(
    decoder: Decoder,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: list[str] | None,
) -> str:
    pieces = []
    for piece in generation.stream(decoder, tokenizer, ids, max_new_tokens, temperature, top_p, seed, stop or ()):
        pieces.append(piece)
        print(piece, end="", flush=True)
    return "".join(pieces)


def _ask() -> str:
    try:
        print("> ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip()
    except KeyboardInterrupt:
        return ""


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # newline="": the text is shown to the model, and cut, exactly as it stands.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from error


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line, without the place in the source that Python adds."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def main() -> None:
    warnings.showwarning = _show_warning
    torch.set_grad_enabled(False)
    run(app)


if __name__ == "__main__":
    main()
