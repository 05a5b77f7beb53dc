"""The paper's ablation, and what its reviewers asked for, on the tiny base: many short runs of the scripts that users run.

    python -m tiny.study --out runs/study --hours 6           stop it at any time; the same command goes on

Every experiment runs for each policy and seed; the most telling ones come first, one policy after the other, so that a
study cut short still compares like with like. A finished run leaves its row in <out>/rows.jsonl and is not done again.
Writes results/study.json, study.md and study.png: means over policies and seeds with a 95 % interval of the mean (Student's t).
"""

import argparse
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import InputError, command
from tiny.demo import BASE, COMMON, CPT, GRPO, PORO, RL, ROOT, SFT, call
from tiny.report import PAPER, draw_study, provenance

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 1 to 9 degrees of freedom


def rl(*flags, steps=60):
    """RL flags with another number of steps and what the experiment changes."""
    base = list(RL)
    base[base.index("--steps") + 1] = str(steps)
    return [*base, *map(str, flags)]


def group(G, K):
    return ["--group-size", G, "--policy-rollouts", K]


def cpt(kinds, *flags):
    return [*CPT, "--kinds", kinds, *map(str, flags)]


# worlds: what a policy is drawn as. (flags of tiny.data, policies at once)
WORLDS = {
    "T2": ["--depth", 2], "T3": ["--depth", 3], "T4": ["--depth", 4], "T6": ["--depth", 6, "--queries", 800, "--sft", 100],
    "M2": ["--depth", 2, "--variant", "M"], "M4": ["--depth", 4, "--variant", "M"],
    "T3 a third left out": ["--depth", 3, "--leave-out", 0.34],
    "T3 two at once": ["--depth", 3, "--policies", 2, "--queries", 300], "T3 four at once": ["--depth", 3, "--policies", 4, "--queries", 200],
    "T3 eight at once": ["--depth", 3, "--policies", 8, "--queries", 100],
}  # fmt: skip

# name: (script, the run it starts from, flags). Rows of METHOD 6 first, then one question after the other.
RUNS = {
    "sft": ("train_sft", None, SFT),
    "sft_grpo": ("train_rl", "sft", rl(*GRPO, "--algorithm", "grpo")),
    "sft_poro": ("train_rl", "sft", rl(*PORO, "--algorithm", "grpo")),
    "sft_dapo": ("train_rl", "sft", rl(*GRPO, "--dynamic-tries", 20)),
    "sft_poro_dapo": ("train_rl", "sft", rl(*PORO, "--dynamic-tries", 20)),
    "cpt": ("train_cpt", None, cpt("applied")),
    "cpt_sft": ("train_sft", "cpt", SFT),
    "cpt_sft_grpo": ("train_rl", "cpt_sft", rl(*GRPO)),
    "trimpi_paper": ("train_rl", "cpt_sft", rl(*PORO)),
    "cpt_response": ("train_cpt", None, cpt("response")),
    "cpt_response_sft": ("train_sft", "cpt_response", SFT),
    "cpt_response_sft_grpo": ("train_rl", "cpt_response_sft", rl(*GRPO)),
    "trimpi": ("train_rl", "cpt_response_sft", rl(*PORO, "--frozen-sampler", "base")),
    # 1. K of G + K, and what each part of PolicyRollout does
    **{f"poro {G}+{K}": ("train_rl", "sft", rl(*group(G, K))) for G, K in ((8, 0), (7, 1), (6, 2), (4, 4), (2, 6))},
    "statistics apart": ("train_rl", "sft", rl(*PORO, "--separate-halves")),
    "standard half only": ("train_rl", "sft", rl(*PORO, "--standard-only")),
    "true sampler's ratio": ("train_rl", "sft", rl(*PORO, "--aware-loss", "truncated")),
    "right ones only": ("train_rl", "sft", rl(*PORO, "--aware-right-only")),
    "frozen sampler": ("train_rl", "sft", rl(*PORO, "--frozen-sampler", "start")),
    "replay in RL": ("train_rl", "sft", rl(*PORO, "--replay", "OTHERS")),
    "frozen sampler, replay, long": ("train_rl", "sft", rl(*PORO, "--frozen-sampler", "start", "--replay", "OTHERS", steps=180)),
    # 3. what CPT is worth
    "cpt documents": ("train_cpt", None, cpt("document")),
    "cpt documents, sft": ("train_sft", "cpt documents", SFT),
    "cpt documents, sft, poro": ("train_rl", "cpt documents, sft", rl(*PORO)),
    "cpt sections": ("train_cpt", None, cpt("response,document,applied")),
    "cpt sections, sft": ("train_sft", "cpt sections", SFT),
    "cpt sections, sft, poro": ("train_rl", "cpt sections, sft", rl(*PORO)),
    "cpt half masked": ("train_cpt", None, cpt("applied", "--mask-visual", 0.5)),
    "cpt half masked, sft": ("train_sft", "cpt half masked", SFT),
    "sft, as long as cpt and sft": ("train_sft", None, [*SFT, "--steps", 100]),
    # 4. without SFT; more SFT; answers only; LoRA; the policy in the prompt, removed at test
    "base, poro": ("train_rl", None, rl(*PORO, steps=120)),
    "cpt, poro": ("train_rl", "cpt_response", rl(*PORO)),
    "sft on all data": ("train_sft", None, [*SFT, "--split", "rl.jsonl", "--steps", 120]),
    "answers only": ("train_sft", None, [*SFT, "--answer-only"]),
    "lora": ("train_sft", None, [*SFT, "--no-full", "--lr", 2e-3]),
    "policy in the prompt": ("train_sft", None, [*SFT, "--policy-in-prompt"]),
    # 7. relatives
    "opcd": ("train_rl", "sft", rl("--algorithm", "opcd", *group(8, 0))),
    "opcd, all words": ("train_rl", "sft", rl("--algorithm", "opcd", *group(8, 0), "--opcd-words", 204)),
    "recall reward": ("train_rl", "sft", rl(*GRPO, "--reward", "accuracy=0.6,format=0.1,data.referral:recall=0.3")),
    "icpo": ("train_rl", "sft", rl(*group(7, 1), "--aware-right-only", "--aware-bonus", 0.2, "--aware-loss", "shaped")),
}  # fmt: skip

