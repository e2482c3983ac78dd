"""Hugging Face folders, written."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from convert import names
from convert.checkpoint import Deferred
from convert.huggingface import open_folder
from convert.writer import parse_size, write_folder

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 16}])
def test_transformers_loads_what_we_write(
    tmp_path: Path, tiny_config: Any, tiny_model: Any, changes: Any, parameters: Any
) -> None:
    import transformers

    model = tiny_model(**changes)
    write_folder(tmp_path / "out", tiny_config | changes, parameters(model).items(), max_shard_size=20_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert loaded.config.rope_parameters["factor"] == 4.0
    assert loaded.config.rope_parameters["rope_theta"] == 100000.0
    assert loaded.generation_config.eos_token_id == 2


def test_written_layout(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    tensors = random_tensors(tiny_config, torch.bfloat16)
    out = tmp_path / "a" / "b"
    tokenizer = {"tokenizer.json": b"\r\n\xff", "tokenizer_config.json": b"{}"}
    write_folder(out, tiny_config, tensors.items(), tokenizer_files=tokenizer, max_shard_size=10_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = len(set(index["weight_map"].values()))
    assert total > 1
    assert {file.name for file in out.iterdir()} == {
        *(f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        *tokenizer,
    }
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], tensors[name])
    for name, content in tokenizer.items():
        assert (out / name).read_bytes() == content
    # The dtype of the config follows the weights: readers cast to it.
    assert json.loads((out / "config.json").read_text()) == tiny_config | {"torch_dtype": "bfloat16"}
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    modes = {file.stat().st_mode for file in out.iterdir()}
    assert len(modes) == 1, "weights must be as readable as the other files"


def test_bytes_are_deterministic(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    digests = []
    for name in ("one", "two"):
        write_folder(tmp_path / name, tiny_config, random_tensors(tiny_config).items(), max_shard_size=30_000)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert digests[0] == digests[1]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 100_000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kv_heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_round_trip_is_bit_equal(
    tmp_path_factory: Any,
    tiny_config: Any,
    random_tensors: Any,
    size: int,
    dtype: Any,
    kv_heads: int,
    tied: bool,
    order: Any,
    assert_same: Any,
) -> None:
    config = tiny_config | {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    tensors = random_tensors(config, dtype)
    items = list(tensors.items())
    order.shuffle(items)
    out = tmp_path_factory.mktemp("round") / "out"
    write_folder(out, config, iter(items), max_shard_size=size)
    assert_same(out, tensors)
    # A shard is over the limit only when it holds a single tensor.
    for file in out.glob("*.safetensors"):
        part = load_file(file)
        assert len(part) == 1 or sum(t.numel() * t.element_size() for t in part.values()) <= size
    with open_folder(out) as checkpoint:
        assert checkpoint.config == config | {"torch_dtype": str(dtype).removeprefix("torch.")}


def test_writes_slices_of_fused_weights_and_aliases(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any
) -> None:
    config = tiny_config | {"num_hidden_layers": 1}
    tensors = random_tensors(config)
    fused = {name: torch.cat([tensors[part.name] for part in parts]) for name, parts in names.fused(config).items()}
    fused["head.weight"] = fused["embed.weight"]

    def slices() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parts in names.fused(config).items():
            rows = fused[name].split([part.shape[0] for part in parts])
            yield from ((part.name, row) for part, row in zip(parts, rows, strict=True))

    write_folder(tmp_path / "out", config, slices())
    assert_same(tmp_path / "out", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})


@pytest.mark.parametrize("limit", [20_000, 50_000])
def test_one_shard_in_memory(tmp_path: Path, tiny_config: Any, limit: int) -> None:
    """A shard is written before the tensor that has no room in it is made."""
    config = tiny_config | {"num_hidden_layers": 20}
    alive = most = 0

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal alive, most
        # The tensor's storage keeps this array alive, however many tensors share it.
        array = np.zeros(shape, np.float32)
        weakref.finalize(array, release, array.nbytes)
        alive += array.nbytes
        most = max(most, alive)
        return torch.from_numpy(array)

    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in names.huggingface(config).items()}
    stream = (
        (name, Deferred(sizes[name], lambda s=shape: make(s))) for name, shape in names.huggingface(config).items()
    )
    write_folder(tmp_path / "out", config, stream, max_shard_size=limit)
    assert limit // 2 < most <= limit


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda items: items.pop(), r"lm_head.weight \(64, 32\) was not given"),
        (lambda items: items.append(items[0]), "model.embed_tokens.weight was given twice"),
        (lambda items: items.append(("x", torch.ones(1))), "x does not belong"),
        (lambda items: items.insert(0, ("lm_head.weight", torch.ones(2))), r"\(2,\), but the config says \(64, 32\)"),
        (lambda items: items.insert(0, ("model.norm.weight", torch.ones(32, dtype=torch.int8))), "torch.int8"),
    ],
)
def test_wrong_tensors_leave_nothing(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, change: Any, named: str
) -> None:
    items = list(random_tensors(tiny_config).items())
    change(items)
    with pytest.raises(ValueError, match=named):
        write_folder(tmp_path / "out", tiny_config, items)
    assert list(tmp_path.iterdir()) == []


def test_odd_arguments(tmp_path: Path, tiny_config: Any) -> None:
    with pytest.raises(ValueError, match="is no tokenizer file"):
        write_folder(tmp_path / "out", tiny_config, [], tokenizer_files={"../evil": b""})
    with pytest.raises(ValueError, match="max_shard_size is 0"):
        write_folder(tmp_path / "out", tiny_config, [], max_shard_size=0)
    assert list(tmp_path.iterdir()) == []


def test_existing_destination(tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_folder(out, tiny_config, random_tensors(tiny_config).items())
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    new = random_tensors(tiny_config, seed=1)
    with pytest.raises(FileExistsError, match="add --force"):
        write_folder(out, tiny_config, new.items())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    write_folder(out, tiny_config, new.items(), force=True)
    assert_same(out, new)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", ["notes.txt", "config.json/x", "file"])
def test_force_replaces_only_model_folders(tmp_path: Path, tiny_config: Any, random_tensors: Any, content: str) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_bytes(b"precious")
    else:
        (out / content).parent.mkdir(parents=True)
        (out / content).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="out: is "):
        write_folder(out, tiny_config, random_tensors(tiny_config).items(), force=True)
    assert (out if content == "file" else out / content).read_bytes() == b"precious"


@pytest.mark.parametrize(
    "step", ["writer.save_file", "writer._write_json", "destination.flush_to_disk", "destination.move_into_place"]
)
@pytest.mark.parametrize("old", [False, True])
def test_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, monkeypatch: Any, step: str, old: bool, assert_same: Any
) -> None:
    tensors = random_tensors(tiny_config)
    if old:
        write_folder(tmp_path / "out", tiny_config, tensors.items())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"convert.{step}", full)
    with pytest.raises(OSError, match=rf"{tmp_path / 'out'}: cannot be written \(No space left.*free some space"):
        write_folder(tmp_path / "out", tiny_config, random_tensors(tiny_config, seed=1).items(), force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if old else [])
    if old:
        assert_same(tmp_path / "out", tensors)


def test_an_error_of_the_source_is_not_the_destinations(tmp_path: Path, tiny_config: Any) -> None:
    def unreadable() -> Iterator[tuple[str, torch.Tensor]]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "source.bin")
        yield

    with pytest.raises(OSError, match=r"Input/output error: 'source\.bin'"):
        write_folder(tmp_path / "out", tiny_config, unreadable())
    assert list(tmp_path.iterdir()) == []


def test_failed_rename_brings_the_old_model_back(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, monkeypatch: Any, assert_same: Any
) -> None:
    tensors = random_tensors(tiny_config)
    write_folder(tmp_path / "out", tiny_config, tensors.items())
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.tmp"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="broken"):
        write_folder(tmp_path / "out", tiny_config, tensors.items(), force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert_same(tmp_path / "out", tensors)


def run_writer(
    tmp_path: Path, config: dict[str, Any], before: str, during: str, resume: str | None = None
) -> subprocess.Popen[str]:
    """A process that writes tmp_path/out; `before` runs first, `during` between two tensors late in the stream."""
    body = f"""
        import json, os, resource, signal, sys, time, torch
        from pathlib import Path
        from convert import names
        from convert.writer import write_folder
        folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
        def stream():
            for i, (name, shape) in enumerate(names.huggingface(config).items()):
                if i == 15:
                    {during}
                yield name, torch.zeros(shape)
        {before}
        write_folder(folder / "out", config, stream(), max_shard_size=10_000, force=True, resume={resume!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(body), str(tmp_path), json.dumps(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_killed_process_leaves_no_destination(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any
) -> None:
    process = run_writer(tmp_path, tiny_config, "pass", "(folder / 'now').touch(); time.sleep(60)")
    deadline = time.monotonic() + 60
    while not (tmp_path / "now").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"now", ".out.tmp"}
    # What it left does not disturb the next attempt, which removes it.
    tensors = random_tensors(tiny_config)
    write_folder(tmp_path / "out", tiny_config, tensors.items())
    assert_same(tmp_path / "out", tensors)
    assert {entry.name for entry in tmp_path.iterdir()} == {"now", "out"}


def test_a_killed_process_loses_no_finished_shard(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any
) -> None:
    process = run_writer(tmp_path, tiny_config, "pass", "os.kill(os.getpid(), signal.SIGKILL)", resume="work")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    finished = len(json.loads((tmp_path / ".out.tmp" / "progress.json").read_text())["shards"])
    assert finished > 1
    zeros = {name: torch.zeros_like(tensor) for name, tensor in random_tensors(tiny_config).items()}
    made = []

    def stream() -> Iterator[tuple[str, Deferred]]:
        for name, tensor in zeros.items():
            yield name, Deferred(tensor.nbytes, lambda name=name, tensor=tensor: made.append(name) or tensor)  # type: ignore[misc]

    write_folder(tmp_path / "out", tiny_config, stream(), max_shard_size=10_000, resume="work")
    assert_same(tmp_path / "out", zeros)
    assert 0 < len(made) < len(zeros)
    assert set(zeros) - set(made) == {
        name for i in range(finished) for name in load_file(sorted((tmp_path / "out").glob("*.safetensors"))[i])
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "progress.json").exists()


@pytest.mark.parametrize("progress", [b"{", b"[]", b'{"resume": "work"}', b'{"resume": "work", "shards": [{"a": 1}]}'])
def test_damaged_progress_begins_anew(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any, progress: bytes
) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "progress.json").write_bytes(progress)
    tensors = random_tensors(tiny_config)
    write_folder(tmp_path / "out", tiny_config, tensors.items(), resume="work")
    assert_same(tmp_path / "out", tensors)


@pytest.mark.parametrize("renames, survivor", [(1, "old"), (2, "new")])
def test_killed_while_replacing(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, renames: int, survivor: str, assert_same: Any
) -> None:
    """Killed after the first rename of the folders (old set aside) or the second (new in place)."""
    old = random_tensors(tiny_config)
    write_folder(tmp_path / "out", tiny_config, old.items())
    kill = f"""
        rename, done = Path.rename, []
        def rename_and_die(self, target):
            rename(self, target)
            done.extend([target] if self.parent == folder else [])
            if len(done) == {renames}:
                os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = rename_and_die"""
    process = run_writer(tmp_path, tiny_config, kill, "pass")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.old").exists()
    assert (tmp_path / "out").exists() == (survivor == "new")
    with pytest.raises(FileExistsError, match="add --force"):
        write_folder(tmp_path / "out", tiny_config, [])
    zeros = {name: torch.zeros_like(tensor) for name, tensor in old.items()}
    assert_same(tmp_path / "out", old if survivor == "old" else zeros)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_operating_system_refuses_to_write(tmp_path: Path, tiny_config: Any) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    process = run_writer(tmp_path, tiny_config, limit, "pass")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"OSError: .*/out: cannot be written .*File too large", stderr.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5_000_000_000), ("500 mb", 500_000_000), ("2GiB", 2**31), ("1.5KB", 1500), ("77", 77), ("8B", 8)],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "0.5", "5 apples", "5IB", "1e9", "9" * 400 + "TB"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="write for example 5GB"):
        parse_size(text)


def test_formats_agree(tmp_path: Path, tiny_config: Any, random_tensors: Callable[..., Tensors]) -> None:
    """The same model as safetensors and as pickle opens the same."""
    tensors = random_tensors(tiny_config, torch.float16)
    write_folder(tmp_path / "a", tiny_config, tensors.items())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    torch.save(tensors, tmp_path / "b" / "pytorch_model.bin")
    with open_folder(tmp_path / "a") as one, open_folder(tmp_path / "b") as two:
        assert (one.shapes, one.dtypes, one.stored, one.config) == (two.shapes, two.dtypes, two.stored, two.config)
