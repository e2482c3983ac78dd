"""Sources and the crawl: folders, git URLs, archives, lists; what is left out and why; hostile archives."""

import io
import json
import os
import socket
import subprocess
import tarfile
import time
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from pretrain.corpus import crawl, licences
from pretrain.corpus.generated import generated
from pretrain.corpus.sources import find
from pretrain.corpus.vendored import vendored


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def repository(root, files):
    write(root, files)
    git(root, "init")
    git(root, "add", "-A")
    git(root, "commit", "-m", "first")
    return root


def read(sources, out, limits=None):
    """(kept rows, {path: reason}, {repository: what is known of it}) of a crawl. What could not be read is raised."""
    limits = limits or crawl.Limits()
    kept, dropped, about = [], {}, {}
    for shard in crawl.plan(find([str(source) for source in sources], out), out, limits):
        result = crawl.crawl_shard(out, shard, limits)
        kept += result.tables["part"].to_pylist()
        dropped |= {(row["repo"], row["path"]): row["reason"] for row in result.tables["dropped"].to_pylist()}
        about |= {row["repo"]: row for row in result.tables["repositories"].to_pylist()}
        for reason in result.about.get("unread", {}).values():
            raise ValueError(reason)
    return kept, dropped, about


def tar(path, members, mode="w:gz"):
    """members: (name, bytes) or a TarInfo."""
    with tarfile.open(path, mode) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_folder(tmp_path):
    root = write(
        tmp_path / "project",
        {
            "b.py": "b = 1\r\nc = 2\rd = 3\n",
            "a/c.c": "int x;\n",
            "bom.py": b"\xef\xbb\xbfx = 1\n",
            "latin.py": "# Größe der Datei prüfen\nx = 1\n".encode("latin-1"),
            "zero.py": b"x = 1\0",
            "large.py": b"x" * ((1 << 20) + 1),
            "just.py": b"x" * (1 << 20),
            "notes.txt": "no language",
            "node_modules/m/index.js": "x",
            "deep/vendor/v.go": "x",
            "__pycache__/a.py": "x",
            "line\nbreak.py": "x",
            ".git/config.py": "x",
        },
    )
    os.symlink(root / "b.py", root / "link.py")
    os.symlink(tmp_path, root / "up")
    os.mkfifo(root / "pipe.py")
    kept, dropped, _ = read([root], tmp_path / "out")
    assert [(row["repo"], row["path"], row["language"]) for row in kept] == [
        ("project", "a/c.c", "C"),
        ("project", "b.py", "Python"),
        ("project", "bom.py", "Python"),
        ("project", "just.py", "Python"),
        ("project", "latin.py", "Python"),
    ]
    assert kept[4]["text"] == "# Größe der Datei prüfen\nx = 1\n"
    assert kept[1]["text"] == "b = 1\nc = 2\nd = 3\n"
    assert kept[2]["text"] == "x = 1\n"
    assert {path: reason for (_, path), reason in dropped.items()} == {
        "zero.py": "binary",
        "large.py": "too large",
        "notes.txt": "unknown language",
        "node_modules/": "vendored folder",
        "deep/vendor/": "vendored folder",
        "__pycache__/": "vendored folder",
        "line\nbreak.py": "unprintable path",
        "link.py": "symbolic link",
        "up": "symbolic link",
        "pipe.py": "not a regular file",
    }


