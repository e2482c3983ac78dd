"""The `deepseek-coder` command as a user runs it: a process, its stdout, its exit code."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from deepseek_coder import Decoder, ModelConfig, folders, load, prompts, save
from deepseek_coder.__main__ import _with_repository
from deepseek_coder.tokenizer import EOT
from pretrain.tokenizer import train


def run(*arguments, stdin=None, cwd=None):
    program = [sys.executable, "-m", "deepseek_coder", *map(str, arguments)]
    return subprocess.run(program, input=stdin, capture_output=True, text=True, cwd=cwd, timeout=120)


def refused(done, *words):
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = train(["def add(a, b):\n    return a + b  # größer ☃\n" * 20], 300)
    config = ModelConfig(384, 64, 96, 2, 4, 2, 16, max_position_embeddings=256, bos_token_id=300, eos_token_ids=(301,))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("command") / "model"
    save(folder, Decoder(config), tokenizer)
    return folder


@pytest.fixture
def hole(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("def f():\n    return \n")
    return file


def test_complete_prints_only_the_completion(model, tmp_path):
    done = run("complete", model, "def add", "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith("def add")
    piped = run("complete", model, "--max-new-tokens", 8, stdin="def add")
    (tmp_path / "f.py").write_text("def add")
    file = run("complete", model, "--file", tmp_path / "f.py", "--max-new-tokens", 8)
    assert done.stdout == piped.stdout == file.stdout
    assert done.stderr == ""


def test_complete_with_a_repository(model, tmp_path):
    (tmp_path / "lib.py").write_text("X = 1\n")
    (tmp_path / "main.py").write_text("import lib\n")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "latin.py").write_bytes(b"# \xe4\n")
    done = run("complete", model, "--file", tmp_path / "main.py", "--repo", tmp_path, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert "latin.py is not UTF-8 and is left out" in done.stderr
    alone = run("complete", model, "--file", tmp_path / "main.py", "--max-new-tokens", 4)
    assert alone.returncode == 0


def test_a_repository_that_does_not_fit(model, hole, tmp_path):
    for tokens in (250, 500):
        done = run("complete", model, "--file", hole, "--repo", tmp_path, "--max-new-tokens", tokens)
        refused(done, f"{tokens} are kept for --max-new-tokens", "context of 256; lower that option or pass less")


def test_files_of_unknown_language_share_none(model, tmp_path):
    (tmp_path / "LICENSE").write_text("as is")
    file = tmp_path / "notes.unknown"
    file.write_text("to do")
    decoder, tokenizer = load(model)
    ids = _with_repository(decoder, tokenizer, tmp_path, file, "to do", None, 8)
    assert ids == prompts.repository(tokenizer, {}, file.name, "to do")


def test_imports_by_a_manifest_and_the_signs_of_path_comments(model, tmp_path):
    for path, text in {
        "tsconfig.json": '{"compilerOptions": {"paths": {"#lib/*": ["lib/*"]}}}',
        "lib/near.ts": "export const a = 1\n",
        "zzz.ts": "export const b = 2\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    file = tmp_path / "main.ts"
    file.write_text("import { a } from '#lib/near'\n")
    decoder, tokenizer = load(model)
    for sign, comment in (("hash", "#"), ("language", "//")):
        ids = _with_repository(decoder, tokenizer, tmp_path, file, file.read_text(), None, 8, sign)
        lines = tokenizer.decode(ids).splitlines()
        assert [line for line in lines if line.endswith(".ts")] == [
            f"{comment}zzz.ts",
            f"{comment}lib/near.ts",  # what it imports by the alias stands nearest
            f"{comment}main.ts",
        ]
        assert not any("compilerOptions" in line for line in lines)
    done = run("complete", model, "--file", file, "--repo", tmp_path, "--path-comment", "//")
    refused(done, "path comments with the sign '//' are not known; choose from language, hash")


def test_a_warning_is_one_line(model, hole, tmp_path):
    folder = tmp_path / "instruct"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": EOT}))
    for repo in ((), ("--repo", tmp_path)):
        done = run("fill", folder, hole, "--at", "2:12", "--max-new-tokens", 4, *repo)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("warning: this is an instruct model")
        assert done.stderr.count("\n") == 1


def test_fill(model, hole, tmp_path):
    at = run("fill", model, hole, "--at", "2:12", "--max-new-tokens", 8)
    assert at.returncode == 0, at.stderr
    (tmp_path / "p").write_text("def f():\n    return ")
    (tmp_path / "s").write_text("\n")
    files = ("--prefix-file", tmp_path / "p", "--suffix-file", tmp_path / "s")
    assert run("fill", model, *files, "--max-new-tokens", 8).stdout == at.stdout


def test_sampling_options(model):
    options = ("--temperature", 1.0, "--top-p", 0.9, "--max-new-tokens", 12)
    one, again = (run("complete", model, "def", *options, "--seed", 3).stdout for _ in range(2))
    assert one == again
    assert one != run("complete", model, "def", *options, "--seed", 4).stdout


def test_chat_needs_a_chat_model(model):
    refused(run("chat", model, "--message", "hi"), "no chat template")


def test_chat_with_the_released_template(model, official, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(model, folder)
    template = json.loads((official / "tokenizer_config.json").read_text())["chat_template"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    done = run("chat", folder, "--message", "hi", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    talk = run("chat", folder, "--max-new-tokens", 4, stdin="hi\nand?\n\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.startswith(done.stdout)
    assert len(talk.stdout) > len(done.stdout)


def test_info(model):
    done = run("info", model)
    assert done.returncode == 0, done.stderr
    assert "GQA" in done.stdout
    assert "infilling" in done.stdout
    released = run("info", "deepseek-coder-33b-base")
    assert "33,342,991,360" in released.stdout
    refused(run("info", "deepseek-coder-2b-base"), "not a released", "deepseek-coder-1.3b-base")


def test_mistakes_are_one_line(model, hole, tmp_path):
    refused(run("complete", tmp_path / "nowhere", "x"), "nowhere", "huggingface.co/deepseek-ai", "config.json")
    refused(run("complete", model, "def add " * 200), "the prompt is", "context 256")
    refused(run("fill", model, hole, "--at", "9:1"), "line 9", "lines 1 to 3")
    refused(run("fill", model, hole, "--at", "2:99"), "column 99", "columns 1 to 12")
    refused(run("fill", model, hole, "--at", "two"), "LINE:COLUMN")
    refused(run("fill", model, hole), "--at LINE:COLUMN")
    refused(run("fill", model, tmp_path / "missing.py", "--at", "1:1"), "missing.py: no such file")
    (tmp_path / "latin.py").write_bytes(b"# \xe4\n")
    refused(run("fill", model, tmp_path / "latin.py", "--at", "1:1"), "latin.py: not UTF-8")
    refused(run("complete", model, "x", "--repo", tmp_path), "--file")
    refused(run("complete", model, "x", "--max-new-tokens", 0), "max_new_tokens")
    refused(run("complete", model, "x", "--no-such-option"), "--no-such-option")


def test_what_the_corpus_leaves_out_is_in_no_prompt(model, tmp_path, monkeypatch):
    """Vendored folders and files, very large files, hidden ones, links."""
    shown = {}
    monkeypatch.setattr(prompts, "repository", lambda tokenizer, files, *rest: shown.update(files) or [0])
    files = {"main.js": "x", "own.js": "1", "lib/own.ts": "2", "package.json": "{}"}
    theirs = ("node_modules/m/index.js", "lib/vendor/v.js", "js/jquery-3.6.0.min.js", ".hidden/a.js", ".b.js")
    for path, text in (files | dict.fromkeys(theirs, "x") | {"large.js": "x" * (folders.MAX_FILE_BYTES + 1)}).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "link.js").symlink_to("own.js")
    decoder, tokenizer = load(model)
    _with_repository(decoder, tokenizer, tmp_path, tmp_path / "main.js", "x", None, 4)
    assert shown == files


def test_fim_is_refused_for_a_model_without_it(model, hole, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(model, folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if "fim" not in t["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    refused(run("fill", folder, hole, "--at", "2:12"), "cannot fill holes")


FOREIGN = 'raise_on = None\n__version__ = "0.20.0"\n'


def test_hugging_faces_kernels_in_place_of_ours_is_one_clear_line(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FOREIGN)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import deepseek_coder"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    refused(done, "kernels", "Hugging Face's", "pip uninstall kernels")


def test_a_corpus_needs_no_torch():
    """Whose import would cost every worker seconds and 200 MB."""
    program = (
        "import sys, deepseek_coder, pretrain.corpus, pretrain.tokens, pretrain.corpus.report;"
        "print(deepseek_coder.prompts.fim, 'torch' in sys.modules, deepseek_coder.load, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert re.fullmatch(r"<function fim .*> False <function load .*> True\n", done.stdout), done.stderr
    with pytest.raises(ImportError, match="cannot import name 'lode'"):
        from deepseek_coder import lode  # noqa: F401


def test_transformers_runs_with_our_kernels_on_the_path():
    program = (
        "import kernels, torch, transformers as t;"
        "assert kernels.PROJECT == 'deepseek-coder-torch'; torch.manual_seed(0);"
        "c = t.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,"
        " num_attention_heads=2, num_key_value_heads=2);"
        "print(t.LlamaForCausalLM(c).generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 5])" in done.stdout
