"""A soak: thousands of RL steps of a tiny random model in one process, which must end as lean as it was.

    python tests/soak.py [--steps 2000] [--table FILE.md]

Each step samples, judges and learns; twenty checkpoints are saved. Watched are the resident set, the threads, the
open files, the files of the run's folder and its metrics. The last line is a summary; exit code 0 only if the memory of
the last tenth lies within 2 % of that of the second tenth, nothing else grew, and metrics.jsonl is whole and finite.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers import tiny_checkpoint  # noqa: E402
from small import arguments, quiet, small_data  # noqa: E402

import train_rl  # noqa: E402
from support.checkpoint import code_version  # noqa: E402
from training import Run  # noqa: E402

FLAGS = {
    "batch_size": 2,
    "micro_batch": 8,
    "group_size": 2,
    "policy_rollouts": 2,
    "max_response": 4,
    "check": 0,
    "lr": "1e-4",
    "reward": "small:length",
}


def watch(seen, out, began):
    """Make every step of a run add (resident MB, threads, open files, files of the run) to `seen`."""
    report = Run.report

    def watched(self, step, *args, **kwargs):
        report(self, step, *args, **kwargs)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        files = sum(path.is_file() for path in out.rglob("*"))
        seen.append((resident, threading.active_count(), len(os.listdir("/proc/self/fd")), files))
        if step % 200 == 0:
            print(f"{time.time() - began:6.0f} s  step {step}: {seen[-1][0]:.0f} MB", file=sys.__stdout__, flush=True)

    Run.report = watched


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="RL steps (default 2000)")
    parser.add_argument("--table", help="write the figures as a table to this .md file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, seen = time.time(), []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        folder = Path(folder)
        tiny_checkpoint(folder / "model", width=32, layers=1, vision_width=32, vision_depth=1)
        small_data(folder / "data")
        watch(seen, folder / "out", began)
        every = max(args.steps // 20, 1)  # the two checkpoints that are kept are there before the second tenth
        flags = {**FLAGS, "steps": args.steps, "save_every": every}
        words = arguments(folder / "model", folder / "data", folder / "out", **flags)
        code, errors = quiet(train_rl.main, words)
        lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    numbers = [value for row in rows for value in row.values() if isinstance(value, (int, float))]
    tenth = max(args.steps // 10, 1)
    early, late = seen[tenth : 2 * tenth], seen[-tenth:]
    growth = [statistics.median(column) for column in zip(*early)], [statistics.median(column) for column in zip(*late)]
    names = ("resident MB", "threads", "open files", "files of the run")
    lines = ["| | second tenth | last tenth |", "| --- | --- | --- |"]
    lines += [f"| {name}, median | {a:.1f} | {b:.1f} |" for name, a, b in zip(names, *growth)]
    holds = {
        "exit code 0": code == 0,
        "memory within 2 %": growth[1][0] < 1.02 * growth[0][0],
        "no threads, files or descriptors left": all(b <= a for a, b in list(zip(*growth))[1:]),
        "metrics whole": [row["step"] for row in rows] == list(range(args.steps)) and all(map(math.isfinite, numbers)),
    }
    failed = [name for name, good in holds.items() if not good]
    change = 100 * (growth[1][0] / growth[0][0] - 1)
    last = f"soak: {len(seen)} RL steps in {time.time() - began:.0f} s, {change:+.2f} % memory; "
    last += f"failed: {'; '.join(failed)} {errors}" if failed else ", ".join(holds)
    if args.table:
        head = f"`python tests/soak.py --steps {args.steps}`, torch {torch.__version__}, commit {code_version()[:7]}.\n"
        Path(args.table).write_text("\n".join([head, *lines, "", last, ""]))
    print("\n".join([*lines, last]))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
