"""Files that hold test data go: those that share any 10 words in a row with a benchmark (paper, section 2.3).

Of a test string of 3 to 9 words the whole must occur; shorter ones say nothing. Words are minhash.py's, so neither
case nor punctuation nor layout hides a copy. Runs of numbers are in thousands of honest files: a sequence counts only
if it has three different words that are not numbers.

A file's word sequences are 64-bit hashes, and nearly all are told apart from the tests' by one look into a table of
bits; what is left is searched for in the sorted hashes of the tests.
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
_BITS = 22


class Tests:
    """The word sequences of benchmarks."""

    def __init__(self, texts: Sequence[str], ngram: int = 10, shortest: int = 3) -> None:
        self.ngram, self.shortest = ngram, shortest
        long: list[NDArray[np.uint64]] = []
        short: dict[int, list[NDArray[np.uint64]]] = {}
        starts: list[NDArray[np.uint64]] = []
        for text in sorted(set(texts)):
            data = text.encode()
            words = [word.lower() for word in _WORD.findall(data)]
            n = min(len(words), ngram)
            if n < shortest:
                continue
            hashes = minhash.word_hashes([data])
            found = minhash.grams(*hashes, n)[0]
            telling = np.array([_telling(words[i : i + n]) for i in range(len(found))])
            if n == ngram:
                long.append(found[telling])
            elif telling[0]:
                short.setdefault(n, []).append(found)
                starts.append(minhash.grams(*hashes, shortest)[0][:1])
        self.long, self.starts = _Set(long), _Set(starts)
        self.short = {n: _Set(found) for n, found in short.items()}

    def found_in(self, texts: Sequence[bytes]) -> NDArray[np.bool_]:
        """Which of the texts hold a sequence of a benchmark."""
        hit = np.zeros(len(texts), dtype=bool)
        words, offsets = minhash.word_hashes(texts)
        found, ends = minhash.grams(words, offsets, self.ngram)
        hit[np.searchsorted(ends, self.long.places(found), side="right") - 1] = True
        if self.short:
            found, ends = minhash.grams(words, offsets, self.shortest)
            places = self.starts.places(found)
            text = np.searchsorted(ends, places, side="right") - 1
            begin = places - ends[text] + offsets[text]
            for n, known in self.short.items():
                fits = begin + n <= offsets[text + 1]
                hit[text[fits][known.places(minhash.grams_at(words, begin[fits], n))]] = True
        return hit


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


def versions(files: Sequence[str]) -> tuple[str, ...]:
    """SHA-256 of each file. Raises FileNotFoundError."""
    found = []
    for file in map(Path, files):
        if not file.expanduser().is_file():
            raise FileNotFoundError(f"{file}: no such benchmark file; correct [quality] tests")
        found.append(hashlib.sha256(file.expanduser().read_bytes()).hexdigest())
    return tuple(found)


@lru_cache(maxsize=1)
def load(files: tuple[str, ...], versions: tuple[str, ...], ngram: int, shortest: int) -> Tests:
    """All texts of .jsonl, .parquet and .txt files, the first and last also as .gz. A line of a .txt is a test string.

    versions: of these files; a worker that has loaded them does so once for each. Raises ValueError, naming the file.
    """
    return Tests([text for file in files for text in _texts(Path(file).expanduser())], ngram, shortest)


def _texts(file: Path) -> Iterator[str]:
    kind = file.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if kind == "parquet":
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
                yield from _strings(batch.to_pylist())
        elif kind in ("jsonl", "txt"):
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    yield from _strings(json.loads(line)) if kind == "jsonl" and line.strip() else [line]
        else:
            raise ValueError("not a .jsonl, .parquet or .txt file")
    except (OSError, EOFError, ValueError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file}: these test data cannot be read ({error}); correct [quality] tests") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
