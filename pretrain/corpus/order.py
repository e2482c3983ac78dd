"""Files become documents: in languages whose imports are read, one document for each group of files that depend on each
other, dependencies first (deepseek_coder/repository); in the others one document for each file, as DeepSeek did for the
languages that it did not order.

A document keeps its files apart, each with its path comment, because what comes later needs the borders: a document
that is too long is split between files, and only the last file is cut for infilling. Joined, its texts are the
document.

Dependencies are resolved in the repository as it was crawled: a package whose empty `__init__.py` the filter dropped is
still a package, and a go.mod, which is in none of the languages, names a module all the same. A dependency on a dropped
file is counted and otherwise ignored.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from deepseek_coder import repository

from .stage import Result, Shard, add, read_rows

T = TypeVar("T")

# Parquet's name for an element, so that a table read and written is the same file.
_STRINGS = pa.list_(pa.field("element", pa.string()))
DOCUMENTS = pa.schema([("repo", pa.string()), ("language", pa.string()), ("paths", _STRINGS), ("texts", _STRINGS)])


@dataclass(frozen=True)
class Settings:
    """order: one of repository.METHODS; seed: of the order "random". path_comment: one of repository.SIGNS."""

    order: str = "feedback"
    seed: int = 0
    path_comment: str = "language"

    def __post_init__(self) -> None:
        for key, known in (("order", repository.METHODS), ("path_comment", repository.SIGNS)):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"{key} in [documents] of the corpus configuration is {getattr(self, key)!r}; it must be one of "
                    f"{', '.join(known)}"
                )


@dataclass(frozen=True)
class Document:
    """Files of one repository in training order; "".join(texts) is what the model reads. language: of most of it."""

    repo: str
    language: str
    paths: list[str]
    texts: list[str]


def batches(file: Path) -> Iterator[list[dict[str, Any]]]:
    """The documents of a table, some at a time."""
    rows = (row for batch in pq.ParquetFile(file).iter_batches(batch_size=64) for row in batch.to_pylist())
    return batched(rows, lambda row: sum(map(len, row["texts"])))


def batched(items: Iterable[T], length: Callable[[T], int], size: int = 1 << 20) -> Iterator[list[T]]:
    """The items in lists of about `size` characters."""
    some: list[T] = []
    room = size
    for item in items:
        some.append(item)
        room -= length(item)
        if room < 0:
            yield some
            some, room = [], size
    if some:
        yield some


def order_shard(out: Path, shard: Shard, settings: Settings) -> Result:
    """Inputs: the shard's kept files, the crawl's table of manifests, then every table of the dropped files."""
    gone: dict[str, dict[str, str]] = {}
    for file in shard.inputs[2:]:
        for row in read_rows(out / file, ["repo", "path"]):
            gone.setdefault(row["repo"], {})[row["path"]] = ""
    for row in read_rows(out / shard.inputs[1]):
        gone.setdefault(row["repo"], {})[row["path"]] = row["text"]
    documents: list[dict[str, Any]] = []
    counts: dict[str, Any] = {"documents": 0, "files": 0, "bytes": 0}
    for repo, rows in groupby(read_rows(out / shard.inputs[0]), key=lambda row: row["repo"]):
        found, edges = repository_documents(repo, list(rows), gone.get(repo, {}), settings)
        documents += [vars(document) for document in found]
        add(counts, edges)
        for document in found:
            sizes = (len(text) if text.isascii() else len(text.encode()) for text in document.texts)
            size = {"documents": 1, "files": len(document.paths), "bytes": sum(sizes)}
            add(counts, size | {"languages": {document.language: size}})
    return Result({"part": pa.Table.from_pylist(documents, DOCUMENTS)}, counts)


def repository_documents(
    repo: str, rows: list[dict[str, Any]], gone: dict[str, str], settings: Settings
) -> tuple[list[Document], dict[str, Any]]:
    """The documents of one repository, by their smallest path, and how well they respect its dependencies.

    rows: its kept files {path, language, text}. gone: {path: text} of files that were there and were dropped; the text
    may be "". The counts are of edges between kept files: all of them, those whose dependency stands first, and by
    language the same for all and for strong edges.
    """
    files = {row["path"]: row["text"] for row in rows}
    languages = {row["path"]: row["language"] for row in rows}
    edges = repository.imports(gone | files)
    documents = []
    place: dict[str, int] = {}
    for paths in repository.order(files, edges, settings.order, settings.seed):
        place |= {path: number for number, path in enumerate(paths)}
        sizes: Counter[str] = Counter()
        for path in paths:
            sizes[languages[path]] += len(files[path])
        texts = repository.pieces(((path, files[path]) for path in paths), settings.path_comment)
        documents.append(Document(repo, max(sorted(sizes), key=lambda name: sizes[name]), paths, texts))
    counts: dict[str, Any] = {"dependencies": 0, "dependencies_first": 0, "dependencies_dropped": 0}
    kept: dict[str, Counter[str]] = {}  # by language
    for path in files:
        for dependency, strong in edges[path].items():
            if dependency not in files:
                counts["dependencies_dropped"] += 1
                continue
            first = place[dependency] < place[path]
            mine = kept.setdefault(languages[path], Counter(all=0, first=0, strong=0, strong_first=0))
            mine["all"] += 1
            mine["first"] += first
            mine["strong"] += strong
            mine["strong_first"] += strong and first
    for mine in kept.values():
        counts["dependencies"] += mine["all"]
        counts["dependencies_first"] += mine["first"]
    counts |= {"edges": kept} if kept else {}
    return documents, counts