def test_a_name_that_is_not_utf8(tmp_path):
    root = write(tmp_path / "project", {"a.py": "x = 1\n"})
    (root / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")
    kept, dropped, _ = read([root], tmp_path / "out")
    assert [row["path"] for row in kept] == ["a.py"]
    assert dropped == {("project", "caf\\udce9.py"): "unprintable path"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_and_folders(tmp_path):
    root = write(tmp_path / "project", {"a.py": "x", "b.py": "x", "c/d.py": "x"})
    (root / "a.py").chmod(0)
    (root / "c").chmod(0)
    kept, dropped, _ = read([root], tmp_path / "out")
    (root / "c").chmod(0o700)
    assert [row["path"] for row in kept] == ["b.py"]
    assert dropped == {("project", "a.py"): "unreadable", ("project", "c/"): "unreadable"}


def test_a_folder_of_repositories(tmp_path):
    top = tmp_path / "all"
    write(top, {"one/.git/x": "", "one/a.py": "x", "owner/two/.git": "gitdir: elsewhere", "owner/two/b.py": "x"})
    write(top, {"owner/loose.py": "x", "one/sub/.git/x": "", "one/sub/c.py": "x"})
    kept, _, _ = read([top], tmp_path / "out")
    assert [(row["repo"], row["path"]) for row in kept] == [
        ("all", "owner/loose.py"),
        ("one", "a.py"),
        ("one", "sub/c.py"),  # a repository within a repository belongs to it
        ("owner/two", "b.py"),
    ]


def test_the_corpus_is_not_its_own_source(tmp_path):
    out = tmp_path / "project" / "corpus"
    write(tmp_path / "project", {"a.py": "x", "corpus/manifest.json": "{}", "corpus/cache/c/.git/x": ""})
    kept, dropped, _ = read([tmp_path / "project"], out)
    assert [row["path"] for row in kept] == ["a.py"]
    assert not dropped


def test_a_clone(tmp_path):
    source = repository(tmp_path / "work", {"a.py": "x = 1\n", "p/b.py": "y = 2\n"})
    kept, _, about = read([f"file://{source}"], tmp_path / "out")
    assert [(row["repo"], row["path"], row["text"]) for row in kept] == [
        ("work", "a.py", "x = 1\n"),
        ("work", "p/b.py", "y = 2\n"),
    ]
    head = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (about["work"]["url"], about["work"]["commit"]) == (f"file://{source}", head)
    assert list((tmp_path / "out" / "cache").iterdir()) == []


def test_a_clone_of_an_empty_repository(tmp_path):
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init")
    kept, _, about = read([f"file://{tmp_path / 'empty'}"], tmp_path / "out")
    assert kept == []
    assert about["empty"]["commit"] == ""


def test_a_clone_outlives_a_failure_of_its_shard(tmp_path):
    source = repository(tmp_path / "a", {"a.py": "x = 1\n"})
    urls = [f"file://{source}", f"file://{tmp_path / 'zzz'}"]
    with pytest.raises(ValueError, match=r"zzz: git clone failed \(.*\); check the URL"):
        read(urls, tmp_path / "out", crawl.Limits(clone_tries=1))
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 1
    repository(tmp_path / "zzz", {"b.py": "y = 1\n"})
    (source / ".git").rename(tmp_path / "gone")  # the first can only come from the cache now
    kept, _, _ = read(urls, tmp_path / "out")
    assert [row["path"] for row in kept] == ["a.py", "b.py"]
    assert list((tmp_path / "out" / "cache").iterdir()) == []


def test_a_clone_that_takes_too_long(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"git clone took over 1 s; raise \[crawl\] clone_seconds"):
        read(["https://host.invalid/a/b"], tmp_path / "out", crawl.Limits(clone_seconds=1, clone_tries=1))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="git is not installed"):
        read(["https://host.invalid/a/b"], tmp_path / "out")


@pytest.mark.parametrize("suffix, mode", [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.xz", "w:xz"), (".tar", "w")])
def test_a_tar_archive(tmp_path, suffix, mode):
    members = [
        ("top-1.0/a.py", b"x = 1\n"),
        ("./top-1.0/p/b.py", b"old"),
        ("top-1.0/p/b.py", b"y = 2\r\n"),
        ("top-1.0/vendor/c.py", b"x"),
        ("top-1.0/vendor/d.py", b"x"),
        ("top-1.0/.git/hooks.py", b"x"),
        ("top-1.0/notes.txt", b"x"),
        link("top-1.0/p/link.py", "../a.py"),
        link("top-1.0/hard.py", "top-1.0/a.py", tarfile.LNKTYPE),
        link("top-1.0/device.py", "", tarfile.CHRTYPE),
    ]
    kept, dropped, _ = read([tar(tmp_path / f"top{suffix}", members, mode)], tmp_path / "out")
    assert [(row["repo"], row["path"], row["text"]) for row in kept] == [
        ("top", "a.py", "x = 1\n"),
        ("top", "p/b.py", "y = 2\n"),
    ]
    assert {path: reason for (_, path), reason in dropped.items()} == {
        "vendor/": "vendored folder",
        "notes.txt": "unknown language",
        "p/link.py": "symbolic link",
        "hard.py": "symbolic link",
        "device.py": "not a regular file",
    }


def test_a_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("a.py", "x = 1\n")
        archive.writestr("sub\\b.py", "y = 1\n")
        archive.writestr("large.py", b"x" * ((1 << 20) + 1))
        archive.mkdir("empty")
    kept, dropped, _ = read([tmp_path / "p.zip"], tmp_path / "out")
    assert [row["path"] for row in kept] == ["a.py", "sub/b.py"]
    assert dropped == {("p", "large.py"): "too large"}


EVIL = {
    "absolute": [("/etc/a.py", b"x")],
    "climbing": [("a/../../b.py", b"x")],
    "climbing after good members": [("a.py", b"x"), ("b.py", b"x"), ("../c.py", b"x")],
    "backslashes": [("..\\c.py", b"x")],
    "drive": [("C:\\c.py", b"x")],
    "unknown language": [("../../.ssh/authorized_keys", b"x")],
    "symbolic link": [link("p/a.py", "../../secret.py")],
    "absolute symbolic link": [link("p/a.py", "/etc/passwd")],
    "hard link": [link("p/a.py", "../secret.py", tarfile.LNKTYPE)],
    "folder": [link("../up", "", tarfile.DIRTYPE)],
}


@pytest.mark.parametrize("name", EVIL)
def test_an_archive_that_climbs_out_is_refused(tmp_path, name):
    file = tar(tmp_path / "evil.tar.gz", EVIL[name])
    with pytest.raises(ValueError, match=r"evil\.tar\.gz: its member or link .* leads out of the archive"):
        read([file], tmp_path / "out")


@pytest.mark.parametrize("member", ["../a.py", "/a.py", "x/../../a.py", "link"])
def test_a_zip_that_climbs_out_is_refused(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        info = zipfile.ZipInfo(member)
        if member == "link":
            info.external_attr = 0o120777 << 16
        archive.writestr(info, "../../target.py")
    with pytest.raises(ValueError, match=r"evil\.zip: its member or link .* leads out of the archive"):
        read([tmp_path / "evil.zip"], tmp_path / "out")


def test_damaged_archives(tmp_path):
    good = tar(tmp_path / "good.tar.gz", [("a.py", os.urandom(50_000))]).read_bytes()
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        archive.writestr("a.py", "x = 1\n" * 100)
    damaged = {
        "cut.tar.gz": good[: len(good) // 2],
        "noise.tar.gz": b"noise" * 1000,
        "noise.tar.xz": b"\xfd7zXZ\0noise",
        "empty.tgz": b"",
        "cut.zip": (tmp_path / "good.zip").read_bytes()[:-30],
        "noise.zip": b"noise",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: this archive cannot be read \(.*\); fetch it again"):
            read([tmp_path / name], tmp_path / "out")


def test_lists(tmp_path):
    write(tmp_path, {"one/a.py": "x", "two/b.py": "x"})
    tar(tmp_path / "three.tgz", [("c.py", b"x")])
    rows = [{"path": "one", "stars": 5, "licence": "MIT"}, {"path": "three.tgz"}]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "list.csv").write_text(f"url,path,stars\n,two,7\nfile://{tmp_path}/four,,1\n")
    repository(tmp_path / "four", {"d.py": "x"})
    kept, _, about = read([tmp_path / "list.jsonl", tmp_path / "list.csv"], tmp_path / "out")
    assert [(row["repo"], row["path"]) for row in kept] == [
        ("four", "d.py"),
        ("one", "a.py"),
        ("three", "c.py"),
        ("two", "b.py"),
    ]
    assert (about["one"]["stars"], about["one"]["licence"]) == (5, "MIT")
    assert (about["two"]["stars"], about["two"]["licence"]) == (7, None)
    assert about["four"]["stars"] == 1


def test_shards_hold_whole_repositories_up_to_their_size(tmp_path):
    for name, size in {"a": 400, "b": 500, "c": 300, "d": 2000, "e": 10}.items():
        write(tmp_path / name, {"x.py": "#" * size, "y.py": "#" * 100, "notes.txt": "#" * 5000})
    repositories = find([str(tmp_path / name) for name in "edcba"], tmp_path / "out")
    shards = crawl.plan(repositories, tmp_path / "out", crawl.Limits(shard_bytes=1200))
    assert [[repository.name for repository in shard.inputs] for shard in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [shard.name for shard in shards] == ["00000", "00001", "00002", "00003"]


# ---- which repositories ----------------------------------------------------------------------------------------------


def test_a_commit_is_checked_out(tmp_path):
    source = repository(tmp_path / "work", {"a.py": "first = 1\n"})
    commit = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    write(source, {"a.py": "second = 2\n"})
    git(source, "commit", "-am", "second")
    for row in ({"url": f"file://{source}"}, {"path": "work"}):
        (tmp_path / "list.jsonl").write_text(json.dumps(row | {"commit": commit}))
        kept, _, about = read([tmp_path / "list.jsonl"], tmp_path / "out")
        assert [file["text"] for file in kept] == ["first = 1\n"]
        assert about["work"]["commit"] == commit
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "work", "commit": "0" * 40}))
    with pytest.raises(ValueError, match="work: git clone failed"):
        read([tmp_path / "list.jsonl"], tmp_path / "out", crawl.Limits(clone_tries=1))


def test_clones_stay_in_a_cache_that_is_named(tmp_path):
    source = repository(tmp_path / "work", {"a.py": "x = 1\n"})
    limits = crawl.Limits(cache=str(tmp_path / "cache"))
    read([f"file://{source}"], tmp_path / "out", limits)
    (source / ".git").rename(tmp_path / "gone")
    kept, _, _ = read([f"file://{source}"], tmp_path / "other", limits)
    assert [row["path"] for row in kept] == ["a.py"]


def test_a_clone_is_tried_again(tmp_path, monkeypatch):
    source = repository(tmp_path / "work", {"a.py": "x = 1\n"})
    script = f"""#!/bin/sh
    if [ "$3" = clone ] && [ ! -e {tmp_path}/tried ]; then touch {tmp_path}/tried; echo lost >&2; exit 128; fi
    PATH=${{PATH#*:}} exec git "$@"
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(script)
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    kept, _, _ = read([f"file://{source}"], tmp_path / "out")
    assert (tmp_path / "tried").exists()
    assert [row["path"] for row in kept] == ["a.py"]


MIT = next(
    text
    for distribution in distributions()
    if distribution.metadata["Name"] == "pluggy"
    for file in distribution.files or []
    if file.name == "LICENSE"
    for text in [file.read_text()]
)


def test_a_silent_server(tmp_path):
    """It is left after clone_seconds, and so is it by the helpers that git has started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/owner/name"
        started = time.monotonic()
        with pytest.raises(ValueError, match="git clone took over 1 s"):
            read([url], tmp_path / "out", crawl.Limits(clone_seconds=1, clone_tries=1))
        assert time.monotonic() - started < 20
        connection, _ = server.accept()
        with connection:
            connection.settimeout(20)
            while connection.recv(1 << 16):  # what it asked, and then the end: nobody waits for an answer any more
                pass


def test_hooks_of_the_user_stay_out(tmp_path, monkeypatch):
    source = repository(tmp_path / "work", {"a.py": "x = 1\n"})
    write(tmp_path, {"hooks/post-checkout": f"#!/bin/sh\ntouch {tmp_path}/ran\n"})
    (tmp_path / "hooks" / "post-checkout").chmod(0o755)
    write(tmp_path, {"config": f"[core]\nhooksPath = {tmp_path}/hooks\n"})
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    kept, _, _ = read([f"file://{source}"], tmp_path / "out")
    assert [row["path"] for row in kept] == ["a.py"]
    assert not (tmp_path / "ran").exists()


def test_manifests_are_kept_beside_the_files(tmp_path):
    files = {
        "go.mod": "module example.org/a\n",
        "x/Cargo.toml": "[package]\n",
        "package.json": "{}",
        "a.go": "package a\n",
        "huge/go.mod": "x" * (licences.MAX_BYTES + 1),
    }
    (archive,) = [tar(tmp_path / "r.tgz", [(f"top/{path}", text.encode()) for path, text in files.items()])]
    for source in (write(tmp_path / "r", files), archive):
        (shard,) = crawl.plan(find([str(source)], tmp_path / "out"), tmp_path / "out", crawl.Limits())
        tables = crawl.crawl_shard(tmp_path / "out", shard, crawl.Limits()).tables
        manifests = {row["path"]: row["text"] for row in tables["manifests"].to_pylist()}
        assert manifests == {path: files[path] for path in ("go.mod", "package.json", "x/Cargo.toml")}
        assert tables["part"]["path"].to_pylist() == ["a.go", "package.json"]
        assert tables["dropped"]["path"].to_pylist() == ["go.mod", "huge/go.mod", "x/Cargo.toml"]


def test_repositories_are_chosen(tmp_path):
    facts = {
        "good": {"stars": 10, "forks": 2, "created": "2022-05-01T10:00:00Z", "licence": "MIT"},
        "found": {"stars": "10", "forks": "2", "created": "2022-05-01"},
        "none": {"stars": 10, "forks": 2, "created": "2022-05-01"},
        "few": {"stars": 9, "forks": 2, "created": "2022-05-01", "licence": "MIT"},
        "unforked": {"stars": 10, "created": "2022-05-01", "licence": "MIT"},
        "early": {"stars": 10, "forks": 2, "created": "2019-12-31", "licence": "MIT"},
        "late": {"stars": 10, "forks": 2, "created": "2023-02-01T00:00:00Z", "licence": "MIT"},
        "undated": {"stars": 10, "forks": 2, "licence": "MIT"},
        "copyleft": {"stars": 10, "forks": 2, "created": "2022-05-01", "license": "GPL-3.0-only"},
    }
    write(tmp_path, {f"{name}/a.py": "x = 1\n" for name in facts})
    write(tmp_path / "found", {"LICENSE.txt": MIT, "sub/LICENSE": "none of the repository's"})
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"path": name} | row) for name, row in facts.items()))
    limits = crawl.Limits(
        min_stars=10, min_forks=1, created_from="2020-01-01", created_until="2023-01-31", licences=("permissive",)
    )
    kept, dropped, about = read([tmp_path / "list.jsonl"], tmp_path / "out", limits)
    assert [row["repo"] for row in kept] == ["found", "good"]
    assert about["found"]["licence"] == "MIT"
    assert {name: row["dropped"] for name, row in about.items() if row["dropped"]} == {
        "none": "licence",
        "few": "stars",
        "unforked": "forks",
        "early": "created",
        "late": "created",
        "undated": "created",
        "copyleft": "licence",
    }
    assert {repo for repo, _ in dropped} == {"found"}
    kept, _, _ = read([tmp_path / "list.jsonl"], tmp_path / "out", crawl.Limits(licences=("GPL-3.0-only", "none")))
    assert [row["repo"] for row in kept] == ["copyleft", "none"]


