import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_coder import prompts
from deepseek_coder.languages import LANGUAGES
from deepseek_coder.repository import SIGNS, path_comment, path_in_comment
from deepseek_coder.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from pretrain import fim
from pretrain.grammars import GRAMMARS, parser
from pretrain.tokenizer import train


@pytest.fixture(scope="module")
def tokenizer():
    return train(["def add(a, b):\n    return a + b  # größer ☃\n" * 20], 300)


@pytest.mark.parametrize("mode", fim.MODES)
@given(text=st.text(), data=st.data())
def test_a_sample_can_be_put_together_again(tokenizer, mode, text, data):
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    before = tokenizer.encode("#a.py\n")
    ids, given_ = fim.fim_sample(tokenizer, before, text, (first, second), tokenizer.eos_id, mode)
    begin, hole, end = tokenizer.fim_ids
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    controls = {
        "psm": [bos, begin, hole, end, eos],
        "spm": [bos, hole, begin, end, eos],
        "joint": [bos, begin, hole, end, eos],
    }
    assert [i for i in ids if tokenizer.is_control(i)] == controls[mode]
    at = [i for i, id_ in enumerate(ids) if tokenizer.is_control(id_)]
    parts = [tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(at)][1:]
    if mode == "joint":
        nothing, suffix, whole = parts
        assert nothing == ""
        assert whole + suffix == "#a.py\n" + text
        # What is given is all but the middle, and nothing of the middle.
        assert len(tokenizer.decode(ids[at[3] + 1 : given_]).encode()) <= len(("#a.py\n" + text[:first]).encode())
    else:
        prefix, suffix, middle = parts if mode == "psm" else (parts[1], parts[0], parts[2])
        assert prefix + middle + suffix == "#a.py\n" + text
        assert given_ == at[3] + 1
        assert middle == text[first:second]


@pytest.mark.parametrize(
    "mode, form",
    [
        ("psm", f"{BOS}{FIM_BEGIN}a{FIM_HOLE}c{FIM_END}b{EOS}"),
        ("spm", f"{BOS}{FIM_HOLE}c{FIM_BEGIN}a{FIM_END}b{EOS}"),
        ("joint", f"{BOS}{FIM_BEGIN}{FIM_HOLE}c{FIM_END}ab{EOS}"),
    ],
)
def test_the_formats(tokenizer, mode, form):
    ids, given_ = fim.fim_sample(tokenizer, [], "abc", (1, 2), tokenizer.eos_id, mode)
    assert tokenizer.decode(ids, skip_special=False) == form
    assert ids[given_:] == [*tokenizer.encode("b"), tokenizer.eos_id]
    assert prompts.fim(tokenizer, "a", "c", mode) == ids[:given_]


def test_prefix_and_middle_are_one_text_in_the_joint_mode(tokenizer):
    text = "return a + b"
    ids, given_ = fim.fim_sample(tokenizer, [], text, (3, 9), tokenizer.eos_id, "joint")
    start = ids.index(tokenizer.fim_ids[2]) + 1
    assert ids[start:-1] == tokenizer.encode(text[:9])
    assert "return".startswith(tokenizer.decode(ids[start:given_]))


CODE = """#src/a.py
import os

class A:
    def add(self, a, b):
        total = a + b
        return [total, (a, b)]

    def größe(self):
        return "☃" * 3
"""


@given(document=st.integers(0, 10**6), text=st.text(st.sampled_from("ab\n\r\x0c\u2028☃"), min_size=10))
def test_a_hole_of_lines_is_around_whole_lines(document, text):
    cut = fim.hole(text, "line", 0, 0, document)
    if len(text) - text.find("\n") - 1 < fim.MIN_CHARACTERS:
        assert cut is None
        return
    assert 0 <= cut[0] <= cut[1] <= len(text)
    assert all(at in (0, len(text)) or text[at - 1] == "\n" for at in cut)


def test_a_hole_of_nodes_is_around_whole_nodes():
    seen = {CODE[slice(*fim.hole(CODE, "ast", 0, 0, document))] for document in range(4000)}
    assert {"a + b", "import os", "total = a + b", "(a, b)", '"☃"', "größe"} <= seen
    for middle in seen:
        assert middle.count("(") == middle.count(")")
        assert middle.count("[") == middle.count("]")


@given(document=st.integers(0, 10**6), text=st.text())
def test_a_hole_of_nodes_lies_in_any_text(document, text):
    text = "//src/a.tsx\n" + text
    cut = fim.hole(text, "ast", 0, 0, document)
    assert cut is None or 0 <= cut[0] <= cut[1] <= len(text)


def test_without_a_grammar_the_hole_is_around_lines():
    for path in ("//a.sql", "--a.sql", "just text"):
        text = f"{path}\none line\nanother line\n"
        for document in range(50):
            assert fim.hole(text, "ast", 0, 0, document) == fim.hole(text, "line", 0, 0, document)


@pytest.mark.parametrize("language", GRAMMARS)
def test_every_grammar_is_found_by_a_path_comment(language):
    extension = {"TSX": ".tsx"}.get(language) or next(x for x in LANGUAGES if x.name == language).extensions[0]
    text = path_comment(f"dir/a{extension}") + "some text\n"
    assert fim._grammar_of(text) == language
    assert parser(language).parse(text.encode()).root_node.end_byte > 0


def test_path_comments_are_read_back():
    for language in LANGUAGES:
        for sign in SIGNS:
            path = f"some dir/a.b{language.extensions[0]}"
            assert path_in_comment(path_comment(path, sign).rstrip("\n")) == path
    assert path_in_comment("import os") is path_in_comment("# a comment") is path_in_comment("") is None


def test_little_text_stays_plain():
    assert fim.hole("#a/long/path.py\n123456789", "char", 0, 0, 0) is None
    assert fim.hole("#a/long/path.py\n1234567890", "char", 0, 0, 0) is not None


def test_each_option_is_as_likely():
    chosen = [fim.choose(("psm", "psm", "joint"), 0, 0, document, fim.MODE) for document in range(3000)]
    assert abs(chosen.count("joint") - 1000) < 100


def test_draws_are_uniform_and_independent():
    documents = np.arange(100_000)
    for purpose in range(7):
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
