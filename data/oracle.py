"""An agent that reads a policy's text as a person would, and the table of what our policies are.

    python -m data.oracle DIR ...                 check data folders: the agent's answers against the items'
    python -m data.oracle --table benchmarks/results/policies.md

The agent parses the sentences of the text and looks at a scene graph, objects and places; it knows neither the tree
nor the functional programs. With the right scene it must be right always, with a wrong one it falls to chance.
"""

import argparse
import re

import numpy as np

from data import InputError, check_file, command, write_text
from data.clevr import ATTRIBUTES, SceneTable
from data.clevr_policy import FEW, build_policy, choose, figures, make_items, read_clevr, route, sample_scenes
from data.dataset import IMAGE, load_items, load_policies
from data.prose import NOUNS, Prose

WORDS = {value: (name, value) for name, values in ATTRIBUTES.items() for value in values}
WORDS |= {plural: ("shape", shape) for shape, plural in NOUNS.items()}
SIDES = {"to the left of": "left", "to the right of": "right", "behind": "behind", "in front of": "front"}
SIDE = "(to the left of|to the right of|behind|in front of)"


class Agent:
    """Reads one policy: Agent(text, shown).answer(scene) -> (response, [(section, answer), ...]).

    text: the policy as written; shown: for each <image> what the picture shows, {"color": "red", ...}.
    """

    def __init__(self, text, shown=()):
        pictures = iter(shown)
        text = re.sub(re.escape(IMAGE), lambda _: "<" + ",".join(next(pictures).values()) + ">", text)
        self.start = re.search(r"Start at (Condition [\d.]*\d)", text).group(1)
        self.sections = {}
        for part in text.split("\n\n"):
            name, *lines = part.split("\n")
            if re.fullmatch(r"Condition [\d.]*\d", name):
                rules = [
                    re.fullmatch(
                        r"- If (?:the answer is )?(.*?), [a-z ]*?((?:Condition|Case) [\d.]*\d)\.", line
                    ).groups()
                    for line in lines[1:]
                ]
                self.sections[name] = (lines[0], rules)

    def answer(self, scene):
        section, found, way = self.start, None, []
        while section in self.sections:
            question, rules = self.sections[section]
            said, found = ask(question, scene, found)
            way.append((section, said))
            section = next((go for answers, go in rules if covers(answers, said)), None)
        return section, way


def covers(answers, said):
    """Whether "0, 2 or more" speaks of 3."""
    for part in re.split(r", | or (?!more)", answers):
        if part == said or part.endswith(" or more") and said.isdigit() and int(said) >= int(part.split()[0]):
            return True
    return False


def kinds(words, objects):
    """The objects that a noun phrase names, of those given: "small cubes", "objects of the same color as ... <red>"."""
    wanted = dict(WORDS[w] for w in re.findall(r"[a-z]+", re.sub(r"of the same.*", "", words)) if w in WORDS)
    for name, value in re.findall(r"of the same (\w+) as the object in <(\w+)>", words):
        wanted[name] = value
    return [o for o in objects if all(o[name] == value for name, value in wanted.items())]


def lies(one, side, other, scene):
    """Whether `one` lies on that side of the other, by the places of both."""
    way = scene["directions"][side]
    return sum((p - q) * d for p, q, d in zip(one["3d_coords"], other["3d_coords"], way)) > 0.2