def test_licences_of_installed_packages():
    """Their metadata say which one it is: the oracle."""
    compared = 0
    for distribution in distributions():
        stated = distribution.metadata.get("License-Expression", "")
        files = [f for f in distribution.files or [] if f.name in ("LICENSE", "LICENSE.txt") and len(f.parts) == 3]
        if len(files) == 1 and stated in ("MIT", "Apache-2.0", "BSD-3-Clause", "BSD-2-Clause", "ISC", "MPL-2.0"):
            found = licences.detect([files[0].read_text(encoding="utf-8")])
            assert stated in found.split(" AND ") or not found, distribution.metadata["Name"]
            compared += found == stated
    assert compared >= 10


@pytest.mark.parametrize(
    "licence, expected",
    [
        ("MIT", True),
        ("apache-2.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only OR MIT", True),
        ("(MIT OR GPL-2.0-only)", True),
        ("GPL-2.0-only AND MIT", False),
        ("MIT AND BSD-3-Clause", True),
        ("GPL-3.0-or-later", False),
        ("(MIT OR Apache-2.0) AND GPL-3.0-only", False),
        ("GPL-3.0-only AND (MIT OR Apache-2.0)", False),
        ("MIT OR (GPL-2.0-only AND Apache-2.0)", True),
        ("((MIT) AND (Zlib OR GPL-2.0-only))", True),
        ("(", False),
        ("", False),
        (None, False),
        (" OR ", False),
    ],
)
def test_permissive(licence, expected):
    assert licences.permissive(licence) is expected


