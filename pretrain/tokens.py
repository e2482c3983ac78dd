"""Documents -> token files: plain ids, no control tokens; FIM and packing are the loader's.

A folder holds the splits `train` and `valid`, each as three flat little-endian arrays that are memory-mapped:
`.ids` (uint16, or uint32 for vocabularies past 65,536), `.files` (uint64 token position after each file) and
`.documents` (uint64 number of files up to each document's end). Beside them lie the tokenizer and `manifest.json`,
which is written last: a folder without it is unfinished.

Encoding is a stage like those of the corpus (corpus/stage.py): each piece of the source becomes one table under
OUT/parts/, on any executor, and a second run encodes only what is new or changed. The tables are then joined in the
order of the source, so the arrays are the same bytes for any number of shards, workers and machines.

The ids are those of the `tokenizers` library. With DeepSeek's pre-tokenizer it encodes some 1 MB/s, and `kitoken`, from
the same file, some twenty times that; so kitoken is used where it is installed and gives the same ids on a sample of
the source and on texts that are known to trip encoders.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from convert.gguf_tokenizer import PRE_TOKENIZERS
from deepseek_coder import tokenizer as vocabulary
from deepseek_coder.tokenizer import Tokenizer

from . import documents
from .corpus import Document, decontaminate, minhash, report, stage
from .corpus.executors import Run, running
from .corpus.order import batched
from .corpus.quality import Quality
from .corpus.stage import Result, Shard
from .files import replacing, write_json, writing

SPLITS = ("train", "valid")
PARTS = pa.schema([("ids", pa.large_binary()), ("files", pa.list_(pa.uint32())), ("bytes", pa.uint64())])

# Text on which kitoken is compared with tokenizers before it is trusted with the rest.
_SAMPLE_BYTES = 300_000
_TRAPS = (
    "<|EOT|><｜fim▁begin｜><｜end▁of▁sentence｜><pad><|User|>",
    "\r\n\t\t  \n\n\n   x  =  1\n" * 3,
    "í õ ÷ Á ý À ÿ ö 中文，标点。 日本語 한국어 हिन्दी 👩‍👩‍👧 \u0301 \ufeff \u200b \x00\x7f",
    "12345 1_000.5e-7 0xFFFF a1b2 'd've I'LL -->=>>= /**/",
    "a" * 5000 + " " * 5000 + "\n" * 500,
    "",
)


class TokenFiles:
    """One split of a finished token folder.

    ids: (tokens,) memory-mapped; file_ends: (files,) int64; document_ends: (documents,) int64. Raises
    FileNotFoundError or ValueError for a missing, unfinished or damaged folder.
    """

    def __init__(self, path: Path, split: str):
        self.path = path
        manifest = _record(path / "manifest.json")
        if manifest is None:
            raise FileNotFoundError(
                f"{path}: no finished token folder; run `python -m pretrain tokens CORPUS --tokenizer DIR --out {path}`"
            )
        totals = manifest["splits"][split]
        dtype = np.dtype(manifest["dtype"])
        if totals["tokens"] == 0:
            raise ValueError(f"{path}: the split {split!r} is empty; use a larger corpus or another --valid share")
        self.tokenizer_sha256: str = manifest["key"]["tokenizer"]
        self.ids = self._map(f"{split}.ids", dtype, totals["tokens"])
        self.file_ends = np.array(self._map(f"{split}.files", np.dtype("<u8"), totals["files"]), np.int64)
        self.document_ends = np.array(self._map(f"{split}.documents", np.dtype("<u8"), totals["documents"]), np.int64)

    def in_epoch(self, starts: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Which samples an epoch has: here all of them, in a mixture (mixture.py) a part."""
        return np.ones(len(starts), bool)

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        file = self.path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != count * dtype.itemsize:
            raise ValueError(f"{file}: {size} bytes, {count * dtype.itemsize} expected; make the token folder again")
        return np.memmap(file, dtype, mode="r")


