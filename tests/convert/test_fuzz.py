"""2,000 damaged files of every format: a model, or an error with the file's name and the reason; nothing else.

They are read in a process of its own that may use little memory and time, and in which starting programs, connecting
and writing files is an error, because that is what a malicious file would be after.
"""

import json
import pickle
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from convert import names
from convert.gguf_writer import write_gguf

ROOT = Path(__file__).parents[2]
COUNT = 2000

READER = """
    import faulthandler, resource, sys, tempfile, warnings
    from pathlib import Path
    import torch, numpy, gguf, gguf.quants
    import torch.distributed.checkpoint
    from convert import open_checkpoint
    from convert.adapter import open_adapter

    config = eval(sys.argv[1])
    # Threads have been started and modules imported by now; what comes is for the files alone.
    open_checkpoint(sys.argv[2]).close()
    limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 400_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect",
                 "ctypes.dlopen", "os.remove", "os.rename", "shutil.rmtree")

    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN or writes:
            print("EXECUTED", event, arguments, flush=True)
            sys.exit(3)

    sys.addaudithook(hook)
    for line in sys.stdin:
        path, kind, main = line.rstrip("\\n").split("\\t")
        faulthandler.dump_traceback_later(20, exit=True)
        try:
            if kind == "guard":
                Path(path).write_bytes(bytes(2**30) if main == "memory" else b"")
            elif kind == "adapter":
                open_adapter(path, config)
            else:
                with open_checkpoint(path) as checkpoint:
                    for name in checkpoint.shapes:
                        checkpoint.tensor(name)
                    if kind == "gguf":
                        checkpoint.tokenizer_files
            print("model", flush=True)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            good = main in message and len(message) < 700 and "\\n" not in message
            print("refused" if good else f"UNCLEAR {message!r}", flush=True)
        except BaseException as error:
            print(f"ESCAPED {type(error).__name__}: {error}".replace("\\n", " "), flush=True)
        faulthandler.cancel_dump_traceback_later()
"""


