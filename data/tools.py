"""Tools in the loop: what an environment is, a call in Qwen's own form, tools made of Python functions, their rewards.

    environment(item) -> dialogue       made anew for each response; any function or class, `Tools` below is one
    dialogue.step(text) -> result       text: the assistant's turn; the result: what it is told, a text or
                                        (text, [PIL.Image]); None: it has answered, the dialogue is over

A response of one turn is the environment whose `step` always says None. What `step` says depends on the item and on the
turns so far alone. A result that begins with "error" tells of a call that could not be run; the model may mend it. An
environment may have `system`, text for the system prompt, and `turns`, how many results a dialogue may have at most.

While a dialogue is judged, a reward's `response` is its last turn, which answers, and item["dialogue"] all of them,
[{"role": "assistant" or "tool", "text", "pictures"}]. No part of the method.
"""

import inspect
import json
import math
import typing

from data import InputError
from data.gta_score import compare, read_call
from data.rewards import accuracy, batch

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TURNS = 8  # results that a dialogue may have, where its environment says nothing

# -- 1. a call in a turn -----------------------------------------------------------------------------------------------


def read_turn(text):
    """The call that an assistant's turn ends in, {"name", "arguments"}; None: it makes none, so it answers.

    What stands before the last </think> is thought. Raises ValueError, with what to tell the model, for a call that is
    not one <tool_call>{"name": ..., "arguments": {...}}</tool_call> at the turn's end, in strict JSON.
    """
    said = text.rpartition("</think>")[2]
    if OPEN not in said and CLOSE not in said:
        return None
    _, _, body = said.partition(OPEN)
    body, closed, rest = body.partition(CLOSE)
    if OPEN in body or not closed or rest.strip():
        raise ValueError(f"expected one {OPEN} ... {CLOSE} at the end of the turn")
    call = read_call(body.strip())
    if call is None:
        raise ValueError('expected {"name": ..., "arguments": {...}} as JSON in the call')
    return call


def failed(turn):
    """Does a turn of role tool tell of a call that could not be run?"""
    return turn["text"].startswith("error")


def calls(dialogue):
    """The calls of item["dialogue"], {"name", "arguments"} each, or None for one that cannot be read.

    One that failed and was made again stands there once.
    """
    found = []
    for turn, result in zip(dialogue[::2], dialogue[1::2]):
        try:
            found.append((read_turn(turn["text"]), failed(result)))
        except ValueError:
            found.append((None, True))
    after = [call for call, _ in found[1:]] + [None]
    return [call for (call, wrong), then in zip(found, after) if not (wrong and call is not None and call == then)]


# -- 2. tools made of functions ----------------------------------------------------------------------------------------

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
SYSTEM = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # the text of Qwen2.5's chat template


def schema(function):
    """The JSON schema of a function, from its signature and docstring; `item` is no argument of the model's."""
    name, hints, arguments = function.__name__, typing.get_type_hints(function), {}
    for key, parameter in inspect.signature(function).parameters.items():
        kind = hints.get(key)
        if key != "item" and (kind not in KINDS or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD):
            known = ", ".join(each.__name__ for each in KINDS)
            raise InputError(
                f"tool {name}: found {key}: {kind}, expected a plain parameter annotated as one of {known}"
            )
        arguments[key] = parameter
    arguments.pop("item", None)
    if not inspect.getdoc(function):
        raise InputError(f"tool {name}: found no docstring, expected one that tells the model what it does")
    properties = {key: {"type": KINDS[hints[key]]} for key in arguments}
    required = [key for key, parameter in arguments.items() if parameter.default is parameter.empty]
    parameters = {"type": "object", "properties": properties, "required": required}
    described = {"name": name, "description": inspect.getdoc(function), "parameters": parameters}
    return {"type": "function", "function": described}


def fits(value, kind):
    """Is a JSON value of a schema's type? An integer is a number, True is neither."""
    allowed = {"number": (int, float), "integer": int, "boolean": bool, "string": str, "array": list, "object": dict}
    return isinstance(value, allowed[kind]) and (kind == "boolean" or not isinstance(value, bool))


