"""Prompts as token ids: left to right, infilling (FIM), repository context, chat.

Training samples are made by the same functions, so a model is asked exactly what it was taught. Control ids are
spliced between separately encoded texts; text can never spell them (see `tokenizer.py`).

Formats: README.md and the chat template of deepseek-ai/DeepSeek-Coder.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence

from . import repository as repo
from .tokenizer import EOT, FIM_BEGIN, Tokenizer

# The system prompt of the released chat template, spelled as there (no full stop at its end).
SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, "
    "and you only answer questions related to computer science. For politically sensitive questions, security and "
    "privacy issues, and other non-computer science questions, you will refuse to answer"
)
# sha256 of the chat template that the released instruct models carry: what `chat` renders without running Jinja.
CHAT_TEMPLATE_SHA256 = "993c0af704bad76aeba4263a5318f7873a06420a8eb7d40b72a49c39599c0a66"

# Orders of an infilling's parts.
FIM_MODES = ("psm", "spm", "joint")


def completion(tokenizer: Tokenizer, text: str) -> list[int]:
    """[BOS] text: the model continues it."""
    return tokenizer.encode(text, bos=tokenizer.add_bos)


def fim(tokenizer: Tokenizer, prefix: str, suffix: str, mode: str = "psm") -> list[int]:
    """[BOS] <fim_begin> prefix <fim_hole> suffix <fim_end>: the model writes what stands in the hole, then EOS.

    Text is joined as it is; nothing is added around the hole. mode: PSM is the only order that DeepSeek-Coder was
    trained on; the others of FIM_MODES are for models that were trained here with them.
    Raises ValueError for a vocabulary without FIM tokens. Warns for instruct models: their tuning had no FIM.
    """
    if tokenizer.fim_ids is None:
        raise ValueError(
            f"this model cannot fill holes: its vocabulary has no {FIM_BEGIN} token (DeepSeek-Coder v1.5 has none); "
            "use a v1 base model such as deepseek-coder-6.7b-base"
        )
    if tokenizer.eos_id is not None and tokenizer.eos_id == tokenizer.control.get(EOT):
        warnings.warn(
            "this is an instruct model, tuned without infilling; a base model fills holes better", stacklevel=2
        )
    return fim_sample(tokenizer, tokenizer.encode(prefix), tokenizer.encode(suffix), mode)


def fim_sample(tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int], mode: str = "psm") -> list[int]:
    """The ids of `fim` from encoded parts; a training sample goes on with the middle and EOS.

    mode: "psm"; "spm", suffix before prefix; "joint", the prefix last, so that the middle continues it.
    """
    assert tokenizer.fim_ids is not None
    begin, hole, end = tokenizer.fim_ids
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    if mode == "spm":
        return [*bos, hole, *suffix, begin, *prefix, end]
    if mode == "joint":
        return [*bos, begin, hole, *suffix, end, *prefix]
    return [*bos, begin, *prefix, hole, *suffix, end]


def repository(
    tokenizer: Tokenizer,
    files: Mapping[str, str],
    path: str,
    prefix: str,
    suffix: str | None = None,
    max_tokens: int = 16384,
    sign: str = "hash",
) -> list[int]:
    """A completion of `path` (or, unless `suffix` is None, an infilling) with the repository's other files before it.

    files: path -> text of the other files. Those that `path` imports, directly or not, stand nearest to it, the
    dependencies of a file always before it; unrelated files come first. Manifests (`repository.is_manifest`: go.mod,
    package.json, ...) only say what imports mean; they were in no document with the code that the model learned from.
    Every file begins with a comment that names its path. Where the whole is longer than `max_tokens`, files are left
    out from the front, never cut. In an infilling the other files are the beginning of the prefix. sign: of the path
    comments, "hash" as the released models have it, or "language" for a model trained on a corpus of that form
    (`repository.path_comment`).

    Raises ValueError for another sign, and for a text around the cursor that is longer than `max_tokens` by itself.
    """
    if sign not in repo.SIGNS:
        raise ValueError(f"path comments with the sign {sign!r} are not known; choose from {', '.join(repo.SIGNS)}")
    others = {name: text for name, text in files.items() if name != path}
    pieces = [tokenizer.encode(repo.path_comment(path, sign) + prefix)]
    tail = tokenizer.encode(suffix or "")
    fixed = len(completion(tokenizer, "") if suffix is None else fim(tokenizer, "", ""))
    alone = fixed + len(pieces[0]) + len(tail)
    if alone > max_tokens:
        raise ValueError(
            f"{path}: the text around the cursor makes {alone} tokens, max_tokens is {max_tokens}; "
            "pass less of the file"
        )
    room = max_tokens - alone
    for name in reversed(_nearest_last(others, path, prefix + (suffix or ""))):
        ids = tokenizer.encode(repo.pieces([(name, others[name]), (path, "")], sign)[0])
        if len(ids) > room:
            break
        room -= len(ids)
        pieces.append(ids)
    context = [i for ids in reversed(pieces) for i in ids]
    if suffix is None:
        return completion(tokenizer, "") + context
    return fim_sample(tokenizer, context, tail)


def _nearest_last(others: dict[str, str], path: str, text: str) -> list[str]:
    """Paths of `others`, dependencies of `path` last, every file after the files it imports where that is possible."""
    files = {**others, path: text}
    edges = repo.imports(files)
    needed, frontier = {path}, [path]
    while frontier:
        fresh = edges[frontier.pop()].keys() - needed
        needed |= fresh
        frontier += fresh
    ordered = [name for component in repo.order(files, edges) for name in component]
    ordered = [name for name in ordered if name != path and not repo.is_manifest(name)]
    return [n for n in ordered if n not in needed] + [n for n in ordered if n in needed]


def chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The conversation as DeepSeek-Coder's instruct models were tuned on it, ending where the answer begins.

    messages: dicts with `role` (system, user, assistant) and `content`. The released template's quirk is kept: a
    system message of one's own is followed by no newline.

    Raises ValueError for a model with another chat template or none: it would be prompted wrongly.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(f"{tokenizer.source}: has no chat template (it is a base model); chat with an instruct model")
    if hashlib.sha256(template.encode()).hexdigest() != CHAT_TEMPLATE_SHA256:
        raise ValueError(
            f"{tokenizer.source}: the chat template is not DeepSeek-Coder's (it begins with {template[:60]!r}); "
            "only DeepSeek-Coder instruct models are prompted for chat"
        )
    eot = tokenizer.control.get(EOT)
    ids = [tokenizer.require(tokenizer.bos_id, "BOS")]
    text = "" if any(m["role"] == "system" for m in messages) else SYSTEM + "\n"
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            text += content
        elif role == "user":
            text += f"### Instruction:\n{content}\n"
        elif role == "assistant":
            ids += [*tokenizer.encode(f"{text}### Response:\n{content}\n"), tokenizer.require(eot, EOT)]
            text = "\n"
        else:
            raise ValueError(f"chat message with role {role!r}; roles are system, user and assistant")
    return [*ids, *tokenizer.encode(text + "### Response:\n")]
