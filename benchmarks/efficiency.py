"""What internalising a policy saves: prompt tokens, time to the first token, tokens per second, FLOPs.

    python -m benchmarks.efficiency --model runs/rl --data data/clevr --runs runs/cpt runs/sft runs/rl --out costs.json

Three ways to serve a query: without the policy, with it in the prompt, and with it in the prompt but read once and its
keys and values kept. Training is counted in FLOPs from the runs' own configs, or without --runs from the paper's recipe
on this data; divided by the FLOPs that a query saves, it gives the number of queries after which training has paid.
"""

import argparse
import json
import os
import time
from statistics import mean, median

import torch

from data import InputError, check_file, command, write_text
from data.dataset import load_items, load_policies, messages, target
from model import Cache

SAMPLED = 64  # items whose lengths stand for all
RECIPE = (  # METHOD: the paper's ClevrPolicy runs; G and K are ours
    {"stage": "cpt", "split": "cpt.jsonl", "epochs": 5, "full": True},
    {"stage": "sft", "split": "sft.jsonl", "epochs": 5, "full": False},
    {"stage": "rl", "split": "rl.jsonl", "epochs": 2, "full": True, "group_size": 5, "policy_rollouts": 5},
)


# -- 1. FLOPs ----------------------------------------------------------------------------------------------------------


def text_flops(config, tokens, held=0, scored=1):
    """FLOPs of reading `tokens` after `held` cached ones, with next-token scores for `scored` of them.

    Matrix products count 2 per weight and token; attention 4 H C for each pair (token, what it sees).
    """
    D, H, J, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    weights = D * C * (2 * H + 2 * J) + 3 * D * config.intermediate_size
    seen = tokens * held + tokens * (tokens + 1) / 2
    return config.num_hidden_layers * (2 * weights * tokens + 4 * H * C * seen) + 2 * D * config.vocab_size * scored


