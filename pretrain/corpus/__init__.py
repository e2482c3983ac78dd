"""From repositories to training documents: crawl -> filter -> dedup -> documents -> near -> quality, a file each.

Every stage reads the shards of the one before and writes its own under a folder of its name (stage.py says how it
resumes). Exact duplicates go before the files are ordered, so that an ordered document holds each file once.

    OUT/crawl/part-*.parquet       repo, path, language, text
    OUT/filter/part-*.parquet      the same, less dropped-*.parquet: repo, path, reason
    OUT/digests/part-*.parquet     repo, path, sha256
    OUT/dedup/part-*.parquet       the same columns as crawl, less dropped-*.parquet
    OUT/documents/part-*.parquet   repo, language, paths, texts
    OUT/signatures, OUT/matches    what near.py compares by
    OUT/near/part-*.parquet        the same columns as documents, less dropped-*.parquet
    OUT/quality/part-*.parquet     the same, less dropped-*.parquet: the corpus
    OUT/manifest.json              written last: a corpus without it is unfinished
"""

import json
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepseek_coder import folders, languages, repository

from .. import grammars
from ..files import write_json
from . import (
    archives,
    clones,
    crawl,
    decontaminate,
    dedup,
    encodings,
    generated,
    licences,
    minhash,
    near,
    order,
    quality,
    rules,
    signals,
    sources,
    syntax,
)
from .executors import run_settings, running
from .order import Document
from .report import dropped_for, summary
from .sources import Repository, find, without_login
from .stage import Manifest, common, failures, follow, run, settings_of

__all__ = ["Document", "build", "documents", "load_config", "parts", "read", "summary"]

FORMAT = 1

_SECTIONS: dict[str, Any] = {
    "crawl": crawl.Limits,
    "filter": rules.Rules,
    "documents": order.Settings,
    "dedup": dedup.Dedup,
    "quality": quality.Quality,
}

# What decides what a stage writes, modules and installed packages: when one of them changes, the stage is done again.
_CODE: dict[str, tuple[ModuleType | str, ...]] = {
    "crawl": (
        *(crawl, sources, archives, clones, encodings, folders, generated, licences, languages, repository),
        *("chardetng-py", "licenseclassifier"),
    ),
    "filter": (rules,),
    "dedup": (dedup,),
    "documents": (order, languages, repository, *repository.MODULES),
    "near": (near, minhash),
    "quality": (
        *(quality, syntax, grammars, decontaminate, signals, minhash, near, languages),
        *grammars.PACKAGES,
    ),
}