MAIN = ["sft", "sft_grpo", "sft_poro", "sft_dapo", "sft_poro_dapo", "cpt_sft", "cpt_sft_grpo", "trimpi_paper", "trimpi"]
EXTRA = [name for name in RUNS if list(RUNS).index(name) > list(RUNS).index("trimpi")]
PLAN = [  # (world, rows): in this order
    ("T3 a third left out", MAIN), ("T4", MAIN), ("T2", MAIN[:5] + MAIN[-1:]), ("T6", ["sft", "sft_grpo", "sft_poro", "frozen sampler, replay, long", "trimpi"]),
    ("M4", ["sft", "sft_grpo", "sft_poro", "trimpi"]), ("M2", ["sft", "sft_grpo", "sft_poro", "trimpi"]),
    ("T3", EXTRA), ("T4", ["frozen sampler", "replay in RL", "frozen sampler, replay, long"]),
    *[(world, ["sft", "sft_grpo", "sft_poro", "frozen sampler"]) for world in ("T3 two at once", "T3 four at once", "T3 eight at once")],
]  # fmt: skip


class Study:
    """The runs of one study: what is done, and how one more is."""

    def __init__(self, out, model):
        self.out, self.model, self.rows = out, model, out / "rows.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self.done = {self.key(row) for row in map(json.loads, self.rows.read_text().splitlines())} if self.rows.exists() else set()

    @staticmethod
    def key(row):
        return row["world"], row["policy"], row["seed"], row["name"]

    def data(self, world, policy):
        """The folders of one drawn policy and of others to replay, made if they are missing."""
        folders = []
        for number, extra in ((policy, WORLDS[world]), (policy + 1000, [*WORLDS[world][:4], "--policies", 12, "--queries", 24, "--sft", 24, "--test", 1])):
            if "--leave-out" in extra and number >= 1000:
                extra = [flag for flag in extra if flag not in ("--leave-out", 0.34)]
            folder = self.out / "data" / world.replace(" ", "_") / str(number)
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                defaults = ["--queries", 400, "--sft", 24, "--test", 200] if number < 1000 else []
                call(["-m", "tiny.data", "--out", folder, *defaults, *extra, "--cpt", "applied,document,response", "--seed", number],
                     self.out / "data.log")  # fmt: skip
            folders.append(folder)
        return folders

    def run(self, world, policy, seed, name):
        """Train one run, after the one it starts from, evaluate it with and without the policy, and note its row."""
        data, others = self.data(world, policy)
        place = self.out / "runs" / world.replace(" ", "_") / f"{policy}-{seed}"
        folder, log = place / name.replace(" ", "_"), self.out / "runs.log"
        began = time.time()
        if name in ("in_context", "no_policy"):
            found, kept = self.evaluate(self.model, data, place, name, aware=name == "in_context"), None
        else:
            script, before, flags = RUNS[name]
            if before and (world, policy, seed, before) not in self.done:
                self.run(world, policy, seed, before)
            place.mkdir(parents=True, exist_ok=True)
            start = ["--init", place / before.replace(" ", "_")] if before else []
            flags = [others if flag == "OTHERS" else flag for flag in flags]
            extra = ["--replay", others] if script != "train_rl" else []
            call([f"{script}.py", "--model", self.model, *start, "--data", data, "--out", folder, *extra, *COMMON, *flags, "--seed", seed], log)
            found = self.evaluate(folder, data, place, name)
            kept = self.evaluate(folder, data, place, f"{name} with P", aware=True)["accuracy"]
        row = {"world": world, "policy": policy, "seed": seed, "name": name, "accuracy": found["accuracy"], "n": found["n"],
               "exact_chain": found["exact_chain"], "with_policy": kept, "seconds": round(time.time() - began, 1),
               **{side: (found.get(side) or {}).get("accuracy") for side in ("seen", "unseen")}}  # fmt: skip
        with open(self.rows, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.done.add(self.key(row))
        print(f"{world}  policy {policy}  seed {seed}  {name}: {row['accuracy']:.3f}  ({row['seconds']} s)", flush=True)

    def evaluate(self, model, data, place, name, aware=False):
        out = place / "eval" / name.replace(" ", "_")
        call(["evaluate.py", "--model", model, "--data", data, "--out", out, "--name", "row", "--seen", data / "sft.jsonl", "--max-response", 200,
              *(["--policy-in-context"] if aware else [])], self.out / "runs.log")  # fmt: skip
        return json.loads((out / "results.json").read_text())["rows"][0]


def summary(rows):
    """{world: [{"name", mean, interval of the mean, runs, n, ...}]} of the finished runs."""
    worlds = {}
    for world in dict.fromkeys(row["world"] for row in rows):
        mine = [row for row in rows if row["world"] == world]
        worlds[world] = []
        for name in dict.fromkeys(row["name"] for row in mine):
            found = [row for row in mine if row["name"] == name]
            mean = lambda key: float(np.mean([r[key] for r in found if r.get(key) is not None])) if any(r.get(key) is not None for r in found) else None
            accuracy = [row["accuracy"] for row in found]
            half = T95[min(len(accuracy) - 2, 8)] * np.std(accuracy, ddof=1) / len(accuracy) ** 0.5 if len(accuracy) > 1 else None
            worlds[world].append({"name": name, "accuracy": mean("accuracy"), "half_interval": half, "runs": len(found),
                                  "n": sum(row["n"] for row in found), **{key: mean(key) for key in ("seen", "unseen", "exact_chain", "with_policy")}})  # fmt: skip
    return worlds


def write(rows, folder):
    """results/study.json, study.md and study.png."""
    folder.mkdir(parents=True, exist_ok=True)
    worlds, share, made = summary(rows), lambda x: "–" if x is None else f"{x:.3f}", provenance()
    (folder / "study.json").write_text(json.dumps({**made, "worlds": worlds, "rows": rows}, indent=1) + "\n")
    draw_study(worlds, folder / "study.png")
    lines = ["# The study on the tiny base", "", "Mean accuracy without the policy in the prompt over policies and seeds, with the 95 % interval of that mean; "
             "`with P`: accuracy with the policy put back. The paper's figures: Qwen2.5-VL-7B, T, N = 6. "
             f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}.", ""]  # fmt: skip
    for world, found in worlds.items():
        lines += [f"## {world}", "", "| | accuracy | ± | seen | unseen | exact chains | with P | runs | n | paper |", "| --- " * 10 + "|"]
        for r in found:
            lines.append(f"| {r['name']} | {share(r['accuracy'])} | {share(r['half_interval'])} | {share(r['seen'])} | {share(r['unseen'])} | "
                         f"{share(r['exact_chain'])} | {share(r['with_policy'])} | {r['runs']} | {r['n']} | {PAPER.get(r['name'], '–')} |")  # fmt: skip
        lines.append("")
    (folder / "study.md").write_text("\n".join(lines))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tiny.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/study", metavar="DIR", help="working folder; finished runs in it are kept (default runs/study)")
    parser.add_argument("--results", default=str(ROOT / "results"), metavar="DIR", help="folder of study.json and study.md (default results)")
    parser.add_argument("--model", default=str(BASE), metavar="DIR", help="the base (default tiny/base)")
    parser.add_argument("--policies", type=int, default=5, help="policies per world (default 5)")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds per policy (default 2)")
    parser.add_argument("--hours", type=float, default=6.0, help="after which no run is started any more (default 6)")
    parser.add_argument("--worlds", default="", metavar="NAMES", help=f"only these, by commas: {', '.join(WORLDS)}")
    parser.add_argument("--fresh", action="store_true", help="delete what the working folder holds")
    args = parser.parse_args(argv)
    wanted = [name.strip() for name in args.worlds.split(",")] if args.worlds else list(WORLDS)
    if set(wanted) - set(WORLDS) or min(args.policies, args.seeds) < 1 or args.hours <= 0:
        raise InputError(f"found worlds {args.worlds!r}, {args.policies} policies, {args.seeds} seeds, {args.hours} hours, expected some of "
                         f"{', '.join(WORLDS)}, and numbers above 0")  # fmt: skip
    out, ends = Path(args.out).resolve(), time.time() + 3600 * args.hours
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    study = Study(out, Path(args.model).resolve())

    def column(world, policy, seed, names):
        """One policy and seed: a chain of runs in one thread, since later ones start from earlier ones."""
        for name in ["in_context", "no_policy", *names]:
            if (world, policy, seed, name) not in study.done and time.time() < ends:
                study.run(world, policy, seed, name)

    for world, names in PLAN:
        if world in wanted:
            for policy in range(args.policies):
                study.data(world, policy)
            with ThreadPoolExecutor(2) as pool:
                works = [pool.submit(column, world, policy, seed, names) for seed in range(args.seeds) for policy in range(args.policies)]
                for work in works:
                    work.result()
            write([json.loads(line) for line in study.rows.read_text().splitlines()], Path(args.results))
    print(Path(args.results) / "study.md")


if __name__ == "__main__":
    command(main)
