"""Fill-in-the-middle samples, made from whole documents, before packing.

DeepSeek-Coder's choice (paper, section 3.1.2) is the default: order PSM, rate 0.5, cuts by character, two cut points
drawn uniformly from 0..length inclusive, so that prefix, middle and suffix may each be empty.

    psm    <begin> prefix <hole> suffix <end> middle EOS
    spm    <hole> suffix <begin> prefix <end> middle EOS      (Seed-Coder)
    joint  <begin> <hole> suffix <end> prefix middle EOS      (SPM of the FIM paper: prefix and middle encoded as one)

Where the hole may lie: `char`, anywhere; `line`, around whole lines; `ast`, around whole syntax nodes (AST-FIM, arXiv
2506.00204).

The hard idea: **no random state**. Every draw is a hash of (seed, epoch, document, purpose), so a sample is the same
whichever process makes it, in whatever order, before or after a resume. A stateful generator in the data loader gives
other samples for another number of workers.
"""

import re
from collections.abc import Sequence

import numpy as np

from deepseek_coder import prompts, repository
from deepseek_coder.languages import language_of
from deepseek_coder.tokenizer import Tokenizer

from . import grammars

MODES = prompts.FIM_MODES
SPANS = ("char", "line", "ast")

# Purposes of a draw; each has its own stream of random numbers.
IS_FIM, FIRST_CUT, SECOND_CUT, DOCUMENT_ORDER, BIN_ORDER, MODE, SPAN = range(7)

SENTINELS = 3
# Cut texts encode to a few tokens more than the whole: tokens up to 8 around the cuts change.
SLACK = 8
# A file with less text behind its path comment stays plain: there is nothing to learn from its parts.
MIN_CHARACTERS = 10


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


def choose(options: Sequence[str], seed: int, epoch: int, document: int, purpose: int) -> str:
    """One of the options, each as likely; a document's only one without a draw."""
    return options[int(uniform(seed, epoch, document, purpose) * len(options))] if len(options) > 1 else options[0]


def cuts(length: int, seed: int, epoch: int, document: int) -> tuple[int, int]:
    """Two sorted cut points in 0..length, both ends possible."""
    first, second = (int(uniform(seed, epoch, document, purpose) * (length + 1)) for purpose in (FIRST_CUT, SECOND_CUT))
    return min(first, second), max(first, second)


def hole(text: str, span: str, seed: int, epoch: int, document: int) -> tuple[int, int] | None:
    """Where a file's text is cut, as two positions in it; None for a text that stays plain.

    text: as a document holds it, behind its path comment, which also names the language for span "ast". A language
    without a grammar is cut around lines then.
    """
    if len(text) - (text.find("\n") + 1) < MIN_CHARACTERS:
        return None
    if span == "ast":
        language = _grammar_of(text)
        if language is not None:
            return _node(text, language, cuts(len(text), seed, epoch, document))
    if span == "char":
        return cuts(len(text), seed, epoch, document)
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    if starts[-1] != len(text):
        starts.append(len(text))
    first, second = cuts(len(starts) - 1, seed, epoch, document)
    return starts[first], starts[second]


def _grammar_of(text: str) -> str | None:
    path = repository.path_in_comment(text.partition("\n")[0]) or ""
    language = language_of(path)
    name = "TSX" if path.endswith(".tsx") else language.name if language else ""
    return name if name in grammars.GRAMMARS else None


def _node(text: str, language: str, cut: tuple[int, int]) -> tuple[int, int]:
    """The cut widened to whole syntax nodes: of the smallest node around it, the children that it touches, or the first
    one behind it. Named children only: brackets and keywords go with what they belong to."""
    source = text.encode("utf-8", "replace")
    first, second = (len(text[:position].encode("utf-8", "replace")) for position in cut)
    node = grammars.parser(language).parse(source).root_node.named_descendant_for_byte_range(first, second)
    children = node.named_children or [node] if node is not None else []
    if not children:
        return cut
    later = [child for child in children if child.end_byte > first] or children[-1:]
    touched = [child for child in later if child.start_byte < second] or later[:1]
    start, stop = (len(source[:at].decode("utf-8", "ignore")) for at in (touched[0].start_byte, touched[-1].end_byte))
    return start, stop


def plain_sample(tokenizer: Tokenizer, ids: Sequence[int], eos: int) -> list[int]:
    """[BOS] document EOS."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return [*bos, *ids, eos]


def fim_sample(
    tokenizer: Tokenizer, before: Sequence[int], text: str, cut: tuple[int, int], eos: int, mode: str = "psm"
) -> tuple[list[int], int]:
    """A sample in one of MODES, and how many of its first tokens are given: all that is not the middle and EOS.

    before: ids of the repository's other files, the beginning of the prefix. text: the last file, cut at `cut`.
    The parts are encoded as they will be in a prompt, each on its own; in the mode "joint", prefix and middle as one,
    and a token that lies in both belongs to the middle.
    """
    prefix, middle, suffix = tokenizer.encode_batch([text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :]])
    prompt = prompts.fim_sample(tokenizer, [*before, *prefix], suffix, mode)
    if mode != "joint":
        return [*prompt, *middle, eos], len(prompt)
    both = tokenizer.encode(text[: cut[1]])
    same = next((i for i, (a, b) in enumerate(zip(prefix, both, strict=False)) if a != b), min(len(prefix), len(both)))
    head = prompt[: len(prompt) - len(prefix)]
    return [*head, *both, eos], len(head) + same
