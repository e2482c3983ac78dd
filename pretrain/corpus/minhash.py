"""MinHash signatures at memory speed: the words of a document are never Python objects.

Hashing is the cost of near-dedup, and in the usual recipes most of it is splitting text into Python strings. Here a
batch of documents is one array of bytes. A table maps a byte to a random 64-bit value, upper case to that of lower
case and everything that is no word to 0. Times the powers of an odd number, summed from each word's start to the next
(two values of one running sum) and divided by the power at its start, it is the word's polynomial hash. Five shifted
products make the hashes of the 5-grams, and `rensa` (or numpy, some six times slower) takes the minima under 256 hash
functions.

Words are runs of ASCII letters, digits, underscores and all bytes >= 0x80, without regard to ASCII case: `\\w+` of the
lower-cased text, near enough. BigCode splits on single `\\W` and keeps the empty strings between; its shingles differ.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

try:
    import rensa
except ModuleNotFoundError:  # slower, and other signatures: VERSION says which
    rensa = None

U64 = NDArray[np.uint64]

# Signatures of another version cannot be compared: it goes into the keys of the stages that make and match them.
VERSION = f"words-1 rensa-{rensa.RMinHash.ALGORITHM_VERSION}" if rensa else "words-1 numpy-1"

_SEED = 42
_CHUNK = 1 << 18  # bytes hashed at once: their 64-bit products stay in the second-level cache
_RANDOM = np.random.Generator(np.random.PCG64(_SEED))
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
LONGEST = 64  # words in an n-gram, and rows in a band
_FACTORS = _RANDOM.integers(0, 1 << 63, size=LONGEST, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _byte_values() -> U64:
    values = _RANDOM.integers(1, 1 << 63, size=256, dtype=np.uint64)
    for byte in range(128):
        character = chr(byte)
        if not (character.isalnum() or character == "_"):
            values[byte] = 0
        elif character.isupper():
            values[byte] = values[ord(character.lower())]
    return values


_BYTES = _byte_values()
IS_WORD = _BYTES > 0
_WORD_TABLE = IS_WORD.tobytes()  # for bytes.translate, twice as fast as an index of numpy's


@cache
def _powers(base: int) -> U64:
    powers = np.full(_CHUNK, base, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def mixed(values: U64) -> U64:
    """The finaliser of MurmurHash3: every bit of the input reaches every bit of the output."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def word_hashes(texts: Sequence[bytes]) -> tuple[U64, NDArray[np.int64]]:
    """(hashes of all words one after another, offsets): the words of text i are hashes[offsets[i] : offsets[i + 1]].

    A word's hash depends on its bytes alone. Of a word longer than 256 KiB each 256 KiB count as a word.
    """
    buffer = b"\n".join(texts)
    data = np.frombuffer(buffer, dtype=np.uint8)
    words = np.frombuffer(buffer.translate(_WORD_TABLE), dtype=np.bool_)
    starts, hashes = [], []
    forward, back = _powers(_MULTIPLIER), _powers(pow(_MULTIPLIER, -1, 1 << 64))
    products = np.empty(min(len(data), _CHUNK), dtype=np.uint64)
    begin = 0
    while begin < len(data):
        word = words[begin : begin + _CHUNK]
        if begin + len(word) < len(data) and word[-1]:  # leave the word that the end cuts to the next chunk
            gaps = np.flatnonzero(~word[::-1])
            if len(gaps):
                word = word[: -gaps[0]]
        first = np.flatnonzero(word[1:] > word[:-1]) + 1
        if word[0]:
            first = np.concatenate(([0], first))
        if len(first):
            sums = np.take(_BYTES, data[begin : begin + len(word)], out=products[: len(word)], mode="clip")
            sums *= forward[: len(word)]
            np.cumsum(sums, out=sums)
            ends = np.append(first[1:], len(word)) - 1  # between words nothing is added
            hashes.append(np.diff(sums[ends], prepend=np.uint64(0)) * back[first])
            starts.append(first + begin)
        begin += len(word)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    borders = np.concatenate(([0], np.cumsum(lengths + 1)))
    if not starts:
        return np.zeros(0, dtype=np.uint64), np.zeros(len(texts) + 1, dtype=np.int64)
    return mixed(np.concatenate(hashes)), np.searchsorted(np.concatenate(starts), borders)


