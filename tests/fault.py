"""`make fault`: kill training at random moments and compare what it ends with to an undisturbed run, bit by bit.

    python tests/fault.py [--kills 24] [--seed 0] [--table FILE.md]

Each of the three stages runs on a tiny random model, alone and as two ranks (replicated and FSDP2). SIGKILL meets it,
or one of its two ranks, after a random part of its time or in the middle of a save; it is continued with --resume and
killed again, through several runs where the kills need more than one. Then signals, a disk that fills and a kill in a
save and in the export, a broken item, a closed stdout, damaged checkpoints, and the same for exports, evaluations,
studies and pages. A command starts as a copy of this process, which has imported torch already: the kills then meet
the training and not the imports. The last line is a summary; exit code 0 only if every run ended with the undisturbed
one's bits.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a copy of a process has none of its threads
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import resource  # noqa: E402

import torch  # noqa: E402
import torch.distributed.fsdp  # noqa: E402, F401  imported once, here
from helpers import tiny_checkpoint  # noqa: E402
from small import arguments, small_data, start, start_ranks  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import model as qwen  # noqa: E402
import rollout  # noqa: E402
import train_cpt  # noqa: E402
import train_rl  # noqa: E402
import train_sft  # noqa: E402
from data import InputError  # noqa: E402
from support import chat  # noqa: E402
from support.checkpoint import code_version  # noqa: E402
from tiny import demo, report, study  # noqa: E402

STUDY = ROOT / "results" / "study.json"
MAIN = {"cpt": train_cpt.main, "sft": train_sft.main, "rl": train_rl.main}
PORO = {
    "group_size": 2,
    "policy_rollouts": 2,
    "check": 0,
    "max_response": 6,
    "micro_batch": 16,
    "reward": "small:length",
}
RUNS = {  # name: (stage, ranks, flags)
    "cpt": ("cpt", 1, {"kinds": "applied,document"}),
    "sft": ("sft", 1, {}),
    "rl": ("rl", 1, PORO),
    "cpt, two ranks, sharded": ("cpt", 2, {"fsdp": "on"}),
    "sft, two ranks": ("sft", 2, {}),
    "sft, two ranks, sharded": ("sft", 2, {"full": True, "fsdp": "on", "lr": "1e-4"}),
    "rl, two ranks": ("rl", 2, PORO),
    "rl, two ranks, sharded": ("rl", 2, {**PORO, "full": True, "fsdp": "on"}),
}
ALL = {"steps": 8, "save_every": 1, "keep": 2, "resume": True}


class Job:
    """A training command in one process, or in one a rank.

    limit: bytes after which a file finds the disk full; before: called in each process before the command.
    """

    def __init__(self, folder, name, out, limit=None, before=lambda: None, **more):
        stage, ranks, flags = RUNS[name]
        words = arguments(folder / "model", folder / "data", out, **{**ALL, **flags, **more})

        def work():
            if limit:
                full_disk(limit)
            before()
            MAIN[stage](words)

        self.log = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
        self.ranks = start_ranks(ranks, work, self.log)

    def lives(self):
        return all(rank.is_alive() for rank in self.ranks)

    def wait(self, seconds=300):
        """-> the exit codes; where a rank dies the others are killed half a second later, as torchrun would."""
        end = time.time() + seconds
        while any(rank.is_alive() for rank in self.ranks) and time.time() < end:
            if any(rank.exitcode for rank in self.ranks):
                end = min(end, time.time() + 0.5)
            time.sleep(0.005)
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return [rank.exitcode for rank in self.ranks]

    def send(self, number, rank):
        os.kill(self.ranks[rank].pid, number)

    def said(self):
        return self.log.read_text()


def full_disk(limit):
    """From now on no file of this process grows past `limit` bytes: a write then fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def in_export(how):
    """Have `how()` happen once the weights of the export are written, and before they have their name."""

    def patch():
        replacing = qwen.replacing

        @contextlib.contextmanager
        def broken(place):
            with replacing(place) as new:
                yield new
                how()

        qwen.replacing = broken

    return patch


def no_room():
    raise OSError(28, "No space left on device")


def broken_item(step):
    """Have the reading of an item fail in a step, on the ranks that read in it."""

    def patch():
        for examples in train_sft.Examples, train_cpt.Sequences:
            encode = examples.encode

            def broken(self, at, i, encode=encode):
                if at == step:
                    raise InputError(f"item {self.items[i]['id']}: found a picture of no bytes")
                return encode(self, at, i)

            examples.encode = broken
        queries = rollout.Sampler.queries

        def breaks(self, number):  # a step is a draw
            if number == step:
                raise InputError(f"item {self.items[0]['id']}: found a picture of no bytes")
            return queries(self, number)

        rollout.Sampler.queries = breaks

    return patch


