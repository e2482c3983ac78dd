"""`python -m pretrain.bench [SOURCE...]`: the corpus beside its peers, in seconds of one core, all of it in one run.

What is measured: MinHash signatures and encoding beside other libraries, import edges that each order satisfies, how
much of the windows packing leaves empty, and the whole pipeline from the sources to token files. Peers that are not
installed are left out. Seconds are CPU time of this process with all of its threads, the best of the rounds, in which
all providers take turns; on a busy machine only ratios mean something.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table

from convert.command import run
from deepseek_coder import repository
from deepseek_coder.tokenizer import Tokenizer

from . import corpus, tokenizer, tokens
from .corpus import minhash
from .corpus.report import size as readable
from .corpus.sources import find
from .dataset import Windows
from .files import write_json
from .tokens import TokenFiles

app = typer.Typer(add_completion=False)

ROUNDS = 3
SAMPLE = 16_000_000  # bytes of text that the libraries of one kind are compared on
SLOW = 2_000_000  # and that slow peers get
WINDOWS = 400  # of an epoch, in which is counted what infilling has reserved and not used
PACKAGES = ("datasketch", "datatrove", "daft", "kitoken", "numpy", "pyarrow", "rensa", "tokenizers", "tree-sitter")

Rows = list[dict[str, Any]]


@app.command()
def bench(
    sources: Annotated[list[str] | None, typer.Argument(help="As of `corpus`; default: installed packages.")] = None,
    tests: Annotated[list[str] | None, typer.Option(help="Benchmarks to screen for, files or folders.")] = None,
    folder: Annotated[Path | None, typer.Option("--tokenizer", help="Default: one trained on the sources.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: docs/results/DATE-corpus.json.")] = None,
) -> None:
    """Measure the corpus beside its peers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        results = measured(sources or installed(), tuple(tests or ()), folder, Path(scratch))
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    said = " ".join(Path(part).name for part in sys.argv[1:])  # where files lie on this machine is of no interest
    about = {
        "command": f"python -m pretrain.bench {said}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "load": load,
    }
    file = out or Path(f"docs/results/{date.today()}-corpus.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, about | {"versions": versions, "results": results})
    for title, rows in results.items():
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)
    print(file)


def installed() -> list[str]:
    """Folders of the installed packages with 20 Python files and more."""
    site = Path(np.__file__).parents[1]
    folders = sorted(
        path for path in site.iterdir() if path.is_dir() and not path.name.endswith((".dist-info", ".libs"))
    )
    return [str(path) for path in folders if sum(1 for _ in path.rglob("*.py")) >= 20]


def measured(sources: list[str], tests: tuple[str, ...], folder: Path | None, scratch: Path) -> dict[str, Rows]:
    """title -> rows of one table."""
    results: dict[str, Rows] = {}
    pipeline: dict[str, dict[str, Any]] = {
        "everything": {"quality": {"tests": tests}},
        "no screening": {"quality": {"syntax": False}},
    }
    results["pipeline"] = []
    stages: dict[str, dict[str, str | int]] = {}
    for name, config in pipeline.items():
        seconds = time.process_time()
        counts = corpus.build(sources, scratch / name, config=config)["counts"]
        seconds = time.process_time() - seconds
        if folder is None:
            made = tokenizer.train(tokenizer.sample(scratch / name, 20_000_000), 32_000)
            tokenizer.save(made, folder := scratch / "tokenizer")
        encoding = time.process_time()
        tokens.build(scratch / name, Tokenizer.load(folder), scratch / f"{name} tokens")
        seconds += time.process_time() - encoding
        took = _stages(scratch / name) | {"tokens": _stages(scratch / f"{name} tokens")["parts"]}
        read = counts["crawl"]["bytes"] / 1e6
        row = {"stages": name, "text": readable(counts["crawl"]["bytes"]), "MB/s": round(read / seconds, 2)}
        results["pipeline"].append(row)
        for stage, some in (took | {"outside of shards": seconds - sum(took.values())}).items():
            stages.setdefault(stage, {"stage": stage})[name] = round(1000 * some / read)
    results["milliseconds of a core for each MB"] = list(stages.values())
    assert folder is not None
    texts = _texts(scratch / "no screening", SAMPLE)
    results["near-duplicate signatures"] = _rates(signers(), texts)
    results["encoding"] = _rates(encoders(Tokenizer.load(folder)), texts)
    results |= {"orders": orders} if (orders := _orders(sources, scratch)) else {}
    results["windows of 16,384 tokens"] = _windows(scratch / "no screening tokens", Tokenizer.load(folder))
    return results


