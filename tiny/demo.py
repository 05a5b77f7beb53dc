"""The whole method on the tiny base, in minutes: one policy that the model never saw, with and without the stages.

    python -m tiny.demo --out runs/demo --seed 0        (make demo SEED=0)
    python -m tiny.demo --out runs/demo-tools --world tools --seed 0        (make demo-tools SEED=0)
    python -m tiny.demo --tables                        write README's table and figure again from results/demo

A third of the policy's sections never occurs in the SFT data. Every stage is one of the scripts that users run, two at
a time; every row answers the same unseen pictures without the policy in the prompt. Writes results.json, report.html
and report.png. The rows follow the paper's ablation. `trimpi` is ours in two points: it learns its CPT items in
response form, and the base, which still follows policies, samples its policy-aware half; `trimpi_paper` is as the paper
has it. In the world of tools a query is one turn of a dialogue, its answer a tool call (tiny/tools.py), and the reward
that of GTAPolicy: half for the tool and its version, half for the arguments.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data import InputError, claim, command, write_text
from tiny import processes
from tiny.report import demo_table, draw_demo, fill, provenance, write_report

ROOT = Path(__file__).resolve().parent.parent
BASES = {"clevr": ROOT / "tiny" / "base", "tools": ROOT / "tiny" / "tools_base"}
BASE = BASES["clevr"]

COMMON = "--full --no-train-vision --warmup 5 --max-prompt 2000 --max-response 200 --overwrite".split()
LEARN = "--batch-size 16 --micro-batch 16 --beta2 0.98"
CPT = f"{LEARN} --steps 60 --lr 5e-4".split()
SFT = f"{LEARN} --steps 40 --lr 3e-4".split()
# DAPO's loss (mean over a step's tokens, no KL) on every group: no dynamic sampling. report.LOSS says so under tables.
RL = "--dynamic-tries 0 --batch-size 8 --micro-batch 64 --steps 80 --lr 2e-4 --beta2 0.98 --check 0".split()
GRPO = "--algorithm dapo --group-size 8 --policy-rollouts 0".split()
PORO = "--algorithm dapo --group-size 4 --policy-rollouts 4".split()  # samples as many responses

# name: (script, stage that it starts from, flags); the names are the study's, too
RUNS = {
    "sft": ("train_sft", None, SFT),
    "cpt_response": ("train_cpt", None, [*CPT, "--kinds", "response"]),
    "cpt": ("train_cpt", None, [*CPT, "--kinds", "applied"]),
    "sft_poro": ("train_rl", "sft", [*RL, *PORO]),
    "sft_grpo": ("train_rl", "sft", [*RL, *GRPO]),
    "cpt_response_sft": ("train_sft", "cpt_response", SFT),
    "cpt_sft": ("train_sft", "cpt", SFT),
    "trimpi": ("train_rl", "cpt_response_sft", [*RL, *PORO, "--frozen-sampler", "base"]),
    "cpt_response_sft_grpo": ("train_rl", "cpt_response_sft", [*RL, *GRPO]),
    "trimpi_paper": ("train_rl", "cpt_sft", [*RL, *PORO]),
}
ROWS = ("in_context no_policy sft cpt_response_sft sft_grpo sft_poro cpt_response_sft_grpo trimpi trimpi_paper").split()
OURS = (*RUNS, *"data others eval *.log *.draft-* results.json report.html report.png".split())  # what --out holds
OWN = "--queries 400 --sft 24 --test 200 --leave-out 0.34".split()
OTHERS = "--policies 12 --queries 24 --sft 24 --test 1".split()  # to keep in practice on
KINDS = "applied,document,response"  # of CPT items
CALLS = ["--reward", "data.gta_score:call=0.9,format=0.1"]  # what RL rewards in the world of tools


def runs_of(world):
    """RUNS; calls take longer than decisions: in the world of tools fewer steps of RL, and no control of `trimpi`."""
    if world == "clevr":
        return RUNS
    fewer = lambda script: [*CALLS, "--steps", "60"] if script == "train_rl" else []
    runs = {name: (script, before, [*flags, *fewer(script)]) for name, (script, before, flags) in RUNS.items()}
    del runs["cpt_response_sft_grpo"]
    return runs


def call(arguments, log):
    """Run one of our commands in a process of its own; what it prints goes to a file, its error becomes ours."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = processes.run([sys.executable, *map(str, arguments)], log, cwd=ROOT, env=environment)
    if code:
        last = Path(log).read_text().strip().splitlines()[-1:] or [""]
        said = f"{arguments[0]} {arguments[1]}: ended with code {code}, {last[0]}"
        raise InputError(f"{said} (whole log: {log})")


