"""Exact duplicates: of the files with one text, over all repositories, that of the best repository stays.

Which one is best is written down once, in `Ranking`, for exact and near-duplicates alike: a permissive licence, then
more stars, then the larger text, then the older repository, then the order of the corpus. So the result depends neither
on the shards nor on who was read first.

A fork repeats most of another repository's files and changes some. Those few would stay, torn from their repository; so
a repository with `fork_share` of its files in one other, better one goes altogether. (Its Jaccard similarity may be
small, when the other is large: this is containment, which MinHash does not see.)

The decision must look at all shards at once, so the work is cut into three: every shard's digests (parallel), one pass
over them (some 40 bytes of memory for a file), and every shard without what was decided against (parallel). What is
decided of a shard is a file, and its hash a part of the shard's key: a new file elsewhere makes only those shards new
whose duplicates it changes.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..files import replacing
from . import licences, minhash
from .stage import DROPPED, Manifest, Result, Shard, fingerprint, read_rows, tally

Ids = NDArray[np.int64]  # a file's or document's place in the corpus


@dataclass(frozen=True)
class Dedup:
    # compare=False: decided on by the driver, whose decisions are inputs of the stages.
    fork_share: float = field(default=0.9, compare=False)  # above 1: no repository counts as a fork
    near: bool = field(default=True, compare=False)
    # DeepSeek-Coder: "the same near-deduplication" as StarCoder, on a repository's concatenated files; these are
    # StarCoder's numbers (bigcode-dataset, near_deduplication).
    ngram: int = 5  # words in a shingle
    permutations: int = 256
    threshold: float = 0.7  # Jaccard similarity

    def __post_init__(self) -> None:
        for key, least, most in (("ngram", 1, minhash.LONGEST), ("permutations", 1, 1 << 16), ("threshold", 0.01, 1)):
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"{key} in [dedup] is {getattr(self, key)}; it must be from {least} to {most}")


DIGESTS = pa.schema([("repo", pa.string()), ("path", pa.string()), ("sha256", pa.binary(32)), ("size", pa.int64())])
GONE = DROPPED.append(pa.field("original", pa.string()))
_DECIDED = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("original", pa.string())])
NAMES = pa.large_string()  # of all repositories together they may be longer than 2 GB

_PART = 10_000_000  # digests sorted at once: some 115 bytes of memory for each


@dataclass(frozen=True)
class Ranking:
    """Which of several repositories keeps what they share; `number` is a repository's place in the corpus."""

    names: list[str]
    number: dict[str, int]
    standing: NDArray[np.int64]  # by number: permissive licence, then stars; 0 is best
    age: NDArray[np.int64]  # by number: day of creation, the unknown last

    @classmethod
    def of(cls, out: Path, crawled: Manifest) -> "Ranking":
        rows: list[dict[str, Any]] = []
        for record in crawled["shards"].values():
            rows += read_rows(out / record["outputs"]["repositories"]["file"], ["repo", "licence", "stars", "created"])
        standing = [(not licences.permissive(row["licence"]), -(row["stars"] or 0)) for row in rows]
        names = [row["repo"] for row in rows]
        return cls(
            names,
            {name: number for number, name in enumerate(names)},
            _dense(standing),
            _dense([(row["created"] or "9")[:10] for row in rows]),
        )

    def best_first(self, groups: NDArray[Any], repos: Ids, sizes: Ids, ids: Ids, last: Any = None) -> Ids:
        """The order that sorts by group, and within a group puts the best first. last: those that come behind all."""
        last = np.zeros(len(ids), dtype=bool) if last is None else last
        return np.lexsort((ids, self.age[repos], -sizes, self.standing[repos], last, groups))


def _dense(values: list[Any]) -> NDArray[np.int64]:
    place = {value: number for number, value in enumerate(sorted(set(values)))}
    return np.array([place[value] for value in values], dtype=np.int64)


