"""Mixtures: shares, epochs, every document before any comes back, the loader on top."""

import json
import shutil

import numpy as np
import pytest

from deepseek_coder.tokenizer import Tokenizer
from pretrain import corpus, recipe, tokenizer, tokens
from pretrain.dataset import load_windows
from pretrain.mixture import Mix, Mixture
from pretrain.tokens import TokenFiles


@pytest.fixture(scope="module")
def folders(prepared, tmp_path_factory):
    """Three token folders of one tokenizer: code, and two of prose (the same text, cut up coarsely and finely)."""
    folder = tmp_path_factory.mktemp("mixture")
    made = Tokenizer.load(prepared / "tokenizer")
    text = "".join(text for document in corpus.documents(prepared / "corpus") for text in document.texts)[:100_000]
    for name, size in (("english", 400), ("chinese", 100)):
        rows = [json.dumps({"text": f"{name} {text[i : i + size]}"}) for i in range(0, len(text), size)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        tokens.build(folder / f"{name}.jsonl", made, folder / name, 0.1, progress=False)
    shutil.copytree(prepared / "tokens", folder / "code")
    return folder


def mix(folders, kind="weights", **given):
    table = {str(folders / name): value for name, value in given.items()}
    return Mix(table, {}) if kind == "weights" else Mix({}, table)


def lengths(mixture):
    starts = np.concatenate([[0], mixture.file_ends[mixture.document_ends - 1][:-1]])
    return starts, mixture.file_ends[mixture.document_ends - 1] - starts


def test_shares_and_epochs(folders):
    mixture = Mixture(mix(folders, code=87, english=10, chinese=3), "train")
    starts, sizes = lengths(mixture)
    ends = np.cumsum([len(source.ids) for source in mixture.sources])
    source = np.searchsorted(ends, starts, side="right")
    seen = np.zeros(len(starts), int)
    epochs = 200
    for epoch in range(epochs):
        chosen = mixture.in_epoch(starts, 7, epoch)
        assert chosen[mixture.rates[source] == 1].all()
        seen += chosen
        for s in range(3):  # nobody is read again before all of the source were read
            assert np.ptp(seen[source == s]) <= 1
    read = np.bincount(source, weights=seen * sizes)
    assert np.allclose(read / read.sum(), [0.87, 0.10, 0.03], atol=0.002)
    per_source = [seen[source == s].mean() / epochs for s in range(3)]
    assert np.allclose(per_source, mixture.rates, atol=0.01)
    assert np.allclose(mixture.shares, [0.87, 0.10, 0.03])
    assert (
        mixture.described(2).splitlines()[0].endswith(f"code: 87.0% of the tokens, {2 * mixture.rates[0]:.2f} epochs")
    )


def test_epochs_instead_of_weights(folders):
    mixture = Mixture(mix(folders, "epochs", code=1, english=2, chinese=0.5), "train")
    assert mixture.rates.tolist() == [0.5, 1, 0.25]
    assert mixture.described(2).count(" 2.00 epochs") == 1


def test_the_loader_sees_only_whole_documents_of_the_sources(folders):
    wanted = mix(folders, code=1, english=1)
    windows = load_windows(wanted, "train", 256, 3, 0.0, "all")
    again = load_windows(wanted, "train", 256, 3, 0.0, "all")
    known = set()
    for name in ("code", "english"):
        files = TokenFiles(folders / name, "train")
        samples = load_windows(folders / name, "train", 256, 0, 0.0, "all").samples
        known |= {tuple(files.ids[a:b].tolist()) for a, b in zip(samples.start, samples.end, strict=True)}
    for index in (5, 0, windows.windows_in(0), 3 * windows.windows_in(0)):
        window = windows[index]
        assert window.tokens.equal(again[index].tokens)
        for a, b in zip(window.cu_seqlens, window.cu_seqlens[1:], strict=False):
            ids = window.tokens[a:b].tolist()
            if a < b and (window.targets[a:b] != -100).any():
                assert tuple(ids[1:-1]) in known


def test_one_source_alone_is_that_source(folders):
    alone = load_windows(mix(folders, code=5), "train", 256, 3, 0.5, "all")
    plain = load_windows(folders / "code", "train", 256, 3, 0.5, "all")
    assert alone.windows_in(0) == plain.windows_in(0)
    for index in (0, 9):
        assert alone[index].tokens.equal(plain[index].tokens)


def test_tokenizers_must_agree(folders, prepared, tmp_path):
    other = tokenizer.train(["x = 1\n"] * 10, 300)
    tokens.build(prepared / "corpus", other, tmp_path / "other", 0.1, progress=False)
    with pytest.raises(ValueError, match=r"other: made with another tokenizer than .*code; make all token folders"):
        Mixture(Mix({str(folders / "code"): 1, str(tmp_path / "other"): 1}, {}), "train")


def test_in_a_recipe(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('[data.weights]\n"tokens/code" = 87\n"tokens/english" = 10\n"tokens/chinese" = 3\n')
    assert recipe.load(file).data.source == Mix({"tokens/code": 87, "tokens/english": 10, "tokens/chinese": 3}, {})
    assert recipe.load(file, ["data.weights={}"]).data.source == "tokens"
    for change, message in (
        ("data.weights={code = 0}", "data.weights is .*; it must be a table of folders and numbers above 0"),
        ("data.weights=3", "data.weights is 3; dict is expected"),
        ("data.epochs={code = 1}", "data.epochs is .* not given beside data.weights"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.load(file, [change])
