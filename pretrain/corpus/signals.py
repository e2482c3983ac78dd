"""OpenCoder's quality signals of a file, as numbers to look at and to choose by; no file is dropped for them.

As drops, with OpenCoder's thresholds (opc_data_filtering, code_filter_config.py), they take 23% of the files of
released Python libraries, mostly the `__init__` and interface files that a repository's order needs. Shares are of all
characters or lines unless it says otherwise.

Left out, because they need a lexer or a parser of each language: comments, string literals, variables, functions of a
single return and "no logic". A file that does not parse is syntax.py's affair; XML and the lengths of data and HTML are
rules.py's; encoded data shows in `long_words`. Differences: a statement counts at the start of a line (OpenCoder looks
for "import" anywhere, so "important" counts), and repeated n-grams are counted in words, not characters.
"""

import string

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from . import minhash

# Lines that begin with such a statement, by language; "": in every language.
_LINES: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"assert_lines": ("assert", "self.assert")},
    "Python": {
        "import_lines": ("import ", "from "),
        "pass_lines": ("pass ", "pass;"),
        "print_lines": ("print(", "print "),
        "function_lines": ("def ", "async def "),
    },
    "C": {"preprocessor_lines": ("#",), "main_functions": ("int main(", "int main (", "void main(", "void main (")},
}
_LINES["C++"] = _LINES["C"]
_TODO = ("TODO", "FIXME", "your code here", "Your code here")

NAMES = (
    "characters",
    "words",
    "lines",
    "mean_word",  # bytes in a word
    "mean_line",  # characters in a line
    "longest_line",
    "letters",  # of the characters that are no white space
    "digits",
    "white_space",
    "repeated_lines",  # lines that are there before, among those that are not empty
    "top_2grams",  # the most frequent n-gram's share of the words
    "top_3grams",
    "top_4grams",
    "repeated_5grams",  # n-grams of words that are there before, of all n-grams
    "repeated_10grams",
    "hex_words",  # bytes in words of 8 and more hexadecimal digits, one of them below ten
    "long_words",  # bytes in words of more than 20 bytes
    "todos",  # for each line
    *dict.fromkeys(name for lines in _LINES.values() for name in lines),
)
SCHEMA = pa.schema([(name, pa.float32()) for name in NAMES])


def signals(language: str, text: str) -> dict[str, float | None]:
    """The number of each of NAMES; None for those of other languages."""
    data = text.encode()
    size, lines = max(len(text), 1), text.removesuffix("\n").split("\n")
    codes = np.frombuffer(data, dtype=np.uint8)
    counts = np.bincount(codes, minlength=256)
    letters = int(counts[_LETTERS].sum()) if text.isascii() else sum(map(str.isalpha, text))
    white = int(counts[_WHITE].sum())
    words = minhash.word_hashes([data])
    number = len(words[0])
    lengths, hexadecimal = _word_shapes(codes)
    filled = [line for line in map(str.strip, lines) if line]
    found: dict[str, float | None] = dict.fromkeys(NAMES)
    found |= {
        "characters": len(text),
        "words": number,
        "lines": len(lines),
        "mean_word": int(lengths.sum()) / max(number, 1),
        "mean_line": (len(text) - len(lines) + 1) / len(lines),
        "longest_line": max(map(len, lines)),
        "letters": letters / max(len(text) - white, 1),
        "digits": int(counts[48:58].sum()) / size,
        "white_space": white / size,
        "repeated_lines": 1 - len(set(filled)) / max(len(filled), 1),
        "hex_words": int(lengths[hexadecimal & (lengths >= 8)].sum()) / max(len(data), 1),
        "long_words": int(lengths[lengths > 20].sum()) / max(len(data), 1),
        "todos": sum(map(text.count, _TODO)) / len(lines),
    }
    for n in (2, 3, 4):
        _, often = np.unique(minhash.grams(*words, n)[0], return_counts=True)
        found[f"top_{n}grams"] = n * int(often.max()) / number if len(often) and often.max() > 1 else 0.0
    for n in (5, 10):
        grams = minhash.grams(*words, n)[0]
        found[f"repeated_{n}grams"] = 1 - len(np.unique(grams)) / max(len(grams), 1)
    starts = [line + " " for line in filled]
    for name, prefixes in (_LINES[""] | _LINES.get(language, {})).items():
        hits = sum(line.startswith(prefixes) for line in starts)
        found[name] = hits if name == "main_functions" else hits / len(lines)
    return found


def _word_shapes(codes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Of each word the bytes, and whether all but an `x` in the second place are hexadecimal digits, one below ten."""
    edges = np.flatnonzero(np.diff(minhash.IS_WORD[codes], prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    lengths = ends - starts
    others = np.add.reduceat(_NOT_HEX[codes], starts)
    prefix = (lengths > 2) & (np.take(codes, starts + 1, mode="clip") | 32 == ord("x")) & (codes[starts] == ord("0"))
    return lengths, (others - prefix == 0) & (np.add.reduceat(_DIGIT[codes], starts) - prefix > 0)


_DIGIT = np.array([chr(byte).isdigit() and byte < 128 for byte in range(256)], dtype=np.int32)
_NOT_HEX = np.array(
    [minhash.IS_WORD[byte] and chr(byte) not in string.hexdigits for byte in range(256)], dtype=np.int32
)
_LETTERS = [byte for byte in range(128) if chr(byte).isalpha()]
_WHITE = [byte for byte in range(128) if chr(byte).isspace()]