def digest_shard(out: Path, shard: Shard, settings: None) -> Result:
    files = pq.read_table(out / shard.inputs[0], columns=["repo", "path", "text"])
    digests, sizes = [], []
    for batch in files.to_batches(max_chunksize=1024):
        for text in batch["text"].cast(pa.binary()).to_pylist():
            digests.append(hashlib.sha256(text).digest())
            sizes.append(len(text))
    columns = [files["repo"], files["path"], pa.array(digests, pa.binary(32)), pa.array(sizes, pa.int64())]
    return Result({"part": pa.Table.from_arrays(columns, schema=DIGESTS)}, {"files": len(files)})


def decide(out: Path, kept: Manifest, digests: Manifest, ranking: Ranking, settings: Dedup) -> list[Shard]:
    """The shards of `kept`, each with the file that says which rows go, why, and who stays in their place."""
    files = [out / record["outputs"]["part"]["file"] for record in digests["shards"].values()]
    repos = np.concatenate([numbers(pq.read_table(file, columns=["repo"])["repo"], ranking) for file in files])
    owner = _owners(files, repos, ranking, np.zeros(len(ranking.names), dtype=bool))
    source = _forks(repos, repos[owner], len(ranking.names), settings.fork_share)
    fork = source >= 0
    if fork.any():  # what only forks have goes with them; what others have too stays with one of those
        owner = _owners(files, repos, ranking, fork)
    copy = owner != np.arange(len(owner))
    lost = np.flatnonzero(copy | fork[repos])
    originals, place = np.unique(owner[lost], return_inverse=True)
    names = pa.concat_arrays([names_at(files, originals), pa.array(ranking.names, NAMES)])
    original = np.where(copy[lost], place, len(originals) + source[repos[lost]])
    reason = pa.DictionaryArray.from_arrays(pa.array(~copy[lost]).cast(pa.int8()), ["exact duplicate", "fork"])
    return write_decisions(out, "dedup", kept, lost, reason, pa.DictionaryArray.from_arrays(original, names))


def numbers(names: pa.ChunkedArray, ranking: Ranking) -> NDArray[np.int32]:
    encoded = names.combine_chunks().dictionary_encode()
    table = np.array([ranking.number[name] for name in encoded.dictionary.to_pylist()], dtype=np.int32)
    return table[encoded.indices.to_numpy()] if len(table) else np.zeros(0, dtype=np.int32)


def _owners(files: list[Path], repos: NDArray[Any], ranking: Ranking, last: NDArray[np.bool_]) -> Ids:
    """For every file the one that keeps its text, perhaps itself. last: repositories that come after all others."""
    owner = np.arange(len(repos))
    parts = 1 + len(repos) // _PART
    for part in range(parts):
        hashes, sizes, ids = [], [], []
        begin = 0
        for file in files:
            table = pq.read_table(file, columns=["sha256", "size"])
            column = table["sha256"].combine_chunks()
            digest = np.frombuffer(column.buffers()[1], dtype=np.uint64, offset=column.offset * 32).reshape(-1, 4)
            digest = digest[: len(table)]
            mine = digest[:, 0] % np.uint64(parts) == part
            hashes.append(digest[mine, 1:3])  # 128 bits of the 256 will never meet by chance
            sizes.append(table["size"].to_numpy()[mine])
            ids.append(begin + np.flatnonzero(mine))
            begin += len(table)
        group, place = _shared(np.concatenate(hashes))  # of most there is one only
        number, size = np.concatenate(ids)[place], np.concatenate(sizes)[place]
        repo = repos[number]
        order = ranking.best_first(group, repo, size, number, last[repo])
        owner[number[order]] = number[order][leaders(group[order])]
    return owner


def _shared(hashes: NDArray[np.uint64]) -> tuple[Ids, Ids]:
    """(group, place) of the rows that are there more than once; equal rows are a group."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    first = np.ones(len(order) + 1, dtype=bool)  # of its group; what comes behind the last row begins another
    first[1:-1] = False
    for half in (0, 1):
        column = hashes[order, half]
        first[1:-1] |= column[1:] != column[:-1]
    several = ~(first[:-1] & first[1:])
    return np.cumsum(first[:-1])[several], order[several]


def leaders(groups: NDArray[Any]) -> Ids:
    """Where the first of each entry's group is; equal groups stand together."""
    places = np.arange(len(groups))
    first = np.ones(len(groups), dtype=bool)
    first[1:] = groups[1:] != groups[:-1]
    return np.maximum.accumulate(np.where(first, places, 0))


