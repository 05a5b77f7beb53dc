"""Chains of thought for CoT-SFT: written out from the gold path, or sampled from a model with the policy in its prompt.

    python -m data.cot --model M --data DIR --mode forward --out DIR/sft_forward.jsonl

gold: the chain that the tree gives. forward: the model answers with the policy in front, and what ends in the right
answer is kept (the paper's way for ClevrPolicy). reverse: the model is told the right answer and writes the reasoning;
nothing is filtered (the paper's way for GTAPolicy). The file takes the place of sft.jsonl.
"""

import argparse
import json
import os

from data import InputError, check_file, command, write_text
from data.dataset import load_items, load_policies, target
from data.referral import referral
from data.rewards import accuracy, format, thoughts

REVERSE = (
    "\n\nThe right response is known: {}. Write down the reasoning that leads to it, section by section, quoting what "
    "each section of the policy says. Do it inside <think></think>, then give the response in \\boxed{{}}."
)


def asked(item, mode):
    """The item as a generator gets it: in reverse mode its question tells the right answer."""
    if mode != "reverse":
        return item
    return {**item, "question": item["question"] + REVERSE.format(item["answer"])}


def keep(item, responses, mode):
    """The chain to learn from an item's responses, or None: forward takes the first that is right and well-formed,
    reverse the first that says anything."""
    for response in responses:
        chain = thoughts(response) or (response.partition("\\boxed")[0].strip() if mode == "reverse" else "")
        if chain and (mode == "reverse" or accuracy(None, response, item) and format(None, response, item)):
            return chain
    return None


def generate(model, processor, items, policies, mode, attempts=1, temperature=0.7, max_response=1024, seed=0, batch=64):
    """Sample chains -> the items whose chain is kept, with it as "cot", in their order.

    model, processor: as model.py gives them; attempts: responses sampled for each item; batch: items in flight.
    """
    from evaluate import PolicyRollout  # here: gold chains need no torch

    aware = PolicyRollout(processor, policies, 0, attempts, max_tokens=max_response, temperature=temperature)
    kept = []
    order = sorted(range(len(items)), key=lambda k: items[k]["policy"])  # one policy's items share its prefix
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        seeds = [[(seed * 1_000_003 + k) * 1009 + a for a in range(attempts)] for k in part]
        groups = aware(model, [asked(items[k], mode) for k in part], seeds)
        for k, group in zip(part, groups):
            chain = keep(items[k], [processor.decode(response.tokens) for response in group.responses], mode)
            if chain is not None:
                kept.append((k, {**items[k], "cot": chain, "mode": mode}))
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def quality(items, policies):
    """How the chains refer to their policies: (share of sections quoted rightly, share of items on the gold path)."""
    read = [
        referral(target(item), item, policies[item["policy"]]) for item in items if policies[item["policy"]]["nodes"]
    ]
    count = max(1, len(read))
    return sum(r["quoted"] for r in read) / count, sum(r["path"] for r in read) / count


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.cot", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="", metavar="M", help="the generator: checkpoint, hub id or a run's folder; gold needs none")
    add("--data", required=True, metavar="DIR", help="data folder")
    add("--split", default="sft.jsonl", metavar="FILE", help="its items that get chains (default sft.jsonl)")
    add("--mode", choices=("gold", "forward", "reverse"), default="gold", help="where chains come from (default gold)")
    add("--out", required=True, metavar="FILE", help="the JSONL to write; picture paths stay relative to --data")
    add("--attempts", type=int, default=1, metavar="N", help="responses sampled for each item (default 1)")
    add("--temperature", type=float, default=0.7, help="of the sampling (default 0.7; 0 is greedy)")
    add("--max-response", type=int, default=1024, metavar="TOKENS", help="longest chain (default 1024)")
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add("--min-pixels", type=int, default=0, help="least area of a picture, pixels (default: the model's own)")
    add("--max-pixels", type=int, default=0, help="largest area of a picture, pixels (default: the model's own)")
    args = parser.parse_args(argv)
    if args.attempts < 1 or args.max_response < 1 or not 0 <= args.temperature < 100:
        raise InputError(
            f"--attempts {args.attempts} --max-response {args.max_response} --temperature {args.temperature} found, "
            "expected at least 1, at least 1 and 0 or more"
        )
    if args.mode != "gold" and not args.model:
        raise InputError(f"--mode {args.mode} found without --model, expected the model that writes the chains")
    policies = load_policies(args.data)
    items = load_items(args.data, args.split, policies)
    check_file(args.out, '{"mode": ')
    if args.mode == "gold":
        lacking = [item["id"] for item in items if not item.get("cot")]
        if lacking:
            raise InputError(f"{args.split}: {lacking[0]} has no gold chain, {len(lacking)} of {len(items)} lack one")
        made = [{**item, "mode": "gold"} for item in items]
    else:
        from evaluate import load

        model, processor = load(args.model, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
        made = generate(
            model, processor, items, policies, args.mode, args.attempts, args.temperature, args.max_response, args.seed
        )
    if not made:
        raise InputError(f"{args.out}: found no chain worth keeping, expected some of {len(items)}; nothing is written")
    root = os.path.realpath(args.data)
    for item in made:
        item["images"] = [os.path.relpath(path, root) for path in item["images"]]
    write_text(args.out, "".join(json.dumps({"mode": "", **item}, ensure_ascii=False) + "\n" for item in made))
    quoted, on_path = quality(made, policies)
    print(
        f"{args.out}: kept {len(made)} of {len(items)} ({args.mode}); sections quoted rightly {100 * quoted:.1f} %, "
        f"chains on the gold path {100 * on_path:.1f} %"
    )
    if args.mode != "gold" and all(item.get("cot") for item in items):
        quoted, on_path = quality(items, policies)
        print(
            f"gold chains of the same items: sections quoted rightly {100 * quoted:.1f} %, "
            f"on the gold path {100 * on_path:.1f} %"
        )


if __name__ == "__main__":
    command(main)
