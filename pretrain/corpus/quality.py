"""The last look at each file of a document: does it parse, does it hold test data, what does a scorer say of it?

A file that is dropped leaves its document, which keeps the order of the others; a document without files goes.

    quality/part-*.parquet      the documents, as order.py wrote them
    quality/dropped-*.parquet   repo, path, reason
    quality/scores-*.parquet    repo, path, language, error_share and score, and signals.NAMES
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from . import decontaminate, minhash, signals, syntax
from .near import bare
from .order import DOCUMENTS
from .stage import DROPPED, Manifest, Result, Shard, fingerprint, follow, read_rows, tally_documents


@dataclass(frozen=True)
class Quality:
    syntax: bool = True  # check it where there is a grammar (syntax.py)
    max_error_share: float = 0.1  # of a file's bytes; preprocessor tricks cost healthy C files up to a twentieth
    tests: tuple[str, ...] = ()  # benchmarks, files and folders of them (decontaminate.py)
    ngram: int = 10  # paper, section 2.3: words in a row that a file may not share with test data ...
    shortest: int = 3  # ... and of shorter test strings the whole, from this many words on
    signals: bool = False  # OpenCoder's, into quality/scores (signals.py): tags, at the cost of a syntax check
    scorer: str = ""  # "module:function": called with (path, language, text), returns a number
    min_score: float = -1e9  # a file with a lower one goes

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.ngram <= minhash.LONGEST:
            raise ValueError(
                f"ngram and shortest in [quality] are {self.ngram} and {self.shortest}; they must be from 1 to "
                f"{minhash.LONGEST}, shortest not above ngram"
            )


SCORES = pa.schema(
    [
        ("repo", pa.string()),
        ("path", pa.string()),
        ("language", pa.string()),
        ("error_share", pa.float64()),
        ("score", pa.float64()),
        *signals.SCHEMA,
    ]
)


def shards(documents: Manifest, settings: Quality) -> list[Shard]:
    """Those of `documents`; the contents of the benchmarks and the scorer's source are a part of their keys.

    Raises FileNotFoundError or ValueError for benchmarks or a scorer that cannot be used.
    """
    scorer = _version(_scorer(settings.scorer))
    versions = decontaminate.versions(settings.tests)
    if settings.tests:
        decontaminate.load(settings.tests, versions, settings.ngram, settings.shortest)
    return [
        Shard(shard.name, (*shard.inputs, versions), fingerprint(shard.fingerprint, versions, scorer))
        for shard in follow((documents, "part"))
    ]


def screen_shard(out: Path, shard: Shard, settings: Quality) -> Result:
    scorer = _scorer(settings.scorer)
    file, versions = shard.inputs
    tests = None
    if settings.tests:
        tests = decontaminate.load(settings.tests, versions, settings.ngram, settings.shortest)
    kept, dropped, scores = [], [], []
    for row in read_rows(out / file):
        texts = [bare(path, text) for path, text in zip(row["paths"], row["texts"], strict=True)]
        tested = tests.found_in([text.encode() for text in texts]) if tests else [False] * len(texts)
        stays = []
        for path, text, in_tests in zip(row["paths"], texts, tested, strict=True):
            wrong = syntax.error_share(path, row["language"], text) if settings.syntax else None
            score = float(scorer(path, row["language"], text)) if scorer else None
            about = {
                "repo": row["repo"],
                "path": path,
                "language": row["language"],
                "error_share": wrong,
                "score": score,
            }
            scores.append(about | (signals.signals(row["language"], text) if settings.signals else {}))
            reason = ""
            if in_tests:
                reason = "test data"
            elif wrong is not None and wrong > settings.max_error_share:
                reason = "syntax errors"
            elif score is not None and not score >= settings.min_score:  # not-a-number is no score
                reason = "score"
            stays.append(not reason)
            if reason:
                dropped.append({"repo": row["repo"], "path": path, "reason": reason})
        if any(stays):
            for name in ("paths", "texts"):
                row[name] = [value for value, stay in zip(row[name], stays, strict=True) if stay]
            kept.append(row)
    tables = {
        "part": pa.Table.from_pylist(kept, DOCUMENTS),
        "dropped": pa.Table.from_pylist(dropped, DROPPED),
        "scores": pa.Table.from_pylist(scores, SCORES),
    }
    return Result(tables, tally_documents(kept, dropped))


def _version(scorer: Callable[..., Any] | None) -> str:
    """Of a scorer: the hash of its module's file, and the module's `VERSION`, which stands for what the file reads."""
    module = inspect.getmodule(scorer)
    file = getattr(module, "__file__", None)
    return fingerprint(
        hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "", str(getattr(module, "VERSION", ""))
    )


def _scorer(entry: str) -> Callable[[str, str, str], float] | None:
    if not entry:
        return None
    module, _, function = entry.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"scorer {entry!r} in [quality] cannot be used ({error}); write module:function") from error
    if not callable(found):
        raise ValueError(f"scorer {entry!r} in [quality] is no function; write module:function")
    return found
