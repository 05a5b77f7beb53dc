"""Tool policies in the tiny world: who gets which tool in which version, what must come first, and with what arguments.

    python -m tiny.tools --out DIR --tools 8 --queries 400 --sft 24 --leave-out 0.34 --seed 0

A policy has a sentence for each function with its tool and the rule of its version, for each order, for each argument
that a rule decides, and for requests over several pictures, in random order under freshly drawn words:

    policy P3 : color needs locate . color T17 credits below 25 _v3 below 50 _v1 else _v2 . locate needs none . ...

A request comes with pictures and a profile: `image 1 <image> image 2 <image> account B age 62 credits 37 apply P3 :
color small cube in 2`. It takes a dialogue: in each turn the model recites the sentences that matter, decides, and
calls a tool as JSON, whose result follows as the user's turn in Qwen's form; when all is done it answers. Every turn of
a dialogue is an item of its own, with everything before it as `messages`.

    sentences(policy), draw_policy(rng, count)          the words, and a policy of so many tools
    dialogue(policy, facts, goal, profile)              the gold dialogue, turn by turn
    run(item, call, calls)                              a tool's result, from the pictures' facts alone

Nothing here needs torch. A text is a list of the vocabulary's tokens until `spell` writes it, as the tokenizer does.
"""

import argparse
import json
import os
import re

import numpy as np
from PIL import Image
from tokenizers import Regex, decoders

from data import InputError, command
from data.clevr import ATTRIBUTES, COLORS
from data.clevr_policy import NewFolder, write_json, write_jsonl
from data.dataset import IMAGE
from tiny.world import KINDS, POLICIES, SIDE, TOKENS, picture, write_tokenizer

# -- 1. words ----------------------------------------------------------------------------------------------------------

MADE = ("mark", "paint", "zoom")  # what changes a picture
FUNCTIONS = ("describe", "locate", *KINDS, "count", "read", "add", "subtract", "search", *MADE)
NEEDS = {  # what a policy may demand before a function: one of these, drawn anew for each policy
    **dict.fromkeys(("locate", "count", *MADE), ("describe", "none")),
    **dict.fromkeys(KINDS, ("locate", "locate", "none")),
    **dict.fromkeys(("add", "subtract"), ("read",)),
}
ON_PICTURE = [f for f in FUNCTIONS if f not in ("add", "subtract", "search")]
RULED = {"search": "k", "mark": "position", "paint": "tint", "zoom": "scale"}  # arguments that a rule decides
CHOICES = {
    "k": [str(n) for n in range(1, 10)],
    "scale": [str(n) for n in range(1, 10)],
    "position": ["lt", "mt", "rt", "lb", "mb", "rb"],
    "tint": list(COLORS),
}
VERSIONS = [f"_v{n}" for n in range(1, 6)]
ACCOUNTS = ["A", "B", "C", "D"]
TOOLS = [f"T{n}" for n in range(64)]
NUMBERS = [str(n) for n in range(100)]
NAME, ARGUMENTS, QUOTE = '{"name": "', '", "arguments": {', '"'
STRINGS, PLAIN = ("text", "expression", "position", "tint"), ("image", "bbox", "k", "scale")
JSON = [NAME, ARGUMENTS, *[f'"{key}": "' for key in STRINGS], *[f'"{key}":' for key in PLAIN], QUOTE, "[", "]"]
CALL, RESULT = ("<tool_call>", "</tool_call>"), ("<tool_response>", "</tool_response>")
NEW_ADDED = [*CALL, *RESULT, *JSON, *VERSIONS]  # found in a text also where no space stands around them
NEW_WORDS = [
    *[f for f in FUNCTIONS if f not in TOKENS], *RULED.values(), *CHOICES["position"], *ACCOUNTS, *TOOLS, *NUMBERS,
    "needs", "none", "several", "account", "age", "credits", "below", "otherwise", "so", "in", "with", "image", "last",
    "call", "done", "error", "+", "-",
]  # fmt: skip
ALL_TOKENS = TOKENS + NEW_ADDED + NEW_WORDS
IDS = {word: i for i, word in enumerate(ALL_TOKENS)}
# How tokens are written: with spaces between them, except where JSON has none.
CLOSE = [
    (" ,", ","),
    (" }", "}"),
    (" ]", "]"),
    ("[ ", "["),
    ('{ "', '{"'),
    ('": " ', '": "'),
    (' ",', '",'),
    (' "}', '"}'),
]
VERSIONED = r' _v(?=[0-9]",)'