def _forks(repos: NDArray[Any], owners: NDArray[Any], count: int, share: float) -> NDArray[np.int64]:
    """By repository: the one that holds at least `share` of its files (the most; of equals the first), or -1."""
    source = np.full(count, -1, dtype=np.int64)
    total = np.bincount(repos, minlength=count)
    pairs, shared = np.unique(repos.astype(np.int64) * count + owners, return_counts=True)
    mine, theirs = pairs // max(count, 1), pairs % max(count, 1)
    enough = (mine != theirs) & (shared >= share * total[mine])
    for i in np.flatnonzero(enough)[np.argsort(shared[enough], kind="stable")[::-1]][::-1]:
        source[mine[i]] = theirs[i]
    return source


def rows_at(files: list[Path], places: Ids, columns: list[str]) -> Iterator[pa.Table]:
    """The rows at these places, ascending, of all files one after another, a table for each file that has some."""
    begin = 0
    for number, file in enumerate(files):
        end = begin + pq.read_metadata(file).num_rows
        low, high = np.searchsorted(places, (begin, end))
        if high > low or not number:  # the first in any case, for its columns
            yield pq.read_table(file, columns=columns).take(places[low:high] - begin)
        begin = end


def names_at(files: list[Path], places: Ids) -> pa.LargeStringArray:
    """repository/path of the rows at these places."""
    table = pa.concat_tables(rows_at(files, places, ["repo", "path"]))
    repos, paths = table["repo"].cast(NAMES), table["path"].cast(NAMES)
    return pc.binary_join_element_wise(repos, paths, pa.scalar("/", NAMES)).combine_chunks()


def write_decisions(
    out: Path, stage: str, inputs: Manifest, places: Ids, reasons: pa.DictionaryArray, originals: pa.DictionaryArray
) -> list[Shard]:
    """The shards of the stage that leaves out the rows at these places in the corpus, ascending: why, and for whom.

    Reasons and names are written out for one shard at a time; of the corpus there is a number for each.
    """
    (out / stage).mkdir(parents=True, exist_ok=True)
    shards = []
    begin = 0
    for name, record in inputs["shards"].items():
        part = record["outputs"]["part"]
        low, high = np.searchsorted(places, (begin, begin + part["rows"]))
        texts = [column[low:high].dictionary_decode().cast(pa.string()) for column in (reasons, originals)]
        rows = pa.Table.from_arrays([pa.array(places[low:high] - begin), *texts], schema=_DECIDED)
        file = f"{stage}/decided-{name}.parquet"
        table = io.BytesIO()
        pq.write_table(rows, table, compression="zstd")
        if not (out / file).is_file() or (out / file).read_bytes() != table.getvalue():
            with replacing(out / file) as temporary:
                temporary.write_bytes(table.getvalue())
        key = fingerprint(part["sha256"], rows.to_pylist())
        shards.append(Shard(name, (part["file"], file), key))
        begin += part["rows"]
    return shards


def keep_shard(out: Path, shard: Shard, settings: None) -> Result:
    files, decided = (pq.read_table(out / file) for file in shard.inputs)
    kept, gone = parted(files, decided)
    dropped = gone.select(["repo", "path", "reason", "original"])
    return Result({"part": kept, "dropped": dropped}, tally(kept, dropped))


def parted(table: pa.Table, decided: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(the rows that stay, those that go, with their `reason` and `original`)."""
    stays = np.ones(len(table), dtype=bool)
    stays[decided["row"].to_numpy()] = False
    gone = table.filter(pa.array(~stays))
    for name in ("reason", "original"):
        gone = gone.append_column(name, decided[name])
    return table.filter(pa.array(stays)), gone