def vision_flops(config, grids):
    """FLOPs of the vision tower and merger on pictures of grids [(t, h, w), ...] in patches."""
    v, merge = config.vision, config.vision.spatial_merge_size**2
    width, full = v.hidden_size, len(v.fullatt_block_indexes)
    window = (v.window_size // v.patch_size) ** 2  # patches that see each other in the other layers
    embed = v.in_channels * v.temporal_patch_size * v.patch_size**2 * width
    blocks = v.depth * (4 * width**2 + 3 * width * v.intermediate_size)
    weights = embed + blocks + merge * width**2 + width * v.out_hidden_size  # the merger's, a patch
    total = 0
    for t, h, w in grids:
        patches = t * h * w
        total += 2 * weights * patches + 4 * width * patches * (full * h * w + (v.depth - full) * min(h * w, window))
    return total


class Lengths:
    """Mean sizes of a data set's prompts and responses, from its first items."""

    def __init__(self, processor, folder, split):
        policies = load_policies(folder)
        everything = [item for item in load_items(folder, split, policies) if item.get("kind", "applied") == "applied"]
        if not everything:
            raise InputError(f"{folder}/{split}: found no items that apply a policy, expected at least one")
        self.count, items = len(everything), everything[:: max(1, len(everything) // SAMPLED)][:SAMPLED]
        plain = [processor.encode(messages(item), add_generation_prompt=True) for item in items]
        aware = [
            processor.encode(messages(item, policies[item["policy"]]), add_generation_prompt=True) for item in items
        ]
        self.query = mean(len(e.input_ids) for e in plain)
        self.policy = mean(len(e.input_ids) for e in aware) - self.query
        self.response = mean(len(processor.tokenizer.encode(target(item)).ids) + 1 for item in items)
        self.query_grids = [grid for e in plain for grid in grids_of(e)]
        self.policy_grids = [
            grid for e, p in zip(aware, plain) for grid in grids_of(e)[: len(grids_of(e)) - len(grids_of(p))]
        ]
        self.sampled = len(items)

    def vision(self, config, policy):
        """Mean FLOPs of an item's pictures, the policy's included or not."""
        grids = self.query_grids + (self.policy_grids if policy else [])
        return vision_flops(config, grids) / self.sampled


def grids_of(encoded):
    return [] if encoded.grid_thw is None else [tuple(grid) for grid in encoded.grid_thw.tolist()]


def query_flops(config, lengths, response, policy, kept=False):
    """FLOPs of answering one query with `response` tokens; policy: P in the prompt; kept: P was read before."""
    held = lengths.policy if policy else 0
    flops = text_flops(config, lengths.query + response, held, response) + lengths.vision(config, policy and not kept)
    return flops + (text_flops(config, held, scored=0) if policy and not kept else 0)


def training_flops(config, run, lengths, steps, batch, response):
    """FLOPs of a run. Full tuning costs three forward passes per sequence, LoRA two: frozen weights need no gradient.

    run: its config; steps, batch: updates and items each; response: mean tokens of a response. VM-CPT reads P with
    every item; SFT does not; RL also samples G responses given x and K given (P, x), and learns from G + K given x.
    """
    passes = (3 if run.get("full", True) else 2) + bool(run.get("gradient_checkpointing", False))
    sequences = steps * batch
    if run["stage"] == "cpt":
        whole = lengths.policy + lengths.query + response
        return passes * sequences * (text_flops(config, whole, 0, whole) + lengths.vision(config, True))
    forward = text_flops(config, lengths.query + response, 0, response) + lengths.vision(config, False)
    if run["stage"] == "sft":
        return passes * sequences * forward
    G, K = run.get("group_size", 5), run.get("policy_rollouts", 5)
    prompts = text_flops(config, lengths.query, scored=1) + lengths.vision(config, False)  # read once a group
    sampling = prompts + G * text_flops(config, response, lengths.query, response)
    if K:
        prompts = text_flops(config, lengths.policy + lengths.query, scored=1) + lengths.vision(config, True)
        sampling += prompts + K * text_flops(config, response, lengths.policy + lengths.query, response)
    return sequences * (sampling + passes * (G + K) * forward)


def read_run(folder):
    """A run's (config, steps done, mean length of its sampled responses or None), from its folder."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            run = json.load(file)
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {error}, expected a run with config.json and metrics.jsonl") from None
    known = isinstance(run, dict) and run.get("stage") in ("cpt", "sft", "rl")
    if not known or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{folder}: found no run of train_cpt.py, train_sft.py or train_rl.py with steps in it")
    sampled = [row["length"] for row in rows if "length" in row]
    return run, len(rows), mean(sampled) if sampled else None


def price(config, processor, runs, data):
    """[{"stage", "flops", ...}] of the runs in `runs` (folders), or of the paper's recipe on `data`."""
    stages, known = [], {}

    def lengths_of(folder, split):
        return known.setdefault((folder, split), Lengths(processor, folder, split))

    for folder in runs:
        run, steps, sampled = read_run(folder)
        lengths = lengths_of(run["data"], run.get("split") or f"{run['stage']}.jsonl")
        response = sampled or lengths.response
        flops = training_flops(config, run, lengths, steps, run["batch_size"], response)
        stages.append(
            {
                "stage": run["stage"],
                "run": folder,
                "items": steps * run["batch_size"],
                "response_tokens": response,
                "flops": flops,
            }
        )
    for run in () if runs else RECIPE:
        lengths = lengths_of(data, run["split"])
        items = lengths.count * run["epochs"]
        flops = training_flops(config, run, lengths, 1, items, lengths.response)
        stages.append(
            {
                "stage": run["stage"],
                "run": "recipe",
                "items": items,
                "response_tokens": lengths.response,
                "flops": flops,
            }
        )
    return stages


# -- 2. the clock ------------------------------------------------------------------------------------------------------


def tick(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def read(model, encoded, cache, start=0, pictures=0):
    """Read a prompt from token `start` and picture `pictures` on into the cache -> the likeliest next token (1, 1)."""
    device = model.head_weight.device
    grids = None if encoded.grid_thw is None else encoded.grid_thw[pictures:]
    pixels = None
    if grids is not None and len(grids):
        before = int(encoded.grid_thw[:pictures].prod(1).sum())  # patches
        pixels = encoded.pixel_values[before:].to(device, model.head_weight.dtype)
    grids = None if pixels is None else grids.to(device)
    hidden = model(encoded.input_ids[None, start:].to(device), pixel_values=pixels, image_grid_thw=grids, cache=cache)
    return model.logits(hidden[:, -1:]).argmax(-1)


@torch.no_grad()
def time_query(model, encoded, new_tokens, cache=None, start=0, pictures=0):
    """(seconds to the first token, tokens per second after it); always `new_tokens` tokens, so that speeds compare."""
    device, cache = model.head_weight.device, cache or Cache()
    began = tick(device)
    token = read(model, encoded, cache, start, pictures)
    first = tick(device)
    for _ in range(new_tokens - 1):
        token = model.logits(model(token, cache=cache)).argmax(-1)
    return first - began, (new_tokens - 1) / (tick(device) - first)


def kept_policy(model, processor, policy, encoded):
    """A policy read once: (cache factory, its length in tokens, its number of pictures)."""
    alone = processor.encode(messages({"kind": "document", "images": [], "question": ""}, policy))
    ids, n = encoded.input_ids, min(len(alone.input_ids), len(encoded.input_ids))
    differ = (alone.input_ids[:n] != ids[:n]).nonzero()
    length, pictures = int(differ[0]) if len(differ) else n, len(policy["images"])
    prefix = type(alone)(alone.input_ids[:length], alone.pixel_values, alone.grid_thw)
    held = Cache()
    read(model, prefix, held)

    def fresh():
        cache = Cache()
        cache.held, cache.length, cache.position = dict(held.held), held.length, held.position
        return cache

    return fresh, length, pictures


def measure(model, processor, items, policies, new_tokens):
    """{way: {"prompt_tokens", "first_token_ms", "tokens_per_second"}}, medians over the items, after a warm-up."""
    seen = {"without P": [], "with P": [], "with P, kept": []}
    fresh = {}
    for number, item in enumerate([items[0], *items]):
        policy = policies[item["policy"]]
        plain = processor.encode(messages(item), add_generation_prompt=True)
        aware = processor.encode(messages(item, policy), add_generation_prompt=True)
        if item["policy"] not in fresh:
            fresh[item["policy"]] = kept_policy(model, processor, policy, aware)
        cache, length, pictures = fresh[item["policy"]]
        kept = time_query(model, aware, new_tokens, cache(), length, pictures)
        rows = [
            (len(plain.input_ids), *time_query(model, plain, new_tokens)),
            (len(aware.input_ids), *time_query(model, aware, new_tokens)),
            (len(aware.input_ids) - length, *kept),
        ]
        for way, row in zip(seen, rows):
            seen[way] += [row] if number else []
    return {
        way: {
            "prompt_tokens": mean(r[0] for r in rows),
            "first_token_ms": 1000 * median(r[1] for r in rows),
            "tokens_per_second": median(r[2] for r in rows),
        }
        for way, rows in seen.items()
    }


# -- 3. the report -----------------------------------------------------------------------------------------------------


def report(model, processor, data, runs=(), split="test.jsonl", queries=16, new_tokens=32):
    """Everything at once: measured ways, shares saved, FLOPs a query, training FLOPs, queries until it has paid."""
    policies = load_policies(data)
    items = load_items(data, split, policies)
    ways = measure(model, processor, items[:queries], policies, new_tokens)
    lengths = Lengths(processor, data, split)
    flops = {
        "without P": query_flops(model.config, lengths, lengths.response, False),
        "with P": query_flops(model.config, lengths, lengths.response, True),
        "with P, kept": query_flops(model.config, lengths, lengths.response, True, kept=True),
    }
    for way, count in flops.items():
        ways[way]["flops_per_query"] = count
    stages = price(model.config, processor, runs, data)
    cost = sum(stage["flops"] for stage in stages)
    saved = lambda key: 1 - ways["without P"][key] / ways["with P"][key]
    return {
        "ways": ways,
        "saved": {key: saved(key) for key in ("prompt_tokens", "first_token_ms", "flops_per_query")},
        "training": stages,
        "training_flops": cost,
        "paid_after_queries": {
            way: cost / (flops[way] - flops["without P"])
            for way in ("with P", "with P, kept")
            if flops[way] > flops["without P"]
        },
    }


def table(result):
    """The report as lines of text."""
    lines = [f"{'':14}{'prompt tokens':>15}{'first token':>14}{'tokens/s':>10}{'FLOPs a query':>16}"]
    for way, row in result["ways"].items():
        lines.append(
            f"{way:14}{row['prompt_tokens']:15.1f}{row['first_token_ms']:11.1f} ms"
            f"{row['tokens_per_second']:10.1f}{row['flops_per_query']:16.3e}"
        )
    saved = result["saved"]
    lines.append(
        f"saved without P: {saved['prompt_tokens']:.1%} of the prompt tokens, "
        f"{saved['first_token_ms']:.1%} of the time to the first token"
    )
    lines += [
        f"training, {stage['stage']} ({stage['run']}): {stage['items']:.0f} items, {stage['flops']:.3e} FLOPs"
        for stage in result["training"]
    ]
    for way, count in result["paid_after_queries"].items():
        lines.append(f"paid after {count:,.0f} queries, against serving {way}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.efficiency", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", required=True, metavar="M", help="checkpoint, hub id, or the folder of a finished run"
    )
    parser.add_argument("--adapter", default="", metavar="A", help="LoRA adapter on top of --model")
    parser.add_argument("--data", required=True, metavar="DIR", help="data folder whose policies and queries are timed")
    parser.add_argument(
        "--split", default="test.jsonl", metavar="FILE", help="its file of queries (default test.jsonl)"
    )
    parser.add_argument(
        "--runs",
        nargs="*",
        default=[],
        metavar="RUN",
        help="training runs to pay for (default: the paper's recipe on --data)",
    )
    parser.add_argument("--queries", type=int, default=16, help="queries to time (default 16)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens written to each query (default 32)")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default auto)"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights (default auto)"
    )
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON, too")
    args = parser.parse_args(argv)
    for flag, least in (("queries", 1), ("new_tokens", 2)):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)} found, expected at least {least}")
    if args.out:
        check_file(args.out, '"flops_per_query"')
    from evaluate import load  # here, so that evaluate.py can import this module

    model, processor = load(args.model, args.adapter, args.device, args.dtype)
    result = report(model, processor, args.data, args.runs, args.split, args.queries, args.new_tokens)
    if args.out:
        write_text(args.out, json.dumps(result, indent=1))
    print(table(result))


if __name__ == "__main__":
    command(main)
