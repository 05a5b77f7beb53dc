"""Conditions beyond the paper's: the whole official CLEVR catalogue as the nodes of a policy (--conditions full).

Counts, comparisons of counts, unions, and, once a count has found exactly one object of a kind, questions about "the
red cube": its attributes, what lies left of it, what shares its size, how it compares with another. So no `unique` is
ill-posed on any way through the tree.
"""

import json

import numpy as np

from data.clevr import ATTRIBUTES, INVALID, RELATIONS
from data.prose import noun, pick

PLACES = {"left": "to the left of", "right": "to the right of", "behind": "behind", "front": "in front of"}
NUMBERS = [str(n) for n in range(11)]  # a scene has ten objects at most


class Program:
    """A functional program under construction: every method appends one step and returns its index."""

    def __init__(self):
        self.steps = []

    def add(self, function, *inputs, value=None):
        self.steps.append({"type": function, "inputs": list(inputs), "side_inputs": [] if value is None else [value]})
        return len(self.steps) - 1

    def objects(self, values, among=None):
        """The objects with these values, of the whole scene or among an earlier set."""
        at = self.add("scene") if among is None else among
        for attribute, value in values.items():
            at = self.add(f"filter_{attribute}", at, value=value)
        return at

    def the(self, values):
        return self.add("unique", self.objects(values))


def _values(rng, most=2, but=()):
    """One or two attribute values, drawn: {"color": "red", "shape": "cube"}."""
    names = [name for name in ATTRIBUTES if name not in but]
    count = int(rng.integers(1, most + 1))
    chosen = rng.permutation(len(names))[:count].tolist()
    return {names[k]: ATTRIBUTES[names[k]][int(rng.integers(len(ATTRIBUTES[names[k]])))] for k in sorted(chosen)}


def _two(rng):
    """Two kinds of object of which neither is a kind of the other."""
    while True:
        first, second = _values(rng), _values(rng)
        if not (first.items() <= second.items() or second.items() <= first.items()):
            return first, second


# Each kind of condition draws one: (program, words, groups of answers). In the words {np} stands for `target`, the
# kind of object asked about, so that variant M can show one of its values; `one` are the kinds known to be single.


def exist(rng, one):
    program, target = Program(), _values(rng)
    program.add("exist", program.objects(target))
    return program, "Is there {a} {np} in the picture?", target, [["yes"], ["no"]]


def count(rng, one):
    program, target = Program(), _values(rng)
    program.add("count", program.objects(target))
    groups = pick(rng, ([["1"], ["0", *NUMBERS[2:]]], [["0"], ["1"], NUMBERS[2:]], [["1"], ["0", *NUMBERS[2:]]]))
    return program, f"How many {noun(target)} are in the picture?", None, groups


def compare(rng, one):
    program, (first, second) = Program(), _two(rng)
    left = program.add("count", program.objects(first))
    right = program.add("count", program.objects(second))
    name = pick(rng, ("greater_than", "less_than", "equal_integer"))
    program.add(name, left, right)
    form = {
        "greater_than": "Are there more {} than {} in the picture?",
        "less_than": "Are there fewer {} than {} in the picture?",
        "equal_integer": "Are there exactly as many {} as {} in the picture?",
    }[name]
    return program, form.format(noun(first), noun(second)), None, [["yes"], ["no"]]


def together(rng, one):
    program, (first, second) = Program(), _two(rng)
    both = program.add("union", program.objects(first), program.objects(second))
    program.add("count", both)
    cut = int(rng.integers(1, 6))
    words = f"Taking {noun(first)} and {noun(second)} together, each object once, how many are in the picture?"
    return program, words, None, [NUMBERS[: cut + 1], NUMBERS[cut + 1 :]]


def query(rng, one):
    known, program = pick(rng, one), Program()
    attribute = pick(rng, [name for name in ATTRIBUTES if name not in known])
    program.add(f"query_{attribute}", program.the(known))
    values = list(ATTRIBUTES[attribute])
    groups = [[value] for value in values]
    if attribute == "color":  # eight ways are too many: two or three groups of colors
        order = [values[k] for k in rng.permutation(8)]
        groups = pick(rng, ([order[:4], order[4:]], [order[:3], order[3:6], order[6:]]))
    return program, f"What is the {attribute} of the {noun(known, plural=False)}?", None, groups


def _asked(rng, program, found, where):
    """Whether there are such objects, or how many: the ends of several kinds of condition."""
    if rng.random() < 0.5:
        program.add("exist", found)
        return "Is there {a} {np} " + where + "?", [["yes"], ["no"]]
    program.add("count", found)
    cut = int(rng.integers(0, 3))
    return "How many {np_plural} are there " + where + "?", [NUMBERS[: cut + 1], NUMBERS[cut + 1 :]]


