import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_coder.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from pretrain import fim
from pretrain.tokenizer import train


@pytest.fixture(scope="module")
def tokenizer():
    return train(["def add(a, b):\n    return a + b  # größer ☃\n" * 20], 300)


@given(text=st.text(), data=st.data())
def test_a_sample_can_be_put_together_again(tokenizer, text, data):
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    ids, prompt = fim.fim_sample(tokenizer, tokenizer.encode("#a.py\n"), text, (first, second), tokenizer.eos_id)
    begin, hole, end = tokenizer.fim_ids
    assert [i for i in ids if tokenizer.is_control(i)] == [tokenizer.bos_id, begin, hole, end, tokenizer.eos_id]
    assert prompt == ids.index(end) + 1
    prefix = tokenizer.decode(ids[: ids.index(hole)])
    suffix = tokenizer.decode(ids[ids.index(hole) : prompt])
    assert prefix + tokenizer.decode(ids[prompt:]) + suffix == "#a.py\n" + text


def test_the_format_is_psm(tokenizer):
    ids, _ = fim.fim_sample(tokenizer, [], "abc", (1, 2), tokenizer.eos_id)
    assert tokenizer.decode(ids, skip_special=False) == f"{BOS}{FIM_BEGIN}a{FIM_HOLE}c{FIM_END}b{EOS}"


def test_draws_are_uniform_and_independent():
    documents = np.arange(100_000)
    for purpose in range(5):
        values = fim.uniform(7, 3, documents, purpose)
        counts = np.bincount((values * 10).astype(int), minlength=10)
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 30  # chi-square, 9 degrees of freedom, p = 0.0004
        assert values.min() >= 0
        assert values.max() < 1
    one, other = fim.uniform(7, 3, documents, 1), fim.uniform(7, 3, documents, 2)
    for second in (other, fim.uniform(8, 3, documents, 1), fim.uniform(7, 4, documents, 1), np.roll(one, 1)):
        assert abs(np.corrcoef(one, second)[0, 1]) < 0.02
    assert fim.uniform(7, 3, 5, 1) == one[5]


@given(length=st.integers(0, 50), document=st.integers(0, 10**9))
def test_cuts_lie_in_the_text(length, document):
    first, second = fim.cuts(length, 0, 0, document)
    assert 0 <= first <= second <= length


def test_every_part_may_be_empty():
    cuts = [fim.cuts(3, 0, 0, document) for document in range(500)]
    assert any(first == 0 for first, _ in cuts)
    assert any(first == second for first, second in cuts)
    assert any(second == 3 for _, second in cuts)
