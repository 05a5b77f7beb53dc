"""A new policy under an old name: does a model that has internalised the old one follow what stands in its prompt?

    python -m data.override --data DIR --out DIR2 --seed 1
    python evaluate.py --model RUN --data DIR2 --policy-in-context --out DIR3

Every policy of DIR is drawn afresh and keeps its name; the test scenes stay. An item holds the new policy's answer and,
as `old_answer`, the old one's, so that obeying the old policy shows.
"""

import argparse
import os
import shutil

import numpy as np

from data import InputError, command
from data.clevr import SceneTable
from data.clevr_policy import (
    NewFolder,
    build_policy,
    draw_crops,
    make_items,
    picture_name,
    read_clevr,
    route,
    stored,
    write_json,
    write_jsonl,
)
from data.dataset import load_items, load_policies
from data.prose import Prose


def override(data, out, seed, style=None, overwrite=False):
    """Write a data folder of fresh policies under the names of `data`'s, and its test items with both answers.

    Returns the number of items and how many have different answers. Raises InputError for a folder without trees.
    """
    style = style or Prose()
    if os.path.realpath(data) == os.path.realpath(out):
        raise InputError(f"{out}: found that it is the data to be changed, expected a new or empty folder")
    policies = load_policies(data)
    old = {(item["policy"], item["scene"]): item["answer"] for item in load_items(data, "test.jsonl", policies)}
    scenes = read_clevr(data)
    table = SceneTable(scenes["test"])
    weigh = SceneTable((scenes["train"] + scenes["test"])[:4000])
    new, items = [], []
    with NewFolder(out, overwrite) as draft:
        os.makedirs(os.path.join(draft, "images", "crops"))
        os.makedirs(os.path.join(draft, "images", "val"))
        for p, (name, was) in enumerate(policies.items()):
            if not was["nodes"]:
                raise InputError(f"{data}: policy {name!r} is no tree, expected one made by data.clevr_policy")
            rng = np.random.default_rng([seed, 3, p])
            policy = build_policy(rng, was["depth"], was["variant"], weigh, style, was["conditions"], name=name)
            policy["text"] = style.updated.format(name) + policy["text"]
            policy["images"] = []
            for k, crop in enumerate(draw_crops(policy, weigh, (480, 320), style, rng), 1):
                policy["images"].append(f"images/crops/{name}-{k}.png")
                crop.save(os.path.join(draft, policy["images"][-1]))
            answers, leaf = route(policy, table)
            names = [scene["image_filename"] for scene in table.scenes]
            rows = np.array([k for k, scene in enumerate(names) if leaf[k] >= 0 and (name, scene) in old], int)
            for item in make_items(policy, style, table, rows, answers, rng, "override"):
                items.append({**item, "old_answer": old[name, item["scene"]]})
            new.append(stored(policy))
        for scene in scenes["test"]:
            shutil.copyfile(scene["file"], os.path.join(draft, picture_name(scene)))
        write_json(os.path.join(draft, "policies.json"), new)
        write_jsonl(os.path.join(draft, "test.jsonl"), items)
    return len(items), sum(item["answer"] != item["old_answer"] for item in items)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.override", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="data folder made by data.clevr_policy")
    parser.add_argument("--out", required=True, metavar="DIR", help="the data folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the new policies (default 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    count, differ = override(args.data, args.out, args.seed, overwrite=args.overwrite)
    print(f"{args.out}: {count} items under updated policies, {differ} of them with another answer than before")


if __name__ == "__main__":
    command(main)