def build(
    source: Path,
    tokenizer: Tokenizer,
    out: Path,
    valid: float = 0.01,
    run: Run | None = None,
    progress: bool = True,
    screening: Quality | None = None,
) -> dict[str, Any]:
    """Encode a corpus, or prose (documents.py), into a token folder and return its manifest.

    valid: share of documents held out, evenly spread over the source. run: the executor; default this process.
    screening: documents of prose that hold sequences of its `tests` are dropped, as files of a corpus are when it is
    built; its other fields are for code.
    Running it again brings the folder up to date with the source, and does nothing where it is.
    Raises ValueError if `out` holds tokens of another tokenizer or share, and for shards that failed.
    """
    if not 0 <= valid < 1:
        raise ValueError(f"--valid {valid} is not a share between 0 and 1")
    pieces = documents.pieces(source)
    out = Path(out).expanduser().resolve()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    settings = Encoding(hashlib.sha256(b"".join(tokenizer.files.values())).hexdigest(), dtype.str)
    tests = _benchmarks(screening or Quality())
    prints = [stage.fingerprint(p.fingerprint, tests) if tests and not p.corpus else p.fingerprint for p in pieces]
    key = {"inputs": stage.fingerprint(prints), "tokenizer": settings.tokenizer, "valid": valid}
    done = _record(out / "manifest.json")
    if done and any(done["key"].get(name) != key[name] for name in ("tokenizer", "valid")):
        raise ValueError(f"{out}: holds tokens made with another tokenizer or share; choose another --out")
    code = (sys.modules[__name__], documents, vocabulary, decontaminate, minhash)
    if done and done["key"] == key and done.get("code") == stage.code_version(code) and _whole(out, done):
        return done
    with writing(out / "tokenizer"):
        (out / "tokenizer").mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").unlink(missing_ok=True)  # unfinished from here on
        tokenizer.save(out / "tokenizer")
    kind = chosen_encoder(tokenizer, _sample(pieces))
    inputs = [(piece, kind, None if piece.corpus else tests) for piece in pieces]
    shards = [Shard(f"{n:05}", *given) for n, given in enumerate(zip(inputs, prints, strict=True))]
    with running(run or Run()) as works:
        made = stage.run("parts", out, encode_shard, shards, settings, code, works, progress)
    if failed := stage.failures(out, "parts"):
        raise ValueError(f"{failed}; the others are kept: remove the cause and run the same command again")
    totals = _join([out / record["outputs"]["part"]["file"] for record in made["shards"].values()], out, valid, dtype)
    manifest = {"key": key, "dtype": dtype.str, "code": made["code"], "splits": totals}
    manifest |= {"dropped": made["counts"]["dropped"]} if "dropped" in made["counts"] else {}
    write_json(out / "manifest.json", manifest)
    return manifest


def sections(out: Path) -> list[report.Section]:
    """What a report says of a finished token folder: tokens by split and language, lengths, time."""
    manifest, encoded = (json.loads((out / name).read_text()) for name in ("manifest.json", "parts/manifest.json"))
    counts = encoded["counts"]
    languages = sorted(counts["languages"].items(), key=lambda item: (-item[1]["tokens"], item[0]))
    lines = [*manifest["splits"].items(), *languages]
    rows = [
        (name, f"{t['documents']:,}", f"{t['files']:,}", f"{t['tokens']:,}", f"{t['bytes'] / max(1, t['tokens']):.2f}")
        for name, t in lines
    ]
    shown = languages[: report.LANGUAGES][::-1]
    bars = {"tokens": [made["tokens"] / 1e6 for _, made in shown]}
    plot = report.plotted([name for name, _ in shown], bars, "millions of tokens")
    header = ("split or language", "documents", "files", "tokens", "bytes a token")
    lengths = {int(power): number for power, number in counts["lengths"].items()}
    return [
        report.Section("Tokens", header, rows, plot=plot),
        report.histogram("Document lengths in tokens", "tokens", lengths),
        dataclasses.replace(report.seconds(out, counts["bytes"]), title="Time of encoding"),
    ]


# ---- encoding --------------------------------------------------------------------------------------------------------

Encoder = Callable[[list[str]], list[list[int]]]

# Characters. Ids are 36 bytes each as Python's numbers: those of large documents would be new pages from the kernel.
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Encoding:
    """What decides the ids: the SHA-256 of the tokenizer's files, and the numbers they are stored as."""

    tokenizer: str
    dtype: str


