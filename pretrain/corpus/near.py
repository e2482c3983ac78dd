"""Near-duplicates: documents whose 5-grams are mostly the same, found by MinHash and banding (minhash.py).

A document is what order.py made: the files of a repository that import each other, or a single file. No signature is
kept in memory, and every step is a sort:

1. every shard writes its documents' band keys, partitioned by their hash, and a byte of each of the 256 minima
   (`signatures/`, parallel);
2. every partition sorts its keys; documents with an equal key are candidates. All of a bucket are compared with its
   first (a star: linear, where all pairs are quadratic) by their signatures; those that are not similar after all are
   a bucket of their own and have another try, up to four times (`matches/`, parallel);
3. the pairs make clusters, each named by its first document, whatever the order of the pairs; in each the best by
   dedup.Ranking stays (one pass over the pairs, in memory);
4. every shard leaves out the others (`near/`, parallel).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from . import minhash
from .dedup import GONE, Dedup, Ids, Ranking, leaders, names_at, numbers, parted, rows_at, write_decisions
from .order import batches
from .stage import Manifest, Result, Shard, fingerprint, follow, tally

_ROWS = 16_000_000  # band keys sorted at once: with their documents 256 MB
_PAIRS = 500_000  # compared at once: with 256 bytes for each of two documents 256 MB
_TRIES = 4


@dataclass(frozen=True)
class Signing:
    ngram: int
    permutations: int
    bands: int
    rows: int
    partitions: int
    version: str  # of the hash functions


def signing(settings: Dedup, documents: Manifest) -> Signing:
    bands, rows = minhash.bands(settings.threshold, settings.permutations)
    number = sum(record["outputs"]["part"]["rows"] for record in documents["shards"].values())
    partitions = 1 + number * bands // _ROWS
    return Signing(settings.ngram, settings.permutations, bands, rows, partitions, minhash.VERSION)


def sign_shard(out: Path, shard: Shard, settings: Signing) -> Result:
    signatures, keys, rows = [], [], []
    repos: list[str] = []
    first_paths: list[str] = []
    sizes: list[int] = []
    for documents in batches(out / shard.inputs[0]):
        begin = len(sizes)
        texts = [b"".join(map(str.encode, map(bare, row["paths"], row["texts"]))) for row in documents]
        repos += [row["repo"] for row in documents]
        first_paths += [row["paths"][0] for row in documents]
        sizes += map(len, texts)
        found = minhash.signatures(texts, settings.ngram, settings.permutations)
        signatures.append(found.astype(np.uint8))
        some = np.flatnonzero((found != 0xFFFFFFFF).any(axis=1))  # too short for a single n-gram: like nothing else
        keys.append(minhash.band_keys(found[some], settings.bands, settings.rows).reshape(-1))
        rows.append(np.repeat(begin + some, settings.bands))
    width = settings.permutations
    data = np.concatenate([np.zeros((0, width), dtype=np.uint8), *signatures])
    flat = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(data), [None, pa.py_buffer(data.tobytes())])
    part = pa.table({"repo": pa.array(repos, pa.string()), "path": first_paths, "size": sizes, "signature": flat})
    key = np.concatenate([np.zeros(0, dtype=np.uint64), *keys])
    row = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    bucket = key % np.uint64(settings.partitions)
    tables = {"part": part}
    for number in range(settings.partitions):
        mine = bucket == number
        tables[f"bands{number}"] = pa.table({"key": key[mine], "row": row[mine].astype(np.uint32)})
    return Result(tables, {"documents": len(data), "bytes": sum(sizes)})


def bare(path: str, text: str) -> str:
    """A file of a document without its path comment: a copy under another path is a copy."""
    first, newline, rest = text.partition("\n")
    return rest if newline and path in first else text


def partitions(signed: Manifest, settings: Signing) -> list[Shard]:
    """For each partition: its band files, then the files of signatures, and the place of each one's first document."""
    records = list(signed["shards"].values())
    parts = [record["outputs"]["part"] for record in records]
    offsets = tuple(np.cumsum([0] + [part["rows"] for part in parts])[:-1].tolist())
    files = tuple(part["file"] for part in parts)
    shards = []
    for number in range(settings.partitions):
        bands = [record["outputs"][f"bands{number}"] for record in records]
        key = fingerprint([part["sha256"] for part in (*bands, *parts)])
        shards.append(Shard(f"{number:05}", (tuple(part["file"] for part in bands), files, offsets), key))
    return shards


def match_shard(out: Path, shard: Shard, settings: Dedup) -> Result:
    bands, files, offsets = shard.inputs
    tables = [pq.read_table(out / file) for file in bands]
    keys = np.concatenate([table["key"].to_numpy() for table in tables])
    ids = np.concatenate([table["row"].to_numpy() + begin for table, begin in zip(tables, offsets, strict=True)])
    del tables
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids.astype(np.int64)[order]
    similar: list[NDArray[Any]] = []
    compared = 0
    known = np.zeros(0, dtype=_PAIR)
    for _ in range(_TRIES):
        lead = leaders(keys)
        other = lead != np.arange(len(keys))
        pairs = _pairs(ids[lead[other]], ids[other])
        keys, ids = keys[other], ids[other]
        unique, inverse = np.unique(pairs, return_inverse=True)
        new = unique[~np.isin(unique, known)]
        estimate = similarities(out, new, files, offsets, settings.permutations)
        compared += len(new)
        matching = new[estimate >= settings.threshold]
        similar.append(matching)
        known = np.concatenate((known, new))
        failed = ~np.isin(unique, np.concatenate(similar))[inverse]
        keys, ids = keys[failed], ids[failed]
    found = np.concatenate(similar)
    counts = {"candidates": compared, "similar": len(found)}
    return Result({"part": pa.table({"a": found["a"], "b": found["b"]})}, counts)


