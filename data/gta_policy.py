"""GTAPolicy: tool calls under a long policy, from the official GTA folder or from a set of our own with drawn pictures.

    python -m data.gta_policy --out DIR --seed 0                        our own set
    python -m data.gta_policy --out DIR --seed 0 --gta-root gta_dataset the official one

Every step of a dialogue is one item: pictures, a made-up profile, the request, the calls so far with their results; the
answer is the next call as JSON. DIR gets policies.json, the four JSONL files, image/, and the dialogues in the official
layout (dataset.json, toolmeta.json). DIR/override is a data folder of its own: the same name, other version rules.
"""

import argparse
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field

from tokenizers import Regex, pre_tokenizers

from data import InputError, command, open_text
from data.clevr_policy import NewFolder, write_json, write_jsonl
from data.dataset import picture_path
from data.gta_draw import COLORS, draw, plural
from data.gta_rules import (
    NAME,
    TOOLS,
    VERSIONS,
    bare_name,
    changed_versions,
    failed,
    full_name,
    next_step,
    open_ended,
    policy,
    version_reason,
)
from data.gta_score import evaluate

ALBUMS, ALBUM = 11, ("receipt", "receipt", "scene", "scene", "prices", "chart", "sign", "formula")
TEST_SHARE = 106 / 557  # the paper's split of the official set
FAILURES = 0.06  # share of calls that fail once
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass
class Dialogue:
    """A request with everything that happened: `turns` are ("user", text), ("assistant", text) and
    ("call", call, result, thought), calls with the versions of the profile."""

    key: str
    pictures: list
    profile: dict
    turns: list = field(default_factory=list)
    wants: list = None  # what the request asks for; unknown (None) in official dialogues

    def history(self):
        return [{"call": turn[1], "result": turn[2]} for turn in self.turns if turn[0] == "call"]


# -- 1. profiles and tokens --------------------------------------------------------------------------------------------


def made_up_profile(seed, key):
    """The user of dialogue `key`; every fourth value stands at an edge of the version rules."""
    rng = random.Random(f"profile-{seed}-{key}")
    edge = lambda values, low, high: rng.choice(values) if rng.random() < 0.25 else rng.randint(low, high)
    return {
        "account_type": rng.choice("ABCD"),
        "age": edge([20, 21, 59, 60], 12, 85),
        "credits": edge([249, 250, 251, 499, 500, 501, 749, 750, 751], 0, 1000),
        "member_since": rng.randint(2009, 2025),
        "language": rng.choice(["English", "German", "Spanish", "Hindi"]),
    }