def encode_shard(out: Path, shard: Shard, settings: Encoding) -> Result:
    """Inputs: a piece of the source, the encoder's name, and for prose the benchmarks. One row a document, in order."""
    piece, kind, tests = shard.inputs
    encode = _loaded(str(out / "tokenizer"), settings.tokenizer, kind)
    rows: dict[str, list[Any]] = {name: [] for name in PARTS.names}
    counts: dict[str, Any] = {"documents": 0, "files": 0, "bytes": 0, "tokens": 0}
    dropped: list[dict[str, str]] = []
    found = documents.read(piece)
    number = np.dtype(settings.dtype).char  # struct has the same letters, and is faster with lists of Python's numbers
    for document in _without_tests(found, decontaminate.load(*tests), dropped) if tests else found:
        ids: list[bytes] = []
        lengths: list[int] = []
        for texts in batched(document.texts, len, _AT_ONCE):
            for file in encode(texts):
                ids.append(struct.pack(f"<{len(file)}{number}", *file))
                lengths.append(len(file))
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in document.texts)
        rows["ids"].append(b"".join(ids))
        rows["files"].append(lengths)
        rows["bytes"].append(size)
        made = {"documents": 1, "files": len(lengths), "bytes": size, "tokens": sum(lengths)}
        length = str(max(1, sum(lengths)).bit_length() - 1)
        stage.add(counts, made | {"languages": {document.language: made}, "lengths": {length: 1}})
    tables = {"part": pa.table(rows, PARTS)}
    if dropped:
        stage.add(counts, {"dropped": {"test data": len(dropped)}})
        tables["dropped"] = pa.Table.from_pylist(dropped, stage.DROPPED)
    return Result(tables, counts)


def _benchmarks(screening: Quality) -> tuple[Any, ...] | None:
    """The arguments of decontaminate.load. Raises FileNotFoundError or ValueError for benchmarks that are of no use."""
    if not screening.tests:
        return None
    tests = (screening.tests, decontaminate.versions(screening.tests), screening.ngram, screening.shortest)
    decontaminate.load(*tests)
    return tests


def _without_tests(
    found: Iterator[Document], tests: decontaminate.Tests, dropped: list[dict[str, str]]
) -> Iterator[Document]:
    """The documents without test data; of the others, how many documents of the piece stand before each."""
    number = itertools.count()
    for some in batched(found, lambda document: sum(map(len, document.texts))):
        hits = tests.found_in(["".join(document.texts).encode() for document in some])
        for document, hit, place in zip(some, hits, number):  # noqa: B905 (an iterator over all documents)
            if hit:
                dropped.append({"repo": document.repo, "path": str(place), "reason": "test data"})
            else:
                yield document


def chosen_encoder(tokenizer: Tokenizer, sample: list[str]) -> str:
    """ "kitoken" if it is installed and gives the ids of the tokenizers library; else that, and a line on stderr."""
    try:
        wanted = tokenizer.encode_batch(sample)
        if _kitoken(tokenizer)(sample) == wanted:
            return "kitoken"
        why = "it gives other ids on a sample"
    except ModuleNotFoundError:
        why = "it is not installed"
    except Exception as error:  # its own error types are not documented; whatever it is, the other library can do it
        why = f"it cannot read this tokenizer: {error}"
    print(f"encoding with tokenizers, some nine times slower than kitoken ({why})", file=sys.stderr)
    return "tokenizers"


def _kitoken(tokenizer: Tokenizer) -> Encoder:
    import kitoken

    if "tokenizer.json" not in tokenizer.files:
        raise ValueError("only tokenizer.json is read by it here")
    # Control tokens are taken out, or their strings in a text would become their ids.
    raw = json.loads(tokenizer.files["tokenizer.json"])
    raw["added_tokens"] = [t for t in raw.get("added_tokens", []) if t["content"] not in tokenizer.control]
    raw["post_processor"] = None

    def encoder() -> Encoder:
        made = kitoken.Kitoken.from_tokenizers(json.dumps(raw).encode())
        return lambda texts: made.encode_all(texts, False)

    whole = encoder()
    rules, normalizer = PRE_TOKENIZERS["deepseek-coder"], raw.get("normalizer")
    if (raw.get("pre_tokenizer") or {}).get("pretokenizers") != rules or (normalizer and normalizer != _NO_NORMALIZER):
        return whole
    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"]["pretokenizers"] = [split, rules[-1]]
    return partial(_encode, encoder(), whole)


# DeepSeek cuts a text by five rules one after the other, each in the pieces of the one before, so that most of the time
# of encoding is calls of expressions on single words. Without the characters of the fourth rule (CJK) this one
# expression makes the same pieces. Since line ends are pieces of their own, a text may be encoded in runs of lines:
# those with such characters by the rules, and all others, nearly everything, by the expression.
_WORDS = r"[\r\n]|\s?\p{L}+|\s?\p{P}+|\p{N}"
_NO_NORMALIZER = {"type": "Sequence", "normalizers": []}
_CJK = re.compile(PRE_TOKENIZERS["deepseek-coder"][3]["pattern"]["Regex"])


