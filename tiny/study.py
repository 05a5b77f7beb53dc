"""The paper's ablation, and what its reviewers asked for, on the tiny base: many short runs of the public scripts.

    python -m tiny.study --out runs/study --hours 6           stop it at any time; the same command goes on
    python -m tiny.study --out runs/study --plan field --weak runs/weak          the rivals of 2026, and weak readers
    python -m tiny.study --out runs/study-tools --world tools                    tool policies: results/tools.md
    python -m tiny.study --out runs/study --missing           train nothing; which rows are missing, and their hours
    python -m tiny.study --tables                             write tables and figures again from results/study.json

Every experiment runs for several policies, and the main ones for three training seeds, the most telling first, so that
a study cut short still compares like with like. A finished run leaves its row in <out>/rows.jsonl and is not repeated;
rows that results/study.json has and this study has not made again stay there. A weak reader is an early checkpoint of
the base, with the same eyes (tiny.pretrain --keep-every); those that answer 20, 50 and 80 % of queries with the policy
in the prompt are chosen once, and kept in <out>/readers.
Writes results/study.json, the tables in results/README.md and five figures: the main rows, all rows, what the two
halves of PolicyRollout's groups earned during training, the field of 2026, and weak readers; of tool policies
results/tools.json and tools.md. A mean of four runs or more has its 95 % interval (Student's t); of fewer runs each is
printed.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import InputError, check_file, command, refuse_strangers, write_text
from data.clevr_policy import write_json, write_jsonl
from data.override import override
from support.folder import lock, unlock
from tiny import processes
from tiny.demo import BASES, CALLS, COMMON, CPT, GRPO, PORO, RL, ROOT, SFT
from tiny.report import (
    LOSS,
    PAPER,
    TITLES,
    draw_depths,
    draw_field,
    draw_halves,
    draw_readers,
    draw_study,
    fill,
    lines_of,
    markdown_table,
    provenance,
)
from tiny.score import swapped
from tiny.world import Terse

# Student's t of the 95 % interval, 1 to 14 degrees of freedom
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)


def rl(*flags, steps=60):
    """RL's flags with another number of steps and what the experiment changes."""
    return [*RL, "--steps", str(steps), *" ".join(flags).split()]


def group(G, K):
    return f"--algorithm dapo --group-size {G} --policy-rollouts {K}"


HALVES, UPDATES = "--group-size 4 --policy-rollouts 4", "--mini-batch 2"  # 8 queries a step: four updates
ALL_TOKENS = "--top-tokens 203"  # of the tiny base's 204: the rest is one


def cpt(kinds, *flags):
    return [*CPT, "--kinds", kinds, *" ".join(flags).split()]


# name of a world: flags of tiny.data, or of tiny.tools, after OWN. In most of them SFT sees no chain through a third of
# the policy: where it sees them all (T4), it alone comes near the base's level, and RL has little left to find.
OWN = "--queries 400 --sft 24 --test 200".split()
OTHERS = "--policies 12 --queries 24 --sft 24 --test 8 --seed 1000".split()
WORLDS = {
    **{f"T{n} a third left out": f"--depth {n} --leave-out 0.34".split() for n in (2, 3, 4)},
    "T6 a third left out": "--depth 6 --leave-out 0.34 --queries 800 --sft 60".split(),
    **{f"M{n} a third left out": f"--depth {n} --variant M --leave-out 0.34".split() for n in (2, 4)},
    "T4": "--depth 4".split(),
    "T3 two at once": "--depth 3 --policies 2 --leave-out 0.34 --queries 300 --test 100".split(),
    "T3 four at once": "--depth 3 --policies 4 --leave-out 0.34 --queries 200 --test 50".split(),
    "T3 eight at once": "--depth 3 --policies 8 --leave-out 0.34 --queries 100 --test 25".split(),
    **{f"T3 reader {share}": "--depth 3 --leave-out 0.34".split() for share in (20, 50, 80)},
    **{f"{n} tools a third left out": f"--tools {n} --leave-out 0.34".split() for n in (8, 4, 14)},
}
READERS = {f"T3 reader {share}": share for share in (20, 50, 80)}  # world: % that its base answers with P

LONGEST = {2: 48, 3: 64, 4: 96, 6: 144}  # tokens of a response: one and a half times the longest right one, by depth
LONGEST_CALL = 128