def least_tokens(text):
    """How many tokens Qwen's tokenizer makes of a text at the least: the pieces of its pre-tokenizer never merge."""
    return len(pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated").pre_tokenize_str(text))


# -- 2. our own requests -----------------------------------------------------------------------------------------------
# Each maker gets a random.Random, the picture's file name and its facts, and returns (wordings, wants).

CORNERS = {
    "top left": "lt",
    "top right": "rt",
    "bottom left": "lb",
    "bottom right": "rb",
    "top middle": "mt",
    "bottom middle": "mb",
    "left middle": "lm",
    "right middle": "rm",
}
MANNERS = (
    "turn it into a watercolour",
    "make it look like a pencil sketch",
    "make it look like a mosaic",
    "turn it into a woodcut",
    "make it look like pixel art",
    "turn it into a chalk drawing",
)


def read_total(rng, name, p):
    item, other = rng.sample(list(p.facts["prices"]), 2)
    sums = [
        ("{0} and {1} together", "[0] + [1]"),
        ("three {0} and one {1}", "3 * [0] + [1]"),
        ("two of each, {0} and {1}", "2 * [0] + 2 * [1]"),
    ]
    words, expression = rng.choice(sums)
    return (
        [f"What do I pay for {words.format(item, other)}?", f"How much would {words.format(item, other)} cost here?"],
        [
            {"want": "text", "image": name},
            {"want": "compute", "expression": expression, "slots": [({"image": name}, item), ({"image": name}, other)]},
        ],
    )


def tip(rng, name, p):
    share = rng.choice([5, 8, 10, 12, 15])
    return (
        [
            f"I want to leave a tip of {share} percent on the total. How much is that?",
            f"How many euros are {share} % of the total of this bill?",
        ],
        [
            {"want": "text", "image": name},
            {"want": "compute", "expression": f"[0] * {share} / 100", "slots": [({"image": name}, "Total")]},
        ],
    )


def split_bill(rng, name, p):
    people = rng.randint(2, 6)
    return (
        [
            f"{people} of us share this bill. What does each one pay?",
            f"Split the total evenly between {people} people, please.",
        ],
        [
            {"want": "text", "image": name},
            {"want": "compute", "expression": f"[0] / {people}", "slots": [({"image": name}, "Total")]},
        ],
    )


def transcribe(rng, name, p):
    wordings = [
        "Please type out everything that is written here.",
        "What is written in the picture? I need it as text.",
    ]
    return wordings, [{"want": "text", "image": name}]


def chart_of(rng, name, p):
    labels = list(p.facts["prices"] if "prices" in p.facts else p.facts["values"])
    chart = rng.choice([None, None, "line", "pie"])
    want = {"want": "plot", "image": name, "labels": labels, **({"kind": chart} if chart else {})}
    what = "single prices, without the total" if "total" in p.facts else "numbers in the picture"
    chart = f"{chart} chart" if chart else "chart"
    return (
        [f"Make a {chart} of the {what}.", f"Draw a {chart} of the {what}, in the same order."],
        [{"want": "text", "image": name}, want],
    )


def chart_gap(rng, name, p):
    first, second = rng.sample(list(p.facts["values"]), 2)
    words, expression = rng.choice(
        [
            ("sum of {0} and {1}", "[0] + [1]"),
            ("mean of {0} and {1}", "([0] + [1]) / 2"),
            ("product of {0} and {1}", "[0] * [1]"),
        ]
    )
    return (
        [
            f"What is the {words.format(first, second)} in this chart?",
            f"Work out the {words.format(first, second)} from the diagram.",
        ],
        [
            {"want": "text", "image": name},
            {
                "want": "compute",
                "expression": expression,
                "slots": [({"image": name}, first), ({"image": name}, second)],
            },
        ],
    )


def describe(rng, name, p):
    wordings = ["What does the picture show?", "Describe this picture for somebody who cannot see it."]
    return wordings, [{"want": "content", "image": name}]


def count(rng, name, p):
    kind = rng.choice([kind for kind, n in p.facts["counts"].items() if n > 1])
    wordings = [f"How many {plural(kind)} are there?", f"Count the {plural(kind)}, please."]
    return wordings, [{"want": "count", "image": name, "object": kind}]


def count_price(rng, name, p):
    kind = rng.choice([kind for kind, n in p.facts["counts"].items() if n > 1])
    cents = rng.randrange(105, 995, 5)
    return (
        [
            f"Each {kind} costs {cents / 100:.2f}. What do all the {plural(kind)} cost together?",
            f"I sell every {kind} in the picture for {cents / 100:.2f}. How much do I take?",
        ],
        [
            {"want": "count", "image": name, "object": kind},
            {
                "want": "compute",
                "expression": f"{cents / 100:.2f} * [0]",
                "slots": [({"want": "count", "image": name, "object": kind}, None)],
            },
        ],
    )


def colour_of(rng, name, p):
    kind = p.facts["single"]
    attribute, verb = rng.choice([("colour", "is"), ("colour", "is"), ("condition", "does")])
    return (
        [
            f"What {attribute} {verb} the {kind}{' have' if verb == 'does' else ''}?",
            f"Tell me the {attribute} of the {kind}.",
        ],
        [{"want": "attribute", "image": name, "object": kind, "attribute": attribute}],
    )


def locate(rng, name, p):
    kind = rng.choice([kind for kind, n in p.facts["counts"].items() if n > 1])
    many = plural(kind)
    wordings = [f"Where are the {many}? I need all their positions.", f"Give me the boxes of all {many}."]
    return wordings, [{"want": "locate", "image": name, "object": kind}]


def mark(rng, name, p):
    kind = p.facts["single"]
    label = rng.choice([None, "here", f"my {kind}", "sold"])
    tail = f' and label it "{label}"' if label else ""
    return (
        [f"Put a frame around the {kind}{tail}.", f"Draw a box round the {kind}{tail}, please."],
        [{"want": "mark", "image": name, "object": kind, **({"label": label} if label else {})}],
    )


def restyle(rng, name, p):
    manner = rng.choice(MANNERS)
    wordings = [f"Please {manner}.", f"Take this picture and {manner}."]
    return wordings, [{"want": "restyle", "image": name, "instruction": manner}]


def caption(rng, name, p):
    corner, color = rng.choice(list(CORNERS)), rng.choice([None, None, *COLORS])
    line = rng.choice(["Sunday", "For Ana", "Page 3", "Draft", "Summer fair", "Checked"])
    tail = f" in {color}" if color else ""
    want = {
        "want": "caption",
        "image": name,
        "text": line,
        "position": CORNERS[corner],
        **({"color": color} if color else {}),
    }
    return [f'Write "{line}" at the {corner}{tail}.', f'Add the words "{line}"{tail}, placed {corner}.'], [want]


def solve(rng, name, p):
    unknown = p.facts["unknown"]
    wordings = [f"Solve this for {unknown}.", f"Which {unknown} satisfies the equation?"]
    return wordings, [{"want": "solve", "image": name}]


def latex(rng, name, p):
    wordings = ["Give me the LaTeX of what is on the board.", "I want to paste this equation into my notes as LaTeX."]
    return wordings, [{"want": "formula", "image": name}]


def look_up(rng, name, p):
    title = p.facts["title"]
    asked, query, wide = rng.choice(
        [
            ("When was this place founded", f"{title} founding year", False),
            ("Which town is this in", f"{title} town", False),
            ("What do visitors think of this place", f"{title} reviews", True),
            ("Any advice for a visit here", f"{title} visit tips", True),
        ]
    )
    return (
        [f"{asked}? Its name is in the picture.", f"Read the name at the top first: {asked[0].lower() + asked[1:]}?"],
        [{"want": "text", "image": name}, {"want": "search", "query": query, "open": wide}],
    )


MAKERS = {
    "receipt": (read_total, tip, split_bill, transcribe, chart_of),
    "prices": (read_total, chart_of, transcribe, look_up),
    "chart": (chart_gap, chart_of, describe, transcribe),
    "sign": (transcribe, look_up, restyle, describe, caption),
    "formula": (solve, latex, solve, caption),
    "scene": (count, count_price, colour_of, locate, mark, restyle, caption, describe),
}


def compare_bills(rng, names, pictures):
    (a, b) = names
    words, expression = rng.choice(
        [
            ("What do both bills come to together?", "[0] + [1]"),
            ("What is the mean of the two totals?", "([0] + [1]) / 2"),
        ]
    )
    return [words], [
        {"want": "text", "image": a},
        {"want": "text", "image": b},
        {"want": "compute", "expression": expression, "slots": [({"image": a}, "Total"), ({"image": b}, "Total")]},
    ]


def count_both(rng, names, pictures):
    shared = [kind for kind in pictures[0].facts["counts"] if kind in pictures[1].facts["counts"]]
    kinds = [shared[0]] * 2 if shared else [rng.choice(list(p.facts["counts"])) for p in pictures]
    sources = [{"want": "count", "image": name, "object": kind} for name, kind in zip(names, kinds)]
    first, second = map(plural, kinds)
    what = f"{first} in both pictures" if shared else f"{first} in the first and {second} in the second picture"
    return (
        [f"How many are there altogether, {what}?"],
        [*sources, {"want": "compute", "expression": "[0] + [1]", "slots": [(source, None) for source in sources]}],
    )


def restyle_second(rng, names, pictures):
    manner = rng.choice(MANNERS)
    wordings = [f"Take the second of these pictures and {manner}."]
    return wordings, [{"want": "restyle", "image": names[-1], "instruction": manner}]


def read_first(rng, names, pictures):
    return ["Please type out what is written in the first picture."], [{"want": "text", "image": names[0]}]


TOGETHER = (
    (("receipt", "receipt"), compare_bills),
    (("scene", "scene"), count_both),
    (("sign", "scene"), restyle_second),
    (("prices", "chart", "sign"), read_first),
    (("chart", "scene"), restyle_second),
)
NEW_PICTURES = (
    "a lighthouse, evening, calm sea",
    "two foxes, snow, birch trees",
    "a red tram, rainy street, night",
    "a tea house, garden, spring",
    "an old globe, desk, warm light",
    "a rowing boat, reeds, morning mist",
    "a market stall, pumpkins, autumn",
    "a paper crane, blue table",
    "a castle, hill, storm clouds",
    "three kites, beach, wind",
    "a cat, window, winter",
)
QUESTIONS = (
    ("Who designed the Sydney Opera House?", "Sydney Opera House architect", False),
    ("Give me ideas for a rainy day with children.", "ideas rainy day with children", True),
    ("How high is Mont Blanc?", "Mont Blanc height", False),
    ("I need advice on growing tomatoes on a balcony.", "advice growing tomatoes balcony", True),
    ("In which year did the Titanic sink?", "Titanic sinking year", False),
    ("How do I get wax out of a tablecloth?", "how to remove wax from tablecloth", True),
    ("What is the capital of Bhutan?", "capital of Bhutan", False),
    ("Which recipes use up stale bread?", "recipes for stale bread", True),
    ("When did the Berlin Wall fall?", "Berlin Wall fall date", False),
    ("Recommend walks near a lake for beginners.", "recommended lake walks for beginners", True),
    ("How long is the river Nile?", "Nile length", False),
)


def answer(call, pictures, rng):
    """What a tool returns, told from the facts of the drawn pictures {file name: Picture}."""
    tool, given = bare_name(call["name"]), call["arguments"]
    picture = pictures.get(given.get("image"))
    if tool == "ImageDescription":
        return picture.about
    if tool == "OCR":
        return "\n".join(f"{_box(box)} {line}" for box, line in picture.texts)
    if tool == "MathOCR":
        return picture.facts["latex"]
    if tool == "CountGivenObject":
        return str(sum(thing["kind"] == given["text"] for thing in picture.objects))
    if tool == "TextToBbox":
        boxes = [thing["box"] for thing in picture.objects if thing["kind"] == given["text"]]
        boxes = boxes[:1] if given["top1"] else boxes
        return "\n".join(f"{_box(box)}, score {92 - 3 * k}" for k, box in enumerate(boxes))
    if tool == "RegionAttributeDescription":
        thing = next(thing for thing in picture.objects if _box(thing["box"]) == given["bbox"])
        return thing["color"] if given["attribute"] == "colour" else "as good as new"
    if tool == "Calculator":
        return f"{evaluate(given['expression']):.10g}"
    if tool == "Solver":
        return next(p.facts["solution"] for p in pictures.values() if p.facts.get("equation", "?") in given["command"])
    if tool == "GoogleSearch":
        return f"{given['k']} page{'s' if given['k'] > 1 else ''} on {given['query']}"
    return f"image/made_{rng.randrange(10**6):06d}.png"


def _box(box):
    return f"({', '.join(map(str, box))})"


def play(key, names, pictures, words, wants, rng, profile):
    """A whole dialogue: the engine makes each call, the simulated tools answer, some calls fail once."""
    dialogue = Dialogue(key, list(names), profile, [("user", words)], wants)
    while step := next_step(wants, names, dialogue.profile, dialogue.history()):
        again = any(failed(entry["result"]) for entry in dialogue.history()[-1:])
        breaks = not again and rng.random() < FAILURES
        result = "Error: the tool did not answer in time" if breaks else answer(step.call, pictures, rng)
        dialogue.turns.append(("call", step.call, result, " ".join(step.why)))
    dialogue.turns.append(("assistant", f"Here is the result: {dialogue.history()[-1]['result'].splitlines()[0]}"))
    return dialogue


def own_dialogues(seed):
    """Our own requests on pictures drawn for them -> ([Dialogue], {file name: Picture}); albums share no picture."""
    dialogues, everything, drawn = [], {}, set()
    for album in range(ALBUMS):
        rng = random.Random(f"gta-{seed}-{album}")
        pictures = {}
        for family in ALBUM:
            picture = draw(family, rng)
            while picture.image.tobytes() in drawn:
                picture = draw(family, rng)
            drawn.add(picture.image.tobytes())
            name = f"image/image_{len(everything) + 1}.png"
            pictures[name] = everything[name] = picture
        requests = []
        scenic = rng.sample(MAKERS["scene"], 8)  # shared out between the two scenes: every album asks for every tool
        for name, picture in pictures.items():
            scene = picture.family == "scene"
            for make in [scenic.pop() for _ in range(4)] if scene else rng.sample(MAKERS[picture.family], 2):
                requests.append(([name], *make(rng, name, picture)))
        for families, make in TOGETHER:
            names = [next(n for n, p in pictures.items() if p.family == f) for f in families]
            if families[0] == families[1]:
                names = [n for n, p in pictures.items() if p.family == families[0]]
            requests.append((names, *make(rng, names, [pictures[n] for n in names])))
        keywords, (question, query, wide) = NEW_PICTURES[album], QUESTIONS[album]
        requests.append(([], [f"Paint me a picture: {keywords}."], [{"want": "picture", "keywords": keywords}]))
        requests.append(([], [question], [{"want": "search", "query": query, "open": wide}]))
        for names, wordings, wants in requests:
            key = str(len(dialogues))
            dialogues.append(play(key, names, pictures, rng.choice(wordings), wants, rng, made_up_profile(seed, key)))
    return dialogues, everything


# -- 3. the official layout --------------------------------------------------------------------------------------------


def to_official(dialogues):
    """Dialogues as (dataset.json, toolmeta.json) of the official folder: tools without versions, no profiles."""
    meta = {
        tool: {
            "name": tool,
            "description": purpose,
            "outputs": [],
            "inputs": [
                {"type": kind.rstrip("?"), "name": name, "description": holds, "optional": kind.endswith("?")}
                for name, (kind, holds) in given.items()
            ],
        }
        for tool, (purpose, given, _) in TOOLS.items()
    }
    dataset = {}
    for number, dialogue in enumerate(dialogues):
        lines, used = [], []
        for turn in dialogue.turns:
            if turn[0] != "call":
                lines.append({"role": turn[0], "content": turn[1]})
                continue
            _, call, result, thought = turn
            used.append(bare_name(call["name"]))
            function = {"name": used[-1], "arguments": call["arguments"]}
            lines.append(
                {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], "thought": thought}
            )
            lines.append({"role": "tool", "name": used[-1], "content": {"type": "text", "content": result}})
        dataset[str(number)] = {
            "tools": [meta[tool] for tool in dict.fromkeys(used)],
            "files": [{"type": "image", "path": name, "url": ""} for name in dialogue.pictures],
            "dialogs": lines,
            "gt_answer": {"whitelist": [], "blacklist": None},
        }
    return dataset, meta


