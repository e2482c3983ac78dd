"""Training checkpoints, written by torch.distributed.checkpoint in one and in several processes."""

import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from convert import names, open_checkpoint
from convert.dcp import Reader, open_training, read_metadata

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fused(tiny_config: Any, random_tensors: Any) -> dict[str, torch.Tensor]:
    """Our fused weights and one moment of an optimizer."""
    tensors = random_tensors(tiny_config)
    ours = {name: torch.cat([tensors[part.name] for part in parts]) for name, parts in names.fused(tiny_config).items()}
    return {f"{prefix}{name}": tensor for prefix in ("model.", "exp_avg.") for name, tensor in ours.items()}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config: Any, fused: Any) -> Path:
    """A checkpoint as pretrain/checkpoint.py lays it out, written by one process."""
    folder = tmp_path / "step"
    dcp.save(fused, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text(json.dumps(tiny_config))
    (folder / "tokenizer.json").write_bytes(b"{}")
    return folder


def assert_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(folder) as source:
        assert set(source.shapes) == set(expected)
        for name, tensor in expected.items():
            assert source.shapes[name] == tuple(tensor.shape)
            assert torch.equal(source.tensor(name), tensor), name


def test_fused_weights_come_out_as_parts(checkpoint: Path, tiny_config: Any, random_tensors: Any) -> None:
    assert_equal(checkpoint, random_tensors(tiny_config))
    with open_checkpoint(checkpoint) as source:
        assert source.config == tiny_config
        assert source.tokenizer_files == {"tokenizer.json": b"{}"}
        assert source.stored["model.norm.weight"] == "F32"
        assert all(file.suffix == ".distcp" for file in source.weight_files)


def test_shards_of_three_processes(tmp_path: Path, tiny_config: Any, random_tensors: Any, fused: Any) -> None:
    """Cut unevenly by rows, as FSDP does, and by columns."""
    body = """
        import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
        from torch.distributed.tensor import Shard, distribute_tensor
        from pretrain.parallel import process_group
        with process_group("cpu") as mesh:
            state = torch.load(sys.argv[1])
            for dimension, folder in enumerate(sys.argv[2:]):
                cut = {name: Shard(dimension if tensor.ndim == 2 else 0) for name, tensor in state.items()}
                shards = {name: distribute_tensor(tensor, mesh, [cut[name]]) for name, tensor in state.items()}
                dcp.save(shards, checkpoint_id=folder)
                del shards
            dist.barrier()
    """
    torch.save(fused, tmp_path / "state.pt")
    (tmp_path / "save.py").write_text(textwrap.dedent(body))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    arguments = [str(tmp_path / name) for name in ("save.py", "state.pt", "rows", "columns")]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in (tmp_path / "rows", tmp_path / "columns"):
        (folder / "config.json").write_text(json.dumps(tiny_config))
        assert len(list(folder.glob("*.distcp"))) == 3
        assert_equal(folder, random_tensors(tiny_config))


def test_torch_and_the_restricted_reader_agree(checkpoint: Path) -> None:
    theirs = FileSystemReader(checkpoint).read_metadata()
    ours = Reader(str(checkpoint)).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_metadata_cannot_run_code(checkpoint: Path, monkeypatch: Any, protocol: int) -> None:
    monkeypatch.chdir(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"x": Harmful()}, protocol=protocol))
    with pytest.raises(ValueError, match=r"\.metadata: damaged or refused .*posix\.system, which no checkpoint needs"):
        open_training(checkpoint)
    assert not (checkpoint / "harmed").exists()


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", ""),
        (b"junk", ""),
        (pickle.dumps({}), "it holds no metadata"),
        # LONG_BINPUT to a memo slot far away, for which the unpickler would first take 16 GB or more.
        (b"\x80\x04}r" + struct.pack("<I", 2**31) + b".", "a memo of impossible size"),
        # A byte array and a frame of impossible lengths.
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", ""),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.", ""),
    ],
)
def test_damaged_metadata(checkpoint: Path, content: bytes, named: str) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=rf"\.metadata: damaged or refused \(.*{named}"):
        open_training(checkpoint)


