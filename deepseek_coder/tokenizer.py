"""Text to ids and back, for byte-level BPE (`tokenizer.json`) and SentencePiece (`tokenizer.model`).

The hard idea: **text is never trusted to spell control tokens.** In DeepSeek-Coder's tokenizer the FIM tokens and
`<|EOT|>` are ordinary added tokens, so a library that encodes a user's file containing the string `<|EOT|>` emits the
control id, whatever its flags. Here text is encoded by a second tokenizer from which the control tokens are removed,
and callers splice control ids themselves (`prompts.py`).

The 13 single-character added tokens (ids 32000-32012: õ ÷ Á ...) stay in it, because they are how the model was
trained to read these letters; decoding turns them back into the letters, where other libraries print U+FFFD.

Decoding goes through bytes: every id stands for a byte string, the strings are joined and read as UTF-8. So decoding
a stream is an incremental UTF-8 decoder, and never shows half a character.

transformers' own wrapper is not used: its version 5 forces another pre-tokenizer on this vocabulary and loses spaces.
"""

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
BOS, EOS, EOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>"
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer:
    """One vocabulary.

    Attributes:
        source: what errors call it: the model's folder or file.
        vocab_size: one more than the highest id; embedding rows from here on are padding and never sampled.
        control: control token string -> id.
        bos_id, eos_id: ids, or None where the tokenizer has none.
        add_bos: whether prompts begin with `bos_id`.
        chat_template: the Jinja text of the model's chat format, or None.
        files: the files it was made from, name -> bytes; `save` writes them back unchanged.
    """

    def __init__(self, files: dict[str, bytes], source: str = "tokenizer"):
        """From the contents of a model folder's tokenizer files. Raises ValueError if they make no tokenizer."""
        self.source = source
        self.files = {name: files[name] for name in FILES if name in files}
        settings = _json(files.get("tokenizer_config.json", b"{}"), f"{source}/tokenizer_config.json")
        if "tokenizer.json" in files:
            raw = _json(files["tokenizer.json"], f"{source}/tokenizer.json")
            self._vocabulary: _Vocabulary = _TokenizersJson(raw, f"{source}/tokenizer.json")
        elif "tokenizer.model" in files:
            self._vocabulary = _SentencePieceModel(files["tokenizer.model"], f"{source}/tokenizer.model")
        else:
            raise ValueError(f"{source}: no tokenizer.json and no tokenizer.model; one of them is needed")
        self.control = self._vocabulary.control
        self.vocab_size = len(self._vocabulary.bytes_of)
        self._control_ids = frozenset(self.control.values())
        self.bos_id = self._id(settings, "bos")
        self.eos_id = self._id(settings, "eos")
        add_bos = settings.get("add_bos_token")
        self.add_bos = bool(self._vocabulary.add_bos if add_bos is None else add_bos) and self.bos_id is not None
        template = settings.get("chat_template")
        if "chat_template.jinja" in files:
            template = _text(files["chat_template.jinja"], f"{source}/chat_template.jinja")
        self.chat_template: str | None = template if isinstance(template, str) else None

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """From a folder with tokenizer.json or tokenizer.model (and tokenizer_config.json)."""
        folder = Path(folder)
        return cls({name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}, str(folder))

    def save(self, folder: str | Path) -> None:
        """Write the files it was made from, byte for byte."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`. Control-token strings inside it stay plain text. `bos` puts the BOS id in front."""
        ids = self._vocabulary.encode([text])[0]
        return [self.require(self.bos_id, "BOS"), *ids] if bos else ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text, on all cores where the library can."""
        return self._vocabulary.encode(texts)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; control tokens are left out or spelled. Bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special)
        text = "".join([stream.push(i) for i in ids]) + stream.finish()
        return text.removeprefix(" ") if self._vocabulary.adds_first_space else text

    def stream(self, skip_special: bool = True) -> "Stream":
        """A decoder that takes one id at a time and returns text as soon as its characters are complete.

        It continues a text: unlike `decode` it keeps the space that SentencePiece puts before a first word.
        """
        return Stream(self, skip_special)

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control_ids

    def num_bytes(self) -> list[int]:
        """How many bytes of text each id stands for; 0 for control tokens."""
        return [0 if i in self._control_ids else len(b) for i, b in enumerate(self._vocabulary.bytes_of)]

    @property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """(begin, hole, end), or None for a vocabulary without FIM tokens (DeepSeek-Coder v1.5 is one)."""
        ids = [self.control.get(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        return None if None in ids else tuple(ids)  # type: ignore[return-value]

    @staticmethod
    def require(token_id: int | None, what: str) -> int:
        if token_id is None:
            raise ValueError(f"this tokenizer has no {what} token; its tokenizer_config.json does not name one")
        return token_id

    def _id(self, settings: dict[str, Any], kind: str) -> int | None:
        """Id of a token named by tokenizer_config.json (a string, or a dict with `content`)."""
        named = token = settings.get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            return self._vocabulary.ids.get(kind)
        if not isinstance(token, str):
            raise ValueError(
                f"{self.source}/tokenizer_config.json: {kind}_token is {named!r:.80}; it must be the token's text, "
                "correct the file"
            )
        return self.control.get(token, self._vocabulary.token_id(token))


class Stream:
    """Incremental decoding: `push` ids, then `finish`. Nothing is emitted until its UTF-8 is whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._bytes = tokenizer._vocabulary.bytes_of
        self._skipped = tokenizer._control_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        # Ids past the vocabulary are padding rows of the embedding: they stand for nothing.
        piece = self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Vocabulary(Protocol):
    """What `Tokenizer` needs of a library: encode text without control tokens, and the bytes of every id."""

    control: dict[str, int]
    bytes_of: list[bytes]
    add_bos: bool
    ids: dict[str, int]  # "bos" and "eos", where the file itself names them
    adds_first_space: bool  # `encode` begins every text with a space of its own

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def token_id(self, token: str) -> int | None: ...


