"""Time, peak memory and errors of linear_logprob beside what one would use instead, in one run.

    python -m benchmarks.logprob           a CPU: eager and torch's own; about ten minutes at the default sizes
    python -m benchmarks.logprob --gpu     a CUDA machine: kernel tests, sweep of blocks and chunks, all peers

Every time is the best of a few, measured in turn with the others; on a CPU each row is a process of its own, because
peak memory is a process's high-water mark. Ratios are to the row named eager (CPU) or to the bare products (GPU).
Inputs are planted: half of the rows are confident, because flat random logits flatter kernels that skip tiny gradients.

A frozen head takes two products of N x D x V on either side. A trainable one takes eager three, with N x V held; ours
makes the logits again, four: that a token's gradient from above is not known before the backward pass is the price of
results per token. And dW itself, V x D in fp32, is in both peaks.
Results: benchmarks/results/logprob_cpu.md and .json, or logprob_gpu.md and .json.
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

from data import InputError, command
from kernels.logprob import linear_logprob
from tiny.report import cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = "liger-kernel", "cut-cross-entropy"
PATIENCE = 240  # seconds for a row on a CPU
CPU_SIZES = [(2048, 896, 151936), (512, 2048, 151936)]
GPU_SIZES = [(N, D, V) for D, V in ((2048, 151936), (3584, 152064)) for N in (2048, 8192, 32768)]


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


# -- a GPU -------------------------------------------------------------------------------------------------------------


def milliseconds(function, seconds=0.4):
    """Best of the runs that fit in so much time, after one that compiles."""
    function()
    torch.cuda.synchronize()
    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def bare_products(h, W, chunk, both):
    """The arithmetic alone: h W^T into fp32, and a half-precision (C, V) times W, chunk by chunk."""
    logits = h.new_empty((min(chunk, len(h)), len(W)), dtype=torch.float32)
    half = logits.view(h.dtype)[:, : len(W)]
    for rows in h.split(chunk):
        torch.mm(rows, W.T, out_dtype=torch.float32, out=logits[: len(rows)])
        if both:
            torch.mm(half[: len(rows)], W, out_dtype=torch.float32)


def errors_gpu(name, h, W, y):
    """Largest error of logp and of a row of the gradient against float64, on the first 256 tokens."""
    h, y = h[:256].detach().clone().requires_grad_(), y[:256]
    exact = h.detach().double().requires_grad_()
    right = torch.log_softmax(exact @ W.double().T, 1).gather(1, y[:, None])[:, 0]
    right.sum().backward()
    found = RIVALS[name](h, W, y)
    if found.numel() != len(y):
        return {}
    found = found if name in ("ours", "eager") else -found
    found.sum().backward()
    worst = ((h.grad - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)).max()
    return {"logp error": (found - right).abs().max().item(), "worst gradient row": worst.item()}


def run_gpu(sizes):
    from kernels.logprob import default_chunk

    rows = []
    for N, D, V in sizes:
        h, W, y = planted(N, D, V, torch.bfloat16, "cuda")
        h.requires_grad_()
        chunk = default_chunk(h)
        products = {both: milliseconds(lambda: bare_products(h.detach(), W, chunk, both)) for both in (False, True)}
        rows.append(
            {
                "name": "bare products",
                "N": N,
                "D": D,
                "V": V,
                "forward ms": products[False],
                "forward+backward ms": products[True],
            }
        )
        for name, rival in RIVALS.items():
            row = {"name": name, "N": N, "D": D, "V": V}
            try:
                torch.cuda.empty_cache()
                for key, backward in ("forward ms", False), ("forward+backward ms", True):
                    row[key] = milliseconds(lambda: step(rival, h, W, y, backward))
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step(rival, h, W, y, True)
                row["peak extra MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
                if N == sizes[0][0]:
                    row |= errors_gpu(name, h, W, y)
            except Exception as error:  # a peer that is not installed, or does not take this: its row says why
                row["not run"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
                h.grad = None
            rows.append(row)
            print(row, flush=True)
        del h, W, y
        torch.cuda.empty_cache()
    return rows


def sweep_gpu():
    """Time of the row sweep by block and warps, and of the whole by chunk; prints the best block's line for BLOCKS."""
    import kernels.logprob_triton as kernel

    device = torch.cuda.get_device_name()
    logits, y = torch.randn(1152, 152064, device="cuda") * 3, torch.randint(152064, (1152,), device="cuda")
    blocks = {}
    for block in 2048, 4096, 8192, 16384:
        for warps in 4, 8, 16, 32:
            if 4 <= block // (32 * warps) <= 32:
                kernel.BLOCKS[device] = (block, warps)
                blocks[f"{block} x {warps}"] = milliseconds(
                    lambda: kernel.sweep_rows(logits, y, 1.0, torch.bfloat16, True, True), 0.1
                )
    best = min(blocks, key=blocks.get)
    kernel.BLOCKS[device] = tuple(int(n) for n in best.split(" x "))
    print(f'kernels/logprob_triton.py, BLOCKS: "{device}": {kernel.BLOCKS[device]},')
    del logits
    chunks = {}
    for D, V in (2048, 151936), (3584, 152064):
        h, W, y = planted(8192, D, V, torch.bfloat16, "cuda")
        h.requires_grad_()
        for chunk in 512, 1024, 1152, 1536, 2048, 2304, 4096:
            chunks[f"D {D}, chunk {chunk}"] = milliseconds(
                lambda: step(lambda *a: linear_logprob(*a, chunk=chunk)[0], h, W, y, True), 0.2
            )
    return {"sweep of 1152 x 152064, ms by block x warps": blocks, "8192 tokens, ms by chunk": chunks}