_PAIR = np.dtype([("a", np.int64), ("b", np.int64)])


def _pairs(a: Ids, b: Ids) -> NDArray[Any]:
    pairs = np.empty(len(a), dtype=_PAIR)
    pairs["a"], pairs["b"] = a, b
    return pairs


def similarities(
    out: Path, pairs: NDArray[Any], files: tuple[str, ...], offsets: tuple[int, ...], permutations: int
) -> NDArray[np.float64]:
    """The estimated Jaccard similarity of each pair of documents.

    Of two different minima the stored bytes are equal once in 256 times, which is taken off.
    """
    found = np.zeros(len(pairs))
    for begin in range(0, len(pairs), _PAIRS):
        some = pairs[begin : begin + _PAIRS]
        ids = np.unique(np.concatenate((some["a"], some["b"])))
        signatures = np.zeros((len(ids), permutations), dtype=np.uint8)
        bounds = np.searchsorted(ids, [*offsets, np.iinfo(np.int64).max])
        for number, file in enumerate(files):
            low, high = bounds[number], bounds[number + 1]
            if high > low:
                column = pq.read_table(out / file, columns=["signature"])["signature"].combine_chunks()
                rows = np.frombuffer(column.buffers()[1], dtype=np.uint8).reshape(-1, permutations)
                signatures[low:high] = rows[ids[low:high] - offsets[number]]
        a, b = np.searchsorted(ids, some["a"]), np.searchsorted(ids, some["b"])
        for part in range(0, len(some), 1 << 14):
            piece = slice(part, part + (1 << 14))
            equal = signatures[a[piece]] == signatures[b[piece]]
            found[begin + part : begin + part + len(equal)] = equal.mean(axis=1)
    return (found - 1 / 256) / (1 - 1 / 256)


def clusters(a: Ids, b: Ids) -> tuple[Ids, Ids]:
    """(documents in pairs, the smallest document of each one's cluster), whatever the order of the pairs.

    Minima flow along the pairs and are followed to their own minima until nothing changes: a few rounds.
    """
    ids, ends = np.unique(np.concatenate((a, b)), return_inverse=True)
    left, right = ends[: len(a)], ends[len(a) :]
    label = np.arange(len(ids))
    while True:
        least = np.minimum(label[left], label[right])
        new = label.copy()
        for side in (label[left], label[right], left, right):
            np.minimum.at(new, side, least)
        new = new[new]
        if (new == label).all():
            return ids, ids[label]
        label = new


def decide(out: Path, documents: Manifest, signed: Manifest, matched: Manifest, ranking: Ranking) -> list[Shard]:
    """The shards of `documents`, each with the file that says which rows go and who stays in their place."""
    pairs = [pq.read_table(out / shard.inputs[0]) for shard in follow((matched, "part"))]
    ends = [np.concatenate([pair[side].to_numpy() for pair in pairs]).astype(np.int64) for side in "ab"]
    ids, groups = clusters(*ends)
    files = [out / record["outputs"]["part"]["file"] for record in signed["shards"].values()]
    known = [
        (numbers(rows["repo"], ranking), rows["size"].to_numpy()) for rows in rows_at(files, ids, ["repo", "size"])
    ]
    repos, sizes = map(np.concatenate, zip(*known, strict=True))
    order = ranking.best_first(groups, repos.astype(np.int64), sizes, ids)
    best = np.empty_like(order)  # by document: the one that stays for it
    best[order] = order[leaders(groups[order])]
    lost = np.flatnonzero(best != np.arange(len(best)))
    stays, place = np.unique(ids[best[lost]], return_inverse=True)
    originals = pa.DictionaryArray.from_arrays(place, names_at(files, stays))
    reasons = pa.DictionaryArray.from_arrays(np.zeros(len(lost), dtype=np.int8), ["near duplicate"])
    return write_decisions(out, "near", documents, ids[lost], reasons, originals)


def keep_shard(out: Path, shard: Shard, settings: None) -> Result:
    documents, decided = (pq.read_table(out / file) for file in shard.inputs)
    kept, gone = parted(documents, decided)
    document = pc.list_parent_indices(gone["paths"])
    files = [pc.list_flatten(gone["paths"]), *(gone[name].take(document) for name in ("reason", "original"))]
    dropped = pa.Table.from_arrays([gone["repo"].take(document), *files], schema=GONE)
    return Result({"part": kept, "dropped": dropped}, tally(kept, dropped) | {"documents_dropped": len(gone)})
