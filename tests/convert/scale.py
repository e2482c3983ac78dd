"""Converts a synthetic model with the exact shapes of a released one and prints what that took, as JSON.

    python tests/convert/scale.py deepseek-coder-33b-base DESTINATION [--sink] [--layers N] [--shard 5GB] [--training]

With --sink the tensors are hashed instead of written, for models larger than the disk; with --training they come from
a training checkpoint in float32 that one process wrote beside DESTINATION. Everything else is the command that users
run. Peak memory is RssAnon of Linux: what the process really holds, without pages of mapped files.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[2]))
import convert
from convert import names, writer
from convert.__main__ import app
from convert.checkpoint import Checkpoint
from convert.config import normalise_config
from deepseek_coder import ModelConfig

RANDOM = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()


class Synthetic(Checkpoint):
    """Tensors that are made when asked for: one block of random numbers repeated, from another place for every name."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.source, self.config, self.generation_config = Path("synthetic"), config, {}
        self.shapes = names.huggingface(config)
        self.dtypes = dict.fromkeys(self.shapes, torch.bfloat16)
        self.stored = dict.fromkeys(self.shapes, "BF16")
        self._place = {name: i * 1009 for i, name in enumerate(self.shapes)}

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    @property
    def weight_files(self) -> list[Path]:
        return []

    def tensor(self, name: str) -> torch.Tensor:
        tensor = torch.empty(math.prod(self.shapes[name]), dtype=torch.bfloat16)
        # A view, because a copy would leave holes in the heap that no real source leaves.
        block = RANDOM[self._place[name] :]
        for part in tensor.split(len(block)):
            part.copy_(block[: len(part)])
        return tensor.reshape(self.shapes[name])

    def close(self) -> None:
        pass


def training_checkpoint(source: Checkpoint, folder: Path) -> Checkpoint:
    """The same numbers as float32 in a training checkpoint of one process, fused matrices in one piece."""
    weights = {
        f"model.{name}": torch.cat([source.tensor(part.name).float() for part in parts])
        for name, parts in names.fused(source.config).items()
    }
    dcp.save(weights, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text(json.dumps(source.config))
    return convert.open_checkpoint(folder)


def anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Looks at the memory every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("destination")
    parser.add_argument("--sink", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shard", default="5GB")
    parser.add_argument("--training", action="store_true")
    options = parser.parse_args()
    config = normalise_config(ModelConfig.released(options.name).to_dict(), options.name)
    if options.layers:
        config["num_hidden_layers"] = options.layers
    source: Checkpoint = Synthetic(config)
    if options.training:
        source = training_checkpoint(source, Path(options.destination).with_name("training"))
    digests, shards = {}, []

    def sink(tensors: dict[str, torch.Tensor], file: Path, metadata: Any) -> None:
        file.touch()
        shards.append(sum(tensor.nbytes for tensor in tensors.values()))
        for name, tensor in tensors.items():
            digests[name] = hashlib.sha256(memoryview(tensor.view(torch.uint8).numpy()).cast("B")).hexdigest()

    if options.sink:
        writer.save_file = sink
    convert.open_checkpoint = lambda path: source
    before, peak, begin = anonymous(), Peak(), time.monotonic()
    peak.start()
    arguments = ["synthetic", options.destination, "--max-shard-size", options.shard, "--dtype", "bfloat16"]
    app(arguments, standalone_mode=False)
    seconds = time.monotonic() - begin
    if not options.sink:
        shards = [file.stat().st_size for file in Path(options.destination).glob("*.safetensors")]
    size = sum(math.prod(shape) for shape in source.shapes.values()) * 2
    report = {
        "name": options.name,
        "parameters": size // 2,
        "bytes": size,
        "largest_shard": max(shards),
        "shards": len(shards),
        "peak_anonymous": peak.bytes - before,
        "seconds": round(seconds, 1),
        "digests": digests,
    }
    print(json.dumps(report))
    os._exit(0)


if __name__ == "__main__":
    main()
