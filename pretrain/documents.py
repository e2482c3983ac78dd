"""Where documents come from: a corpus (pretrain/corpus), or files of finished prose, cut into pieces of bounded size.

Prose (English, Chinese, anything) is a .parquet or .jsonl file with a column or key `text`, one document a row, or a
folder of such files: the form in which cleaned web text is published. It is taken as it is.

A piece is read alone, wherever an executor puts it: a part of a corpus, some row groups of a parquet file, or a range
of bytes of a .jsonl file with the lines that begin in it.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from . import corpus
from .corpus import Document
from .corpus.stage import fingerprint

SUFFIXES = (".parquet", ".jsonl")
# About as much text as a part of a corpus holds.
PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Piece:
    """One part of a corpus (`corpus`), or the row groups or bytes [start, stop) of a prose file."""

    path: Path
    fingerprint: str
    corpus: bool
    start: int = 0
    stop: int = 0


def pieces(source: Path) -> list[Piece]:
    """The pieces of a source in their order.

    Raises FileNotFoundError for what is neither a finished corpus nor a prose file or a folder of them; ValueError for
    a damaged file, and for one without `text`.
    """
    source = Path(source).expanduser().resolve()
    files = [source] if source.is_file() else sorted(p for p in source.glob("*") if p.suffix in SUFFIXES)
    if not files or (source / "manifest.json").is_file():
        return [Piece(path, digest, True) for path, digest in corpus.parts(source)]
    return [piece for file in files for piece in _pieces_of_prose(file)]


def text_bytes(piece: Piece) -> int:
    """About how many bytes of text a piece holds, known without reading it."""
    if piece.path.suffix == ".jsonl":
        return piece.stop - piece.start
    metadata = pq.read_metadata(piece.path)
    groups = range(metadata.num_row_groups) if piece.corpus else range(piece.start, piece.stop)
    return sum(metadata.row_group(group).total_byte_size for group in groups)


def read(piece: Piece) -> Iterator[Document]:
    """The documents of a piece, read a few at a time; prose has no repository, and one text a document."""
    if piece.corpus:
        yield from corpus.read(piece.path)
    else:
        rows = _rows(piece) if piece.path.suffix == ".parquet" else _lines(piece)
        for text in rows:
            if text:
                yield Document(piece.path.stem, "Text", [""], [text.replace("\r\n", "\n").replace("\r", "\n")])


def _pieces_of_prose(file: Path) -> list[Piece]:
    status = file.stat()
    state = fingerprint(file.name, status.st_size, status.st_mtime_ns)  # terabytes are not read to be hashed
    if file.suffix == ".jsonl":
        cuts: Iterable[int] = range(0, status.st_size, PIECE_BYTES)
        end = status.st_size
    elif file.suffix == ".parquet":
        try:
            metadata = pq.read_metadata(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: not a parquet file, or damaged ({error}); fetch it again") from error
        if "text" not in metadata.schema.to_arrow_schema().names:
            raise ValueError(f"{file}: has no column `text`; prose has one document in each row, under `text`")
        cuts, size = [], PIECE_BYTES
        for group in range(metadata.num_row_groups):
            if size >= PIECE_BYTES:
                cuts.append(group)
                size = 0
            size += metadata.row_group(group).total_byte_size
        end = metadata.num_row_groups
    else:
        raise FileNotFoundError(f"{file}: no corpus, and no prose either ({', '.join(SUFFIXES)})")
    cuts = [*cuts, end]
    return [
        Piece(file, fingerprint(state, start, stop), False, start, stop) for start, stop in itertools.pairwise(cuts)
    ]


def _rows(piece: Piece) -> Iterator[str | None]:
    groups = range(piece.start, piece.stop)
    for batch in pq.ParquetFile(piece.path).iter_batches(batch_size=64, row_groups=groups, columns=["text"]):
        yield from batch.column(0).to_pylist()


def _lines(piece: Piece) -> Iterator[str | None]:
    with piece.path.open("rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # what began before belongs to the piece before
        while file.tell() < piece.stop:
            start = file.tell()
            line = file.readline()
            try:
                text = json.loads(line)["text"] if line.strip() else None
                if text is not None and not isinstance(text, str):
                    raise TypeError
                if text and b"\\u" in line:  # halves of characters, which JSON lets stand alone
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'{piece.path}: the line at byte {start} is no JSON object with a "text"; mend or remove it'
                ) from None
            yield text
