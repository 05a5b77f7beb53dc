"""benchmarks/gpu.py, the first thing to run on a GPU, at toy sizes on a CPU; what takes too long is ended."""

import contextlib
import json
import re
import sys
import time

import pytest
import torch

from benchmarks import gpu


def test_every_part_runs_and_every_row_is_kept(tmp_path):
    gpu.main(["--tiny", "--out", str(tmp_path), "--only", *(part for part in gpu.PARTS if part != "kernels")])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["rows"]) == [part for part in gpu.PARTS if part != "kernels"] and not result["running"]
    rows = [(part, row) for part, found in result["rows"].items() for row in found]
    assert not [pair for pair in rows if "failed" in pair[1][""] or "died" in pair[1][""]]
    assert {part for part, row in rows if "not run" in row} <= {"loss", "decode"}  # what is not installed
    assert len({row["loss"] for part, row in rows if part == "loss"} & {"ours", "eager", "bare products"}) == 3
    equal = [row for part, row in rows if part == "parity"]
    assert all(row["largest difference"] == 0 for row in equal), "on one device there is nothing to differ"
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {part}" in text for part in result["rows"])
    rows = (tmp_path / gpu.README).read_text().partition("<!-- gpu -->")[2].partition("<!-- end of gpu -->")[0]
    assert (
        len(re.findall(r"^\| .* \|$", rows, re.M)) == 1 + len(gpu.HEADLINES) and rows.count("not run") == 1
    )  # kernels
    assert not (tmp_path / gpu.KERNEL).exists()  # no card, no block


def test_the_best_block_of_a_card_replaces_the_one_before(tmp_path, monkeypatch):
    """And the file stays what it was otherwise; so does the page for those who have no GPU."""
    for n, block in enumerate([(512, 2), (2048, 8)]):
        rows = {"products": [{"": "best for one sweep", "card": "NVIDIA H100", "block": block}]}
        gpu.publish({"rows": rows}, gpu.TINY, tmp_path / str(n))
        monkeypatch.setattr(gpu, "ROOT", tmp_path / str(n))
    found = (tmp_path / "1" / gpu.KERNEL).read_text()
    assert 'BLOCKS = {"NVIDIA H100": (2048, 8), "cpu": (32768, 1)}' in found and "(512, 2)" not in found
    plain = (gpu.Path(gpu.__file__).parents[1] / gpu.KERNEL).read_text()
    assert found.replace('"NVIDIA H100": (2048, 8), ', "") == plain


@pytest.mark.parametrize("fault", ["stuck", "dead"])
def test_a_part_that_hangs_or_dies_costs_the_others_nothing(tmp_path, fault):
    """A kernel may never come back: only another process can end it. Rows made before stay.

    What it has started ends with it.
    """
    child = tmp_path / "child"
    worker = f"""
import json, os, pathlib, subprocess, sys, time  # in the form of gpu.Results, without its imports
path = pathlib.Path({str(tmp_path / "gpu.json")!r})
rows = json.loads(path.read_text())["rows"] if path.exists() else {{}}
def write(running):
    path.with_suffix(".new").write_text(json.dumps({{"rows": rows, "running": running}}))
    path.with_suffix(".new").replace(path)
for part in sys.argv[1:]:
    rows[part] = [{{"": "a row"}}]
    write(running=[part, time.time()])
    if part == "second" and {fault!r} == "dead":
        os._exit(9)
    if part == "second":
        child = subprocess.Popen(["sleep", "600"])
        pathlib.Path({str(child)!r}).write_text(str(child.pid))
        time.sleep(600)
write(running=None)
"""
    start = lambda parts: gpu.begin([sys.executable, "-c", worker, *parts])
    began, limits = time.time(), {"first": 40, "second": 2, "third": 40}
    gpu.supervise(start, limits, limits, tmp_path)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    ending = "the process died" if fault == "dead" else "stopped after"
    assert rows["second"][0][""] == "a row" and rows["second"][1][""].startswith(ending)
    assert rows["first"] == rows["third"] == [{"": "a row"}] and time.time() - began < 300
    if fault == "stuck":
        with contextlib.suppress(FileNotFoundError):  # nobody may have buried it
            assert open(f"/proc/{child.read_text()}/stat").read().rpartition(")")[2].split()[0] == "Z"


def test_what_there_is_no_time_for_is_said(tmp_path):
    """Who rents a GPU for a quarter of an hour gets what was done by then, in time."""
    gpu.Results(tmp_path).write(rows={"first": [{"": "of a run before"}]})
    gpu.supervise(None, ["first", "second"], None, tmp_path, seconds=0)
    rows = gpu.Results(tmp_path).all["rows"]
    assert rows == {part: [{"": "not begun: 0 s were over"}] for part in ("first", "second")}


def test_a_case_that_fails_is_a_row_that_says_why():
    """Memory that is not there must not cost the cases after it."""
    row = gpu.attempt({"": "a case"}, lambda: torch.zeros(2)[5])
    assert row[""] == "a case" and row["not run"].startswith("IndexError: index 5 is out of bounds")
