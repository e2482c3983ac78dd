"""Token files: what they hold, killed and changed runs, both encoders, prose."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_coder.tokenizer import Tokenizer
from pretrain import corpus, documents, tokenizer, tokens
from pretrain.corpus import order
from pretrain.corpus.executors import Run
from pretrain.corpus.quality import Quality
from pretrain.tokens import TokenFiles

ARRAYS = [f"{split}.{kind}" for split in ("train", "valid") for kind in ("ids", "files", "documents")]


@pytest.fixture
def made(prepared):
    return Tokenizer.load(prepared / "tokenizer")


@pytest.fixture(scope="module")
def cut(prepared, tmp_path_factory):
    """The corpus of `prepared`, in another number of shards."""
    out = tmp_path_factory.mktemp("cut")
    sources = json.loads((prepared / "corpus" / "manifest.json").read_text())["sources"]
    corpus.build(sources, out, config={"crawl": {"shard_bytes": 0}}, progress=False)
    return out


def arrays(folder):
    return {name: (folder / name).read_bytes() for name in ARRAYS}


def test_token_files_are_the_corpus(prepared, made):
    texts = []
    for split in ("train", "valid"):
        files = TokenFiles(prepared / "tokens", split)
        starts = [0, *files.file_ends[:-1]]
        texts += [made.decode(files.ids[a:b].tolist()) for a, b in zip(starts, files.file_ends, strict=True)]
    wanted = [text for document in corpus.documents(prepared / "corpus") for text in document.texts]
    assert sorted(texts) == sorted(wanted)
    totals = json.loads((prepared / "tokens" / "manifest.json").read_text())["splits"].values()
    assert sum(t["bytes"] for t in totals) == sum(len(text.encode()) for text in wanted)


def test_shards_and_workers_do_not_change_the_arrays(prepared, cut, made, tmp_path):
    tokens.build(cut, made, tmp_path / "t", 0.1, Run(workers=2), progress=False)
    assert len(list((tmp_path / "t" / "parts").glob("part-*.parquet"))) > 5
    assert arrays(tmp_path / "t") == arrays(prepared / "tokens")


def test_both_encoders_give_the_same(prepared, made, tmp_path, monkeypatch, capfd):
    assert tokens.chosen_encoder(made, ["x = 1\n"]) == "kitoken"
    monkeypatch.setitem(sys.modules, "kitoken", None)
    tokens.build(prepared / "corpus", made, tmp_path / "t", 0.1, progress=False)
    said = capfd.readouterr().err.splitlines()
    assert said == ["encoding with tokenizers, some nine times slower than kitoken (it is not installed)"]
    assert arrays(tmp_path / "t") == arrays(prepared / "tokens")


def test_an_encoder_that_differs_is_not_used(made, monkeypatch, capfd):
    monkeypatch.setattr(tokens, "_kitoken", lambda tokenizer: lambda texts: [[0] for _ in texts])
    assert tokens.chosen_encoder(made, ["x = 1\n"]) == "tokenizers"
    assert "it gives other ids on a sample" in capfd.readouterr().err


def test_control_tokens_in_text_stay_text(made):
    for text in tokens._TRAPS:
        assert tokens._kitoken(made)([text]) == [made.encode(text)]
        assert not set(made.encode(text)) & set(made.control.values())
        assert made.decode(made.encode(text)) == text


def test_official_tokenizer(official, library):
    reference = Tokenizer.load(official)
    texts = [path.read_text() for path in sorted((library / "asyncio").glob("*.py"))]
    assert tokens._kitoken(reference)([*texts, *tokens._TRAPS]) == reference.encode_batch([*texts, *tokens._TRAPS])


KILLED = """
import sys
from pathlib import Path
from deepseek_coder.tokenizer import Tokenizer
from pretrain import tokens
tokens.build(Path(sys.argv[1]), Tokenizer.load(sys.argv[2]), Path(sys.argv[3]), 0.1, progress=False)
"""


def test_a_killed_run_continues(prepared, cut, made, tmp_path):
    out = tmp_path / "t"
    process = subprocess.Popen([sys.executable, "-c", KILLED, cut, prepared / "tokenizer", out])
    while len(list(out.glob("parts/shard-*.json"))) < 4:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("parts/part-*.parquet")}
    with pytest.raises(FileNotFoundError, match="no finished token folder"):
        TokenFiles(out, "train")
    tokens.build(cut, made, out, 0.1, progress=False)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert arrays(out) == arrays(prepared / "tokens")


def test_only_what_changed_is_encoded_again(cut, made, tmp_path):
    out = tmp_path / "t"
    manifest = tokens.build(cut, made, out, 0.1, progress=False)
    assert tokens.build(cut, made, out, 0.1, progress=False) == manifest
    before = {path: path.stat().st_mtime_ns for path in out.glob("parts/part-*.parquet")}
    os.unlink(sorted(before)[2])
    (out / "manifest.json").unlink()
    assert tokens.build(cut, made, out, 0.1, progress=False) == manifest
    changed = [path.name for path in sorted(before) if path.stat().st_mtime_ns != before[path]]
    assert changed == ["part-00002.parquet"]
    ids = (out / "train.ids").read_bytes()
    for lost in (out / "train.ids", out / "valid.files"):
        os.unlink(lost)
        assert tokens.build(cut, made, out, 0.1, progress=False) == manifest
    assert (out / "train.ids").read_bytes() == ids
    (out / "manifest.json").write_text(json.dumps(manifest | {"code": "of an earlier version"}))
    assert tokens.build(cut, made, out, 0.1, progress=False) == manifest
    with pytest.raises(ValueError, match="holds tokens made with another tokenizer or share; choose another --out"):
        tokens.build(cut, made, out, 0.2, progress=False)


def test_another_folder_and_a_damaged_record(prepared, made, tmp_path):
    with pytest.raises(ValueError, match=r"corpus/manifest\.json: not the record of a token folder"):
        TokenFiles(prepared / "corpus", "train")
    (tmp_path / "manifest.json").write_text((prepared / "tokens" / "manifest.json").read_text()[:100])
    with pytest.raises(ValueError, match=r"manifest\.json: not the record of a token folder, or damaged; name another"):
        tokens.build(prepared / "corpus", made, tmp_path, progress=False)


TEXTS = ["The first.\r\nline", "第二篇：中文。", "", "third " * 50, "last"]


@pytest.mark.parametrize("piece_bytes", [1, 40, 64 << 20])
def test_prose(tmp_path, made, monkeypatch, piece_bytes):
    """A folder of .jsonl and .parquet files, in pieces of any size: the same documents in the same order."""
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    rows = [json.dumps({"text": text, "id": n}, ensure_ascii=False) for n, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n\n")
    table = pa.table({"id": [1, 2, 3, 4, 5], "text": TEXTS})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    (tmp_path / "notes.txt").write_text("not read")
    pieces = documents.pieces(tmp_path)
    assert len(pieces) == {1: len((tmp_path / "a.jsonl").read_bytes()) + 3, 64 << 20: 2}.get(piece_bytes, len(pieces))
    found = [document.texts for piece in pieces for document in documents.read(piece)]
    wanted = [[text.replace("\r\n", "\n")] for text in TEXTS if text]
    assert found == wanted * 2
    if piece_bytes > 1:
        manifest = tokens.build(tmp_path, made, tmp_path / "t", 0.1, progress=False)
        assert manifest["splits"]["train"]["documents"] == 8
        texts = list(tokenizer.sample(tmp_path, 10**9))
        assert texts == [text for (text,) in wanted * 2]


def test_prose_with_test_data_is_dropped(tmp_path, made, monkeypatch):
    """Files of the forms of GSM8K (question and answer) and MATH (a folder, a problem in each file)."""
    question = "A farmer has twelve baskets and puts seven green apples into each of them. How many apples has he?"
    problem = "Let $x$ be a real number such that $x^2 + 5x + 6 = 0$ and $x$ is larger than $-3$. Find $x$."
    (tmp_path / "gsm8k.jsonl").write_text(
        json.dumps({"question": question, "answer": "12 * 7 = <<12*7=84>>84 #### 84"})
    )
    (tmp_path / "MATH" / "algebra").mkdir(parents=True)
    (tmp_path / "MATH" / "algebra" / "1.json").write_text(json.dumps({"problem": problem, "solution": "$-2$"}))
    texts = [
        "An honest page about farmers, baskets and apples, of which it has twelve.",
        f"Exercises!\n\n{question.upper()}",
        "Another honest page. " * 20,
        f"Homework: {problem.replace(' ', chr(10))}",
        "中文的网页。",
    ]
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(order.batched, "__defaults__", (100,))  # some batches
    tests = Quality(tests=(str(tmp_path / "gsm8k.jsonl"), str(tmp_path / "MATH")))
    out = tmp_path / "t"
    manifest = tokens.build(tmp_path / "prose", made, out, 0, progress=False, screening=tests)
    assert manifest["splits"]["train"]["documents"] == 3
    assert manifest["dropped"] == {"test data": 2}
    rows = pq.read_table(out / "parts" / "dropped-00000.parquet").to_pylist()
    assert rows == [{"repo": "web", "path": number, "reason": "test data"} for number in ("1", "3")]
    files = TokenFiles(out, "train")
    assert made.decode(files.ids.tolist()) == "".join(texts[::2])
    assert tokens.build(tmp_path / "prose", made, out, 0, progress=False, screening=tests) == manifest
    whole = tokens.build(tmp_path / "prose", made, out, 0, progress=False)  # another setting is noticed
    assert whole["splits"]["train"]["documents"] == 5
    assert not list((out / "parts").glob("dropped-*"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such benchmark"):
        tokens.build(tmp_path / "prose", made, out, 0, progress=False, screening=Quality(tests=("none.jsonl",)))


def test_half_characters_in_json(tmp_path, made):
    (tmp_path / "a.jsonl").write_text('{"text": "one \\ud83d half, \\ud83d\\ude42 whole"}\n')
    assert tokens.build(tmp_path, made, tmp_path / "t", 0, progress=False)["splits"]["train"]["documents"] == 1
    assert made.decode(TokenFiles(tmp_path / "t", "train").ids.tolist()) == "one \ufffd half, 🙂 whole"


def test_what_is_no_prose(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"content": "y"}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl: the line at byte 14 is no JSON object with a "text"'):
        list(documents.read(documents.pieces(tmp_path / "a.jsonl")[0]))
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: has no column `text`"):
        documents.pieces(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"c\.parquet: not a parquet file, or damaged"):
        documents.pieces(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"d\.txt: no corpus, and no prose either \(\.parquet, \.jsonl\)"):
        documents.pieces(tmp_path / "d.txt")
    with pytest.raises(FileNotFoundError, match="nowhere: not a corpus"):
        documents.pieces(tmp_path / "nowhere")


def test_a_sample_does_not_depend_on_shards(prepared, cut):
    whole = list(tokenizer.sample(prepared / "corpus", 300_000))
    assert whole == list(tokenizer.sample(cut, 300_000))
    assert 200_000 < sum(len(text.encode()) for text in whole) < 400_000


def test_training_a_tokenizer_twice_gives_the_same_bytes(prepared):
    texts = list(tokenizer.sample(prepared / "corpus", 300_000))
    first = tokenizer.train(texts, 600).files
    assert tokenizer.train(texts, 600).files == first
    assert tokenizer.train(texts[::-1], 600).files == first


def test_one_expression_for_deepseeks_five(prepared):
    """The short cut gives the ids of `tokenizers` for every character, and wherever CJK lines begin and end."""
    pytest.importorskip("kitoken")
    reference = Tokenizer.load(prepared / "tokenizer")
    chance = random.Random(0)
    characters = " \t\n\r\x0b\x85\xa0ab1²½③Ⅷé中　。—“+$^|=_.,(…🙂\u2028\u0301가ࠀ"
    texts = ["".join(map(chr, range(begin, begin + 256))) for begin in range(0, 0x3400, 256)]
    texts += ["".join(chance.choices(characters, k=chance.randrange(40))) for _ in range(2000)]
    assert all("".join(tokens._runs(text)) == text for text in texts)
    assert any(len(tokens._runs(text)) > 3 for text in texts)
    assert tokens._kitoken(reference)(texts) == reference.encode_batch(texts)
