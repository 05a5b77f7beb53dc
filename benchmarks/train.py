"""How fast is a learn step, and what does it hold? Against transformers + PEFT on the same weights, data and batch.

    python -m benchmarks.train --out benchmarks/results/train.json [--quick] [--threads 2]

Random weights, fp32, on a CPU; one process per measurement, so that peak memory is its own.

    sft   LoRA rank 8 on all projections of the text model, 8 rows of a picture, 300 tokens of prompt, 96 of response.
          Theirs: PEFT around transformers' model, its own loss from `labels`.
    rl    all parameters, 2 queries of 500 tokens with a picture, 8 responses of 96 tokens each: GRPO's gradient.
          Theirs: one row per response, logits of the response positions only, log_softmax and gather, as TRL does.
    ranks tokens per second of two processes of one thread each over those of one: the sft step and its all-reduce.

Both sides' losses are compared before the clock starts. `cpu_seconds` is what the process spent on all its threads:
on a machine with other work, its ratios are the ones to trust.
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
from types import SimpleNamespace

import torch

import model as qwen
from benchmarks.rollout import IMAGE, prompts_of, write_checkpoint
from data import check_file, command, write_text
from support.checkpoint import code_version
from tiny.report import cpu_name

SIZE = dict(width=256, layers=4, vocab=32_000, policy=0)
CASES = {  # queries, tokens of the prompt, responses each, their tokens
    "sft": dict(prompts=8, length=300, responses=1, tokens=96),
    "rl": dict(prompts=2, length=500, responses=8, tokens=96),
}
REPEATS = 2  # after one that is not timed


def batch_of(size):
    """(prompts, responses): random, the same for both sides."""
    generator = torch.Generator().manual_seed(2)
    words = lambda: torch.randint(10, size["vocab"], (size["tokens"],), generator=generator)
    return prompts_of(size, 0), [[words() for _ in range(size["responses"])] for _ in range(size["prompts"])]


def ours(case, folder, size):
    """-> (model, loss()): the loss as train_sft.py and train_rl.py compute it."""
    from support.batching import collate, lay_out, token_logprobs

    model = qwen.load_pretrained(folder)
    if case == "sft":
        qwen.add_lora(model, 8, 16.0)
    else:
        qwen.set_trainable(model, vision=True)
    pairs = [(prompt, tokens) for prompt, group in zip(*batch_of(size)) for tokens in group]
    batch = lay_out(model, pairs, 0) if case == "rl" else collate(*zip(*pairs), pad_id=0)
    return model.train(), lambda: objective(case, token_logprobs(model, batch)[0], size)


def theirs(case, folder, size):
    """-> (model, loss()): the same with transformers and PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    prompts, responses = batch_of(size)
    rows = [(prompt, tokens) for prompt, group in zip(prompts, responses) for tokens in group]
    ids = torch.stack([torch.cat([prompt.input_ids, tokens]) for prompt, tokens in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([p.pixel_values for p, _ in rows]),
        "image_grid_thw": torch.cat([p.grid_thw for p, _ in rows]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    R = size["tokens"]
    if case == "sft":
        pattern = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=pattern))
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - R, -100)
        return model.train(), lambda: model(**inputs, labels=labels, use_cache=False).loss

    def loss():
        logits = model(**inputs, logits_to_keep=R + 1, use_cache=False).logits[:, :-1]
        return objective(case, logits.log_softmax(-1).gather(-1, ids[:, -R:, None])[..., 0].flatten(), size)

    return model.train(), loss


def objective(case, logp, size):
    """The mean over tokens of -log p, or of GRPO's surrogate at ratio 1 with advantages of alternating sign."""
    if case == "sft":
        return -logp.mean()
    A = torch.tensor([1.0, -1.0]).repeat(len(logp) // size["tokens"] // 2).repeat_interleave(size["tokens"])
    ratio = (logp - logp.detach()).exp()
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.3) * A).mean()


