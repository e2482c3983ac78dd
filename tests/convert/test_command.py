import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import save_file

import convert.destination
from convert import writer
from convert.__main__ import app
from convert.command import run
from convert.huggingface import HuggingFaceFolder, open_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "tokenizer.json").write_bytes(b"{}")
    save_file(random_tensors(tiny_config), folder / "model.safetensors")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def invoke(*arguments: object, of: typer.Typer = app) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run(of)
        return caught.value.code, *capsys.readouterr()

    return invoke


def assert_one_error(result: tuple[object, str, str], *named: str) -> None:
    code, stdout, stderr = result
    assert code == 2
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert stderr.rstrip("\n").endswith(lines[0])
    assert "Traceback" not in stderr
    for text in named:
        assert text in lines[0]


def test_converts_a_folder(model: Path, tmp_path: Path, command: Any, tiny_config: Any, random_tensors: Any) -> None:
    done = command(model, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "20KB")
    assert done == (0, f"{tmp_path / 'out'}: 21 tensors written\n", "")
    with open_folder(tmp_path / "out") as checkpoint:
        assert checkpoint.config == tiny_config | {"torch_dtype": "bfloat16"}
        assert checkpoint.generation_config == {"eos_token_id": [2, 3]}
        assert checkpoint.tokenizer_files == {"tokenizer.json": b"{}"}
        assert len(checkpoint.weight_files) > 1
        for name, tensor in random_tensors(tiny_config).items():
            assert torch.equal(checkpoint.tensor(name), tensor.bfloat16())


