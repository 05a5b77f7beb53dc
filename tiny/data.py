"""ClevrPolicy in the tiny world: terse policies over small pictures, with the format and flags of data.clevr_policy.

    python -m tiny.data --out DIR --depth 3 --policies 1 --queries 400 --sft 24 --leave-out 0.33 --seed 0

--leave-out keeps a share of each policy's sections out of the SFT data, always whole branches: what nobody has shown
to the model must come from the policy itself.
"""

import argparse
import contextlib
import json
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from data import InputError, command
from data.clevr_policy import NewFolder, make_dataset, read_clevr, sample_scenes, write_jsonl
from data.dataset import KINDS
from tiny.world import LOOK, OBJECTS, SIDE, Terse


def left_out(policy, share, rng):
    """Names of about `share` of a policy's sections: whole branches, chosen at random, never the root."""
    nodes = {node["id"]: [c for c in node["branches"].values()] for node in policy["nodes"]}

    def under(name):
        return {name}.union(*[under(child) for child in nodes[name] if child in nodes])

    wanted, chosen = round(share * len(nodes)), set()
    for name in rng.permutation([name for name in nodes if name != policy["root"]]).tolist():
        branch = under(name) | chosen
        if len(branch) <= wanted:
            chosen = branch
    return chosen


def thin(items, count, rng):
    """`count` of the items, as even over the answers as they allow, in their own order."""
    pools = {}
    for k in rng.permutation(len(items)).tolist():
        pools.setdefault(items[k]["answer"], []).append(k)
    kept, pools = [], sorted(pools.values(), key=len)
    for left, pool in zip(range(len(pools), 0, -1), pools):
        kept += pool[: -(-(count - len(kept)) // left)]
    return [items[k] for k in sorted(kept[:count])]


def leave_out(folder, share, sft, seed):
    """Rewrite a folder's sft.jsonl and cpt.jsonl: `sft` items per policy, none through sections left out."""
    policies = json.load(open(os.path.join(folder, "policies.json")))
    read = lambda name: [json.loads(line) for line in open(os.path.join(folder, name))]
    chosen, hidden = [], {}
    for number, policy in enumerate(policies):
        rng = np.random.default_rng([seed, 3, number])
        hidden[policy["name"]] = sorted(left_out(policy, share, rng))
        items = [item for item in read("sft.jsonl") if item["policy"] == policy["name"]]
        seen = [item for item in items if not any(step["node"] in hidden[policy["name"]] for step in item["path"])]
        if len(seen) < sft:
            raise InputError(
                f"policy {policy['name']}: {len(seen)} training queries keep to its shown sections, expected {sft}"
            )
        chosen += thin(seen, sft, rng)
    kept = {item["id"] for item in chosen}
    number = {policy["name"]: 0 for policy in policies}
    cpt = []
    for item in read("cpt.jsonl"):
        base = item["id"].rpartition("-")[0]
        number[item["policy"]] += item["kind"] == "document"
        few = item["kind"] == "document" and number[item["policy"]] <= max(1, sft // 10)
        cpt += [item] if item["kind"] == "section" or few or base in kept else []
    write_jsonl(os.path.join(folder, "sft.jsonl"), chosen)
    write_jsonl(os.path.join(folder, "cpt.jsonl"), cpt)
    with open(os.path.join(folder, "left_out.json"), "w") as file:
        json.dump(hidden, file, indent=1)
    return hidden


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m tiny.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="the data folder to write")
    add("--depth", type=int, default=3, metavar="N", help="layers of decisions, 1 to 6 (default 3)")
    variants = "T all text, M half of the values shown by pictures (default T)"
    add("--variant", choices=("T", "M"), default="T", help=variants)
    add("--policies", type=int, default=1, metavar="P", help="policies internalised at once, 16 at most (default 1)")
    add("--queries", type=int, default=400, metavar="Q", help="training queries per policy (default 400)")
    add("--sft", type=int, metavar="Q", help="of these with a chain of thought, per policy (default queries / 8)")
    add("--test", type=int, metavar="Q", help="test queries per policy, on unseen scenes (default queries / 10)")
    add("--seed", type=int, default=0, help="the same seed writes the same bytes (default 0)")
    add("--clevr-root", metavar="FOLDER", help="scenes and pictures of a folder in the official CLEVR v1.0 layout")
    kinds = f"kinds of VM-CPT items, of {', '.join(KINDS)} (default all)"
    add("--cpt", default="applied,document,section,response", metavar="KINDS", help=kinds)
    hidden = "share of the sections that no SFT item meets (default 0)"
    add("--leave-out", type=float, default=0.0, metavar="SHARE", help=hidden)
    add("--processes", type=int, default=1, metavar="N", help="processes that draw scenes and pictures (default 1)")
    add("--overwrite", action="store_true", help="replace the folder if it exists")
    return parser


def main(argv=None):
    args = arguments().parse_args(argv)
    sft = max(1, args.queries // 8) if args.sft is None else args.sft
    test = max(1, args.queries // 10) if args.test is None else args.test
    few = 1 <= args.depth <= 6 and 1 <= args.policies <= 16 and args.processes >= 1
    if not (few and 1 <= sft <= args.queries and test >= 1):
        raise InputError(
            f"--depth {args.depth} --policies {args.policies} --queries {args.queries} --sft {sft} --test {test} "
            "found, expected 1 to 6 layers, 1 to 16 policies, 1 <= sft <= queries, at least one test query"
        )
    if not 0 <= args.leave_out < 1:
        raise InputError(f"--leave-out {args.leave_out} found, expected a share from 0 to below 1")
    kinds = args.cpt.split(",")
    if set(kinds) - set(KINDS):
        raise InputError(f"--cpt {args.cpt!r} found, expected some of {', '.join(KINDS)}, by commas")
    NewFolder(args.out, args.overwrite)  # refuses a taken place before any work
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(ProcessPoolExecutor(args.processes)).map if args.processes > 1 else map
        if args.clevr_root:
            scenes = read_clevr(args.clevr_root)
        else:
            counts = {
                "train": max(2000, 4 * args.queries, args.policies * args.queries * 6 // 5),
                "test": max(1000, 8 * test, args.policies * test * 6 // 5),
            }
            scenes = sample_scenes(args.seed, counts, run, size=(SIDE, SIDE), objects=(1, OBJECTS), **LOOK)
        report = make_dataset(
            args.out,
            scenes,
            depth=args.depth,
            variant=args.variant,
            policies=args.policies,
            queries=args.queries,
            sft=args.queries if args.leave_out else sft,
            test=test,
            seed=args.seed,
            style=Terse(),
            cpt=kinds,
            size=(SIDE, SIDE),
            run=run,
            overwrite=args.overwrite,
        )
    hidden = leave_out(args.out, args.leave_out, sft, args.seed) if args.leave_out else {}
    for row in report:
        size = f"{row['nodes']:3} sections {row['responses']:3} responses {row['words']:4} words"
        missing = f"   left out of SFT: {', '.join(hidden[row['name']])}" if hidden else ""
        print(f"{row['name']:4} {size} {row['pictures']:3} pictures{missing}")
    train, chains, test = (args.policies * count for count in (args.queries, sft, test))
    print(f"{args.out}: {train} training queries, {chains} with chains, {test} test queries")


if __name__ == "__main__":
    command(main)
