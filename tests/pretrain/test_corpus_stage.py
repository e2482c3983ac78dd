"""The stage contract: killed runs, full disks, failing shards, changed inputs."""

import hashlib
import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from pretrain import corpus
from pretrain.corpus import crawl, dedup, executors, near, order, report, rules, stage
from pretrain.corpus.executors import Run
from pretrain.corpus.stage import Result, Shard

CONFIG = {"crawl": {"shard_bytes": 0}}  # one shard for each repository
NEAR = ("signatures", "matches", "near")


@pytest.fixture
def sources(tmp_path):
    """Six small repositories that import, repeat each other and have something to drop."""
    for number in range(6):
        root = tmp_path / f"repo{number}"
        root.mkdir()
        (root / "a.py").write_text(f"import b\n\nvalue = b.function() + {number}\n")
        (root / "b.py").write_text(f"def function{number}():\n    return 1\n")
        (root / "common.py").write_text("def common():\n    return 0\n")
        (root / "digits.py").write_text("1234567890\n" * (number + 1))
    return [str(tmp_path / f"repo{number}") for number in range(6)]


def build(sources, out, workers=1):
    return corpus.build(sources, out, workers=workers, config=CONFIG, progress=False)


def contents(out):
    """What a build wrote, but for the seconds in the records, the report and an engine's logs."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(("shard-", "report.")) and "logs" not in path.parts
    }


def times(out):
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.parquet")}


def finished(out):
    """The outputs of shards that have their record, with their times."""
    records = [json.loads(path.read_text()) for path in out.rglob("shard-*.json")]
    files = [output["file"] for record in records for output in record.get("outputs", {}).values()]
    return {file: (out / file).stat().st_mtime_ns for file in files}


def run_python(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


KILLED = """
import json, os, signal, sys
from pathlib import Path
from pretrain import corpus
left = int(sys.argv[3])
replace = os.replace
def replace_or_die(source, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    replace(source, target)
os.replace = replace_or_die
corpus.build(json.loads(sys.argv[1]), Path(sys.argv[2]), config=json.loads(sys.argv[4]), progress=False)
"""


def test_a_killed_run_is_resumed(sources, tmp_path):
    """kill -9 just before a finished file gets its name, in several stages; each run gets a little further."""
    build(sources, tmp_path / "whole")
    out = tmp_path / "killed"
    for renames in (8, 20, 9):
        before = finished(out) if out.exists() else {}
        process = run_python(KILLED, json.dumps(sources), out, renames, json.dumps(CONFIG))
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -9, errors
        after = finished(out)
        assert before.items() <= after.items()  # what was finished is not done again
        assert len(after) > len(before)
        assert list(out.rglob("*.tmp"))
        with pytest.raises(FileNotFoundError, match="unfinished"):
            corpus.documents(out)
    build(sources, out)
    assert after.items() <= finished(out).items()
    assert contents(out) == contents(tmp_path / "whole")


WORKERS = """
import json, sys
from pathlib import Path
from pretrain import corpus
if __name__ == "__main__":
    corpus.build(json.loads(sys.argv[1]), Path(sys.argv[2]), workers=2, config=json.loads(sys.argv[3]), progress=False)
"""


def test_workers_end_with_their_parent(sources, tmp_path):
    build(sources, tmp_path / "whole")
    out = tmp_path / "killed"
    process = run_python(WORKERS, json.dumps(sources), out, json.dumps(CONFIG))
    deadline = time.monotonic() + 60
    while not list(out.glob("crawl/shard-*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    # The workers hold the other ends of its pipes: this returns only when they are gone too.
    process.communicate(timeout=30)
    build(sources, out)
    assert contents(out) == contents(tmp_path / "whole")


FULL = """
import json, resource, sys
from pathlib import Path
from pretrain import corpus
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    corpus.build([sys.argv[1]], Path(sys.argv[2]), progress=False)
except ValueError as error:
    print(error)
"""


def test_a_full_disk(tmp_path):
    """No file may grow beyond 3000 bytes, which to the writer is a disk without room."""
    (tmp_path / "repo").mkdir()
    for number in range(100):
        noise = hashlib.sha512(str(number).encode()).hexdigest()
        (tmp_path / "repo" / f"f{number}.py").write_text(f"def function_{noise}():\n    return {number}\n")
    out = tmp_path / "out"
    process = run_python(FULL, tmp_path / "repo", out)
    said, errors = process.communicate(timeout=60)
    assert not errors
    assert "part-00000.parquet: cannot be written" in said
    assert "free space there" in said
    assert list(out.rglob("*.tmp")) == list(out.rglob("*.parquet")) == []
    assert len(build([str(tmp_path / "repo")], out)["documents"]) == 1


def test_only_what_changed_is_done_again(sources, tmp_path):
    out = tmp_path / "out"
    build(sources, out)
    before = times(out)
    path = tmp_path / "repo3" / "b.py"
    path.write_text("def function3():\n    return 'changed'\n")
    build(sources, out)
    changed = {name for name, moment in times(out).items() if before[name] != moment}
    assert {name.rsplit("-", 1)[1] for name in changed if not name.startswith("matches/")} == {"00003.parquet"}
    assert {name.split("/")[0] for name in changed} >= {"crawl", "filter", "digests", "dedup", "documents", "near"}
    build(sources, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_new_first_copy_redoes_those_that_it_changes(sources, tmp_path):
    out = tmp_path / "out"
    build(sources, out)
    before = times(out)
    (tmp_path / "repo0" / "common.py").unlink()  # so repo1 keeps its copy now, and the others point to that
    build(sources, out)
    changed = {name for name, moment in times(out).items() if before[name] != moment}
    assert {name for name in changed if name.startswith("documents/")} == {
        f"documents/part-0000{number}.parquet" for number in range(6)
    }
    assert not any(name.startswith(("crawl/", "filter/")) and "00000" not in name for name in changed)
    build(sources, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_changed_rule_redoes_the_filter_and_not_the_crawl(sources, tmp_path):
    out = tmp_path / "out"
    build(sources, out)
    before = times(out)
    config = CONFIG | {"filter": {"alphabetic_share": 0}}
    corpus.build(sources, out, config=config, progress=False)
    changed = {name.split("/")[0] for name, moment in times(out).items() if before[name] != moment}
    assert changed == {"filter", "digests", "dedup", "documents", "signatures", "matches", "near", "quality"}
    assert any("digits.py" in document.paths for document in corpus.documents(out))


@pytest.mark.parametrize(
    "section, values, stages",
    [
        ("crawl", {"clone_seconds": 7, "clone_tries": 1, "cache": "somewhere"}, set()),
        ("crawl", {"max_file_bytes": 40}, {"crawl", "filter", "documents"}),  # without what the filter dropped
        ("filter", {"longest_line": 999}, {"filter"}),
        ("documents", {"order": "path"}, {"documents", *NEAR, "quality"}),
        ("documents", {"seed": 1}, {"documents"}),
        ("dedup", {"fork_share": 0.1}, {"dedup", "documents", *NEAR, "quality"}),
        ("dedup", {"threshold": 0.7001}, {"matches"}),
        ("dedup", {"ngram": 4}, {"signatures", "matches"}),
        ("dedup", {"near": False}, set()),
        ("quality", {"max_error_share": 0.2}, {"quality"}),
        ("run", {"workers": 2, "memory_gb": 1}, set()),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it(sources, tmp_path, section, values, stages):
    """Its own stage, and of the others those that get other inputs by it."""
    out = tmp_path / "out"
    build(sources, out)
    before = times(out)
    config = CONFIG | {section: CONFIG.get(section, {}) | values}
    corpus.build(sources, out, config=config, progress=False)
    assert {name.split("/")[0] for name, moment in times(out).items() if before[name] != moment} == stages


def test_the_failures_of_a_stage_that_is_left_out_are_forgotten(sources, tmp_path, monkeypatch):
    """And so are its clusters, in the report."""

    def fails(out, shard, settings):
        raise ValueError("injected")

    out = tmp_path / "out"
    for number in (0, 1):
        text = "".join(f"def function_{i}(a, b):\n    return a + b * {i}\n" for i in range(40))
        (tmp_path / f"repo{number}" / "long.py").write_text(f"{text}last = {number}\n")
    build(sources, out)
    report.write(out, out)
    assert "Clusters of duplicates: near" in (out / "report.md").read_text()
    (out / "near" / "shard-00001.json").unlink()
    with monkeypatch.context() as broken:
        broken.setattr(near, "keep_shard", fails)
        assert "stage near failed: shard 00001: injected" in build(sources, out)["failed"]
    manifest = corpus.build(sources, out, config=CONFIG | {"dedup": {"near": False}}, progress=False)
    assert manifest["failed"] == ""
    report.write(out, out)
    assert "Clusters of duplicates: near" not in (out / "report.md").read_text()


def test_fewer_sources_leave_nothing_behind(sources, tmp_path):
    out = tmp_path / "out"
    build(sources, out)
    (out / "crawl" / "mine.txt").write_text("not ours")
    build(sources[:4], out)
    (out / "crawl" / "mine.txt").unlink()
    build(sources[:4], tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_a_shard_wrote_with_other_settings_goes(sources, tmp_path, monkeypatch):
    """With more partitions there are more files of band keys, and fewer again."""
    out = tmp_path / "out"
    monkeypatch.setattr(near, "_ROWS", 50)
    build(sources, out)
    assert len(list((out / "signatures").glob("bands*"))) > len(list((out / "signatures").glob("part-*")))
    assert len(list((out / "matches").iterdir())) > 3
    monkeypatch.undo()
    (out / "signatures" / "bands0-00000.parquet.tmp").write_text("half")
    build(sources, out)
    build(sources, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_lost_or_cut_output_is_made_again(sources, tmp_path):
    out = tmp_path / "out"
    build(sources, out)
    expected = contents(out)
    os.unlink(out / "filter" / "part-00002.parquet")
    os.truncate(out / "documents" / "part-00001.parquet", 10)
    (out / "dedup" / "shard-00004.json").write_text("{")
    build(sources, out)
    assert contents(out) == expected


def test_a_repository_that_cannot_be_read_does_not_stop_the_others(sources, tmp_path):
    """It is recorded, and the next run tries it again."""
    out = tmp_path / "out"
    bad = tmp_path / "repo2.zip"
    bad.write_bytes(b"noise")
    mixed = [*sources[:2], str(bad), f"file://{tmp_path}/repo9", *sources[3:]]
    config = {"crawl": {"shard_bytes": 0, "clone_tries": 1}}
    unread = corpus.build(mixed, out, config=config, progress=False)["unread"]
    assert sorted(unread) == ["repo2", "repo9"]
    assert "repo2.zip: this archive cannot be read" in unread["repo2"]
    assert "repo9: git clone failed" in unread["repo9"]
    assert {document.repo for document in corpus.documents(out)} == {"repo0", "repo1", "repo3", "repo4", "repo5"}
    commands = ("init", "add -A", "-c user.name=t -c user.email=t@example.org commit -m first")
    (tmp_path / "repo9").mkdir()
    (tmp_path / "repo9" / "a.py").write_text("nine = 9\n")
    for command in commands:
        subprocess.run(["git", "-C", tmp_path / "repo9", *command.split()], check=True, capture_output=True)
    assert sorted(corpus.build(mixed, out, config=config, progress=False)["unread"]) == ["repo2"]
    assert "repo9" in {document.repo for document in corpus.documents(out)}


def ends(out, shard, settings):
    """A stage whose second shard takes its process with it, as the kernel does when memory runs out."""
    if shard.name == "00001":
        os._exit(9)
    return Result({"part": pa.table({"x": [1]})}, {"files": 1})


def raises(out, shard, settings):
    raise KeyError("surprise")


SHARDS = [Shard(f"{number:05}", (), str(number)) for number in range(4)]


def test_a_dead_worker_fails_its_shard_and_no_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    function = __import__("test_corpus_stage").ends  # by the name under which a worker can import it
    with executors.running(Run(workers=2)) as works:
        manifest = stage.run("test", tmp_path, function, SHARDS, executor=works)
    assert "its process was killed, perhaps for want of memory" in manifest["failed"]["00001"]["failed"]
    assert list(manifest["shards"]) == ["00000", "00002", "00003"]


@pytest.mark.parametrize("name", ["crawl_shard", "filter_shard", "digest_shard", "keep_shard", "order_shard"])
def test_a_shard_that_fails_anywhere_stops_nothing(sources, tmp_path, monkeypatch, name):
    """Whatever stage it is, the corpus is that of the other shards; and the next run adds the missing one."""
    module = next(m for m in (crawl, rules, dedup, order) if hasattr(m, name))
    real = getattr(module, name)

    def fails(out, shard, settings):
        if shard.name == "00003":
            raise ValueError("injected")
        return real(out, shard, settings)

    with monkeypatch.context() as broken:
        broken.setattr(module, name, fails)
        manifest = build(sources, tmp_path / "out")
    assert "1 of the 6 shards of the stage" in manifest["failed"]
    assert {document.repo for document in corpus.documents(tmp_path / "out")} == {f"repo{n}" for n in (0, 1, 2, 4, 5)}
    assert build(sources, tmp_path / "out")["failed"] == ""
    build(sources, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_an_unexpected_error_names_its_type(tmp_path):
    stage.run("test", tmp_path, raises, SHARDS[:2])
    assert stage.failures(tmp_path, "test") == (
        "2 of the 2 shards of the stage test failed: "
        "shard 00000: KeyError: 'surprise'; shard 00001: KeyError: 'surprise'"
    )


def test_counts_add_up():
    total: dict = {}
    stage.add(total, {"files": 1, "languages": {"C": {"files": 1}}})
    stage.add(total, {"files": 2, "languages": {"C": {"files": 1}, "Go": {"files": 1}}})
    assert total == {"files": 3, "languages": {"C": {"files": 2}, "Go": {"files": 1}}}
