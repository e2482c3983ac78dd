import errno
import os
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint import CheckpointException

from deepseek_coder import ModelConfig
from pretrain import checkpoint

CONFIG = ModelConfig(100, 8, 8, 2, 1, 1, 8)


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(*args, **kwargs):
    raise CheckpointException("save", {0: (RuntimeError("torch's words"), None)})


@pytest.mark.parametrize(
    "save, free, reason",
    [
        (failing, 0, "No space left on device"),
        (failing, 2**40, "torch's words"),
        (lambda *args, **kwargs: None, 0, "No space left on device"),  # the tensors fit, the tokenizer doesn't
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, save, free, reason):
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint.dist, "barrier", lambda: None)
    monkeypatch.setattr(checkpoint, "_tensors", lambda *args: {})
    monkeypatch.setattr(checkpoint.dcp, "save", save)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    model, tokenizer = SimpleNamespace(config=CONFIG), SimpleNamespace(save=full)
    with pytest.raises(ValueError, match=rf"step-00000003: cannot be written \({reason}\); free space"):
        checkpoint.save(tmp_path, 3, model, None, tokenizer, 2)
    assert not list((tmp_path / "checkpoints").iterdir())
