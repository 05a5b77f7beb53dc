"""Codes against words on captions with a coverage gap: every stage and arm of one seed on the tiny base.

    python -m variants.latent.study --out runs/latent --seed 0         (make latent SEED=0; resumable)
    python -m variants.latent.study --out runs/latent --tables         results/latent.* from the seeds found there

Both kinds of arms start from one base, tuned on all captions, and see the same SFT items. Arms: words, words drawn with
top-p, codes; codes made without text, without the projector, without the cycle; and on a ClevrPolicy that is not in the
prompt, codes and words with GRPO and PolicyRollout. Everything runs in this process, one thread, run after run; a run
that has ended is not made again. Writes <out>/seedN/results.json and latent.png.
"""

import argparse
import contextlib
import functools
import json
import statistics
import time
from pathlib import Path

import torch

import evaluate
import train_rl
import train_sft
from data import claim, command
from data.clevr_policy import write_jsonl
from data.dataset import load_items, load_policies
from rollout import PolicyRollout
from support.batching import collate
from support.checkpoint import write_json
from support.engine import sample
from tiny import data as tiny_data
from tiny.report import fill, keep, markdown_table, plotting, provenance
from train_sft import Examples, response_ids
from variants.latent import actions, captions
from variants.latent import train as latent

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "tiny" / "base"
COMMON = "--resume --save-every 2m --keep 1 --beta2 0.98 --max-prompt 1000 --device cpu".split()
SUPERVISED = "--full --no-train-vision --batch-size 24 --micro-batch 24 --schedule cosine --warmup 10"
SFT = "--split sft.jsonl --batch-size 16 --micro-batch 16 --lr 3e-4 --steps 40"
LATENT = "--batch-size 16 --micro-batch 16 --warmup 20 --keep-states"
RL = "--algorithm dapo --group-size 8 --policy-rollouts 0 --batch-size 8 --mini-batch 0 --micro-batch 64 --check 0"
RL += " --dynamic-tries 0 --reward variants.latent.captions:judge --steps 60"
POLICY = "--algorithm dapo --dynamic-tries 0 --batch-size 8 --mini-batch 0 --micro-batch 64 --check 0 --steps 30"
INVERSE = f"{LATENT} --codes 16 --inverse-blocks 2 --policy-blocks 3 --lr 3e-3"

# name: (script or stage, the run it starts from, flags); the data folder of those named chain_ is another one
RUNS = {
    "base": ("sft", None, f"{SUPERVISED} --split captions.jsonl --lr 4e-4 --steps 240"),
    "words": ("sft", "base", f"{SUPERVISED} {SFT}"),
    "words_rl": ("rl", "words", f"{RL} --lr 3e-4"),
    "inverse": (1, "base", f"{INVERSE} --steps 300"),
    "projectors": (2, "inverse", f"{LATENT} --lr 2e-3 --steps 100"),
}


def arm(name, joint="", clone=""):
    """The stages 3 to 6 of one arm of codes."""
    return {
        f"{name}_joint": (3, "projectors", f"{LATENT} --lr 2e-3 --steps 200 {joint}"),
        f"{name}_clone": (4, f"{name}_joint", f"{LATENT} --lr 2e-3 --steps 250 {clone}"),
        name: (5, f"{name}_clone", f"{SFT} --warmup 10"),
        f"{name}_rl": ("rl", name, f"{RL} --lr 1e-3"),
    }


RUNS |= arm("codes")
RUNS["words_top_p_rl"] = ("rl", "words", f"{RL} --lr 3e-4")
CHAINS = {
    "chain_words": ("sft", None, f"{SUPERVISED} {SFT}"),
    "chain_words_grpo": ("rl", "chain_words", f"{POLICY} --lr 2e-4 --group-size 8 --policy-rollouts 0"),
    "chain_words_poro": ("rl", "chain_words", f"{POLICY} --lr 2e-4 --group-size 4 --policy-rollouts 4"),
    "chain_inverse": (1, None, f"{INVERSE} --steps 300"),
    "chain_clone": (4, "chain_inverse", f"{LATENT} --lr 2e-3 --steps 200 --text="),
    "chain_codes": (5, "chain_clone", f"{SFT} --warmup 10"),
    "chain_codes_grpo": ("rl", "chain_codes", f"{POLICY} --lr 1e-3 --group-size 8 --policy-rollouts 0"),
    "chain_codes_poro": ("rl", "chain_codes", f"{POLICY} --lr 1e-3 --group-size 4 --policy-rollouts 4"),
}
RUNS |= CHAINS
ABLATIONS = {"no_text": "--text=", "no_projector": "--no-projector", "no_cycle": "--no-cycle"}
for name, flag in ABLATIONS.items():
    RUNS |= arm(name, flag, "" if name == "no_cycle" else flag)
