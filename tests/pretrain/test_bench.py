"""The benchmark of the corpus, on a little text: every row is there, and the numbers are those of the peers."""

import json
import subprocess
import sys


def test_every_row(library, prepared, tmp_path):
    command = [sys.executable, "-m", "pretrain.bench", str(library / "json"), str(library / "asyncio")]
    command += ["--tokenizer", str(prepared / "tokenizer"), "--out", str(tmp_path / "results" / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "results" / "a.json").read_text())
    assert report["load"] >= 0
    assert report["versions"]["datasketch"]
    results = report["results"]
    assert all(row["MB/s"] > 0 for row in results["pipeline"])
    stages = {row.pop("stage"): row for row in results["milliseconds of a core for each MB"]}
    assert all(stages[stage]["everything"] > 0 for stage in ("crawl", "quality", "tokens"))
    assert stages["quality"]["everything"] > stages["quality"]["no screening"]
    # All that is done for the text; what is around it, more than half for so little, takes longer now and then.
    whole, part = (
        sum(row[name] for stage, row in stages.items() if stage != "outside of shards")
        for name in ("everything", "no screening")
    )
    assert whole > part  # a stage less
    ours, *peers = results["near-duplicate signatures"]
    assert {row["provider"].split(",")[0] for row in peers} >= {"datasketch", "datatrove"}
    assert all(row["ours / it"] > 1 for row in peers if row["provider"] != "Daft")
    assert [row["provider"] for row in results["encoding"]] == ["ours (kitoken)", "tokenizers"]
    satisfied = {row["order"]: float(row["satisfied"].rstrip("%")) for row in results["orders"]}
    assert satisfied["feedback"] > satisfied["paper"] > 0
    fits = results["windows of 16,384 tokens"]
    assert [row["cut though it would fit"] for row in fits[:2]] == ["0.0%", "0.0%"]
    assert float(fits[2]["cut though it would fit"].rstrip("%")) > 0
    assert ours["MB/s"] > 0
