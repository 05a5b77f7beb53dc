"""How well does the base follow policies that it never read? Greedy answers, the policy in the prompt, unseen pictures.

    python -m tiny.score --out runs/score           20 policies of 48 pictures for every depth and variant: minutes
    python -m tiny.score --world tools              20 policies of 3 to 14 tools, too, and 48 turns of dialogues each

And at N = 3: the policy missing; every query's picture exchanged for one that calls for another answer (right answers
would then have to come from elsewhere); scenes in which no object hides another, from another distance, in other light;
pictures of a folder in the official CLEVR layout (--clevr-root), scaled down. Writes <out>/scores.json and scores.md.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import InputError, claim, command
from data.clevr_policy import make_dataset, read_clevr, sample_scenes, write_json
from data.dataset import load_items, load_policies
from evaluate import evaluate, load, wilson
from tiny import tools
from tiny.demo import BASES
from tiny.report import markdown_table, provenance
from tiny.world import LOOK, OBJECTS, SIDE, Terse

AIMS = {
    "N = 2": 0.98,
    "N = 3": 0.97,
    "N = 4": 0.96,
    "N = 6": 0.85,
    "M, N = 2": 0.96,
    "M, N = 3": 0.96,
    "M, N = 4": 0.90,
}
TOOLS = {3: None, 4: 0.95, 6: None, 8: 0.93, 12: None, 14: 0.90}  # by number of tools; rules are about twice as many
FOLDER = 10  # policies drawn at once: their names differ


def scenes_of(seed, count, look=LOOK, lamps=0.0):
    """Scenes to draw policies on and to ask about; lamps: units by which each lamp is moved further, at most."""
    scenes = sample_scenes(seed, {"train": 1500, "test": count}, size=(SIDE, SIDE), objects=(1, OBJECTS), **look)
    rng = np.random.default_rng(seed)
    for scene in scenes["test"]:
        scene["lamps"] = (np.array(scene["lamps"]) + rng.uniform(-lamps, lamps, (3, 3))).tolist()
    return scenes


def swapped(items):
    """Every item with the picture of another one of its policy that calls for another answer."""
    out = []
    for k, item in enumerate(items):
        others = [x for x in items[k:] + items[:k] if x["policy"] == item["policy"] and x["answer"] != item["answer"]]
        out.append({**item, "images": others[0]["images"]})
    return out


class Scores:
    def __init__(self, model, policies, queries, seed):
        self.model, self.processor = load(model)
        self.policies, self.queries, self.seed, self.rows = policies, queries, seed, []

    def ask(self, name, scenes, depth, variant="T", change=None, queries=None, **how):
        """One row: new policies over these scenes, in folders that are deleted again; change: of the items."""

        def make(data, number, first):
            size = {"queries": 1, "sft": 1, "test": queries or self.queries, "size": (SIDE, SIDE)}
            kind = {"depth": depth, "variant": variant, "policies": number, "style": Terse()}
            make_dataset(data, scenes, **kind, **size, seed=self.seed + 100 * depth + first)

        self.row(name, make, AIMS.get(name), change, **how)

    def call(self, name, count, **how):
        """One row: turns of dialogues under new policies of so many tools."""

        def make(data, number, first):
            made, _ = tools.make_dataset(data, count, number, 1, 1, self.queries, self.seed + 100 * count + first)
            return sum(len(tools.sentences(policy)) for policy in made)

        self.row(name, make, TOOLS[count] if not how else None, **how)

    def row(self, name, make, aim, change=None, **how):
        """Answers to data that make(folder, policies, number of the first) writes; change: of the items.

        make returns how many rules the policies have in all, where these are counted.
        """
        right, n, worst, parts, rules = 0, 0, 1.0, {}, 0
        for first in range(0, self.policies, FOLDER):
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "data"
                rules += make(data, min(FOLDER, self.policies - first), first) or 0
                policies = load_policies(data)
                items = load_items(data, "test.jsonl", policies)
                items = change(items) if change else items
                how = {"policy_in_context": True, "max_response": 200, **how}
                row, _ = evaluate(self.model, self.processor, items, policies, **how)
            right, n = right + round(row["accuracy"] * row["n"]), n + row["n"]
            for part in ("tool", "arguments"):
                if part in row:
                    parts[part] = parts.get(part, 0) + row[part] * row["n"]
            worst = min([worst, *[one["accuracy"] for one in row["by_policy"].values()]])
        row = {"name": name, "accuracy": right / n, "interval": wilson(right, n), "n": n, "policies": self.policies}
        parts = {part: total / n for part, total in parts.items()}
        parts |= {"rules": rules / self.policies} if rules else {}
        self.rows.append({**row, "worst_policy": worst, "aim": aim, **parts})
        print(f"{name}: {row['accuracy']:.3f}", flush=True)


def markdown(rows, about):
    lines, called = [], [part for part in ("tool", "arguments", "rules") if any(part in row for row in rows)]
    for row in rows:
        low, high = row["interval"]
        shares = [f"{row['accuracy']:.3f}", f"{low:.3f} – {high:.3f}", f"{row['worst_policy']:.2f}"]
        shares += [f"{row[part]:.{1 if part == 'rules' else 3}f}" if part in row else "–" for part in called]
        lines.append([row["name"], *shares, row["policies"], row["n"], row["aim"] or "–"])
    head = ["", "exact answers", "95 % interval", "worst policy", *called, "policies", "n", "aim"]
    return f"# Scores of the tiny base\n\n{about}\n\n{markdown_table(head, lines)}\n"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tiny.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--world", choices=BASES, default="clevr", help="tools: rows of tool policies, too (default clevr)")
    add("--model", metavar="DIR", help="the base (default tiny/base, in the world of tools tiny/tools_base)")
    add("--out", default="runs/score", metavar="DIR", help="folder of scores.json and scores.md (default runs/score)")
    add("--policies", type=int, default=20, help="new policies per row (default 20)")
    add("--queries", type=int, default=48, help="pictures per policy (default 48)")
    add("--seed", type=int, default=77, help="of scenes and policies (default 77)")
    add("--clevr-root", metavar="FOLDER", help="also on pictures of this folder in the official CLEVR layout")
    args = parser.parse_args(argv)
    if min(args.policies, args.queries) < 1:
        raise InputError(f"found {args.policies} policies, {args.queries} queries, expected one of each at least")
    model = args.model or BASES[args.world]
    out, scores = Path(args.out), Scores(model, args.policies, args.queries, args.seed)
    claim(out, "tiny.score", ("scores.json", "scores.md"))
    count = max(1000, 2 * FOLDER * args.queries)
    usual, seed = scenes_of(args.seed, count), args.seed + 1
    rows = [(name, usual, int(name[-1]), name[0].replace("N", "T"), {}) for name in AIMS]
    far, near = {**LOOK, "zoom": 1.3}, {"area": 1.6, "zoom": 1.8}
    rows += [
        ("N = 3, without the policy", usual, 3, "T", {"policy_in_context": False}),
        ("N = 3, a wrong picture", usual, 3, "T", {"change": swapped}),
        ("N = 3, no object behind another", scenes_of(seed + 3, count, {**LOOK, "visible": 0.99}), 3, "T", {}),
        ("N = 3, from farther away (focal length 1.3 for 1.6)", scenes_of(seed, count, far), 3, "T", {}),
        ("N = 3, from nearer (1.8)", scenes_of(seed + 1, count, near), 3, "T", {}),
        ("N = 3, lamps moved by up to 3 units more", scenes_of(seed + 2, count, lamps=3.0), 3, "T", {}),
    ]
    if args.clevr_root:
        blender = read_clevr(args.clevr_root)
        most = {"queries": min(args.queries, len(blender["test"]))}
        rows.append(("N = 3, Blender's pictures", blender, 3, "T", most))
    if args.world == "tools":
        for count in TOOLS:
            scores.call(f"{count} tools", count)
        scores.call("8 tools, without the policy", 8, policy_in_context=False)
        rows = rows[: len(AIMS)]
    for name, scenes, depth, variant, how in tqdm(rows, desc="score", unit="row", disable=None):
        scores.ask(name, scenes, depth, variant, **how)
    made = provenance()
    about = (
        f"Written by `python -m tiny.score --world {args.world} --policies {args.policies} --queries {args.queries} "
        f"--seed {args.seed}`; "
        f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}."
    )
    write_json(out / "scores.json", {"about": about, "rows": scores.rows})
    table = markdown(scores.rows, about)
    (out / "scores.md").write_text(table)
    print(table)


if __name__ == "__main__":
    command(main)
