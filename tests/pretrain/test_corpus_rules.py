"""The rule filter, each rule exactly at its boundary."""

import asyncio
import json
import pydoc
import string
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.corpus.rules import Rules, _fewer, drop_reason, filter_of, name_reason, visible_text

RULES = Rules()
DATA = "\n".join(["abcdefghi"] * 600)


def page(visible, other):
    """HTML with so many visible characters and so many others, in lines that no other rule minds."""
    comment = "\n".join(["c" * 49] * 200)[: other - len("<p></p><!---->")]
    text = "<p>" + "v" * visible + "</p><!--" + comment + "-->"
    assert len(text) == visible + other
    return text


@pytest.mark.parametrize(
    "text, language, reason",
    [
        ("", "Python", "empty"),
        (" \n\t\n", "Python", "empty"),
        ("x" * 100, "Python", None),
        ("x" * 100 + "\n", "Python", None),
        ("x" * 101, "Python", "mean line length"),
        ("x" * 101 + "\n" + "x" * 99, "Python", None),
        ("x" * 101 + "\n" + "x" * 99 + "\n", "Python", None),  # the last newline begins no line
        ("x" * 101 + "\n" + "x" * 100, "Python", "mean line length"),
        ("x" * 1000 + "\nx" * 20, "Python", None),
        ("x" * 1001 + "\nx" * 20, "Python", "longest line"),
        ("a111", "Python", None),
        ("a1111", "Python", "alphabetic share"),
        ("é111", "Python", None),
        ("漢1111", "Python", "alphabetic share"),
        ("aa11\n111", "Python", None),  # white space counts among all characters
        ("aa11\n1111", "Python", "alphabetic share"),
        ('<?xml version="1.0"?>\n<a>text</a>', "HTML", "XML"),
        ('<?xml version="1.0"?>\n<a>text</a>', "XSLT", None),
        ("x" * 80 + "\n" + "y" * 5 + "<?xml version=", "C", "XML"),  # ends at character 100
        ("x" * 80 + "\n" + "y" * 6 + "<?xml version=", "C", None),
        (page(100, 400), "HTML", None),
        (page(99, 300), "HTML", "HTML visible text"),
        (page(100, 401), "HTML", "HTML visible text"),
        (page(99, 300), "Python", None),
        (DATA[:50], "JSON", None),
        (DATA[:49], "JSON", "JSON or YAML length"),
        (DATA[:5000], "YAML", None),
        (DATA[:5001], "YAML", "JSON or YAML length"),
        (DATA[:5001], "Python", None),
    ],
)
def test_boundaries(text, language, reason):
    assert drop_reason(text, language, RULES) == reason


def test_thresholds_can_be_changed():
    assert drop_reason("x" * 101, "C", Rules(mean_line_length=101)) is None
    assert drop_reason("x" * 1001 + "\nx" * 20, "C", Rules(longest_line=1001)) is None
    assert drop_reason("a1111", "C", Rules(alphabetic_share=0.2)) is None
    assert drop_reason('<?xml version="1.0"?>', "C", Rules(xml_head=5)) is None
    assert drop_reason(page(99, 300), "HTML", Rules(html_text_length=99)) is None
    assert drop_reason(page(100, 401), "HTML", Rules(html_text_share=0.1)) is None
    assert drop_reason(DATA[:40], "JSON", Rules(data_shortest=40)) is None
    assert drop_reason(DATA[:5001], "JSON", Rules(data_longest=5001)) is None


@given(st.text(), st.integers(0, 8))
def test_shares_are_those_of_all_characters_with_and_without_the_ascii_path(text, eighths):
    for kind in (str.isalpha, str.isalnum):
        assert _fewer(kind, text, eighths / 8) == (sum(map(kind, text)) < eighths / 8 * len(text))


def test_visible_text():
    page = """<!doctype html><html><head><title>T &amp; t</title><style>p {}</style>
    <script>var hidden = "<p>no</p>";</script ></head><body><!-- no --><p class="a > b">one  <b>two</b></p>three < four
    <img alt='no>no'/></body>"""
    assert visible_text(page) == "T & t one two three < four"
    assert visible_text("seen <!-- not closed <p>no</p>") == "seen"
    assert visible_text("seen <SCRIPT> not closed <p>no</p>") == "seen"