def _stages(folder: Path) -> dict[str, float]:
    """CPU seconds of the shards of each stage."""
    found: dict[str, float] = {}
    for record in sorted(folder.glob("*/shard-*.json"), key=lambda path: path.stat().st_mtime_ns):
        stage = record.parent.name
        found[stage] = found.get(stage, 0) + json.loads(record.read_text())["cpu_seconds"]
    return found


def _texts(folder: Path, size: int) -> list[str]:
    texts = []
    for document in corpus.documents(folder):
        for text in document.texts:
            texts.append(text)
            size -= len(text)
        if size < 0:
            break
    return texts


def _rates(providers: dict[str, tuple[int, Callable[[list[str]], Any]]], texts: list[str]) -> Rows:
    """MB/s of each provider, (bytes that it gets, function)."""
    given: dict[str, list[str]] = {}
    for name, (room, _) in providers.items():
        ends = np.cumsum([len(text) for text in texts])
        given[name] = texts[: int(np.searchsorted(ends, room)) + 1]
    best = dict.fromkeys(providers, float("inf"))
    for _ in range(ROUNDS):
        for name, (_, function) in providers.items():
            started = time.process_time()
            function(given[name])
            best[name] = min(best[name], time.process_time() - started)
    sizes = {name: sum(len(text.encode()) for text in some) / 1e6 for name, some in given.items()}
    ours = next(iter(providers))
    rates = {name: sizes[name] / best[name] for name in providers}
    return [
        {"provider": name, "MB/s": round(rate, 2), "ours / it": round(rates[ours] / rate, 1)}
        for name, rate in rates.items()
    ]


# ---- peers -----------------------------------------------------------------------------------------------------------


def signers() -> dict[str, tuple[int, Callable[[list[str]], Any]]]:
    """MinHash of 5-grams of words, 256 permutations (datatrove: 25 x 10 of them)."""
    found: dict[str, tuple[int, Callable[[list[str]], Any]]] = {
        "ours": (SAMPLE, lambda texts: minhash.signatures([text.encode() for text in texts]))
    }
    if _installed("daft"):
        found["Daft"] = SAMPLE, _daft
    if _installed("datasketch"):
        found["datasketch"] = SLOW, _datasketch
    if _installed("datatrove"):
        found["datatrove, words split by white space"] = SLOW, _datatrove
    return found


def _daft(texts: list[str]) -> None:
    import daft

    table = daft.from_arrow(pa.table({"text": pa.array(texts, pa.large_string())}))
    column = daft.col("text").normalize(remove_punct=True, lowercase=True, white_space=True)
    table.select(column.minhash(num_hashes=256, ngram_size=5)).collect()


def _datasketch(texts: list[str]) -> None:
    from datasketch import MinHash

    for text in texts:
        words = text.lower().encode().split()
        MinHash(num_perm=256).update_batch(list({b" ".join(words[i : i + 5]) for i in range(len(words) - 4)}))


def _datatrove(texts: list[str]) -> None:
    from datatrove.pipeline.dedup import minhash as peer

    class Words:
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

    # Its default, xxhash, does not take what datatrove gives it in xxhash's newer versions.
    sha1 = peer.HashConfig(precision=64, hash_fc="sha1")
    config = peer.MinhashConfig(n_grams=5, num_buckets=25, hashes_per_bucket=10, hash_config=sha1)
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(peer, "load_word_tokenizer") as load:
        load.return_value = Words()
        signer = peer.MinhashDedupSignature(scratch, config)
    for text in texts:
        if len(shingles := signer.get_shingles(text)):
            signer.get_signature(shingles)


