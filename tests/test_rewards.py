"""The parser and the rewards: known answers, near misses, and responses made to cheat."""

import json
import math
import sys
import time

import pytest

from data import InputError
from data.dataset import target
from data.rewards import Failures, accuracy, batch, exact_chain, format, guarded, load, parse, score, thoughts, token_f1

ITEM = {"answer": "Case 3", "cot": "Condition 1 asks: Is there a cube? The answer is yes, so the response is Case 3."}


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<think>a</think>\\boxed{Case 3}", "Case 3"),
        ("<think> a </think> \\boxed{ Case 3 } ", "Case 3"),
        ("\\boxed{Case 3}", "Case 3"),
        ("a</think>\\boxed{Case 3}", "Case 3"),
        ("<think>\\boxed{Case 1}</think>\\boxed{Case 3}", "Case 3"),
        (
            '<think>a</think>\\boxed{{"name": "OCR", "arguments": {"image": "a.png"}}}',
            '{"name": "OCR", "arguments": {"image": "a.png"}}',
        ),
        ("<think>a</think>So \\boxed{Case 3}.", "Case 3"),
    ],
)
def test_what_is_an_answer(response, answer):
    assert parse(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "",
        "Case 3",
        "<think>a</think>Case 3",
        "<think>\\boxed{Case 3}",
        "<think>\\boxed{Case 3}</think>",
        "<think>a</think>\\boxed{Case 1}\\boxed{Case 3}",
        "<think>a</think>\\boxed{Case 3}\\boxed{Case 3}",
        "<think>a</think>\\boxed{Case 3",
        "<think>a</think>\\boxed Case 3",
        "<think>a</think>boxed{Case 3}",
        "<think>a</think>\\boxed{Case {3}",
        "<think>a</think><think>\\boxed{Case 3}",
        "\\boxed{Case 3}</think>",
        "<think>a</think>\\boxed{Case 3} or \\boxed",
    ],
)
def test_what_is_none_and_earns_nothing(response):
    assert parse(response) is None
    assert accuracy("", response, ITEM) == 0.0 and format("", response, ITEM) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "Case 30",
        "Case 2 or Case 3",
        "Case 3, Case 4",
        "case 3",
        "3",
        "Case \u0663",
        "Case\u200b 3",
        "",
        "NaN",
        "Case 3\\",
        "{Case 3}",
    ],
)
def test_near_misses_and_hedges_earn_nothing(answer):
    assert accuracy("", f"<think>a</think>\\boxed{{{answer}}}", ITEM) == 0.0


def test_format_wants_thoughts_then_one_box_and_nothing_else():
    good = "<think>a</think>\\boxed{x}"
    assert format("", good, ITEM) == 1.0 and format("", f" {good}\n", ITEM) == 1.0
    for bad in (
        "\\boxed{x}",
        "a" + good,
        good + "b",
        "<think></think>\\boxed{x}",
        "<think>a</think>b\\boxed{x}",
        "<think>a<think>b</think>\\boxed{x}",
        "<think>a</think></think>\\boxed{x}",
        "<think>a</think>\\boxed{x}}",
    ):
        assert format("", bad, ITEM) == 0.0, bad


def test_format_and_accuracy_are_independent():
    assert format("", "<think>a</think>\\boxed{wrong}", ITEM) == 1.0
    assert accuracy("", "no thoughts \\boxed{Case 3}", ITEM) == 1.0


def test_exact_chains_are_the_gold_words_and_the_right_answer():
    assert exact_chain(target(ITEM), ITEM) == 1.0
    assert exact_chain(target(ITEM).replace("a cube", "a  cube"), ITEM) == 1.0  # white space aside
    assert exact_chain(target(ITEM).replace("yes", "no"), ITEM) == 0.0
    assert exact_chain(target(ITEM).replace("\\boxed{Case 3}", "\\boxed{Case 4}"), ITEM) == 0.0
    assert thoughts("<think> a </think>b") == "a" and thoughts("<think>a") == ""


def test_a_million_characters_are_read_in_a_moment():
    start = time.process_time()
    for text in (
        "{" * 10**6,
        "\\boxed{" * 140_000,
        "<think>" * 140_000,
        "\\boxed{" + "{}" * 500_000,
        "a" * 10**6,
        "</think>" * 125_000,
    ):
        for reward in (accuracy, format):
            assert reward("", text, ITEM) == 0.0
    assert time.process_time() - start < 10


def test_rewards_leave_their_inputs_alone():
    item = dict(ITEM)
    accuracy("", target(item), item), format("", target(item), item), exact_chain(target(item), item)
    assert item == ITEM


# -- free text, calls, and functions of other people's making
# -------------------------------------------------------------

FREE = {"id": "f", "answer": "It can not come back.", "boxed": False}


def test_free_text_is_what_follows_the_thoughts():
    assert accuracy("", "<think>a</think> It can not  come back.", FREE) == 1 == accuracy("", FREE["answer"], FREE)
    assert accuracy("", "<think>It can not come back.", FREE) == 0 == accuracy("", "<think>a</think>", FREE)
    assert format("", "<think>a</think>It stays.", FREE) == 1 and format("", "It stays.", FREE) == 0
    assert token_f1("", "<think>It can</think>it can come", FREE) == pytest.approx(2 * 3 / 8)
    assert token_f1("", "\\boxed{Case 3}", ITEM) == 1 and token_f1("", "Case 3", ITEM) == 0


