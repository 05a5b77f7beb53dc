"""Does PolicyRollout bring procedures of tools into the weights? Whole dialogues with tools in the tiny world.

    python -m tiny.dialogues --out runs/dialogues --seed 0          a policy of eight tools: results/dialogues.md
    python train_rl.py ... --environment tiny.dialogues:environment

A dialogue has three to six turns: the policy says which tool comes first, in which version for whom, with what
arguments. It is right where its calls are those of the policy, all of them and no others, and so is its answer. SFT
shows all turns of 24 dialogues, in which a third of the tools never occur. GRPO samples 8 dialogues to a query,
PolicyRollout 4 and 4 with the policy in the prompt. The same command goes on where it was stopped.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data import InputError, check_file, claim, command, write_text
from data.tools import read_turn
from tiny import processes
from tiny.demo import BASES, COMMON, GRPO, OTHERS, PORO, RL, ROOT, SFT, call
from tiny.report import markdown_table, provenance
from tiny.tools import run

ENVIRONMENT = ["--environment", "tiny.dialogues:environment"]
LONGEST = ["--max-response", 640]  # tokens of a dialogue, results included
SMALL = ["--micro-batch", 8]  # most are far shorter: all 64 in one pass would be padding
MEASURES = {  # of data.tools, and how the table calls them; the first says what is right
    "right_calls": "dialogues right % (95 %)",
    "accuracy": "answers right %",
    "needed": "calls needed that were made %",
    "allowed": "calls made that the policy allows %",
    "used": "results used %",
}
RUNS = {  # name: (script, stage that it starts from, flags)
    "sft": ("train_sft", None, SFT),
    "sft_grpo": ("train_rl", "sft", [*RL, *SMALL, *GRPO]),
    "sft_poro": ("train_rl", "sft", [*RL, *SMALL, *PORO]),
}
OURS = (*RUNS, *"data others eval *.log *.draft-*".split())  # what --out holds


class Scene:
    """A dialogue in which tiny.tools runs what is called; it ends with the first turn that calls nothing."""

    turns = 8

    def __init__(self, item):
        self.item, self.calls = item, []

    def step(self, text):
        try:
            made = read_turn(text)
            if made is None:
                return None
            self.calls.append(made)
            return run(self.item, made, self.calls[:-1])
        except ValueError:
            return "error"  # the one word that the world has for it


environment = Scene


def evaluate(row, out, model, data):
    """A row of <out>/eval/results.json: greedy dialogues about unseen pictures, with their measures."""
    paths = ["--model", model, "--data", data, "--out", out / "eval", "--seen", Path(data) / "sft.jsonl"]
    asked = ",".join(name if name == "accuracy" else f"data.tools:{name}" for name in MEASURES)
    aware = ["--policy-in-context"] if row == "in_context" else []
    how = ["--name", row, "--reward", asked, *ENVIRONMENT, *LONGEST, *aware]
    call(["evaluate.py", *paths, *how], out / f"{row}.eval.log")


def train(name, out, base, data, others, seed):
    """A run of RUNS, unless it has ended already, and its row."""
    script, before, flags = RUNS[name]
    start = ["--init", out / before] if before else ["--replay", others]
    learn = ["--reward", "data.tools:right_calls=0.9,format=0.1", *ENVIRONMENT] if script == "train_rl" else []
    paths = ["--model", base, *start, "--data", data, "--out", out / name, *learn]
    if not (out / name / "model").exists():
        call([f"{script}.py", *paths, *COMMON, *flags, *LONGEST, "--resume", "--seed", seed], out / f"{name}.log")
    evaluate(name, out, out / name, data)


def rows_of(out):
    path = out / "eval" / "results.json"
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def kept_rows(path):
    """What the file of --results holds: {seed: its rows and how they came about}."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"--results {path}: {error}, expected the results of earlier seeds") from None


