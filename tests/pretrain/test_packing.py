import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.packing import best_fit, pack


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