def ask(question, scene, found):
    """Answer one question by looking at the scene: (answer, the objects that a yes has found or None)."""
    objects = scene["objects"]

    def only(words):
        named = kinds(words, objects)
        if len(named) != 1:
            raise InputError(f"{question!r}: {len(named)} objects are {words!r}, expected one")
        return named[0]

    def said(some, count):
        return (str(len(some)) if count else "yes" if some else "no"), None

    if m := re.fullmatch(r"Taking (.*) and (.*) together, each object once, how many are in the picture\?", question):
        return said([o for o in objects if o in kinds(m[1], objects) or o in kinds(m[2], objects)], True)
    if m := re.fullmatch(r"Are there (more|fewer|exactly as many) (.*) (?:than|as) (.*) in the picture\?", question):
        a, b = len(kinds(m[2], objects)), len(kinds(m[3], objects))
        return said({"more": a > b, "fewer": a < b, "exactly as many": a == b}[m[1]] * [1], False)
    if m := re.fullmatch(r"What is the (\w+) of the (.*)\?", question):
        return only(m[2])[m[1]], None
    if m := re.fullmatch(r"Do the (.*) and the (.*) have the same (\w+)\?", question):
        return said((only(m[1])[m[3]] == only(m[2])[m[3]]) * [1], False)
    if m := re.fullmatch(
        r"(Is there an?|How many) (.*?)(?: are there)? with the same (\w+) as the (.*), not counting that one\?",
        question,
    ):
        one = only(m[4])
        return said([o for o in kinds(m[2], objects) if o is not one and o[m[3]] == one[m[3]]], m[1] == "How many")
    if m := re.fullmatch(
        rf"(Is there an?|How many) (.*?)(?: are there)? both {SIDE} the (.*) and {SIDE} the (.*)\?", question
    ):
        ends = [(only(m[4]), SIDES[m[3]]), (only(m[6]), SIDES[m[5]])]
        some = [o for o in kinds(m[2], objects) if all(o is not e and lies(o, side, e, scene) for e, side in ends)]
        return said(some, m[1] == "How many")
    if m := re.fullmatch(rf"(Is there an?|How many) (.*?)(?: are there)? {SIDE} the (.*)\?", question):
        end = only(m[4])
        some = [o for o in kinds(m[2], objects) if o is not end and lies(o, SIDES[m[3]], end, scene)]
        return said(some, m[1] == "How many")
    if m := re.fullmatch(r"How many (.*) are in the picture\?", question):
        return said(kinds(m[1], objects), True)
    if m := re.fullmatch(r"(?:Among|Of) the .* just found, (.*)\?", question):
        some = kinds(m[1], found)
    elif m := re.fullmatch(
        r"(?:Is there|Does the picture show|Is at least one object in the picture) (.*)\?", question
    ):
        some = kinds(m[1], objects)
    else:
        raise InputError(f"{question!r}: the agent does not understand this sentence")
    return ("yes" if some else "no"), some


def check(policies, items, scenes, wrong=None):
    """The agent on items: (share right, share right by a wrong scene), policies and items as loaded or as just drawn.

    scenes: {image file name: scene}; wrong: numpy Generator that deals out other items' scenes.
    """
    agents = {name: Agent(policy["text"], shown(policy)) for name, policy in policies.items()}
    right = mistaken = 0
    other = wrong.permutation(len(items)) if wrong is not None else range(len(items))
    for item, k in zip(items, other):
        response, way = agents[item["policy"]].answer(scenes[item["scene"]])
        right += response == item["answer"] and way == [(step["node"], step["answer"]) for step in item["path"]]
        try:
            mistaken += agents[item["policy"]].answer(scenes[items[k]["scene"]])[0] == item["answer"]
        except InputError:  # the other scene has no or several "the red cube": no answer
            pass
    return right / len(items), mistaken / len(items)


def shown(policy):
    """What the pictures of a policy show, in the order of its text."""
    return [
        node["crop"] if isinstance(node["crop"], dict) else dict([node["asked"]])
        for node in policy["nodes"]
        if node.get("crop")
    ]


