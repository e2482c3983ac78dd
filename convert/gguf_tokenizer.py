"""tokenizer.json <-> the vocabulary in a GGUF file.

A GGUF file lists the tokens, their types and the BPE merges, but of the rules that cut text into words before the
merges apply it keeps only a name. The table below gives the rules behind the names; guessing them would give a
tokenizer that is right for most text and wrong for some, so an unknown name, and rules without a name, are refused.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from .json_files import parse_json

_CONTROL, _USER_DEFINED, _UNUSED, _NORMAL = 3, 4, 5, 1
# llama.cpp infills with these; its names for them are those of the OpenAI paper's prefix-suffix-middle order.
_FIM = {"fim_pre": "<｜fim▁begin｜>", "fim_suf": "<｜fim▁hole｜>", "fim_mid": "<｜fim▁end｜>"}

# Code points of the DeepSeek-LLM letter class, a fixed list of cased letters. It stays a list of numbers and becomes
# escapes in the pattern: some of these characters (U+2126, U+212A, U+1FBE) change when text is normalised.
_DEEPSEEK_LLM_LETTERS = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1
    3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A
    1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4
    1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128
    212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D
    A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
    104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""


def _escaped(ranges: str) -> str:
    ends = [entry.split("-") for entry in ranges.split()]
    return "".join("-".join(rf"\x{{{end}}}" for end in pair) for pair in ends)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _digits(individual: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": individual}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    """The last step: bytes become the printable symbols of the vocabulary, after GPT-2's own word rule if asked."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


# Chinese, Japanese and Korean, as both DeepSeek tokenizers delimit them.
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

# `tokenizer.ggml.pre` -> the steps; each step cuts the pieces of the step before.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "deepseek-coder": [
        _split("[\r\n]"),
        _split(r"\s?\p{L}+"),
        _split(r"\s?\p{P}+"),
        _split(_CJK),
        _digits(individual=True),
        _byte_level(use_regex=False),
    ],
    "deepseek-llm": [
        _split("[\r\n]"),
        _split(rf"\s?[{_escaped(_DEEPSEEK_LLM_LETTERS)}]+"),
        _split(rf"\s?[!-/:-~{_escaped('FF01-FF0F FF1A-FF5E 2018-201F 3000-3002')}]+"),
        _split(r"\s+$"),
        _split(_CJK),
        _digits(individual=False),
        _byte_level(use_regex=False),
    ],
    "smollm": [_digits(individual=True), _byte_level(use_regex=True)],
    "gpt-2": [_byte_level(use_regex=True)],
    # What llama.cpp does for a vocabulary that it does not know.
    "default": [
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(_GPT2_WORDS),
        _split(r"\p{N}+"),
        _split("[0-9][0-9][0-9]"),
        _byte_level(use_regex=False),
    ],
}


