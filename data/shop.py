"""A small shop: its returns policy with two pictures, and a log of chats with photographs; the example of data/OWN.md.

    python -m data.shop --out shop          POLICY.md, chats.jsonl, photos/

What a customer gets follows from the photograph (a sealed, an opened or a broken box) and from the days since the
purchase; the clerk says which rule it is. All of it is drawn, by a seed.
"""

import argparse
import json
import os

import numpy as np
from PIL import Image, ImageDraw

from data import InputError, command
from data.clevr_policy import NewFolder

POLICY = """# Returns

A customer shows a photograph of the box and says when the thing was bought.

![a sealed box](sealed.png) is a sealed box: its green tape is whole. ![an opened box](opened.png) is an opened one.

## Rules

1. A sealed box comes back for the money within 14 days.
2. A sealed box is changed for a voucher from 15 to 30 days.
3. An opened box is changed for a voucher within 14 days.
4. An opened box stays with the customer after 14 days.
5. A broken thing is repaired within 30 days, whatever the box looks like.
6. After 30 days everything stays with the customer.
7. Gift cards never come back.
8. The answer is one word: refund, voucher, repair or keep.
"""
STATES = ("sealed", "opened", "broken")
DAYS = (3, 8, 12, 17, 23, 28, 35, 50)
THINGS = ("lamp", "mug", "clock", "kettle", "toy", "gift card")
ASKS = ("I bought this {thing} {days} days ago. May it come back?", "{days} days ago I bought this {thing}. And now?")


def rule(state, days, thing):
    """(number of the rule that decides, what the customer gets)."""
    if thing == "gift card":
        return 7, "keep"
    if days > 30:
        return 6, "keep"
    if state == "broken":
        return 5, "repair"
    if state == "sealed":
        return (1, "refund") if days <= 14 else (2, "voucher")
    return (3, "voucher") if days <= 14 else (4, "keep")


def draw(state, rng, size=56):
    """A photograph of a box in a state, no two alike."""
    picture = Image.new("RGB", (size, size), tuple(rng.integers(200, 245, 3).tolist()))
    pen, at = ImageDraw.Draw(picture), rng.integers(4, 10, 2)
    left, top = at.tolist()
    right, bottom = size - int(rng.integers(4, 10)), size - int(rng.integers(4, 10))
    brown = tuple((np.array([176, 128, 80]) + rng.integers(-20, 20, 3)).tolist())
    pen.rectangle([left, top, right, bottom], fill=brown, outline=(90, 60, 30))
    middle = (top + bottom) // 2
    if state == "sealed":
        pen.rectangle([left, middle - 6, right, middle + 6], fill=(40, 170, 70))
    elif state == "opened":
        pen.rectangle([left + 6, top + 6, right - 6, bottom - 6], fill=(30, 25, 30))
    else:
        for k in range(4):
            x = left + (right - left) * (k + 0.5) / 4
            pen.line([x, top, x + int(rng.integers(-8, 8)), bottom], fill=(210, 30, 30), width=5)
    return picture


def chats(count, rng):
    """Chats as the shop's log has them: (photograph's name, picture, question, reasoning, answer)."""
    for k in range(count):
        state, days = STATES[k % 3], int(rng.choice(DAYS))
        thing = THINGS[int(rng.choice(len(THINGS), p=[0.19] * 5 + [0.05]))]
        number, answer = rule(state, days, thing)
        asked = ASKS[int(rng.integers(len(ASKS)))].format(thing=thing, days=days)
        reason = f"A {state} box, {days} days, a {thing}: rule {number}."
        yield f"photos/{k}.png", draw(state, rng), asked, reason, answer


def make(out, queries=48, reasoned=0.5, seed=0, overwrite=False):
    """Write the shop's folder; `reasoned`: share of the chats in which the clerk says why."""
    rng = np.random.default_rng([seed, 20])
    with NewFolder(out, overwrite) as draft:
        os.makedirs(os.path.join(draft, "photos"))
        with open(os.path.join(draft, "POLICY.md"), "w", encoding="utf-8") as file:
            file.write(POLICY)
        for state in STATES[:2]:
            draw(state, rng).save(os.path.join(draft, f"{state}.png"))
        with open(os.path.join(draft, "chats.jsonl"), "w", encoding="utf-8") as file:
            for k, (name, picture, asked, reason, answer) in enumerate(chats(queries, rng)):
                picture.save(os.path.join(draft, name))
                content = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": asked}]
                said = f"<think>{reason}</think>{answer}" if k % 2 < 2 * reasoned else answer
                turns = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
                file.write(json.dumps({"messages": turns}) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.shop", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of POLICY.md, chats.jsonl and photos/")
    parser.add_argument("--queries", type=int, default=48, metavar="N", help="chats in the log (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    if args.queries < 3:
        raise InputError(f"--queries {args.queries} found, expected at least 3")
    make(args.out, args.queries, seed=args.seed, overwrite=args.overwrite)
    print(f"{args.out}: POLICY.md, chats.jsonl with {args.queries} chats, photos/")


if __name__ == "__main__":
    command(main)
