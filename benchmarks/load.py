"""Loading a checkpoint of 2 GB or more: time and peak memory, ours, transformers', and of reading the file alone.

    python -m benchmarks.load [--gigabytes 2.2] [--folder /tmp]

Each measurement is a fresh process; the file is in the page cache for all of them, so that loading is work for the CPU
alone, and CPU seconds say what wall seconds on a shared machine do not. Most of the time of reading goes into page
faults of the memory that is read into, and a result in fp32 is twice the file: the second row reads the file and
touches as much memory again, which is the least that such a result can cost. The checkpoint has the proportions of the
3B model and is deleted afterwards. The table goes to benchmarks/results/load.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = """
import re, sys, time, torch
torch.set_num_threads({threads})
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
def high_water():  # bytes; getrusage would tell that of the parent process where it was higher
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
READ = """
before, start, cpu = high_water(), time.perf_counter(), time.process_time()
with open(folder + "/model.safetensors", "rb", buffering=0) as file:
    size = file.seek(0, 2)
    held = torch.empty(size, dtype=torch.uint8)
    file.seek(0)
    view = memoryview(held.numpy())
    while (n := file.readinto(view)):
        view = view[n:]
"""
PROGRAMS = {
    "reading the file": COMMON + READ,
    "reading it into memory for fp32": COMMON + READ + "more = torch.zeros(size, dtype=torch.uint8)\nsize *= 2\n",
    "model.load_pretrained": COMMON
    + """
from model import load_pretrained
before, start, cpu = high_water(), time.perf_counter(), time.process_time()
model = load_pretrained(folder, "cpu", dtype)
size = sum(p.nbytes for p in model.parameters())
""",
    "transformers": COMMON
    + """
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging
logging.disable_progress_bar()
before, start, cpu = high_water(), time.perf_counter(), time.process_time()
model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
size = sum(p.nbytes for p in model.parameters())
touched = sum(float(p.flatten()[::512].float().sum()) for p in model.parameters())  # it maps pages lazily: read them
""",
}
REPORT = """
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
peak = high_water() - before
print(cpu, seconds, peak, size)
"""


def measure(name, folder, dtype, threads, repeats):
    """(CPU seconds, seconds, peak bytes over the start, bytes of the result) of the best of some fresh processes."""
    program = PROGRAMS[name].replace("{threads}", str(threads)) + REPORT
    run = [sys.executable, "-c", program, str(folder), dtype]
    found = [list(map(float, subprocess.check_output(run, cwd=ROOT, text=True).split())) for _ in range(repeats)]
    return min(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.2, help="of bf16 weights (default: %(default)s)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where it is made (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="processes per row (default: %(default)s)")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from helpers import tiny_config

    from model import Config, Qwen25VL, save_pretrained

    load = os.getloadavg()[0]
    layers = max(1, round(args.gigabytes * 1e9 / 2 / 78e6) - 4)
    sizes = {"width": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "layers": layers}
    sizes["vocab_size"] = 151936
    sizes["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    with torch.device("meta"):
        model = Qwen25VL(Config.from_json(tiny_config(vision_width=64, **sizes))).bfloat16()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = model.to_empty(device="cpu")
        for p in model.parameters():
            p.data.fill_(0.01)
        save_pretrained(model, folder)
        del model
        size = Path(folder, "model.safetensors").stat().st_size
        rows = []
        for dtype in ("bfloat16", "float32"):
            for name in PROGRAMS:
                if dtype == "bfloat16" or not name.startswith("reading"):
                    rows.append((name, dtype, *measure(name, folder, dtype, args.threads, args.repeats)))
                    print(*rows[-1], flush=True)
    _, _, reading_cpu, reading, *_ = rows[0]
    lines = [
        "# Loading a checkpoint",
        "",
        f"{size / 1e9:.2f} GB of bf16 on disk, in the page cache; {platform.processor() or platform.machine()}, "
        f"{args.threads} threads, torch {torch.__version__}; best of {args.repeats} fresh processes; x: over reading. "
        f"At the start {load:.0f} other tasks wanted the cores: seconds are theirs too, CPU seconds are not.",
        "",
        "| | into | CPU s | x | seconds | x | peak memory, GB | of the result, GB | peak / result |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, dtype, cpu, seconds, peak, result in rows:
        times = f"{cpu:.2f} | {cpu / reading_cpu:.2f} | {seconds:.2f} | {seconds / reading:.2f}"
        memory = f"{peak / 1e9:.2f} | {result / 1e9:.2f} | {peak / result:.2f}"
        shown = "bytes" if name.startswith("reading") else dtype
        lines.append(f"| {name} | {shown} | {times} | {memory} |")
    lines += ["", "Made by `python -m benchmarks.load`:", "", "```", json.dumps(vars(args)), "```", ""]
    (ROOT / "benchmarks" / "results" / "load.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
