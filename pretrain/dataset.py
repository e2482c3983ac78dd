"""Token files -> training windows, as a pure function of (seed, global window number).

The hard idea: there is **no loader state**. Each epoch has a plan, made from the stored lengths alone: which documents
become FIM samples, which share a window, in which order the windows come. Window number i belongs to the epoch whose
plan covers it. Resuming is one integer, and any number of GPUs and workers sees the same samples.

A document longer than a window is split between its files, and a file only if it is itself too long. FIM happens in
the last file of a sample, whose text is rebuilt from its ids; the files before it are the beginning of the prefix. A
document drawn for FIM reserves room for the three control tokens and for `fim.SLACK` tokens of re-encoding, and stays
plain if it would not fit; a FIM sample is never truncated.

With packing "concat" the documents stand in one row instead, cut where a window ends, FIM samples too. A place in the
row must be known without encoding anything, so a FIM sample fills up the room that it reserved.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek_coder.tokenizer import Tokenizer

from . import fim, grammars
from .mixture import Mix, Mixture
from .packing import BLOCK, Pieces, concat, pack
from .tokens import TokenFiles

RESERVED = fim.SENTINELS + fim.SLACK  # tokens that a FIM sample may be longer than its document

# One document in a window costs at least this many tokens of room; it bounds how many a window holds.
MIN_TOKENS_PER_DOCUMENT = 32


@dataclass(frozen=True)
class Window:
    """tokens, targets (window,) int64, targets -100 where there is nothing to predict; cu_seqlens int32, fixed length:
    trailing repeats of the total are empty documents, and the unused tail is a document of its own."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class Samples:
    """Documents cut to at most a window: token ranges [start, end) and where each one's last file begins.

    whole_file: the last file is not a part of a file, so FIM may cut it.
    """

    start: np.ndarray
    end: np.ndarray
    last_file: np.ndarray
    whole_file: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.start


class Plan(NamedTuple):
    """One epoch: window w holds, of the sample samples[i], the tokens begins[i] .. stops[i], for i in starts[w] ..
    starts[w + 1]. infill[sample]: it becomes FIM."""

    samples: np.ndarray
    begins: np.ndarray
    stops: np.ndarray
    starts: np.ndarray
    infill: np.ndarray


def split_documents(file_ends: np.ndarray, document_ends: np.ndarray, capacity: int, overhead: int = 0) -> Samples:
    """Cut documents longer than `capacity` tokens between their files, and longer files wherever they fill a sample.

    file_ends: (files,) token position after each file; document_ends: (documents,) number of files up to its end.
    overhead: control tokens that every sample costs beside its own. The samples come in the order of their tokens.
    """
    ends = file_ends.tolist()
    starts = [0, *ends[:-1]]
    rows: list[tuple[int, int, int, bool]] = []
    long: list[range] = []
    first = 0
    for stop in document_ends.tolist():
        if first < stop and ends[stop - 1] - starts[first] <= capacity:
            rows.append((starts[first], ends[stop - 1], starts[stop - 1], True))
        elif first < stop:
            long.append(range(first, stop))
        first = stop
    for block in range(0, len(long), BLOCK):
        rows += _runs(long[block : block + BLOCK], starts, ends, capacity, overhead)
    table = np.array(sorted(row for row in rows if row[0] < row[1]), dtype=np.int64).reshape(-1, 4)
    return Samples(table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(bool))


def _runs(
    documents: list[range], starts: list[int], ends: list[int], capacity: int, overhead: int
) -> list[tuple[int, int, int, bool]]:
    """Long documents as runs of whole files that fill windows together.

    Cut one by one, each where the next file does not fit any more, documents leave 7 % of 16K windows empty, and there
    are too few short ones to fill that. So each window begins with as long a run as it holds, of the document with most
    files left, and is then filled with runs of others, every time of the one whose next file fills it best.
    """
    rows: list[tuple[int, int, int, bool]] = []
    at = [files.start for files in documents]  # the next file of each
    heads: list[tuple[int, int]] = []  # (tokens of the next file, document), sorted

    def show(document: int) -> None:
        stop = documents[document].stop
        while at[document] < stop and ends[at[document]] - starts[at[document]] > capacity:
            begin, end = starts[at[document]], ends[at[document]]
            cuts = [*range(begin, end, capacity), end]
            rows.extend((start, following, start, False) for start, following in itertools.pairwise(cuts))
            at[document] += 1
        if at[document] < stop:
            insort(heads, (ends[at[document]] - starts[at[document]], document))

    def take(document: int, room: int) -> int:
        """The room that is left behind a run of the document."""
        first = at[document]
        while at[document] < documents[document].stop and ends[at[document]] - starts[first] + overhead <= room:
            at[document] += 1
        last = at[document] - 1
        rows.append((starts[first], ends[last], starts[last], True))
        show(document)
        return room - (ends[last] - starts[first]) - overhead

    for document in range(len(documents)):
        show(document)
    waiting = [(-len(files), document) for document, files in enumerate(documents)]
    heapify(waiting)
    while waiting:
        _, document = heappop(waiting)
        if at[document] == documents[document].stop:
            continue
        heads.pop(bisect_left(heads, (ends[at[document]] - starts[at[document]], document)))
        room = take(document, capacity + overhead)
        heappush(waiting, (at[document] - documents[document].stop, document))
        while (best := bisect_left(heads, (room - overhead + 1, -1)) - 1) >= 0:
            room = take(heads.pop(best)[1], room)
    return rows


