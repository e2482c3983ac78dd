"""No kernel reads or writes outside its tensors, or waits for a barrier that it may not: compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_small_shapes(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("needs compute-sanitizer, a part of the CUDA toolkit")
    here = Path(__file__)
    environment = os.environ | {"PYTHONPATH": str(here.parents[2])}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or a stray access hits a neighbour unseen
    script = str(here.with_name("small_shapes.py"))
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "done" in result.stdout
    assert "ERROR SUMMARY: 0 errors" in result.stdout