ARMS = {  # rows of the table
    "words": "words, SFT",
    "words_rl": "words, RL",
    "words_top_p_rl": "words, RL drawn with top-p 0.9",
    "codes": "codes, SFT",
    "codes_rl": "codes, RL",
    "no_text_rl": "codes without text, RL",
    "no_projector_rl": "codes without projector, RL",
    "no_cycle_rl": "codes without cycle, RL",
}
TOP_P = 0.9
OURS = "captions chains others *.log *.draft-* results.json latent.png *.tmp".split()  # what <out>/seedN holds, too


# -- 1. data and runs --------------------------------------------------------------------------------------------------


def chain_data(folder, seed):
    """A ClevrPolicy with 24 chains, and chains of eight others, each with its policy in the prompt, as pairs.jsonl."""
    own, others = folder, folder.with_name("others")
    draw = lambda out, seed, *flags: tiny_data.main(["--out", str(out), "--depth", "2", "--seed", str(seed), *flags])
    if not others.exists():
        draw(others, seed + 1000, *"--policies 8 --queries 40 --sft 40 --test 1 --cpt applied".split())
    if not own.exists():
        draw(own, seed, *"--queries 240 --sft 24 --test 100".split())
    policies = load_policies(others)
    rows = [
        {
            "id": item["id"],
            "policy": "",
            "question": f"{policies[item['policy']]['text']}\n\n<image>{item['question']}",
            **{key: item[key] for key in ("answer", "cot", "images")},
        }
        for item in load_items(others, "sft.jsonl", policies)
    ]
    write_jsonl(own / "pairs.jsonl", rows)


def run(name, out, seed):
    """One run, unless it has ended; what it prints goes to <out>/<name>.log."""
    kind, before, flags = RUNS[name]
    if any((out / name / "model").glob("*.safetensors")):
        return
    chain = name.startswith("chain_")
    longest = "120" if chain else "24"
    words = ["--model", BASE, "--data", out / ("chains" if chain else "captions"), "--out", out / name, *COMMON]
    words += ["--max-response", longest, *flags.split(), "--seed", seed, *(["--init", out / before] if before else [])]
    if chain and kind in (1, 4):
        words += ["--media", out / "others"]
    words = [*map(str, words)]
    rollout = functools.partial(PolicyRollout, top_p=TOP_P) if name == "words_top_p_rl" else PolicyRollout
    with open(out / f"{name}.log", "a") as file, contextlib.redirect_stdout(file):
        if kind == "sft":
            train_sft.main(words)
        elif kind == "rl":
            train_rl.main(words, PolicyRollout=rollout)
        else:
            latent.main(["--stage", str(kind), *words])


# -- 2. what is measured -----------------------------------------------------------------------------------------------


def answer(model, processor, items, n=1, **how):
    """[[text]] of n responses to each item."""
    rollout = PolicyRollout(processor, {}, 1, 0)
    prompts = [rollout.prompt(item) for item in items]
    rules = dict(max_tokens=24, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids)
    return [[processor.decode(r.tokens) for r in group] for group in sample(model, prompts, n, **rules, **how)]


def graded(items, answers, key):
    """Means of judge and truth."""
    pairs = [(text, item) for item, texts in zip(items, answers) for text in texts]
    mean = lambda values: round(statistics.fmean(values), 4)
    return {
        f"judge{key}": mean(captions.judge("", text, item) for text, item in pairs),
        f"truth{key}": mean(captions.truth(text, item) for text, item in pairs),
    }


def drawn(model, processor, items, **how):
    """The same of eight responses to each item at temperature 1, and their diversity."""
    answers = answer(model, processor, items, 8, temperature=1.0, **how)
    mixed = [actions.diversity([text.split() for text in texts]) for texts in answers]
    return {
        **graded(items, answers, "_drawn"),
        "diversity": round(statistics.harmonic_mean(mixed), 4),
    }  # 1 / mean similarity


@torch.no_grad()
def word_reach(model, processor, items, k):
    """Share of the answers of which every word is among the k likeliest of its place."""
    rollout, found = PolicyRollout(processor, {}, 1, 0), []
    for item in items:
        prompt = rollout.prompt(item)
        batch = collate([prompt], [response_ids(processor, item["answer"])], pad_id=processor.pad_id)
        hidden = model(batch.input_ids, None, batch.pixel_values, batch.image_grid_thw).flatten(0, 1)[batch.index]
        best = model.logits(hidden).topk(k).indices  # (L,k)
        found.append(bool((best == batch.labels.flatten()[batch.index][:, None]).any(1).all()))
    return sum(found) / len(found)