class Windows:
    """The training windows of a token folder; `windows[i]` for any i >= 0, epoch after epoch."""

    def __init__(
        self,
        tokens: TokenFiles | Mixture,
        tokenizer: Tokenizer,
        window: int,
        seed: int = 0,
        fim_rate: float = 0.5,
        fim_loss: str = "all",
        fim_modes: Sequence[str] = ("psm",),
        fim_spans: Sequence[str] = ("char",),
        packing: str = "best_fit",
    ):
        """window: tokens in a window. fim_loss: "all", or "middle" to train FIM samples on middle and EOS only. The
        others: see `recipe.Data`.

        Raises ValueError for an empty folder, a window without room for text, a tokenizer without FIM's tokens, or
        syntax spans without the grammars: on another machine the samples would be others.
        """
        if fim_rate and tokenizer.fim_ids is None:
            raise ValueError("fim_rate is above 0, but the tokenizer has no FIM tokens; set data.fim_rate = 0")
        if fim_rate and "ast" in fim_spans and grammars.missing():
            raise ValueError(
                f'data.fim_spans holds "ast", which needs the packages {", ".join(grammars.missing())}; install the '
                "extra [corpus], or take char and line"
            )
        self.tokens, self.tokenizer, self.window, self.seed = tokens, tokenizer, window, seed
        self.fim_rate, self.fim_loss, self.fim_modes, self.fim_spans = fim_rate, fim_loss, fim_modes, fim_spans
        self.packing = packing
        self.eos = tokenizer.require(tokenizer.eos_id, "EOS")
        self.overhead = len(fim.plain_sample(tokenizer, [], self.eos))
        if window <= self.overhead:
            raise ValueError(
                f"data.window is {window}, and a document needs {self.overhead} control tokens; take more than that"
            )
        # In a row documents are cut by windows, not by files.
        capacity = window - self.overhead if packing == "best_fit" else int(np.iinfo(np.int64).max)
        self.samples = split_documents(tokens.file_ends, tokens.document_ends, capacity, self.overhead)
        if not len(self.samples.start):
            raise ValueError(f"{tokens.path}: no documents in it; run `python -m pretrain tokens` on a larger corpus")
        self.max_documents = max(1, window // MIN_TOKENS_PER_DOCUMENT)
        self._ends = [0]  # windows up to the end of each epoch so far
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def drawn(self, epoch: int) -> np.ndarray:
        """(samples,) bool: those that this epoch turns into FIM samples."""
        reserved = self.samples.lengths + self.overhead + RESERVED
        chosen = fim.uniform(self.seed, epoch, np.arange(len(reserved)), fim.IS_FIM) < self.fim_rate
        return chosen & self.samples.whole_file & ((reserved <= self.window) | (self.packing == "concat"))

    def epoch_of(self, index: int) -> tuple[int, int]:
        """(epoch, window within it) of global window `index`."""
        while index >= self._ends[-1]:
            self._ends.append(self._ends[-1] + self.windows_in(len(self._ends) - 1))
        epoch = int(np.searchsorted(self._ends, index, side="right")) - 1
        return epoch, index - self._ends[epoch]

    def windows_in(self, epoch: int) -> int:
        return len(self._plan(epoch).starts) - 1

    def __getitem__(self, index: int) -> Window:
        epoch, within = self.epoch_of(index)
        plan = self._plan(epoch)
        pieces = []
        for i in range(plan.starts[within], plan.starts[within + 1]):
            ids, given = self._document(int(plan.samples[i]), epoch, bool(plan.infill[plan.samples[i]]))
            pieces.append((ids, given, int(plan.begins[i]), int(plan.stops[i])))
        return self._join(pieces)

    def _make_plan(self, epoch: int) -> "Plan":
        count = len(self.samples.start)
        infill = self.drawn(epoch)
        lengths = self.samples.lengths + self.overhead + RESERVED * infill
        order = np.argsort(fim.uniform(self.seed, epoch, np.arange(count), fim.DOCUMENT_ORDER), kind="stable")
        order = order[self.tokens.in_epoch(self.samples.start, self.seed, epoch)[order]]
        if self.packing == "concat":
            pieces = concat(lengths, order, self.window)
        else:
            items, ends = pack(lengths, order, self.window, self.max_documents)
            pieces = Pieces(items, np.zeros_like(items), lengths[items], ends)
        bins = np.split(np.arange(len(pieces.items)), pieces.ends[:-1])
        shuffled = np.argsort(fim.uniform(self.seed, epoch, np.arange(len(bins)), fim.BIN_ORDER), kind="stable")
        starts = np.concatenate([[0], np.cumsum([len(bins[b]) for b in shuffled])])
        chosen = np.concatenate([bins[b] for b in shuffled])
        return Plan(pieces.items[chosen], pieces.begins[chosen], pieces.stops[chosen], starts, infill)

    def _document(self, sample: int, epoch: int, infill: bool) -> tuple[list[int], int]:
        """(ids of one training document, how many of its first tokens are not to be predicted)."""
        start, end = int(self.samples.start[sample]), int(self.samples.end[sample])
        ids = self.tokens.ids[start:end]
        if infill:
            key = self.seed, epoch, sample
            last = int(self.samples.last_file[sample]) - start
            text = self.tokenizer.decode(ids[last:].tolist(), skip_special=False)
            cut = fim.hole(text, fim.choose(self.fim_spans, *key, fim.SPAN), *key)
            if cut is not None:
                mode = fim.choose(self.fim_modes, *key, fim.MODE)
                made, given = fim.fim_sample(self.tokenizer, ids[:last].tolist(), text, cut, self.eos, mode)
                if len(made) <= len(ids) + self.overhead + RESERVED:
                    return made, given if self.fim_loss == "middle" else 1
        return fim.plain_sample(self.tokenizer, ids.tolist(), self.eos), 1

    def _join(self, pieces: list[tuple[list[int], int, int, int]]) -> Window:
        """pieces: (ids of a document, how many are given, begin and end of its part in the window)"""
        tokens = torch.full((self.window,), self.eos)
        targets = torch.full((self.window,), -100)
        ends = [0]
        for ids, given, begin, stop in pieces:
            part = torch.tensor(ids[begin:stop], dtype=torch.int64)
            at = ends[-1] - begin  # where the document's first token is, or would be
            tokens[ends[-1] : ends[-1] + len(part)] = part
            first, last = max(begin, given - 1), min(stop, len(ids) - 1)
            if first < last:  # the last token of a part predicts the first one of the next window
                targets[at + first : at + last] = torch.tensor(ids[first + 1 : last + 1])
            ends.append(ends[-1] + (len(part) if self.packing == "best_fit" else stop - begin))
        if self.packing == "concat":
            ends = [0, self.window]
        ends += [self.window] * (self.max_documents + 2 - len(ends))
        return Window(tokens, targets, torch.tensor(ends, dtype=torch.int32))


def join_windows(windows: list[Window]) -> Window:
    """A micro-batch: windows one after another, their documents numbered through."""
    size = len(windows[0].tokens)
    shifted = [w.cu_seqlens[:-1] + i * size for i, w in enumerate(windows)]
    total = torch.tensor([size * len(windows)], dtype=torch.int32)
    return Window(
        torch.cat([w.tokens for w in windows]),
        torch.cat([w.targets for w in windows]),
        torch.cat([*shifted, total]),
    )


def load_windows(
    source: str | Path | Mix,
    split: str,
    window: int,
    seed: int,
    fim_rate: float,
    fim_loss: str,
    fim_modes: Sequence[str] = ("psm",),
    fim_spans: Sequence[str] = ("char",),
    packing: str = "best_fit",
) -> Windows:
    """The windows of one split ("train" or "valid") of a folder made by `python -m pretrain tokens`, or of several."""
    files = Mixture(source, split) if isinstance(source, Mix) else TokenFiles(Path(source), split)
    tokenizer = Tokenizer.load(files.path / "tokenizer")
    return Windows(files, tokenizer, window, seed, fim_rate, fim_loss, fim_modes, fim_spans, packing)