def measure(case, side, folder, size, ranks):
    """Time learn steps: loss, gradient, AdamW."""
    model, loss = {"ours": ours, "theirs": theirs}[side](case, folder, size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    if ranks > 1:
        import torch.distributed as dist

        from training import Run

        dist.init_process_group("gloo")
    first = None
    for repeat in range(REPEATS + 1):
        if repeat == 1:
            wall, cpu = time.perf_counter(), time.process_time()
        value = loss()
        value.backward()
        first = value.item() if first is None else first
        if ranks > 1:
            Run.reduce_gradients(SimpleNamespace(world=ranks, fsdp=False), model)
        optimizer.step()
        optimizer.zero_grad()
    wall, cpu = (time.perf_counter() - wall) / REPEATS, (time.process_time() - cpu) / REPEATS
    tokens = (
        size["prompts"] * size["responses"] * (size["length"] + size["tokens"])
    )  # as one row per response reads them
    return {
        "loss": first,
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens": tokens,
        "tokens_per_second": tokens / wall,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def run(case, side, folder, size, threads, ranks=1):
    """One measurement in a process of its own, or in one a rank -> the first one's figures."""
    words = [sys.executable, "-m", "benchmarks.train", "--measure", json.dumps([case, side, str(folder), size, ranks])]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    children = [
        subprocess.Popen(words, env={**env, "RANK": str(r)}, stdout=subprocess.PIPE, text=True) for r in range(ranks)
    ]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit(f"{case} {side} failed")
    return json.loads(outputs[0].splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the figures as JSON, and a table beside it (.md)")
    parser.add_argument("--quick", action="store_true", help="a smaller model: a quarter of the time")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default 2)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(*json.loads(args.measure))))
        return
    if args.out:
        check_file(args.out, '"speedup_cpu"')
        check_file(Path(args.out).with_suffix(".md"), "benchmarks/train.py")
    base = {**SIZE, **(dict(width=128, layers=2, vocab=16_000) if args.quick else {})}
    result = {
        "machine": f"{cpu_name()}, {args.threads} threads",
        "commit": code_version(),
        "quick": args.quick,
        "load": os.getloadavg()[0],
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(folder, {**base, **CASES["sft"]})
        versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "transformers", "peft"))
        lines = [
            f"{parameters / 1e6:.0f} M parameters, fp32, {result['machine']}, load {result['load']:.1f} before; "
            f"{versions}; "
            f"commit {result['commit'][:7]}. What the steps are: benchmarks/train.py.\n",
            "| step | | tokens/s | cpu s a step | peak GB |",
            "| --- | --- | --- | --- | --- |",
        ]
        for case, extra in CASES.items():
            size = {**base, **extra}
            sides = {side: run(case, side, folder, size, args.threads) for side in ("ours", "theirs")}
            a, b = sides["ours"], sides["theirs"]
            assert abs(a["loss"] - b["loss"]) < 1e-4 * max(1, abs(b["loss"])), (a["loss"], b["loss"])
            result[case] = {
                **sides,
                "speedup": a["tokens_per_second"] / b["tokens_per_second"],
                "memory": a["peak_gb"] / b["peak_gb"],
                "speedup_cpu": b["cpu_seconds"] / a["cpu_seconds"],
            }
            lines += [
                f"| {case} | {'trimpi' if side == 'ours' else 'transformers + PEFT'} | {x['tokens_per_second']:.0f} "
                f"| {x['cpu_seconds']:.2f} | {x['peak_gb']:.2f} |"
                for side, x in sides.items()
            ]
            lines.append(
                f"| {case} | ratio | {result[case]['speedup']:.2f} | {result[case]['speedup_cpu']:.2f} "
                f"| {result[case]['memory']:.2f} |"
            )
        size = {**base, **CASES["sft"]}
        one, two = run("sft", "ours", folder, size, 1), run("sft", "ours", folder, size, 1, ranks=2)
        result["ranks"] = {"one": one, "two": two, "scaling": 2 * two["tokens_per_second"] / one["tokens_per_second"]}
        lines.append(f"| sft, one thread a rank | 1 -> 2 ranks | {result['ranks']['scaling']:.2f} | | |")
    print("\n".join(lines))
    if args.out:
        write_text(args.out, json.dumps(result, indent=1) + "\n")
        write_text(Path(args.out).with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    command(main)
