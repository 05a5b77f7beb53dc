"""Rewards: pure functions reward(prompt, response, item) -> float, and the one parser of responses that they share.

A response thinks inside <think></think> and answers in one \\boxed{...}, or in free text where its item says `boxed`
False. Training and evaluation read it here and nowhere else. Two boxed answers are a hedge and give nothing.

    score(rewards, prompts, responses, items)          [[float]], a row per response, NaN where a function failed

A function marked with @batch takes lists instead, reward(prompts, responses, items) -> [float]. --reward is read, and
functions of the user's are kept in processes of their own, in support/judging.py.
"""

import importlib
import inspect
import math
import sys
import traceback
from collections import Counter

BOX = "\\boxed{"


def parse(response):
    """The boxed answer of a response, stripped; None unless exactly one balanced \\boxed{...} stands after the
    thoughts.

    What stands before the last </think> is thought. An opened <think> that is never closed leaves no answer.
    """
    if response.count("<think>") > response.count("</think>"):
        return None
    answer = response.rpartition("</think>")[2]
    if answer.count("\\boxed") != 1 or BOX not in answer:
        return None
    start = answer.index(BOX) + len(BOX)
    depth = 1
    for end in range(start, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            return answer[start:end].strip()
    return None


def thoughts(response):
    """What stands inside <think></think>, stripped; "" if the response has no closed thoughts."""
    head, closed, _ = response.rpartition("</think>")
    return head.partition("<think>")[2].strip() if closed else ""


def said(response, item):
    """The answer of a response to an item: what is boxed, or what follows the thoughts; None where there is none."""
    if item.get("boxed") is not False:
        return parse(response)
    if response.count("<think>") > response.count("</think>"):
        return None
    return response.rpartition("</think>")[2].strip() or None


def accuracy(prompt, response, item):
    """1.0 if the answer is the item's answer, character for character up to white space, else 0.0."""
    found = said(response, item)
    return float(found is not None and " ".join(found.split()) == " ".join(item["answer"].split()))


def format(prompt, response, item):
    """1.0 if the response is <think>...</think>, then the answer (one box) and nothing else, else 0.0."""
    text = response.strip()
    once = text.count("<think>") == 1 and text.count("</think>") == 1 and text.startswith("<think>")
    answer, found = text.rpartition("</think>")[2].strip(), said(text, item)
    boxed = answer.startswith(BOX) and answer.endswith("}") and answer[len(BOX) : -1].strip() == found
    return float(bool(once and found is not None and (boxed or found == answer) and thoughts(text)))


def shared_words(found, expected):
    """Overlap of two texts' words, order aside: 2 x shared / (words of both), lower case, 0 to 1."""
    a, b = found.lower().split(), expected.lower().split()
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if a and b else 0.0


def token_f1(prompt, response, item):
    """How many words the answer shares with the item's (see shared_words), 0 to 1."""
    found = said(response, item)
    return 0.0 if found is None else shared_words(found, item["answer"])


def exact_chain(response, item, policy=None):
    """1.0 if the thoughts are the item's gold chain word for word (white space aside) and the answer is right."""
    same = thoughts(response).split() == item["cot"].split()
    return float(same and accuracy(None, response, item) == 1.0)


REWARDS = {"accuracy": accuracy, "format": format, "token_f1": token_f1}
ELSEWHERE = {"json_call": "data.gta_score:call"}  # 0.5 for the name of a tool call, 0.5 for its arguments


# -- calling them ------------------------------------------------------------------------------------------------------


def batch(function):
    """Mark a reward that takes lists, (prompts, responses, items) -> [float]: one call for all to be judged."""
    function.batch = True
    return function


def named(name):
    """The function of a name of REWARDS or ELSEWHERE, or of data.MODULE:FUNCTION. Raises AttributeError, TypeError."""
    module, _, attribute = ELSEWHERE.get(name, name).rpartition(":")
    if not module:
        if name not in REWARDS:
            raise AttributeError(f"data.rewards has no reward {name!r}")
        return REWARDS[name]
    function = getattr(importlib.import_module(module), attribute)
    inspect.signature(function).bind("", "", {})  # TypeError where it takes something else
    return function


class Failures:
    """What went wrong in rewards: counts by function and kind; the first of each is shown with its traceback."""

    def __init__(self):
        self.counts = Counter()

    def note(self, function, error, item):
        kind = (getattr(function, "__name__", "reward"), getattr(error, "kind", type(error).__name__))
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            trace = getattr(error, "trace", None) or traceback.format_exception(error)
            print(
                f"reward {kind[0]}: {kind[1]} on item {item.get('id')}\n{''.join(trace[-12:])}",
                file=sys.stderr,
                flush=True,
            )


failures = Failures()


def number(value):
    """A finite float of a reward's result; raises TypeError for text, and ValueError for NaN and infinity."""
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"the reward is {value!r:.40}, expected a number")
    if not math.isfinite(value := float(value)):
        raise ValueError(f"the reward is {value}, expected a finite number")
    return value


def score(rewards, prompts, responses, items):
    """Rewards [[float]] of responses, one row each with a column per (name, function, weight) of `rewards`, unweighted.

    NaN stands where a function raises or returns no finite number; `failures` says so.
    """
    columns = []
    for _, function, _ in rewards:
        if not getattr(function, "batch", False):
            columns.append([guarded(function, *inputs) for inputs in zip(prompts, responses, items)])
            continue
        try:
            values = list(function(list(prompts), list(responses), list(items)))
            if len(values) != len(items):
                raise ValueError(f"found {len(values)} rewards, expected {len(items)}, one for each response")
        except Exception as error:
            failures.note(function, error, items[0] if items else {})
            values = [math.nan] * len(items)
        columns.append([_finite(function, value, item) for value, item in zip(values, items)])
    return [list(row) for row in zip(*columns)]


def guarded(function, prompt, response, item):
    """A reward, or NaN where the function raises or returns no finite number."""
    try:
        return number(function(prompt, response, item))
    except Exception as error:
        failures.note(function, error, item)
        return math.nan


def _finite(function, value, item):
    """The number that a batch function gave for one item; its NaN says that it has told of the failure itself."""
    try:
        return math.nan if isinstance(value, float) and math.isnan(value) else number(value)
    except (TypeError, ValueError) as error:
        failures.note(function, error, item)
        return math.nan