def steps_done(run):
    try:
        return sum(1 for _ in open(run / "metrics.jsonl"))
    except OSError:
        return 0


def train(name, out, base, data, replay, seed, slot, world):
    """One run with its progress bar -> seconds."""
    script, before, flags = runs_of(world)[name]
    folder, began = out / name, time.time()
    start = ["--init", out / before] if before else []
    extra = ["--replay", replay] if script != "train_rl" else []
    extra += ["--max-response", 1000] if script == "train_cpt" else []  # a response-form item names all sections
    paths = ["--model", base, *start, "--data", data, "--out", folder, *extra]
    total = int(flags[-flags[::-1].index("--steps")])
    with tqdm(total=total, desc=f"{name:21}", unit="step", position=slot, leave=True, disable=None) as bar:
        with ThreadPoolExecutor(1) as one:
            work = one.submit(call, [f"{script}.py", *COMMON, *paths, *flags, "--seed", seed], out / f"{name}.log")
            while not work.done():
                bar.update(steps_done(folder) - bar.n)
                time.sleep(0.3)
            work.result()
            bar.update(total - bar.n)
    return time.time() - began


def evaluate(row, out, model, data):
    """One row of the table: accuracy on unseen pictures, on paths with and without sections that SFT showed."""
    paths = ["--model", model, "--data", data, "--out", out / "eval", "--seen", Path(data) / "sft.jsonl"]
    aware = ["--policy-in-context"] if row == "in_context" else []
    call(["evaluate.py", *paths, "--name", row, "--max-response", 200, *aware], out / f"{row}.eval.log")


def run_all(out, base, data, replay, seed, world):
    """Every run after the one it starts from, two at a time, each followed by its evaluation -> {name: seconds}."""
    runs = runs_of(world)
    seconds, waiting, finished, slots = {}, list(runs), set(), [0, 1]

    def one(name, slot):
        seconds[name] = train(name, out, base, data, replay, seed, slot, world)
        if name in ROWS:
            evaluate(name, out, out / name, data)
        return name, slot

    with ThreadPoolExecutor(2) as pool:
        going = [pool.submit(evaluate, row, out, base, data) for row in ROWS[:2]]
        for work in going:
            work.result()
        going = []
        while waiting or going:
            ready = [name for name in waiting if runs[name][1] is None or runs[name][1] in finished]
            while ready and slots:
                waiting.remove(ready[0])
                going.append(pool.submit(one, ready.pop(0), slots.pop(0)))
            for work in [work for work in going if work.done()]:
                name, slot = work.result()
                finished.add(name)
                slots.append(slot)
                going.remove(work)
            time.sleep(0.2)
    return seconds


