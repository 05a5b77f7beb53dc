"""Scores for tool calls: the name exactly, the arguments each by its kind, and a small evaluator of arithmetic.

    tool(prompt, response, item)         1.0 if the tool and its version are right
    arguments(prompt, response, item)    the mean over the arguments of both calls, 0 to 1
    call(prompt, response, item)         0.5 tool + 0.5 arguments: the reward
    exact(prompt, response, item)        1.0 if nothing is left to say

Each is reward(prompt, response, item) -> float, item["answer"] the gold call as JSON. Whatever the response holds, the
scores neither raise nor execute it: JSON is read strictly, and expressions by `evaluate` below.
"""

import json
import math
import re
from collections import Counter

from data import InputError
from data.rewards import accuracy, said

EXACT = ("image", "position", "color", "k", "top1")
SIMILAR = ("text", "attribute", "query", "command", "annotation", "keywords", "instruction")
LONGEST = 20_000  # characters of an answer that is read at all
DIGITS = 60  # characters of a number in an expression


# -- 1. arithmetic -----------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*(?:\.\w+)?)|(\*\*|//|[-+*/%(),]))", re.ASCII
)
FUNCTIONS = {
    "sqrt": math.sqrt,
    "abs": abs,
    "round": lambda x, digits=0.0: round(x, int(digits)),
    "min": min,
    "max": max,
    "sum": lambda *terms: math.fsum(terms),
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "log": math.log,
    "log10": math.log10,
    "exp": math.exp,
    "floor": math.floor,
    "ceil": math.ceil,
}
CONSTANTS = {"pi": math.pi, "e": math.e}
BINARY = {
    "+": (1, lambda a, b: a + b),
    "-": (1, lambda a, b: a - b),
    "*": (2, lambda a, b: a * b),
    "/": (2, lambda a, b: a / b),
    "//": (2, lambda a, b: a // b),
    "%": (2, lambda a, b: a % b),
}
DEPTH = 40


def evaluate(expression):
    """The value of an arithmetic expression as a float; ValueError for anything else.

    + - * / // % **, parentheses, a few functions and pi, e (also as math.sqrt). All numbers are floats, so 9**9**9 ends
    as an overflow at once; at most 1,000 characters and 40 levels. Never `eval`.
    """
    if not isinstance(expression, str) or len(expression) > 1000:
        raise ValueError("no expression of at most 1,000 characters")
    tokens, at, text = [], 0, expression.rstrip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if not match or len(match[0]) > DIGITS:
            raise ValueError(f"cannot read {text[at : at + 20]!r}")
        tokens.append(match[match.lastindex])
        at = match.end()
    tokens.append("")
    try:
        value, at = _sum(tokens, 0, 1, 0)
    except (ArithmeticError, TypeError) as error:  # overflow, division by zero, wrong number of arguments
        raise ValueError(str(error)) from None
    if tokens[at] or not math.isfinite(value):
        raise ValueError(f"{tokens[at]!r} is left over" if tokens[at] else "not finite")
    return value


def _sum(tokens, at, level, depth):
    """Precedence climbing: operators of at least `level`, grouping to the left -> (value, next token)."""
    value, at = _sign(tokens, at, depth)
    while tokens[at] in BINARY and BINARY[tokens[at]][0] >= level:
        strength, operate = BINARY[tokens[at]]
        right, at = _sum(tokens, at + 1, strength + 1, depth)
        value = operate(value, right)
    return value, at


def _sign(tokens, at, depth):
    """A sign binds less than **: -2**2 is -4; ** groups to the right."""
    if depth > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH}")
    if tokens[at] in ("+", "-"):
        value, after = _sign(tokens, at + 1, depth + 1)
        return (value if tokens[at] == "+" else -value), after
    base, at = _atom(tokens, at, depth)
    if tokens[at] != "**":
        return base, at
    power, at = _sign(tokens, at + 1, depth + 1)
    return math.pow(base, power), at


def _atom(tokens, at, depth):
    token = tokens[at]
    if token[:1].isdigit() or token[:1] == ".":
        return float(token), at + 1
    if token == "(":
        value, at = _sum(tokens, at + 1, 1, depth + 1)
        return value, _close(tokens, at)
    name = token.removeprefix("math.")
    if name in CONSTANTS:
        return CONSTANTS[name], at + 1
    if name not in FUNCTIONS or tokens[at + 1] != "(":
        raise ValueError(f"{token!r} is no number")
    terms, at = [], at + 1
    while not terms or tokens[at] == ",":
        term, at = _sum(tokens, at + 1, 1, depth + 1)
        terms.append(term)
    return float(FUNCTIONS[name](*terms)), _close(tokens, at)


def _close(tokens, at):
    if tokens[at] != ")":
        raise ValueError(f"{tokens[at]!r} found, expected )")
    return at + 1


# -- 2. single arguments -----------------------------------------------------------------------------------------------