# ---- which files -----------------------------------------------------------------------------------------------------


def test_vendored_files():
    theirs = """js/jquery.js js/jquery-3.6.0.min.js css/jquery-ui-1.12.1.css bootstrap.css bootstrap-theme.css d3.js
    d3.v7.js react-dom.js angular-route.js app.min.js style-min.css sub/configure aclocal.m4 docs/_build/a.html
    tests/fixtures/a.py gradlew gradle/wrapper/a.java lib/codemirror/mode/python.js MochiKit.js x-vsdoc.js
    packages/Newtonsoft.Json.6.0.1/lib/a.cs static/modernizr-2.8.3.js tiny_mce/plugins/a.js"""
    ours = """src/app.js reactive.js foundations.py prototyping.js d3scale.js configure.py src/tests/fixtures/a.py
    minimal.js docs/build.py tools/a.c packages/core/src/a.ts angularity.js a/control.js types.d.ts"""
    assert [path for path in theirs.split() if not vendored(path)] == []
    assert [path for path in ours.split() if vendored(path)] == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("package-lock.json", "{}"),
        ("a/Form1.Designer.cs", "class A {}"),
        ("a/user_pb2.py", "x = 1"),
        ("web/__generated__/a.ts", "x"),
        ("a.py", "# -*- coding: utf-8 -*-\n# Generated by the protocol buffer compiler.  DO NOT EDIT!\n"),
        ("a.go", "//go:build linux\n\n// Copyright\n//\n// x\n\n// Code generated by mockgen. DO NOT EDIT.\npackage a"),
        ("a.c", "/* Generated by Cython 3.0.0 */\nint x;\n"),
        ("a.java", "/* The following code was generated by JFlex 1.4.3 */\nclass A {}"),
        ("a.py", "#!/usr/bin/env python\n# This file is auto-generated from x\n"),
        ("a.js", "var a=1;" * 100),
        ("a.js", "a();\n//# sourceMappingURL=a.js.map\n"),
        ("a.css", "p {}\n/*# sourceMappingURL=a.css.map */"),
        ("a.yml", "---\na: 1\nrecorded_with: VCR 2.0\n"),
        ("a.html", '<html><head>\n<meta name="generator" content="Org mode" />\n'),
    ],
)
def test_generated_files(path, text):
    assert generated(path, text)


