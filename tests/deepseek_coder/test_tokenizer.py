import io
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_coder.tokenizer import BOS, EOS, EOT, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer
from pretrain.tokenizer import train


@pytest.fixture(scope="module")
def tokenizer(official):
    return Tokenizer.load(official)


def vectors(official: Path) -> list[tuple[str, list[int]]]:
    stem = official / "ggml-vocab-deepseek-coder.gguf"
    texts = stem.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = stem.with_suffix(".gguf.out").read_text().split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, ids, strict=False)]


def test_every_official_vector(tokenizer, official):
    pairs = vectors(official)
    assert len(pairs) >= 46
    for text, ids in pairs:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


def test_ids_of_the_control_tokens(tokenizer):
    assert tokenizer.vocab_size == 32022
    assert [tokenizer.control[t] for t in (BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END, EOT)] == [
        32013,
        32014,
        32015,
        32016,
        32017,
        32021,
    ]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (32013, 32021, True)


def test_text_never_spells_a_control_token(tokenizer):
    for token in tokenizer.control:
        ids = tokenizer.encode(f"a{token}b")
        assert not set(ids) & set(tokenizer.control.values())
        assert tokenizer.decode(ids) == f"a{token}b"


def test_the_thirteen_letters(tokenizer):
    letters = "õ÷ÁýÀÿøúþüùöû"
    assert tokenizer.encode(letters) == list(range(32000, 32013))
    assert tokenizer.decode(range(32000, 32013)) == letters
    assert tokenizer.encode("naive über") == [2479, 488, 207, 32009, 696]


def test_decoding_skips_or_spells_control_tokens(tokenizer):
    ids = [32013, *tokenizer.encode("x"), 32021]
    assert tokenizer.decode(ids) == "x"
    assert tokenizer.decode(ids, skip_special=False) == f"{BOS}x{EOT}"
    assert tokenizer.decode([32100]) == ""  # a padding row of the embedding


def test_files_of_the_standard_library_round_trip(tokenizer):
    files = sorted(Path(io.__file__).parent.glob("*.py"))
    for file in random.Random(0).sample(files, 40):
        text = file.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def small():
    """A byte-level tokenizer of our own: property tests need no official data."""
    return train(["def add(a, b):\n    return a + b  # größer ☃\n" * 20], 300)


@given(text=st.text())
def test_round_trip_of_any_text(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(not small.is_control(i) for i in ids)


@given(text=st.text())
def test_streaming_never_breaks_a_character(small, text):
    stream = small.stream()
    pieces = [stream.push(i) for i in small.encode(text)] + [stream.finish()]
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


def test_damaged_files_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    small.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"tokenizer.json: not valid JSON"):
        Tokenizer.load(tmp_path)
    raw = json.loads(whole)
    raw["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("token", [3, {"content": 3}, ["<s>"]])
def test_a_special_token_that_is_no_text_is_refused(small, token):
    settings = json.dumps({"bos_token": token}).encode()
    with pytest.raises(ValueError, match=r"^m/tokenizer_config\.json: bos_token is .*correct the file"):
        Tokenizer({**small.files, "tokenizer_config.json": settings}, "m")


def test_a_chat_template_that_is_no_text_is_refused(small):
    with pytest.raises(ValueError, match=r"^m/chat_template\.jinja: not UTF-8"):
        Tokenizer({**small.files, "chat_template.jinja": b"{{ x }}\xe4"}, "m")


def test_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\ndef add(a, b): return a + b\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320, byte_fallback=True,
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("def add(a, b):", "  two spaces", "schön 雪", "<s> is text"):
        assert tokenizer.encode(text) == oracle.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a", bos=True)[0] == tokenizer.bos_id == oracle.bos_id()
