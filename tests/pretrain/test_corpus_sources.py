"""What sources and lists name: repositories; what lists of the world look like, and what ends in an error."""

import json

import pytest

from pretrain.corpus import crawl
from pretrain.corpus.sources import find


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"path": "missing"}', r"a\.jsonl, line 1: .*missing: no such source"),
        ("a.jsonl", '{"path": "."}\n{"path": ', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"stars": 1}', r"a\.jsonl, line 1: names no repository; give it a `url` or a `path`"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1: names no repository"),
        ("a.csv", "name,stars\nx,1\n", r"a\.csv, line 2: names no repository"),
        ("a.csv", b"url\n\xff\n", r"a\.csv: this list cannot be read"),
        ("a.csv", "url;stars\nhttps://host/a/b;3\n", r"a\.csv, line 2: names no repository"),
        ("a.csv", "url,stars\nhttps://host/a/b,1e3\n", r"a\.csv, line 2: its stars are '1e3'"),
        ("a.jsonl", '{"url": "-oProxyCommand=x@host:a"}', "-oProxyCommand=x@host:a: no such source"),
    ],
)
def test_bad_lists(tmp_path, name, text, message):
    write(tmp_path, {name: text})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find([str(tmp_path / name)], tmp_path / "out")


def test_bad_sources(tmp_path):
    write(tmp_path, {"a.py": "x"})
    with pytest.raises(ValueError, match="no sources given"):
        find([], tmp_path)
    for missing in ("nowhere", "nowhere.tar.gz", "nowhere.jsonl"):
        with pytest.raises(FileNotFoundError, match=rf"{missing}: no such"):
            find([str(tmp_path / missing)], tmp_path)
    with pytest.raises(ValueError, match="ftp://x/y: not a URL that git clones here"):
        find(["ftp://x/y"], tmp_path)
    with pytest.raises(FileNotFoundError, match="ext::sh"):
        find(["ext::sh -c true"], tmp_path)
    with pytest.raises(ValueError, match=r"a\.py: not a folder, a git URL or an archive"):
        find([str(tmp_path / "a.py")], tmp_path)


def test_lists_as_they_are(tmp_path):
    """Columns in any case and order, more and fewer cells than columns, cells of several lines and of 200 kB, numbers
    from a table in which some were missing, what only Unicode calls the end of a line."""
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfName, URL ,Stars,description,License,readme\r\n"
        b'x, https://host/a/b ,12.0,"two\r\nlines, and \xe2\x80\xa8",NOASSERTION,' + b"r" * 200_000 + b"\r\n"
        b"y,https://host/a/c\r\n"
        b"z,https://host/a/d,,,mit,r,one,more\r\n"
    )
    row = {"url": "https://host/a/e", "stars": 3.0, "text": "\u2028\x85"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    found = find([str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")], tmp_path / "out")
    assert [(r.name, r.stars, r.licence) for r in found] == [
        ("a/b", 12, None),
        ("a/c", None, None),
        ("a/d", None, "mit"),
        ("a/e", 3, None),
    ]


@pytest.mark.parametrize("key", ["created_from", "created_until"])
@pytest.mark.parametrize("day", ["2023", "31.1.2023", "2023-1-31", "2023-01-31T00:00"])
def test_bad_days(key, day):
    with pytest.raises(ValueError, match=rf'{key} in \[crawl\] is .*; write a day like "2023-01-31"'):
        crawl.Limits(**{key: day})


def test_names(tmp_path):
    for folder in ("x/same", "y/same", "same~2"):
        write(tmp_path / folder, {"a.py": "x"})
    urls = ["https://host/owner/name.git", "git@host:owner/other", "https://host/owner/name.git", "ssh://git@h/o/n/"]
    folders = [str(tmp_path / "x/same"), str(tmp_path / "same~2"), str(tmp_path / "y/same")]
    found = find([*urls, *folders, folders[0] + "/"], tmp_path / "out")
    assert [repository.name for repository in found] == ["o/n", "owner/name", "owner/other", "same", "same~2", "same~3"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"stars": "many"}, r"line 1: its stars are 'many'; write a whole number"),
        ({"forks": -1}, r"its forks are -1"),
        ({"created": "yesterday"}, r"its created is 'yesterday'; write it like 2023-01-31"),
        ({"commit": "--upload-pack=x"}, r"its commit is '--upload-pack=x'"),
        ({"licence": ["MIT"]}, r"its licence is \['MIT'\]"),
    ],
)
def test_bad_facts(tmp_path, row, message):
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "."} | row))
    with pytest.raises(ValueError, match=message):
        find([str(tmp_path / "list.jsonl")], tmp_path / "out")
