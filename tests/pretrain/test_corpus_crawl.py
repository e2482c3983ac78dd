"""The crawl: folders and archives, what is left out and why, hostile input."""

import io
import os
import subprocess
import tarfile
import zipfile

import pytest

from pretrain.corpus import crawl, licences
from pretrain.corpus.sources import find


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


def test_a_folder(tmp_path, write, crawled):
    root = write(
        tmp_path / "project",
        {
            "b.py": "b = 1\r\nc = 2\rd = 3\n",
            "a/c.c": "int x;\n",
            "bom.py": b"\xef\xbb\xbfx = 1\n",
            "latin.py": "# Größe der Datei prüfen: schließt sie, wenn nötig, für spätere Läufe\nx = 1\n".encode(
                "latin-1"
            ),
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
    kept, dropped, _ = crawled([root], tmp_path / "out")
    assert [(row["repo"], row["path"], row["language"]) for row in kept] == [
        ("project", "a/c.c", "C"),
        ("project", "b.py", "Python"),
        ("project", "bom.py", "Python"),
        ("project", "just.py", "Python"),
        ("project", "latin.py", "Python"),
    ]
    assert kept[4]["text"] == "# Größe der Datei prüfen: schließt sie, wenn nötig, für spätere Läufe\nx = 1\n"
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


def test_a_name_that_is_not_utf8(tmp_path, write, crawled):
    root = write(tmp_path / "project", {"a.py": "x = 1\n"})
    (root / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")
    kept, dropped, _ = crawled([root], tmp_path / "out")
    assert [row["path"] for row in kept] == ["a.py"]
    assert dropped == {("project", "caf\\udce9.py"): "unprintable path"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_and_folders(tmp_path, write, crawled):
    root = write(tmp_path / "project", {"a.py": "x", "b.py": "x", "c/d.py": "x"})
    (root / "a.py").chmod(0)
    (root / "c").chmod(0)
    kept, dropped, _ = crawled([root], tmp_path / "out")
    (root / "c").chmod(0o700)
    assert [row["path"] for row in kept] == ["b.py"]
    assert dropped == {("project", "a.py"): "unreadable", ("project", "c/"): "unreadable"}


def test_a_folder_of_repositories(tmp_path, write, crawled):
    top = tmp_path / "all"
    write(top, {"one/.git/x": "", "one/a.py": "x", "owner/two/.git": "gitdir: elsewhere", "owner/two/b.py": "x"})
    write(top, {"owner/loose.py": "x", "one/sub/.git/x": "", "one/sub/c.py": "x"})
    kept, _, _ = crawled([top], tmp_path / "out")
    assert [(row["repo"], row["path"]) for row in kept] == [
        ("all", "owner/loose.py"),
        ("one", "a.py"),
        ("one", "sub/c.py"),  # a repository within a repository belongs to it
        ("owner/two", "b.py"),
    ]


def test_the_corpus_is_not_its_own_source(tmp_path, write, crawled):
    out = tmp_path / "project" / "corpus"
    write(tmp_path / "project", {"a.py": "x", "corpus/manifest.json": "{}", "corpus/cache/c/.git/x": ""})
    kept, dropped, _ = crawled([tmp_path / "project"], out)
    assert [row["path"] for row in kept] == ["a.py"]
    assert not dropped


@pytest.mark.parametrize("suffix, mode", [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.xz", "w:xz"), (".tar", "w")])
def test_a_tar_archive(tmp_path, suffix, mode, crawled):
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
    kept, dropped, _ = crawled([tar(tmp_path / f"top{suffix}", members, mode)], tmp_path / "out")
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


def test_a_zip_archive(tmp_path, crawled):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("a.py", "x = 1\n")
        archive.writestr("sub\\b.py", "y = 1\n")
        archive.writestr("large.py", b"x" * ((1 << 20) + 1))
        archive.mkdir("empty")
    kept, dropped, _ = crawled([tmp_path / "p.zip"], tmp_path / "out")
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
def test_an_archive_that_climbs_out_is_refused(tmp_path, name, crawled):
    file = tar(tmp_path / "evil.tar.gz", EVIL[name])
    with pytest.raises(ValueError, match=r"evil\.tar\.gz: its member or link .* leads out of the archive"):
        crawled([file], tmp_path / "out")


@pytest.mark.parametrize("member", ["../a.py", "/a.py", "x/../../a.py", "link"])
def test_a_zip_that_climbs_out_is_refused(tmp_path, member, crawled):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        info = zipfile.ZipInfo(member)
        if member == "link":
            info.external_attr = 0o120777 << 16
        archive.writestr(info, "../../target.py")
    with pytest.raises(ValueError, match=r"evil\.zip: its member or link .* leads out of the archive"):
        crawled([tmp_path / "evil.zip"], tmp_path / "out")


def test_damaged_archives(tmp_path, crawled):
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
            crawled([tmp_path / name], tmp_path / "out")


def test_shards_hold_whole_repositories_up_to_their_size(tmp_path, write):
    for name, size in {"a": 400, "b": 500, "c": 300, "d": 2000, "e": 10}.items():
        write(tmp_path / name, {"x.py": "#" * size, "y.py": "#" * 100, "notes.txt": "#" * 5000})
    repositories = find([str(tmp_path / name) for name in "edcba"], tmp_path / "out")
    shards = crawl.plan(repositories, tmp_path / "out", crawl.Limits(shard_bytes=1200))
    assert [[repository.name for repository in shard.inputs] for shard in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [shard.name for shard in shards] == ["00000", "00001", "00002", "00003"]


def test_manifests_are_kept_beside_the_files(tmp_path, write):
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


def test_hostile_files(tmp_path, write, crawled):
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
    kept, dropped, _ = crawled([root], tmp_path / "out")
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


def test_a_line_of_100_mb_goes_through(tmp_path, write, crawled):
    """When the limit lets it in, the rules see to it."""
    root = write(tmp_path / "r", {"a.py": b"x" * (100 << 20)})
    kept, _, _ = crawled([root], tmp_path / "out", crawl.Limits(max_file_bytes=200 << 20))
    assert [len(row["text"]) for row in kept] == [100 << 20]


@pytest.mark.parametrize("archive", [False, True])
def test_a_repository_with_too_many_files(tmp_path, archive, write, crawled):
    files = {f"p/{number}.py": "x = 1\n" for number in range(30)}
    source = write(tmp_path / "many", files)
    if archive:
        source = tar(tmp_path / "many.tar", [(path, text.encode()) for path, text in files.items()], "w")
    other = write(tmp_path / "other", {"a.py": "y = 1\n"})
    for limits, why in (
        (crawl.Limits(max_repository_files=29), "more than 29 files"),
        (crawl.Limits(max_repository_bytes=100), "100 bytes"),
    ):
        kept, dropped, about = crawled([source, other], tmp_path / "out", limits)
        assert [row["repo"] for row in kept] == ["other"]
        assert dropped == {}
        assert why in about["many"]["dropped"]
    kept, _, _ = crawled([source], tmp_path / "out", crawl.Limits(max_repository_files=30))
    assert len(kept) == 30
