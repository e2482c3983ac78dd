"""The report: the numbers are those of the corpus, and the same corpus gives the same report but for the seconds."""

import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain import corpus
from pretrain.corpus import report

DUPLICATES = pa.schema([(name, pa.string()) for name in ("repo", "path", "reason", "original")])


@pytest.fixture(scope="module")
def built(tmp_path_factory, library):
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(library / "json", folder / "fork")
    sources = [str(library / "json"), str(library / "wsgiref"), str(folder / "fork")]
    (folder / "fork" / "other.js").write_text("let x = `a|b`;\n" * 20)
    corpus.build(sources, folder / "out", progress=False)
    report.write(folder / "out", folder / "out")
    return folder / "out"


def table(text, title):
    """The rows of a table of report.md, by their first cell."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


def test_the_numbers_are_those_of_the_corpus(built):
    text = (built / "report.md").read_text()
    documents = list(corpus.documents(built))
    assert table(text, "Documents")["all"][:2] == [str(len(documents)), str(sum(len(d.paths) for d in documents))]
    lengths = Counter(int(np.log2(sum(len(t.encode()) for t in d.texts))) for d in documents)
    assert [int(n) for (n,) in table(text, "Document lengths").values() if n != "0"] == [
        number for _, number in sorted(lengths.items())
    ]
    dropped = pq.read_table(built / "dedup" / "dropped-00000.parquet").to_pylist()
    stages = table(text, "Through the stages")
    assert int(stages["dedup"][0]) - int(stages["dedup"][1]) == len(dropped) > 0
    assert f"{len(dropped)} copies of {len({row['original'] for row in dropped})} originals" in text
    assert set(table(text, "Files and text by language and stage")) == {"JavaScript", "Python"}
    assert {"crawl", "filter", "dedup", "documents"} <= set(table(text, "Time"))


class Balanced(HTMLParser):
    """Every tag is closed, and nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], Counter()

    def handle_starttag(self, tag, attributes):
        self.seen[tag] += 1
        assert tag not in ("script", "link", "img")
        for name, value in attributes:
            assert name not in ("src", "href", "xlink:href") or value.startswith("#")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(built):
    page = Balanced()
    page.feed((built / "report.html").read_text())
    assert page.open == []
    assert page.seen["svg"] >= 4
    assert page.seen["table"] >= 6


def test_the_same_report_but_for_the_seconds(built, tmp_path):
    report.write(built, tmp_path)
    for name in ("report.md", "report.html"):
        first, second = (re.split("Time<|## Time", (folder / name).read_text())[0] for folder in (built, tmp_path))
        assert first == second


def test_many_clusters_are_sampled(built, tmp_path, monkeypatch):
    shutil.copytree(built, tmp_path / "c")
    rows = [
        {"repo": "r", "path": "p", "reason": "x", "original": f"o{n}"} for n in range(2000) for _ in range(1 + n % 3)
    ]
    pq.write_table(pa.Table.from_pylist(rows, DUPLICATES), tmp_path / "c" / "dedup" / "dropped-00001.parquet")
    monkeypatch.setattr(report, "CLUSTERS_KEPT", 500)
    report.write(tmp_path / "c", tmp_path)
    copies, originals, every = re.search(
        r"(\d+) copies of (\d+) originals were dropped \(of one original in (\d)\)",
        (tmp_path / "report.md").read_text().replace(",", ""),
    ).groups()
    assert int(originals) <= 500
    assert abs(int(originals) * int(every) - 2000) < 300
    assert abs(int(copies) / int(originals) - 2) < 0.15


def test_backticks_do_not_end_a_block():
    text = report._markdown([report.Section("x", code=["a\n```\nb"])])
    assert "````\na\n```\nb\n````" in text