def test_calls_are_scored_by_name_and_arguments():
    ((_, json_call, _),) = load("json_call")
    item = {"id": "c", "answer": '{"name": "find", "arguments": {"a": 1, "b": "x"}}', "boxed": False}
    say = lambda **changes: json.dumps({"name": "find", "arguments": {"a": 1, "b": "x"}} | changes)
    assert json_call("", say(), item) == 1 and json_call("", say(arguments={"a": 1}), item) == 0.75
    assert json_call("", say(name="lose"), item) == 0.5 and json_call("", "find it", item) == 0
    assert json_call("", "\\boxed{%s}" % say(), item | {"boxed": True}) == 1


WICKED = """
import sys, time
def good(prompt, response, item): return len(response)
def raises(prompt, response, item): return item["nothing"]
def leaves(prompt, response, item): sys.exit(0)
def text(prompt, response, item): return "0.5"
def nan(prompt, response, item): return float("nan")
def edits(prompt, response, item): item["answer"] = "gone"; item["images"].append("x"); return 1
def two(prompt, response): return 1
def hangs(prompt, response, item):
    while True:
        try:
            time.sleep(0.01)
        except:
            pass
value = 3
class Kind: pass
"""


@pytest.fixture
def wicked(tmp_path):
    (tmp_path / "wicked_rewards.py").write_text(WICKED)
    return tmp_path / "wicked_rewards.py"


@pytest.mark.parametrize("name", ["raises", "leaves", "text", "nan", "hangs"])
def test_a_reward_that_misbehaves_costs_its_response_and_is_told_once(wicked, name, capsys, monkeypatch):
    monkeypatch.setattr("data.rewards.failures", Failures())
    item = {"id": "i7", "answer": "x", "images": []}
    start = time.monotonic()
    found = score(load(f"{wicked}:{name}, {wicked}:good=0.5"), ["", ""], ["ab", "cde"], [item, item], 0.2)
    assert time.monotonic() - start < 5
    assert [[math.isnan(bad), good] for bad, good in found] == [[True, 2], [True, 3]]
    told = capsys.readouterr().err
    assert (
        told.count(f"reward {name}:") == 1 and "item i7" in told and (name != "raises" or "KeyError: 'nothing'" in told)
    )


def test_a_reward_gets_a_copy_of_the_item(wicked):
    item = {"id": "i", "answer": "x", "images": []}
    assert score(load(f"{wicked}:edits"), [""], [""], [item], 5) == [[1.0]]
    assert item == {"id": "i", "answer": "x", "images": []}


def test_rewards_are_found_by_name_module_and_file(wicked, monkeypatch):
    """From anywhere, and with modules beside them that are called as ours are."""
    monkeypatch.chdir(wicked.parent)
    (wicked.parent / "evaluate.py").write_text("HOME = 'theirs'\n")
    (wicked.parent / "mine.py").write_text("import evaluate\ndef f(p, r, i): return evaluate.HOME == 'theirs'\n")
    for name in ("evaluate", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = load("accuracy=0.9, ./wicked_rewards.py:good=0.05, mine:f")
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    assert [(name, weight) for name, _, weight in found] == [("accuracy", 0.9), ("good", 0.05), ("f", 1.0)]
    assert score(found, [""], ["\\boxed{x}"], [{"id": "i", "answer": "x"}], 5) == [[1, 9, 1]]


@pytest.mark.parametrize(
    "text, says",
    [
        ("parse", "no attribute 'parse'"),
        ("load", "no attribute 'load'"),
        ("accuracy=nan", "weight nan"),
        ("accuracy=inf", "weight inf"),
        ("accuracy=much", "could not convert"),
        ("judge", "no --judge-url found"),
        ("accuracy,accuracy", "a name twice"),
        ("nowhere:f", "nowhere"),
        ("FILE:value", "value is no function"),
        ("FILE:Kind", "Kind is no function"),
        ("FILE:two", "too many positional arguments"),
        ("FILE:none", "no attribute 'none'"),
    ],
)
def test_what_is_no_reward_is_refused(wicked, text, says):
    with pytest.raises(InputError, match=says) as error:
        load(text.replace("FILE", str(wicked)))
    assert "\n" not in str(error.value)


def test_a_batch_reward_is_called_once_with_all_of_them(monkeypatch, capsys):
    monkeypatch.setattr("data.rewards.failures", Failures())
    calls = []

    @batch
    def lengths(prompts, responses, items):
        calls.append(len(items))
        return [len(r) if r else math.nan for r in responses]

    @batch
    def short(prompts, responses, items):
        return [1.0]

    items = [{"id": str(k), "answer": "x"} for k in range(3)]
    found = score([("a", lengths, 1.0), ("b", short, 1.0)], [""] * 3, ["a", "", "abc"], items, 5)
    assert calls == [3] and [row[0] for row in found][::2] == [1, 3] and math.isnan(found[1][0])
    assert all(math.isnan(row[1]) for row in found)
    assert "found 1 rewards, expected 3" in capsys.readouterr().err
    assert guarded(lengths, "", "ab", items[0], 5) == 2
