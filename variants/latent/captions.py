"""Captions with a coverage gap, personas that ask for them in a style of their own, and the judge.

    python -m variants.latent.captions --out runs/latent/captions --seed 0

A style is an ordered choice of kinds (size, color, material, shape): `color shape` says `red cube . blue sphere .`.
pairs.jsonl has pictures, and styles of two kinds at most in one order; text.jsonl has no pictures, and all 64 styles:
what text alone has shown has to come to pictures. Twelve personas carry their style in the prompt, a third of them in
one that pairs have; eight stand in sft.jsonl and rl.jsonl, four only in test.jsonl. A response is worth the F1 of its
sentences against those of the picture's objects in the persona's style, in any order.
"""

import argparse
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
from PIL import Image

from data import command
from data.clevr_policy import NewFolder, write_json, write_jsonl
from tiny.world import KINDS, POLICIES, picture

ALL = [style for n in range(1, 5) for style in permutations(KINDS, n)]
PAIRS = [style for n in (1, 2) for style in combinations(KINDS, n)]
HELD_OUT = 4  # personas, of twelve
COUNTS = {"scenes": 1200, "test_scenes": 96, "text": 2400, "sft": 96, "rl": 320}


def sentence(thing, style):
    return " ".join(thing[kind] for kind in style)


def caption(rng, things, style):
    """One sentence per object, in any order."""
    return " ".join(f"{sentence(things[i], style)} ." for i in rng.permutation(len(things)))


def said(response):
    """The sentences of a response."""
    return [" ".join(part.split()) for part in response.split(" .") if part.strip()]


def judge(prompt, response, item):
    """F1 of the sentences that the persona would say: the reward."""
    wanted = Counter(sentence(thing, item["style"]) for thing in item["things"])
    given = Counter(said(response))
    return 2 * (wanted & given).total() / max(wanted.total() + given.total(), 1)


def truth(response, item):
    """Share of the sentences that are true of an object, whatever the style; 0 of none."""
    facts = [set(thing.values()) for thing in item["things"]]
    found = said(response)
    return sum(any(set(text.split()) <= fact for fact in facts) for text in found) / max(len(found), 1)


def personas(rng):
    """{name: style}: twelve, the first eight trained; a third of each within the styles of pairs."""
    inside = [style for style in PAIRS if len(style) == 2]
    outside = [style for style in ALL if 2 <= len(style) <= 3 and style not in PAIRS]
    inside, outside = ([styles[k] for k in rng.permutation(len(styles))] for styles in (inside, outside))
    chosen = inside[:3] + outside[:5] + inside[3:4] + outside[5:8]
    return {POLICIES[k]: style for k, style in enumerate(chosen)}


def write(out, seed, counts=COUNTS, overwrite=False):
    """The folder of one seed."""
    folder = NewFolder(out, overwrite)
    rng, known = np.random.default_rng([seed, 24]), {}
    with folder as path:
        path = Path(path)
        (path / "images").mkdir()
        total = counts["scenes"] + counts["test_scenes"]
        for number in range(total):
            scene, pixels, _ = picture(1000 + seed, number)
            known[number] = [{kind: thing[kind] for kind in KINDS} for thing in scene["objects"]]
            Image.fromarray(pixels).save(path / "images" / f"{number}.png")
        plain = {"policy": "", "question": "describe :", "boxed": False}
        style = lambda styles: styles[int(rng.integers(len(styles)))]
        any_scene = lambda: int(rng.integers(counts["scenes"]))
        pairs = [
            {"id": f"p{n}-{k}", **plain, "images": [f"images/{n}.png"], "answer": caption(rng, known[n], style(PAIRS))}
            for n in range(counts["scenes"])
            for k in range(2)
        ]
        text = [
            {"id": f"t{k}", **plain, "images": [], "answer": caption(rng, known[any_scene()], style(ALL))}
            for k in range(counts["text"])
        ]
        people = personas(rng)
        names = list(people)

        def ask(id, name, number):
            kinds = " ".join(people[name])
            answer = caption(rng, known[number], people[name])
            more = {"persona": name, "style": people[name], "things": known[number]}
            question = f"{name} : {kinds} . describe :"
            return {
                "id": id,
                **plain,
                "question": question,
                "images": [f"images/{number}.png"],
                "answer": answer,
                **more,
            }

        trained = names[:-HELD_OUT]
        any_of = lambda split: [
            ask(f"{split}{k}", trained[k % len(trained)], any_scene()) for k in range(counts[split])
        ]
        tests = range(counts["scenes"], total)
        rows = {"pairs": pairs, "text": text, "captions": pairs + text, "sft": any_of("sft"), "rl": any_of("rl")}
        rows["test"] = [ask(f"test{n}", trained[n % len(trained)], n) for n in tests]
        rows["held_out"] = [ask(f"new{n}", names[n % HELD_OUT - HELD_OUT], n) for n in tests]
        for name, items in rows.items():
            write_jsonl(path / f"{name}.jsonl", items)
        write_json(path / "policies.json", [])
        write_json(path / "personas.json", people)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m variants.latent.captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the data folder to write")
    parser.add_argument("--seed", type=int, default=0, help="draws scenes, captions and personas (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    write(args.out, args.seed, overwrite=args.overwrite)


if __name__ == "__main__":
    command(main)
