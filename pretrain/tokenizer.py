"""Train a byte-level BPE tokenizer the way DeepSeek-Coder's was made (paper, section 3.2), with its control tokens.

Two differences from the released vocabulary: the control tokens follow the BPE tokens directly, and the 13 letters
(õ ÷ Á ...) that are added tokens there by accident are ordinary text here. They spell the bytes that UTF-8 never
uses, so leaving these bytes out of the alphabet loses nothing.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from convert.gguf_tokenizer import PRE_TOKENIZERS
from deepseek_coder.tokenizer import BOS, EOS, EOT, FILES, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

from . import documents
from .files import writing

CONTROL = (BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END, "<pad>", "<|User|>", "<|Assistant|>", EOT)
# Bytes that never occur in UTF-8, as byte-level BPE spells them.
_NEVER = frozenset("ÀÁõö÷øùúûüýþÿ")


def sample(source: Path, size: int) -> Iterator[str]:
    """The texts of a sample of a source (documents.py), of about `size` bytes; all of them where there is not more.

    A text is in it or not by a hash of its repository, path and content, so neither shards nor workers change the
    sample.
    """
    pieces = documents.pieces(source)
    share = min(1.0, size / max(1, sum(documents.text_bytes(piece) for piece in pieces)))
    for piece in pieces:
        for document in documents.read(piece):
            for path, text in zip(document.paths, document.texts, strict=True):
                digest = hashlib.blake2b("\0".join((document.repo, path, text)).encode(), digest_size=8).digest()
                if int.from_bytes(digest, "big") < share * 2**64:
                    yield text


def train(texts: Iterable[str], vocab_size: int = 32000, progress: bool = False) -> Tokenizer:
    """A tokenizer of `vocab_size` BPE tokens plus the control tokens. The same texts give the same tokenizer."""
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 256:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold every byte; take at least 256")
    bpe = Trained(models.BPE())
    pre = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["deepseek-coder"]}
    bpe = Trained.from_str(json.dumps({**json.loads(bpe.to_str()), "pre_tokenizer": pre}))
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - _NEVER)
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=progress)
    )
    raw = json.loads(bpe.to_str())
    first = len(raw["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] = [
        {"id": first + i, "content": token, **flags, "special": token in (BOS, EOS)} for i, token in enumerate(CONTROL)
    ]
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return Tokenizer(
        {
            "tokenizer.json": json.dumps(raw, ensure_ascii=False).encode(),
            "tokenizer_config.json": (json.dumps(settings, ensure_ascii=False, indent=2) + "\n").encode(),
        }
    )


def refuse_existing(out: Path, force: bool) -> None:
    """Raises FileExistsError if `out` exists and may not be replaced. Even `force` replaces only a tokenizer."""
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"{out}: exists already; choose another --out or pass --force")
    # Replacing deletes the old folder, so a slip such as the home folder or a model must not pass.
    entries = list(out.iterdir()) if out.is_dir() else []
    names = {entry.name for entry in entries}
    if "tokenizer.json" not in names or not names <= set(FILES) or not all(entry.is_file() for entry in entries):
        raise FileExistsError(
            f"{out}: is no folder with a tokenizer's files only, so it is not replaced; choose another --out or delete "
            "it yourself"
        )


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer's files as a folder, whole or not at all, in place of a tokenizer that is there.

    Raises FileExistsError for anything else in the way, ValueError when the disk refuses.
    """
    out = out.resolve()
    refuse_existing(out, force=True)
    temporary, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
        try:
            temporary.mkdir()
            tokenizer.save(temporary)
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
                out.rename(old)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