class Parsed(HTMLParser):
    """Visible text by Python's HTML parser, the oracle for pages that are well formed."""

    def __init__(self):
        super().__init__()
        self.found, self.hidden = [], None

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "style"):
            self.hidden = tag

    def handle_endtag(self, tag):
        if tag == self.hidden:
            self.hidden = None

    def handle_data(self, data):
        if not self.hidden:
            self.found.append(data)


@pytest.mark.parametrize("module", [json, asyncio.locks, pydoc, string], ids=lambda module: module.__name__)
def test_visible_text_of_real_pages(module):
    documentation = pydoc.HTMLDoc()
    page = documentation.page(module.__name__, documentation.docmodule(module))
    oracle = Parsed()
    oracle.feed(page)
    oracle.close()
    assert visible_text(page) == " ".join(" ".join(oracle.found).split())


def test_no_page_takes_long():
    openings = [
        "<",
        "<!--",
        "<a ",
        "</a",
        "<![",
        "<?",
        "&",
        "<script>",
        "</script ",
        "<a b='",
        '<a b="',
        "<style",
        "'<a \"",
    ]
    for opening in openings:
        page = (opening + "\n") * ((1 << 20) // (len(opening) + 1))
        began = time.process_time()
        visible_text(page)
        assert time.process_time() - began < 5, opening


def test_hand_written_python_passes():
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    assert len(files) > 20
    assert all(drop_reason(path.read_text(encoding="utf-8"), "Python", RULES) is None for path in files)


def test_the_preset_deepseek_is_the_default():
    assert filter_of({}).rules == filter_of({"preset": "deepseek"}).rules == Rules()
    assert filter_of({}).exceptions == {}
    assert filter_of({"longest_line": 7}).of("a.py") == Rules(longest_line=7)


STARCODER = filter_of({"preset": "starcoder"})
LONG = "x" * 1001 + "\n" + "xy\n" * 50


@pytest.mark.parametrize(
    "path, text, reason",
    [
        ("a.py", LONG, "longest line"),
        ("a.md", LONG, None),
        ("a.sql", LONG, None),
        ("a.pkb", LONG, "longest line"),
        ("a.fsh", "x" * 501 + "\n" + "xy\n" * 50, "longest line"),
        ("a.vert", "x" * 501 + "\n" + "xy\n" * 50, None),
        ("a.py", "x" * 101, "mean line length"),
        ("a.tex", "x" * 101, None),
        ("a.py", "a111", None),  # digits count
        ("a.py", "1234....", None),
        ("a.py", "1........", "alphanumeric share"),
        ("a.sv", "1234....", "alphabetic share"),
        ("a.svh", "1234....", None),
        ("a.sas", "1........", None),
        ("a.JSON", "ab" + "12" * 40, "alphabetic share"),
        ("a.yml", "abc" * 20 + "12" * 20, None),
        ("a.rktd", "x = 1", "extension"),
        ("a.rkt", "x = 1", "extension"),  # its row in the table has no numbers
        ("a.ipynb", "x = 1", "extension"),
        ("Dockerfile", "FROM scratch", None),
        ("sub/Makefile", "all:\n", None),
        ("a.xsl", "<?xml version='1.0'?>\n<a>words</a>", None),
    ],
)
def test_the_table_of_starcoder(path, text, reason):
    language = {"xsl": "XSLT", "JSON": "JSON", "yml": "YAML"}.get(path.rsplit(".", 1)[-1], "Python")
    rules = STARCODER.of(path)
    assert (name_reason(path, rules) or drop_reason(text, language, rules)) == reason


def test_an_override_counts_for_every_extension():
    loose = filter_of({"preset": "starcoder", "longest_line": 2000, "alphabetic_share": 0})
    assert loose.of("a.md").longest_line == loose.of("a.py").longest_line == 2000
    assert loose.of("a.json").alphabetic_share == 0
    assert loose.of("a.json").mean_line_length == 0


def test_the_size_of_the_table():
    """267 rows are included, and JSON and YAML. Nine name no extension of their own: two have none (Dockerfile,
    Makefile), `stan` and `cmake` come twice, and five are single files (.1, .3, .mustache, .txt, ._coffee)."""
    rules = STARCODER.rules
    assert not set(rules.included) & set(rules.excluded)
    assert set(STARCODER.exceptions) <= set(rules.included)
    assert len(set(rules.included)) == len(rules.included) == 267 + 3 - 9
