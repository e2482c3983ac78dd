"""Token files -> training windows, as a pure function of (seed, global window number).

The hard idea: there is **no loader state**. Each epoch has a plan, made from the stored lengths alone: which documents
become FIM samples, which share a window, in which order the windows come. Window number i belongs to the epoch whose
plan covers it. Resuming is one integer, and any number of GPUs and workers sees the same samples.

A document longer than a window is split between its files, and a file only if it is itself too long. FIM happens in
the last file of a sample, whose text is rebuilt from its ids; the files before it are the beginning of the prefix. A
document drawn for FIM reserves room for the three control tokens and for `fim.SLACK` tokens of re-encoding, and stays
plain if it would not fit; a FIM sample is never truncated.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek_coder.tokenizer import Tokenizer

from . import fim
from .mixture import Mix, Mixture
from .packing import pack
from .tokens import TokenFiles

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
    """One epoch: window w holds the samples samples[starts[w] : starts[w + 1]]; infill[sample]: it becomes FIM."""

    samples: np.ndarray
    starts: np.ndarray
    infill: np.ndarray


def split_documents(file_ends: np.ndarray, document_ends: np.ndarray, capacity: int) -> Samples:
    """Cut documents longer than `capacity` tokens between their files, and longer files wherever they fill a sample.

    file_ends: (files,) token position after each file; document_ends: (documents,) number of files up to its end.
    """
    rows: list[tuple[int, int, int, bool]] = []
    file_starts = np.concatenate([[0], file_ends[:-1]]).astype(np.int64) if len(file_ends) else np.zeros(0, np.int64)
    first = 0
    for stop in document_ends.tolist():
        start = int(file_starts[first]) if first < stop else 0
        last, whole = start, True
        for f in range(first, stop):
            begin, end = int(file_starts[f]), int(file_ends[f])
            if end - start > capacity and begin > start:  # the file does not fit behind the ones before it
                rows.append((start, begin, last, whole))
                start = begin
            while end - start > capacity:  # the file alone is too long
                rows.append((start, start + capacity, start, False))
                start += capacity
            last, whole = max(begin, start), begin >= start
        if first < stop and int(file_ends[stop - 1]) > start:
            rows.append((start, int(file_ends[stop - 1]), last, whole))
        first = stop
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return Samples(table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(bool))


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
    ):
        """window: tokens in a window. fim_loss: "all", or "middle" to train FIM samples on middle and EOS only.

        Raises ValueError for an empty folder, a window without room for text, or a tokenizer without FIM's tokens.
        """
        if fim_rate and tokenizer.fim_ids is None:
            raise ValueError("fim_rate is above 0, but the tokenizer has no FIM tokens; set data.fim_rate = 0")
        self.tokens, self.tokenizer, self.window, self.seed = tokens, tokenizer, window, seed
        self.fim_rate, self.fim_loss = fim_rate, fim_loss
        self.eos = tokenizer.require(tokenizer.eos_id, "EOS")
        self.overhead = len(fim.plain_sample(tokenizer, [], self.eos))
        if window <= self.overhead:
            raise ValueError(
                f"data.window is {window}, and a document needs {self.overhead} control tokens; take more than that"
            )
        self.samples = split_documents(tokens.file_ends, tokens.document_ends, window - self.overhead)
        if not len(self.samples.start):
            raise ValueError(f"{tokens.path}: no documents in it; run `python -m pretrain tokens` on a larger corpus")
        self.max_documents = max(1, window // MIN_TOKENS_PER_DOCUMENT)
        self._ends = [0]  # windows up to the end of each epoch so far
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def drawn(self, epoch: int) -> np.ndarray:
        """(samples,) bool: those that this epoch turns into FIM samples."""
        reserved = self.samples.lengths + self.overhead + fim.SENTINELS + fim.SLACK
        chosen = fim.uniform(self.seed, epoch, np.arange(len(reserved)), fim.IS_FIM) < self.fim_rate
        return chosen & self.samples.whole_file & (reserved <= self.window)

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
        chosen = plan.samples[plan.starts[within] : plan.starts[within + 1]].tolist()
        return self._join([self._document(sample, epoch, bool(plan.infill[sample])) for sample in chosen])

    def _make_plan(self, epoch: int) -> "Plan":
        count = len(self.samples.start)
        infill = self.drawn(epoch)
        lengths = self.samples.lengths + self.overhead + (fim.SENTINELS + fim.SLACK) * infill
        order = np.argsort(fim.uniform(self.seed, epoch, np.arange(count), fim.DOCUMENT_ORDER), kind="stable")
        order = order[self.tokens.in_epoch(self.samples.start, self.seed, epoch)[order]]
        items, ends = pack(lengths, order, self.window, self.max_documents)
        bins = np.split(items, ends[:-1])
        shuffled = np.argsort(fim.uniform(self.seed, epoch, np.arange(len(bins)), fim.BIN_ORDER), kind="stable")
        starts = np.concatenate([[0], np.cumsum([len(bins[b]) for b in shuffled])])
        return Plan(np.concatenate([bins[b] for b in shuffled]), starts, infill)

    def _document(self, sample: int, epoch: int, infill: bool) -> tuple[list[int], int]:
        """(ids of one training document, how many of its first tokens are not to be predicted)."""
        start, end = int(self.samples.start[sample]), int(self.samples.end[sample])
        ids = self.tokens.ids[start:end]
        if infill:
            last = int(self.samples.last_file[sample]) - start
            text = self.tokenizer.decode(ids[last:].tolist(), skip_special=False)
            cut = fim.cuts(len(text), self.seed, epoch, sample)
            made, prompt = fim.fim_sample(self.tokenizer, ids[:last].tolist(), text, cut, self.eos)
            if len(made) <= len(ids) + self.overhead + fim.SENTINELS + fim.SLACK:
                return made, prompt if self.fim_loss == "middle" else 1
        return fim.plain_sample(self.tokenizer, ids.tolist(), self.eos), 1

    def _join(self, documents: list[tuple[list[int], int]]) -> Window:
        tokens = torch.full((self.window,), self.eos)
        targets = torch.full((self.window,), -100)
        ends = [0]
        for ids, given in documents:
            start, end = ends[-1], ends[-1] + len(ids)
            tokens[start:end] = torch.tensor(ids)
            targets[start + given - 1 : end - 1] = tokens[start + given : end]
            ends.append(end)
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
    source: str | Path | Mix, split: str, window: int, seed: int, fim_rate: float, fim_loss: str
) -> Windows:
    """The windows of one split ("train" or "valid") of a folder made by `python -m pretrain tokens`, or of several."""
    files = Mixture(source, split) if isinstance(source, Mix) else TokenFiles(Path(source), split)
    return Windows(files, Tokenizer.load(files.path / "tokenizer"), window, seed, fim_rate, fim_loss)
