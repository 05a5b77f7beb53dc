"""Time and peak memory of linear_logprob on a CPU beside what one would use instead, in one run.

    python -m benchmarks.logprob           eager and torch's own; about ten minutes at the default sizes

benchmarks/gpu.py has the same for a GPU, with all peers. Every time is the best of a few, measured in turn with the
others; each row is a process of its own, because peak memory is a process's high-water mark. Ratios are to eager.
Inputs are planted: half of the rows are confident, because flat random logits flatter kernels that skip tiny gradients.

A frozen head takes two products of N x D x V on either side. A trainable one takes eager three, with N x V held; ours
makes the logits again, four: that a token's gradient from above is not known before the backward pass is the price of
results per token. And dW itself, V x D in fp32, is in both peaks.
Results: benchmarks/results/logprob_cpu.md and .json.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import command
from kernels.logprob import linear_logprob
from support.checkpoint import code_version
from tiny.report import cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = "liger-kernel", "cut-cross-entropy"
PATIENCE = 240  # seconds for a row on a CPU
CPU_SIZES = [(2048, 896, 151936), (512, 2048, 151936)]


def planted(N, D, V, dtype, device):
    """h (N, D), W (V, D), y (N,): every other row leans on its target until p is .9, the others' logits spread by 3."""
    generator = torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)
    W, h = random(V, D), random(N, D) * (3 / D**0.5)
    y = torch.randint(V, (N,), generator=generator, device=device)
    lean = (math.log(V) + 18) / W[y[::2]].float().square().sum(1, keepdim=True)
    h[::2] = 0.1 * h[::2] + (lean * W[y[::2]]).to(dtype)
    return h, W, y


# -- the rivals: each takes h, W, y and returns logp (N,), or a number for losses that have nothing per token ----------


def ours(h, W, y):
    return linear_logprob(h, W, y)[0]


def eager(h, W, y):
    return -F.cross_entropy(F.linear(h, W).float(), y, reduction="none")


def torch_own(reduction):
    def rival(h, W, y):
        rows = None if h.is_cuda else 256  # of a chunk; on a CPU its own choice takes twenty times as long
        chunked = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=rows
        )  # without it all logits are held, as in eager
        return F.linear_cross_entropy(h, W, y, reduction=reduction, options=chunked)

    return rival


def liger(h, W, y):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(h, W, y, None, None, -100, 0.0, 0.0, "none")[0]


def liger_scaled(h, W, y):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(h, W, y)  # on Hopper it needs nvidia-cutlass-dsl


def liger_grpo(h, W, y):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    B, T = 8, len(y) // 8
    ones = torch.ones(B, T, device=h.device)
    return LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
        h.view(B, T, -1), W, y.view(B, T), ones, torch.linspace(-1, 1, B, device=h.device)
    )[0]


def cut_cross_entropy(filter_eps):
    def rival(h, W, y):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(h, W, y, reduction="none", filter_eps=filter_eps)

    return rival


RIVALS = {
    "ours": ours,
    "eager": eager,
    "torch linear_cross_entropy mean": torch_own("mean"),
    "torch linear_cross_entropy none": torch_own("none"),
    "Liger fused linear CE": liger,
    "Liger scaled CE": liger_scaled,
    "Liger fused GRPO": liger_grpo,
    "cut-cross-entropy, filtered": cut_cross_entropy("auto"),
    "cut-cross-entropy, exact": cut_cross_entropy(None),
}


def step(rival, h, W, y, backward):
    """Forward, or forward and backward, with a gradient from above that differs from row to row."""
    with torch.set_grad_enabled(backward):
        out = rival(h, W, y)
        if backward:
            out.backward(torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape))
    h.grad = W.grad = None


# -- a CPU: one process per row ----------------------------------------------------------------------------------------


class Peak:
    """Bytes of resident memory beyond those at the start, at their highest, from a thread that looks every 5 ms."""

    def __enter__(self):
        self.start = self.high = self.resident()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.bytes = self.high - self.start

    def watch(self):
        while self.running:
            self.high = max(self.high, self.resident())
            time.sleep(0.005)

    def resident(self):
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()


