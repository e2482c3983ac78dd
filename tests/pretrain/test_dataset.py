import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.dataset import join_windows, load_windows, split_documents


def windows(prepared, window=512, seed=0, fim_rate=0.5, fim_loss="all", split="train"):
    return load_windows(prepared / "tokens", split, window, seed, fim_rate, fim_loss)


def documents_of(window):
    ends = window.cu_seqlens.tolist()
    for start, end in itertools.pairwise(ends):
        if (window.targets[start:end] != -100).any():
            yield window.tokens[start:end].tolist(), window.targets[start:end].tolist()


@given(
    documents=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), max_size=10),
    capacity=st.integers(1, 25),
)
def test_splitting_keeps_every_token_and_cuts_no_file_that_fits(documents, capacity):
    files = np.cumsum([length for document in documents for length in document], dtype=np.int64)
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    samples = split_documents(files, ends, capacity)
    spans = list(zip(samples.start.tolist(), samples.end.tolist(), strict=True))
    assert [i for start, end in spans for i in range(start, end)] == list(range(files[-1] if len(files) else 0))
    assert all(0 < end - start <= capacity for start, end in spans)
    starts = [0, *files.tolist()]
    for start, end in zip(starts, files.tolist(), strict=False):
        if 0 < end - start <= capacity:
            assert any(s <= start and end <= e for s, e in spans)
    for (_, end), last, whole in zip(spans, samples.last_file, samples.whole_file, strict=True):
        assert not whole or (last in starts and end in starts)


def test_an_epoch_holds_every_token_once(prepared):
    made = windows(prepared, fim_rate=0.0)
    tokens = [i for w in range(made.windows_in(0)) for ids, _ in documents_of(made[w]) for i in ids[1:-1]]
    assert np.array_equal(np.bincount(tokens, minlength=1100), np.bincount(made.tokens.ids, minlength=1100))


def test_windows_are_documents_with_shifted_targets(prepared):
    made = windows(prepared)
    for index in range(20):
        window = made[index]
        assert window.tokens.shape == window.targets.shape == (512,)
        assert window.cu_seqlens.shape == (512 // 32 + 2,)
        assert window.cu_seqlens[-1] == 512
        assert (window.cu_seqlens.diff() >= 0).all()
        for ids, targets in documents_of(window):
            assert ids[0] == made.tokenizer.bos_id
            assert ids[-1] == made.eos
            assert targets == [*ids[1:], -100]


def test_fim_rate_and_loss_on_the_middle(prepared):
    made = windows(prepared, window=2048, fim_loss="middle")
    begin, _, end = made.tokenizer.fim_ids
    drawn = total = 0
    for index in range(made.windows_in(0)):
        for ids, targets in documents_of(made[index]):
            if begin in ids:
                drawn += 1
                assert ids.count(made.eos) == 1
                predicted = [i for i, t in enumerate(targets) if t != -100]
                assert predicted[0] == ids.index(end)
            total += 1
    plan = made._plan(0)
    eligible = made.samples.whole_file & (made.samples.lengths + 13 <= 2048)
    share = plan.infill.sum() / eligible.sum()
    assert abs(share - 0.5) < 3 * 0.5 / eligible.sum() ** 0.5
    assert 0.9 * plan.infill.sum() <= drawn <= plan.infill.sum()
    assert total == len(plan.samples)


def test_order_is_a_pure_function_of_seed_and_number(prepared):
    one, other, seeded = windows(prepared), windows(prepared), windows(prepared, seed=1)
    number = one.windows_in(0)
    for index in (number + 3, 0, number - 1):  # another order of access, epochs crossed
        assert (one[index].tokens == other[index].tokens).all()
    assert other.epoch_of(number + 3) == (1, 3)
    assert any((one[i].tokens != seeded[i].tokens).any() for i in range(3))
    assert any((one[i].tokens != one[number + i].tokens).any() for i in range(3))


def test_joined_windows(prepared):
    made = windows(prepared)
    joined = join_windows([made[0], made[1]])
    assert joined.tokens.shape == (1024,)
    borders = set(joined.cu_seqlens.tolist())
    assert borders == set(made[0].cu_seqlens.tolist()) | {512 + e for e in made[1].cu_seqlens.tolist()}
    assert (joined.cu_seqlens.diff() >= 0).all()


@pytest.mark.parametrize("window", [-1, 0, 2])
def test_a_window_needs_room_for_text(prepared, window):
    with pytest.raises(ValueError, match=f"data.window is {window}, and a document needs 2 control tokens"):
        windows(prepared, window=window)
    assert windows(prepared, window=3).overhead == 2


def test_fim_needs_its_tokens(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared / "tokens", tmp_path / "t")
    file = tmp_path / "t" / "tokenizer" / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if "fim" not in t["content"]]
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="fim_rate"):
        load_windows(tmp_path / "t", "train", 512, 0, 0.5, "all")
