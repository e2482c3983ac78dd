"""Several token folders as one: code, English and Chinese as 87 : 10 : 3 (paper, section 3), or any other shares.

The hard idea: a mixture is **a set of documents for each epoch**, not a stream of draws. The source that is scarcest
for its share is read once in every epoch of the mixture. Of each other source an epoch takes a part, r = how often that
source is read meanwhile, and document i is in epoch e when floor((e + 1) r + u_i) > floor(e r + u_i), with u_i a hash
of the seed and i. So each document comes back every 1 / r epochs, none a second time before all were there once, and
whether it is in an epoch is a pure function, as everything in the loader is (dataset.py).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import fim
from .tokens import TokenFiles

# A purpose of fim.uniform beside those listed there.
_PHASE = 64


@dataclass(frozen=True)
class Mix:
    """Token folders, and for each its share of the tokens (`weights`) or how often it is read (`epochs`), as numbers
    of which only the ratios count."""

    weights: dict[str, float]
    epochs: dict[str, float]


class Mixture:
    """One split of several token folders: what TokenFiles has, the folders one behind the other.

    Raises ValueError for folders made with different tokenizers, and as TokenFiles does.
    """

    def __init__(self, mix: Mix, split: str):
        given = mix.weights or mix.epochs
        self.sources = [TokenFiles(Path(folder), split) for folder in given]
        self.path, self.tokenizer_sha256 = self.sources[0].path, self.sources[0].tokenizer_sha256
        for source in self.sources:
            if source.tokenizer_sha256 != self.tokenizer_sha256:
                raise ValueError(
                    f"{source.path}: made with another tokenizer than {self.path}; make all token folders of a mixture "
                    "with one"
                )
        tokens = np.array([len(source.ids) for source in self.sources], np.int64)
        files = np.array([len(source.file_ends) for source in self.sources], np.int64)
        self._ends = np.cumsum(tokens)
        self.ids = _Joined([source.ids for source in self.sources], self._ends)
        self.file_ends = _shifted([source.file_ends for source in self.sources], self._ends)
        self.document_ends = _shifted([source.document_ends for source in self.sources], np.cumsum(files))
        rates = np.array(list(given.values()), np.float64) / (tokens if mix.weights else 1)
        self.rates = rates / rates.max()  # how often each source is read in one epoch of the mixture, at most once
        shares = self.rates * tokens
        self.shares = shares / shares.sum()

    def in_epoch(self, starts: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """(samples,) bool: which of the samples that begin at these token positions are in the epoch."""
        rates = self.rates[np.searchsorted(self._ends, starts, side="right")]
        phase = fim.uniform(seed, 0, np.arange(len(starts)), _PHASE)
        return np.floor((epoch + 1) * rates + phase) > np.floor(epoch * rates + phase)

    def described(self, epochs: float) -> str:
        """What so many epochs of the mixture read of each source, one line a source."""
        return "\n".join(
            f"  {source.path}: {share:.1%} of the tokens, {rate * epochs:.2f} epochs"
            for source, share, rate in zip(self.sources, self.shares, self.rates, strict=True)
        )


class _Joined:
    """Arrays one behind the other, of which slices within one array are read; nothing is copied before."""

    def __init__(self, arrays: list[np.ndarray], ends: np.ndarray):
        self._arrays, self._ends = arrays, ends

    def __getitem__(self, span: slice) -> np.ndarray:
        which = int(np.searchsorted(self._ends, span.start, side="right"))
        first = int(self._ends[which - 1]) if which else 0
        return self._arrays[which][span.start - first : span.stop - first]


def _shifted(arrays: list[np.ndarray], ends: np.ndarray) -> np.ndarray:
    """End positions within each of several arrays -> within all, given where each of these ends."""
    return np.concatenate([array + start for array, start in zip(arrays, [0, *ends[:-1]], strict=True)])
