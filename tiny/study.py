"""The paper's ablation, and what its reviewers asked for, on the tiny base: many short runs of the scripts that users run.

    python -m tiny.study --out runs/study --hours 6           stop it at any time; the same command goes on

Every experiment runs for several policies, and the main ones for three training seeds, the most telling first, so that a study
cut short still compares like with like. A finished run leaves its row in <out>/rows.jsonl and is not done again. Writes
results/study.json, study.md and three figures: means over policies and seeds with a 95 % interval of the mean (Student's t),
of the main rows and of all, and what the two halves of PolicyRollout's groups earned while it trained.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import InputError, command
from data.override import override
from tiny.demo import BASE, COMMON, CPT, GRPO, PORO, RL, ROOT, SFT
from tiny.report import PAPER, draw_depths, draw_halves, draw_study, lines_of, provenance
from tiny.world import Terse

T95 = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
    2.20,
    2.18,
    2.16,
    2.14,
)  # Student's t, 1 to 14 degrees of freedom


def rl(*flags, steps=60):
    """RL flags with another number of steps and what the experiment changes."""
    base = list(RL)
    base[base.index("--steps") + 1] = str(steps)
    return [*base, *map(str, flags)]


def group(G, K):
    return ["--group-size", G, "--policy-rollouts", K]


def cpt(kinds, *flags):
    return [*CPT, "--kinds", kinds, *map(str, flags)]


# Name of a world: flags of tiny.data, beside 400 training queries, 24 with chains, and 200 test queries. In most, SFT sees no chain
# through a third of the policy: where it sees all (T4), it alone comes near the base's level, and RL has little left to find.
WORLDS = {
    **{f"T{n} a third left out": ["--depth", n, "--leave-out", 0.34] for n in (2, 3, 4)},
    "T6 a third left out": ["--depth", 6, "--leave-out", 0.34, "--queries", 800, "--sft", 60],
    **{f"M{n} a third left out": ["--depth", n, "--variant", "M", "--leave-out", 0.34] for n in (2, 4)},
    "T4": ["--depth", 4],
    "T3 two at once": ["--depth", 3, "--policies", 2, "--leave-out", 0.34, "--queries", 300, "--test", 100],
    "T3 four at once": ["--depth", 3, "--policies", 4, "--leave-out", 0.34, "--queries", 200, "--test", 50],
    "T3 eight at once": ["--depth", 3, "--policies", 8, "--leave-out", 0.34, "--queries", 100, "--test", 25],
}

LONGEST = {2: 48, 3: 64, 4: 96, 6: 144}  # tokens of a response: what the longest right one takes, and a half more

# name: (script, the run it starts from, flags). The paper's rows first, then one question after the other. GRPO and PolicyRollout
# are as in the demo: DAPO's loss without KL on every group; the rows named dapo draw on for groups that can teach something.
RUNS = {
    "sft": ("train_sft", None, SFT),
    "sft_grpo": ("train_rl", "sft", rl(*GRPO)),
    "sft_poro": ("train_rl", "sft", rl(*PORO)),
    "sft_dapo": ("train_rl", "sft", rl(*GRPO, "--dynamic-tries", 6)),
    "sft_poro_dapo": ("train_rl", "sft", rl(*PORO, "--dynamic-tries", 6)),
    "cpt": ("train_cpt", None, cpt("applied")),
    "cpt_sft": ("train_sft", "cpt", SFT),
    "cpt_sft_grpo": ("train_rl", "cpt_sft", rl(*GRPO)),
    "trimpi_paper": ("train_rl", "cpt_sft", rl(*PORO)),
    "cpt_response": ("train_cpt", None, cpt("response")),
    "cpt_response_sft": ("train_sft", "cpt_response", SFT),
    "cpt_response_sft_grpo": ("train_rl", "cpt_response_sft", rl(*GRPO)),
    "trimpi": ("train_rl", "cpt_response_sft", rl(*PORO, "--frozen-sampler", "base")),
    # 1. K of G + K (8 + 0 and 4 + 4 are above), and what each part of PolicyRollout does
    **{f"poro {G}+{K}": ("train_rl", "sft", rl(*group(G, K))) for G, K in ((7, 1), (6, 2), (2, 6))},
    "statistics apart": ("train_rl", "sft", rl(*PORO, "--separate-halves")),
    "standard half only": ("train_rl", "sft", rl(*PORO, "--standard-only")),
    "true sampler's ratio": ("train_rl", "sft", rl(*PORO, "--aware-loss", "truncated")),
    "right ones only": ("train_rl", "sft", rl(*PORO, "--aware-right-only")),
    "frozen sampler": ("train_rl", "sft", rl(*PORO, "--frozen-sampler", "start")),
    "replay in RL": ("train_rl", "sft", rl(*PORO, "--replay", "OTHERS")),
    "frozen sampler, replay, long": (
        "train_rl",
        "sft",
        rl(*PORO, "--frozen-sampler", "start", "--replay", "OTHERS", steps=180),
    ),
    "trimpi, replay, long": (
        "train_rl",
        "cpt_response_sft",
        rl(*PORO, "--frozen-sampler", "base", "--replay", "OTHERS", steps=180),
    ),
    # 3. what CPT is worth
    "cpt sections": ("train_cpt", None, cpt("section")),
    "cpt sections, sft": ("train_sft", "cpt sections", SFT),
    "cpt sections, sft, poro": ("train_rl", "cpt sections, sft", rl(*PORO)),
    "cpt documents": ("train_cpt", None, cpt("document")),
    "cpt documents, sft": ("train_sft", "cpt documents", SFT),
    "cpt documents, sft, poro": ("train_rl", "cpt documents, sft", rl(*PORO)),
    "cpt all forms": ("train_cpt", None, cpt("response,document,applied")),
    "cpt all forms, sft": ("train_sft", "cpt all forms", SFT),
    "cpt all forms, sft, poro": ("train_rl", "cpt all forms, sft", rl(*PORO)),
    "cpt half masked": ("train_cpt", None, cpt("applied", "--mask-visual", 0.5)),
    "cpt half masked, sft": ("train_sft", "cpt half masked", SFT),
    "cpt unmasked": ("train_cpt", None, cpt("applied", "--mask-visual", 0)),
    "cpt unmasked, sft": ("train_sft", "cpt unmasked", SFT),
    "sft, as long as cpt and sft": ("train_sft", None, [*SFT, "--steps", 100]),
    "sft, as long, poro": ("train_rl", "sft, as long as cpt and sft", rl(*PORO)),
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
}

CORE = ["sft", "sft_grpo", "sft_poro"]
WITH_CPT = ["trimpi", "cpt_sft", "cpt_sft_grpo", "trimpi_paper", "cpt_response_sft", "cpt_response_sft_grpo"]
REST = [*WITH_CPT, "sft_dapo", "sft_poro_dapo"]  # of the paper's rows, beside CORE
HEAL = ["frozen sampler", "replay in RL", "frozen sampler, replay, long", "trimpi, replay, long"]
EXTRA = [name for name in list(RUNS)[list(RUNS).index("trimpi") + 1 :] if name not in HEAL[2:]]
LONGER = ["sft, as long as cpt and sft", "sft, as long, poro"]
UNMASKED = ["cpt half masked, sft", "cpt unmasked, sft"]
THIRD = " a third left out"
WIDE = f"T3{THIRD}"
SEVERAL = ["T3 two at once", "T3 four at once", "T3 eight at once"]
PLAN = [  # (world, rows, policies, seed), in this order
    *[(f"T{n}{THIRD}", CORE, 5, 0) for n in (3, 4, 2, 6)],
    ("T4", CORE, 5, 0),
    (WIDE, REST, 5, 0),
    (f"M2{THIRD}", CORE, 5, 0),
    *[(f"T{n}{THIRD}", CORE, 3, 1) for n in (2, 3, 4)],
    (WIDE, EXTRA, 3, 0),
    *[(f"T{n}{THIRD}", CORE, 3, 2) for n in (2, 3, 4)],
    (f"T6{THIRD}", HEAL[3:], 2, 0),
    *[(f"T6{THIRD}", CORE, 3, seed) for seed in (1, 2)],
    *[(f"T{n}{THIRD}", WITH_CPT, 3, 0) for n in (4, 2, 6)],
    (f"T6{THIRD}", LONGER, 3, 0),
    *[(world, [*CORE, HEAL[2]], 2, 0) for world in SEVERAL],
    (f"M2{THIRD}", [*WITH_CPT[:4], *UNMASKED], 3, 0),
    (f"M4{THIRD}", CORE, 3, 0),
    (f"T6{THIRD}", WITH_CPT, 5, 0),
    (f"T6{THIRD}", HEAL[2:], 5, 0),
    (f"M4{THIRD}", CORE, 5, 0),
    (f"T4{THIRD}", HEAL, 3, 0),
    *[(f"T{n}{THIRD}", REST, 3, 0) for n in (2, 4)],
    *[(f"T{n}{THIRD}", CORE, 5, seed) for seed in (1, 2) for n in (2, 3, 4)],
    (WIDE, REST, 5, 1),
    (f"T6{THIRD}", REST, 3, 0),
    *[(f"M{n}{THIRD}", CORE, 5, 1) for n in (2, 4)],
    (f"M2{THIRD}", REST, 3, 0),
]


COLUMNS = {
    "seen": "seen",
    "unseen": "unseen",
    "exact_chain": "exact chains",
    "referral": "sections",
    "relative": "branching error",
    "with_policy": "with P",
    "others": "others with P",
    "recited": "sections recited",
    "override": "new P under the name",
    "follows_old": "follows the old",
}


@contextlib.contextmanager
def written_to(log):
    """What the scripts print goes to a file."""
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def windows(metrics, key, steps=10):
    """Means over `steps` training steps each: how a curve went, in a few numbers."""
    values = [entry[key] for entry in metrics if key in entry]
    return [round(float(np.mean(values[i : i + steps])), 4) for i in range(0, len(values), steps)]


class Study:
    """The runs of one study: which are done, and how one more is."""

    def __init__(self, out, model):
        self.out, self.model, self.rows = out, model, out / "rows.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self.done = {self.key(row) for row in lines_of(self.rows)}

    @staticmethod
    def key(row):
        return row["world"], row["policy"], row["seed"], row["name"]

    def call(self, module, *arguments):
        """Run one of the house's commands, as its users do, in this process; what it prints goes to a file of this process."""
        with written_to(self.out / f"{os.getpid()}.log"):
            return importlib.import_module(module).main([str(a) for a in arguments])

    def data(self, folder, *flags):
        """A data folder, made if it is missing and only when it is whole."""
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = folder.with_name(f"{folder.name}.{os.getpid()}")
            self.call("tiny.data", "--out", aside, "--overwrite", *flags, "--cpt", "applied,document,section,response")
            aside.rename(folder) if not folder.exists() else shutil.rmtree(aside)
        return folder

    def run(self, world, policy, seed, name):
        """Train one run, after the one it starts from, answer the test with and without the policy, and note its row."""
        flags, shape = WORLDS[world], WORLDS[world][: 4 if "--variant" in WORLDS[world] else 2]
        short = ["--max-response", LONGEST[flags[1]]]
        data = self.data(
            self.out / "data" / world.replace(" ", "_") / str(policy),
            "--queries",
            400,
            "--sft",
            24,
            "--test",
            200,
            *flags,
            "--seed",
            policy,
        )
        others = self.data(
            self.out / "data" / f"others {' '.join(map(str, shape))}".replace(" ", "_"),
            *shape,
            "--policies",
            12,
            "--queries",
            24,
            "--sft",
            24,
            "--test",
            8,
            "--seed",
            1000,
        )
        place, began, more = self.out / "runs" / world.replace(" ", "_") / f"{policy}-{seed}", time.time(), {}
        if name in ("in_context", "no_policy"):
            found = self.evaluate(self.model, data, place, name, short, name == "in_context")
            trained = self.model
        else:
            script, before, flags = RUNS[name]
            if before and (world, policy, seed, before) not in self.done:
                self.run(world, policy, seed, before)
                began = time.time()
            trained = place / name.replace(" ", "_")
            start = ["--init", place / before.replace(" ", "_")] if before else []
            flags = [others if flag == "OTHERS" else flag for flag in flags]
            replay = ["--replay", others] if script != "train_rl" else []
            most = (
                ["--max-response", 1000] if script == "train_cpt" else short
            )  # a response-form item decides every section
            self.call(
                script,
                "--model",
                self.model,
                *start,
                "--data",
                data,
                "--out",
                trained,
                *replay,
                *COMMON,
                *flags,
                *most,
                "--seed",
                seed,
            )
            metrics = lines_of(trained / "metrics.jsonl")
            more = {f"curve_{key}": curve for key in ("accuracy", "accuracy_aware") if (curve := windows(metrics, key))}
            found = self.evaluate(trained, data, place, name, short)
            more["with_policy"] = self.evaluate(trained, data, place, f"{name} with P", short, True)["accuracy"]
        if world == WIDE and name != "no_policy":  # what else was learnt or lost
            more["others"] = self.evaluate(trained, others, place, f"{name} others", short, True)["accuracy"]
            more["recited"] = self.evaluate(trained, data, place, f"{name} recited", [*short, "--recite"])["accuracy"]
            if name in ("in_context", *CORE, *REST, *HEAL):
                changed = self.out / "data" / "override" / str(policy)
                if not changed.exists():
                    override(data, changed, 1, Terse())
                row = self.evaluate(trained, changed, place, f"{name} override", short, True)
                more |= {"override": row["accuracy"], "follows_old": row["follows_old"]}
        row = {
            "world": world,
            "policy": policy,
            "seed": seed,
            "name": name,
            "seconds": round(time.time() - began, 1),
            **{key: found.get(key) for key in ("accuracy", "n", "exact_chain", "referral", "relative")},
            **{side: (found.get(side) or {}).get("accuracy") for side in ("seen", "unseen")},
            **more,
        }
        with open(self.rows, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.done.add(self.key(row))

    def evaluate(self, model, data, place, name, short, aware=False):
        seen = ["--seen", data / "sft.jsonl"] if (data / "sft.jsonl").exists() else []
        return self.call(
            "evaluate",
            "--model",
            model,
            "--data",
            data,
            "--out",
            place / "eval" / name.replace(" ", "_"),
            "--name",
            "row",
            *seen,
            *short,
            *(["--policy-in-context"] if aware else []),
        )


def column(out, model, world, policy, seed, names, ends):
    """The rows of one policy and seed that are missing, in a process of one thread; later runs start from earlier ones."""
    study, parent = Study(out, model), parent_process()  # a study that was stopped stops its processes, too
    for name in [*(["in_context", "no_policy"] if seed == 0 else []), *names]:
        if (
            (world, policy, seed, name) not in study.done
            and time.time() < ends
            and (parent is None or parent.is_alive())
        ):
            study.run(world, policy, seed, name)
    return f"{world}, policy {policy}, seed {seed}"


def half_interval(values):
    """Half of the 95 % interval of their mean (Student's t); None of a single value."""
    n = len(values)
    return T95[min(n - 1, len(T95)) - 1] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else None


def summary(rows):
    """{world: [{"name", mean, interval of the mean, runs, n, ...}]} of the finished runs."""
    worlds = {}
    for world in sorted({row["world"] for row in rows}, key=[*WORLDS].index):
        mine = [row for row in rows if row["world"] == world]
        worlds[world] = []
        for name in sorted({row["name"] for row in mine}, key=["in_context", "no_policy", *RUNS].index):
            found = [row for row in mine if row["name"] == name]
            values = {key: [row[key] for row in found if row.get(key) is not None] for key in ("accuracy", *COLUMNS)}
            worlds[world].append(
                {
                    "name": name,
                    "half_interval": half_interval(values["accuracy"]),
                    "runs": len(found),
                    "n": sum(row["n"] for row in found),
                    **{key: float(np.mean(value)) if value else None for key, value in values.items()},
                }
            )
    return worlds


def differences(rows):
    """PolicyRollout less GRPO for the same policy and seed: {world: (mean, half of its 95 % interval, pairs)}."""
    right, found = {Study.key(row): row["accuracy"] for row in rows}, {}
    for world, policy, seed, name in right:
        if name == "sft_poro" and (world, policy, seed, "sft_grpo") in right:
            found.setdefault(world, []).append(
                right[world, policy, seed, name] - right[world, policy, seed, "sft_grpo"]
            )
    return {world: (float(np.mean(d)), half_interval(d), len(d)) for world, d in found.items() if len(d) > 1}


def correlations(rows):
    """Over all runs with a policy-aware half: Pearson's r of its accuracy in training, and of the gap between the halves, both in
    the first ten steps, with the accuracy without the policy in the end."""
    runs = [
        (r["curve_accuracy_aware"][0], r["curve_accuracy_aware"][0] - r["curve_accuracy"][0], r["accuracy"])
        for r in rows
        if any(r.get("curve_accuracy_aware", ()))
    ]  # GRPO's has none
    if len(runs) < 3:
        return None
    table = np.corrcoef(np.array(runs).T)
    return {"runs": len(runs), "aware_half": float(table[0, 2]), "gap": float(table[1, 2])}


def write(rows, folder):
    """results/study.json, study.md, study.png, study_depths.png and study_halves.png."""
    folder.mkdir(parents=True, exist_ok=True)
    worlds, made, pairs, tied = summary(rows), provenance(), differences(rows), correlations(rows)
    share = lambda x: "–" if x is None else f"{x:.3f}"
    (folder / "study.json").write_text(
        json.dumps({**made, "worlds": worlds, "poro_less_grpo": pairs, "correlations": tied, "rows": rows}, indent=1)
        + "\n"
    )
    draw_depths(
        {f"{world[0]}, N = {world[1]}": found for world, found in worlds.items() if world.endswith(THIRD)},
        folder / "study_depths.png",
    )
    draw_study(worlds, folder / "study.png")
    draw_halves(rows, folder / "study_halves.png")
    lines = [
        "# The study on the tiny base",
        "",
        "Mean accuracy without the policy in the prompt over policies and seeds, ± half of the 95 % interval of that mean; "
        "`with P`: accuracy with the policy put back; `sections`: words of the named sections that are right. "
        f"The paper's figures: Qwen2.5-VL-7B, T, N = 6. {made['hardware']}, torch {made['torch']}, commit {made['commit']}.",
        "",
        "SFT + PolicyRollout less SFT + GRPO, the same policy and seed:",
        "",
        "| world | difference | ± | pairs |",
        "| --- " * 4 + "|",
        *[f"| {world} | {mean:+.3f} | {half:.3f} | {count} |" for world, (mean, half, count) in pairs.items()],
        "",
    ]
    if tied:
        lines += [
            f"Over {tied['runs']} runs, accuracy in the end correlates with the policy-aware half's accuracy in the first ten steps by "
            f"r = {tied['aware_half']:.2f}, with its lead over the standard half by r = {tied['gap']:.2f}.",
            "",
        ]
    for world, found in worlds.items():
        shown = [key for key in COLUMNS if any(r[key] is not None for r in found)]
        lines += [
            f"## {world}",
            "",
            "| | accuracy | ± | " + " | ".join(COLUMNS[key] for key in shown) + " | runs | n | paper |",
            "| --- " * (len(shown) + 6) + "|",
        ]
        lines += [
            f"| {r['name']} | {share(r['accuracy'])} | {share(r['half_interval'])} | "
            + " | ".join(share(r[key]) for key in shown)
            + f" | {r['runs']} | {r['n']} | {PAPER.get(r['name'], '–')} |"
            for r in found
        ]
        lines.append("")
    (folder / "study.md").write_text("\n".join(lines))


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tiny.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        default="runs/study",
        metavar="DIR",
        help="working folder; finished runs in it are kept (default runs/study)",
    )
    parser.add_argument(
        "--results",
        default=str(ROOT / "results"),
        metavar="DIR",
        help="folder of study.json and study.md (default results)",
    )
    parser.add_argument("--model", default=str(BASE), metavar="DIR", help="the base (default tiny/base)")
    parser.add_argument(
        "--policies", type=int, default=5, help="policies per experiment, at most; some take fewer (default 5)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="training seeds per policy, at most; some experiments take fewer (default 3)",
    )
    parser.add_argument("--hours", type=float, default=6.0, help="after which no run is started any more (default 6)")
    parser.add_argument("--worlds", default="", metavar="NAMES", help=f"only these, by commas: {', '.join(WORLDS)}")
    parser.add_argument("--fresh", action="store_true", help="delete what the working folder holds")
    args = parser.parse_args(argv)
    wanted = [name.strip() for name in args.worlds.split(",")] if args.worlds else list(WORLDS)
    if set(wanted) - set(WORLDS) or min(args.policies, args.seeds) < 1 or args.hours <= 0:
        raise InputError(
            f"found worlds {args.worlds!r}, {args.policies} policies, {args.seeds} seeds, {args.hours} hours, expected some of "
            f"{', '.join(WORLDS)}, and numbers above 0"
        )
    out, ends = Path(args.out).resolve(), time.time() + 3600 * args.hours
    base, mark = hashlib.sha1((Path(args.model) / "model.safetensors").read_bytes()).hexdigest(), out / "base.sha1"
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    if mark.exists() and mark.read_text() != base:
        raise InputError(f"{out}: found runs of another base, expected those of {args.model}; --fresh deletes them")
    mark.write_text(base)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of each process: two share the cores
    work = [
        (out, Path(args.model).resolve(), world, policy, seed, names, ends)
        for world, names, policies, seed in PLAN
        if world in wanted and seed < args.seeds
        for policy in range(min(policies, args.policies))
    ]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for done in tqdm(pool.map(column, *zip(*work)), total=len(work), desc="study", unit="column", disable=None):
            print(done, flush=True)
            write(lines_of(out / "rows.jsonl"), Path(args.results))
    print(Path(args.results) / "study.md")


if __name__ == "__main__":
    command(main)
