"""What does a step of RL over codes cost, against one over words of a vocabulary of 152 K?

    python -m benchmarks.latent --out benchmarks/results/latent.json [--quick] [--threads 2]

The paper, 3B on A100s: rollout 1.13, update 0.86, step 1.08 times the time of words. Here random weights of small width
with the 3B's proportions (9 blocks, of codes 1 + 2 + 2, K = 128), fp32 on a CPU, all in one process, alternating, so
that the ratios are of one run.

    rollout   support.engine.sample: 2 queries of 200 tokens with a picture, 4 responses of 48 tokens each
    update    GRPO's gradient of these and AdamW, as train_rl.py computes them: words with all parameters trained, words
              with the top 2 blocks, norm, embedding and head as the paper's token arms train, and codes

`cpu_seconds` is what the process spent on all its threads: on a machine with other work, its ratios are the ones to
trust.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import model as qwen
from benchmarks.rollout import IMAGE, prompts_of, write_checkpoint
from rollout import Group, Responses
from support.engine import sample
from tiny.report import provenance
from variants.latent import actions

SIZE = dict(width=256, layers=9, vocab=151_936, prompts=2, length=200, responses=4, tokens=48, policy=0)
QUICK = {**SIZE, "layers": 4, "vocab": 8_000, "tokens": 8, "length": 120}
BLOCKS = 2  # of the policy, and of the top of the base: 8 of 36 at 3B
REPEATS = 2


def models(folder):
    """{arm: model}, each with what its RL trains marked."""
    words, top, codes = (qwen.load_pretrained(folder) for _ in range(3))
    torch.manual_seed(0)
    codes = actions.attach(codes, K=128, inverse=1, merge=2, policy=BLOCKS)
    qwen.set_trainable(words, vision=True)
    top.requires_grad_(False)
    for part in (*top.model.layers[-BLOCKS:], top.model.norm, top.model.embed_tokens, top.lm_head):
        part.requires_grad_(True)
    codes.learn("policy")
    return {"words, all parameters": words, "words, top blocks and head": top, "codes": codes}


def clock(work):
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(size):
    """{arm: {"rollout", "update": {"seconds", "cpu_seconds"}}}: the fastest of REPEATS after one that is not timed."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, size)
        arms = models(folder)
    prompts = prompts_of(size, 0)
    rules = dict(max_tokens=size["tokens"], min_tokens=size["tokens"], stop_ids=[2], banned_ids=[IMAGE, 4])
    A = torch.tensor([1.0, -1.0]).repeat(size["prompts"] * size["responses"] // 2)
    found = {name: {"rollout": [], "update": []} for name in arms}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6, fused=True)
        for name, model in arms.items()
    }
    for repeat in range(REPEATS + 1):
        for name, model in arms.items():
            held = []
            times = [clock(lambda: held.append(sample(model.eval(), prompts, size["responses"], **rules)))]

            def update():
                groups = [
                    Group(
                        {}, prompt, None, responses, [False] * len(responses), torch.zeros(len(responses), 1).double()
                    )
                    for prompt, responses in zip(prompts, held[0])
                ]
                data = Responses(groups, range(len(groups)), 1, torch.device("cpu"))
                data.A = A
                micro = data.take([*range(len(A))])
                logp, _, _ = micro.read(model.train(), 1.0, 0)
                (-((logp - logp.detach()).exp() * micro.A).mean()).backward()
                optimizers[name].step()
                optimizers[name].zero_grad()

            times.append(clock(update))
            for phase, time_ in zip(("rollout", "update"), times):
                found[name][phase] += [time_] if repeat else []
    best = lambda times: {
        "seconds": round(min(t[0] for t in times), 3),
        "cpu_seconds": round(min(t[1] for t in times), 3),
    }
    return {name: {phase: best(times) for phase, times in phases.items()} for name, phases in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="a small vocabulary, to see that it runs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else SIZE
    found = measure(size)
    ratios = {}
    for name in [*found][:2]:
        of = lambda phase, name: found[name][phase]["cpu_seconds"]
        step = lambda name: of("rollout", name) + of("update", name)
        ratios[f"codes / {name}"] = {
            "rollout": round(of("rollout", "codes") / of("rollout", name), 3),
            "update": round(of("update", "codes") / of("update", name), 3),
            "step": round(step("codes") / step(name), 3),
        }
    result = {"size": size, "threads": args.threads, "arms": found, "ratios": ratios, **provenance()}
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
