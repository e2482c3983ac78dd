"""The stage contract: one shard in, its tables out, and a record by which a second run knows what it may skip.

No engine resumes across a shuffle; only outputs on disk do. So a stage is nothing but a pure function of one shard that
returns tables, and this file does the rest, once, for all of them:

- outputs get a temporary name and are renamed when complete, so a killed process or a full disk leaves no half-written
  file behind; a shard's record is written after its outputs;
- a record holds one key: the hash of the shard's inputs, of the stage's configuration and of the source files that
  decide its result. A shard is done when its record has today's key and its outputs are there; all else is redone;
- a shard that raises is recorded with its reason, the others go on, and so do the stages after it, without that shard;
  the run ends with one error that names all that failed.

Where the shards are worked on is an executor's affair (executors.py). No output depends on the time, the machine or the
number of workers: the same inputs give the same bytes. Only shard-*.json holds what may differ, the seconds it took.
"""

import dataclasses
import hashlib
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepseek_coder.languages import language_of

from ..files import replacing, write_json

FILES = pa.schema([("repo", pa.string()), ("path", pa.string()), ("language", pa.string()), ("text", pa.string())])
DROPPED = pa.schema([("repo", pa.string()), ("path", pa.string()), ("reason", pa.string())])

_OURS = re.compile(r"[a-z]+\d*-\d{5,}\.parquet|shard-\d{5,}\.json|.*\.tmp")

T = TypeVar("T")
Manifest = dict[str, Any]
Record = dict[str, Any]


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


@dataclass(frozen=True)
class Job:
    """One shard to be worked on, wherever that is."""

    function: Function
    out: Path
    stage: str
    shard: Shard
    settings: Any
    key: str

    @property
    def record(self) -> Path:
        return self.out / self.stage / f"shard-{self.shard.name}.json"


Executor = Callable[[list[Job]], Iterator[tuple[str, Record]]]  # yields (shard name, record) as each shard ends


def here(jobs: list[Job]) -> Iterator[tuple[str, Record]]:
    """The executor of this process: one shard after another."""
    for job in jobs:
        yield job.shard.name, work(job)


