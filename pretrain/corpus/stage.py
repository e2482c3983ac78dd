"""The stage contract: one shard in, its tables out, and a record by which a second run knows what it may skip.

No engine resumes across a shuffle; only outputs on disk do. So a stage is nothing but a pure function of one shard that
returns tables, and this file does the rest, once, for all of them:

- outputs get a temporary name and are renamed when complete, so a killed process or a full disk leaves no half-written
  file behind; a shard's record is written after its outputs;
- a record holds one key: the hash of the shard's inputs, of the stage's configuration and of the source files that
  decide its result. A shard is done when its record has today's key and its outputs are there; all else is redone;
- a shard that raises is recorded with its reason, the others continue, and the run ends with one error that names all.

Nothing written depends on the time, the machine or the number of workers: the same inputs give the same bytes.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import replacing, write_json

FILES = pa.schema([("repo", pa.string()), ("path", pa.string()), ("language", pa.string()), ("text", pa.string())])
DROPPED = pa.schema([("repo", pa.string()), ("path", pa.string()), ("reason", pa.string())])

_OURS = re.compile(r"[a-z]+\d*-(?P<shard>\d{5,})\.parquet|shard-(?P<record>\d{5,})\.json|.*\.tmp")

T = TypeVar("T")
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Shard:
    name: str  # "00000": the number in the names of its outputs
    inputs: tuple[Any, ...]  # what the stage's function needs: files under the corpus folder, or repositories
    fingerprint: str  # hash of the inputs' contents


@dataclass(frozen=True)
class Result:
    tables: dict[str, pa.Table]  # "part" -> the table of STAGE/part-00000.parquet
    counts: dict[str, Any]  # numbers, or dicts of counts; added up over the shards
    about: dict[str, Any] = field(default_factory=dict)  # what else the record should say


Function = Callable[[Path, Shard, Any], Result]  # (corpus folder, shard, settings)


def fingerprint(*values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def run(
    stage: str,
    out: Path,
    function: Function,
    shards: list[Shard],
    settings: Any = None,
    modules: tuple[ModuleType, ...] = (),
    pool: ProcessPoolExecutor | None = None,
    progress: bool = False,
) -> Manifest:
    """Brings every shard of a stage up to date under out/stage/ and returns its manifest, also written there.

    settings: a dataclass, passed on and part of each shard's key. modules: those whose source decides the result.
    pool: where the shards are worked on; None is this process. progress: a bar on stderr if that is a terminal.
    Raises ValueError when shards failed, naming each with its reason; the finished ones are kept.
    """
    folder = out / stage
    folder.mkdir(parents=True, exist_ok=True)
    _discard_leftovers(folder, shards)
    config = dataclasses.asdict(settings) if settings is not None else {}
    code = fingerprint([Path(str(module.__file__)).read_text() for module in modules])
    keys = {shard.name: fingerprint(config, code, shard.fingerprint) for shard in shards}
    records: dict[str, Any] = {shard.name: _finished(folder, shard.name, keys[shard.name]) for shard in shards}
    todo = [shard for shard in shards if records[shard.name] is None]
    columns = (TextColumn(f"{stage:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(stage, total=len(shards), completed=len(shards) - len(todo))
        jobs = [(function, out, stage, shard, settings, keys[shard.name]) for shard in todo]
        for name, record in _work_all(jobs, pool):
            records[name] = record
            bar.advance(task)
    failed = {name: record["failed"] for name, record in records.items() if "failed" in record}
    counts: dict[str, Any] = {}
    for record in records.values():
        add(counts, record.get("counts", {}))
    manifest = {
        "stage": stage,
        "finished": not failed,
        "config": config,
        "code": code,
        "counts": counts,
        "shards": records,
    }
    write_json(folder / "manifest.json", manifest)
    if failed:
        reasons = "; ".join(f"shard {name}: {reason}" for name, reason in sorted(failed.items()))
        raise ValueError(
            f"{len(failed)} of the {len(shards)} shards of the stage {stage} failed: {reasons}; the others are kept: "
            "remove the cause and run the same command again"
        )
    return manifest


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for all stages of a build, started when the first stage needs them; None for a single worker."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads (torch, pyarrow) can deadlock
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def follow(*outputs: tuple[Manifest, str]) -> list[Shard]:
    """The shards of a stage that reads, for each shard, the given outputs (manifest, "part") of earlier stages."""
    shards = []
    for name in outputs[0][0]["shards"]:
        written = [manifest["shards"][name]["outputs"][kind] for manifest, kind in outputs]
        files = tuple(output["file"] for output in written)
        shards.append(Shard(name, files, fingerprint([output["sha256"] for output in written])))
    return shards


def add(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds counts to counts, dict by dict."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def tally(kept: list[dict[str, Any]], dropped: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of a stage that keeps some files and drops others: files, UTF-8 bytes, languages, reasons."""
    counts: dict[str, Any] = {"files_in": len(kept) + len(dropped), "files": 0, "bytes": 0}
    for row in kept:
        size = len(row["text"].encode())
        add(counts, {"files": 1, "bytes": size, "languages": {row["language"]: {"files": 1, "bytes": size}}})
    for row in dropped:
        add(counts, {"dropped": {row["reason"]: 1}})
    return counts