class _TokenizersJson:
    """`tokenizer.json` through the `tokenizers` library, byte-level BPE or byte-fallback BPE."""

    add_bos = False  # a tokenizer.json says nothing about BOS; tokenizer_config.json does
    ids: dict[str, int]

    def __init__(self, raw: dict[str, Any], source: str):
        import tokenizers

        self.ids = {}
        added = raw.get("added_tokens", [])
        self.control = {t["content"]: t["id"] for t in added if _is_control(t)}
        text_only = {**raw, "added_tokens": [t for t in added if not _is_control(t)], "post_processor": None}
        try:
            self._text = tokenizers.Tokenizer.from_str(json.dumps(text_only))
            self._all = tokenizers.Tokenizer.from_str(json.dumps(raw))
        except Exception as error:
            raise ValueError(f"{source}: the tokenizers library cannot read it ({error}); is it whole?") from error
        self._text.no_truncation()
        self._text.no_padding()
        vocabulary = self._all.get_vocab(with_added_tokens=True)
        literal = {t["id"]: t["content"].encode() for t in added}
        decoder = json.dumps(raw.get("decoder"))
        if '"ByteLevel"' in decoder:
            byte_of = {char: byte for byte, char in enumerate(_byte_level_alphabet())}

            def to_bytes(token: str) -> bytes:
                return bytes([byte_of[char] for char in token])

            self.adds_first_space = False
        elif '"ByteFallback"' in decoder:
            to_bytes = _sentencepiece_bytes  # type: ignore[assignment]
            self.adds_first_space = '"Strip"' in decoder
        else:
            raise ValueError(
                f"{source}: decoder {decoder[:80]} is not supported; byte-level and byte-fallback BPE tokenizers are"
            )
        self.bytes_of = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            self.bytes_of[token_id] = literal[token_id] if token_id in literal else to_bytes(token)

    def encode(self, texts: list[str]) -> list[list[int]]:
        # Lone surrogates (from broken JSON) are no text; they are read as question marks.
        clean = [text.encode("utf-8", "replace").decode() if not text.isascii() else text for text in texts]
        if len(clean) == 1:
            return [self._text.encode(clean[0], add_special_tokens=False).ids]
        return [e.ids for e in self._text.encode_batch_fast(clean, add_special_tokens=False)]

    def token_id(self, token: str) -> int | None:
        return self._all.token_to_id(token)


class _SentencePieceModel:
    """`tokenizer.model` through the `sentencepiece` library."""

    add_bos = True

    def __init__(self, content: bytes, source: str):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception as error:
            raise ValueError(f"{source}: the sentencepiece library cannot read it ({error}); is it whole?") from error
        size = self._model.get_piece_size()
        pieces = [self._model.id_to_piece(i) for i in range(size)]
        # Unknown, control and user-defined pieces are spelled as they are; the rest are text.
        self.control = {pieces[i]: i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)}
        self.bytes_of = [p.encode() if p in self.control else _sentencepiece_bytes(p) for p in pieces]
        ids = {"bos": self._model.bos_id(), "eos": self._model.eos_id()}
        self.ids = {kind: token_id for kind, token_id in ids.items() if token_id >= 0}
        self.adds_first_space = self._model.encode("a", out_type=str)[0].startswith("▁")

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts)

    def token_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        return None if self._model.is_unknown(token_id) and token not in self.control else token_id


def _is_control(token: dict[str, Any]) -> bool:
    """Added tokens that text must not spell: flagged special, or written in angle brackets (`<|EOT|>`, `<pad>`)."""
    content = token["content"]
    return token.get("special", False) or (len(content) > 2 and content[0] == "<" and content[-1] == ">")


def _byte_level_alphabet() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte: index = byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _sentencepiece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: `<0x0A>` is one byte, `▁` a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _text(content: bytes, source: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 (byte {error.start}); fetch the file again") from error


def _json(content: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: a JSON object is expected, found {type(value).__name__}")
    return value
