"""DeepSeek's three-stage learning rate (DeepSeek LLM report, section 2.3; DeepSeek-Coder paper, section 3.4).

Linear warm-up, then three constant stages, each sqrt(1/10) of the one before: 100 %, 31.6 % and 10 % of the peak.
"""

from collections.abc import Sequence


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, stage_ends: Sequence[float]) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`.

    stage_ends: fractions of `steps` at which a stage ends and the next begins; DeepSeek's are (0.8, 0.9),
        and () is constant.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    stage = sum(step >= round(end * steps) for end in stage_ends)
    return peak * 10 ** (-stage / 2)
