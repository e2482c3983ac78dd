"""`python -m pretrain`: from repositories to a trained model, one command a step."""

import itertools
import sys
from pathlib import Path
from typing import Annotated

import typer

from convert.command import run
from deepseek_coder.tokenizer import Tokenizer

try:
    from . import corpus as corpora
except ModuleNotFoundError as missing:
    print(f'error: {missing.name} is not installed; pip install "deepseek-coder-torch[corpus]"', file=sys.stderr)
    sys.exit(2)
from . import metrics, recipe, tokens
from . import tokenizer as vocabulary
from . import train as training
from .corpus import report
from .corpus.executors import run_settings
from .corpus.quality import Quality
from .corpus.stage import settings_of
from .dataset import Windows, load_windows

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Pre-train DeepSeek-Coder from raw repositories.")

_SOURCE = "Folder made by `corpus`; or prose: .parquet or .jsonl with `text`, or a folder of these."
Workers = Annotated[int | None, typer.Option(help="Shards at a time; default 1.")]
Engine = Annotated[str | None, typer.Option("--executor", help="Where: local, datatrove, ray or slurm.")]
Force = Annotated[bool, typer.Option(help="Replace what is there.")]


@app.command()
def corpus(
    sources: Annotated[list[str], typer.Argument(help="Folders, git URLs, archives, or a manifest (.jsonl, .csv).")],
    out: Annotated[Path, typer.Option(help="Folder for the corpus.")],
    workers: Workers = None,
    executor: Engine = None,
    config: Annotated[Path | None, typer.Option(help="TOML with other thresholds than DeepSeek's.")] = None,
) -> None:
    """Crawl, filter, deduplicate and order repositories into documents. Run again to continue."""
    settings = corpora.load_config(config) if config else None
    manifest = corpora.build(sources, out, workers, settings, executor=executor)
    report.write(out, out)
    print(corpora.summary(out))
    print(f"{out / 'report.html'}: the report")
    reasons = [manifest["failed"], *manifest["unread"].values()]
    if any(reasons):
        said = "; ".join(reason for reason in reasons if reason)
        raise ValueError(f"{said}; the corpus holds the others, and the same command tries these again")


@app.command()
def tokenizer(
    sources: Annotated[list[Path], typer.Argument(metavar="CORPUS...", help=_SOURCE)],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="BPE tokens; the control tokens come on top.")] = 32000,
    sample_bytes: Annotated[int, typer.Option(help="Train on about so much text of each source.")] = 1_000_000_000,
    force: Force = False,
) -> None:
    """Train a byte-level BPE tokenizer on a sample of corpora."""
    vocabulary.refuse_existing(out, force)
    texts = (text for source in sources for text in vocabulary.sample(source, sample_bytes))
    made = vocabulary.train(texts, vocab_size, progress=sys.stderr.isatty())
    vocabulary.save(made, out)
    print(f"{out}: {made.vocab_size:,} tokens")


@app.command(name="tokens")
def tokens_command(
    source: Annotated[Path, typer.Argument(metavar="CORPUS", help=_SOURCE)],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Folder for the token files.")],
    valid: Annotated[float, typer.Option(help="Share of documents held out for validation.")] = 0.01,
    workers: Workers = None,
    executor: Engine = None,
    config: Annotated[Path | None, typer.Option(help="TOML with [run], and for prose [quality] tests.")] = None,
) -> None:
    """Encode a corpus as plain ids (infilling happens while training). Run again to continue."""
    settings = corpora.load_config(config) if config else {}
    run = run_settings(settings.get("run", {}), executor, workers)
    screening = settings_of(Quality, "quality", settings.get("quality", {}))
    manifest = tokens.build(source, Tokenizer.load(tokenizer), out, valid, run, screening=screening)
    if (source / "manifest.json").is_file():
        report.write(source, out, _of_tokens(out))
    for split, totals in manifest["splits"].items():
        print(f"{split}: {totals['tokens']:,} tokens in {totals['documents']:,} documents, {totals['bytes']:,} bytes")
    for reason, number in manifest.get("dropped", {}).items():
        print(f"dropped: {number:,} documents, {reason}")


@app.command()
def show(
    tokens: Annotated[Path, typer.Argument(help="Folder made by `tokens`.")],
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="Take window, FIM rate and seed from it.")
    ] = None,
    number: Annotated[int, typer.Option("-n", help="How many windows.")] = 4,
) -> None:
    """Print training windows as the loader makes them, control tokens visible."""
    chosen = recipe.load(recipe_file) if recipe_file else recipe.Recipe()
    data = chosen.data
    how = (data.fim_rate, data.fim_loss, data.fim_modes, data.fim_spans, data.packing)
    windows = load_windows(tokens, "train", data.window, chosen.train.seed, *how)
    for index in range(number):
        print(described(windows, index))


@app.command()
def train(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE.toml")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, on top of the recipe.")] = None,
) -> None:
    """Train. Run again to continue from the newest checkpoint; use torchrun for several devices."""
    training.train(recipe.load(recipe_file, changes or ()))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model.")],
    force: Force = False,
) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder."""
    training.export(run, out, force)
    print(f"{out}: a Hugging Face model folder")


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    out: Annotated[Path | None, typer.Option(help="The PNG; default loss.png in the run.")] = None,
) -> None:
    """Draw loss and learning rate over steps."""
    target = out or run / "loss.png"
    metrics.plot(run, target)
    print(target)


def _of_tokens(folder: Path) -> list[report.Section]:
    """What the report says of a token folder, samples as the loader will make them included."""
    sections = tokens.sections(folder)
    try:
        files = tokens.TokenFiles(folder, "train")
        files.document_ends = files.document_ends[:256]  # the plan for all would take its time
        files.file_ends = files.file_ends[: files.document_ends[-1]]
        windows = Windows(files, Tokenizer.load(folder / "tokenizer"), 4096)
    except ValueError:  # no FIM tokens in this vocabulary, or nothing to train on
        return sections
    infilled = (
        part[:3000]
        for window in range(windows.windows_in(0))
        for part in described(windows, window).split("\n--- ")
        if part.startswith("infilling")
    )
    how = "FIM rate 0.5, seed 0, windows of 4,096 tokens; python -m pretrain show draws others."
    return [*sections, report.Section("Samples for infilling", text=how, code=list(itertools.islice(infilled, 4)))]


def described(windows: Windows, index: int) -> str:
    """Window `index` as text: one headed section a document."""
    window = windows[index]
    epoch, within = windows.epoch_of(index)
    ends = sorted(set(window.cu_seqlens.tolist()))
    lines = [f"===== window {index}: epoch {epoch}, number {within}, {windows.window} tokens ====="]
    for start, end in itertools.pairwise(ends):
        trained = int((window.targets[start:end] != -100).sum())
        if not trained:
            lines.append(f"--- {end - start} tokens of padding ---")
            continue
        ids = window.tokens[start:end].tolist()
        fim = windows.tokenizer.fim_ids
        kind = "infilling" if fim and fim[0] in ids else "plain"
        lines.append(f"--- {kind} document, {end - start} tokens, {trained} predicted ---")
        lines.append(windows.tokenizer.decode(ids, skip_special=False))
    return "\n".join(lines)


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