def table(results):
    """results/dialogues.md: every seed's rows."""
    percent = lambda x: "–" if x is None else f"{100 * x:.0f}"
    head, lines = ["seed", "", *MEASURES.values(), "rules SFT showed %", "never shown %", "tokens", "n"], []
    for seed, made in sorted(results.items()):
        for row in made["rows"]:
            low, high = row["interval"]
            right = f"{100 * row['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f})"
            rest = [percent(row[f"reward/{name}"]) for name in list(MEASURES)[1:]]
            sides = [percent(row[side]["accuracy"]) for side in ("seen", "unseen")]
            lines.append([seed, row["name"], right, *rest, *sides, f"{row['tokens']:.0f}", str(row["n"])])
    made = sorted({f"{each['hardware']}, torch {each['torch']}, commit {each['commit']}" for each in results.values()})
    return "\n".join(
        [
            "# Dialogues with tools",
            "",
            "A policy of the tiny world's tools, dialogues of three to six turns, a third of the tools never shown by "
            "SFT; 8 dialogues to a query for GRPO, 4 + 4 for PolicyRollout, 80 steps of 8 queries each, DAPO's loss. "
            "in_context and no_policy are the untrained base with the policy in the prompt and without. right: the "
            "calls are the policy's, all of them and no others, and so is the answer.",
            "",
            markdown_table(head, lines),
            "",
            "; ".join(made) + ".",
            "",
            "Made by `python -m tiny.dialogues`.",
            "",
        ]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tiny.dialogues", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder of the runs")
    add("--model", default=str(BASES["tools"]), metavar="DIR", help="the base (default tiny/tools_base)")
    add("--tools", type=int, default=8, help="tools of the policy (default 8)")
    add("--seed", type=int, default=0, help="draws the policy, the scenes and the training (default 0)")
    add(
        "--results", default=str(ROOT / "results" / "dialogues.json"), metavar="FILE", help="where the rows go, by seed"
    )
    args = parser.parse_args(argv)
    out, base, kept = Path(args.out).resolve(), Path(args.model).resolve(), Path(args.results)
    if not (base / "model.safetensors").is_file():
        raise InputError(f"{base}: found no checkpoint, expected the base of the tools world (python -m tiny.pretrain)")
    check_file(kept, '"reward/needed"', "--results")
    check_file(kept.with_suffix(".md"), "`python -m tiny.dialogues`", "--results")
    kept_rows(kept)  # better refused now than after hours
    claim(out, "tiny.dialogues", OURS)
    data, others, began = out / "data", out / "others", time.time()
    with processes.ended_together():
        shape = ["-m", "tiny.tools", "--dialogues", "--tools", args.tools]
        own = ["--queries", 400, "--sft", 24, "--test", 200, "--leave-out", 0.34, "--seed", args.seed]
        for folder, flags in ((data, own), (others, [*OTHERS, "--seed", args.seed + 1000])):
            if not folder.exists():
                call([*shape, "--out", folder, *flags], out / f"{folder.name}.log")
        for row in ("in_context", "no_policy"):
            if row not in rows_of(out):
                evaluate(row, out, base, data)
        with ThreadPoolExecutor(2) as pool:  # one thread each
            for wave in (["sft"], ["sft_grpo", "sft_poro"]):
                todo = [name for name in wave if name not in rows_of(out)]
                list(pool.map(lambda name: train(name, out, base, data, others, args.seed), todo))
    found = rows_of(out)
    short = lambda row: {key: x for key, x in row.items() if key not in ("by_policy", "by_depth", "model")}
    rows = [short(found[name]) for name in ("in_context", "no_policy", *RUNS)]
    results = kept_rows(kept)
    results[str(args.seed)] = {"tools": args.tools, "seconds": round(time.time() - began), **provenance(), "rows": rows}
    write_text(kept, json.dumps(results, indent=1) + "\n")
    write_text(kept.with_suffix(".md"), table(results))
    print(table(results))


if __name__ == "__main__":
    command(main)