def gpu_table(rows):
    columns = ["forward ms", "forward+backward ms", "peak extra MB", "logp error", "worst gradient row"]
    lines = ["| tokens x width x vocabulary | | " + " | ".join(columns) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(columns))
    bare = {}
    for row in rows:
        size = (row["N"], row["D"], row["V"])
        if row["name"] == "bare products":
            bare[size] = row
        cells = (
            [row["not run"]] + [""] * (len(columns) - 1)
            if "not run" in row
            else [
                ""
                if key not in row
                else f"{row[key]:.3g}" + (f" ({row[key] / bare[size][key]:.2f}x)" if key in columns[:2] else "")
                for key in columns
            ]
        )
        lines.append(f"| {row['N']} x {row['D']} x {row['V']} | {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -- results -----------------------------------------------------------------------------------------------------------


def machine():
    commit = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(commit, cwd=ROOT, text=True, capture_output=True).stdout.strip()
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
        "commit": commit,
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
        "--gpu", action="store_true", help="kernel tests, sweep and table on a CUDA machine (default: the CPU's table)"
    )
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
    if args.gpu:
        if not torch.cuda.is_available():
            raise InputError("found no CUDA device, expected one; the CPU's table is `python -m benchmarks.logprob`")
        files = "tests/test_logprob.py", "tests/test_advantage.py"
        tests = subprocess.run([sys.executable, "-m", "pytest", *files], cwd=ROOT)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *PEERS])  # those that will
        sweep = sweep_gpu()
        result = {
            "machine": machine(),
            "tests passed": tests.returncode == 0,
            "sweep": sweep,
            "rows": run_gpu(sizes or GPU_SIZES),
        }
        verdict = "passed" if tests.returncode == 0 else "FAILED"
        note = f"Tests {verdict}. bf16; ratios to the bare products; the head is frozen."
        write("logprob_gpu", result, gpu_table(result["rows"]), note)
        sys.exit(tests.returncode)
    facts, load = machine(), os.getloadavg()[0]
    for rows in run_cpu(sizes or CPU_SIZES, args.repeats):
        result = {"machine": facts, "load at the start": load, "rows": rows}
        notes = (
            f"Forward + backward, fp32, {facts['threads']} threads, best of {args.repeats}; ratios to eager in "
            f"the same run. At the start {load:.1f} other tasks wanted the cores: CPU time is what they cannot change "
            "much. With a trainable head W's own gradient, V x D x 4 bytes, is in every peak, and ours makes the "
            "logits twice, as a token's gradient from above is not known in the forward pass. GPU rows: not run, `make gpu` makes them."
        )
        write("logprob_cpu", result, cpu_table(rows), notes)


if __name__ == "__main__":
    command(main)