def test_written_files_are_not_generated():
    ours = {
        "a.py": "x = 1\n" * 6 + "# this code is auto-generated by the compiler below\n",
        "b.js": "function a() {\n  return 1;\n}\n",
        "generator.go": "package generator\n\n// Code generated here is formatted.\n" + "var x = 1\n" * 50,
        "c.yml": "a: 1\n",
    }
    assert [path for path, text in ours.items() if path != "generator.go" and generated(path, text)] == []
    for module in (json, zipfile, tarfile):
        assert not generated("a.py", Path(module.__file__).read_text())


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("# Größe der Datei prüfen, dann schließen\nx = 1\n", "cp1252"),
        ("// 二つの数の合計を計算して返す関数です\nint add(int a);\n", "shift_jis"),
        ("// Вычисляет сумму двух чисел и возвращает её\nint add();\n", "cp1251"),
        ("// 计算两个数的和，返回结果\n// 如果输入为空则返回错误代码，并且打印日志信息\n", "gb18030"),
        ("x = 'ä'\n", "utf-16"),
        ("x = 'ä'\n", "utf-8-sig"),
    ],
)
def test_encodings(tmp_path, text, encoding):
    root = write(tmp_path / "r", {"a.c": text.encode(encoding)})
    kept, _, _ = read([root], tmp_path / "out")
    assert [row["text"] for row in kept] == [text]