def spell(words):
    """The text of tokens, as the tokenizer's decoder writes it: calls are plain JSON."""
    text = " ".join(words)
    for pair in CLOSE:
        text = text.replace(*pair)
    return re.sub(VERSIONED, "_v", text)


def decoder():
    """The tokenizer's decoder, for tiny.world.write_tokenizer: what `spell` does."""
    spaced = [decoders.Replace(Regex("$"), " "), decoders.Fuse()]
    closed = [decoders.Replace(*pair) for pair in CLOSE]
    return decoders.Sequence(
        [*spaced, *closed, decoders.Replace(Regex(VERSIONED), "_v"), decoders.Replace(Regex(" $"), "")]
    )


def call_words(call):
    """A call as tokens, <tool_call> and </tool_call> around it."""
    name, version = re.fullmatch(r"(.*?)(_v\d)?", call["name"]).groups()
    words = [CALL[0], NAME, name, *([version] if version else []), ARGUMENTS]
    for k, (key, value) in enumerate(call["arguments"].items()):
        words += [","] * (k > 0)
        if key in STRINGS:
            words += [f'"{key}": "', *result_words(value), QUOTE]
        else:
            words += [f'"{key}":', *(box_words(value) if key == "bbox" else [str(value)])]
    return [*words, "}", "}", CALL[1]]


def box_words(box):
    return ["[", *[word for k, edge in enumerate(box) for word in [","] * (k > 0) + [str(edge)]], "]"]


# -- 2. policies -------------------------------------------------------------------------------------------------------
# A rule is {"value"} or {"key", "below": [[threshold, value], ...], "else"} or {"accounts", "yes": rule, "no": rule}.


def draw_rule(rng, values, nested=True):
    """A rule over some of `values`: fixed, by one or more thresholds, by account, or thresholds in accounts."""
    fresh = [values[k] for k in rng.permutation(len(values))]
    kind = rng.choice(4, p=[0.15, 0.45, 0.2, 0.2]) if nested else 1
    if kind == 0:
        return {"value": fresh[0]}
    if kind == 1:
        count = int(rng.integers(1, 4 if nested else 2))
        edges = sorted((5 + rng.choice(90, count, replace=False)).tolist())
        key = ("age", "credits")[rng.integers(2)]
        return {"key": key, "below": [[edge, fresh[k]] for k, edge in enumerate(edges)], "else": fresh[count]}
    some = sorted(rng.choice(4, int(rng.integers(1, 4)), replace=False).tolist())
    rule = {"accounts": [ACCOUNTS[k] for k in some]}
    if kind == 2:
        return {**rule, "yes": {"value": fresh[0]}, "no": {"value": fresh[1]}}
    return {**rule, "yes": draw_rule(rng, fresh[:2], False), "no": draw_rule(rng, fresh[2:], False)}


def rule_words(rule):
    if "value" in rule:
        return [rule["value"]]
    if "key" in rule:
        return [
            rule["key"],
            *[w for edge, value in rule["below"] for w in ("below", str(edge), value)],
            "else",
            rule["else"],
        ]
    return ["account", *rule["accounts"], "then", *rule_words(rule["yes"]), "otherwise", *rule_words(rule["no"])]


def decide(rule, profile):
    """(each comparison with its outcome, as tokens, "so" and the value; the value)."""
    if "value" in rule:
        return ["so", rule["value"]], rule["value"]
    if "key" in rule:
        words, number = [], profile[rule["key"]]
        for edge, value in rule["below"]:
            words += [rule["key"], str(number), "below", str(edge), "yes" if number < edge else "no"]
            if number < edge:
                return [*words, "so", value], value
        return [*words, "so", rule["else"]], rule["else"]
    held = profile["account"] in rule["accounts"]
    words, value = decide(rule["yes" if held else "no"], profile)
    return ["account", profile["account"], "yes" if held else "no", *words], value


