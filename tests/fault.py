"""`make fault`: kill training at random moments and compare what it ends with to an undisturbed run, bit by bit.

    python tests/fault.py [--kills 20] [--seed 0] [--out DIR]

Each of the three stages runs on the tiny model through its command line, alone and as two ranks (replicated and FSDP2),
and is killed (SIGKILL: one process, or one of two) after a random part of its time or in the middle of a save, continued
with --resume, and killed again. Then a full disk in a save, a checkpoint cut short, and SIGTERM. The last line is a
summary; exit code 0 only if every run ended with the weights and metrics of the undisturbed one.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import tiny_checkpoint  # noqa: E402
from small import arguments, free_port, metrics, small_data  # noqa: E402

RUNS = {  # name: (stage, ranks, flags)
    "cpt": ("cpt", 1, {"kinds": "applied,document"}),
    "sft": ("sft", 1, {"lora_dropout": 0.1}),
    "rl": ("rl", 1, {"group_size": 2, "policy_rollouts": 2, "check": 0, "max_response": 12, "micro_batch": 8}),
    "cpt, two ranks": ("cpt", 2, {"fsdp": "on"}),
    "rl, two ranks": ("rl", 2, {"group_size": 2, "policy_rollouts": 2, "check": 0, "max_response": 12, "micro_batch": 8}),
}  # fmt: skip
ALL = {"steps": 8, "save_every": 1, "keep": 2, "resume": True}


class Job:
    """A training command as the user starts it, in one process or in one a rank."""

    def __init__(self, folder, name, out, limit=None):
        stage, ranks, flags = RUNS[name]
        words = arguments(folder / "model", folder / "data", out, **{**ALL, **flags})
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, f"train_{stage}.py", *words]
        if limit:  # a file of this many blocks is the largest that the "disk" takes
            command = ["bash", "-c", f"trap '' XFSZ; ulimit -f {limit}; exec \"$@\"", "limited", *command]
        self.children = [
            subprocess.Popen(command, cwd=ROOT, env={**env, **({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {})},
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for r in range(ranks)
        ]  # fmt: skip

    def wait(self, seconds=900):
        """-> the exit codes; what a rank left alone for ever (its partner was killed) is killed, as torchrun would."""
        end = time.time() + seconds
        while any(child.poll() is None for child in self.children) and time.time() < end:
            if any(child.poll() not in (None, 0) for child in self.children):
                time.sleep(0.3)
                for child in self.children:
                    child.kill()
            time.sleep(0.02)
        for child in self.children:
            child.kill()
        self.errors = "".join(child.communicate()[1] for child in self.children)
        return [child.returncode for child in self.children]

    def kill(self, number=signal.SIGKILL, rank=0):
        self.children[rank].send_signal(number)


def final(out):
    return [path.read_bytes() for path in sorted([*out.glob("model/*.safetensors"), *out.glob("adapter/*.safetensors")])]


def same(a, b):
    return final(a) != [] and final(a) == final(b) and metrics(a) == metrics(b)


def kill_at_random(folder, name, seconds, kills, rng):
    """Kill live runs `kills` times, half at a random moment, half in the middle of a save; a run that got to its end is
    compared, and the next one begun -> did every one end with the undisturbed run's bits?"""
    whole, hits, number, good = folder / "whole" / name, 0, 0, True
    while hits < kills:
        out = folder / "killed" / f"{name} {number}"
        job, start = Job(folder, name, out), time.time()
        in_save, moment = rng.random() < 0.5, rng.uniform(0.3, 1.0) * seconds
        before = set(out.glob("checkpoints/step-????????"))
        while all(child.poll() is None for child in job.children):
            saving = in_save and list(out.glob("checkpoints/*.tmp")) and (len(before) or rng.random() < 0.2)
            if saving or (not in_save and time.time() - start > moment):
                break
            time.sleep(0.001)
        if all(child.poll() is None for child in job.children):
            hits += 1
            job.kill(rank=rng.randrange(len(job.children)))
            job.wait(20)
        else:
            good, number = good and job.wait() == [0] * len(job.children) and same(out, whole), number + 1
    out = folder / "killed" / f"{name} {number}"
    return Job(folder, name, out).wait() == [0] * RUNS[name][1] and same(out, whole) and good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs in all, over the runs (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--out", help="folder to work in (default: a temporary one)")
    args = parser.parse_args()
    folder = Path(args.out or tempfile.mkdtemp(prefix="fault-"))
    rng, began, good, failed = random.Random(args.seed), time.time(), 0, []
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")

    def verdict(what, holds):
        nonlocal good
        good += bool(holds)
        failed.extend([] if holds else [what])
        print(f"{time.time() - began:6.0f} s  {'ok    ' if holds else 'FAILED'}  {what}", flush=True)

    seconds = {}
    for name in RUNS:
        start = time.time()
        job = Job(folder, name, folder / "whole" / name)
        codes = job.wait()
        seconds[name] = time.time() - start
        if any(codes):
            sys.exit(f"{name}: the undisturbed run ended with {codes}: {job.errors}")

    for i, name in enumerate(RUNS):
        kills = args.kills // len(RUNS) + (i < args.kills % len(RUNS))
        verdict(f"{name}: {kills} SIGKILLs of a live run, then the same weights and metrics, bit by bit",
                kill_at_random(folder, name, seconds[name], kills, rng))

    for name in ("sft", "cpt, two ranks"):
        out = folder / "sigterm" / name
        job = Job(folder, name, out)
        while not list(out.glob("checkpoints/step-????????")):
            time.sleep(0.01)
        for rank in range(RUNS[name][1]):
            job.kill(signal.SIGTERM, rank)
        codes = job.wait()
        stopped = codes == [0] * len(codes) and not final(out)
        Job(folder, name, out).wait()
        verdict(f"{name}: SIGTERM saves, exit code 0, and the run goes on to the same bits", stopped and same(out, folder / "whole" / name))

    out = folder / "disk" / "cpt"
    job = Job(folder, "cpt", out, limit=100)
    codes = job.wait()
    said = codes == [2] and job.errors.count("\n") == 1 and not list(out.glob("checkpoints/*"))
    Job(folder, "cpt", out).wait()
    verdict("cpt: a disk that fills in a save: one line, exit code 2, nothing half-written, then the same bits",
            said and same(out, folder / "whole" / "cpt"))

    out = folder / "damaged" / "cpt"
    Job(folder, "cpt", out).wait()
    shard = next(iter(out.glob("checkpoints/step-00000008/shard-*")))
    os.truncate(shard, shard.stat().st_size // 2)
    job = Job(folder, "cpt", out)
    codes = job.wait()
    verdict("cpt: the newest checkpoint cut short: skipped with a line, the same bits from the one before",
            codes == [0] and "skipped, it is damaged" in job.errors and same(out, folder / "whole" / "cpt"))

    total = good + len(failed)
    print(f"fault: {good} of {total} runs held, {args.kills} SIGKILLs of live runs, {time.time() - began:.0f} s"
          + (f"; failed: {'; '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