def test_hostile_files(tmp_path):
    """Recorded and passed over: 5 GB in one file, a line of 100 MB, links in circles, folders deeper than the stack."""
    root = write(tmp_path / "r", {"a.py": "x = 1\n"})
    with open(root / "large.py", "wb") as file:
        file.truncate(5 << 30)
    with open(root / "line.py", "wb") as file:
        file.write(b"x" * (100 << 20))
    os.symlink(root, root / "circle")
    os.symlink("self.py", root / "self.py")
    deep, descriptor = root, os.open(root, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    kept, dropped, _ = read([root], tmp_path / "out")
    (root / "line.py").unlink()
    assert [row["path"] for row in kept] == ["a.py"]
    reasons = {path: reason for (_, path), reason in dropped.items() if not path.startswith("d/")}
    assert reasons == {
        "large.py": "too large",
        "line.py": "too large",
        "circle": "symbolic link",
        "self.py": "symbolic link",
    }
    assert deep.exists()
    subprocess.run(["rm", "-rf", root], check=True)


def test_a_line_of_100_mb_goes_through(tmp_path):
    """When the limit lets it in, the rules see to it."""
    root = write(tmp_path / "r", {"a.py": b"x" * (100 << 20)})
    kept, _, _ = read([root], tmp_path / "out", crawl.Limits(max_file_bytes=200 << 20))
    assert [len(row["text"]) for row in kept] == [100 << 20]


@pytest.mark.parametrize("archive", [False, True])
def test_a_repository_with_too_many_files(tmp_path, archive):
    files = {f"p/{number}.py": "x = 1\n" for number in range(30)}
    source = write(tmp_path / "many", files)
    if archive:
        source = tar(tmp_path / "many.tar", [(path, text.encode()) for path, text in files.items()], "w")
    other = write(tmp_path / "other", {"a.py": "y = 1\n"})
    for limits, why in (
        (crawl.Limits(max_repository_files=29), "more than 29 files"),
        (crawl.Limits(max_repository_bytes=100), "100 bytes"),
    ):
        kept, dropped, about = read([source, other], tmp_path / "out", limits)
        assert [row["repo"] for row in kept] == ["other"]
        assert dropped == {}
        assert why in about["many"]["dropped"]
    kept, _, _ = read([source], tmp_path / "out", crawl.Limits(max_repository_files=30))
    assert len(kept) == 30
