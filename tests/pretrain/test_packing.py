import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.packing import best_fit, concat, pack


@given(lengths=st.lists(st.integers(1, 100), max_size=200), most=st.integers(1, 20))
def test_every_document_once_and_no_bin_too_full(lengths, most):
    array = np.array(lengths, dtype=np.int64)
    bins = best_fit(array, 100, most)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(array[b].sum() <= 100 and 1 <= len(b) <= most for b in bins)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=100))
def test_no_two_bins_could_be_one(lengths):
    array = np.array(lengths, dtype=np.int64)
    sums = [array[b].sum() for b in best_fit(array, 100, 1000)]
    assert all(a + b > 100 for i, a in enumerate(sums) for b in sums[i + 1 :])


def test_padding_is_small():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 5000).astype(int).clip(1, 4096)
    used = len(best_fit(lengths, 4096, 128)) * 4096
    assert 1 - lengths.sum() / used < 0.005


def test_too_long_is_refused():
    with pytest.raises(ValueError, match="101 tokens does not fit"):
        best_fit(np.array([101]), 100, 4)


def test_pack_follows_the_order_in_blocks(monkeypatch):
    monkeypatch.setattr("pretrain.packing.BLOCK", 2)
    items, ends = pack(np.array([50, 60, 50, 40]), np.array([0, 2, 1, 3]), 100, 8)
    assert items.tolist() == [0, 2, 1, 3]
    assert ends.tolist() == [2, 4]


@given(lengths=st.lists(st.integers(1, 60), max_size=60), capacity=st.integers(1, 50), random=st.randoms())
def test_a_row_is_cut_every_capacity_tokens_and_loses_nothing(lengths, capacity, random):
    array = np.array(lengths, dtype=np.int64)
    order = np.array(random.sample(range(len(lengths)), len(lengths)), dtype=np.int64)
    pieces = concat(array, order, capacity)
    row = [(d, t) for d in order.tolist() for t in range(lengths[d])]
    parts = [
        [(d, t) for t in range(begin, stop)]
        for d, begin, stop in zip(pieces.items.tolist(), pieces.begins.tolist(), pieces.stops.tolist(), strict=True)
    ]
    assert all(parts)
    assert [token for part in parts for token in part] == row
    starts = [0, *pieces.ends.tolist()]
    windows = [[token for part in parts[a:b] for token in part] for a, b in itertools.pairwise(starts)]
    assert windows == [row[at : at + capacity] for at in range(0, len(row), capacity)]
