"""The parser and the rewards: known answers, near misses, and responses made to cheat."""

import time

import pytest

from data.dataset import target
from data.rewards import accuracy, exact_chain, format, parse, thoughts

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