def build_tokenizer_files(metadata: dict[str, Any], source: str) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` for the vocabulary in GGUF metadata.

    Raises ValueError, one line beginning with `source`, for anything but byte-level BPE with known word rules.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not _is_texts(tokens) or not tokens:
        raise ValueError(f"{source}: holds no vocabulary; use the tokenizer files of the original model")
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(
            f"{source}: vocabulary of kind {model!r:.80} is not supported, only byte-level BPE ('gpt2') is; "
            "use the tokenizer files of the original model"
        )
    pre = _pre_tokenizer_name(metadata, tokens)
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{source}: pre-tokenizer {pre!r:.80} is not known, only {', '.join(PRE_TOKENIZERS)} are; "
            "use the tokenizer files of the original model"
        )
    types = metadata.get("tokenizer.ggml.token_type")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(types, list) or len(types) != len(tokens) or not _is_texts(merges):
        raise ValueError(f"{source}: the vocabulary lacks its token types or its merges; download it again")
    files = {
        "tokenizer.json": _tokenizer(tokens, types, merges, pre, source),
        "tokenizer_config.json": _tokenizer_config(metadata, tokens, pre, source),
    }
    return {name: _encode(content) for name, content in files.items()}


def _is_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _pre_tokenizer_name(metadata: dict[str, Any], tokens: list[str]) -> str | None:
    """The name in the file; DeepSeek-Coder is recognised by its vocabulary, for files older than the key (2024)."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre in (None, "default") and tokens[32015:32018] == ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]:
        return "deepseek-coder"
    return pre


def _tokenizer(tokens: list[str], types: list[int], merges: list[str], pre: str, source: str) -> dict[str, Any]:
    # Fillers up to the rows of the embedding come last and stand for nothing.
    end = len(tokens)
    while end and (types[end - 1] == _UNUSED or tokens[end - 1] == f"[PAD{end - 1}]"):
        end -= 1
    normal = [i for i in range(end) if types[i] == _NORMAL]
    if not normal:
        raise ValueError(f"{source}: the vocabulary has no normal tokens; download it again")
    added = [i for i in range(end) if types[i] != _NORMAL]
    # Added tokens get the ids after the BPE vocabulary, unless the vocabulary holds them: those below its end.
    vocabulary = {tokens[i]: i for i in range(normal[-1] + 1)}
    if len(vocabulary) != normal[-1] + 1:
        raise ValueError(f"{source}: the vocabulary holds a token twice; download it again")
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(f"{source}: merge {merge!r:.80} does not fit the vocabulary; download it again")
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": types[i] == _CONTROL,
            }
            for i in added
        ],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _tokenizer_config(metadata: dict[str, Any], tokens: list[str], pre: str, source: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            if not isinstance(token, int) or not 0 <= token < len(tokens):
                raise ValueError(f"{source}: {key}_token_id {token!r:.80} is outside the vocabulary; download it again")
            config[role] = tokens[token]
    config["unk_token"] = None
    config["clean_up_tokenization_spaces"] = False
    if isinstance(metadata.get("llama.context_length"), int):
        config["model_max_length"] = metadata["llama.context_length"]
    # The class in DeepSeek's own files: with it transformers 4 puts the begin token in front.
    config["tokenizer_class"] = "LlamaTokenizerFast" if pre.startswith("deepseek") else "PreTrainedTokenizerFast"
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def tokenizer_metadata(files: Mapping[str, bytes], vocab_size: int, source: str) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a GGUF file for a Hugging Face tokenizer; the inverse of `build_tokenizer_files`.

    `vocab_size` rows of the embedding; those without a token get fillers `[PADn]`, as llama.cpp's converter names them.
    Raises ValueError, one line beginning with `source`, for anything but byte-level BPE with word rules of the table.
    """
    if "tokenizer.json" not in files:
        raise ValueError(f"{source}: has no tokenizer.json, the only form of tokenizer that can go into a GGUF file")
    content = parse_json(files["tokenizer.json"], f"{source}: tokenizer.json")
    settings = parse_json(files.get("tokenizer_config.json", b"{}"), f"{source}: tokenizer_config.json")
    where = f"{source}: tokenizer.json"
    try:
        model = content["model"]
        if model["type"] != "BPE":
            raise ValueError(
                f"{where}: model {model['type']!r:.80} cannot go into a GGUF file, only byte-level BPE can"
            )
        if content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
            raise ValueError(f"{where}: its normalizer has no place in a GGUF file; only tokenizers without one do")
        types = {i: (token, _NORMAL) for token, i in model["vocab"].items()}
        for added in content["added_tokens"]:
            types[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
        if not _is_texts([token for token, _ in types.values()]):
            raise TypeError("a token that is no text")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        pre = _name_of_rules(content["pre_tokenizer"], where)
        if any(not isinstance(i, int) or not 0 <= i < vocab_size for i in types):
            raise ValueError(
                f"{where}: has ids above {vocab_size - 1}, the last row of the embedding; download it again"
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: is no tokenizer ({type(error).__name__}: {error}); download it again") from None
    rows = [types.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(vocab_size)]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in rows],
        "tokenizer.ggml.token_type": [kind for _, kind in rows],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": settings.get("add_bos_token") is True,
        "tokenizer.ggml.add_eos_token": settings.get("add_eos_token") is True,
    }
    ids = {token: i for i, (token, _) in enumerate(rows)}
    for key, role in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        token = settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            metadata[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    metadata |= {f"tokenizer.ggml.{key}_token_id": ids[token] for key, token in _FIM.items() if token in ids}
    template = files["chat_template.jinja"].decode("utf-8", "replace") if "chat_template.jinja" in files else None
    template = template or settings.get("chat_template")
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    try:
        "".join([*metadata["tokenizer.ggml.tokens"], *merges, metadata.get("tokenizer.chat_template", "")]).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{source}: tokenizer holds halves of characters (surrogates); download it again") from None
    return metadata


def _name_of_rules(rules: Any, where: str) -> str:
    steps = rules["pretokenizers"] if rules["type"] == "Sequence" else [rules]
    for name, known in PRE_TOKENIZERS.items():
        if steps == known:
            return name
    raise ValueError(
        f"{where}: its word rules have no name in GGUF files; only those of {', '.join(PRE_TOKENIZERS)} can be written"
    )


def _encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