def expression_score(found, gold):
    """1.0 if both expressions have the same value; where the gold one is no arithmetic, if they are the same text."""
    try:
        target = evaluate(gold)
    except ValueError:
        return float(isinstance(found, str) and "".join(found.split()) == "".join(str(gold).split()))
    try:
        return float(math.isclose(evaluate(found), target, rel_tol=1e-6, abs_tol=1e-9))
    except ValueError:
        return 0.0


def box(value):
    """(x1, y1, x2, y2) from "(x1, y1, x2, y2)" or a list of four numbers; None if it is not a box with an area."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*[(\[]([-+.\deE,\s]{7,200})[)\]]\s*", value, re.ASCII)
        value = match[1].split(",") if match else ()
    try:
        x1, y1, x2, y2 = (float(edge) for edge in value if not isinstance(edge, bool))
    except (TypeError, ValueError, OverflowError):
        return None
    return (x1, y1, x2, y2) if -1e6 < x1 < x2 < 1e6 and -1e6 < y1 < y2 < 1e6 else None


def overlap(found, gold):
    """Intersection over union of two boxes; 0.0 if either is none."""
    a, b = box(found), box(gold)
    if a is None or b is None:
        return 0.0
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def token_f1(found, gold):
    """Harmonic mean of precision and recall over words, numbers and operators, small letters throughout."""
    found, gold = (Counter(re.findall(r"\w+|[-+*/=^<>]", text.lower())) for text in (found, gold))
    common = (found & gold).total()
    if not common:
        return float(found == gold)
    return 2 * common / (found.total() + gold.total())


def bert_score():
    """A similarity(found, gold) by BERTScore (F1, English, rescaled), for those who have the package and its model."""
    try:
        from bert_score import BERTScorer
    except ImportError:
        raise InputError("found no package bert_score, expected it (pip install bert-score) or token F1") from None
    scorer = BERTScorer(lang="en", rescale_with_baseline=True)
    return lambda found, gold: min(1.0, max(0.0, float(scorer.score([found], [gold])[2][0])))


def argument_score(name, found, gold, similarity=token_f1):
    """0 to 1 for one argument, by its name: exact, similar, by value, or by overlap. Types count: True is not 1."""
    if name == "expression":
        return expression_score(found, gold)
    if name == "bbox":
        return overlap(found, gold)
    if name in SIMILAR and isinstance(found, str) and isinstance(gold, str):
        return similarity(found, gold)
    return float(type(found) is type(gold) and found == gold)


# -- 3. whole calls ----------------------------------------------------------------------------------------------------


def _no_twins(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def read_call(text):
    """{"name", "arguments"} from JSON text, or None: anything else, more keys, a key twice, NaN, or too long.

    It may stand in <tool_call></tool_call>, as Qwen writes it.
    """
    if text is None or len(text) > LONGEST:
        return None
    if text.startswith("<tool_call>") and text.endswith("</tool_call>"):
        text = text[len("<tool_call>") : -len("</tool_call>")]
    try:
        found = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    right = isinstance(found, dict) and found.keys() == {"name", "arguments"}
    return found if right and isinstance(found["name"], str) and isinstance(found["arguments"], dict) else None


def compare(found, gold, similarity=token_f1):
    """(tool score, argument score) of two calls; an argument that only one of them has counts as 0."""
    if found is None:
        return 0.0, 0.0
    names = sorted(found["arguments"].keys() | gold["arguments"].keys())
    scores = [
        argument_score(name, found["arguments"][name], gold["arguments"][name], similarity)
        if name in found["arguments"] and name in gold["arguments"]
        else 0.0
        for name in names
    ]
    return float(found["name"] == gold["name"]), sum(scores) / len(scores) if scores else 1.0


def parts(response, item, similarity=token_f1):
    """{"tool", "arguments", "call", "exact"} of a response, to be logged apart; all or nothing where no call is due."""
    gold = read_call(item["answer"])
    if gold is None:
        return dict.fromkeys(
            ("tool", "arguments", "call", "exact"), accuracy(prompt=None, response=response, item=item)
        )
    tool_score, arguments_score = compare(read_call(said(response, item)), gold, similarity)
    return {
        "tool": tool_score,
        "arguments": arguments_score,
        "call": 0.5 * tool_score + 0.5 * arguments_score,
        "exact": float(tool_score == 1 and arguments_score >= 1 - 1e-9),
    }


def tool(prompt, response, item):
    """1.0 if the response calls the right tool in the right version, else 0.0."""
    return parts(response, item)["tool"]


def arguments(prompt, response, item):
    """The mean score of the response's arguments, 0 to 1."""
    return parts(response, item)["arguments"]


def call(prompt, response, item):
    """The reward of a tool call: 0.5 tool + 0.5 arguments."""
    return parts(response, item)["call"]


def exact(prompt, response, item):
    """1.0 if tool, version and every argument are right, else 0.0."""
    return parts(response, item)["exact"]
