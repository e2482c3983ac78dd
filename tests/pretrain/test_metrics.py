import json
import math

import pytest

from deepseek_coder import ModelConfig
from pretrain import metrics
from pretrain.schedule import learning_rate


def test_flops_per_token_of_the_released_sizes():
    # 6 N and full attention as counted by hand for the 1.3B at 16K: 7.7 and 9.7 GFLOP a token.
    config = ModelConfig.released("deepseek-coder-1.3b-base")
    full = metrics.flops_per_token(config, 16384)
    assert full == pytest.approx(6 * (1_346_471_936 - 32256 * 2048 - 49 * 2048) + 12 * 24 * 2048 * 16384)
    assert full - metrics.flops_per_token(config, 16384, causal=True) == 6 * 24 * 2048 * 16384


def test_mfu_is_of_a_known_peak_or_none():
    config = ModelConfig.released("deepseek-coder-1.3b-base")
    flops = metrics.flops_per_token(config, 4096, causal=True)
    assert metrics.mfu(config, 4096, 989e12 / flops, "NVIDIA H200", causal=True) == pytest.approx(1.0)
    assert metrics.mfu(config, 4096, 1000.0, "Some GPU", causal=True) is None


def test_bits_per_byte():
    assert metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)


def test_metrics_file_drops_what_a_resumed_run_does_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(5)) + '{"step": 5, "lo')
    metrics.MetricsFile(file, 3).write({"step": 3, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in metrics.read(file)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_plot(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        metrics.plot(tmp_path, tmp_path / "loss.png")
    rows = [{"step": s, "loss": 3.0 - s, "learning_rate": 1e-3} for s in range(3)] + [{"step": 2, "valid_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    metrics.plot(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_three_stage_schedule():
    rates = [learning_rate(step, 1000, 4.2e-4, 100, (0.8, 0.9)) for step in range(1000)]
    assert rates[0] == pytest.approx(4.2e-6)
    assert rates[99] == rates[100] == rates[799] == 4.2e-4
    assert rates[800] == rates[899] == pytest.approx(4.2e-4 / 10**0.5)
    assert rates[900] == rates[999] == pytest.approx(4.2e-5)
    assert learning_rate(500, 1000, 1.0, 0, ()) == 1.0