@pytest.fixture
def sources(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, llama2c: Any
) -> dict[str, tuple[Path, list[Path], str]]:
    """Kind -> what to open, the files to damage, what must be named in errors."""
    tensors = random_tensors(tiny_config | {"num_hidden_layers": 1})
    config = json.dumps(tiny_config | {"num_hidden_layers": 1})
    found = {}

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        return tmp_path / name

    one = folder("safetensors")
    save_file(tensors, one / "model.safetensors")
    found["safetensors"] = one, [one / "model.safetensors"], str(one)
    found["config"] = one, [one / "config.json"], str(one)
    shards = folder("index")
    save_file(tensors, shards / "model-1.safetensors")
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}))
    found["index"] = shards, [index], str(shards)
    for kind, zip_format in (("bin", True), ("old bin", False)):
        pickled = folder(kind)
        torch.save(tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)
        found[kind] = pickled, [pickled / "pytorch_model.bin"], str(pickled)
    gguf = tmp_path / "m.gguf"
    symbols = {chr(33 + i): i for i in range(60)}
    rules = {
        "type": "Sequence",
        "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
    }
    tokenizer = {"model": {"type": "BPE", "vocab": symbols, "merges": []}, "added_tokens": [], "pre_tokenizer": rules}
    files = {"tokenizer.json": json.dumps(tokenizer).encode()}
    write_gguf(gguf, json.loads(config), tensors.items(), "q8_0", tokenizer_files=files)
    found["gguf"] = gguf, [gguf], str(gguf)
    training = tmp_path / "dcp"
    ours = {
        f"model.{name}": torch.cat([tensors[part.name] for part in parts])
        for name, parts in names.fused(json.loads(config)).items()
    }
    dcp.save(ours, checkpoint_id=training, no_dist=True)
    (training / "config.json").write_text(config)
    found["dcp"] = training, [training / ".metadata", next(training.glob("*.distcp"))], str(training)
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "params.json").write_text(json.dumps(llama2c.params | {"n_kv_heads": 2}))
    torch.save(llama2c.make(), meta / "consolidated.00.pth")
    found["meta"] = meta, [meta / "params.json", meta / "consolidated.00.pth"], str(meta)
    llama2c.write(tmp_path / "stories.bin", llama2c.make(), 2, False)
    found["llama2c"] = tmp_path / "stories.bin", [tmp_path / "stories.bin"], str(tmp_path / "stories.bin")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"up_proj": 3}, "bias": "none"}'
    )
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file(
        {f"{key}A.weight": torch.ones(2, 32), f"{key}B.weight": torch.ones(48, 2)},
        adapter / "adapter_model.safetensors",
    )
    found["adapter"] = adapter, [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"], str(adapter)
    return found


EVIL = pickle.dumps({"x": print}, protocol=2)


def damage(raw: bytes, dice: random.Random) -> bytes:
    """Bytes changed, cut, doubled, numbers made huge or odd, text made other text, or the whole replaced."""
    changed = bytearray(raw)
    # Mostly where the structure is: at the beginning, or at the end in zip archives.
    span = min(len(raw), dice.choice((64, 1024, 8192)))
    start = dice.choice((0, 0, len(raw) - span))

    def flip() -> None:
        for _ in range(dice.randint(1, 8)):
            changed[start + dice.randrange(span)] = dice.randrange(256)

    def number() -> None:
        at, width = start + dice.randrange(span), dice.choice((4, 8))
        value = dice.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
        changed[at : at + width] = (value & (2 ** (8 * width) - 1)).to_bytes(width, "little")

    def text() -> None:
        for old in dice.sample(
            [b"0", b"1", b"4", b"6", b'"', b"[", b"]", b"{", b"}", b",", b":", b"F32", b"null", b"e"], 3
        ):
            at = changed.find(old, dice.randrange(len(changed) or 1))
            if at >= 0:
                new = dice.choice(
                    [
                        b"-1",
                        b"1e999",
                        b"99999999999999999999",
                        b"null",
                        b"[]",
                        b"{}",
                        b'"../x"',
                        b"true",
                        b'"',
                        b"NaN",
                        b"\xff",
                        b"[" * 3000,
                        b"I64",
                    ]
                )
                changed[at : at + len(old)] = new

    def cut() -> None:
        del changed[dice.randrange(len(changed)) :]

    def piece() -> None:
        at = dice.randrange(len(changed))
        changed[at:at] = changed[dice.randrange(len(changed)) :][: dice.randrange(200)]

    def replace() -> None:
        changed[:] = dice.choice([b"", EVIL, b"[]", b"{}", b"null", dice.randbytes(300)])

    for _ in range(dice.randint(1, 2)):
        if changed and len(changed) >= start + span:
            dice.choice((flip, flip, number, text, text, cut, piece, replace))()
    return bytes(changed)


def test_damaged_files(sources: Any, tmp_path: Path, tiny_config: Any, monkeypatch: Any) -> None:
    originals = {file: file.read_bytes() for _, files, _ in sources.values() for file in files}
    config = tiny_config | {"num_hidden_layers": 1}
    command = [sys.executable, "-c", textwrap.dedent(READER), repr(config), str(sources["safetensors"][0])]
    reader = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin is not None
    assert reader.stdout is not None
    # The guards themselves.
    for guarded, expected in (("memory", "ESCAPED MemoryError"), ("write", "EXECUTED open")):
        reader.stdin.write(f"{tmp_path / 'guard'}\tguard\t{guarded}\n")
        reader.stdin.flush()
        assert reader.stdout.readline().startswith(expected)
    assert not (tmp_path / "guard").exists()
    reader.stdout.readline()
    dice, kinds, outcomes = random.Random(5), sorted(sources), dict.fromkeys(sources, 0)
    for i in range(COUNT):
        kind = kinds[i % len(kinds)]
        path, files, main = sources[kind]
        file = dice.choice(files)
        file.write_bytes(damage(originals[file], dice))
        reader.stdin.write(f"{path}\t{kind}\t{main}\n")
        reader.stdin.flush()
        outcome = reader.stdout.readline().rstrip("\n")
        if outcome not in ("model", "refused"):
            kept = tmp_path / f"case-{i}"
            kept.write_bytes(file.read_bytes())
            reader.kill()
            pytest.fail(f"case {i}, {kind}, {file.name} kept as {kept}: {outcome or 'the reader died'}")
        outcomes[kind] += outcome == "refused"
        file.write_bytes(originals[file])
    reader.stdin.close()
    assert reader.wait(timeout=20) == 0
    # Many changes hit numbers of weights and harm nothing; but of each kind enough must have been noticed.
    assert all(refused > COUNT // len(kinds) // 5 for refused in outcomes.values()), outcomes
