"""Files become documents: in languages whose imports are read, one document for each group of files that import each
other, dependencies first (deepseek_coder/repository.py); in the others one document for each file, as DeepSeek did
for the languages that it did not order.

A document keeps its files apart, each with its path comment, because what comes later needs the borders: a document
that is too long is split between files, and only the last file is cut for infilling. Joined, its texts are the
document.

Dependencies are resolved in the repository as it was crawled: a package whose empty `__init__.py` the filter dropped is
still a package. A dependency on a dropped file is counted and otherwise ignored.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from deepseek_coder import repository

from .stage import Result, Shard, add, read_rows

DOCUMENTS = pa.schema(
    [
        ("repo", pa.string()),
        ("language", pa.string()),
        ("paths", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Document:
    """Files of one repository in training order; "".join(texts) is what the model reads."""

    repo: str
    language: str
    paths: list[str]
    texts: list[str]


def order_shard(out: Path, shard: Shard, settings: None) -> Result:
    """Inputs: the shard's kept files, then every table of its dropped ones."""
    gone: dict[str, list[str]] = {}
    for file in shard.inputs[1:]:
        for row in read_rows(out / file, ["repo", "path"]):
            gone.setdefault(row["repo"], []).append(row["path"])
    documents: list[dict[str, Any]] = []
    counts: dict[str, Any] = {"documents": 0, "files": 0, "bytes": 0}
    for repo, rows in groupby(read_rows(out / shard.inputs[0]), key=lambda row: row["repo"]):
        found, edges = repository_documents(repo, list(rows), gone.get(repo, []))
        documents += [vars(document) for document in found]
        add(counts, edges)
        for document in found:
            size = {"documents": 1, "files": len(document.paths), "bytes": sum(len(t.encode()) for t in document.texts)}
            add(counts, size | {"languages": {document.language: size}})
    return Result({"part": pa.Table.from_pylist(documents, DOCUMENTS)}, counts)


def repository_documents(
    repo: str, rows: list[dict[str, Any]], gone: list[str]
) -> tuple[list[Document], dict[str, int]]:
    """The documents of one repository, by their smallest path, and how well they respect its dependencies.

    rows: its kept files {path, language, text}. gone: paths that were there and were dropped.
    """
    files = {row["path"]: row["text"] for row in rows}
    languages = {row["path"]: row["language"] for row in rows}
    edges = repository.imports(dict.fromkeys(gone, "") | files)
    documents = []
    place: dict[str, int] = {}
    for paths in repository.order(files, edges):
        place |= {path: number for number, path in enumerate(paths)}
        texts = repository.pieces((path, files[path]) for path in paths)
        documents.append(Document(repo, languages[paths[0]], paths, texts))
    kept = [(path, dependency) for path in files for dependency in edges[path] if dependency in files]
    return documents, {
        "dependencies": len(kept),
        "dependencies_first": sum(place[dependency] < place[path] for path, dependency in kept),
        "dependencies_dropped": sum(len(edges[path]) for path in files) - len(kept),
    }
