"""How fast are groups of responses sampled? Against transformers' generate, and with a long policy against none.

    python -m benchmarks.rollout --out benchmarks/results/rollout.json [--quick] [--threads 2]

Random weights, fp32, on a CPU. Every measurement is a process of its own, so that peak memory is its own. The short
cases are run three times in turn, and the best counts: neighbours on the machine move a single one by a third.

    speedup_vs_transformers   8 prompts of 500 tokens with a picture of 16 x 16 patches, 8 responses of 64 tokens each,
                              69 M parameters: tokens a second over those of transformers' generate
    compiled_speedup          the same with --compile's compiled layers over ours without, compiling not counted
    poro_cost_vs_grpo         32 queries of 150 tokens x 8 responses x 192 tokens: half of the responses with a policy
                              of 4,000 tokens in front, over none; counting operations gives 1.31
    poro_cost_vs_unshared     the same over reading the policy anew for each query; counting gives 0.4
    dialogue_cost_vs_single   the case `ours` as dialogues of four turns, three results of 8 tokens among the 64, over
                              single responses of 64

`seconds` is the wall clock, `cpu_seconds` what the process spent on all its threads: on a machine with other work the
ratios of the second are the ones to trust. Beside FILE.json stands the same as a table, FILE.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from data import check_file, command, write_text
from model import Config, Encoded, Qwen25VL, load_pretrained, save_pretrained
from support import engine
from support.engine import sample
from tiny.report import provenance
from training import compile_blocks

SIZES = {  # width, layers, words; prompts, their tokens, responses each, their tokens; policy tokens
    "transformers": dict(width=512, layers=8, vocab=32_000, prompts=8, length=500, responses=8, tokens=64, policy=0),
    "policy": dict(width=1024, layers=4, vocab=32_000, prompts=32, length=150, responses=8, tokens=192, policy=4000),
}
QUICK = {
    "transformers": dict(width=256, layers=4, vocab=8_000, prompts=4, length=250, responses=8, tokens=32, policy=0),
    "policy": dict(width=512, layers=2, vocab=8_000, prompts=8, length=150, responses=8, tokens=64, policy=1500),
}
CASES = {
    "ours": "transformers",
    "dialogue": "transformers",
    "compiled": "transformers",
    "transformers": "transformers",  # case: its sizes
    "grpo": "policy",
    "poro": "policy",
    "unshared": "policy",
}
RATIOS = {  # case over case, goal
    "speedup_vs_transformers": ("transformers", "ours", ">= 4"),
    "compiled_speedup": ("ours", "compiled", ""),
    "dialogue_cost_vs_single": ("dialogue", "ours", "<= 1.3"),
    "poro_cost_vs_grpo": ("poro", "grpo", "<= 1.4"),
    "poro_cost_vs_unshared": ("poro", "unshared", "<= 0.5"),
}
IMAGE, PATCHES = 3, 16  # token id; patches a side, 64 tokens after merging
TURNS = 4  # of a dialogue; each of the three results between them is an eighth of its tokens


def config(width, layers, vocab, **_):
    """A config.json with the proportions of the official 3B model: 5.4 widths in the MLP, heads of 64, few for keys."""
    heads = width // 64
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": round(5.375 * width / 64) * 64,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 8, 2),
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_token_id": IMAGE,
        "video_token_id": 4,
        "vision_start_token_id": 5,
        "vision_end_token_id": 6,
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def write_checkpoint(folder, size):
    torch.manual_seed(0)
    raw = config(**size)
    model = Qwen25VL(Config.from_json(raw))
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.02) if p.ndim > 1 else p.data.fill_(float("norm" in name or "ln_q" in name))
    save_pretrained(model, folder)
    (Path(folder) / "config.json").write_text(json.dumps(raw))
    return sum(p.numel() for p in model.parameters())


def prompts_of(size, policy):
    """Random queries, against transformers each with a picture; a policy of `policy` tokens in front of all."""
    generator = torch.Generator().manual_seed(1)
    words = lambda n: torch.randint(10, size["vocab"], (n,), generator=generator)
    head, found = words(policy), []
    for _ in range(size["prompts"]):
        if size["policy"]:
            found.append(Encoded(torch.cat([head, words(size["length"])]), None, None))
        else:
            picture = torch.tensor([5] + [IMAGE] * (PATCHES**2 // 4) + [6])
            ids = torch.cat([words(20), picture, words(size["length"] - 20 - len(picture))])
            pixels = torch.randn(PATCHES**2, 1176, generator=generator)
            found.append(Encoded(ids, pixels, torch.tensor([[1, PATCHES, PATCHES]])))
    return found


class Told:
    """What a row reads in the case `dialogue` wherever a turn ends."""

    def __init__(self, length):
        self.result = Encoded(torch.arange(10, 10 + length // 8), None, None)

    def reply(self, tokens, room):
        return self.result if len(self.result.input_ids) <= room else None  # the warm-up is short

    def end(self, tokens, finished):
        return finished, []


def ending_turns(draw, length):
    """Rules.draw that ends TURNS - 1 turns of a dialogue of `length` tokens, a step sooner or later from row to row."""
    result = length // 8
    period = (length + result) // TURNS  # from turn to turn, with the result between them

    def drawn(rules, logits, u, used):
        tokens, logp = draw(rules, logits, u, used)
        last = period - result - 1 - torch.arange(len(used), device=used.device) % 4
        return torch.where((used % period == last) & (used < period * (TURNS - 1)), 2, tokens), logp

    return drawn


def measure(case, folder, size):
    """Time one case in this process; what is warmed up is a tenth of it."""
    common = dict(max_tokens=size["tokens"], min_tokens=size["tokens"], stop_ids=[2], banned_ids=[IMAGE, 4])
    plain, n = prompts_of(size, 0), size["responses"]
    if case == "transformers":
        from transformers import Qwen2_5_VLForConditionalGeneration

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.stack([p.input_ids for p in plain])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": torch.cat([p.pixel_values for p in plain]),
            "image_grid_thw": torch.cat([p.grid_thw for p in plain]),
        }
        options = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=n, eos_token_id=2)
        options["pad_token_id"] = 2
        work = lambda tokens: model.generate(**inputs, **options, min_new_tokens=tokens, max_new_tokens=tokens)
    else:
        model = load_pretrained(folder).eval()
        aware = prompts_of(size, size["policy"])
        if case == "compiled":
            compile_blocks(model)
        if case == "dialogue":
            engine.Rules.draw = ending_turns(engine.Rules.draw, size["tokens"])
            common |= dict(dialogue=lambda p: Told(size["tokens"]), banned_ids=[2, IMAGE, 4])
        prompts, counts = (plain, n) if case in ("ours", "dialogue", "compiled", "grpo") else (plain + aware, n // 2)
        lengths = [0] * len(plain) + [0 if case == "unshared" else size["policy"]] * len(aware)
        shared = lengths[: len(prompts)]
        least = 0 if case == "dialogue" else size["tokens"]
        how = lambda T: {**common, "max_tokens": T, "min_tokens": min(T, least)}
        work = lambda T: sample(model, prompts, counts, shared=shared, **how(T))
    work(4) if CASES[case] == "transformers" else sample(model, plain[:1], 2, max_tokens=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    work(size["tokens"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens, peak = size["prompts"] * n * size["tokens"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens": tokens,
        "tokens_per_second": tokens / wall,
        "peak_gb": peak / 2**20,
        "loaded_gb": before / 2**20,
    }


def ratios(rows):
    """{name: (of wall clocks, of CPU seconds)} of RATIOS, as far as both cases were measured; rows: {case: record}."""
    of = lambda over, under, key: round(rows[over][key] / rows[under][key], 3)
    return {
        name: (of(over, under, "seconds"), of(over, under, "cpu_seconds"))
        for name, (over, under, _) in RATIOS.items()
        if over in rows and under in rows
    }


def table(results):
    """The results as Markdown."""
    lines = [
        "# Sampling groups of responses",
        "",
        "Random weights of seed 0, fp32. Load: how many tasks wanted the "
        "cores at the start; with others about, trust the ratios of CPU seconds.",
    ]
    for setting, rows in results.items():
        lines += ["", f"## {setting}", ""]
        lines += ["| | wall s | CPU s | tokens/s | peak GB | of it the model | load |", "|---" * 7 + "|"]
        for case, r in rows.items():
            speed = f"{r['seconds']:.1f} | {r['cpu_seconds']:.1f} | {r['tokens_per_second']:.0f}"
            lines.append(f"| {case} | {speed} | {r['peak_gb']:.2f} | {r['loaded_gb']:.2f} | {r['load']:.1f} |")
        lines += ["", "| | wall | CPU | goal at full size |", "|---" * 4 + "|"]
        lines += [f"| {name} | {wall} | {cpu} | {RATIOS[name][2]} |" for name, (wall, cpu) in ratios(rows).items()]
        versions = lambda r: ", ".join(f"{name} {r[name]}" for name in ("torch", "transformers", "commit"))
        made = {f"{r['hardware']}, {versions(r)}" for r in rows.values()}
        lines += ["", "; ".join(sorted(made)) + "."]
    return "\n".join([*lines, "", "Made by `python -m benchmarks.rollout`.", ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file of the results; what it holds of other settings stays")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, half a minute in all; milder ratios")
    parser.add_argument("--case", choices=CASES, help="only this one, the others as FILE has them (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)  # the process of one measurement
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else SIZES
    if args.measure:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.case, args.measure, sizes[CASES[args.case]])))
        return
    out, setting = Path(args.out), f"{'small' if args.quick else 'full'} sizes, {args.threads} threads"
    check_file(out, '"cpu_seconds"')
    check_file(out.with_suffix(".md"), "benchmarks.rollout")
    results = json.loads(out.read_text()) if out.is_file() else {}
    rows, fresh = results.setdefault(setting, {}), {}
    short = [case for case in CASES if CASES[case] == "transformers"]
    for case in [args.case] if args.case else short * 2 + [*CASES]:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, sizes[CASES[case]])
            again = [sys.executable, "-m", "benchmarks.rollout", "--out", "-", "--threads", str(args.threads)]
            again += ["--case", case, "--measure", folder] + ["--quick"] * args.quick
            load = os.getloadavg()[0]
            done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
        row, before = json.loads(done.stdout.strip().splitlines()[-1]), fresh.get(case)
        row |= {**provenance(), "transformers": version("transformers"), "load": load, "size": sizes[CASES[case]]}
        rows[case] = fresh[case] = min(row, before or row, key=lambda r: r["cpu_seconds"])
        print(case, json.dumps(rows[case]), flush=True)
        write_text(out, json.dumps(results, indent=1) + "\n")
        write_text(out.with_suffix(".md"), table(results))
    print(json.dumps(ratios(rows)))


if __name__ == "__main__":
    command(main)
