"""2,000 damaged files of every kind: a model, or a ValueError with the file's name and the reason; nothing else.

They are read in a process of its own that may use little memory and time, and in which starting programs, connecting
and writing files is an error, because that is what a malicious file would be after.
"""

import json
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
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
KINDS = ("safetensors", "config", "index", "bin", "old bin", "gguf", "dcp", "meta", "llama2c", "adapter")

READER = """
    import faulthandler, os, resource, sys
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
                if main == "crash":
                    os.abort()
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
        except ValueError as error:
            message = str(error)
            good = message.startswith(main) and len(message) < 700 and "\\n" not in message
            print("refused" if good else f"UNCLEAR {message!r}", flush=True)
        except BaseException as error:
            print(f"ESCAPED {type(error).__name__}: {error}".replace("\\n", " "), flush=True)
        faulthandler.cancel_dump_traceback_later()
"""


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Any, random_tensors: Any, llama2c: Any
) -> dict[str, tuple[Path, list[Path]]]:
    """Kind -> what to open, the files to damage."""
    tmp_path = tmp_path_factory.mktemp("sources")
    tensors = random_tensors(tiny_config | {"num_hidden_layers": 1})
    config = json.dumps(tiny_config | {"num_hidden_layers": 1})
    found = {}

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        return tmp_path / name

    one = folder("safetensors")
    save_file(tensors, one / "model.safetensors")
    found["safetensors"] = one, [one / "model.safetensors"]
    other = shutil.copytree(one, tmp_path / "config")
    found["config"] = other, [other / "config.json"]
    shards = folder("index")
    save_file(tensors, shards / "model-1.safetensors")
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}))
    found["index"] = shards, [index]
    for kind, zip_format in (("bin", True), ("old bin", False)):
        pickled = folder(kind)
        torch.save(tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)
        found[kind] = pickled, [pickled / "pytorch_model.bin"]
    gguf = tmp_path / "m.gguf"
    symbols = {chr(33 + i): i for i in range(60)}
    rules = {
        "type": "Sequence",
        "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
    }
    tokenizer = {"model": {"type": "BPE", "vocab": symbols, "merges": []}, "added_tokens": [], "pre_tokenizer": rules}
    files = {"tokenizer.json": json.dumps(tokenizer).encode()}
    write_gguf(gguf, json.loads(config), tensors.items(), "q8_0", tokenizer_files=files)
    found["gguf"] = gguf, [gguf]
    training = tmp_path / "dcp"
    ours = {
        f"model.{name}": torch.cat([tensors[part.name] for part in parts])
        for name, parts in names.fused(json.loads(config)).items()
    }
    dcp.save(ours, checkpoint_id=training, no_dist=True)
    (training / "config.json").write_text(config)
    found["dcp"] = training, [training / ".metadata", next(training.glob("*.distcp"))]
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "params.json").write_text(json.dumps(llama2c.params | {"n_kv_heads": 2}))
    torch.save(llama2c.make(), meta / "consolidated.00.pth")
    found["meta"] = meta, [meta / "params.json", meta / "consolidated.00.pth"]
    llama2c.write(tmp_path / "stories.bin", llama2c.make(), 2, False)
    found["llama2c"] = tmp_path / "stories.bin", [tmp_path / "stories.bin"]
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
    found["adapter"] = adapter, [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
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


class Reader:
    """The process that opens the files; a new one if it died of the last."""

    def __init__(self, config: dict[str, Any], sound: Path) -> None:
        self._command = [sys.executable, "-c", textwrap.dedent(READER), repr(config), str(sound)]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, path: Path, kind: str, named: object) -> str:
        """What became of one file; empty if the process died or was stopped after 20 seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path}\t{kind}\t{named}\n")
        self._process.stdin.flush()
        outcome = self._process.stdout.readline().rstrip("\n")
        if not outcome or outcome.startswith("EXECUTED"):
            self.close()
            self._start()
        return outcome

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def reader(sources: Any, tiny_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    sound = shutil.copytree(sources["safetensors"][0], tmp_path_factory.mktemp("sound") / "model")
    made = Reader(tiny_config | {"num_hidden_layers": 1}, sound)
    yield made
    made.close()


def test_the_guards(reader: Reader, tmp_path: Path) -> None:
    assert reader.ask(tmp_path / "guard", "guard", "memory").startswith("ESCAPED MemoryError")
    assert reader.ask(tmp_path / "guard", "guard", "write").startswith("EXECUTED open")
    assert not (tmp_path / "guard").exists()
    assert reader.ask(tmp_path / "guard", "guard", "crash") == ""
    assert reader.ask(tmp_path / "guard", "safetensors", "guard").startswith("ESCAPED FileNotFoundError")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(sources: Any, reader: Reader, kind: str) -> None:
    path, files = sources[kind]
    originals = [file.read_bytes() for file in files]
    refused = 0

    # Seeds instead of hypothesis, which spends most of the time on each choice: a failure names its file, which stays.
    for number in range(COUNT):
        dice = random.Random(f"{kind} {number}")
        which = dice.randrange(len(files))
        file = files[which]
        file.write_bytes(damage(originals[which], dice))
        outcome = reader.ask(path, kind, path)
        assert outcome in ("model", "refused"), f"{file.name} kept as {file}: {outcome or 'the reader died'}"
        refused += outcome == "refused"
        file.write_bytes(originals[which])

    # Many changes hit numbers of weights and harm nothing; but enough must have been noticed.
    assert refused > COUNT // 5
