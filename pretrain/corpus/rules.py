"""The rule filter: cheap rules about a file's name and text, which dropped two thirds of what DeepSeek crawled.

The numbers are in presets/*.toml, each with its source: `deepseek` is the text of its paper, `starcoder` the table from
which those rules come, by extension. `[filter] preset` chooses one, and every other key of [filter] overrides it.
A line's length does not count its newline. The last newline of a file does not begin another line.
"""

import html
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .stage import Result, Shard, settings_of, tally

_PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Rules:
    """The thresholds; the defaults are those of presets/deepseek.toml. Lengths are in characters."""

    preset: str = "deepseek"
    mean_line_length: float = 100.0  # a file with a higher mean is dropped; 0: no such rule
    longest_line: int = 1000  # and so is one with a longer line; 0: no such rule
    alphabetic_share: float = 0.25  # fewer letters among all characters, white space included: dropped
    alphanumeric_share: float = 0.0  # fewer letters and digits: dropped
    xml_head: int = 100  # `<?xml version=` within this many characters: dropped, unless XSLT
    html_text_share: float = 0.20  # HTML with less visible text than this share of the file: dropped
    html_text_length: int = 100  # and so is HTML with less visible text than this
    data_shortest: int = 50  # JSON and YAML outside of these two lengths: dropped
    data_longest: int = 5000
    included: tuple[str, ...] = ()  # the only extensions that stay; none: all stay
    excluded: tuple[str, ...] = ()  # extensions that go


@dataclass(frozen=True)
class Filter:
    """The rules, and those of single extensions where they differ."""

    rules: Rules
    exceptions: dict[str, dict[str, Any]]  # extension -> thresholds of its own

    def of(self, path: str) -> Rules:
        """The rules of a file, by its extension."""
        extension = extension_of(path)
        return replace(self.rules, **self.exceptions[extension]) if extension in self.exceptions else self.rules


def extension_of(path: str) -> str:
    """In lower case and without the dot; of a name without one "", or for a Dockerfile or Makefile its name."""
    name = path.rsplit("/", 1)[-1].lower()
    stem, dot, extension = name.rpartition(".")
    return extension if stem and dot else name if name in ("dockerfile", "makefile") else ""


def filter_of(values: Any) -> Filter:
    """The section [filter] of a configuration: a preset, and what overrides it everywhere.

    Raises ValueError for a preset that does not exist, an unknown key or a value of no use.
    """
    given = settings_of(Rules, "filter", values)
    names = sorted(path.stem for path in _PRESETS.glob("*.toml"))
    if given.preset not in names:
        raise ValueError(f"preset in [filter] is {given.preset!r}; it must be one of {', '.join(names)}")
    table = dict(_preset(given.preset))
    exceptions: dict[str, dict[str, Any]] = {}
    for row in table.pop("exceptions", []):
        own = {key: value for key, value in row.items() if key != "extensions" and key not in values}
        for extension in row["extensions"]:
            exceptions.setdefault(extension, {}).update(own)
    overrides = {field.name: getattr(given, field.name) for field in fields(Rules) if field.name in values}
    return Filter(replace(settings_of(Rules, "filter", table), **({"preset": given.preset} | overrides)), exceptions)


@cache
def _preset(name: str) -> Mapping[str, Any]:
    return tomllib.loads((_PRESETS / f"{name}.toml").read_text(encoding="utf-8"))


def drop_reason(text: str, language: str, rules: Rules) -> str | None:
    """Why this file is dropped, as a short constant phrase; None when it is kept."""
    if not text or text.isspace():
        return "empty"  # not in the paper: all its shares are 0 / 0 here
    breaks = text.count("\n", 0, -1)  # the last character ends the last line, if it is one
    characters = len(text) - text.endswith("\n") - breaks
    if rules.mean_line_length and characters > rules.mean_line_length * (breaks + 1):
        return "mean line length"
    if rules.longest_line and _longer_line(text, rules.longest_line):
        return "longest line"
    if rules.alphanumeric_share and _fewer(str.isalnum, text, rules.alphanumeric_share):
        return "alphanumeric share"
    if _fewer(str.isalpha, text, rules.alphabetic_share):
        return "alphabetic share"
    if language != "XSLT" and "<?xml version=" in text[: rules.xml_head]:
        return "XML"
    if language == "HTML":
        visible = len(visible_text(text))
        if visible < rules.html_text_share * len(text) or visible < rules.html_text_length:
            return "HTML visible text"
    if language in ("JSON", "YAML") and not rules.data_shortest <= len(text) <= rules.data_longest:
        return "JSON or YAML length"
    return None


def _longer_line(text: str, limit: int) -> bool:
    """Whether a line has more characters: of each `limit` + 1 in a row one must be a line end, looked for backwards."""
    begin = 0
    while len(text) - begin > limit:
        begin = text.rfind("\n", begin, begin + limit + 1) + 1
        if not begin:
            return True
    return False


_KINDS: tuple[Callable[[str], bool], ...] = (str.isalpha, str.isalnum)
_ASCII = {kind: bytes(byte < 128 and kind(chr(byte)) for byte in range(256)) for kind in _KINDS}
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def _fewer(kind: Callable[[str], bool], text: str, share: float) -> bool:
    """Whether less than a share of all characters is of a kind. To look up bytes is a hundred times faster than to ask
    every character, and those of ASCII are enough nearly always."""
    found = np.count_nonzero(np.frombuffer(text.encode().translate(_ASCII[kind]), dtype=np.bool_))
    if found < share * len(text) and not text.isascii():
        found += sum(map(kind, "".join(_NOT_ASCII.findall(text))))
    return bool(found < share * len(text))


# Comments, scripts and styles with their content, tags. Python's own HTML parser takes minutes for 100 kB of `<a <a`;
# here whatever is not closed reaches to the end, and nothing is read twice.
_INVISIBLE = re.compile(
    r"""<!--.*?(?:-->|\Z)
      | <(script|style)\b.*?(?:</\1\b[^>]*>?|\Z)
      | <[a-z/!?](?:"[^"]*"|'[^']*'|[^>"'])*+>?""",
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)


def visible_text(page: str) -> str:
    """An HTML page without tags, comments, scripts and styles; each run of white space is one space."""
    return " ".join(html.unescape(_INVISIBLE.sub(" ", page)).split())


def name_reason(path: str, rules: Rules) -> str | None:
    """Why a file is dropped for its extension; None when it is not."""
    extension = extension_of(path)
    listed = extension in rules.included or extension in ("dockerfile", "makefile")
    return "extension" if (rules.included and not listed) or extension in rules.excluded else None


def filter_shard(out: Path, shard: Shard, settings: Filter) -> Result:
    files = pq.read_table(out / shard.inputs[0])
    reasons: list[str | None] = []
    for batch in files.to_batches(max_chunksize=1024):
        for path, language, text in zip(
            *(batch[name].to_pylist() for name in ("path", "language", "text")), strict=True
        ):
            rules = settings.of(path)
            reasons.append(name_reason(path, rules) or drop_reason(text, language, rules))
    reason = pa.array(reasons, pa.string())
    kept = files.filter(reason.is_null())
    dropped = files.select(["repo", "path"]).append_column("reason", reason).filter(reason.is_valid())
    return Result({"part": kept, "dropped": dropped}, tally(kept, dropped))