def draw_functions(rng, count):
    """`count` functions, none without what its policy may demand."""
    chosen = ["describe"]
    for f in ("describe", *rng.permutation(FUNCTIONS).tolist()):
        under = {need for need in (f, *NEEDS.get(f, ())) if need != "none"} - set(chosen)
        if len(chosen) + len(under) <= count:
            chosen += sorted(under)
    return chosen


def draw_policy(rng, count, name=None, functions=None):
    """A policy of `count` tools (3 to 14), or for these functions.

    {"name", "tools": {function: {"tool", "needs", "rule"}}, "arguments": {argument: rule}, "several": "describe" or
    "none", "order": ids of the sentences}
    """
    functions = functions or draw_functions(rng, count)
    words = [TOOLS[k] for k in rng.permutation(len(TOOLS))]
    tools = {}
    for f, tool in zip(functions, words):
        options = NEEDS.get(f, ())
        tools[f] = {"tool": tool, "needs": options[rng.integers(len(options))] if options else None}
        tools[f]["rule"] = draw_rule(rng, VERSIONS)
    arguments = {RULED[f]: draw_rule(rng, CHOICES[RULED[f]]) for f in functions if f in RULED}
    several = "describe" if rng.random() < 0.5 else "none"
    name = name or POLICIES[rng.integers(len(POLICIES))]
    policy = {"name": name, "tools": tools, "arguments": arguments, "several": several}
    return {**policy, "order": rng.permutation(list(sentences(policy))).tolist()}


def sentences(policy):
    """{id: the sentence's tokens without its full stop} of a policy's rules."""
    out = {"several": ["several", "needs", policy["several"]]}
    for f, tool in policy["tools"].items():
        if tool["needs"]:
            out[f"{f} needs"] = [f, "needs", tool["needs"]]
        out[f] = [f, tool["tool"], *rule_words(tool["rule"])]
    return out | {key: [key, *rule_words(rule)] for key, rule in policy["arguments"].items()}


def policy_words(policy):
    said = sentences(policy)
    return ["policy", policy["name"], ":", *[word for key in policy["order"] for word in (*said[key], ".")]]


# -- 3. requests and dialogues -----------------------------------------------------------------------------------------
# facts: {"images": [{"objects": [{"size", ..., "box"}], "number"}], "fails": [calls that fail once, by number]}.


def fits(thing, phrase):
    return all(word in thing.values() for word in phrase)


def matching(facts, image, phrase):
    return [thing for thing in facts["images"][image - 1]["objects"] if fits(thing, phrase)]


def draw_phrase(rng, thing, most=2, without=()):
    """One to `most` of a thing's attributes, in spoken order."""
    kinds = [kind for kind in KINDS if kind not in without]
    some = rng.permutation(len(kinds))[: rng.integers(1, most + 1)]
    return [thing[kind] for k, kind in enumerate(kinds) if k in some]


def draw_goal(rng, policy, facts, verb, shown=0.4):
    """A request for a function: {"verb", "phrase", "image", "with"}; None where the pictures offer nothing for it."""
    count = len(facts["images"])
    image = int(rng.integers(1, count + 1))
    things = facts["images"][image - 1]["objects"]
    goal = {"verb": verb, "image": image}
    if verb in ("add", "subtract"):
        most = facts["images"][image - 1]["number"] if verb == "subtract" else 49
        goal["phrase"] = ["+" if verb == "add" else "-", str(rng.integers(most + 1))]
    if verb in ("locate", *KINDS):
        for _ in range(8):
            thing = things[rng.integers(len(things))]
            goal["phrase"] = draw_phrase(rng, thing, 3, (verb,))
            if len(matching(facts, image, goal["phrase"])) == 1:
                break
        else:
            return None
    if verb in ("count", "search"):
        thing = (
            things[rng.integers(len(things))]
            if rng.random() < 0.6
            else {k: str(rng.choice(v)) for k, v in ATTRIBUTES.items()}
        )
        goal["phrase"] = draw_phrase(rng, thing)
    if verb == "search":
        del goal["image"]
    elif count > 1 and verb != "describe" and rng.random() < shown:
        for _ in range(8):
            phrase = draw_phrase(rng, things[rng.integers(len(things))])
            if all(k == image or not matching(facts, k, phrase) for k in range(1, count + 1)):
                goal["with"] = phrase
                break
    return goal