def tally_documents(kept: list[dict[str, Any]], dropped: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of a stage of documents; `dropped` are files."""
    counts: dict[str, Any] = {"files_in": len(dropped), "documents": 0, "files": 0, "bytes": 0}
    for row in kept:
        files = len(row["paths"])
        size = {"documents": 1, "files": files, "bytes": sum(len(text.encode()) for text in row["texts"])}
        add(counts, size | {"files_in": files, "languages": {row["language"]: size}})
    for row in dropped:
        add(counts, {"dropped": {row["reason"]: 1}})
    return counts


def read_rows(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    return pq.read_table(path, columns=columns).to_pylist()


def settings_of(kind: type[T], section: str, values: Any) -> T:
    """One section of the configuration as its dataclass. Raises ValueError for an unknown key or a value of no use."""
    if not isinstance(values, Mapping):
        raise ValueError(f"[{section}] of the corpus configuration is {values!r}; it must be a table of settings")
    fields = {f.name: f.default for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in fields:
            raise ValueError(
                f"unknown key {key!r} in [{section}] of the corpus configuration; known: {', '.join(fields)}"
            )
        expected = _expected(value, fields[key])
        if expected:
            raise ValueError(f"{key} in [{section}] of the corpus configuration is {value!r}; it must be {expected}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _expected(value: Any, default: Any) -> str:
    """What a setting must be, by the type of its default, if `value` is not that; "" if it is."""
    if isinstance(default, tuple):
        fits = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        return "" if fits else "a list of texts"
    if isinstance(default, str | bool):
        return "" if type(value) is type(default) else "a text" if isinstance(default, str) else "true or false"
    allowed = (int,) if isinstance(default, int) else (int, float)
    fits = not isinstance(value, bool) and isinstance(value, allowed) and value >= 0
    return "" if fits else f"{'a whole number' if isinstance(default, int) else 'a number'} >= 0"


# ---- one shard -------------------------------------------------------------------------------------------------------


def _work_all(jobs: list[tuple], pool: ProcessPoolExecutor | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(shard name, record) of each job as it ends, in this process or in others."""
    if pool is None or len(jobs) < 2:
        for job in jobs:
            yield job[3].name, _work(*job)
        return
    futures = {pool.submit(_work, *job): job[3].name for job in jobs}
    for future in as_completed(futures):
        try:
            yield futures[future], future.result()
        except BrokenProcessPool:
            reason = "a worker process was killed, perhaps for want of memory; use fewer workers"
            yield futures[future], {"failed": reason}


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, or go on writing beside the next run."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(function: Function, out: Path, stage: str, shard: Shard, settings: Any, key: str) -> dict[str, Any]:
    try:
        result = function(out, shard, settings)
        outputs = {}
        for kind, table in result.tables.items():
            file = f"{stage}/{kind}-{shard.name}.parquet"
            with replacing(out / file) as temporary:
                pq.write_table(table, temporary, compression="zstd")
            with open(out / file, "rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()
            size = (out / file).stat().st_size
            outputs[kind] = {"file": file, "sha256": digest, "rows": table.num_rows, "bytes": size}
        record = {"key": key, "inputs": shard.fingerprint, "outputs": outputs, "counts": result.counts}
        record |= {"about": result.about} if result.about else {}
        write_json(out / stage / f"shard-{shard.name}.json", record)
    except Exception as error:
        # A ValueError of ours is a full sentence; anything else needs its type to be understood.
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        return {"failed": reason, "traceback": traceback.format_exc()}
    return record


def _finished(folder: Path, name: str, key: str) -> dict[str, Any] | None:
    """The record of a shard that need not be done again: same key, all inputs read, every output in its full size."""
    try:
        record = json.loads((folder / f"shard-{name}.json").read_text())
        sizes = [(folder.parent / o["file"]).stat().st_size == o["bytes"] for o in record["outputs"].values()]
        done = record["key"] == key and all(sizes) and not record.get("about", {}).get("unread")
        return record if done else None
    except (OSError, ValueError, KeyError):
        return None


def _discard_leftovers(folder: Path, shards: list[Shard]) -> None:
    """Removes what a killed run left half-written, and shards of an earlier plan that had more of them."""
    names = {shard.name for shard in shards}
    for path in folder.iterdir():
        match = _OURS.fullmatch(path.name)
        if match and (match["shard"] or match["record"]) not in names:
            path.unlink()
