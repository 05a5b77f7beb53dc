"""Reward functions of the user's: whatever one does costs that response only, and the run says so."""

import json
import re
import time
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from rl_bench import rl_folder, run
from small import small_data, write_lines

import evaluate
import train_rl
from data import InputError, rewards
from support.config import parse
from support.judging import complaint, load_rewards

WICKED = """
import os, re, sys
import evaluate  # Hugging Face's, not ours

def reward(prompt, response, item):
    how = response.split()[0] if response.strip() else ""
    if how == "hang": return float(bool(re.match(r"(a+)+$", "a" * 40 + "b")))
    if how == "loop":
        while True:
            try: [].index(1)
            except BaseException: pass
    if how == "exit": sys.exit(3)
    if how == "die": os._exit(0)
    if how == "fork" and os.fork() == 0: return 9.0
    if how == "raise": return item["no such key"]
    if how == "text": return "0.5"
    if how == "nan": return float("nan")
    if how == "mutate": item["answer"] = "changed"; item["images"].append("x")
    if how == "print": print("to standard output"); sys.stdout.flush()
    return float(len(item["images"]) + evaluate.ONE)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's folder, which is the current one: a module, a module that it imports, and one named as ours is."""
    (tmp_path / "wicked.py").write_text(WICKED)
    (tmp_path / "evaluate.py").write_text("ONE = 1")
    (tmp_path / "train_rl.py").write_text("def theirs(prompt, response, item): return 7.0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES = {  # what the response makes the function do: (what it gives, kind of the failure)
    "fine": (2.0, None),
    "hang": (None, "Hung"),
    "loop": (None, "Hung"),
    "exit": (None, "SystemExit"),
    "die": (None, "Died"),
    "fork": (2.0, None),
    "raise": (None, "KeyError"),
    "text": (None, "TypeError"),
    "nan": (None, "ValueError"),
    "mutate": (3.0, None),
    "print": (2.0, None),
}


@pytest.mark.parametrize("name", ["wicked:reward", "./wicked.py:reward"])
def test_what_a_function_does_costs_its_response_only(mine, name, capfd):
    """Each evil is followed by a response that is judged well; what is changed is a copy; all is told by kind."""
    order = [how for case in CASES for how in (case, "fine")]
    items = [{"id": how, "answer": "A", "images": ["p"]} for how in order]
    found = rewards.score(load_rewards(name, 1.0), [""] * len(order), order, items)
    for how, (value,) in zip(order, found):
        expected = CASES[how][0]
        assert value == expected if expected is not None else value != value, how
    assert all(item["images"] == ["p"] and item["answer"] == "A" for item in items)
    kinds = [kind for _, kind in CASES.values() if kind]
    expected = ", ".join(f"{kinds.count(kind)} x {kind} in reward" for kind in sorted(set(kinds)))
    assert complaint() == expected
    out, errors = capfd.readouterr()
    assert out == "" and "to standard output" in errors
    assert "reward reward: KeyError on item raise" in errors and 'item["no such key"]' in errors  # with its traceback
    assert errors.count("KeyError on item") == 1


def test_modules_are_found_as_the_users_own_script_finds_them(mine):
    """By name in the current folder, by file with its neighbours, and never one of ours in place of theirs."""
    (mine / "sub").mkdir()
    (mine / "sub" / "near.py").write_text("import beside\ndef f(p, r, i): return beside.TWO")
    (mine / "sub" / "beside.py").write_text("TWO = 2")
    found = load_rewards("train_rl:theirs=0.5, sub/near.py:f, data.referral:recall, format=0.1", 5)
    assert [(name, weight) for name, _, weight in found] == [("theirs", 0.5), ("f", 1), ("recall", 1), ("format", 0.1)]
    item = {"answer": "x", "sections": [], "path": []}
    row = rewards.score(found, [""], ["<think>a</think>\\boxed{x}"], [item])[0]
    assert row[:2] == [7.0, 2.0] and row[3] == 1.0