def rewrite(checkpoint: Path, change: Any) -> None:
    metadata = read_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def first(metadata: Any) -> Any:
    return metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == "model.norm.weight")]


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda m: m.state_dict_metadata.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda m: m.state_dict_metadata.clear(), "is missing"),
        (
            lambda m: setattr(m.state_dict_metadata["model.norm.weight"], "size", torch.Size([2**40])),
            r"shape \(1099511627776,\), but config.json asks for \(32,\)",
        ),
        (
            lambda m: setattr(m.state_dict_metadata["model.norm.weight"].chunks[0], "sizes", torch.Size([2**40])),
            "a shard outside of it",
        ),
        (lambda m: m.state_dict_metadata["model.norm.weight"].chunks.clear(), "shards of 0 numbers"),
        (
            lambda m: setattr(m.state_dict_metadata["model.norm.weight"].properties, "dtype", torch.int8),
            "only float32, float16 and bfloat16",
        ),
        (lambda m: m.storage_data.clear(), "a shard that no file holds"),
        (lambda m: setattr(first(m), "relative_path", "../../secret"), "is no file of the checkpoint"),
        (lambda m: setattr(first(m), "length", 2**50), "truncated"),
        (lambda m: setattr(first(m), "offset", 2**50), "truncated"),
        (lambda m: setattr(first(m), "offset", first(m).offset - 1), "the shard of norm.weight is damaged"),
        (lambda m: setattr(first(m), "transform_descriptors", ["zstd"]), "compressed"),
    ],
)
def test_metadata_that_does_not_fit(checkpoint: Path, change: Any, named: str) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=named) as caught, open_training(checkpoint) as source:
        source.tensor("model.norm.weight")
    assert str(caught.value).startswith(str(checkpoint))


def test_a_cut_file(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:5000])
    with open_training(checkpoint) as source, pytest.raises(ValueError, match="truncated"):
        source.tensor("model.norm.weight")


def test_shards_are_mapped(checkpoint: Path) -> None:
    """What changes in the file after opening is seen: nothing is kept, and a large shard is never read whole."""
    file = next(checkpoint.glob("*.distcp"))
    with open_training(checkpoint) as source:
        name = "model.layers.0.self_attn.k_proj.weight"
        before = source.tensor(name)
        at = file.read_bytes().index(before.numpy().tobytes())
        with file.open("r+b") as handle:
            handle.seek(at)
            handle.write(b"\0\0\0\0")
        assert (before != source.tensor(name)).nonzero().tolist() == [[0, 0]]


def test_a_shard_of_another_byte_order(checkpoint: Path) -> None:
    """torch would swap the bytes, of a mapped file it cannot."""
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes().replace(b"little", b"biggie"))
    with (
        open_training(checkpoint) as source,
        pytest.raises(ValueError, match=r"norm\.weight is damaged \(its bytes are in"),
    ):
        source.tensor("model.norm.weight")


def test_a_missing_file(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    file.unlink()
    with pytest.raises(ValueError, match=f"{file}: not found, .* copy this file too"):
        open_training(checkpoint)


def test_command(checkpoint: Path, tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any) -> None:
    from typer.testing import CliRunner

    from convert.__main__ import app

    done = CliRunner().invoke(app, [str(checkpoint), str(tmp_path / "out"), "--dtype", "bfloat16", "--verify"])
    assert done.exit_code == 0, done.output
    tensors = random_tensors(tiny_config)
    assert_same(tmp_path / "out", {name: tensor.bfloat16() for name, tensor in tensors.items()})
    done = CliRunner().invoke(app, ["--inspect", str(checkpoint)])
    assert "F32 (21 tensors)" in done.output
