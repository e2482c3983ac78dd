"""What a corpus run kept and dropped, for people: a summary on the terminal, report.md, and report.html with plots.

A report is made of what the stages left: their counts, their tables of dropped files, the parts of the corpus and the
records of the shards. Of all that only the seconds differ between two runs over the same sources. It stays small for
any corpus: document lengths are read from at most PARTS_READ parts, and clusters of duplicates counted in a sample once
they are more than CLUSTERS_KEPT.
"""

import hashlib
import html
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Column, Table

from ..files import replacing

PARTS_READ = 64
CLUSTERS_KEPT = 1_000_000

_STAGES = ("crawl", "filter", "dedup", "near", "quality")  # those that drop files, in their order
LANGUAGES = 20  # in a plot


@dataclass(frozen=True)
class Section:
    title: str
    header: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    text: str = ""
    plot: str = ""  # an SVG element
    code: Sequence[str] = ()


def dropped_for(counts: dict[str, Any]) -> str:
    """One line: of how many files how many were dropped for what, by stage. counts: stage -> its counts."""
    parts = []
    for stage in _dropping(counts):
        dropped = _by_size(counts[stage].get("dropped", {}))
        parts += [f"{stage}: " + ", ".join(f"{reason} {number}" for reason, number in dropped)] if dropped else []
    return f"{counts['crawl']['files_in']} files found, dropped for " + "; ".join(parts) if parts else "no files found"


def summary(out: Path) -> str:
    """Tables of a finished corpus: files and bytes through the stages, reasons, languages."""
    counts = _counts(out)
    text = io.StringIO()
    console = Console(file=text, width=100)
    for section in (_through_the_stages(counts), _reasons(counts), _languages(counts)):
        first, *others = section.header
        words = [name for name in section.header if name in ("stage", "reason")]
        table = Table(first, *(name if name in words else Column(name, justify="right") for name in others))
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
    dependencies = _dependencies(counts)
    console.print(dependencies.text)
    return text.getvalue()


