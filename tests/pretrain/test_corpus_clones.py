"""Which repositories: git URLs, lists of them, and conditions on what is known."""

import base64
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from importlib.metadata import distributions

import pytest

from pretrain import corpus
from pretrain.corpus import crawl
from pretrain.corpus.sources import find, without_login


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(write):
    def made(root, files):
        write(root, files)
        git(root, "init")
        git(root, "add", "-A")
        git(root, "commit", "-m", "first")
        return root

    return made


def test_a_clone(tmp_path, crawled, repository):
    source = repository(tmp_path / "work", {"a.py": "x = 1\n", "p/b.py": "y = 2\n"})
    kept, _, about = crawled([f"file://{source}"], tmp_path / "out")
    assert [(row["repo"], row["path"], row["text"]) for row in kept] == [
        ("work", "a.py", "x = 1\n"),
        ("work", "p/b.py", "y = 2\n"),
    ]
    head = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (about["work"]["url"], about["work"]["commit"]) == (f"file://{source}", head)
    assert list((tmp_path / "out" / "cache").iterdir()) == []


def test_a_clone_of_an_empty_repository(tmp_path, crawled):
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init")
    kept, _, about = crawled([f"file://{tmp_path / 'empty'}"], tmp_path / "out")
    assert kept == []
    assert about["empty"]["commit"] == ""


def test_a_clone_outlives_a_failure_of_its_shard(tmp_path, crawled, repository):
    source = repository(tmp_path / "a", {"a.py": "x = 1\n"})
    urls = [f"file://{source}", f"file://{tmp_path / 'zzz'}"]
    with pytest.raises(ValueError, match=r"zzz: git clone failed \(.*\); check the URL"):
        crawled(urls, tmp_path / "out", crawl.Limits(clone_tries=1))
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 1
    repository(tmp_path / "zzz", {"b.py": "y = 1\n"})
    (source / ".git").rename(tmp_path / "gone")  # the first can only come from the cache now
    kept, _, _ = crawled(urls, tmp_path / "out")
    assert [row["path"] for row in kept] == ["a.py", "b.py"]
    assert list((tmp_path / "out" / "cache").iterdir()) == []


def test_a_clone_that_takes_too_long(tmp_path, monkeypatch, crawled):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"git clone took over 1 s; raise \[crawl\] clone_seconds"):
        crawled(["https://host.invalid/a/b"], tmp_path / "out", crawl.Limits(clone_seconds=1, clone_tries=1))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="git is not installed"):
        crawled(["https://host.invalid/a/b"], tmp_path / "out")


def test_lists(tmp_path, write, crawled, repository):
    write(tmp_path, {"one/a.py": "x", "two/b.py": "x"})
    shutil.make_archive(str(tmp_path / "three"), "gztar", write(tmp_path / "packed", {"c.py": "x"}))
    rows = [{"path": "one", "stars": 5, "licence": "MIT"}, {"path": "three.tar.gz"}]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "list.csv").write_text(f"url,path,stars\n,two,7\nfile://{tmp_path}/four,,1\n")
    repository(tmp_path / "four", {"d.py": "x"})
    kept, _, about = crawled([tmp_path / "list.jsonl", tmp_path / "list.csv"], tmp_path / "out")
    assert [(row["repo"], row["path"]) for row in kept] == [
        ("four", "d.py"),
        ("one", "a.py"),
        ("three", "c.py"),
        ("two", "b.py"),
    ]
    assert (about["one"]["stars"], about["one"]["licence"]) == (5, "MIT")
    assert (about["two"]["stars"], about["two"]["licence"]) == (7, None)
    assert about["four"]["stars"] == 1


def test_a_commit_is_checked_out(tmp_path, write, crawled, repository):
    source = repository(tmp_path / "work", {"a.py": "first = 1\n"})
    commit = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    write(source, {"a.py": "second = 2\n"})
    git(source, "commit", "-am", "second")
    for row in ({"url": f"file://{source}"}, {"path": "work"}):
        (tmp_path / "list.jsonl").write_text(json.dumps(row | {"commit": commit}))
        kept, _, about = crawled([tmp_path / "list.jsonl"], tmp_path / "out")
        assert [file["text"] for file in kept] == ["first = 1\n"]
        assert about["work"]["commit"] == commit
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "work", "commit": "0" * 40}))
    with pytest.raises(ValueError, match="work: git clone failed"):
        crawled([tmp_path / "list.jsonl"], tmp_path / "out", crawl.Limits(clone_tries=1))


def test_clones_stay_in_a_cache_that_is_named(tmp_path, crawled, repository):
    source = repository(tmp_path / "work", {"a.py": "x = 1\n"})
    limits = crawl.Limits(cache=str(tmp_path / "cache"))
    crawled([f"file://{source}"], tmp_path / "out", limits)
    (source / ".git").rename(tmp_path / "gone")
    kept, _, _ = crawled([f"file://{source}"], tmp_path / "other", limits)
    assert [row["path"] for row in kept] == ["a.py"]