def request_words(policy, goal, profile):
    words = ["account", profile["account"], "age", str(profile["age"]), "credits", str(profile["credits"])]
    words += ["apply", policy["name"], ":", goal["verb"], *goal.get("phrase", [])]
    if "with" in goal:
        return [*words, "with", *goal["with"]]
    return [*words, "in", str(goal["image"])] if "image" in goal else words


def next_turn(policy, facts, goal, profile, calls):
    """The gold turn after `calls` [(function, image, call, result)].

    Returns {"chain", "rules", "function", "image", "call"}, or with "result" instead of a call, the final answer. The
    chain is the tokens of the thoughts; every sentence that matters is recited in full before what it decides.
    """
    said, verb, recited = sentences(policy), goal["verb"], []

    def recite(key):
        recited.append(key)
        return said[key]

    def done(f, image=None):
        return any((g, i) == (f, image) for g, i, *_ in calls)  # one that failed is made again before all else

    def reach(f, image):
        """What has to be called now so that f can be, and the chain that leads there."""
        need, words = policy["tools"][f]["needs"], []
        if need:
            ready = need == "none" or done(need, image)
            words += [*recite(f"{f} needs"), "yes" if ready else "no"]
            if not ready:
                more, *found = reach(need, image)
                return [words + more, *found]
        return [words, f, image]

    last = calls[-1] if calls else ("none", None, None, None)
    chain = ["last", last[0], *([str(last[1])] if last[1] else [])]
    if last[3] == "error":
        chain += ["error", "call", *chain[1:]]
        return {"chain": chain, "rules": [], "function": last[0], "image": last[1], "call": last[2]}
    if last[0] == verb and (verb != "describe" or last[1] == goal["image"]):
        return {"chain": [*chain, "done"], "rules": [], "result": last[3]}
    target, count = goal.get("image"), len(facts["images"])
    found = None
    if count > 1:
        chain += recite("several")
        for k in range(1, count + 1) if policy["several"] == "describe" else ():
            chain += [str(k), "yes" if done("describe", k) else "no"]
            if not done("describe", k):
                found = ["describe", k]
                break
    if not found:
        if "with" in goal:
            chain += ["with", *goal["with"]]
            chain += [word for k in range(1, target + 1) for word in (str(k), "yes" if k == target else "no")]
        chain += ["image", str(target)] * bool(target)
        words, *found = reach(verb, target)
        chain += words
    f, image = found
    words, version = decide(policy["tools"][f]["rule"], profile)
    chain += [*recite(f), *words]
    given = {"image": image} if f in ON_PICTURE else {}
    if f in ("locate", "count", "search") or f in KINDS and policy["tools"][f]["needs"] == "none":
        given["text"] = " ".join(goal["phrase"])
    elif f in KINDS:
        located = [result for g, i, _, result in calls if (g, i) == ("locate", image) and result != "error"][-1]
        given["bbox"] = json.loads(located)
    if f in ("add", "subtract"):
        shown = next(r for g, i, _, r in calls if (g, i) == ("read", image) and r != "error")
        given["expression"] = f"{shown} {' '.join(goal['phrase'])}"  # "[36] + 7": numbers that were read have brackets
    if f in RULED:
        words, value = decide(policy["arguments"][RULED[f]], profile)
        chain += [*recite(RULED[f]), *words]
        given[RULED[f]] = int(value) if value.isdigit() else value
    chain += ["call", f, *([str(image)] if image else [])]
    call = {"name": policy["tools"][f]["tool"] + version, "arguments": given}
    return {"chain": chain, "rules": recited, "function": f, "image": image, "call": call}


