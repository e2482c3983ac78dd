"""What a corpus run kept and dropped, for people."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

_STAGES = ("crawl", "filter", "dedup")  # those that drop files


def dropped_for(counts: dict[str, Any]) -> str:
    """One line: of how many files how many were dropped for what, by stage. counts: stage -> its counts."""
    parts = []
    for stage in _STAGES:
        dropped = _by_size(counts[stage].get("dropped", {}))
        parts += [f"{stage}: " + ", ".join(f"{reason} {number}" for reason, number in dropped)] if dropped else []
    return f"{counts['crawl']['files_in']} files found, dropped for " + "; ".join(parts) if parts else "no files found"


def summary(out: Path) -> str:
    """Tables of a finished corpus: files and bytes through the stages, reasons, languages."""
    counts = json.loads((Path(out) / "manifest.json").read_text())["counts"]
    stages = Table("stage", *(_right(name) for name in ("files in", "files kept", "text kept")))
    for stage in _STAGES:
        stages.add_row(
            stage, f"{counts[stage]['files_in']:,}", f"{counts[stage]['files']:,}", _size(counts[stage]["bytes"])
        )
    reasons = Table("stage", "dropped for", _right("files"))
    for stage in _STAGES:
        for reason, number in _by_size(counts[stage].get("dropped", {})):
            reasons.add_row(stage, reason, f"{number:,}")
    languages = Table("language", *(_right(name) for name in ("documents", "files", "text")))
    made = counts["documents"]
    for language, part in sorted(made["languages"].items(), key=lambda item: (-item[1]["bytes"], item[0])):
        languages.add_row(language, f"{part['documents']:,}", f"{part['files']:,}", _size(part["bytes"]))
    languages.add_row("all", f"{made['documents']:,}", f"{made['files']:,}", _size(made["bytes"]))
    text = io.StringIO()
    console = Console(file=text, width=100)
    for table in (stages, reasons, languages):
        console.print(table)
    if made["dependencies"]:
        share = made["dependencies_first"] / made["dependencies"]
        console.print(
            f"{made['dependencies']:,} imports between kept files, {share:.1%} of them stand after what they import"
        )
    return text.getvalue()


def _by_size(dropped: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(dropped.items(), key=lambda item: (-item[1], item[0]))


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"
