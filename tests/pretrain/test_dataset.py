import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.dataset import join_windows, load_windows, split_documents
from pretrain.packing import pack


def windows(prepared, window=512, seed=0, fim_rate=0.5, fim_loss="all", split="train", **how):
    return load_windows(prepared / "tokens", split, window, seed, fim_rate, fim_loss, **how)


def documents_of(window):
    ends = window.cu_seqlens.tolist()
    for start, end in itertools.pairwise(ends):
        if (window.targets[start:end] != -100).any():
            yield window.tokens[start:end].tolist(), window.targets[start:end].tolist()


@given(
    documents=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), max_size=10),
    capacity=st.integers(1, 25),
    overhead=st.integers(0, 3),
)
def test_splitting_keeps_every_token_and_cuts_no_file_that_fits(documents, capacity, overhead):
    files = np.cumsum([length for document in documents for length in document], dtype=np.int64)
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    samples = split_documents(files, ends, capacity, overhead)
    spans = list(zip(samples.start.tolist(), samples.end.tolist(), strict=True))
    assert [i for start, end in spans for i in range(start, end)] == list(range(files[-1] if len(files) else 0))
    assert all(0 < end - start <= capacity for start, end in spans)
    starts = [0, *files.tolist()]
    for start, end in zip(starts, files.tolist(), strict=False):
        if 0 < end - start <= capacity:
            assert any(s <= start and end <= e for s, e in spans)
    for (_, end), last, whole in zip(spans, samples.last_file, samples.whole_file, strict=True):
        assert not whole or (last in starts and end in starts)


def test_long_documents_fill_windows_together():
    """A thousand documents of 40 files: best fit finds the runs that were cut for each other."""
    lengths = np.random.default_rng(0).lognormal(6.5, 1.3, 40_000).astype(np.int64).clip(10, 40_000)
    samples = split_documents(np.cumsum(lengths), np.arange(40, 40_001, 40), 16382, 2)
    sizes = samples.lengths + 2
    items, ends = pack(sizes, np.random.default_rng(1).permutation(len(sizes)), 16384, 512)
    assert sorted(items) == list(range(len(sizes)))
    assert 1 - sizes.sum() / (16384 * len(ends)) < 0.001
    assert np.average(sizes, weights=sizes) > 9000  # most of the text still has much of its repository before it


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


@pytest.mark.parametrize(
    "modes, spans",
    [(("psm",), ("char",)), (("spm",), ("line",)), (("joint",), ("ast",)), (("psm", "spm", "joint"), ("char", "ast"))],
    ids=str,
)
def test_fim_samples_are_their_documents(prepared, modes, spans):
    """In every mode and span: put together, a sample is a document; EOS ends it, and none is longer than it may be."""
    made = windows(prepared, window=4096, fim_rate=1.0, fim_modes=modes, fim_spans=spans)
    begin, hole, end = made.tokenizer.fim_ids
    decode = made.tokenizer.decode
    texts = {decode(made.tokens.ids[a:b].tolist()) for a, b in zip(made.samples.start, made.samples.end, strict=True)}
    seen = set()
    for index in range(made.windows_in(0)):
        for ids, _ in documents_of(made[index]):
            assert ids[0] == made.tokenizer.bos_id
            assert ids[-1] == made.eos
            at = {i: ids.index(i) for i in (begin, hole, end) if i in ids}
            if not at:
                continue
            middle = decode(ids[at[end] + 1 : -1])
            if at[hole] == 1:
                mode, prefix = "spm", decode(ids[at[begin] + 1 : at[end]])
                suffix = decode(ids[2 : at[begin]])
            else:
                mode, prefix = "joint" if at[hole] == 2 and len(modes) < 3 and "joint" in modes else "psm", ""
                prefix, suffix = decode(ids[2 : at[hole]]), decode(ids[at[hole] + 1 : at[end]])
            seen.add(mode)
            assert prefix + middle + suffix in texts
    assert seen >= set(modes) - ({"joint"} if len(modes) > 1 else set())


def test_in_a_repository_only_the_last_file_has_a_hole(prepared):
    made = windows(prepared, window=16384, fim_rate=1.0)
    begin, hole, _ = made.tokenizer.fim_ids
    several = 0
    for sample in range(len(made.samples.start)):
        ids, _ = made._document(sample, 0, bool(made.drawn(0)[sample]))
        before = int(made.samples.last_file[sample] - made.samples.start[sample])
        if begin in ids and before:
            several += 1
            start = int(made.samples.start[sample])
            assert ids[ids.index(begin) + 1 :][:before] == made.tokens.ids[start : start + before].tolist()
            assert ids.index(hole) > before
    assert several > 3


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_one_row_of_documents(prepared, fim_rate):
    """Packing "concat": every token of every document once, each predicted once, all windows full but the last."""
    made = windows(prepared, window=4096, fim_rate=fim_rate, packing="concat")
    plan = made._plan(0)
    parts, filled = {}, []
    for number in range(made.windows_in(0)):
        window = made[number]
        assert set(window.cu_seqlens.tolist()) == {0, 4096}
        at = 0
        for i in range(plan.starts[number], plan.starts[number + 1]):
            size = int(plan.stops[i] - plan.begins[i])
            tokens, targets = window.tokens[at : at + size].tolist(), window.targets[at : at + size].tolist()
            parts.setdefault(int(plan.samples[i]), []).append((int(plan.begins[i]), tokens, targets))
            at += size
        filled.append(at)
    assert sorted(filled)[1:] == [4096] * (len(filled) - 1)
    assert len(parts) == len(made.samples.start)
    for sample, found in parts.items():
        ids, given = made._document(sample, 0, bool(plan.infill[sample]))
        tokens = [token for _, part, _ in sorted(found) for token in part]
        targets = [target for _, _, part in sorted(found) for target in part]
        assert tokens[: len(ids)] == ids
        assert all(token == made.eos for token in tokens[len(ids) :])
        assert len(tokens) - len(ids) <= 11
        assert targets[: len(ids)] == [-100] * (given - 1) + ids[given:] + [-100]
        assert set(targets[len(ids) :]) <= {-100}


def test_a_row_cuts_documents_that_best_fit_keeps(prepared):
    row = windows(prepared, window=2048, fim_rate=0.0, packing="concat")
    lengths = row.samples.lengths + row.overhead
    pieces = np.bincount(row._plan(0).samples, minlength=len(lengths))
    assert (pieces[lengths <= 2048] > 1).mean() > 0.1
    for fim_rate in (0.0, 0.5):
        made = windows(prepared, window=2048, fim_rate=fim_rate)
        plan = made._plan(0)
        assert sorted(plan.samples) == list(range(len(made.samples.start)))  # none is cut, none is twice there
        made_lengths = [len(made._document(int(s), 0, bool(plan.infill[s]))[0]) for s in plan.samples]
        assert 1 - sum(made_lengths) / (2048 * made.windows_in(0)) < 0.03


def test_syntax_spans_need_their_grammars(prepared, monkeypatch):
    monkeypatch.setattr("pretrain.grammars.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the packages tree-sitter, tree-sitter-c, .*install the extra"):
        windows(prepared, fim_spans=("char", "ast"))
    windows(prepared, fim_rate=0.0, fim_spans=("ast",))


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
