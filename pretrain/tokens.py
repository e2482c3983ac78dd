"""Documents -> token files: plain ids, no control tokens; FIM and packing are the loader's.

A folder holds the splits `train` and `valid`, each as three flat little-endian arrays that are memory-mapped:
`.ids` (uint16, or uint32 for vocabularies past 65,536), `.files` (uint64 token position after each file) and
`.documents` (uint64 number of files up to each document's end). Beside them lie the tokenizer and `manifest.json`,
which is written last: a folder without it is unfinished. `progress.json` records how far a run came, so that the same
command goes on there after an interruption.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from deepseek_coder.tokenizer import Tokenizer

from . import corpus
from .corpus import Document
from .files import write_json, writing

SPLITS = ("train", "valid")
# Text that is encoded, written and recorded together.
CHUNK_BYTES = 16 * 2**20


class TokenFiles:
    """One split of a finished token folder.

    ids: (tokens,) memory-mapped; file_ends: (files,) int64; document_ends: (documents,) int64. Raises
    FileNotFoundError or ValueError for a missing, unfinished or damaged folder.
    """

    def __init__(self, path: Path, split: str):
        self.path = path
        manifest = _record(path / "manifest.json")
        if manifest is None:
            raise FileNotFoundError(
                f"{path}: no finished token folder; run `python -m pretrain tokens CORPUS --tokenizer DIR --out {path}`"
            )
        totals = manifest["splits"][split]
        dtype = np.dtype(manifest["dtype"])
        if totals["tokens"] == 0:
            raise ValueError(f"{path}: the split {split!r} is empty; use a larger corpus or another --valid share")
        self.ids = self._map(f"{split}.ids", dtype, totals["tokens"])
        self.file_ends = np.array(self._map(f"{split}.files", np.dtype("<u8"), totals["files"]), np.int64)
        self.document_ends = np.array(self._map(f"{split}.documents", np.dtype("<u8"), totals["documents"]), np.int64)

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        file = self.path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != count * dtype.itemsize:
            raise ValueError(f"{file}: {size} bytes, {count * dtype.itemsize} expected; make the token folder again")
        return np.memmap(file, dtype, mode="r")


def build(
    corpus_dir: Path, tokenizer: Tokenizer, out: Path, valid: float = 0.01, progress: bool = True
) -> dict[str, Any]:
    """Encode a corpus into a token folder and return its manifest.

    valid: share of documents held out, evenly spread over the corpus.
    Running it again continues an interrupted run, and does nothing where the folder is finished and up to date.
    Raises ValueError if `out` holds tokens of another corpus, tokenizer or share.
    """
    if not 0 <= valid < 1:
        raise ValueError(f"--valid {valid} is not a share between 0 and 1")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    key = {
        "corpus": hashlib.sha256((corpus_dir / "manifest.json").read_bytes()).hexdigest()
        if (corpus_dir / "manifest.json").is_file()
        else "",
        "tokenizer": hashlib.sha256(b"".join(tokenizer.files.values())).hexdigest(),
        "valid": valid,
    }
    documents = corpus.documents(corpus_dir)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "progress.json"):
        record = _record(out / name)
        if record and record["key"] != key:
            raise ValueError(f"{out}: holds tokens made from another corpus, tokenizer or share; choose another --out")
        if record and name == "manifest.json":
            return record
    done, splits = _resume(out, dtype)
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("tokens", total=None)
        for chunk in _chunks(islice(documents, done, None)):
            encoded = iter(tokenizer.encode_batch([text for document in chunk for text in document.texts]))
            for split in SPLITS:
                splits[split].begin()
            for number, document in enumerate(chunk, start=done):
                writer = splits[_split_of(number, valid)]
                writer.add([next(encoded) for _ in document.texts], document.texts)
            for split in SPLITS:
                splits[split].flush(out / split, dtype)
            done += len(chunk)
            totals = {split: splits[split].totals for split in SPLITS}
            write_json(out / "progress.json", {"key": key, "documents": done, "splits": totals})
            bar.update(task, completed=done, description=f"tokens: {sum(t['tokens'] for t in totals.values()):,}")
    with writing(out / "tokenizer"):
        (out / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(out / "tokenizer")
    manifest = {"key": key, "dtype": dtype.str, "splits": {split: splits[split].totals for split in SPLITS}}
    write_json(out / "manifest.json", manifest)
    (out / "progress.json").unlink(missing_ok=True)
    return manifest


class _Writer:
    """Appends documents to a split's files; what is not yet flushed is in memory."""

    def __init__(self, totals: dict[str, int] | None = None):
        self.totals = totals or {"documents": 0, "files": 0, "tokens": 0, "bytes": 0}

    def begin(self) -> None:
        self.ids: list[int] = []
        self.file_ends: list[int] = []
        self.document_ends: list[int] = []

    def add(self, files: list[list[int]], texts: list[str]) -> None:
        for ids, text in zip(files, texts, strict=True):
            self.ids += ids
            self.totals["tokens"] += len(ids)
            self.totals["files"] += 1
            self.totals["bytes"] += len(text.encode())
            self.file_ends.append(self.totals["tokens"])
        self.totals["documents"] += 1
        self.document_ends.append(self.totals["files"])

    def flush(self, stem: Path, dtype: np.dtype) -> None:
        for suffix, values, kind in (
            (".ids", self.ids, dtype),
            (".files", self.file_ends, np.dtype("<u8")),
            (".documents", self.document_ends, np.dtype("<u8")),
        ):
            path = stem.with_suffix(suffix)
            with writing(path), path.open("ab") as file:
                file.write(np.array(values, kind).tobytes())


def _record(file: Path) -> dict[str, Any] | None:
    """A manifest or a record of progress; None if there is none. Raises ValueError for any other file."""
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
        for split in SPLITS:
            record["splits"][split]["tokens"]
        record["key"], record["dtype" if file.name == "manifest.json" else "documents"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file}: not the record of a token folder, or damaged; name another folder, or delete this one and make "
            "it again"
        ) from None
    return record


def _resume(out: Path, dtype: np.dtype) -> tuple[int, dict[str, _Writer]]:
    """(documents done, writers that continue): files are cut back to what the last record vouches for."""
    progress = _record(out / "progress.json")
    writers = {split: _Writer(progress["splits"][split] if progress else None) for split in SPLITS}
    for split, writer in writers.items():
        for suffix, count in ((".ids", "tokens"), (".files", "files"), (".documents", "documents")):
            file = (out / split).with_suffix(suffix)
            with writing(file):
                file.touch()
                os.truncate(file, writer.totals[count] * (dtype.itemsize if suffix == ".ids" else 8))
    return (progress["documents"] if progress else 0), writers


def _split_of(number: int, valid: float) -> str:
    """Every (1 / valid)-th document of the corpus is held out."""
    return "valid" if int((number + 1) * valid) > int(number * valid) else "train"


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += sum(map(len, document.texts))
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