class Tools:
    """An environment of Python functions, which a turn calls by name in Qwen's form: Tools(calculator, crop, turns=6).

    A function gets the arguments of the call, and the item where it has a parameter `item`; what it returns is told to
    the model: (text, [PIL.Image]) with pictures, anything else as text or JSON. What it raises is told, too.
    """

    def __init__(self, *functions, turns=TURNS):
        self.functions, self.turns = {function.__name__: function for function in functions}, turns
        schemas = {name: schema(function) for name, function in self.functions.items()}
        self.parameters = {name: each["function"]["parameters"] for name, each in schemas.items()}
        self.system = SYSTEM.format("\n".join(json.dumps(each, ensure_ascii=False) for each in schemas.values()))

    def __call__(self, item):
        return Call(self, item)

    def run(self, call, item):
        """The result of a call, {"name", "arguments"}. Raises ValueError for what does not fit its schema."""
        name, given = call["name"], call["arguments"]
        if name not in self.functions:
            raise ValueError(f"no tool {name!r:.80}, expected one of {', '.join(self.functions)}")
        properties, required = self.parameters[name]["properties"], self.parameters[name]["required"]
        if wrong := sorted((given.keys() - properties.keys()) | (set(required) - given.keys())):
            raise ValueError(
                f"unknown or missing argument {wrong[0]!r:.80} of {name}, expected {', '.join(properties)}"
            )
        for key, value in given.items():
            if not fits(value, kind := properties[key]["type"]):
                raise ValueError(f"argument {key} of {name}: {value!r:.80}, expected {kind}")
        item = {"item": item} if "item" in inspect.signature(self.functions[name]).parameters else {}
        result = self.functions[name](**given, **item)
        return result if isinstance(result, (str, tuple)) else json.dumps(result, ensure_ascii=False)


class Call:
    """A dialogue with Tools: each turn that ends in a call is told its result."""

    def __init__(self, tools, item):
        self.tools, self.item = tools, item

    def step(self, text):
        try:
            call = read_turn(text)
            return None if call is None else self.tools.run(call, self.item)
        except ValueError as error:
            return f"error: {error}"
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"


# -- 3. rewards that read the dialogue: is the use of tools faithful, and is it sparing? -------------------------------
# item["calls"]: the calls that the policy asks for, in order, [{"name", "arguments"}]


def _same(found, gold):
    return found is not None and min(compare(found, gold)) >= 1 - 1e-9


def _in_order(found, gold):
    """How many of the gold calls were made in their order: the longest common subsequence."""
    row = [0] * (len(gold) + 1)
    for call in found:
        before = row[:]
        for k, wanted in enumerate(gold):
            row[k + 1] = before[k] + 1 if _same(call, wanted) else max(before[k + 1], row[k])
    return row[-1]


def allowed(prompt, response, item):
    """Share of the calls made that the policy asks for, in its order (1.0 where none is made)."""
    made = calls(item["dialogue"])
    return _in_order(made, item["calls"]) / len(made) if made else 1.0


def needed(prompt, response, item):
    """Share of the calls that the policy asks for that were made, in its order."""
    return _in_order(calls(item["dialogue"]), item["calls"]) / len(item["calls"]) if item["calls"] else 1.0


def used(prompt, response, item):
    """Share of the results that a later turn of the model takes something from: a word that stood in no turn before.

    A result that says nothing new cannot be told to be used or not, and counts for nothing.
    """
    turns, known, counted = item["dialogue"], set(), []
    words = lambda text: set("".join(c if c.isalnum() or c in "-." else " " for c in text.lower()).split())
    for k, turn in enumerate(turns):
        new = words(turn["text"]) - known - words(prompt)
        if turn["role"] == "tool" and new and not failed(turn):
            later = set().union(*(words(t["text"]) for t in turns[k + 1 :] if t["role"] == "assistant"))
            counted.append(bool(new & later))
        known |= words(turn["text"])
    return sum(counted) / len(counted) if counted else 1.0


def right_calls(prompt, response, item):
    """1.0 if the answer is right and the calls are those that the policy asks for, all of them and no others."""
    made, gold = calls(item["dialogue"]), item["calls"]
    return accuracy(prompt, response, item) * float(len(made) == len(gold) == _in_order(made, gold))


@batch
def frugal(prompts, responses, items):
    """accuracy x r_tool of OTC-GRPO (arXiv 2504.14870): the fewer calls, the better, among right answers.

    m calls, n the fewest of a right response to the item: r_tool = sin(f pi / 2n) with f = 2 m n / (m + n), and
    cos(m pi / (2 m + 1)) where n = 0. All responses to an item are one group, so n is of this step's alone.
    """
    right = [accuracy(*each) for each in zip(prompts, responses, items)]
    made, fewest = [len(item["dialogue"]) // 2 for item in items], {}
    for item, m, good in zip(items, made, right):
        if good:
            fewest[item["id"]] = min(m, fewest.get(item["id"], m))

    def share(m, n):
        return math.sin(math.pi * m / (m + n)) if n else math.cos(m * math.pi / (2 * m + 1))

    return [good and good * share(m, fewest[item["id"]]) for item, m, good in zip(items, made, right)]