def no_reader():
    """Have stdout be a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = data.Lasting(open(1, "w", buffering=1, closefd=False))


def result(out):
    """All that a run leaves: final weights, logs without the time they took, and names of half-written files."""
    weights = [path.read_bytes() for path in sorted(out.glob("*/*.safetensors"))]
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    logs = {path.name: read(path) for path in sorted(out.glob("*.jsonl"))}
    for row in logs.get("metrics.jsonl", []):
        row.pop("speed")
    torn = [path.name for path in out.rglob("*") if path.suffix == ".tmp" or path.name[:7] in (".model.", ".adapter")]
    return weights, logs, torn


def same(out, whole):
    """Did the run in `out` end, and with the bits of the undisturbed one?"""
    return bool(result(out)[0]) and result(out) == result(whole)


def saving(out, step, start):
    """Is a checkpoint of `step` or a later one being written, begun since `start`?"""
    with contextlib.suppress(FileNotFoundError):  # it has its name just now
        aside = [path for path in out.glob("checkpoints/*.tmp") if path.stat().st_mtime > start]
        return any(int(path.stem[5:]) >= step for path in aside)


def kill_at_random(folder, name, seconds, kills, rng):
    """Kill live runs `kills` times, half at a random moment, half in the middle of a save; a run that gets to its end
    is compared, and the next one begun -> (did each end with the undisturbed run's bits?, runs, kills in a save).
    """
    whole, hits, saves, number, good = folder / "whole" / name, 0, 0, 0, True
    while True:
        out = folder / "killed" / f"{name} {number}"
        reached = max([0, *(int(path.name[5:]) for path in out.glob("checkpoints/step-????????"))])
        in_save, moment = rng.random() < 0.5, rng.random() * seconds
        step = rng.randint(reached + 1, max(reached + 1, ALL["steps"]))
        job, start = Job(folder, name, out), time.time()
        while hits < kills and job.lives():
            if saving(out, step, start) if in_save else time.time() - start > moment:
                break
            time.sleep(0.0005)
        if hits < kills and job.lives():
            hits, saves = hits + 1, saves + in_save
            job.send(signal.SIGKILL, rng.randrange(len(job.ranks)))
            job.wait()
        else:
            codes = job.wait()
            good, number = good and codes == [0] * len(codes) and same(out, whole), number + 1
            if hits == kills:
                return good, number, saves


def evaluations(folder, verdict):
    """A disk that fills, and a kill, while an evaluation is saved: earlier rows stay, the next try adds its own."""
    out, flags = folder / "eval", ["--limit", "4", "--max-response", "4", "--device", "cpu"]
    words = ["--model", folder / "model", "--data", folder / "data", "--out", out, *flags]

    def run(name, before=lambda: None):
        process = start(lambda: (before(), evaluate.main([*map(str, words), "--name", name])), folder / "eval.log")
        process.join()
        return process.exitcode

    def breaks(how):
        def patch():
            evaluate.write_json = lambda *_: how()

        return patch

    rows = lambda: [row["name"] for row in evaluate.earlier_rows(out)]
    run("first")
    full = run("second", breaks(no_room)) == 2 and rows() == ["first"]
    verdict("evaluation: the disk fills while it is saved: the earlier rows stay", full)
    killed = run("second", breaks(lambda: os.kill(os.getpid(), signal.SIGKILL))) == -9 and rows() == ["first"]
    again = run("second") == 0 and rows() == ["first", "second"]
    clean = sorted(path.name for path in out.iterdir()) == ["first.jsonl", "results.json", "second.jsonl"]
    verdict("evaluation: SIGKILL while it is saved: the next one adds its row", killed and again and clean)


def exports(folder, verdict):
    """A disk that fills, and a kill, in model.py --export: no folder, or the whole one; the next try makes it."""

    def run(out, before=lambda: None):
        work = lambda: (before(), chat.export(qwen, folder / "whole" / "sft", out))
        process = start(work, folder / "export.log")
        process.join()
        return process.exitcode, out.exists(), len(list(folder.glob(f".{out.name}.*")))

    out = folder / "served"
    full = run(out, lambda: full_disk(50_000)) == (2, False, 0)
    verdict("export: the disk fills while it is written: no folder, nothing half-written", full)
    killed = run(out, in_export(lambda: os.kill(os.getpid(), signal.SIGKILL)))[:2] == (-9, False)
    good = run(out)[:2] == run(folder / "expected")[:2] == (0, True)
    bits = [(path / "model.safetensors").read_bytes() for path in (out, folder / "expected")]
    verdict(
        "export: SIGKILL while it is written: no folder, the next one is whole", killed and good and len({*bits}) == 1
    )


def pages(folder, verdict):
    """A disk that fills, and a kill, while a study's tables or a demo's page are written: the earlier ones stay."""
    rows = lambda n: [{**row, "policy": i} for i in range(n) for row in json.loads(STUDY.read_text())["rows"][:2]]
    made = {"hardware": "", "torch": "", "commit": ""}
    study.draw_depths = study.draw_study = study.draw_halves = report.draw_demo = lambda *_: None
    for name, write, files in (
        ("study", lambda n, out: study.write(rows(n), out, made), ("study.json", "README.md")),
        ("report", lambda n, out: report.write_report(out, fake_results(n)), ("report.html",)),
    ):
        out = folder / name
        out.mkdir()

        def run(n, before=lambda: None):
            process = start(lambda: (before(), write(n, out)), folder / f"{name}.log")
            process.join()
            return process.exitcode, [(out / file).read_text() for file in files]

        def killed():
            data.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

        _, before = run(1)
        full = run(2, lambda: full_disk(1000))
        verdict(f"{name}: the disk fills while it is written: the earlier one stays", full == (2, before))
        dead, (code, after) = run(2, killed), run(2)
        left = sorted(path.name for path in out.iterdir() if not path.name.endswith(".tmp"))
        good = dead == (-9, before) and code == 0 and after != before and left == sorted(files)
        verdict(f"{name}: SIGKILL while it is written: the earlier one stays, the next is written", good)


def fake_results(n):
    row = {"accuracy": 0.5, "n": n, "interval": [0.2, 0.8], "exact_chain": 0.25, "seen": {"accuracy": 0.5}}
    about = dict.fromkeys(("seed", "policy", "depth", "seconds", "hardware", "torch", "commit", "text"), "")
    return {**about, "left_out": [], "rows": [{"name": name, **row, "unseen": row["seen"]} for name in demo.ROWS]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24, help="SIGKILLs in all, over the runs (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--table", help="write the verdicts as a table to this .md file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        rows, seconds = trials(Path(folder), args.kills, random.Random(args.seed))
    held, kills = sum(row[-1] for row in rows), sum(row[1] for row in rows)
    failed = "; ".join(row[0] for row in rows if not row[-1])
    cpu = sum(os.times()[:4])  # on a machine with other work the figure to trust
    last = f"fault: {held} of {len(rows)} rows held, {kills} SIGKILLs of live runs, {seconds:.0f} s, {cpu:.0f} s of CPU"
    last += f"; failed: {failed}" if failed else ""
    if args.table:
        head = (
            f"`python tests/fault.py --kills {args.kills} --seed {args.seed}`, torch {torch.__version__}, "
            f"{os.cpu_count()} CPU cores ({platform.machine()}), commit {code_version()[:7]}. A row holds where "
            "weights and logs are the undisturbed run's, bit by bit.\n"
        )
        lines = [head, "| what | SIGKILLs | in a save | runs compared | holds |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {what} | {kills or ''} | {saves or ''} | {runs} | {'yes' if holds else '**no**'} |"
            for what, kills, saves, runs, holds in rows
        ]
        Path(args.table).write_text("\n".join([*lines, "", last, ""]))
    print(last)
    sys.exit(bool(failed))


def trials(folder, kills, rng):
    """-> ([(what, SIGKILLs, of them in a save, runs compared, holds)], seconds)."""
    rows, seconds, began = [], {}, time.time()
    (folder / "killed").mkdir()
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")

    def verdict(what, holds, kills=0, saves=0, runs=1):
        rows.append((what, kills, saves, runs, bool(holds)))
        detail = f" ({kills} SIGKILLs, {saves} in a save, {runs} runs)" if kills else ""
        print(f"{time.time() - began:6.1f} s  {'ok    ' if holds else 'FAILED'}  {what}{detail}", flush=True)

    for name in RUNS:
        start, job = time.time(), Job(folder, name, folder / "whole" / name)
        codes, seconds[name] = job.wait(), time.time() - start
        if any(codes):
            sys.exit(f"{name}: the undisturbed run ended with {codes}: {job.said()}")

    for i, name in enumerate(RUNS):
        n = kills // len(RUNS) + (i < kills % len(RUNS))
        holds, runs, saves = kill_at_random(folder, name, seconds[name], n, rng)
        verdict(f"{name}: SIGKILL", holds, n, saves, runs)

    whole = lambda name: folder / "whole" / name
    signals = [
        ("sft", "SIGTERM"),
        ("rl", "SIGTERM"),
        ("cpt, two ranks, sharded", "SIGTERM"),
        ("rl, two ranks", "SIGHUP"),
        ("rl, two ranks, sharded", "SIGTERM"),
        ("sft, two ranks, sharded", "SIGHUP"),
    ]
    for name, number in [*signals, ("cpt", "SIGHUP"), ("sft, two ranks", "SIGXCPU")]:
        out = folder / number / name
        job = Job(folder, name, out)
        while not list(out.glob("checkpoints/step-????????")):
            time.sleep(0.002)
        for rank in range(len(job.ranks)):
            job.send(signal.Signals[number], rank)
        stopped = set(job.wait()) == {0} and not result(out)[0] and "stopped by a signal" in job.said()
        Job(folder, name, out).wait()
        verdict(f"{name}: {number} saves and ends with exit code 0", stopped and same(out, whole(name)))

    for name in RUNS:
        out = folder / "disk" / name
        job = Job(folder, name, out, limit=50_000 if RUNS[name][0] != "cpt" else 100_000)
        ended = set(job.wait()) == {2} and job.said().count("\nerror: ") == len(job.ranks)
        clean = not list(out.glob("checkpoints/*"))
        Job(folder, name, out).wait()
        what = "the disk fills in a save: one line, exit code 2, nothing half-written"
        verdict(f"{name}: {what}", ended and clean and same(out, whole(name)))

    for name in RUNS:
        for what, how, code in (
            ("the disk fills in the export", no_room, 2),
            ("SIGKILL in the export", lambda: os.kill(os.getpid(), signal.SIGKILL), -9),
        ):
            out = folder / what / name
            job = Job(folder, name, out, before=in_export(how), save_every=0)
            ended = code in job.wait() and [path.name for path in out.glob("checkpoints/*")] == ["step-00000008"]
            job = Job(folder, name, out, save_every=0)
            good = set(job.wait()) == {0} and "resumed after step 8" in job.said() and same(out, whole(name))
            verdict(f"{name}: {what} costs no step", ended and good)

    for name in RUNS:
        out = folder / "broken" / name
        job = Job(folder, name, out, before=broken_item(7), save_every=0)
        named = 2 in job.wait() and "step 7 failed in 'read', saved" in job.said() and "error: item " in job.said()
        Job(folder, name, out, save_every=0).wait()
        verdict(f"{name}: the last item is broken: named, the steps before it saved", named and same(out, whole(name)))

    for name in RUNS:
        out = folder / "stdout" / name
        codes = Job(folder, name, out, before=no_reader).wait()
        verdict(f"{name}: stdout is closed: the run goes on", set(codes) == {0} and same(out, whole(name)))

    for name in RUNS:
        out = folder / "damaged" / name
        Job(folder, name, out, before=in_export(no_room)).wait()
        shard = max(out.glob("checkpoints/step-00000008/shard-*"))
        os.truncate(shard, shard.stat().st_size // 2)
        job = Job(folder, name, out)
        said = set(job.wait()) == {0} and "step-00000008: skipped, it is damaged" in job.said()
        what = "a checkpoint cut short is skipped with a line, the one before continued"
        verdict(f"{name}: {what}", said and same(out, whole(name)))

        out = folder / "both damaged" / name
        Job(folder, name, out, before=in_export(no_room)).wait()
        for shard in out.glob("checkpoints/*/shard-*"):
            os.truncate(shard, shard.stat().st_size // 2)
        before = sorted(out.glob("checkpoints/*"))
        job = Job(folder, name, out)
        refused = set(job.wait()) == {2} and "none of them whole" in job.said()
        kept = before == sorted(out.glob("checkpoints/*"))
        verdict(f"{name}: both checkpoints are damaged: refused, nothing deleted", refused and kept)

    exports(folder, verdict)
    evaluations(folder, verdict)
    pages(folder, verdict)
    return rows, time.time() - began


if __name__ == "__main__":
    main()
