"""Scores of tool calls: known values, near misses, and strings made to break or to cheat the reader."""

import json
import math
import sys
import time
import types

import pytest

from data import InputError
from data.gta_score import (
    argument_score,
    arguments,
    bert_score,
    box,
    call,
    compare,
    evaluate,
    exact,
    expression_score,
    overlap,
    parts,
    read_call,
    token_f1,
    tool,
)

GOLD = {
    "name": "AddText",
    "arguments": {"image": "image/a.png", "text": "summer fair", "position": "lt", "color": "red"},
}
ITEM = {"answer": json.dumps(GOLD)}


def said(call, before="<think>so</think>"):
    return f"{before}\\boxed{{{call if isinstance(call, str) else json.dumps(call)}}}"


def changed(**arguments):
    return {"name": "AddText", "arguments": {**GOLD["arguments"], **arguments}}


# -- arithmetic --------------------------------------------------------------------------------------------------------

VALUES = {"1 + 2 * 3": 7, "(1 + 2) * 3": 9, "2 ** 3 ** 2": 512, "-2 ** 2": -4, "2 ** -1": 0.5, "7 // 2": 3,
          "-7 // 2": -4,
          "7 % 4": 3, "10 - 4 - 3": 3, "100 / 10 / 5": 2, "1.5e2": 150, ".5 + 5.": 5.5, "sqrt(16) + abs(-3)": 7,
          "--3": 3,
          "round(75 / (0.5 * 50.8), 2)": 2.95, "max(1, 2, 3) - min(4, 5)": -1, "math.sqrt(2)": math.sqrt(2),
          "2 * math.pi": 2 * math.pi,
          " 3 ": 3, "sum(1, 2, 3)": 6, "log(e)": 1, "9 ** 0.5": 3}  # fmt: skip


@pytest.mark.parametrize("expression", VALUES)
def test_arithmetic_agrees_with_known_values(expression):
    assert evaluate(expression) == pytest.approx(VALUES[expression], rel=1e-12)


REFUSED = ["", " ", "9**9**9", "9**9**9**9", "10 ** 400", "1/0", "1 % 0", "0 ** -1", "(-8) ** 0.5", "log(0)", "1e999",
           "((1)", "1)", "1 +", "* 2", "2 3", "2(3)",
           "__import__('os').system('true')", "open('/etc/passwd')", "(1).__class__", "exec", "sqrt", "sqrt()",
           "sqrt(1, 2)", "lambda: 1", "[1] * 10**9",
           "'a' * 10", "1 if 1 else 2", "x", "3x", "٣ + ٤", "１ + １", "²", "1_000", "1 = 1", "1, 2", "$5", "5 %",
           "math.factorial(9)", "exp(1000)", "nan", "inf",
           "True", "(" * 450 + "1" + ")" * 450, "sqrt(" * 150 + "1" + ")" * 150, "2**" * 300 + "1", "-" * 900 + "1",
           "1" * 100, "1+" * 499 + "+", "9" * 1_000_000, "(" * 1_000_000, " " * 1_000_000, "1\n;2",
           "2 ** 2 ** 2 ** 2 ** 2 ** 2"]  # fmt: skip


@pytest.mark.parametrize("expression", REFUSED, ids=range(len(REFUSED)))
def test_everything_that_is_no_arithmetic_is_refused_at_once(expression):
    began = time.process_time()
    with pytest.raises(ValueError):
        evaluate(expression)
    assert time.process_time() - began < 0.2


@pytest.mark.parametrize("value", [None, 7, [], {}, b"1", True])
def test_only_text_is_arithmetic(value):
    with pytest.raises(ValueError):
        evaluate(value)


def test_expressions_count_by_their_value():
    assert expression_score("2 * 3.10 + 1.00", "1.00 + 3.10 + 3.10") == 1
    assert expression_score("x +  1", "x + 1") == 1  # no arithmetic: the same text
    for found, gold in (("7.2", "7.21"), ("1/0", "1"), (None, "1"), (7, "7"), ("x + 2", "x + 1"), (None, "x")):
        assert expression_score(found, gold) == 0


# -- single arguments --------------------------------------------------------------------------------------------------


def test_boxes_by_overlap():
    assert overlap("(0, 0, 10, 10)", "(0, 0, 10, 10)") == overlap([0, 0, 10, 10], "[0,0,10.0,1e1]") == 1
    assert overlap("(0, 0, 10, 10)", "(5, 0, 15, 10)") == pytest.approx(50 / 150)
    assert overlap("(0, 0, 10, 10)", "(20, 20, 30, 30)") == 0
    for none in (
        "",
        "(1, 2, 3)",
        "(5, 5, 1, 1)",
        "(0, 0, 0, 0)",
        "(nan, 0, 1, 1)",
        "(0, 0, inf, 1)",
        "(1e999, 0, 1, 1)",
        "(٠, ٠, ١, ١)",
        [1, 2, 3, None],
        [True, 0, 5, 5],
        [0, 0, 10**400, 1],
        ["0", [], {}, 1],
        {"x1": 0},
        None,
        5,
        "(" * 10**6,
        "0, 0, 1, 1",
        "(0, 0, 1, 1) or (2, 2, 3, 3)",
    ):
        assert box(none) is None and overlap(none, "(0, 0, 1, 1)") == 0


def test_similar_text_by_token_f1():
    assert token_f1("A red mug", "a RED mug!") == 1 and token_f1("red mug", "blue mug") == 0.5
    assert token_f1("", "mug") == token_f1("fork", "mug") == 0 and token_f1("", "") == 1
    assert token_f1("mug " * 50, "mug") < 0.05  # repeating a word is no way to score
    assert token_f1("solve(2*x = 4, x)", "solve(2+x = 4, x)") < 1