def measure_cpu(name, N, D, V, trainable, repeats):
    """One row: seconds, CPU seconds and peak extra bytes of forward and backward together."""
    h, W, y = planted(N, D, V, torch.float32, "cpu")
    h.requires_grad_()
    W.requires_grad_(trainable)
    row = {"name": name, "N": N, "D": D, "V": V, "head": "trainable" if trainable else "frozen"}
    rival = RIVALS[name]
    try:
        rival(h[:2], W, y[:2])
    except (AttributeError, ImportError) as error:
        return {**row, "not run": f"not in this installation ({error})"}
    step(rival, h[:16], W, y[:16], True)  # libraries and threads start
    seconds, processor, peaks = [], [], []
    for _ in range(repeats):
        with Peak() as peak:
            start, cpu = time.perf_counter(), time.process_time()
            step(rival, h, W, y, True)
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - cpu)
        peaks.append(peak.bytes)
        if sum(seconds) > PATIENCE / 4:
            break
    return {**row, "s": min(seconds), "CPU s": min(processor), "peak extra bytes": peaks[0]}


def run_cpu(sizes, repeats):
    """The rows so far, after each: a run that is stopped leaves what it has, the comparison that matters first."""
    rows = []
    order = [
        (name, size, trainable)
        for names in (("eager", "ours"), ("torch linear_cross_entropy none",))
        for trainable in (False, True)
        for size in sizes
        for name in names
    ]
    for name, (N, D, V), trainable in order:
        sleepy = {**os.environ, "KMP_BLOCKTIME": "0"}  # a waiting thread sleeps: spinning is no CPU time of the rival
        row = json.dumps([name, N, D, V, trainable, repeats])
        command = [sys.executable, "-m", "benchmarks.logprob", "--row", row]
        failed = {"name": name, "N": N, "D": D, "V": V, "head": "trainable" if trainable else "frozen"}
        try:
            done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=sleepy, timeout=PATIENCE)
            rows.append(
                json.loads(done.stdout.splitlines()[-1])
                if not done.returncode
                else {**failed, "not run": (done.stderr.strip().splitlines() or ["killed"])[-1]}
            )
        except subprocess.TimeoutExpired:
            rows.append({**failed, "not run": f"stopped after {PATIENCE} s"})
        yield sorted(rows, key=lambda row: (row["N"], row["head"]))


def cpu_table(rows):
    lines = [
        "| tokens x width x vocabulary | head | | time | CPU time | peak extra memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = {}
    for row in rows:
        size = (row["N"], row["D"], row["V"], row["head"])
        if row["name"] == "eager":
            base[size] = row
        cells = [row.get("not run", "")] + [""] * 2
        if "not run" not in row:
            cells = []
            for key, unit, scale in ("s", "s", 1), ("CPU s", "s", 1), ("peak extra bytes", "MB", 1e6):
                ratio = row[key] / base[size][key] if base.get(size, {}).get(key) else math.nan
                cells.append(f"{row[key] / scale:.{2 if unit == 's' else 0}f} {unit} ({ratio:.2f}x)")
        shape = f"{row['N']} x {row['D']} x {row['V']}"
        lines.append(f"| {shape} | {row['head']} | {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -- results -----------------------------------------------------------------------------------------------------------


def machine():
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in "torch", "triton", *PEERS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "hardware": hardware,
        "python": platform.python_version(),
        "versions": versions,
        "commit": code_version()[:7] or "not known",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(name, result, table, notes):
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    facts = result["machine"]
    versions = ", ".join(f"{package} {v}" for package, v in facts["versions"].items())
    (RESULTS / f"{name}.md").write_text(
        f"# linear_logprob, {facts['hardware']}\n\n{versions}; commit {facts['commit']}, {facts['date']}. {notes}\n\n"
        f"{table}\n"
    )
    print(f"\n{table}\n\nwritten to benchmarks/results/{name}.md and .json")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=None,
        metavar="N,D,V",
        help="tokens, width, vocabulary (default: those of the table)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="runs of which the best counts, on a CPU (default: 3)"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one row of the CPU's table, in this process
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure_cpu(*json.loads(args.row))))
        return
    sizes = [tuple(int(n) for n in size.split(",")) for size in args.sizes or []]
    facts, load = machine(), os.getloadavg()[0]
    for rows in run_cpu(sizes or CPU_SIZES, args.repeats):
        result = {"machine": facts, "load at the start": load, "rows": rows}
        notes = (
            f"Forward + backward, fp32, {facts['threads']} threads, best of {args.repeats}; ratios to eager in "
            f"the same run. At the start {load:.1f} other tasks wanted the cores; CPU time hardly changes by that. "
            "With a trainable head W's own gradient, V x D x 4 bytes, is in every peak, and ours makes the "
            "logits twice, as a token's gradient from above is not known in the forward pass. "
            "GPU rows: benchmarks/gpu.py."
        )
        write("logprob_cpu", result, cpu_table(rows), notes)


if __name__ == "__main__":
    command(main)