def draw_data(out, shape, seed, clevr_root):
    """The policy with its queries, and other policies for replay -> their two folders; drawn at the same time.

    shape: the command that draws them, as a list, and its flags that say how large a policy is.
    """
    data, replay = out / "data", out / "others"
    own = OWN
    if clevr_root:
        scenes = lambda split: json.loads(Path(clevr_root, "scenes", f"CLEVR_{split}_scenes.json").read_text())[
            "scenes"
        ]
        train, test = len(scenes("train")), len(scenes("val"))
        own = ["--clevr-root", Path(clevr_root).resolve()]
        own += ["--queries", train, "--sft", max(1, train // 2), "--test", test]
    own = ["-m", *shape, "--out", data, "--seed", seed, *own]
    others = ["-m", *shape, "--out", replay, "--seed", seed + 1000, *OTHERS]
    with ThreadPoolExecutor(2) as pool:
        for work in [pool.submit(call, own, out / "data.log"), pool.submit(call, others, out / "others.log")]:
            work.result()
    return data, replay


def write_tables():
    """README's table and results/demo/report.png, from results/demo/results.json."""
    folder = ROOT / "results" / "demo"
    results = json.loads((folder / "results.json").read_text())
    fill(ROOT / "README.md", {"demo": demo_table(results)})
    draw_demo(results["rows"], folder / "report.png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tiny.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/demo", metavar="DIR", help="folder of all runs and the report (default runs/demo)")
    add("--world", choices=BASES, default="clevr", help="decisions about pictures, or calls of tools (default clevr)")
    add("--model", metavar="DIR", help="the base (default tiny/base, in the world of tools tiny/tools_base)")
    add("--depth", type=int, default=3, help="layers of the policy (default 3)")
    add("--tools", type=int, default=8, help="tools of the policy in the world of tools (default 8)")
    add("--seed", type=int, default=0, help="draws the policy, the scenes and the training (default 0)")
    add("--clevr-root", metavar="FOLDER", help="pictures of a folder in the official CLEVR layout instead of our own")
    add("--overwrite", action="store_true", help="replace the folder if it exists")
    add("--tables", action="store_true", help="train nothing; write README's table and figure from results/demo")
    args = parser.parse_args(argv)
    if args.tables:
        return write_tables()
    out, base, began = Path(args.out).resolve(), Path(args.model or BASES[args.world]).resolve(), time.time()
    if not (base / "model.safetensors").is_file():
        raise InputError(f"{base}: found no checkpoint, expected the tiny base (python -m tiny.pretrain makes it)")
    if claim(out, "tiny.demo", OURS, fresh=args.overwrite):
        raise InputError(f"{out}: holds another run, expected a new folder (--overwrite replaces it)")

    calls = args.world == "tools"
    unit, count = ("tools", args.tools) if calls else ("depth", args.depth)
    shape = ["tiny.tools", "--tools", count] if calls else ["tiny.data", "--depth", count, "--cpt", KINDS]
    print(f"drawing a policy ({unit} {count}), its pictures, and policies to replay (seed {args.seed})", flush=True)
    with processes.ended_together():
        data, replay = draw_data(out, shape, args.seed, args.clevr_root)
        seconds = run_all(out, base, data, replay, args.seed, args.world)
    found = {row["name"]: row for row in json.loads((out / "eval" / "results.json").read_text())["rows"]}
    policy = json.loads((data / "policies.json").read_text())[0]
    hidden = data / "left_out.json"
    kept = lambda row: {key: value for key, value in found[row].items() if key not in ("by_policy", "model")}
    results = {
        "seed": args.seed,
        unit: count,
        "policy": policy["name"],
        "text": policy["text"],
        "seconds": round(time.time() - began),
        **provenance(),
        "left_out": json.loads(hidden.read_text())[policy["name"]] if hidden.exists() else [],
        "rows": [{**kept(row), "train_seconds": round(seconds.get(row, 0))} for row in ROWS if row in found],
    }
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_report(out, results)
    print(table(results))
    print(f"{results['seconds']} s; {out / 'report.html'}")


def table(results):
    """The rows as text: accuracy with its interval, on paths that SFT showed and others, share of exact chains."""
    lines = [f"\n{'':21}  {'accuracy':>8}  {'95 % interval':>14}  {'seen':>5}  {'unseen':>6}  {'chains':>6}  {'n':>4}"]
    for row in results["rows"]:
        low, high = row["interval"]
        shares = [(row.get(side) or {}).get("accuracy") for side in ("seen", "unseen")]
        seen, unseen = ("-" if share is None else f"{share:.2f}" for share in shares)
        start = f"{row['name']:21}  {row['accuracy']:8.3f}  [{low:.3f}, {high:.3f}]  {seen:>5}  {unseen:>6}"
        lines.append(f"{start}  {row['exact_chain']:6.2f}  {row['n']:4}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