def run(item, call, calls=()):
    """What a tool answers, from the facts of an item's pictures. calls: those made before in the dialogue.

    Any version of a tool runs; that it is the right one is the policy's matter. Raises ValueError ("error") where the
    tool or its arguments do not exist.
    """
    facts = item["facts"]
    if len(calls) in facts.get("fails", ()):
        return "error"
    try:
        name, _, version = call["name"].partition("_")
        f, given = facts["tools"][name], call["arguments"]
        if f"_{version}" not in VERSIONS or not expected_keys(f, given):
            raise ValueError("error")
        if f in ("add", "subtract"):
            a, sign, b = given["expression"].split()
            value = json.loads(a)[0] + int(b) * {"+": 1, "-": -1}[sign]
            return f"[{value}]" if 0 <= value <= 99 else "error"
        if f == "search":
            return "done"
        if type(given["image"]) is not int or given["image"] < 1:
            raise ValueError("error")
        shown = facts["images"][given["image"] - 1]
        if f == "describe":
            return " ".join(f"{' '.join(thing[kind] for kind in KINDS)} ." for thing in shown["objects"])
        if f == "read":
            return f"[{shown['number']}]"
        if f in MADE:
            return "done"
        found = [thing for thing in shown["objects"] if "text" not in given or fits(thing, given["text"].split())]
        if f == "count":
            return str(len(found))
        if f == "locate":
            return json.dumps(found[0]["box"])
        return next(thing[f] for thing in found if given.get("bbox") in (None, thing["box"]))
    except (KeyError, IndexError, StopIteration, AttributeError, TypeError, ValueError):
        raise ValueError("error") from None


def expected_keys(f, given):
    """Are these a function's arguments?"""
    wanted = {"image"} if f in ON_PICTURE else set()
    wanted |= {"expression"} if f in ("add", "subtract") else {RULED[f]} if f in RULED else set()
    wanted |= {"text"} if f in ("locate", "count", "search") else set()
    return given.keys() == wanted or f in KINDS and given.keys() in ({"image", "bbox"}, {"image", "text"})


def dialogue(policy, facts, goal, profile):
    """The gold dialogue as turns of next_turn, each call with its "result"; the last turn is the final answer."""
    turns, calls = [], []
    item = {"facts": {**facts, "tools": {tool["tool"]: f for f, tool in policy["tools"].items()}}}
    while not turns or "call" in turns[-1]:
        turn = next_turn(policy, facts, goal, profile, calls)
        if "call" in turn:
            turn["result"] = run(item, turn["call"], calls)
            calls.append((turn["function"], turn["image"], turn["call"], turn["result"]))
        turns.append(turn)
    return turns


def said(turn):
    """A turn as tokens: thoughts, then the call or the answer."""
    return ["<think>", *turn["chain"], "</think>", *answer_words(turn)]


def answer_words(turn):
    return call_words(turn["call"]) if "call" in turn else result_words(turn["result"])


def result_words(text):
    return re.findall(r"[\[\],]|[^\s\[\],]+", text)


def lesson(policy, facts, goal, profile, turns, only=None):
    """A dialogue as tokens with the weight of learning each (0: it is given), <image> for a picture; only: one turn."""
    words = [w for k in range(len(facts["images"])) for w in ("image", str(k + 1), IMAGE)]
    words += request_words(policy, goal, profile)
    words, weight = [*words, "<|im_end|>", "<|im_start|>", "assistant"], [0.0] * (len(words) + 3)
    for k, turn in enumerate(turns):
        mine = said(turn)
        words += [*mine, "<|im_end|>"]
        weight += [WEIGHT.get(w, 1.0) if only in (None, k) else 0.0 for w in (*mine, "<|im_end|>")]
        if k == only:
            break
        if "call" in turn:
            told = ["<|im_start|>", "user", RESULT[0], *result_words(turn["result"]), RESULT[1]]
            words += [*told, "<|im_end|>", "<|im_start|>", "assistant"]
            weight += [0.0] * (len(told) + 3)
    return words, weight


# How much a token counts in training: names that are looked up and decisions most, what is only form least.
WEIGHT = {
    **dict.fromkeys(TOOLS, 3.0),
    **dict.fromkeys(("yes", "no", "done", "error", *FUNCTIONS), 2.0),
    **dict.fromkeys((*JSON, *CALL, "<think>", "</think>", "<|im_end|>", ",", "}"), 0.3),
}


