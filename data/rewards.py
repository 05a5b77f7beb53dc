"""Rewards: pure functions reward(prompt, response, item) -> float, and the one parser of responses behind them.

A response thinks inside <think></think> and answers in one \\boxed{...}. Training and evaluation read it here and nowhere
else. Two boxed answers are a hedge and give nothing. `load` finds the functions that --reward names, `guarded` calls one of
them so that what it does wrong costs one response and not the run.
"""

import importlib
import math
import signal
import threading

from data import InputError

BOX = "\\boxed{"


def parse(response):
    """The boxed answer of a response, stripped; None unless exactly one balanced \\boxed{...} stands after the thoughts.

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


def accuracy(prompt, response, item):
    """1.0 if the parsed answer is the item's answer, character for character up to white space, else 0.0."""
    found = parse(response)
    return float(found is not None and " ".join(found.split()) == " ".join(item["answer"].split()))


def format(prompt, response, item):
    """1.0 if the response is <think>...</think>, then one boxed answer and nothing else but white space, else 0.0."""
    text = response.strip()
    once = text.count("<think>") == 1 and text.count("</think>") == 1 and text.startswith("<think>")
    answer = text.rpartition("</think>")[2].strip()
    found = parse(text)
    whole = found is not None and answer.startswith(BOX) and answer.endswith("}")
    return float(bool(once and whole and answer[len(BOX) : -1].strip() == found and thoughts(text)))


def exact_chain(response, item, policy=None):
    """1.0 if the thoughts are the item's gold chain word for word (white space aside) and the answer is right."""
    same = thoughts(response).split() == item["cot"].split()
    return float(same and accuracy(None, response, item) == 1.0)


# -- calling functions of other people's making --------------------------------------------------------------------------


class Timeout(BaseException):
    """Not an Exception: a reward function that catches those must not catch this."""


def load(text):
    """[(name, function, weight)] of --reward "accuracy=0.9,module:function=0.1"."""
    found = []
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        module, _, attribute = name.rpartition(":")
        try:
            function = getattr(importlib.import_module(module or __name__), attribute)
            found.append((attribute, function, float(weight or 1)))
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"--reward {part!r}: {error}; expected name=weight of data.rewards, or module:function=weight"
            ) from None
    return found


def guarded(function, prompt, response, item, seconds):
    """A reward, or NaN where the function raises, hangs or returns no finite number."""
    timed = threading.current_thread() is threading.main_thread()

    def ring(*_):
        raise Timeout

    before = signal.signal(signal.SIGALRM, ring) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        value = float(function(prompt, response, item))
        return value if math.isfinite(value) else math.nan
    except (Exception, Timeout):
        return math.nan
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