def test_exact_arguments_mind_their_types():
    assert argument_score("k", 4, 4) == argument_score("top1", True, True) == 1
    for found, gold in ((4.0, 4), ("4", 4), (True, 1), (1, True), (None, 1), ([4], 4)):
        assert argument_score("k", found, gold) == 0
    assert argument_score("image", "image/A.png", "image/a.png") == 0
    assert argument_score("text", 5, "5") == argument_score("text", None, "x") == 0


def test_bert_score_is_used_where_it_is_at_hand_and_refused_in_words_where_not(monkeypatch):
    class BERTScorer:
        def __init__(self, **options):
            assert options["lang"] == "en"

        def score(self, found, gold):
            return None, None, [1.7 if found == gold else -0.2]

    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(InputError, match="bert_score"):
        bert_score()
    monkeypatch.setitem(sys.modules, "bert_score", types.SimpleNamespace(BERTScorer=BERTScorer))
    similarity = bert_score()
    assert similarity("a", "a") == 1 and similarity("a", "b") == 0
    assert compare({**GOLD, "name": "x"}, GOLD, similarity) == (0, 1)


# -- whole calls -------------------------------------------------------------------------------------------------------


def test_known_answers_and_near_misses():
    assert parts(said(GOLD), ITEM) == {"tool": 1, "arguments": 1, "call": 1, "exact": 1}
    assert (
        parts(said({"arguments": GOLD["arguments"], "name": "AddText"}), ITEM)["exact"] == 1
    )  # the order of keys is free
    blue = said(changed(color="blue"))
    assert arguments(None, blue, ITEM) == 0.75 and exact(None, blue, ITEM) == 0
    assert arguments(None, said(changed(text="summer party")), ITEM) == pytest.approx(3.5 / 4)
    assert arguments(None, said(changed(extra=1)), ITEM) == pytest.approx(4 / 5)
    other = {**GOLD, "name": "AddText_v1"}
    assert (tool(None, said(other), ITEM), call(None, said(other), ITEM)) == (0, 0.5)
    bare = {"name": "AddText", "arguments": {}}
    assert parts(said(bare), ITEM) == {"tool": 1, "arguments": 0, "call": 0.5, "exact": 0}
    assert compare(bare, bare) == (1, 1)


BARE = {"name": "AddText", "arguments": {}}
HEDGES = [
    said(GOLD) + said(GOLD, before=""), said(GOLD) + " or " + said(BARE, before=""), said([GOLD, BARE]),
    said(json.dumps(GOLD) + json.dumps(BARE)),
    said('{"name": "AddText", "name": "DrawBox", "arguments": {}}'),
    said('{"name": "AddText", "arguments": {"image": "a", "image": "b"}}'),
    said('{"name": "AddText", "arguments": {"image": NaN}}'),
    said('{"name": "AddText", "arguments": {"image": Infinity}}'), said({**GOLD, "note": "or DrawBox"}),
    said({"name": ["AddText"], "arguments": GOLD["arguments"]}),
    said({"name": "AddText", "arguments": [GOLD["arguments"]]}),
    said({"name": "AddText", "arguments": json.dumps(GOLD["arguments"])}), said({"name": "AddText"}), said("null"),
    said("7"), said(""), said("[" * 100_000), said("{" * 1000 + "}" * 1000),
    said(GOLD, before="<think>"), "<think>" + said(GOLD), json.dumps(GOLD), "", "\\boxed{",
    "\\boxed" + json.dumps(GOLD) + "x", "\\boxed{{}", "x" * 1_000_000,
    said('{"name": "AddText", "arguments": {"text": "' + "x" * 1_000_000 + '"}}'), said("9" * 100_000),
    "\\boxed{" * 100_000, said(GOLD).replace('"', "'"),
    said(f"```json\n{json.dumps(GOLD)}\n```"),
    said('{"name": "AddText", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001),
]  # fmt: skip


@pytest.mark.parametrize("response", HEDGES, ids=range(len(HEDGES)))
def test_hedges_and_broken_answers_earn_nothing_and_raise_nothing(response):
    began = time.process_time()
    assert parts(response, ITEM) == {"tool": 0, "arguments": 0, "call": 0, "exact": 0}
    assert time.process_time() - began < 1


def test_nothing_in_a_response_is_executed(tmp_path):
    mark = tmp_path / "ran"
    gold = {"name": "Calculator", "arguments": {"expression": "1 + 1"}}
    for bait in (
        f"__import__('pathlib').Path('{mark}').touch() or 2",
        f"open('{mark}', 'w') and 2",
        "9**9**9",
        "2" + "+0" * 100_000,
    ):
        began = time.process_time()
        assert (
            parts(said({"name": "Calculator", "arguments": {"expression": bait}}), {"answer": json.dumps(gold)})[
                "arguments"
            ]
            == 0
        )
        assert time.process_time() - began < 0.5
    assert not mark.exists()


def test_unicode_twins_are_not_the_same_name():
    assert tool(None, said({**GOLD, "name": "АddText"}), ITEM) == 0  # a Cyrillic A
    assert read_call('{"name": "AddText", "arguments": {"k": ４}}') is None


def test_obedience_to_the_old_rules_shows():
    """However the old call is spaced or ordered."""
    from evaluate import judge

    old, new = {"name": "OCR_v1", "arguments": {"image": "a"}}, {"name": "OCR_v2", "arguments": {"image": "a"}}
    item = {"answer": json.dumps(new), "old_answer": json.dumps(old)}
    follows = lambda call: judge(said(call), item, None)["follows_old"]
    assert follows(old) == follows(json.dumps(dict(reversed(old.items())), indent=1)) == 1
    assert follows(new) == follows({}) == 0
