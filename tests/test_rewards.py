"""The parser and the rewards: known answers, near misses, and responses made to cheat."""

import json
import math
import time

import pytest

from data.dataset import target
from data.rewards import Failures, accuracy, batch, exact_chain, format, named, parse, score, thoughts, token_f1

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
    json_call = named("json_call")
    item = {"id": "c", "answer": '{"name": "find", "arguments": {"a": 1, "b": "x"}}', "boxed": False}
    say = lambda **changes: json.dumps({"name": "find", "arguments": {"a": 1, "b": "x"}} | changes)
    assert json_call("", say(), item) == 1 and json_call("", say(arguments={"a": 1}), item) == 0.75
    assert json_call("", say(name="lose"), item) == 0.5 and json_call("", "find it", item) == 0
    assert json_call("", "\\boxed{%s}" % say(), item | {"boxed": True}) == 1


@pytest.mark.parametrize("wrong", ["raises", "text", "none", "nan"])
def test_a_reward_that_misbehaves_costs_its_response_and_is_told_once(wrong, capsys, monkeypatch):
    """Those of the user's in a process of their own, in tests/test_judging.py."""
    monkeypatch.setattr("data.rewards.failures", Failures())

    def bad(prompt, response, item):
        return {"text": "0.5", "none": None, "nan": math.nan}[wrong]

    item = {"id": "i7", "answer": "x", "images": []}
    good = ("good", lambda prompt, response, item: len(response), 1.0)
    found = score([("bad", bad, 1.0), good], ["", ""], ["ab", "cde"], [item, item])
    assert [[math.isnan(bad), good] for bad, good in found] == [[True, 2], [True, 3]]
    told = capsys.readouterr().err
    assert told.count("reward bad:") == 1 and "item i7" in told and (wrong != "raises" or "KeyError: 'raises'" in told)


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
    found = score([("a", lengths, 1.0), ("b", short, 1.0)], [""] * 3, ["a", "", "abc"], items)
    assert calls == [3] and [row[0] for row in found][::2] == [1, 3] and math.isnan(found[1][0])
    assert all(math.isnan(row[1]) for row in found)
    assert "found 1 rewards, expected 3" in capsys.readouterr().err
    assert score([("a", lengths, 1.0)], [""], ["ab"], items[:1]) == [[2.0]]
