"""Bytes of a file -> text. Nothing is known of an encoding but what it does to the bytes, so some files stay unknown.

UTF-8 and UTF-16 with a mark tell themselves, and so does ISO 2022-JP, whose escapes nothing else has; a file may also
declare its encoding (`# -*- coding: koi8-r -*-`, `<meta charset=...>`). For the rest Firefox's detector is asked. A few
words are not enough for it: of single re-encoded source files in ten languages 6 % came out wrong. But hardly a
repository has two encodings beside UTF-8, so its files are guessed together (wrong: 0.7 %). What the parts say has to
agree; else a file must be long enough to speak for itself. A file that is not known is left out: better no text than a
wrong one.
"""

import codecs
import re

from chardetng_py import EncodingDetector

_BOMS = ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_DECLARED = re.compile(rb"(?:coding|charset)\s{0,3}[:=]\s{0,3}[\"']?([A-Za-z][\w.:-]{1,40})")
_HEAD = 1024  # where a declaration may stand
_KNOWN = ("iso8859", "iso2022_jp", "cp", "koi8", "gb", "big5", "euc", "shift", "mac")  # Python has codecs that are none

# Supersets that Windows writes under the older names, and one codec for its subsets.
_CODECS = {"gbk": "gb18030", "gb2312": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}

_ASCII = bytes(range(128))
# Texts have no such characters, but for the end that DOS wrote; in a wrong encoding they often have those from 0x80 on.
_CONTROL = re.compile("[\x00-\x08\x0e-\x19\x1c-\x1f\x7f-\x84\x86-\x9f]")

# In bytes that are not ASCII: enough for a guess at all, and of a file by itself, against others or without them.
_LEAST, _ALONE, _AGAINST = 8, 32, 64
_AGREE = 0.8  # share of the bytes in files that a guess by themselves gives the same text


def read(data: bytes) -> tuple[str, str, str] | None:
    """(text, encoding, "") or ("", "", reason), or None for a file that `guess` must read beside others."""
    encoding = next((name for bom, name in _BOMS if data.startswith(bom) and len(data) % 2 == 0), "utf-8")
    if encoding == "utf-8" and b"\0" in data:
        return "", "", "binary"
    if b"\x1b$" in data and data.isascii() and (text := _decoded(data, "iso2022_jp")) is not None:
        return text, "iso2022_jp", ""
    try:
        text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError:
        return _declared(data)
    return ("", "", "binary") if "\0" in text else (text.removeprefix("\ufeff"), encoding, "")


def guess(files: list[bytes]) -> list[tuple[str, str, str]]:
    """Of one repository's files that are not UTF-8: (text, encoding, "") or ("", "", reason) for each."""
    common = _guessed(files)
    weights = [len(data.translate(None, _ASCII)) for data in files]
    own = [_guessed([data]) for data in files]
    same = [
        name == common or _decoded(data, name) == _decoded(data, common) for data, name in zip(files, own, strict=True)
    ]
    agree = sum(weight for weight, equal in zip(weights, same, strict=True) if equal) >= _AGREE * sum(weights)
    found = []
    for data, weight, name, equal in zip(files, weights, own, same, strict=True):
        if sum(weights) < _LEAST or (not equal and weight >= _AGAINST if agree else weight < _ALONE):
            text = None
        else:
            name = common if agree else name
            text = _decoded(data, name)
        found.append(("", "", "unknown encoding") if text is None else (text, name, ""))
    return found


def _declared(data: bytes) -> tuple[str, str, str] | None:
    match = _DECLARED.search(data, 0, _HEAD)
    try:
        encoding = codecs.lookup(match[1].decode()).name if match else "utf-8"
    except LookupError:
        return None
    text = _decoded(data, encoding) if encoding.startswith(_KNOWN) else None
    return None if text is None else (text, _CODECS.get(encoding, encoding), "")


def _guessed(files: list[bytes]) -> str:
    detector = EncodingDetector()
    for data in files:
        detector.feed(data, last=False)
        detector.feed(b"\n", last=False)  # ends a character that a file leaves unfinished
    detector.feed(b"", last=True)
    return codecs.lookup(detector.guess(tld=None, allow_utf8=False).removesuffix("-I")).name


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        text = data.decode(_CODECS.get(encoding, encoding))
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(text) else text