def read_official(folder, seed):
    """The dialogues of an official GTA folder, with made-up profiles and the versions that these get.

    A call's result is what the next tool message of its name says; a picture as result is its file name. k of
    GoogleSearch becomes 1 or 4 by Rule 19. Raises InputError naming file, dialogue and message.
    """
    path = os.path.join(folder, "dataset.json")
    try:
        with open_text(path) as file:
            dataset = json.load(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected the official gta_dataset folder") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(dataset, dict) or not dataset:
        raise InputError(f"{path}: {type(dataset).__name__} found, expected an object of dialogues")
    return [read_dialogue(folder, path, key, entry, seed) for key, entry in dataset.items()]


def _take(entry, key, kind, where):
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        there = isinstance(entry, dict) and key in entry
        found = f"{type(entry[key]).__name__} under {key!r}" if there else f"no key {key!r}"
        raise InputError(f"{where}: {found} found, expected {key!r} to hold {kind.__name__}")
    return entry[key]


def read_dialogue(folder, path, key, entry, seed):
    """One dialogue of dataset.json as a Dialogue; see read_official."""
    where = f"{path}: dialogue {key!r}"
    pictures = [_take(file, "path", str, f"{where}: files") for file in _take(entry, "files", list, where)]
    for name in pictures:
        picture_path(folder, name, where)
    dialogue = Dialogue(key, pictures, made_up_profile(seed, key))
    waiting = []  # calls whose result has not come
    for number, message in enumerate(_take(entry, "dialogs", list, where)):
        at = f"{where}: message {number}"
        role = _take(message, "role", str, at)
        if role == "tool":
            name = bare_name(_take(message, "name", str, at))
            turn = next((turn for turn in waiting if bare_name(turn[1]["name"]) == name), None)
            if turn is None:
                raise InputError(f"{at}: a result of {name!r} found, expected one of a call before it")
            turn[2] = result_text(_take(message, "content", dict, at), at)
            waiting.remove(turn)
        elif role == "assistant" and message.get("tool_calls"):
            for call in _take(message, "tool_calls", list, at):
                function = _take(call, "function", dict, at)
                broke = f"Error: {call['error']}" if call.get("error") else ""
                turn = ["call", official_call(function, dialogue.profile, at), broke, str(message.get("thought") or "")]
                waiting.append(turn)
                dialogue.turns.append(turn)
        elif role in ("user", "assistant"):
            dialogue.turns.append((role, str(message.get("content") or "")))
        else:
            raise InputError(f"{at}: role {role!r} found, expected user, assistant or tool")
    if not dialogue.turns or dialogue.turns[0][0] != "user":
        raise InputError(f"{where}: expected a dialogue that begins with the user's request")
    return dialogue


def official_call(function, profile, where):
    """A call of the official layout under the policy: its version by the profile, k by Rule 19, boxes by Rule 18."""
    name, given = _take(function, "name", str, where), function.get("arguments", {})
    try:  # some exports hold the arguments as JSON text
        given = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise InputError(f"{where}: arguments of {name!r} are not JSON ({error})") from None
    if name not in TOOLS or not isinstance(given, dict):
        raise InputError(
            f"{where}: call of {name!r} with {type(given).__name__} found, expected a tool of the policy "
            f"with an object: {', '.join(TOOLS)}"
        )
    given = dict(given)
    if name == "GoogleSearch":
        given["k"] = 4 if open_ended(str(given.get("query", ""))) else 1
    return {"name": full_name(name, profile), "arguments": given}


def result_text(content, where):
    """A tool message's content {"type", "content"} as text; a result of type "error" begins with Error."""
    kind, value = str(content.get("type", "text")), content.get("content", content.get("msg", ""))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"Error: {text}" if "error" in kind.lower() and not failed(text) else text


# -- 4. items ----------------------------------------------------------------------------------------------------------

ASK = (
    "Give the next tool call only. Think inside <think></think>, then write the call as one JSON object with the "
    "keys name and arguments inside \\boxed{}."
)


def call_text(call):
    """A call as JSON that fits into \\boxed{...}: braces inside its strings are escaped unless they balance."""
    text = json.dumps(call, ensure_ascii=False)
    depths, depth = [], 0
    for letter in text:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        depths.append(depth)
    if min(depths[:-1]) > 0 and depth == 0 and "\\boxed" not in text:
        return text
    marks = {"{": "\ue000", "}": "\ue001", "\\boxed": "\ue002boxed"}

    def hide(value):
        if isinstance(value, str):
            for mark, stand_in in marks.items():
                value = value.replace(mark, stand_in)
            return value
        if isinstance(value, dict):
            return {key: hide(entry) for key, entry in value.items()}
        return [hide(entry) for entry in value] if isinstance(value, list) else value

    text = json.dumps(hide(call), ensure_ascii=False)
    return text.replace("\ue000", "\\u007b").replace("\ue001", "\\u007d").replace("\ue002", "\\u005c")


def question(dialogue, turns):
    """What the model is asked after `turns`: policy's name, profile, pictures' names, the conversation so far."""
    profile = ", ".join(f"{key} {value}" for key, value in dialogue.profile.items())
    lines = [
        f"Policy {NAME} applies.",
        f"User profile: {profile}",
        f"Pictures: {', '.join(dialogue.pictures) or 'none'}",
    ]
    step = 0
    for turn in turns:
        if turn[0] == "call":
            step += 1
            lines += [f"Call {step}: {call_text(turn[1])}", f"Result {step}: {turn[2]}"]
        else:
            lines.append(f"{turn[0].capitalize()}: {turn[1]}")
    return "\n".join([*lines, "", ASK])


def make_items(dialogue):
    """One item for each call of a dialogue, with everything before it as history.

    A call whose result is an error stays an item (the call was right, the tool was not) and is marked `failed`.
    """
    items = []
    for k, turn in enumerate(dialogue.turns):
        if turn[0] != "call":
            continue
        _, call, result, thought = turn
        before = dialogue.turns[:k]
        history = [{"call": old[1], "result": old[2]} for old in before if old[0] == "call"]
        why = version_reason(bare_name(call["name"]), dialogue.profile, VERSIONS)
        if why not in thought and not (history and failed(history[-1]["result"])):  # an official thought
            thought = f"{thought} {why}".strip()
        item = {
            "id": f"{NAME}-{dialogue.key}-{len(history)}",
            "policy": NAME,
            "scene": (dialogue.pictures or [""])[0],
            "images": dialogue.pictures,
            "question": question(dialogue, before),
            "answer": call_text(call),
            "path": [],
            "cot": thought,
            "profile": dialogue.profile,
            "history": history,
            "dialogue": dialogue.key,
        }
        if not dialogue.pictures:
            del item["scene"]
        if failed(result):
            item["failed"] = True
        items.append(item)
    return items


def split(dialogues, seed, share=TEST_SHARE):
    """(training, test) dialogues: those that share a picture stay together; the test half has `share` of the calls."""
    group = {}  # picture or dialogue -> representative

    def root(key):
        while group.setdefault(key, key) != key:
            key = group[key]
        return key

    for dialogue in dialogues:
        for name in dialogue.pictures:
            group[root(("picture", name))] = root(("dialogue", dialogue.key))
    members = {}
    for dialogue in dialogues:
        members.setdefault(root(("dialogue", dialogue.key)), []).append(dialogue)
    order = list(members.values())
    random.Random(f"split-{seed}").shuffle(order)
    wanted, test, calls = share * sum(len(d.history()) for d in dialogues), set(), 0
    for part in order:
        size = sum(len(d.history()) for d in part)
        if abs(calls + size - wanted) < abs(calls - wanted):
            test |= {d.key for d in part}
            calls += size
    return [d for d in dialogues if d.key not in test], [d for d in dialogues if d.key in test]


# -- 5. override -------------------------------------------------------------------------------------------------------


def under(dialogue, versions):
    """The same dialogue under other version rules: every call renamed, nothing else."""
    rename = lambda call: {**call, "name": full_name(bare_name(call["name"]), dialogue.profile, versions)}
    turns = [("call", rename(turn[1]), turn[2], "") if turn[0] == "call" else turn for turn in dialogue.turns]
    return Dialogue(dialogue.key, dialogue.pictures, dialogue.profile, turns)


def override_items(dialogues, versions):
    """Items under changed version rules whose answer differs from the old one, kept beside it as `old_answer`."""
    items = []
    for dialogue in dialogues:
        old = make_items(dialogue)
        for item, was in zip(make_items(under(dialogue, versions)), old):
            if item["answer"] != was["answer"]:
                del item["cot"]
                items.append({**item, "id": f"{item['id']}-override", "old_answer": was["answer"]})
    return items


# -- 6. the data folder ------------------------------------------------------------------------------------------------


def make_dataset(out, seed, gta_root=None, overwrite=False):
    """Write the whole data folder; returns figures for a report. See the module's docstring; raises InputError."""
    drawn, place_for_it = {}, NewFolder(out, overwrite)  # refuses a taken place before any work
    if gta_root:
        dialogues = read_official(gta_root, seed)
    else:
        dialogues, drawn = own_dialogues(seed)
    train, test = split(dialogues, seed)
    train_items, test_items = ([item for d in half for item in make_items(d)] for half in (train, test))
    if not train_items or not test_items:
        raise InputError(
            f"{gta_root}: {len(train_items)} training and {len(test_items)} test items found, expected some of each"
        )
    document = {
        "id": f"{NAME}-document",
        "policy": NAME,
        "kind": "document",
        "images": [],
        "question": "",
        "answer": "",
    }
    versions = changed_versions(random.Random(f"override-{seed}"))
    renewed = override_items(test, versions)
    with place_for_it as draft:

        def place(names, folder):
            for name in sorted(set(names)):
                os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
                if name in drawn:
                    drawn[name].image.save(os.path.join(folder, name))
                else:
                    shutil.copyfile(picture_path(gta_root, name, gta_root), os.path.join(folder, name))

        place([name for d in dialogues for name in d.pictures], draft)
        write_json(os.path.join(draft, "policies.json"), [policy()])
        applied = [{**item, "kind": "applied"} for item in train_items]
        write_jsonl(os.path.join(draft, "cpt.jsonl"), [*applied, document])
        for name, items in (("sft", train_items), ("rl", train_items), ("test", test_items)):
            write_jsonl(os.path.join(draft, f"{name}.jsonl"), items)
        if not gta_root:
            dataset, meta = to_official(dialogues)
            write_json(os.path.join(draft, "dataset.json"), dataset)
            write_json(os.path.join(draft, "toolmeta.json"), meta)
            facts = {
                name: {"family": p.family, "about": p.about, "texts": p.texts, "objects": p.objects, "facts": p.facts}
                for name, p in drawn.items()
            }
            write_json(os.path.join(draft, "pictures.json"), facts)
        place([name for item in renewed for name in item["images"]], os.path.join(draft, "override"))
        os.makedirs(os.path.join(draft, "override"), exist_ok=True)
        write_json(os.path.join(draft, "override", "policies.json"), [policy(versions, updated=True)])
        write_jsonl(os.path.join(draft, "override", "test.jsonl"), renewed)
    answers = Counter(json.loads(item["answer"])["name"] for item in test_items)
    return {
        "dialogues": len(dialogues),
        "pictures": len({name for d in dialogues for name in d.pictures}),
        "train": len(train_items),
        "test": len(test_items),
        "override": len(renewed),
        "tokens": least_tokens(policy()["text"]),
        "tools": len({bare_name(turn[1]["name"]) for d in dialogues for turn in d.turns if turn[0] == "call"}),
        "most frequent": max(answers.values()) / len(test_items),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.gta_policy", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="the data folder to write; must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, requests, profiles and split (default 0)")
    parser.add_argument("--gta-root", metavar="FOLDER", help="official gta_dataset folder (default: our own set)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    report = make_dataset(args.out, args.seed, args.gta_root, args.overwrite)
    print(
        f"{args.out}: {report['dialogues']} dialogues over {report['pictures']} pictures, {report['tools']} tools; "
        f"{report['train']} training and {report['test']} test items, {report['override']} under changed rules; "
        f"policy of at least {report['tokens']} Qwen tokens; most frequent tool {report['most frequent']:.3f} of "
        f"the test items"
    )


if __name__ == "__main__":
    command(main)