def measure(name, out):
    """The row of an arm: greedy answers to trained and held-out personas on unseen scenes, and drawn ones."""
    model, processor = evaluate.load(out / name)
    data = out / "captions"
    test, new, wished = (load_items(data, f"{split}.jsonl", {}) for split in ("test", "held_out", "rl"))
    row = graded(test, answer(model, processor, test, temperature=0.0), "")
    row |= graded(new, answer(model, processor, new, temperature=0.0), "_new")
    row |= drawn(model, processor, test[:32], **({"top_p": TOP_P} if "top_p" in name else {}))
    if isinstance(model, actions.LatentVLM):
        config = latent.Config(model="", data=str(data), out="", split="test.jsonl", max_response=24)
        examples = lambda split: Examples(data, f"{split}.jsonl", processor, config)
        whole, words = latent.gate(model, processor, examples("rl"))
        row |= {"reach": round(whole, 4), "words_in_reach": round(words, 3)}
        parts = [examples("test").encode(0, i) for i in range(len(test))]
        found = latent.watched(model, collate(*zip(*parts), pad_id=processor.pad_id), config, 1)
        row |= {key: round(found[key], 4) for key in ("codes_used", "codes_even", "right", "right_shuffled")}
        parts = collate(*zip(*parts), pad_id=processor.pad_id)
        row["clones"] = round(latent.watched(model, parts, config, 4)["clones"], 4)
    else:
        row |= {f"reach_top{k}": round(word_reach(model, processor, wished[:128], k), 4) for k in (3, 6)}
        if name == "words":
            top = drawn(model, processor, test[:32], top_p=TOP_P)
            row |= {f"{key}_top_p": value for key, value in top.items()}
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    if "reward" in rows[0]:
        row["reward_first"] = round(statistics.fmean(r["reward"] for r in rows[:10]), 4)
        row["reward_last"] = round(statistics.fmean(r["reward"] for r in rows[-10:]), 4)
        for phase in ("sample", "learn"):
            row[f"{phase}_seconds"] = round(statistics.median(r["speed"][phase] for r in rows), 3)
    return row


def measure_chain(name, out):
    """Accuracy on unseen scenes without the policy in the prompt."""
    model, processor = evaluate.load(out / name)
    policies = load_policies(out / "chains")
    items = load_items(out / "chains", "test.jsonl", policies)
    row, _ = evaluate.evaluate(model, processor, items, policies, max_response=120)
    return {"accuracy": row["accuracy"], "n": row["n"], "exact_chain": row["exact_chain"]}


def one_seed(out, seed, only=None):
    torch.set_num_threads(1)
    claim(out, "variants.latent.study", (*RUNS, *OURS))
    place = out / "results.json"
    results = json.loads(place.read_text()) if place.exists() else {"seed": seed, "seconds": {}, "rows": {}}
    if not (out / "captions").exists():
        captions.write(out / "captions", seed)
    if not (out / "chains" / "pairs.jsonl").exists():
        with open(out / "chains.log", "a") as file, contextlib.redirect_stdout(file):
            chain_data(out / "chains", seed)
    for name in only or RUNS:
        began, cpu = time.time(), time.process_time()
        done = any((out / name / "model").glob("*.safetensors"))
        run(name, out, seed)
        if not done:
            seconds = {"wall": round(time.time() - began), "cpu": round(time.process_time() - cpu)}
            results["seconds"][name] = seconds
            print(f"{name}: {seconds['cpu']} s of CPU, {seconds['wall']} s", flush=True)
        row = name in ARMS or name in ABLATIONS or name in CHAINS and not name.endswith(("inverse", "clone"))
        if row and name not in results["rows"]:
            results["rows"][name] = (measure_chain if name in CHAINS else measure)(name, out)
            print(f"  {name}: {results['rows'][name]}", flush=True)
        write_json(place, {**results, **provenance()})


# -- 3. tables ---------------------------------------------------------------------------------------------------------


def spread(seeds, name, key, scale=100, digits=0):
    """The seeds' values of a cell, in their order."""
    values = [seed["rows"].get(name, {}).get(key) for seed in seeds]
    cells = ["not run" if value is None else f"{scale * value:.{digits}f}" for value in values]
    return "not run" if set(cells) == {"not run"} else " / ".join(cells)