def build(
    sources: list[str],
    out: Path,
    workers: int | None = None,
    config: dict[str, Any] | None = None,
    progress: bool = True,
    executor: str | None = None,
) -> dict[str, Any]:
    """Builds or brings up to date the corpus in `out`, and returns its manifest.

    sources: folders, git URLs, archives, or .jsonl and .csv lists of them. config: the sections "crawl", "filter",
    "documents", "dedup", "quality" and "run", with fields of crawl.Limits, rules.Rules, order.Settings, dedup.Dedup,
    quality.Quality and executors.Run. workers, executor: instead of those in [run]. An interrupted or changed run
    redoes only what is missing or changed. progress: bars on stderr if that is a terminal.

    Raises FileNotFoundError for a source that does not exist; ValueError for any other source that is of no use, for
    an unknown key of the configuration, a disk that refuses, and a corpus of which nothing is left. A repository that
    cannot be read is named under "unread", a shard that failed under "failed"; the corpus holds the others, and the
    next run tries them again.
    """
    out = Path(out).expanduser().resolve()
    config = config or {}
    settings = _settings(config)
    how = run_settings(config.get("run", {}), executor, workers)
    repositories = find(sources, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").unlink(missing_ok=True)  # unfinished from here on
    except OSError as error:
        raise ValueError(f"{out}: no corpus can be written there ({error.strerror}); choose another --out") from error
    with running(how) as works:
        stages = _run_stages(repositories, out, settings, {"executor": works, "progress": progress})
    manifest = {
        "format": FORMAT,
        "sources": [without_login(source) for source in sources],
        "config": {name: asdict(section) for name, section in settings.items()},
        "counts": {name: stage["counts"] for name, stage in stages.items()},
        "unread": _unread(stages["crawl"]),
        "failed": failures(out, *_ran(settings)),
        "documents": [record["outputs"]["part"] for record in stages["quality"]["shards"].values()],
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _run_stages(
    repositories: list[Repository], out: Path, settings: dict[str, Any], how: dict[str, Any]
) -> dict[str, Manifest]:
    shards = crawl.plan(repositories, out, settings["crawl"])
    crawled = run("crawl", out, crawl.crawl_shard, shards, settings["crawl"], _CODE["crawl"], **how)
    if shards and not crawled["shards"]:
        raise ValueError(f"{failures(out, 'crawl')}; remove the cause and run the same command again")
    if not _unread(crawled):  # else the next run, which tries again, needs the other clones of the same shards
        shutil.rmtree(out / "cache", ignore_errors=True)
    kept = run("filter", out, rules.filter_shard, follow((crawled, "part")), settings["filter"], _CODE["filter"], **how)
    digests = run("digests", out, dedup.digest_shard, follow((kept, "part")), None, _CODE["dedup"], **how)
    ranking = dedup.Ranking.of(out, crawled)
    hashed, digests = common(kept, digests)
    shards = dedup.decide(out, hashed, digests, ranking, settings["dedup"])
    unique = run("dedup", out, dedup.keep_shard, shards, None, _CODE["dedup"], **how)
    stages = {"crawl": crawled, "filter": kept, "dedup": unique}
    if not unique["counts"].get("files"):
        why = failures(out, "crawl", "filter", "digests", "dedup") or dropped_for(
            {name: stage["counts"] for name, stage in stages.items()}
        )
        why = "; ".join([why, *_unread(crawled).values()])
        raise ValueError(
            f"nothing is left for the corpus {out}: {why}; give other sources, or loosen the rules by --config"
        )
    shards = follow(
        (unique, "part"), (crawled, "manifests"), (crawled, "dropped"), (kept, "dropped"), (unique, "dropped")
    )
    stages["documents"] = run(
        "documents", out, order.order_shard, shards, settings["documents"], _CODE["documents"], **how
    )
    if settings["dedup"].near:
        stages["near"] = _near(out, stages["documents"], ranking, settings["dedup"], how)
    shards = quality.shards(stages.get("near", stages["documents"]), settings["quality"])
    stages["quality"] = run("quality", out, quality.screen_shard, shards, settings["quality"], _CODE["quality"], **how)
    return stages


def _near(out: Path, ordered: Manifest, ranking: dedup.Ranking, settings: dedup.Dedup, how: dict[str, Any]) -> Manifest:
    code = _CODE["near"]
    signing = near.signing(settings, ordered)
    signed = run("signatures", out, near.sign_shard, follow((ordered, "part")), signing, code, **how)
    ordered, signed = common(ordered, signed)
    matched = run("matches", out, near.match_shard, near.partitions(signed, signing), settings, code, **how)
    if matched["failed"]:  # without all pairs the clusters would be others
        raise ValueError(f"{failures(out, 'matches')}; remove the cause and run the same command again")
    shards = near.decide(out, ordered, signed, matched, ranking)
    manifest = run("near", out, near.keep_shard, shards, None, code, **how)
    manifest["counts"] |= matched["counts"]
    return manifest


def _ran(settings: dict[str, Any]) -> list[str]:
    """The stages of a run in their order. Folders of others may lie there from a run with other settings."""
    compared = ["signatures", "matches", "near"] if settings["dedup"].near else []
    return ["crawl", "filter", "digests", "dedup", "documents", *compared, "quality"]


def _unread(crawled: Manifest) -> dict[str, str]:
    """repository -> why it could not be read."""
    found = [record.get("about", {}).get("unread", {}) for record in crawled["shards"].values()]
    return {name: reason for part in found for name, reason in part.items()}


def documents(corpus_dir: Path) -> Iterator[Document]:
    """The documents of a corpus in their order, read a few at a time. Raises as `parts` does."""
    return (document for path, _ in parts(corpus_dir) for document in read(path))


def parts(corpus_dir: Path) -> list[tuple[Path, str]]:
    """(file, SHA-256) of the parquet files with the documents of a corpus, in their order.

    Raises FileNotFoundError when the folder is not a corpus, or one that is not finished.
    """
    found = [(Path(corpus_dir) / output["file"], output["sha256"]) for output in _manifest(corpus_dir)["documents"]]
    for path, _ in found:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; run python -m pretrain corpus again, which redoes what is missing"
            )
    return found


def read(part: Path) -> Iterator[Document]:
    """The documents of one part. Raises ValueError for a damaged file."""
    try:
        for batch in pq.ParquetFile(part).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield Document(**row)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{part}: damaged ({error}); remove it and build the corpus again") from error


def load_config(path: Path) -> dict[str, Any]:
    """A TOML file with a section for each stage, checked. Raises FileNotFoundError or ValueError."""
    try:
        config = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        _settings(config)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such corpus configuration") from None
    except (OSError, ValueError) as error:  # TOML and UTF-8 errors are ValueErrors
        raise ValueError(f"{path}: {error}") from error
    return config


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    for section in config:
        if section not in (*_SECTIONS, "run"):
            known = ", ".join((*_SECTIONS, "run"))
            raise ValueError(f"unknown section {section!r} in the corpus configuration; known: {known}")
    run_settings(config.get("run", {}))
    settings = {name: settings_of(kind, name, config.get(name, {})) for name, kind in _SECTIONS.items()}
    return settings | {"filter": rules.filter_of(config.get("filter", {}))}


def _manifest(corpus: Path) -> dict[str, Any]:
    path = Path(corpus) / "manifest.json"
    if not path.is_file():
        what = "an unfinished corpus" if path.with_name("crawl").is_dir() else "not a corpus"
        raise FileNotFoundError(f"{corpus}: {what}; finish it with python -m pretrain corpus SOURCE... --out {corpus}")
    try:
        manifest = json.loads(path.read_text())
        known = manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{path}: not a corpus manifest of format {FORMAT}; build the corpus anew")
    return manifest
