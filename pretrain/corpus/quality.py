"""The last look at each file of a document: does it parse, does it hold test data, what does a scorer say of it?

A file that is dropped leaves its document, which keeps the order of the others; a document without files goes.

    quality/part-*.parquet      the documents, as order.py wrote them
    quality/dropped-*.parquet   repo, path, reason
    quality/scores-*.parquet    repo, path, language, error_share and score, and signals.NAMES; of files with test data,
                                which go in any case, nothing is measured
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa

from deepseek_coder.languages import language_of

from . import decontaminate, minhash, signals, syntax
from .near import bare
from .order import DOCUMENTS, batches
from .stage import DROPPED, Manifest, Result, Shard, fingerprint, follow, tally

Scorer = Callable[[str, str, str], float]


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
    for rows in batches(out / file):
        texts = [list(map(bare, row["paths"], row["texts"])) for row in rows]
        tested = iter(tests.found_in([text.encode() for some in texts for text in some]) if tests else repeat(False))
        for row, some in zip(rows, texts, strict=True):
            stays = []
            for path, text, in_tests in zip(row["paths"], some, tested):  # noqa: B905 (an iterator over all rows)
                reason = "test data"
                if not in_tests:
                    about, reason = _judged(path, row["language"], text, settings, scorer)
                    scores.append({"repo": row["repo"]} | about)
                stays.append(not reason)
                if reason:
                    dropped.append({"repo": row["repo"], "path": path, "reason": reason})
            if any(stays):
                for name in ("paths", "texts"):
                    row[name] = list(compress(row[name], stays))
                kept.append(row)
    tables = {
        "part": pa.Table.from_pylist(kept, DOCUMENTS),
        "dropped": pa.Table.from_pylist(dropped, DROPPED),
        "scores": pa.Table.from_pylist(scores, SCORES),
    }
    return Result(tables, tally(tables["part"], tables["dropped"]))


def _version(scorer: Callable[..., Any] | None) -> str:
    """Of a scorer: the hash of its module's file, and the module's `VERSION`, which stands for what the file reads."""
    module = inspect.getmodule(scorer)
    file = getattr(module, "__file__", None)
    return fingerprint(
        hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "", str(getattr(module, "VERSION", ""))
    )


def _judged(
    path: str, document_language: str, text: str, settings: Quality, scorer: Scorer | None
) -> tuple[dict[str, Any], str]:
    """What is measured of a file, and why it goes, or ""."""
    own = language_of(path)  # a file in Kotlin may stand among many in Java, but a header is of its document's language
    language = document_language if own is None or path.endswith(".h") else own.name
    wrong = syntax.error_share(path, language, text, settings.max_error_share) if settings.syntax else None
    score = float(scorer(path, language, text)) if scorer else None
    about: dict[str, Any] = {"path": path, "language": language, "error_share": wrong, "score": score}
    about |= signals.signals(language, text) if settings.signals else {}
    if wrong is not None and wrong > settings.max_error_share:
        return about, "syntax errors"
    return about, "score" if score is not None and not score >= settings.min_score else ""  # not-a-number is no score


def _scorer(entry: str) -> Scorer | None:
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