def test_a_clone_is_tried_again(tmp_path, monkeypatch, crawled, repository):
    source = repository(tmp_path / "work", {"a.py": "x = 1\n"})
    script = f"""#!/bin/sh
    if [ "$3" = clone ] && [ ! -e {tmp_path}/tried ]; then touch {tmp_path}/tried; echo lost >&2; exit 128; fi
    PATH=${{PATH#*:}} exec git "$@"
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(script)
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    kept, _, _ = crawled([f"file://{source}"], tmp_path / "out")
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


def test_a_silent_server(tmp_path, crawled):
    """It is left after clone_seconds, and so is it by the helpers that git has started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/owner/name"
        started = time.monotonic()
        with pytest.raises(ValueError, match="git clone took over 1 s"):
            crawled([url], tmp_path / "out", crawl.Limits(clone_seconds=1, clone_tries=1))
        assert time.monotonic() - started < 20
        connection, _ = server.accept()
        with connection:
            connection.settimeout(20)
            while connection.recv(1 << 16):  # what it asked, and then the end: nobody waits for an answer any more
                pass


def test_hooks_of_the_user_stay_out(tmp_path, monkeypatch, write, crawled, repository):
    source = repository(tmp_path / "work", {"a.py": "x = 1\n"})
    write(tmp_path, {"hooks/post-checkout": f"#!/bin/sh\ntouch {tmp_path}/ran\n"})
    (tmp_path / "hooks" / "post-checkout").chmod(0o755)
    write(tmp_path, {"config": f"[core]\nhooksPath = {tmp_path}/hooks\n"})
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    kept, _, _ = crawled([f"file://{source}"], tmp_path / "out")
    assert [row["path"] for row in kept] == ["a.py"]
    assert not (tmp_path / "ran").exists()


def test_repositories_are_chosen(tmp_path, write, crawled):
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
    kept, dropped, about = crawled([tmp_path / "list.jsonl"], tmp_path / "out", limits)
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
    kept, _, _ = crawled([tmp_path / "list.jsonl"], tmp_path / "out", crawl.Limits(licences=("GPL-3.0-only", "none")))
    assert [row["repo"] for row in kept] == ["copyleft", "none"]


class _Server(http.server.BaseHTTPRequestHandler):
    """Repositories for whoever knows the password, by git's own CGI program."""

    root = ""

    def do_GET(self):
        wanted = "Basic " + base64.b64encode(b"user:s3cr%t").decode()
        if self.headers.get("Authorization") != wanted:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()
            return
        path, _, query = self.path.partition("?")
        facts = {"GIT_PROJECT_ROOT": self.root, "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path, "QUERY_STRING": query}
        facts |= {"REQUEST_METHOD": self.command, "CONTENT_TYPE": self.headers.get("Content-Type", "")}
        facts |= {"GIT_PROTOCOL": self.headers.get("Git-Protocol", "")}
        facts |= {"HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", "")}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        facts |= {"CONTENT_LENGTH": str(len(body))}
        done = subprocess.run(["git", "http-backend"], input=body, env=os.environ | facts, capture_output=True)
        head, _, answer = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("at_commit", [False, True])
def test_a_password_gets_to_git_and_nowhere_else(tmp_path, repository, monkeypatch, at_commit):
    source = repository(tmp_path / "served" / "owner" / "name", {"a.py": "value = 1\n" * 9})
    commit = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(_Server, "root", str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}/owner/name"
        row = {"url": f"http://user:s3cr%25t@{host}"} | ({"commit": commit} if at_commit else {})
        (tmp_path / "list.jsonl").write_text(json.dumps(row))
        sources = [str(tmp_path / "list.jsonl")] if at_commit else [row["url"]]
        limits = {"cache": str(tmp_path / "out" / "clones"), "clone_tries": 1}
        made = corpus.build(sources, tmp_path / "out", config={"crawl": limits}, progress=False)
        assert [(document.repo, document.paths) for document in corpus.documents(tmp_path / "out")] == [
            ("owner/name", ["a.py"])
        ]
        with pytest.raises(ValueError, match=rf"http://{host}: git clone failed") as refused:
            corpus.build([f"http://user:0ther@{host}"], tmp_path / "other", config={"crawl": limits | {"cache": ""}})
        server.shutdown()
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "config" for path in written)  # the clone's
    for secret in ("s3cr", "0ther"):
        assert secret not in str(refused.value) + json.dumps(made)
        assert [path for path in written if secret.encode() in path.read_bytes()] == []


def test_logins_in_texts():
    texts = {
        "https://user:pass@host/a": "https://host/a",
        "fatal: 'http://t0ken@host:8080/a' and https://u:p@q@host/b": "fatal: 'http://host:8080/a' and https://host/b",
        "ssh://git:pass@host:22/a": "ssh://git@host:22/a",
        "ssh://git@host/a": "ssh://git@host/a",
        "git@host:a/b": "git@host:a/b",
        "https://host/a@b": "https://host/a@b",
        "file:///a@b": "file:///a@b",
    }
    assert {text: without_login(text) for text in texts} == texts
    (found,) = find(["https://t0ken:x@host/owner/name.git"], None)
    assert (found.name, found.location) == ("owner/name", "https://host/owner/name.git")
    assert "t0ken" not in repr(found)