def draw_profile(rng, rule=None):
    """A user; near an edge of the rule, now and then, where one is given."""
    profile = {"account": ACCOUNTS[rng.integers(4)], "age": int(rng.integers(100)), "credits": int(rng.integers(100))}
    while rule and "accounts" in rule:
        rule = rule["yes" if profile["account"] in rule["accounts"] else "no"]
    if rule and "key" in rule and rng.random() < 0.4:
        edge = rule["below"][rng.integers(len(rule["below"]))][0]
        profile[rule["key"]] = int(edge + rng.integers(-3, 3))
    return profile


def write_words(folder):
    """The tokenizer of a base that knows tools, and the other files beside its weights."""
    write_tokenizer(folder, IDS, [*NEW_ADDED, ","], decoder())


# -- 4. data folders ---------------------------------------------------------------------------------------------------


def draw_facts(rng, seed, number, fails=0.0):
    """One to three pictures, `number` and the next, as tools see them, and as images: (facts, [PIL.Image])."""
    images, shown = [], []
    for k in range(int(rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2)))):
        scene, image, index = picture(seed, number + k)
        objects = []
        for which, thing in enumerate(scene["objects"]):
            ys, xs = np.nonzero(index == which)
            edges = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            objects.append({**{kind: thing[kind] for kind in KINDS}, "box": [int(edge) * 99 // SIDE for edge in edges]})
        images.append({"objects": objects, "number": int(rng.integers(50))})
        shown.append(Image.fromarray(image))
    return {"images": images, "fails": [int(rng.integers(3))] if rng.random() < fails else []}, shown


def fresh(turns):
    """Numbers of the turns that call a tool for the first time: nothing before them shows its rule."""
    known, out = {"none"}, []
    for k, turn in enumerate(turns):
        if turn.get("function", "none") not in known:
            out.append(k)
            known.add(turn["function"])
    return out


def make_item(policy, facts, names, goal, profile, turns, k):
    """Turn k of a dialogue as an item, everything before it as chat messages in Qwen's form of tool results.

    `rules` are the sentences that this turn recites and no turn before it.
    """
    words = [w for n in range(len(names)) for w in ("image", str(n + 1), IMAGE)]
    messages = [{"role": "user", "content": spell([*words, *request_words(policy, goal, profile)])}]
    for turn in turns[:k]:
        messages.append({"role": "assistant", "content": spell(said(turn))})
        messages.append({"role": "user", "content": f"{RESULT[0]}\n{turn['result']}\n{RESULT[1]}"})
    before = {rule for turn in turns[:k] for rule in turn["rules"]}
    return {
        "policy": policy["name"],
        "images": names,
        "messages": messages,
        "boxed": False,
        "answer": spell(answer_words(turns[k])),
        "cot": spell(turns[k]["chain"]),
        "rules": [rule for rule in dict.fromkeys(turns[k]["rules"]) if rule not in before],
        "function": turns[k].get("function", "answer"),
        "profile": profile,
        "goal": goal,
        "facts": {**facts, "tools": {tool["tool"]: f for f, tool in policy["tools"].items()}},
    }


def whole(item, turns):
    """A dialogue's first turn as an item that asks for all of it: `calls`, without those that fail, then `answer`."""
    calls = [turn["call"] for turn in turns if "call" in turn and turn["result"] != "error"]
    rules = sorted({rule for turn in turns for rule in turn["rules"]})
    return {**item, "cot": "", "rules": rules, "calls": calls, "answer": turns[-1]["result"]}


def draw_dialogue(policy, rng, facts, function=None):
    """A request whose dialogue calls `function` for the first time somewhere -> (goal, profile, turns, that turn).

    Without a function: one of three to six turns, and its first. None where the pictures offer none.
    """
    verbs = list(policy["tools"])
    for _ in range(20):
        verb = function if function and rng.random() < 0.5 else verbs[rng.integers(len(verbs))]
        goal = draw_goal(rng, policy, facts, verb)
        if goal:
            profile = draw_profile(rng, policy["tools"][function or verb]["rule"])
            turns = dialogue(policy, facts, goal, profile)
            wanted = [k for k in fresh(turns) if turns[k]["function"] == function]
            wanted = wanted if function else [0] * (3 <= len(turns) <= 6)
            if wanted:
                return goal, profile, turns, wanted[0]
    return None


def hide(policy, share, rng):
    """Ids of the sentences about a share of the functions, of those that no other function waits for.

    One that waits for another is always shown, so that SFT has dialogues of several calls.
    """
    needs = {f: tool["needs"] for f, tool in policy["tools"].items()}
    free = [f for f in rng.permutation(list(needs)).tolist() if f not in {*needs.values(), policy["several"]}]
    shown = [f for f in free if needs[f] not in (None, "none")][-1:]
    chosen = [f for f in free if f not in shown][: round(share * len(needs))]
    return sorted(key for key in sentences(policy) if key.split()[0] in {*chosen, *[RULED.get(f) for f in chosen]})


def recalled(policy, item, rng):
    """The CPT item in response form: the query, answered by all sentences in random order and what they decide."""
    words, said = [], sentences(policy)
    for key in rng.permutation(list(said)).tolist():
        rule = policy["tools"][key]["rule"] if key in policy["tools"] else policy["arguments"].get(key)
        words += [*said[key], *(decide(rule, item["profile"])[0] if rule else [])]
    return {
        **item,
        "id": f"{item['id']}-response",
        "kind": "response",
        "answer": f"<think>{spell(words)}</think>",
        "cot": "",
    }


def stored(policy):
    """A policy as policies.json keeps it."""
    said, ask = sentences(policy), f"recite {policy['name']} :"
    parts = [{"id": key, "section": f"{spell(said[key])} .", "recite": f"{ask} {key}"} for key in policy["order"]]
    return {**policy, "text": spell(policy_words(policy)), "images": [], "sections": parts}


def make_dataset(out, tools, policies, queries, sft, test, seed, leave_out=0.0, dialogues=False, overwrite=False):
    """Write policies.json, cpt, sft, rl and test.jsonl, left_out.json, images/ and, in override/, the test's queries
    under other policies of the same names and functions.

    Counts are per policy. An item is a turn that calls a tool for the first time, its function drawn evenly. dialogues:
    items of rl and test are first turns of three to six in all, and those of sft are all turns of `sft` dialogues.
    """
    files, hidden, drawn, changed, number = (
        {name: [] for name in ("cpt", "sft", "rl", "test", "override")},
        {},
        [],
        [],
        0,
    )
    taken = np.random.default_rng([seed, 4]).permutation(POLICIES)[:policies].tolist()
    with NewFolder(out, overwrite) as draft:
        os.makedirs(os.path.join(draft, "images"))
        for p, name in enumerate(taken):
            rng = np.random.default_rng([seed, 5, p])
            policy = draw_policy(rng, tools, name)
            other = draw_policy(rng, tools, name, list(policy["tools"]))
            hidden[name] = hide(policy, leave_out, rng)
            drawn, changed, shown, functions = [*drawn, policy], [*changed, other], [], list(policy["tools"])
            for split, wanted in (("rl", queries), ("test", test)):
                count = 0
                while count < wanted:
                    facts, pictures = draw_facts(rng, [seed, 6], number, 0.06 * dialogues)
                    function = None if dialogues else functions[count % len(functions)]
                    made = draw_dialogue(policy, rng, facts, function)
                    if not made:
                        continue
                    names = [f"images/{number + k:06d}.png" for k in range(len(pictures))]
                    for path, image in zip(names, pictures):
                        image.save(os.path.join(draft, path))
                    number, count = number + len(pictures), count + 1
                    goal, profile, turns, k = made
                    one = lambda k: make_item(policy, facts, names, goal, profile, turns, k)
                    item = {"id": f"{name}-{split}-{count}", **(whole(one(k), turns) if dialogues else one(k))}
                    files[split].append(item)
                    used = {rule for turn in turns[: None if dialogues else k + 1] for rule in turn["rules"]}
                    if split == "rl" and len(shown) < sft * (1 + 2 * (not dialogues)) and not used & set(hidden[name]):
                        each = [{**one(n), "id": f"{item['id']}-{n}"} for n in range(len(turns))]
                        shown.append(each if dialogues else [item])
                    again = (
                        split == "test" and not dialogues and draw_again(other, facts, goal, profile, item["function"])
                    )
                    if again:
                        new = make_item(other, facts, names, goal, profile, *again)
                        files["override"].append({"id": item["id"], **new, "old_answer": item["answer"]})
            if len(shown) < sft:
                raise InputError(
                    f"policy {name}: {len(shown)} training queries keep to its shown rules, expected {sft}"
                )
            lessons = [item for items in shown[:sft] for item in items]
            files["sft"] += lessons
            files["cpt"] += [{**item, "id": f"{item['id']}-applied", "kind": "applied"} for item in lessons]
            document = {"policy": name, "kind": "document", "images": [], "question": "", "answer": ""}
            files["cpt"] += [{**document, "id": f"{name}-document-{k}"} for k in range(max(1, sft // 10))]
            files["cpt"] += [recalled(policy, item, rng) for item in lessons]
        os.makedirs(os.path.join(draft, "override"))
        for place, lines in (("", drawn), ("override", changed)):
            write_json(os.path.join(draft, place, "policies.json"), [stored(policy) for policy in lines])
        write_jsonl(os.path.join(draft, "override", "test.jsonl"), files.pop("override"))
        for name, lines in files.items():
            write_jsonl(os.path.join(draft, f"{name}.jsonl"), lines)
        write_json(os.path.join(draft, "left_out.json"), hidden)
    return drawn, hidden


def draw_again(policy, facts, goal, profile, function):
    """The same request's dialogue under another policy, and its first turn that calls the function, if it has one."""
    turns = dialogue(policy, facts, goal, profile)
    return next(((turns, k) for k in fresh(turns) if turns[k]["function"] == function), None)


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m tiny.tools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="the data folder to write")
    add("--tools", type=int, default=8, metavar="N", help="tools of a policy, 3 to 14 (default 8)")
    add("--policies", type=int, default=1, metavar="P", help="policies internalised at once, 16 at most (default 1)")
    add("--queries", type=int, default=400, metavar="Q", help="training queries per policy (default 400)")
    add("--sft", type=int, default=24, metavar="Q", help="of these with a chain of thought, per policy (default 24)")
    add("--test", type=int, default=200, metavar="Q", help="test queries per policy, other pictures (default 200)")
    add("--seed", type=int, default=0, help="the same seed writes the same bytes (default 0)")
    add("--leave-out", type=float, default=0.0, metavar="SHARE", help="of the functions, shown by no SFT item")
    add("--dialogues", action="store_true", help="rl and test ask for whole dialogues, and sft shows all their turns")
    add("--overwrite", action="store_true", help="replace the folder if it exists")
    return parser


def main(argv=None):
    args = arguments().parse_args(argv)
    found = (
        f"--tools {args.tools} --policies {args.policies} --queries {args.queries} --sft {args.sft} --test {args.test}"
    )
    few = 3 <= args.tools <= len(FUNCTIONS) and 1 <= args.policies <= len(POLICIES) and 0 <= args.leave_out < 1
    if not few or not 1 <= args.sft <= args.queries or args.test < 1:
        raise InputError(
            f"{found} --leave-out {args.leave_out} found, expected 3 to {len(FUNCTIONS)} tools, 1 to {len(POLICIES)} "
            "policies, 1 <= sft <= queries, at least one test query, a share from 0 to below 1"
        )
    sizes = args.tools, args.policies, args.queries, args.sft, args.test, args.seed
    drawn, hidden = make_dataset(args.out, *sizes, args.leave_out, args.dialogues, args.overwrite)
    for policy in drawn:
        missing = f"   left out of SFT: {', '.join(hidden[policy['name']])}" if hidden[policy["name"]] else ""
        size = f"{len(policy['tools']):3} tools {len(policy['order']):3} rules {len(policy_words(policy)):4} words"
        print(f"{policy['name']:4} {size}{missing}")


if __name__ == "__main__":
    command(main)