# name: (script, the run it starts from, flags). The paper's rows first, then one question after the other. GRPO and
# PolicyRollout are as in the demo (report.LOSS); the rows named dapo draw on for groups that can teach something.
RUNS = {
    "sft": ("train_sft", None, SFT),
    "sft_grpo": ("train_rl", "sft", rl(*GRPO)),
    "sft_poro": ("train_rl", "sft", rl(*PORO)),
    "sft_dapo": ("train_rl", "sft", rl(*GRPO, "--dynamic-tries 6")),
    "sft_poro_dapo": ("train_rl", "sft", rl(*PORO, "--dynamic-tries 6")),
    "cpt": ("train_cpt", None, cpt("applied")),
    "cpt_sft": ("train_sft", "cpt", SFT),
    "cpt_sft_grpo": ("train_rl", "cpt_sft", rl(*GRPO)),
    "trimpi_paper": ("train_rl", "cpt_sft", rl(*PORO)),
    "cpt_response": ("train_cpt", None, cpt("response")),
    "cpt_response_sft": ("train_sft", "cpt_response", SFT),
    "cpt_response_sft_grpo": ("train_rl", "cpt_response_sft", rl(*GRPO)),
    "trimpi": ("train_rl", "cpt_response_sft", rl(*PORO, "--frozen-sampler base")),
    # 1. K of G + K (8 + 0 and 4 + 4 are above), and what each part of PolicyRollout does
    **{f"poro {G}+{K}": ("train_rl", "sft", rl(group(G, K))) for G, K in ((7, 1), (6, 2), (2, 6))},
    "statistics apart": ("variants.halves", "sft", rl(*PORO, "--ablate statistics")),
    "standard half only": ("variants.halves", "sft", rl(*PORO, "--ablate gradients")),
    "true sampler's ratio": ("variants.halves", "sft", rl(*PORO, "--ablate ratio")),
    "right ones only": ("variants.icpo", "sft", rl(*PORO, "--ratio plain --bonus 0")),
    # 2. who samples the policy-aware half, and what keeps the model following policies in its prompt
    "frozen sampler": ("train_rl", "sft", rl(*PORO, "--frozen-sampler start")),
    "replay in RL": ("train_rl", "sft", rl(*PORO, "--replay OTHERS")),
    "frozen sampler, replay, long": ("train_rl", "sft", rl(*PORO, "--frozen-sampler start --replay OTHERS", steps=180)),
    "trimpi, replay, long": (
        "train_rl",
        "cpt_response_sft",
        rl(*PORO, "--frozen-sampler base --replay OTHERS", steps=180),
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
    "cpt half masked": ("train_cpt", None, cpt("applied", "--mask-visual 0.5")),
    "cpt half masked, sft": ("train_sft", "cpt half masked", SFT),
    "cpt unmasked": ("train_cpt", None, cpt("applied", "--mask-visual 0")),
    "cpt unmasked, sft": ("train_sft", "cpt unmasked", SFT),
    "sft, as long as cpt and sft": ("train_sft", None, [*SFT, "--steps", "100"]),
    "sft, as long, poro": ("train_rl", "sft, as long as cpt and sft", rl(*PORO)),
    # 4. without SFT; more SFT; answers only; LoRA; the policy in the prompt, removed at test
    "base, poro": ("train_rl", None, rl(*PORO, steps=120)),
    "cpt, poro": ("train_rl", "cpt_response", rl(*PORO)),
    "sft on all data": ("train_sft", None, [*SFT, *"--split rl.jsonl --steps 120".split()]),
    "answers only": ("train_sft", None, [*SFT, "--answer-only"]),
    "lora": ("train_sft", None, [*SFT, *"--no-full --lr 2e-3".split()]),
    "policy in the prompt": ("train_sft", None, [*SFT, "--policy-in-prompt"]),
    # 5. relatives
    "opcd": ("variants.opcd", "sft", rl("--group-size 8")),
    "opcd, all words": ("variants.opcd", "sft", rl("--group-size 8 --top-tokens 204")),
    "recall reward": ("train_rl", "sft", rl(*GRPO, "--reward accuracy=0.6,format=0.1,data.referral:recall=0.3")),
    "icpo": ("variants.icpo", "sft", rl(group(7, 1), "--bonus 0.2")),
    # 6. what a reviewer asks for: the paper's losses whole, several updates per step, one half without the other
    "grpo with its kl": ("train_rl", "sft", rl(group(8, 0), "--algorithm grpo")),
    "poro with grpo's kl": ("train_rl", "sft", rl(group(4, 4), "--algorithm grpo")),
    "full dapo": ("train_rl", "sft", rl(*GRPO, "--dynamic-tries 20 --overlong 16")),
    "poro, full dapo": ("train_rl", "sft", rl(*PORO, "--dynamic-tries 20 --overlong 16")),
    "grpo, 4 updates": ("train_rl", "sft", rl(*GRPO, UPDATES)),
    "poro, 4 updates": ("train_rl", "sft", rl(*PORO, UPDATES)),
    "poro 0+8": ("train_rl", "sft", rl(group(0, 8))),
    "negatives not pushed down": ("variants.halves", "sft", rl(*PORO, "--ablate negatives")),
    # 7. the field of 2026, by file of variants/; (8 + 0) where the authors sample without privileged text
    **{name: (f"variants.{name}", "sft", rl(*PORO)) for name in ("hdpo", "pidistill", "skill0", "capo")},
    **{name: (f"variants.{name}", "sft", rl(*PORO)) for name in ("riskpo", "xrpo")},
    **{name: (f"variants.{name}", "sft", rl(*PORO, UPDATES)) for name in ("dual", "hapo", "lld")},
    **{name: (f"variants.{name}", "sft", rl(HALVES, UPDATES)) for name in ("dcpo", "dispo")},
    "which": ("variants.which", "sft", rl(*PORO, "--uncertain 0.2")),
    "entropy": ("variants.entropy", "sft", rl(*PORO)),
    "hints": ("variants.hints", "sft", rl(group(2, 6))),
    "filtered": ("variants.filtered", "sft", rl("--group-size 0 --policy-rollouts 8")),
    "filtered, own samples": ("variants.filtered", "sft", rl("--group-size 0 --policy-rollouts 8 --frozen-sampler=")),
    "iwopd": ("variants.iwopd", "sft", rl("--group-size 8")),
    "rlsd": ("variants.rlsd", "sft", rl(*GRPO)),
    **{name: (f"variants.{name}", "sft", rl(*GRPO, ALL_TOKENS)) for name in ("sdpg", "srpo", "sdpo")},
    "rlsd 4+4": ("variants.rlsd", "sft", rl(*PORO)),
    **{f"{name} 4+4": (f"variants.{name}", "sft", rl(*PORO, ALL_TOKENS)) for name in ("sdpg", "srpo", "sdpo")},
    "sdpg 4+4, b 1": ("variants.sdpg", "sft", rl(*PORO, ALL_TOKENS, "--distil 1")),
}

CORE = ["sft", "sft_grpo", "sft_poro"]
WITH_CPT = ["trimpi", "cpt_sft", "cpt_sft_grpo", "trimpi_paper", "cpt_response_sft", "cpt_response_sft_grpo"]
REST = [*WITH_CPT, "sft_dapo", "sft_poro_dapo"]  # of the paper's rows, beside CORE
HEAL = ["frozen sampler", "replay in RL", "frozen sampler, replay, long", "trimpi, replay, long"]
NEW = list(RUNS)[list(RUNS).index("grpo with its kl") :]  # of the second plan
EXTRA = [name for name in list(RUNS)[list(RUNS).index("trimpi") + 1 :] if name not in [*HEAL[2:], *NEW]]
TEN = "pidistill hdpo filtered rlsd srpo lld capo".split() + ["rlsd 4+4", "sdpg 4+4, b 1", "negatives not pushed down"]
WEAK = [*CORE, "frozen sampler", "replay in RL", "poro 0+8", "grpo with its kl", *TEN]
FIELD = [*CORE, "trimpi_paper", "trimpi", *NEW]  # of the figure of all methods
CURVES = [*CORE, "frozen sampler", "pidistill", "filtered"]  # of the figure of weak readers
LONGER = ["sft, as long as cpt and sft", "sft, as long, poro"]
UNMASKED = ["cpt half masked, sft", "cpt unmasked, sft"]
MAIN = ["in_context", *CORE, HEAL[2], "cpt_sft", "cpt_sft_grpo", "trimpi_paper"]  # of the table over depths
MAIN += ["cpt_response_sft", "cpt_response_sft_grpo", "trimpi", HEAL[3]]
THIRD = " a third left out"
WIDE = f"T3{THIRD}"
LESS = "PolicyRollout less GRPO, same policy and seed"
SEVERAL = ["T3 two at once", "T3 four at once", "T3 eight at once"]
PAPER_PLAN = [  # (world, rows, policies, seed), in this order
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
FIELD_PLAN = [  # rows that both plans have are made once
    (WIDE, [*CORE, *NEW], 2, 0),
    (WIDE, [*CORE, *NEW], 5, 0),
    *[(world, CURVES, 2, 0) for world in READERS],
    (f"T6{THIRD}", [*CORE, "trimpi", *TEN], 3, 0),
    *[(world, CURVES, 5, 0) for world in READERS],
    (WIDE, [*CORE, *NEW], 5, 1),
    (f"T6{THIRD}", [*CORE, "trimpi", *TEN], 3, 1),
    *[(world, WEAK, 2, 0) for world in READERS],
    (WIDE, [*REST, *EXTRA, *HEAL], 2, 0),  # the older rows with the newer columns
]
TABLE = [*CORE, "trimpi", "trimpi_paper", "cpt_sft", "sft_dapo", "sft_poro_dapo", "cpt_sft_grpo"]
TABLE += ["cpt_response_sft", "cpt_response_sft_grpo", *HEAL[:2]]
EIGHT = f"8 tools{THIRD}"
TOOLS_PLAN = [
    (EIGHT, TABLE[:5], 2, 0),
    (EIGHT, CORE, 5, 0),
    (EIGHT, TABLE, 3, 0),
    (EIGHT, CORE, 5, 1),
    (EIGHT, TABLE, 5, 0),
    (EIGHT, CORE, 5, 2),
    *[(f"{n} tools{THIRD}", CORE, 3, 0) for n in (4, 14)],
    (EIGHT, TABLE[:5], 5, 1),
]
PLANS = {"paper": PAPER_PLAN, "field": FIELD_PLAN, "tools": TOOLS_PLAN}
# of each world the plans, and the name of what it writes
OF_WORLD = {"clevr": ("paper,field", "study"), "tools": ("tools", "tools")}


COLUMNS = {  # key of a row: its heading
    "seen": "paths SFT showed",
    "unseen": "never shown",
    "exact_chain": "exact chains",
    "referral": "sections quoted rightly",
    "relative": "branching error",
    "with_policy": "with P",
    "wrong_picture": "wrong picture",
    "stored": "sections stored",
    "stored_unseen": "of those never shown",
    "others": "other policies with P",
    "clevr": "ClevrPolicy with P",
    "tool": "tool and version",
    "arguments": "arguments",
    "recited": "sections recited",
    "override": "new P, same name",
    "follows_old": "follows the old P",
    "entropy": "entropy at the end",
    "cpu_seconds": "CPU seconds",
    "tflop": "TFLOP",
}
PLAIN = {"relative": 3, "entropy": 3, "cpu_seconds": 0, "tflop": 2}  # columns that are no shares: their decimals


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
        """Run one of our commands, as users do, but in this process; what it prints goes to a file."""
        with written_to(self.out / f"{os.getpid()}.log"):
            return importlib.import_module(module).main([str(a) for a in arguments])

    def data(self, folder, *flags):
        """A data folder, made if it is missing and only when it is whole."""
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = folder.with_name(f"{folder.name}.{os.getpid()}")
            calls, kinds = "--tools" in flags, ["--cpt", "applied,document,section,response"]
            flags = ["--out", aside, "--overwrite", *flags, *([] if calls else kinds)]
            self.call("tiny.tools" if calls else "tiny.data", *flags)
            aside.rename(folder) if not folder.exists() else shutil.rmtree(aside)
        return folder

    def flops(self, world, name, script, arguments):
        """Floating-point operations of one step: mean of the first two, counted once for each world and row."""
        kept = self.out / "flops" / f"{world} {name}.json".replace(" ", "_")
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            scratch = kept.with_suffix(f".{os.getpid()}")
            with FlopCounterMode(display=False) as counter:
                self.call(script, *arguments, "--out", scratch, "--steps", 2)
            shutil.rmtree(scratch)
            write_json(kept, counter.get_total_flops() / 2)
        return json.loads(kept.read_text())

    def run(self, world, policy, seed, name):
        """Train one run, after the one it starts from, answer the test with and without the policy, note its row."""
        flags, base = WORLDS[world], self.out / "readers" / str(READERS[world]) if world in READERS else self.model
        shape, calls = flags[: 4 if "--variant" in flags else 2], "--tools" in flags
        short = ["--max-response", LONGEST_CALL if calls else LONGEST[int(flags[1])]]
        folder = lambda *names: self.out.joinpath(*(name.replace(" ", "_") for name in names))
        drawn = WIDE if world in READERS else world
        data = self.data(folder("data", drawn, str(policy)), *OWN, *flags, "--seed", policy)
        others = self.data(folder("data", f"others {' '.join(shape)}"), *shape, *OTHERS)
        place, began, more = folder("runs", world, f"{policy}-{seed}"), (time.time(), time.process_time()), {}
        if name in ("in_context", "no_policy"):
            found = self.evaluate(base, data, place, name, short, name == "in_context")
            trained = base
        else:
            script, before, flags = RUNS[name]
            if before and not (place / before.replace(" ", "_") / "model").exists():
                self.run(world, policy, seed, before)
                began = time.time(), time.process_time()
            trained = place / name.replace(" ", "_")
            start = ["--init", place / before.replace(" ", "_")] if before else []
            flags = [others if flag == "OTHERS" else flag for flag in flags]
            replay = ["--replay", others] if script in ("train_cpt", "train_sft") else []
            most = (
                ["--max-response", 1000] if script == "train_cpt" else short
            )  # a response-form item names all sections
            flags = [*flags, *(CALLS if calls and script == "train_rl" else [])]
            arguments = ["--model", base, *start, "--data", data, *replay, *COMMON, *flags, *most, "--seed", seed]
            self.call(script, *arguments, "--out", trained)
            metrics, trained_in = lines_of(trained / "metrics.jsonl"), time.process_time()
            curves = ("accuracy", "accuracy_aware", "entropy")
            more = {f"curve_{key}": curve for key in curves if (curve := windows(metrics, key))}
            more |= {"entropy": more["curve_entropy"][-1]} if "curve_entropy" in more else {}
            more["cpu_seconds"] = round(trained_in - began[1], 1)
            more["tflop"] = len(metrics) * self.flops(world, name, script, arguments) / 1e12
            found = self.evaluate(trained, data, place, name, [*short, *([] if calls else ["--contrast", 2])])
            more |= {} if calls else stored(found["sections"])
            more["with_policy"] = self.evaluate(trained, data, place, f"{name} with P", short, True)["accuracy"]
        if name != "no_policy" and not calls:  # a right answer with another picture did not come from the picture
            wrong = [*short, "--split", wrong_pictures(data)]
            aware = name == "in_context"
            more["wrong_picture"] = self.evaluate(trained, data, place, f"{name} wrong", wrong, aware)["accuracy"]
        if world in (WIDE, EIGHT) and name != "no_policy":  # what else was learnt or lost
            more["others"] = self.evaluate(trained, others, place, f"{name} others", short, True)["accuracy"]
            more["recited"] = self.evaluate(trained, data, place, f"{name} recited", [*short, "--recite"])["accuracy"]
            if calls:
                deep = WORLDS[WIDE][:2]
                kept = self.data(folder("data", f"others {' '.join(deep)}"), *deep, *OTHERS)
                more["clevr"] = self.evaluate(trained, kept, place, f"{name} clevr", short, True)["accuracy"]
            if name in ("in_context", *CORE, *REST, *HEAL):
                changed = data / "override" if calls else folder("data", "override", str(policy))
                if not changed.exists():
                    override(data, changed, 1, Terse())
                row = self.evaluate(trained, changed, place, f"{name} override", [*short, "--media", data], True)
                more |= {"override": row["accuracy"], "follows_old": row["follows_old"]}
        row = {
            "world": world,
            "policy": policy,
            "seed": seed,
            "name": name,
            "seconds": round(time.time() - began[0], 1),
            "cpu_seconds_all": round(time.process_time() - began[1], 1),  # with what is answered after training
            **{
                key: found.get(key)
                for key in ("accuracy", "n", "exact_chain", "referral", "relative", "tool", "arguments")
            },
            **{side: (found.get(side) or {}).get("accuracy") for side in ("seen", "unseen")},
            **more,
            "commit": provenance()["commit"],
        }
        if self.key(row) in self.done:  # made again as another starts from it
            return
        torn = self.rows.exists() and not self.rows.read_bytes().endswith(b"\n")  # a kill came while it was written
        with open(self.rows, "a") as file:
            file.write("\n" * torn + json.dumps(row) + "\n")
        self.done.add(self.key(row))

    def evaluate(self, model, data, place, name, short, aware=False):
        seen = ["--seen", data / "sft.jsonl"] if (data / "sft.jsonl").exists() else []
        paths = ["--model", model, "--data", data, "--out", place / "eval" / name.replace(" ", "_"), *seen]
        return self.call("evaluate", *paths, "--name", "row", *short, *(["--policy-in-context"] if aware else []))


def stored(sections):
    """What evaluate.py --contrast found: shares of sections in the weights, of all and of those not shown."""
    share = lambda rows: float(np.mean([row["stored"] for row in rows])) if rows else None
    kept = [[row[key] for key in ("section", "likelier", "margin", "shown", "accuracy")] for row in sections]
    hidden = [row for row in sections if not row["shown"]]
    return {"stored": share(sections), "stored_unseen": share(hidden), "sections": kept}


def wrong_pictures(data):
    """The test items of a data folder, each with a picture that calls for another answer: the file's name."""
    path = data / "wrong.jsonl"
    if not path.exists():
        aside = path.with_name(f"wrong.{os.getpid()}")
        write_jsonl(aside, swapped(lines_of(data / "test.jsonl")))
        aside.rename(path)
    return path.name


def choose_readers(study, folder):
    """Keep in <out>/readers the checkpoints <folder>/base-N whose accuracy with P is nearest to each of READERS.

    Every checkpoint answers the same 96 queries of other policies, once; accuracies: <out>/readers/scores.jsonl.
    """
    kept = study.out / "readers"
    if all((kept / str(share)).exists() for share in READERS.values()):
        return
    kept.mkdir(exist_ok=True)
    shape, scores = WORLDS[WIDE][:2], kept / "scores.jsonl"
    others = study.data(study.out / "data" / f"others_{'_'.join(shape)}", *shape, *OTHERS)
    known = {row["base"]: row["accuracy"] for row in lines_of(scores)}
    for path in sorted(Path(folder).glob("base-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        if path.name not in known:
            row = study.evaluate(path, others, kept, path.name, ["--max-response", LONGEST[3]], True)
            known[path.name] = row["accuracy"]
            with open(scores, "a") as file:
                file.write(json.dumps({"base": path.name, "accuracy": row["accuracy"]}) + "\n")
    for share in READERS.values():
        best = min(known, key=lambda name: abs(known[name] - share / 100), default=None)
        if best is None or abs(known[best] - share / 100) > 0.1:
            found = f"{known[best]:.2f} by {best}" if best else "none"
            raise InputError(f"{folder}: found {found}, expected a base that answers {share} % with P, within 10")
        shutil.copytree(Path(folder) / best, kept / str(share), dirs_exist_ok=True)


def column(out, model, world, policy, seed, names, ends):
    """The missing rows of one policy and seed, in a process of one thread; later runs start from earlier ones."""
    processes.end_with_parent()
    place = out / "runs" / world.replace(" ", "_") / f"{policy}-{seed}"
    held = lock(place, wait=math.inf)  # plans name a policy more than once: the other process may be at its rows
    study = Study(out, model)
    for name in [*(["in_context", "no_policy"] if seed == 0 else []), *names]:
        if (world, policy, seed, name) not in study.done and time.time() < ends:
            study.run(world, policy, seed, name)
    unlock(place, held)
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
            means = {key: float(np.mean(value)) if value else None for key, value in values.items()}
            half, each = half_interval(values["accuracy"]), sorted(values["accuracy"])
            size = {"runs": len(found), "n": sum(row["n"] for row in found)}
            worlds[world].append({"name": name, "half_interval": half, "each": each, **size, **means})
    return worlds


def differences(rows):
    """PolicyRollout less GRPO for the same policy and seed: {world: [each difference, sorted]}."""
    right, found = {Study.key(row): row["accuracy"] for row in rows}, {}
    for world, policy, seed, name in right:
        if name == "sft_poro" and (world, policy, seed, "sft_grpo") in right:
            pair = right[world, policy, seed, name] - right[world, policy, seed, "sft_grpo"]
            found.setdefault(world, []).append(pair)
    return {world: sorted(found[world]) for world in WORLDS if len(found.get(world, ())) > 1}


def correlations(rows):
    """Over all runs with a policy-aware half: Pearson's r of its accuracy, and of its lead over the standard half, both
    in the first ten steps, with the accuracy without the policy in the end."""
    runs = [row for row in rows if any(row.get("curve_accuracy_aware", ()))]  # GRPO's has none
    if len(runs) < 3:
        return None
    aware, standard = ([row[f"curve_{key}"][0] for row in runs] for key in ("accuracy_aware", "accuracy"))
    table = np.corrcoef([aware, np.subtract(aware, standard), [row["accuracy"] for row in runs]])
    return {"runs": len(runs), "aware_half": float(table[0, 2]), "gap": float(table[1, 2])}


# -- the tables of results/README.md -----------------------------------------------------------------------------------


def spread(values, sign=""):
    """A cell: mean ± half of its 95 % interval, in per cent; of two or three runs the mean and each of them."""
    if not values:
        return "–"
    mean = f"{100 * np.mean(values):{sign}.1f}"
    if len(values) > 3:
        return f"{mean} ± {100 * half_interval(values):.1f}"
    return f"{mean} ({', '.join(f'{100 * value:.0f}' for value in sorted(values))})" if len(values) > 1 else mean


def compare(worlds, columns, names, paper=False):
    """A table of accuracies: a line for each of the rows `names`, a column for each of the worlds {heading: world}."""
    found = {(world, row["name"]): row["each"] for world, rows in worlds.items() for row in rows}
    lines = []
    for name in names:
        line = [f"{TITLES[name]} (`{name}`)", *[spread(found.get((world, name))) for world in columns.values()]]
        lines.append([*line, PAPER.get(name, "–")] if paper else line)
    return lines


def tables(rows, made):
    """{name: text} of the marked places in results/README.md."""
    worlds, pairs, tied = summary(rows), differences(rows), correlations(rows)
    deep = {f"{'M, ' * (w[0] == 'M')}N = {w[1]}": w for w in WORLDS if w in worlds and w.endswith(THIRD)}
    lines = compare(worlds, deep, MAIN, paper=True)
    lines.append([LESS, *[spread(pairs.get(world), "+") for world in deep.values()], "–"])
    runs = {(world, row["name"]): row["runs"] for world, found in worlds.items() for row in found}
    size = [", ".join(str(runs.get((world, name), 0)) for name in ("sft_poro", "trimpi")) for world in deep.values()]
    lines.append(["runs of `sft_poro` and of `trimpi`", *size, "–"])
    several = {head: world for head, world in zip("1248", (WIDE, *SEVERAL)) if world in worlds}
    about = f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}. {LOSS}"
    parts = [about]
    if tied:
        parts.append(
            f"Over {tied['runs']} runs, final accuracy correlates with the policy-aware half's accuracy in the first "
            f"ten steps by r = {tied['aware_half']:.2f}, with its lead over the standard half by r = {tied['gap']:.2f}."
        )
    for world, found in worlds.items():
        shown = [key for key in COLUMNS if any(row[key] is not None for row in found)]
        percent = lambda key, mean: f"{mean:.{PLAIN[key]}f}" if key in PLAIN else f"{100 * mean:.1f}"
        value = lambda row, key: "–" if row[key] is None else percent(key, row[key])
        body = []
        for row in found:
            title = f"{TITLES[row['name']]} (`{row['name']}`)"
            body.append([title, spread(row["each"]), *[value(row, key) for key in shown], row["runs"], row["n"]])
        head = ["", "accuracy %", *[COLUMNS[key] for key in shown], "runs", "n"]
        parts.append(f"### {world}\n\n{markdown_table(head, body)}")
        if world in pairs:
            parts.append(f"{LESS}: {spread(pairs[world], '+')}, {len(pairs[world])} pairs.")
    return {
        "depths": markdown_table(["accuracy % without P", *deep, "paper, 7B, T, N = 6"], lines) + f"\n\n{LOSS}",
        "several": markdown_table(["policies in one model", *several], compare(worlds, several, [*MAIN[:5]]))
        + f"\n\n{LOSS}",
        "worlds": "\n\n".join(parts),
    }


def missing(work, done):
    """[(world, policy, seed, name)] of the rows that a plan has and a study has not."""
    wanted = []
    for _, _, world, policy, seed, names, _ in work:
        base = ["in_context", "no_policy"] if seed == 0 else []
        wanted += [(world, policy, seed, name) for name in [*base, *names]]
    return [key for key in dict.fromkeys(wanted) if key not in done]


def report_missing(keys, rows):
    """What is missing, by world, and hours of two processes with a core each: as the same row took, or one like it."""
    took = {}
    for row in rows:
        for like in ((row["world"], row["name"]), row["world"], None):
            took.setdefault(like, []).append(row.get("cpu_seconds_all", row["seconds"]))
    likes = lambda world, name: next((like for like in ((world, name), world, None) if like in took), None)
    seconds = lambda key: float(np.mean(took.get(likes(key[0], key[3]), [100.0])))
    for world in dict.fromkeys(key[0] for key in keys):
        mine = [key for key in keys if key[0] == world]
        names = "; ".join(dict.fromkeys(key[3] for key in mine))
        print(f"missing in {world}: {len(mine)} rows, {sum(map(seconds, mine)) / 7200:.1f} h: {names}")
    print(f"missing: {len(keys)} rows, {sum(map(seconds, keys)) / 7200:.1f} hours of two processes")


def merged(old, new):
    """Rows of both, the new ones in place of old ones of the same key."""
    return list({Study.key(row): row for row in [*old, *new]}.values())


def write(rows, folder, made, name="study"):
    """study.json, the tables of README.md and five figures, or tools.json and tools.md; made: the rows' provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    worlds = summary(rows)
    kept = {"worlds": worlds, "poro_less_grpo": differences(rows), "correlations": correlations(rows), "rows": rows}
    write_text(folder / f"{name}.json", json.dumps({**made, **kept}, indent=1) + "\n")
    if name == "tools":
        fill(folder / "tools.md", {"worlds": tables(rows, made)["worlds"]})
        return
    fill(folder / "README.md", tables(rows, made))
    deep = {f"{world[0]}, N = {world[1]}": found for world, found in worlds.items() if world.endswith(THIRD)}
    draw_depths(deep, folder / "study_depths.png")
    draw_study(worlds, folder / "study.png")
    draw_halves(rows, folder / "study_halves.png")
    draw_field(
        {label: found for label, found in deep.items() if label in ("T, N = 3", "T, N = 6")},
        FIELD,
        folder / "field.png",
    )
    draw_readers([worlds.get(world, []) for world in (*READERS, WIDE)], CURVES, folder / "readers.png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tiny.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, results = parser.add_argument, str(ROOT / "results")
    add("--out", metavar="DIR", help="folder to work in, finished runs kept (default runs/study or runs/study-tools)")
    add("--world", choices=BASES, default="clevr", help="decisions about pictures, or calls of tools (default clevr)")
    add("--results", default=results, metavar="DIR", help="folder of study.json, README.md, figures (default results)")
    add("--model", metavar="DIR", help="the base (default tiny/base, in the world of tools tiny/tools_base)")
    add("--policies", type=int, default=5, help="policies of an experiment, at most (default 5)")
    add("--seeds", type=int, default=3, help="training seeds per policy, at most (default 3)")
    add("--hours", type=float, default=6.0, help="after which no run is started any more (default 6)")
    add("--worlds", default="", metavar="NAMES", help=f"only these, by commas: {', '.join(WORLDS)}")
    add("--plan", metavar="NAMES", help=f"which plans, by commas, of {', '.join(PLANS)} (default: all of the world)")
    add("--weak", metavar="DIR", help="folder of tiny.pretrain --keep-every, of which the weak readers are chosen")
    add("--missing", action="store_true", help="train nothing; which rows are missing, and about how many hours")
    add("--fresh", action="store_true", help="delete what the working folder holds")
    add("--tables", action="store_true", help="train nothing; write tables and figures again from study.json")
    args = parser.parse_args(argv)
    plan, name = OF_WORLD[args.world]
    if args.tables:
        kept = json.loads(Path(args.results, f"{name}.json").read_text())
        return write(kept["rows"], Path(args.results), {key: kept[key] for key in provenance()}, name)
    wanted = [name.strip() for name in args.worlds.split(",")] if args.worlds else list(WORLDS)
    plans, model = [part.strip() for part in (args.plan or plan).split(",")], Path(args.model or BASES[args.world])
    if set(plans) - set(PLANS):
        raise InputError(f"--plan {args.plan!r} found, expected some of {', '.join(PLANS)}, by commas")
    if set(wanted) - set(WORLDS) or min(args.policies, args.seeds) < 1 or not 0 < args.hours < 1e6:
        raise InputError(
            f"found worlds {args.worlds!r}, {args.policies} policies, {args.seeds} seeds, {args.hours} hours, "
            f"expected some of {', '.join(WORLDS)}, and numbers above 0"
        )
    where = args.out or f"runs/study{'-tools' * (args.world == 'tools')}"
    out, model, ends = Path(where).resolve(), model.resolve(), time.time() + 3600 * args.hours
    base, mark = hashlib.sha1((model / "model.safetensors").read_bytes()).hexdigest(), out / "base.sha1"
    results = Path(args.results)
    check_file(results / f"{name}.json", '"poro_less_grpo"', "--results")
    ours = any((results / f"{kept}.json").exists() for _, kept in OF_WORLD.values())
    refuse_strangers(results, "*" if ours else "", "--results")
    own = ("data", "runs", "flops", "readers", "*.log", "rows.jsonl", mark.name)
    refuse_strangers(out, own if mark.exists() else ())
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    if mark.exists() and mark.read_text() != base:
        raise InputError(f"{out}: found runs of another base, expected those of {model}; --fresh deletes them")
    mark.write_text(base)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of each process: two share the cores
    work = [
        (out, model, world, policy, seed, names, ends)
        for plan in plans
        for world, names, policies, seed in PLANS[plan]
        if world in wanted and seed < args.seeds
        for policy in range(min(policies, args.policies))
    ]
    study = Study(out, model)
    old = json.loads((results / f"{name}.json").read_text()) if (results / f"{name}.json").exists() else {"rows": []}
    old = [{"commit": old.get("commit"), **row} for row in old["rows"]]
    tell = lambda: report_missing(missing(work, Study(out, study.model).done), merged(old, lines_of(study.rows)))
    if args.missing:
        return tell()
    if args.weak:
        choose_readers(study, args.weak)
    unready = [world for world, share in READERS.items() if not (out / "readers" / str(share)).exists()]
    with processes.ended_together(), ProcessPoolExecutor(2, get_context("spawn")) as pool:
        ready = [part for part in work if part[2] not in unready]
        for done in tqdm(pool.map(column, *zip(*ready)), total=len(ready), desc="study", unit="column", disable=None):
            print(done, flush=True)
            write(merged(old, lines_of(study.rows)), results, provenance(), name)
    tell()
    if set(unready) & {part[2] for part in work}:
        print(f"{', '.join(unready)}: left out without --weak DIR; how to make one: python -m tiny.pretrain --help")
    print(results / ("tools.md" if name == "tools" else "README.md"))


if __name__ == "__main__":
    command(main)