def test_progress(model: Path, tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    """On a terminal a bar with bytes, speed and the time that is left; nothing of it elsewhere."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    read = HuggingFaceFolder.tensor

    def slowly(self: HuggingFaceFolder, name: str) -> torch.Tensor:
        time.sleep(0.02)
        return read(self, name)

    monkeypatch.setattr(HuggingFaceFolder, "tensor", slowly)
    _, stdout, stderr = command(model, tmp_path / "out", "--verify")
    for text in ("converting", "verifying", "/78.5 kB", "kB/s", "0:00:0"):
        assert text in stderr, text
    assert len(stdout.splitlines()) == 2


def test_all_official_layouts_convert_to_the_same(
    model: Path, tmp_path: Path, command: Any, random_tensors: Any, tiny_config: Any
) -> None:
    """Whole and sharded, safetensors and pickles, through the command: the same bytes, --verify included."""
    tensors = random_tensors(tiny_config)

    def copy(name: str) -> Path:
        folder = shutil.copytree(model, tmp_path / name)
        (folder / "model.safetensors").unlink()
        return folder

    sources = [model]
    for kind, write in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        whole, sharded, shards = copy(f"{kind}-whole"), copy(f"{kind}-shards"), {}
        write(tensors, whole / kind)
        for i in range(2):
            part = {name: tensors[name] for name in list(tensors)[i::2]}
            write(part, sharded / kind.replace(".", f"-{i}."))
            shards |= dict.fromkeys(part, kind.replace(".", f"-{i}."))
        (sharded / f"{kind}.index.json").write_text(json.dumps({"weight_map": shards}))
        sources += [whole, sharded]
    results = []
    for i, source in enumerate(sources):
        out = tmp_path / f"out-{i}"
        assert command(source, out, "--verify", "--max-shard-size", "20KB")[0] == 0, source
        results.append({file.name: file.read_bytes() for file in out.iterdir() if file.name != "README.md"})
    assert all(result == results[0] for result in results)


def test_model_card(model: Path, tmp_path: Path, command: Any) -> None:
    assert command(model, tmp_path / "out", "--dtype", "float16")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("library_name: transformers", "# out", "from `model`, stored as F32 (21 tensors)", "as float16"):
        assert text in card
    assert f"- model.safetensors, {(model / 'model.safetensors').stat().st_size:,} bytes" in card


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "q8_0"])
def test_gguf_and_back(
    model: Path, tmp_path: Path, command: Any, tiny_config: Any, random_tensors: Any, dtype: str | None
) -> None:
    (model / "tokenizer.json").unlink()
    options = ["--dtype", dtype] if dtype else []
    code, stdout, stderr = command(model, tmp_path / "m.gguf", *options, "--verify")
    assert (code, stdout.splitlines()) == (
        0,
        [f"{tmp_path / 'm.gguf'}: 21 tensors written", f"{tmp_path / 'm.gguf'}: 21 tensors verified"],
    )
    assert stderr == "warning: a GGUF file without vocabulary runs on token ids only\n"
    assert_one_error(command(model, tmp_path / "m.gguf"), "--force")
    code, stdout, stderr = command(tmp_path / "m.gguf", tmp_path / "back", "--verify")
    assert (code, stdout.splitlines()[1:]) == (0, [f"{tmp_path / 'back'}: 21 tensors verified"])
    assert "written without tokenizer" in stderr
    with open_folder(tmp_path / "back") as checkpoint:
        assert checkpoint.generation_config["eos_token_id"] == [2, 3]
        for name, tensor in random_tensors(tiny_config).items():
            if tensor.ndim == 1 or dtype is None:
                assert torch.equal(checkpoint.tensor(name), tensor)
            elif dtype != "q8_0":
                assert torch.equal(checkpoint.tensor(name), tensor.to(getattr(torch, dtype)))
            else:
                assert (checkpoint.tensor(name) - tensor).abs().max() < 0.03


@pytest.mark.parametrize("destination", ["out", "out.gguf"])
def test_verify_finds_a_wrong_byte(
    model: Path, tmp_path: Path, command: Any, monkeypatch: Any, destination: str
) -> None:
    (model / "tokenizer.json").unlink()
    flush = convert.destination.flush_to_disk

    def damage(file: Path) -> None:
        flush(file)
        if file.name in ("model.safetensors", ".out.gguf.tmp"):
            content = bytearray(file.read_bytes())
            content[-5] ^= 1
            file.write_bytes(content)

    monkeypatch.setattr("convert.destination.flush_to_disk", damage)
    code, stdout, stderr = command(model, tmp_path / destination, "--verify")
    assert (code, "verified" in stdout) == (2, False)
    assert "differs from the source" in stderr.splitlines()[-1]


def test_float16_that_overflows(
    model: Path, tmp_path: Path, command: Any, tiny_config: Any, random_tensors: Any
) -> None:
    tensors = random_tensors(tiny_config)
    tensors["model.norm.weight"][3] = 70_000
    save_file(tensors, model / "model.safetensors")
    assert_one_error(command(model, tmp_path / "out", "--dtype", "float16"), "model.norm.weight", "bfloat16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_conversion_goes_on(model: Path, tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    """Ctrl-C in the third shard; the same command makes only what is missing, another one begins anew."""
    options = ["--max-shard-size", "20KB"]
    assert command(model, tmp_path / "whole", *options)[0] == 0
    shard_of = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())["weight_map"]
    read, made = HuggingFaceFolder.tensor, []

    def interrupt(self: HuggingFaceFolder, name: str) -> torch.Tensor:
        if shard_of[name].startswith("model-00003"):
            raise KeyboardInterrupt
        return read(self, name)

    def count(self: HuggingFaceFolder, name: str) -> torch.Tensor:
        made.append(name)
        return read(self, name)

    def interrupted() -> None:
        monkeypatch.setattr(HuggingFaceFolder, "tensor", interrupt)
        assert command(model, tmp_path / "out", *options)[0] == 130
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(HuggingFaceFolder, "tensor", count)
        made.clear()

    interrupted()
    assert command(model, tmp_path / "out", *options)[0] == 0
    assert {shard_of[name] for name in made} == {shard for shard in shard_of.values() if shard > "model-00003"}
    names_of = [sorted(file.name for file in (tmp_path / folder).iterdir()) for folder in ("whole", "out")]
    assert names_of[0] == names_of[1]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()

    (tmp_path / "out").rename(tmp_path / "first")
    interrupted()
    assert command(model, tmp_path / "out", "--dtype", "float16", *options)[0] == 0
    assert len(made) == 21
    (tmp_path / "out").rename(tmp_path / "second")
    interrupted()
    os.utime(model / "model.safetensors", (1, 1))
    assert command(model, tmp_path / "out", *options)[0] == 0
    assert len(made) == 21, "the source is another one now"


def test_existing_destination_and_force(model: Path, tmp_path: Path, command: Any) -> None:
    assert command(model, tmp_path / "out")[0] == 0
    assert_one_error(command(model, tmp_path / "out"), "--force")
    assert command(model, tmp_path / "out", "--force")[0] == 0
    assert_one_error(command(model, model, "--force"), "holds the source")
    assert_one_error(command(model, tmp_path, "--force"), "holds the source")
    assert (model / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "give SOURCE and DESTINATION"),
        (["only-one"], "give SOURCE and DESTINATION"),
        (["a", "b", "--inspect", "c"], "--inspect PATH stands alone"),
        (["--bogus"], "--bogus"),
        (["no-such-folder", "out"], "no-such-folder: no such folder"),
        (["no-such.gguf", "out"], "no-such.gguf: no such file; official weights are at huggingface.co/deepseek-ai"),
        (["a", "b", "--dtype", "int3"], "int3"),
        (["a", "b", "--dtype", "q8_0"], "add --to gguf"),
        (["a", "b", "--to", "gguf"], "b: GGUF files end in .gguf"),
        (["a", "b.gguf", "--to", "huggingface"], "b.gguf: GGUF files end in .gguf"),
        (["a", "b", "--to", "onnx"], "onnx"),
        (["a", "b", "--max-shard-size", "many"], "'many' is not understood"),
        (["--inspect", "no-such-folder"], "no-such-folder: no such folder"),
        (["--inspect", "no-such.gguf"], "no-such.gguf: no such file"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, monkeypatch: Any, command: Any, arguments: list[str], named: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_error(command(*arguments), named)
    assert list(tmp_path.iterdir()) == []


def test_force_does_not_delete_the_adapter(model: Path, tmp_path: Path, command: Any) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    arguments = (model, tmp_path / "adapter", "--merge-adapter", tmp_path / "adapter", "--force")
    assert_one_error(command(*arguments), "holds the source")


def test_full_disk_is_one_line(model: Path, tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        # As write() raises it: without the name of a file.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "_write_json", full)
    message = f"{tmp_path / 'out'}: cannot be written (No space left on device); free some space"
    assert_one_error(command(model, tmp_path / "out"), message)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_full_disk_as_safetensors_reports_it(model: Path, tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", full)
    assert_one_error(command(model, tmp_path / "out"), "No space left on device", "free some space")


def test_inspect(model: Path, command: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, stdout, stderr = command("--inspect", model)
    assert (code, stderr) == (0, "")
    for text in ("LlamaForCausalLM", "19,616", "F32 (21 tensors)", "linear factor 4", "tokenizer.json", "nothing"):
        assert text in stdout


def test_inspect_config_alone(tmp_path: Path, tiny_config: Any, command: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    for path in (tmp_path, tmp_path / "config.json"):
        code, stdout, stderr = command("--inspect", path)
        assert (code, stderr) == (0, "")
        for text in ("19,616", "float32", "no weights", "tokenizer.json"):
            assert text in stdout


def test_inspect_official(official: Path, command: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, stdout, _ = command("--inspect", official)
    assert code == 0
    for text in ("6,740,512,768", "bfloat16", "model-00001-of-00002.safetensors", "linear factor 4"):
        assert text in stdout


@pytest.mark.network
def test_gguf(smollm2: Path, llama_cpp_vocabularies: Path, tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, stdout, _ = command("--inspect", smollm2)
    assert code == 0
    for text in ("134,515,008", "tied head", "Q4_1 (210 tensors)", "Q8_0 (1 tensors)", "tokenizer.json"):
        assert text in stdout
    vocabulary = llama_cpp_vocabularies / "ggml-vocab-deepseek-coder.gguf"
    assert "vocabulary only" in command("--inspect", vocabulary)[1]
    assert_one_error(command(vocabulary, tmp_path / "out.gguf"), "vocabulary only")
    assert command(vocabulary, tmp_path / "out")[:2] == (
        0,
        f"{tmp_path / 'out'}: tokenizer written; {vocabulary} holds no weights\n",
    )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert_one_error(command(vocabulary, tmp_path / "out"), "--force")
    assert command(vocabulary, tmp_path / "out", "--force")[0] == 0


def one_command(body: Any) -> typer.Typer:
    other = typer.Typer(add_completion=False)
    other.command()(body)
    return other


@pytest.mark.parametrize("problem, message", [(ValueError("a\n b"), "a b"), (FileNotFoundError("x: gone"), "x: gone")])
def test_run_puts_errors_on_one_line(command: Any, problem: Exception, message: str) -> None:
    def body() -> None:
        raise problem

    assert command(of=one_command(body)) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("problem, code", [(KeyboardInterrupt(), 130), (typer.Abort(), 130), (typer.Exit(3), 3)])
def test_run_exit_codes(command: Any, problem: BaseException, code: int) -> None:
    def body() -> None:
        raise problem

    assert command(of=one_command(body)) == (code, "", "")


def test_run_leaves_bugs_their_traceback(monkeypatch: Any) -> None:
    def body() -> None:
        raise KeyError("bug")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(KeyError):
        run(one_command(body))


def test_as_a_process(model: Path) -> None:
    def process(*arguments: object) -> Any:
        command = [sys.executable, "-m", "convert", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = process("nowhere", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere: no such folder")
    assert done.stderr.count("\n") == 1
    done = process("--help")
    assert done.returncode == 0
    assert "--max-shard-size" in done.stdout


def test_reader_that_goes_away(model: Path) -> None:
    """Standard output is a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "convert", "--inspect", str(model)]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_is_light() -> None:
    code = "import sys, convert.command, convert.__main__; print(sorted({'torch', 'gguf', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "torch" not in done.stdout, done.stderr
    assert "gguf" not in done.stdout