def sequences(words: U64, n: int) -> U64:
    """The hash of the n words from each word on, those that begin in one text and end in another among them."""
    count = max(len(words) - n + 1, 0)
    hashes = words[:count] * _FACTORS[0]
    for k in range(1, n):
        hashes += words[k : k + count] * _FACTORS[k]
    return hashes


def sequences_at(words: U64, begins: NDArray[np.int64], n: int) -> U64:
    """Of `sequences` those that begin at these words."""
    hashes = np.zeros(len(begins), dtype=np.uint64)
    for k in range(n):
        hashes += words[begins + k] * _FACTORS[k]
    return hashes


def grams(words: U64, offsets: NDArray[np.int64], n: int) -> tuple[U64, NDArray[np.int64]]:
    """The n-gram hashes of each text, with offsets like those of `words`; a text of fewer than n words has none."""
    counts = np.maximum(np.diff(offsets) - (n - 1), 0)
    ends = np.cumsum(counts)
    inside = np.arange(ends[-1] if len(ends) else 0)
    inside += np.repeat(offsets[:-1] - (ends - counts), counts)
    return mixed(sequences(words, n)[inside]), np.concatenate(([0], ends))


def signatures(texts: Sequence[bytes], n: int = 5, permutations: int = 256) -> NDArray[np.uint32]:
    """(texts, permutations) uint32: the MinHash signature of each text's n-grams.

    The share of equal entries of two rows estimates the Jaccard similarity of the two sets of n-grams, with a standard
    deviation of sqrt(J (1 - J) / permutations). A text without any n-gram has the largest value everywhere.
    """
    hashes, offsets = grams(*word_hashes(texts), n)
    found = np.full((len(texts), permutations), 0xFFFFFFFF, dtype=np.uint32)
    some = np.flatnonzero(np.diff(offsets))
    if len(some):
        borders = np.concatenate((offsets[some], offsets[-1:]))
        found[some] = _minima(hashes, borders, permutations)
    return found


def _minima(hashes: U64, offsets: NDArray[np.int64], permutations: int) -> NDArray[np.uint32]:
    if rensa is None:
        return numpy_minima(hashes, offsets, permutations)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), permutations, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def numpy_minima(hashes: U64, offsets: NDArray[np.int64], permutations: int) -> NDArray[np.uint32]:
    """Without rensa: the upper halves of multiply-add hashes of the 64-bit n-gram hashes; their minima text by text."""
    generator = np.random.Generator(np.random.PCG64(_SEED))
    factors = generator.integers(0, 1 << 63, size=permutations, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    terms = generator.integers(0, 1 << 63, size=permutations, dtype=np.uint64)
    found = np.full((len(offsets) - 1, permutations), 0xFFFFFFFF, dtype=np.uint32)
    for text, (begin, end) in enumerate(pairwise(offsets)):
        for part in range(int(begin), int(end), 1024):  # a block of 1024 x permutations products at a time
            block = hashes[part : min(part + 1024, int(end)), None] * factors + terms
            np.minimum(found[text], (block >> np.uint64(32)).min(axis=0).astype(np.uint32), out=found[text])
    return found


@cache
def bands(threshold: float, permutations: int = 256) -> tuple[int, int]:
    """(bands, rows) for which the chance to be compared, 1 - (1 - J^rows)^bands, is nearest to a step there.

    The sum of the areas of false positives below and false negatives above is least: datasketch's choice with equal
    weights; (25, 10) for 0.7 and 256.
    """
    edges = np.arange(0.0, 1.0, 0.001) + 0.0005  # midpoints
    best = (math.inf, 1, permutations)
    for number in range(1, permutations + 1):
        for rows in range(1, min(permutations // number, LONGEST) + 1):
            missed = (1.0 - edges**rows) ** number
            wrong = float(np.where(edges < threshold, 1.0 - missed, missed).sum())
            best = min(best, (wrong, number, rows))
    return best[1], best[2]


def band_keys(signatures: NDArray[np.uint32], number: int, rows: int) -> U64:
    """(texts, bands) uint64: equal where the signatures agree in the whole band."""
    used = signatures[:, : number * rows].reshape(-1, number, rows).astype(np.uint64)
    return mixed((used * _FACTORS[:rows]).sum(axis=2, dtype=np.uint64) + np.arange(number, dtype=np.uint64))