def tables(seeds):
    """{name: Markdown} of all seeds."""
    percent = functools.partial(spread, seeds)
    plain = functools.partial(spread, seeds, scale=1, digits=2)
    head = ["arm", "judge", "judge, new personas", "true sentences", "drawn: judge", "true", "diversity"]
    head += ["reward, first / last ten steps"]
    lines = []
    for name, title in ARMS.items():
        cells = [percent(name, key) for key in ("judge", "judge_new", "truth", "judge_drawn", "truth_drawn")]
        rewards = "" if not name.endswith("_rl") else f"{percent(name, 'reward_first')}; {percent(name, 'reward_last')}"
        lines.append([title, *cells, plain(name, "diversity"), rewards])
    samplers = [
        ["words, T = 1", percent("words", "truth_drawn"), plain("words", "diversity")],
        ["words, top-p 0.9", percent("words", "truth_drawn_top_p"), plain("words", "diversity_top_p")],
        ["codes, T = 1", percent("codes", "truth_drawn"), plain("codes", "diversity")],
    ]
    reach = [["words, 3 likeliest", percent("words", "reach_top3"), "3", "", "", "", "", percent("words_rl", "judge")]]
    reach += [["words, 6 likeliest", percent("words", "reach_top6"), "6", "", "", "", "", percent("words_rl", "judge")]]
    for name in ("codes", *ABLATIONS):
        cells = [percent(name, "reach"), plain(name, "words_in_reach")]
        cells += [spread(seeds, name, "codes_used", 1), percent(name, "right"), percent(name, "right_shuffled")]
        reach.append(
            [ARMS[f"{name}_rl"].removesuffix(", RL"), *cells, percent(name, "clones"), percent(f"{name}_rl", "judge")]
        )
    chain = []
    for name, title in (("words", "words"), ("codes", "codes")):
        cells = [percent(f"chain_{name}{end}", "accuracy") for end in ("", "_grpo", "_poro")]
        chain.append([title, *cells])
    where = ["arm", "wished responses in reach", "words in reach of a place", "codes used", "words right"]
    where += ["under shuffled codes", "policy = inverse code", "judge after RL"]
    times = [
        [ARMS[name], plain(name, "sample_seconds"), plain(name, "learn_seconds")] for name in ("words_rl", "codes_rl")
    ]
    return {
        "arms": markdown_table(head, lines),
        "samplers": markdown_table(["after SFT, before RL", "true sentences", "diversity"], samplers),
        "reach": markdown_table(where, reach),
        "chains": markdown_table(["accuracy without the policy", "SFT", "+ GRPO", "+ PolicyRollout"], chain),
        "times": markdown_table(["arm", "seconds of sampling a step", "of learning"], times),
    }


def draw(seeds, path):
    """Judge by arm, a dot per seed; and against the share of wished responses in reach."""
    pyplot = plotting()
    if pyplot is None:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), width_ratios=(3, 2))
    for k, (name, title) in enumerate(reversed(ARMS.items())):
        for key, color, shift in (("judge", "#1f5f8b", 0.12), ("judge_new", "#d1791f", -0.12)):
            values = [seed["rows"][name][key] for seed in seeds if name in seed["rows"]]
            label = {"judge": "trained personas", "judge_new": "held-out personas"}[key] if k == 0 else None
            left.plot([100 * v for v in values], [k + shift] * len(values), "o", color=color, ms=5, label=label)
    left.set_yticks(range(len(ARMS)), [*reversed(ARMS.values())])
    left.set_xlabel("judge, F1 in %")
    left.set_xlim(0, 102)
    left.legend(frameon=False, fontsize=8)
    for name, color in zip(("codes", *ABLATIONS), ("#1f5f8b", "#6a4c93", "#2a9d8f", "#c1121f")):
        points = [
            (s["rows"][name]["reach"], s["rows"][f"{name}_rl"]["judge"]) for s in seeds if f"{name}_rl" in s["rows"]
        ]
        if points:
            title = ARMS[f"{name}_rl"].removesuffix(", RL")
            right.plot(*zip(*[(100 * a, 100 * b) for a, b in points]), "o", color=color, ms=5, label=title)
    right.set_xlabel("wished responses in reach before RL, %")
    right.set_ylabel("judge after RL, %")
    right.legend(frameon=False, fontsize=8)
    keep(figure, path)


def write_tables(out):
    seeds = [json.loads(path.read_text()) for path in sorted(out.glob("seed*/results.json"))]
    folder = ROOT / "results"
    write_json(folder / "latent.json", {"seeds": seeds})
    fill(folder / "latent.md", tables(seeds))
    fill(Path(__file__).with_name("README.md"), tables(seeds))
    draw(seeds, folder / "latent.png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m variants.latent.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="runs/latent", metavar="DIR", help="folder of all runs (default runs/latent)")
    parser.add_argument("--seed", type=int, default=0, help="draws data, personas and training (default 0)")
    parser.add_argument("--tables", action="store_true", help="run nothing; write results/latent.* from the seeds")
    args = parser.parse_args(argv)
    if args.tables:
        return write_tables(Path(args.out))
    folder = Path(args.out).resolve() / f"seed{args.seed}"
    one_seed(folder, args.seed)
    draw([json.loads((folder / "results.json").read_text())], folder / "latent.png")


if __name__ == "__main__":
    command(main)