def write(corpus: Path, out: Path, more: Sequence[Section] = ()) -> None:
    """Writes report.md and report.html of a finished corpus into `out`; more: sections of what was made of it."""
    counts = _counts(corpus)
    ran = _dropping(counts)
    sections = [
        _through_the_stages(counts),
        _by_language_and_stage(counts),
        _languages(counts),
        _reasons(counts, plot=True),
        *_duplicates(corpus, ran),
        _lengths(corpus),
        _dependencies(counts),
        *more,
        seconds(corpus, counts["crawl"].get("bytes", 0)),
    ]
    manifest = json.loads((corpus / "manifest.json").read_text())
    failed = "; ".join(filter(None, [manifest["failed"], *manifest.get("unread", {}).values()]))
    sections = [Section("Failed", text=failed), *sections] if failed else sections
    for name, text in (("report.md", _markdown(sections)), ("report.html", _html(sections))):
        with replacing(Path(out) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


# ---- sections --------------------------------------------------------------------------------------------------------


def _through_the_stages(counts: dict[str, Any]) -> Section:
    rows = [
        (stage, f"{counts[stage]['files_in']:,}", f"{counts[stage]['files']:,}", size(counts[stage]["bytes"]))
        for stage in _dropping(counts)
    ]
    return Section("Through the stages", ("stage", "files in", "files kept", "text kept"), rows)


def _by_language_and_stage(counts: dict[str, Any]) -> Section:
    stages = _dropping(counts)
    kept = {stage: counts[stage].get("file_languages", counts[stage].get("languages", {})) for stage in stages}
    names = sorted(kept["crawl"], key=lambda name: (-kept["crawl"][name]["bytes"], name))
    rows = []
    for name in names:
        cells = (kept[stage].get(name, {"files": 0, "bytes": 0}) for stage in stages)
        rows.append((name, *(f"{cell['files']:,} / {size(cell['bytes'])}" for cell in cells)))
    shown = names[:LANGUAGES][::-1]
    bars = {stage: [kept[stage].get(name, {}).get("bytes", 0) / 1e6 for name in shown] for stage in stages}
    plot = plotted(shown, bars, "MB of text kept after each stage")
    return Section("Files and text by language and stage", ("language", *stages), rows, plot=plot)


def _reasons(counts: dict[str, Any], plot: bool = False) -> Section:
    found = [
        (stage, reason, number)
        for stage in _dropping(counts)
        for reason, number in _by_size(counts[stage].get("dropped", {}))
    ]
    rows = [(stage, reason, f"{number:,}") for stage, reason, number in found]
    shown = found[::-1]
    bars = {"files": [float(number) for _, _, number in shown]}
    drawn = (
        plotted([f"{stage}: {reason}" for stage, reason, _ in shown], bars, "files dropped", log=True) if plot else ""
    )
    return Section("Dropped files", ("stage", "reason", "files"), rows, plot=drawn)


def _languages(counts: dict[str, Any]) -> Section:
    made = next(counts[stage] for stage in ("quality", "near", "documents") if stage in counts)
    rows = [
        (language, f"{part['documents']:,}", f"{part['files']:,}", size(part["bytes"]))
        for language, part in sorted(made["languages"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    ]
    rows.append(("all", f"{made['documents']:,}", f"{made['files']:,}", size(made["bytes"])))
    return Section("Documents", ("language", "documents", "files", "text"), rows)


def _duplicates(corpus: Path, stages: Sequence[str]) -> list[Section]:
    """For each of the stages whose tables of dropped files name the original: how many copies the originals had."""
    sections = []
    for stage in stages:
        found: Counter[str] = Counter()
        every = 1  # one of how many originals is counted, chosen by a hash
        for path in sorted((corpus / stage).glob("dropped-*.parquet")):
            file = pq.ParquetFile(path)
            if "original" not in file.schema_arrow.names:
                break
            for batch in file.iter_batches(columns=["original"]):
                for entry in pc.value_counts(batch.column(0).drop_null()).to_pylist():
                    if every == 1 or _hash(entry["values"]) % every == 0:
                        found[entry["values"]] += entry["counts"]
            while len(found) > CLUSTERS_KEPT:
                every *= 2
                found = Counter({name: n for name, n in found.items() if _hash(name) % every == 0})
        if not found:
            continue
        largest = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:20]
        sizes = np.array(list(found.values()))
        edges = 2 ** np.arange(int(np.log2(sizes.max())) + 2)
        bars = np.histogram(sizes, edges)[0]
        names = [f"{a}" if b - a == 1 else f"{a} to {b - 1}" for a, b in itertools.pairwise(edges)]
        text = f"{sizes.sum():,} copies of {len(sizes):,} originals were dropped"
        text += f" (of one original in {every})" if every > 1 else ""
        plot = plotted(
            names[::-1], {"originals": [float(n) for n in bars[::-1]]}, "originals by dropped copies", log=True
        )
        rows = [(name, f"{number:,}") for name, number in largest]
        title = f"Clusters of duplicates: {stage}"
        sections.append(Section(title, ("largest: original", "copies dropped"), rows, f"{text}.", plot))
    return sections


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _lengths(corpus: Path) -> Section:
    parts = [corpus / output["file"] for output in json.loads((corpus / "manifest.json").read_text())["documents"]]
    read = parts[:: -(-len(parts) // PARTS_READ)]
    lengths: Counter[int] = Counter()
    files: Counter[int] = Counter()
    for part in read:
        for batch in pq.ParquetFile(part).iter_batches(batch_size=256, columns=["texts"]):
            texts = batch.column(0)
            ends = np.concatenate([[0], np.cumsum(pc.binary_length(texts.flatten()).to_numpy(zero_copy_only=False))])
            borders = np.concatenate([[0], np.cumsum(pc.list_value_length(texts).to_numpy(zero_copy_only=False))])
            lengths.update(np.log2(np.maximum(np.diff(ends[borders]), 1)).astype(int).tolist())
            files.update(np.log2(np.diff(borders)).astype(int).tolist())
    text = f"Read from {len(read):,} of {len(parts):,} parts. " if len(read) < len(parts) else ""
    text += f"Documents of more than one file: {sum(n for power, n in files.items() if power):,}."
    return histogram("Document lengths", "bytes", lengths, text)


def histogram(title: str, unit: str, counts: dict[int, int], text: str = "") -> Section:
    """counts: power of two -> how many documents are at least so long and less than twice."""
    powers = range(min(counts, default=0), max(counts, default=0) + 1)
    names = [f"{_short(2**power)} to {_short(2 ** (power + 1))}" for power in powers]
    numbers = [counts.get(power, 0) for power in powers]
    plot = plotted(names[::-1], {"documents": [float(n) for n in numbers[::-1]]}, f"documents by length in {unit}")
    rows = [(name, f"{number:,}") for name, number in zip(names, numbers, strict=True)]
    return Section(title, (unit, "documents"), rows, text, plot)


def _dependencies(counts: dict[str, Any]) -> Section:
    made = counts["documents"]
    if not made.get("dependencies"):
        return Section("Imports", text="No imports between kept files.")
    share = made["dependencies_first"] / made["dependencies"]
    text = f"{made['dependencies']:,} imports between kept files, {share:.1%} of them stand after what they import"
    rows = [
        (language, f"{edges['all']:,}", f"{edges['first'] / edges['all']:.1%}")
        for language, edges in sorted(made.get("edges", {}).items())
    ]
    return Section("Imports", ("language", "imports", "after what they import") if rows else (), rows, text)


def seconds(folder: Path, text_bytes: int) -> Section:
    """What each stage of a folder took, out of its shards' records. text_bytes: of the text that came in."""
    rows = []
    for manifest in sorted(folder.glob("*/manifest.json"), key=lambda path: path.parent.stat().st_ctime_ns):
        records = (json.loads(path.read_text()) for path in manifest.parent.glob("shard-*.json"))
        took = sum(record.get("cpu_seconds", 0) for record in records)
        rate = f"{text_bytes / took / 1e6:,.1f} MB/s" if took else ""
        rows.append((manifest.parent.name, f"{took:,.1f}", rate))
    text = "Seconds of one core, and text that was crawled for each of them. These alone differ from run to run."
    return Section("Time", ("stage", "core seconds", "rate"), sorted(rows), text)


# ---- rendering -------------------------------------------------------------------------------------------------------


def _markdown(sections: Sequence[Section]) -> str:
    lines = ["# Corpus report", "", "The same with plots: report.html", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [section.text, ""] if section.text else []
        if section.header:
            rule = ["---", *["---:"] * (len(section.header) - 1)]
            cells = (tuple(cell.replace("|", "\\|") for cell in row) for row in section.rows)
            lines += [f"| {' | '.join(row)} |" for row in (section.header, rule, *cells)] + [""]
        for block in section.code:
            fence = "`" * (max(3, 1 + max((len(run) for run in _backticks(block)), default=0)))
            lines += [fence, block, fence, ""]
    return "\n".join(lines)


def _backticks(text: str) -> Iterator[str]:
    return (run for run in "".join(c if c == "`" else " " for c in text).split())


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}pre{background:#f6f6f6;padding:1em;overflow-x:auto}svg{max-width:100%}"""


def _html(sections: Sequence[Section]) -> str:
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Corpus report</title>',
        f"<style>{_STYLE}</style></head><body><h1>Corpus report</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(section.text)}</p>"] if section.text else []
        parts.append(section.plot)
        if section.header:
            head, *body = (
                "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
                for tag, row in (("th", section.header), *(("td", row) for row in section.rows))
            )
            parts.append(f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>")
        parts += [f"<pre>{html.escape(block)}</pre>" for block in section.code]
    return "\n".join((*parts, "</body></html>\n"))


def plotted(names: Sequence[str], bars: dict[str, list[float]], title: str, log: bool = False) -> str:
    """Horizontal bars as an SVG element, the first name at the bottom; the same bytes for the same numbers."""
    if not names or not any(any(values) for values in bars.values()):
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "corpus", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 1 + len(names) * (0.22 if len(bars) == 1 else 0.42)), layout="constrained")
        axes = figure.subplots()
        places, height = np.arange(len(names)), 0.8 / len(bars)
        for number, (label, values) in enumerate(bars.items()):
            axes.barh(places + 0.4 - (number + 0.5) * height, values, height, label=label)
        axes.set_yticks(places, [name.replace("$", r"\$") for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
        if log:
            axes.set_xscale("symlog")
        if len(bars) > 1:
            axes.legend()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _counts(corpus: Path) -> dict[str, Any]:
    counts: dict[str, Any] = json.loads((Path(corpus) / "manifest.json").read_text())["counts"]
    return counts


def _dropping(counts: dict[str, Any]) -> list[str]:
    return [stage for stage in _STAGES if counts.get(stage, {}).get("files_in")]


def _by_size(dropped: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(dropped.items(), key=lambda item: (-item[1], item[0]))


def size(count: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e5, "MB")):
        if count >= unit:
            return f"{count / max(unit, 1e6):,.1f} {name}"
    return f"{count / 1e3:,.1f} kB"


def _short(number: int) -> str:
    for power, name in ((30, "Gi"), (20, "Mi"), (10, "Ki")):
        if number >= 2**power:
            return f"{number >> power} {name}"
    return str(number)