def relate(rng, one):
    known, target, place, program = pick(rng, one), _values(rng, 1), pick(rng, RELATIONS), Program()
    found = program.objects(target, program.add("relate", program.the(known), value=place))
    words, groups = _asked(rng, program, found, f"{PLACES[place]} the {noun(known, plural=False)}")
    return program, words, target, groups


def between(rng, one):
    """Objects that lie one way of one object and another way of another."""
    first, second = [one[k] for k in rng.permutation(len(one))[:2]]
    target, program = _values(rng, 1), Program()
    places = pick(rng, RELATIONS), pick(rng, RELATIONS)
    sides = [program.add("relate", program.the(known), value=place) for known, place in zip((first, second), places)]
    found = program.objects(target, program.add("intersect", *sides))
    where = (
        f"both {PLACES[places[0]]} the {noun(first, plural=False)} "
        f"and {PLACES[places[1]]} the {noun(second, plural=False)}"
    )
    words, groups = _asked(rng, program, found, where)
    return program, words, target, groups


def same(rng, one):
    known, program, attribute = pick(rng, one), Program(), pick(rng, list(ATTRIBUTES))
    target = _values(rng, 1, but=(attribute,))
    found = program.objects(target, program.add(f"same_{attribute}", program.the(known)))
    where = f"with the same {attribute} as the {noun(known, plural=False)}, not counting that one"
    words, groups = _asked(rng, program, found, where)
    return program, words, target, groups


def alike(rng, one):
    first, second = [one[k] for k in rng.permutation(len(one))[:2]]
    attribute, program = pick(rng, list(ATTRIBUTES)), Program()
    sides = [program.add(f"query_{attribute}", program.the(known)) for known in (first, second)]
    program.add(f"equal_{attribute}", *sides)
    words = f"Do the {noun(first, plural=False)} and the {noun(second, plural=False)} have the same {attribute}?"
    return program, words, None, [["yes"], ["no"]]


ANYWHERE = (exist, count, count, compare, together)
OF_ONE = (query, relate, same)
OF_TWO = (between, alike)


def grow_full(rng, depth, table, tries=40, weighed=1200):
    """Draw a tree of conditions of the whole catalogue; arguments and return as clevr_policy.grow.

    Of up to `tries` conditions drawn for a node the first that sends a sixth of the scenes that reach it (at most
    `weighed` are looked at) down every branch is taken, else the one whose smallest branch is largest.
    """
    nodes, leaves = [], 0

    def visit(layer, rows, one, past):
        # rows: the scenes that come here; one: kinds of object known to be single; past: programs asked on the way
        nonlocal leaves
        best = (-1.0, None)
        for _ in range(tries if layer < depth else 0):
            known = len(one) if rng.random() < 0.65 else 0
            kind = pick(rng, (ANYWHERE, OF_ONE, OF_ONE + 2 * OF_TWO)[min(known, 2)])
            program, words, target, groups = kind(rng, one)
            key = json.dumps(program.steps)
            if key in past:
                continue
            answers = table.take(rows[:weighed]).answers(program.steps)
            if (answers == INVALID).any():  # two ways to say one kind: "the cube" is single, "the red one" another's
                continue
            share = min(np.isin(answers, group).mean() if len(answers) else 0.0 for group in groups)
            if share > best[0]:
                best = (share, (program.steps, words, target, groups, key))
            if share >= 1 / 6:
                break
        if best[1] is None or (best[0] * len(rows) < len(table) / 1000 and len(table) >= 1000):
            leaves += 1
            return "leaf", leaves - 1
        program, words, target, groups, key = best[1]
        here, branches = len(nodes), {}
        nodes.append({"program": program, "form": words, "target": target, "branches": branches})
        answers = table.take(rows).answers(program)
        single = {s["type"][7:]: s["side_inputs"][0] for s in program if s["type"].startswith("filter_")}
        counted = [s["type"] for s in program].count("scene") == 1 and program[-1]["type"] == "count"
        plain = counted and all(s["type"].startswith(("scene", "filter", "count")) for s in program)
        for group in groups:
            now = [*one, single] if plain and group == ["1"] and single not in one else one
            child = visit(layer + 1, rows[np.isin(answers, group)], now, past | {key})
            branches.update({answer: child for answer in group})
        return "node", here

    visit(0, np.arange(len(table)), [], frozenset())
    return nodes, leaves
