"""Where a converted model comes from: for its readers, and for a later call that goes on with an interrupted one."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from .checkpoint import Checkpoint


def fingerprint(checkpoint: Checkpoint, dtype: str | None, max_shard_size: int) -> str:
    """Names one piece of work: the same source files, unchanged, converted in the same way."""
    stats = [(str(file.resolve()), file.stat()) for file in checkpoint.weight_files]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    work = json.dumps([files, checkpoint.config, dtype, max_shard_size], sort_keys=True)
    return hashlib.sha256(work.encode()).hexdigest()


def model_card(checkpoint: Checkpoint, name: str, dtype: str | None, adapter: Path | None) -> str:
    """The README.md of a converted model: a stub with its provenance, to be completed by whoever publishes it."""
    stored = ", ".join(f"{kind} ({count} tensors)" for kind, count in Counter(checkpoint.stored.values()).most_common())
    files = "\n".join(f"- {file.name}, {file.stat().st_size:,} bytes" for file in checkpoint.weight_files)
    merged = f" The LoRA adapter {adapter.resolve().name} is merged into the weights." if adapter else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

Converted by deepseek-coder-torch (`python -m convert`) from `{checkpoint.source.resolve().name}`, stored as {stored};
written {f"as {dtype}" if dtype else "in the same types"}.{merged}

Source files:

{files}

The licence of the original weights applies to these too, use restrictions included: pass its text on with them.
"""
