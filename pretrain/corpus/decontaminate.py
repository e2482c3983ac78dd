"""Files that hold test data go: those that share any 10 words in a row with a benchmark (paper, section 2.3).

Of a test string of 3 to 9 words the whole must occur; shorter ones say nothing. Words are minhash.py's, so neither
case nor punctuation nor layout hides a copy. Two kinds of sequences are in thousands of honest files and tell nothing:
runs of numbers (a sequence counts only if it has three different words that are not), and imports: those of one DS-1000
problem, of numpy, pandas and matplotlib, would take the better part of all data science with it. So a test string ends
before its import lines, and begins anew behind them.

A file's word sequences are 64-bit hashes, and nearly all are told apart from the tests' by one look into a table of
bits; what is left is searched for in the sorted hashes of the tests, and of that what runs from one text into the next
is no find.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from . import minhash

_WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")
_IMPORTS = re.compile(r"^[ \t]*(?:import\s|from\s+\S+\s+import\b|#[ \t]*include\b|using\s).*$", re.MULTILINE)
_BITS = 22

# What is read of a folder, as MATH has one with a file for each problem. A text file there may be anything.
_DATA = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")


class Tests:
    """The word sequences of benchmarks."""

    def __init__(self, texts: Sequence[str], ngram: int = 10, shortest: int = 3) -> None:
        self.ngram, self.shortest = ngram, shortest
        long: list[NDArray[np.uint64]] = []
        short: dict[int, list[NDArray[np.uint64]]] = {}
        starts: list[NDArray[np.uint64]] = []
        for piece, whole in sorted({piece for text in texts for piece in _pieces(text)}):
            data = piece.encode()
            words = [word.lower() for word in _WORD.findall(data)]
            n = min(len(words), ngram)
            if n < (shortest if whole else ngram):  # of what is short the whole must occur, and this is none
                continue
            hashes, _ = minhash.word_hashes([data])
            found = minhash.sequences(hashes, n)
            telling = np.array([_telling(words[i : i + n]) for i in range(len(found))])
            if n == ngram:
                long.append(found[telling])
            elif telling[0]:
                short.setdefault(n, []).append(found)
                starts.append(minhash.sequences(hashes, shortest)[:1])
        self.long, self.starts = _Set(long), _Set(starts)
        self.short = {n: _Set(found) for n, found in short.items()}

    def found_in(self, texts: Sequence[bytes]) -> NDArray[np.bool_]:
        """Which of the texts hold a sequence of a benchmark."""
        hit = np.zeros(len(texts), dtype=bool)
        words, offsets = minhash.word_hashes(texts)
        found = {self.ngram: self.long.places(minhash.sequences(words, self.ngram))}
        if self.short:
            begins = self.starts.places(minhash.sequences(words, self.shortest))
            for n, known in self.short.items():
                some = begins[begins + n <= len(words)]
                found[n] = some[known.places(minhash.sequences_at(words, some, n))]
        for n, begins in found.items():
            text = np.searchsorted(offsets, begins, side="right") - 1
            hit[text[begins + n <= offsets[text + 1]]] = True
        return hit


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """What stands between the import lines of a text, and whether that is all of it."""
    cut = _IMPORTS.split(text)
    return ((piece, len(cut) == 1) for piece in cut)


def _telling(words: list[bytes]) -> bool:
    return len({word for word in words if not word.isdigit()}) >= 3


class _Set:
    def __init__(self, hashes: list[NDArray[np.uint64]]) -> None:
        self.sorted = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *hashes]))
        self.bits = np.zeros(1 << _BITS, dtype=bool)
        self.bits[self.sorted >> np.uint64(64 - _BITS)] = True

    def places(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Where in `hashes` the members are."""
        if not len(self.sorted):
            return np.zeros(0, dtype=np.int64)
        maybe = np.flatnonzero(self.bits[hashes >> np.uint64(64 - _BITS)])
        at = np.minimum(np.searchsorted(self.sorted, hashes[maybe]), len(self.sorted) - 1)
        return maybe[self.sorted[at] == hashes[maybe]]


def versions(sources: Sequence[str]) -> tuple[str, ...]:
    """A SHA-256 of each source's content. Raises FileNotFoundError or ValueError for one that cannot be read."""
    found = []
    for source in sources:
        digest = hashlib.sha256()
        for file in _files(source):
            try:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError as error:
                raise ValueError(_UNREADABLE.format(file, error)) from error
        found.append(digest.hexdigest())
    return tuple(found)


@lru_cache(maxsize=1)
def load(sources: tuple[str, ...], versions: tuple[str, ...], ngram: int, shortest: int) -> Tests:
    """The tests of files and folders: every text in .jsonl, .json and .parquet files; of a .txt, which no folder is
    searched for, every line. All but .parquet also as .gz.

    Such files are published of HumanEval, MBPP and DS-1000 (.jsonl, .jsonl.gz), GSM8K (.jsonl) and MATH (a folder, a
    .json for each problem). versions: of these sources; a worker that has loaded them does so once for each. Raises
    ValueError, naming the file.
    """
    return Tests([text for source in sources for file in _files(source) for text in _texts(file)], ngram, shortest)


_UNREADABLE = "{}: these test data cannot be read ({}); correct [quality] tests"


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(_DATA) and file.is_file())
        if not found:
            raise ValueError(_UNREADABLE.format(path, f"it holds no {', '.join(_DATA)} file"))
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such benchmark file or folder; correct [quality] tests")
    return [path]


def _texts(file: Path) -> Iterator[str]:
    kind = file.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if kind == "parquet":
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
                yield from _strings(batch.to_pylist())
        elif kind in ("json", "jsonl", "txt"):
            with (gzip.open if file.name.lower().endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
                for line in [lines.read()] if kind == "json" else lines:
                    yield from _strings(json.loads(line)) if kind != "txt" and line.strip() else [line]
        else:
            raise ValueError("not a .jsonl, .json, .parquet or .txt file")
    except (OSError, EOFError, ValueError, RecursionError, pa.ArrowInvalid) as error:
        raise ValueError(_UNREADABLE.format(file, error)) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