# Qwen's pre-tokenizer cuts a text into these pieces, each at least one token; English words of policies are one.
PIECES = re.compile(r"[^\r\n\w]?[^\W\d_]+|\d| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def tokens(text, tokenizer=None):
    """Tokens of a policy's text: by a tokenizers.Tokenizer if given, else as pieces of Qwen's pre-tokenizer."""
    return len(tokenizer.encode(text).ids) if tokenizer else len(PIECES.findall(text))


def survey(depth, variant, conditions, scenes, seed=0, policies=10, queries=400):
    """One row of the table: what policies of this kind are, on scenes {"train", "test"}."""
    tables = {split: SceneTable(part) for split, part in scenes.items()}
    weigh = tables["train"].take(np.arange(min(4000, len(tables["train"]))))
    if len(weigh) < FEW:
        weigh = SceneTable(scenes["train"] + scenes["test"])
    by_name = {scene["image_filename"]: scene for part in scenes.values() for scene in part}
    style, rows, drawn, items = Prose(), [], {}, []
    for p in range(policies):
        rng = np.random.default_rng([seed, 4, p])
        policy = build_policy(rng, depth, variant, weigh, style, conditions, taken=drawn)
        policy["images"] = policy["crops"]
        drawn[policy["name"]] = policy
        mine = []
        for split, count in (("train", queries), ("test", max(1, queries // 10))):
            answers, leaf = route(policy, tables[split])
            chosen = choose(leaf, len(policy["leaves"]), count, rng)
            mine += make_items(policy, style, tables[split], chosen, answers, rng, split)
        rows.append(figures(policy, mine) | {"tokens": tokens(policy["text"])})
        items += mine
    right, mistaken = check(drawn, items, by_name, np.random.default_rng(seed))

    def span(key):
        values = [row[key] for row in rows]
        return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"

    frequent = np.mean([row["most frequent"] for row in rows])
    return [
        depth,
        variant,
        conditions,
        span("nodes"),
        span("responses"),
        span("tokens"),
        span("pictures"),
        f"{frequent:.3f}",
        f"{100 * right:.1f}",
        f"{100 * mistaken:.1f}",
        len(items),
    ]


HEADER = [
    "N",
    "variant",
    "conditions",
    "sections",
    "responses",
    "tokens",
    "pictures",
    "most frequent answer",
    "agent, right scene %",
    "agent, wrong scene %",
    "queries",
]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.oracle", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", metavar="DIR", help="data folders made by data.clevr_policy, to check")
    parser.add_argument("--table", metavar="FILE", help="write the table of all kinds of policies to this file")
    parser.add_argument(
        "--clevr-root", metavar="FOLDER", help="for the table: scenes of an official folder, not our own"
    )
    parser.add_argument("--scenes", type=int, default=6000, help="for the table: scenes drawn (default 6000)")
    parser.add_argument("--seed", type=int, default=0, help="of the table's policies and scenes (default 0)")
    args = parser.parse_args(argv)
    if args.table:
        check_file(args.table, " | ".join(HEADER), "--table")
    if not args.folders and not args.table:
        raise InputError("nothing to do: expected data folders or --table FILE")
    for folder in args.folders:
        policies = load_policies(folder)
        scenes = {scene["image_filename"]: scene for part in read_clevr(folder).values() for scene in part}
        for split in ("rl.jsonl", "test.jsonl"):
            items = load_items(folder, split, policies)
            right, mistaken = check(policies, items, scenes, np.random.default_rng(0))
            print(
                f"{folder}/{split}: {len(items)} items, agent {100 * right:.1f} %, "
                f"on wrong scenes {100 * mistaken:.1f} %"
            )
    if args.table:
        drawn = (
            read_clevr(args.clevr_root)
            if args.clevr_root
            else sample_scenes(args.seed, {"train": args.scenes, "test": args.scenes // 10})
        )
        lines = ["| " + " | ".join(HEADER) + " |", "| " + " | ".join("---" for _ in HEADER) + " |"]
        for conditions in ("existence", "full"):
            for depth in (2, 4, 6, 8) if conditions == "existence" else (2, 4, 6):
                for variant in "TM":
                    queries = 200 if len(drawn["train"]) >= FEW else len(drawn["train"])
                    row = survey(depth, variant, conditions, drawn, args.seed, queries=queries)
                    lines.append("| " + " | ".join(map(str, row)) + " |")
                    print(lines[-1], flush=True)
        write_text(args.table, "\n".join(lines) + "\n")


if __name__ == "__main__":
    command(main)
