"""Fill-in-the-middle samples, made from whole documents, before packing.

DeepSeek-Coder's choice (paper, section 3.1.2): order PSM, rate 0.5, cuts by character, two cut points drawn uniformly
from 0..length inclusive, so that prefix, middle and suffix may each be empty.

The hard idea: **no random state**. Every draw is a hash of (seed, epoch, document, purpose), so a sample is the same
whichever process makes it, in whatever order, before or after a resume. A stateful generator in the data loader gives
other samples for another number of workers.
"""

from collections.abc import Sequence

import numpy as np

from deepseek_coder import prompts
from deepseek_coder.tokenizer import Tokenizer

# Purposes of a draw; each has its own stream of random numbers.
IS_FIM, FIRST_CUT, SECOND_CUT, DOCUMENT_ORDER, BIN_ORDER = range(5)

SENTINELS = 3
# Cut texts encode to a few tokens more than the whole: tokens up to 8 around the cuts change.
SLACK = 8


def uniform(seed: int, epoch: int, document: np.ndarray | int, purpose: int) -> np.ndarray:
    """float64 in [0, 1), shaped like `document` (integer ids): a pure function of its arguments.

    The mixing function is SplitMix64's finaliser (Steele, Lea, Flood 2014), applied after each argument.
    """
    with np.errstate(over="ignore"):
        state = np.zeros_like(np.asarray(document, dtype=np.uint64))
        for part in (
            np.uint64(seed % 2**64),
            np.uint64(epoch),
            np.asarray(document, dtype=np.uint64),
            np.uint64(purpose),
        ):
            state = state * np.uint64(0x9E3779B97F4A7C15) + part + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def cuts(length: int, seed: int, epoch: int, document: int) -> tuple[int, int]:
    """Two sorted cut points in 0..length, both ends possible."""
    first, second = (int(uniform(seed, epoch, document, purpose) * (length + 1)) for purpose in (FIRST_CUT, SECOND_CUT))
    return min(first, second), max(first, second)


def plain_sample(tokenizer: Tokenizer, ids: Sequence[int], eos: int) -> list[int]:
    """[BOS] document EOS."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return [*bos, *ids, eos]


def fim_sample(
    tokenizer: Tokenizer, before: Sequence[int], text: str, cut: tuple[int, int], eos: int
) -> tuple[list[int], int]:
    """[BOS] <begin> before + prefix <hole> suffix <end> middle EOS, and the length up to <end>.

    before: ids of the repository's other files, the beginning of the prefix. text: the last file, cut at `cut`.
    The three parts are encoded as they will be in a prompt: each on its own.
    """
    prefix, middle, suffix = tokenizer.encode_batch([text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :]])
    prompt = prompts.fim_sample(tokenizer, [*before, *prefix], suffix)
    return [*prompt, *middle, eos], len(prompt)