def test_an_evaluation_survives_the_same_functions(mine, capsys):
    """--reward means the same there: what fails counts as wrong, and is told of; the prompt is what was read."""
    (mine / "wicked.py").write_text(
        WICKED + "\ndef asked(prompt, response, item): return reward(prompt, prompt.split('apply ')[-1], item)\n"
    )
    tiny_checkpoint(mine / "model", layers=1)
    small_data(mine / "data")
    row = {"policy": "P1", "images": ["images/0.png"], "answer": "A"}
    write_lines(mine / "data" / "test.jsonl", [{**row, "id": how, "question": f"apply {how} :"} for how in CASES])
    words = ["--model", "model", "--data", "data", "--out", "eval", "--device", "cpu", "--max-response", "2"]
    evaluate.main([*words, "--reward", "wicked:asked,format", "--reward-seconds", "1"])
    records = {row["id"]: row for row in map(json.loads, (mine / "eval" / "no_policy.jsonl").open())}
    assert {how: record["reward"]["asked"] for how, record in records.items()} == {
        how: value for how, (value, _) in CASES.items()
    }
    assert all(record["correct"] == float(record["reward"]["asked"] is not None) for record in records.values())
    assert "rewards that failed, and count as wrong: 1 x Died in asked, 2 x Hung in asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text,line",
    [
        ("wicked:nothing", "has no attribute 'nothing'"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("./nowhere.py:f", "No such file"),
        ("wicked:WORD", "is no function"),
        ("wicked:Kind", "is no function"),
        ("data.rewards:batch", "too many positional"),
        ("data.rewards:nothing", "has no attribute"),
        ("judge", "no --judge-url found"),
        ("accuracy,accuracy", "twice"),
        ("wicked:two", "missing a required argument|too many positional"),
        ("broken:f", "ZeroDivisionError"),
        ("leaves:f", "SystemExit"),
        ("parse", "'parse'"),
        ("guarded", "'guarded'"),
        ("accuracy=much", "much"),
        ("accuracy=inf", "weight inf"),
        ("accuracy=nan", "weight nan"),
        ("wicked:reward=-inf", "weight -inf"),
        ("wicked:reward, wicked.py:reward", "twice"),
    ],
)
def test_only_reward_functions_are_accepted(mine, text, line):
    (mine / "wicked.py").write_text(WICKED + "\nWORD = 3\nclass Kind: pass\ndef two(a, b): pass\n")
    (mine / "broken.py").write_text("1 / 0")
    (mine / "leaves.py").write_text("import sys; sys.exit()")
    with pytest.raises(InputError, match=line) as caught:
        load_rewards(text, 5)
    assert "\n" not in str(caught.value)


def test_a_batch_function_is_called_once_for_all(mine):
    """In its own process, too; it has the time-out for each response together."""
    (mine / "many.py").write_text(
        "calls = [0]\n"
        "def reward(prompts, responses, items):\n"
        "    calls[0] += 1\n"
        "    return [calls[0] + len(r) for r in responses]\n"
        "reward.batch = True\n"
    )
    found = load_rewards("many:reward", 5)
    assert rewards.score(found, [""] * 2, ["a", "bc"], [{"id": "x"}] * 2) == [[2.0], [3.0]]


def test_its_process_ends_with_the_run(mine):
    """And with it what it has started: nobody is left."""
    (mine / "starts.py").write_text(
        "import subprocess, os\nchild = subprocess.Popen(['sleep', '60'])\ndef f(p, r, i): return float(child.pid)\n"
    )
    ((_, function, _),) = load_rewards("starts:f", 5)
    pids = [function.process.pid, int(function("", "", {}))]
    function.end()
    for _ in range(300):
        alive = [
            pid for pid in pids if Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
        ]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


TEN_LINES = """import os, re
calls = [0]
def reward(prompt, response, item):
    calls[0] += 1
    item["answer"] = None
    if calls[0] == 2 and os.fork() == 0: return 0.0
    if calls[0] == 4: raise SystemExit
    if calls[0] == 40: re.match(r"(a+)+$", "a" * 40 + "b")
    return sum(response.count(v) for v in "aeiou") / max(len(response), 1)
"""


def test_a_run_goes_on_says_so_and_ends(tmp_path_factory, capfd):
    """A module of ten lines that hangs in a regular expression, exits, forks once and mutates."""
    folder = rl_folder(tmp_path_factory.mktemp("judging"))
    (folder / "ten.py").write_text(TEN_LINES)
    rows = run(folder, "ten", steps=3, reward=f"accuracy=0.1,{folder}/ten.py:reward", reward_seconds=1)
    out, errors = capfd.readouterr()
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows) and (folder / "ten" / "model").is_dir()
    assert 0 < sum(row["failed"] for row in rows) < 0.1 and all(row["accuracy"] == 0 for row in rows)
    assert "SystemExit on item" in errors and "Hung on item" in errors
    assert re.search(r"rewards that failed: .*Hung in reward, .*SystemExit in reward", out)
    items = [json.loads(line) for line in (folder / "data" / "rl.jsonl").read_text().splitlines()]
    assert all(item["answer"] in "AB" for item in items)


def test_the_signature_stands_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(train_rl.Config, "", ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "reward(prompt: str, response: str, item: dict) -> float" in told and "FILE.py:function" in told