def fingerprint(*values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def run(
    stage: str,
    out: Path,
    function: Function,
    shards: list[Shard],
    settings: Any = None,
    code: tuple[ModuleType | str, ...] = (),
    executor: Executor = here,
    progress: bool = False,
) -> Manifest:
    """Brings every shard of a stage up to date under out/stage/ and returns its manifest, also written there.

    settings: a dataclass, passed on and part of each shard's key, but for fields with compare=False. code: what decides
    the result: modules, by their source, and installed packages, by their version.
    executor: where the shards are worked on. progress: a bar on stderr if that is a terminal.
    A shard that failed is not among the manifest's "shards" but under "failed" (`failures` tells of all stages).
    """
    folder = out / stage
    folder.mkdir(parents=True, exist_ok=True)
    config = _decisive(settings)
    version = code_version(code)
    keys = {shard.name: fingerprint(config, version, shard.fingerprint) for shard in shards}
    records: dict[str, Any] = {shard.name: _finished(folder, shard.name, keys[shard.name]) for shard in shards}
    _discard_leftovers(folder, shards, records)
    jobs = [Job(function, out, stage, s, settings, keys[s.name]) for s in shards if records[s.name] is None]
    columns = (TextColumn(f"{stage:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(stage, total=len(shards), completed=len(shards) - len(jobs))
        for name, record in executor(jobs):
            records[name] = record
            bar.advance(task)
    finished = {name: record for name, record in records.items() if "failed" not in record}
    counts: dict[str, Any] = {}
    for record in finished.values():
        record.pop("cpu_seconds", None)
        add(counts, record["counts"])
    manifest = {
        "stage": stage,
        "config": config,
        "code": version,
        "counts": counts,
        "shards": finished,
        "failed": {name: record for name, record in records.items() if "failed" in record},
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def code_version(code: tuple[ModuleType | str, ...]) -> str:
    """One hash of modules, by their source, and of installed packages, by their version."""
    return fingerprint(
        [_installed(part) if isinstance(part, str) else Path(str(part.__file__)).read_text() for part in code]
    )


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _decisive(settings: Any) -> dict[str, Any]:
    if settings is None:
        return {}
    silent = {field.name for field in dataclasses.fields(settings) if not field.compare}
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in silent}


def failures(out: Path, *stages: str) -> str:
    """One sentence on the shards that failed in these stages, as they were last run; "" if none did."""
    parts = []
    for stage in stages:
        manifest = json.loads((out / stage / "manifest.json").read_text())
        failed = manifest.get("failed")
        if failed:
            reasons = "; ".join(f"shard {name}: {record['failed']}" for name, record in sorted(failed.items()))
            total = len(failed) + len(manifest["shards"])
            parts.append(f"{len(failed)} of the {total} shards of the stage {stage} failed: {reasons}")
    return ". ".join(parts)


def common(*manifests: Manifest) -> list[Manifest]:
    """The manifests of stages with the same shards, less the shards that failed in one of them."""
    names = set.intersection(*(set(manifest["shards"]) for manifest in manifests))
    return [m | {"shards": {name: m["shards"][name] for name in m["shards"] if name in names}} for m in manifests]


def follow(*outputs: tuple[Manifest, str]) -> list[Shard]:
    """The shards of a stage that reads, for each shard, the given outputs (manifest, "part") of earlier stages.

    A shard that failed in one of them is left out.
    """
    shards = []
    for name in outputs[0][0]["shards"]:
        if any(name not in manifest["shards"] for manifest, _ in outputs):
            continue
        written = [manifest["shards"][name]["outputs"][kind] for manifest, kind in outputs]
        files = tuple(output["file"] for output in written)
        shards.append(Shard(name, files, fingerprint([output["sha256"] for output in written])))
    return shards


def add(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds counts to counts, dict by dict."""
    for key, value in more.items():
        if isinstance(value, dict):  # Mapping would take ten times as long, for each file of a shard
            add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def tally(kept: pa.Table, dropped: pa.Table) -> dict[str, Any]:
    """The counts of a stage that keeps some files and drops others: files, UTF-8 bytes, languages, reasons.

    kept: files (FILES), or documents, which are counted too; dropped: files. `languages` of documents are those of most
    of each, `file_languages` those of their files.
    """
    counts: dict[str, Any] = {"files_in": len(dropped), "files": 0, "bytes": 0}
    if "text" in kept.column_names:
        sizes = pc.binary_length(kept["text"]).to_pylist()
        parts = [{"files": 1, "bytes": size} for size in sizes]
    else:
        counts["documents"] = 0
        parts = [{"documents": 1, "files": files, "bytes": size} for files, size in zip(*extents(kept), strict=True)]
        sizes = pc.binary_length(pc.list_flatten(kept["texts"])).to_pylist()
        for path, size in zip(pc.list_flatten(kept["paths"]).to_pylist(), sizes, strict=True):
            if (own := language_of(path)) is not None:
                add(counts, {"file_languages": {own.name: {"files": 1, "bytes": size}}})
    for language, part in zip(kept["language"].to_pylist(), parts, strict=True):
        add(counts, part | {"files_in": part["files"], "languages": {language: part}})
    for reason in dropped["reason"].to_pylist():
        add(counts, {"dropped": {reason: 1}})
    return counts


def extents(documents: pa.Table) -> tuple[list[int], list[int]]:
    """(number of files, UTF-8 bytes) of each document."""
    files = pc.list_value_length(documents["texts"]).to_numpy()
    ends = np.cumsum(files, dtype=np.int64)
    bytes_before = np.append(
        0, np.cumsum(pc.binary_length(pc.list_flatten(documents["texts"])).to_numpy(), dtype=np.int64)
    )
    return files.tolist(), (bytes_before[ends] - bytes_before[ends - files]).tolist()


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
    fits = not isinstance(value, bool) and isinstance(value, allowed) and value >= min(default, 0)
    kind = "a whole number" if isinstance(default, int) else "a number"
    return "" if fits else kind if default < 0 else f"{kind} >= 0"


# ---- one shard -------------------------------------------------------------------------------------------------------


def work(job: Job) -> Record:
    """Does one shard, writes its outputs and its record, and returns the record; never raises."""
    started = time.process_time()
    try:
        result = job.function(job.out, job.shard, job.settings)
        outputs = {}
        for kind, table in result.tables.items():
            file = f"{job.stage}/{kind}-{job.shard.name}.parquet"
            with replacing(job.out / file) as temporary:
                pq.write_table(table, temporary, compression="zstd")
            with open(job.out / file, "rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()
            size = (job.out / file).stat().st_size
            outputs[kind] = {"file": file, "sha256": digest, "rows": table.num_rows, "bytes": size}
        record: Record = {"key": job.key, "inputs": job.shard.fingerprint, "outputs": outputs, "counts": result.counts}
        record |= {"about": result.about} if result.about else {}
        record["cpu_seconds"] = round(time.process_time() - started, 2)
        write_json(job.record, record)
    except Exception as error:
        # A ValueError of ours is a full sentence; anything else needs its type to be understood.
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        record = {"key": job.key, "failed": reason, "traceback": traceback.format_exc()}
        with suppress(ValueError):  # on a full disk the one who asked hears it all the same
            write_json(job.record, record)
    pa.default_memory_pool().release_unused()  # or each thread of Arrow's keeps pages, more with each shard
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


def _discard_leftovers(folder: Path, shards: list[Shard], records: Mapping[str, Record | None]) -> None:
    """Removes what is of no use to this run: half-written files, shards of an earlier plan that had more of them, files
    that shards wrote with other settings. What the shards read may lie here too, and stays."""
    done = {name: record for name, record in records.items() if record is not None}
    used = {f"{folder.name}/shard-{name}.json" for name in done}
    used |= {output["file"] for record in done.values() for output in record["outputs"].values()}
    used |= {file for shard in shards for file in shard.inputs if isinstance(file, str)}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and f"{folder.name}/{path.name}" not in used:
            path.unlink()