def _encode(plain: Encoder, whole: Encoder, texts: list[str]) -> list[list[int]]:
    """The ids of `whole`; `plain` gives the same for lines without CJK characters."""
    runs = [_runs(text) for text in texts]
    ids = (
        iter(plain([run for some in runs for run in some[::2]])),
        iter(whole([r for some in runs for r in some[1::2]])),
    )
    return [
        next(ids[0]) if len(some) == 1 else [i for number in range(len(some)) for i in next(ids[number % 2])]
        for some in runs
    ]


def _runs(text: str) -> list[str]:
    """The text cut before and behind every run of lines with CJK characters; these are the second, the fourth, ..."""
    runs, begin = [], 0
    match = None if text.isascii() else _CJK.search(text)
    while match:
        start = text.rfind("\n", begin, match.start()) + 1 or begin
        runs.append(text[begin:start])
        begin = start
        while match and text.find("\n", start, match.start()) == -1:
            start = text.find("\n", match.end()) + 1 or len(text)
            match = _CJK.search(text, start)
        runs.append(text[begin:start])
        begin = start
    return [*runs, text[begin:]]


@lru_cache(maxsize=2)
def _loaded(folder: str, sha256: str, kind: str) -> Encoder:
    """The encoder of this process; sha256 tells apart tokenizers that lay in one folder."""
    tokenizer = Tokenizer.load(folder)
    return _kitoken(tokenizer) if kind == "kitoken" else tokenizer.encode_batch


def _sample(pieces: list[documents.Piece]) -> list[str]:
    """Traps, and the first documents of a few pieces from all over the source."""
    sample = list(_TRAPS)
    chosen = pieces[:: max(1, len(pieces) // 8)]
    for piece in chosen:
        size = 0
        for text in (text for document in documents.read(piece) for text in document.texts):
            sample.append(text)
            size += len(text)
            if size > _SAMPLE_BYTES // len(chosen):
                break
    return sample


# ---- joining ---------------------------------------------------------------------------------------------------------


def _join(parts: list[Path], out: Path, valid: float, dtype: np.dtype) -> dict[str, dict[str, int]]:
    """Writes the arrays of both splits, whole or not at all, and returns their totals."""
    totals = {split: {"documents": 0, "files": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    with ExitStack() as stack:
        files = {}
        for split in SPLITS:
            for suffix in (".ids", ".files", ".documents"):
                temporary = stack.enter_context(replacing((out / split).with_suffix(suffix)))
                files[split, suffix] = stack.enter_context(temporary.open("wb"))
        number = 0
        for part in parts:
            for batch in pq.ParquetFile(part).iter_batches(batch_size=1024):
                ids, lengths, sizes = (batch.column(name) for name in PARTS.names)
                tokens, counts = lengths.flatten().to_numpy(), lengths.value_lengths().to_numpy()
                held_out = _held_out(np.arange(number, number + len(batch)), valid)
                for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
                    total = totals[split]
                    for text in ids.filter(pa.array(chosen)):
                        files[split, ".ids"].write(text.as_buffer())
                    ends = total["tokens"] + np.cumsum(tokens[np.repeat(chosen, counts)], dtype=np.uint64)
                    files[split, ".files"].write(ends.astype("<u8").tobytes())
                    documents_end = total["files"] + np.cumsum(counts[chosen], dtype=np.uint64)
                    files[split, ".documents"].write(documents_end.astype("<u8").tobytes())
                    total["documents"] += int(chosen.sum())
                    total["files"] += len(ends)
                    total["tokens"] = int(ends[-1]) if len(ends) else total["tokens"]
                    total["bytes"] += int(sizes.to_numpy()[chosen].sum())
                number += len(batch)
    return totals


def _whole(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether all arrays of a finished folder have the sizes that its manifest tells."""
    sizes = {}
    for split, totals in manifest["splits"].items():
        sizes[f"{split}.ids"] = totals["tokens"] * np.dtype(manifest["dtype"]).itemsize
        sizes |= {f"{split}.{name}": totals[name] * 8 for name in ("files", "documents")}
    return all((out / file).is_file() and (out / file).stat().st_size == size for file, size in sizes.items())


def _held_out(numbers: np.ndarray, valid: float) -> np.ndarray:
    """Every (1 / valid)-th document of the source."""
    return np.floor((numbers + 1) * valid) > np.floor(numbers * valid)


def _record(file: Path) -> dict[str, Any] | None:
    """The manifest of a token folder; None if there is none. Raises ValueError for any other file."""
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
        for split in SPLITS:
            record["splits"][split]["tokens"]
        record["key"]["tokenizer"], record["dtype"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file}: not the record of a token folder, or damaged; name another folder, or delete this one and make "
            "it again"
        ) from None
    return record
