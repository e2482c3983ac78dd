"""Exact duplicates: of the files with one text, over all repositories, the first by (repository, path) stays.

The only stage that must look at all shards at once, so it is cut into three: every shard's digests (parallel), one pass
over the digests in the order of the corpus that decides who stays (small: some 200 bytes of memory for each distinct
file), and every shard without what was decided against (parallel). The decision is part of a shard's fingerprint:
a new file elsewhere makes only those shards new whose duplicates it changes.
"""

import hashlib
from pathlib import Path

import pyarrow as pa

from .stage import DROPPED, FILES, Manifest, Result, Shard, fingerprint, follow, read_rows, tally

DIGESTS = pa.schema([("repo", pa.string()), ("path", pa.string()), ("sha256", pa.binary(32))])
REASON = "exact duplicate"


def digest_shard(out: Path, shard: Shard, settings: None) -> Result:
    rows = read_rows(out / shard.inputs[0], ["repo", "path", "text"])
    for row in rows:
        row["sha256"] = hashlib.sha256(row.pop("text").encode()).digest()
    return Result({"part": pa.Table.from_pylist(rows, DIGESTS)}, {"files": len(rows)})


def decide(out: Path, files: Manifest, digests: Manifest) -> list[Shard]:
    """The shards of `files`, each with the rows to leave out: (row, who stays in its place)."""
    first: dict[bytes, str] = {}
    shards = []
    for parts, hashed in zip(follow((files, "part")), follow((digests, "part")), strict=True):
        leave_out = []
        for number, row in enumerate(read_rows(out / hashed.inputs[0])):
            if row["sha256"] in first:
                leave_out.append((number, first[row["sha256"]]))
            else:
                first[row["sha256"]] = f"{row['repo']}/{row['path']}"
        inputs = (*parts.inputs, tuple(leave_out))
        shards.append(Shard(parts.name, inputs, fingerprint(parts.fingerprint, leave_out)))
    return shards


def keep_shard(out: Path, shard: Shard, settings: None) -> Result:
    file, leave_out = shard.inputs
    originals = dict(leave_out)
    kept, dropped = [], []
    for number, row in enumerate(read_rows(out / file)):
        if number in originals:
            gone = {"repo": row["repo"], "path": row["path"], "reason": REASON, "original": originals[number]}
            dropped.append(gone)
        else:
            kept.append(row)
    schema = DROPPED.append(pa.field("original", pa.string()))
    tables = {"part": pa.Table.from_pylist(kept, FILES), "dropped": pa.Table.from_pylist(dropped, schema)}
    return Result(tables, tally(kept, dropped))
