"""Rewards: pure functions reward(prompt, response, item) -> float, and the one parser of responses that they share.

A response thinks inside <think></think> and answers in one \\boxed{...}, or in free text where its item says `boxed`
False. Training and evaluation read it here and nowhere else. Two boxed answers are a hedge and give nothing.

    found = load("accuracy=0.9,mine/rewards.py:polite=0.1")       [(name, function, weight)]
    score(found, prompts, responses, items, seconds=5)            [[float]], a row per response, NaN where one failed

A function marked with @batch takes lists instead, reward(prompts, responses, items) -> [float]. Whatever a function of
the user's does wrong costs its response and not the run.
"""

import copy
import importlib
import importlib.util
import inspect
import math
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from contextlib import contextmanager

from data import InputError

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


# -- calling functions of other people's making ------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def batch(function):
    """Mark a reward that takes lists, (prompts, responses, items) -> [float]: one call for all to be judged."""
    function.batch = True
    return function


def load(text, judge=None):
    """[(name, function, weight)] of --reward "accuracy=0.9,module:function=0.1".

    A name is one of REWARDS, `judge` (the Judge given), module:function or file.py:function. Raises InputError for what
    is not there or does not take (prompt, response, item), and for weights that are no finite numbers.
    """
    found = []
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            function = _find(name, judge)
            value = float(weight or 1)
            if not math.isfinite(value):
                raise ValueError(f"weight {weight}")
            found.append((name.rpartition(":")[2], function, value))
        except (Exception, SystemExit) as error:  # a module of the user's may raise anything
            known = ", ".join([*REWARDS, *ELSEWHERE, "judge"])
            raise InputError(
                f"--reward {part!r}: {type(error).__name__}: {error}; expected name=weight of data.rewards ({known}), "
                "or module:function=weight"
            ) from None
    if len({name for name, *_ in found}) < len(found):
        raise InputError(f"--reward {text!r}: found a name twice, expected each once")
    return found


def _find(name, judge):
    module, _, attribute = ELSEWHERE.get(name, name).rpartition(":")
    if not module and attribute == "judge":
        if judge is None:
            raise ValueError("no --judge-url found")
        return judge
    if not module:
        if attribute not in REWARDS:
            raise AttributeError(f"data.rewards has no attribute {attribute!r}")
        return REWARDS[attribute]
    function = getattr(_import(module), attribute)
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"{attribute} is no function")
    inspect.signature(function).bind("", "", {})  # TypeError where it takes something else
    return function


def _import(module):
    """A module of the user's, by name or by file; its own folder and the current one are looked into before ours."""
    is_file = module.endswith(".py")
    first = [os.path.dirname(os.path.abspath(module))] if is_file else []
    before = sys.path[:]
    sys.path[:] = [*first, os.getcwd(), *(path for path in before if os.path.abspath(path or ".") != ROOT), ROOT]
    try:
        if not is_file:
            return importlib.import_module(module)
        spec = importlib.util.spec_from_file_location(f"reward_{abs(hash(os.path.abspath(module)))}", module)
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found
    finally:
        sys.path[:] = before


class Timeout(BaseException):
    """Not an Exception: a reward function that catches those must not catch this."""


@contextmanager
def time_limit(seconds):
    """Raise Timeout in what runs inside after so many seconds, and on and on, until it ends; main thread only.

    Once would not do: code that catches everything and goes on would catch it.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_, frame):
        while frame is not None:  # only while the caller's code runs, not on the way out of here
            if frame.f_code.co_name == "_call" and frame.f_globals is globals():
                raise Timeout
            frame = frame.f_back

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1e-4)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _call(function, *inputs):
    return function(*inputs)


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


def guarded(function, prompt, response, item, seconds):
    """A reward, or NaN where the function raises, exits, hangs or returns no finite number. It gets a copy of the
    item."""
    if getattr(function, "batch", False):
        return score([("", function, 1.0)], [prompt], [response], [item], seconds)[0][0]
    try:
        with time_limit(None if getattr(function, "own_limit", False) else seconds):
            return number(_call(function, prompt, response, copy.deepcopy(item)))
    except (Exception, SystemExit, Timeout) as error:
        failures.note(function, error, item)
        return math.nan


def score(rewards, prompts, responses, items, seconds):
    """Rewards [[float]] of responses, one row each with a column per (name, function, weight) of `rewards`, unweighted.

    seconds: after which a function is given up for a response; a batch function has them for each response together.
    """
    columns = []
    for _, function, _ in rewards:
        if not getattr(function, "batch", False):
            columns.append([guarded(function, *inputs, seconds) for inputs in zip(prompts, responses, items)])
            continue
        limit = None if getattr(function, "own_limit", False) else seconds * len(items)
        try:
            with time_limit(limit):
                values = list(_call(function, list(prompts), list(responses), copy.deepcopy(list(items))))
            if len(values) != len(items):
                raise ValueError(f"found {len(values)} rewards, expected {len(items)}, one for each response")
        except (Exception, SystemExit, Timeout) as error:
            failures.note(function, error, items[0] if items else {})
            values = [math.nan] * len(items)
        columns.append([_finite(function, value, item) for value, item in zip(values, items)])
    return [list(row) for row in zip(*columns)]


def _finite(function, value, item):
    try:
        return math.nan if isinstance(value, float) and math.isnan(value) else number(value)
    except (TypeError, ValueError) as error:
        failures.note(function, error, item)
        return math.nan