def encoders(made: Tokenizer) -> dict[str, tuple[int, Callable[[list[str]], Any]]]:
    found: dict[str, tuple[int, Callable[[list[str]], Any]]] = {}
    if _installed("kitoken"):
        found["ours (kitoken)"] = SAMPLE, tokens._kitoken(made)
    return found | {"tokenizers": (SLOW, made.encode_batch)}


# ---- orders and windows ----------------------------------------------------------------------------------------------


def _orders(sources: list[str], scratch: Path) -> Rows:
    """Imports that stand after what they import, in every folder of 20 Python files and more."""
    kept = dict.fromkeys(repository.METHODS, 0)
    repositories = edges = 0
    for folder in sorted(find(sources, scratch), key=lambda found: found.name):
        if folder.kind != "folder":
            continue
        root = Path(folder.location)
        paths = [path for path in sorted(root.rglob("*.py")) if path.is_file() and path.stat().st_size <= 1 << 20]
        if len(paths) < 20:
            continue
        files = {p.relative_to(root.parent).as_posix(): p.read_text("utf-8", errors="replace") for p in paths}
        imports = repository.imports(files)
        repositories += 1
        edges += sum(map(len, imports.values()))
        for method in repository.METHODS:
            place = {p: n for n, p in enumerate(p for part in repository.order(files, imports, method) for p in part)}
            kept[method] += sum(place[to] < place[path] for path, some in imports.items() for to in some)
    return [
        {"order": method, "satisfied": f"{n / edges:.1%}", "packages": repositories, "edges": edges}
        for method, n in kept.items()
        if edges
    ]


def _windows(folder: Path, made: Tokenizer, window: int = 16_384) -> Rows:
    """What best fit leaves empty, and what a row of all documents cuts though it would fit."""
    files = TokenFiles(folder, "train")
    rows: Rows = []
    for rate in (0.0, 0.5):
        windows = Windows(files, made, window, fim_rate=rate)
        plan = windows._plan(0)
        lengths = plan.stops - plan.begins
        empty = 1 - lengths.sum() / (windows.windows_in(0) * window)
        unused = places = 0  # of the room that infilling reserves, as some of the windows have it
        for number in range(min(WINDOWS, windows.windows_in(0))):
            begin, end = plan.starts[number : number + 2]
            # Nothing is predicted in empty places, nor behind the last token of a document.
            blank = int((windows[number].targets == -100).sum()) - int(end - begin)
            unused += blank - (window - int(lengths[begin:end].sum()))
            places += window
        cut = _cut(files.file_ends, np.sort(windows.samples.start[plan.samples] + plan.begins), window)
        rows.append(_packed("best fit", rate, empty + unused / places, cut))
    row = np.arange(0, files.file_ends[-1], window)
    empty = 1 - files.file_ends[-1] / (len(row) * window)
    return [*rows, _packed("concat, files", 0.0, empty, _cut(files.file_ends, row, window))]


def _cut(file_ends: np.ndarray, begins: np.ndarray, window: int) -> float:
    """Of the files that a window would hold, the share in the midst of which a piece begins; begins: sorted."""
    starts = np.concatenate([[0], file_ends[:-1]])
    inside = np.searchsorted(begins, file_ends, "left") - np.searchsorted(begins, starts, "right")
    return float((inside[file_ends - starts <= window] > 0).mean())


def _packed(packing: str, rate: float, empty: float, cut: float) -> dict[str, Any]:
    share = f"{cut:.1%}"
    return {"packing": packing, "infilling": rate, "empty": f"{empty:.3%}", "cut though it would fit": share}


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _cpu() -> str:
    lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    run(app)
