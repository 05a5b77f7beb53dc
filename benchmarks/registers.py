"""Every Triton kernel compiled for GPUs that are not here: registers, spills, programs that a multiprocessor holds.

    python -m benchmarks.registers [--check]

No GPU is needed: Triton brings NVIDIA's assembler and reader of machine code. The rows of the Triton that runs this
take the place of its old ones in benchmarks/results/registers.json, beside which stands the same as a table.
--check writes nothing: exit code 1 where a kernel spills.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from kernels.advantage_triton import group_statistics
from kernels.decode_triton import BLOCK, MOST, STAGES, WARPS, decode
from kernels.logprob_triton import sweep, sweep_once

RESULTS = Path(__file__).parent / "results" / "registers.json"
SHARED = {80: 164, 90: 228, 100: 228}  # KB of shared memory of a multiprocessor, by architecture
FLOATS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def sweep_case(kernel, block, warps, dtype, **flags):
    sums = dict.fromkeys(("logp", "entropy", "scale", "peak", "others"), "*fp32")
    types = dict(logits="*fp32", direction=FLOATS[dtype], targets="*i64", **sums, V="i32", stride="i32")
    return kernel, {**types, "inverse_temperature": "fp32"}, {"BLOCK": block, **flags}, dict(num_warps=warps)


def decode_case(dtype, N, heads, kv_heads, C):
    data = dict.fromkeys(("q", "k", "v", "keys", "values", "out"), FLOATS[dtype])
    where = dict.fromkeys(("tiles", "ranges", "own", "place"), "*i32")
    group = heads // kv_heads
    sizes = dict(GROUP=group, J=kv_heads, C=C, N=N, QUERIES=max(16, triton.next_power_of_2(N * group)), BLOCK=BLOCK)
    return decode, {**data, **where, "P": "i32", "scale": "fp32"}, sizes, dict(num_warps=WARPS, num_stages=STAGES)


def cases():
    """{name: (kernel, types of its arguments, constants, options)}"""
    found = {}
    for block, warps in (512, 2), (1024, 4), (2048, 8), (4096, 16):
        here = lambda kernel, dtype="bf16", **flags: sweep_case(kernel, block, warps, dtype, **flags)
        whole = dict(LOSS=True, ENTROPY=True, GRADIENT=True)
        found[f"one sweep, {block} x {warps}"] = here(sweep_once, ENTROPY=True)
        found[f"two sweeps, {block} x {warps}"] = here(sweep, **whole)
        if (block, warps) == (1024, 4):
            found["two sweeps, fp16"] = here(sweep, "fp16", **whole)
            found["two sweeps, fp32"] = here(sweep, "fp32", **whole)
            found["sums alone"] = here(sweep, **{**whole, "GRADIENT": False})
            found["direction alone"] = here(sweep, **{**whole, "LOSS": False, "ENTROPY": False})
    for N in 1, MOST:
        found[f"decode, 7B, tiles of {N}"] = decode_case("bf16", N, 28, 4, 128)
    found["decode, 3B, tiles of 1"] = decode_case("bf16", 1, 16, 2, 128)
    types = dict(rewards="*fp64", members="*i64", starts="*i64", above_mean="*fp64", spread="*fp64")
    found["group advantage"] = group_statistics, types, dict(BLOCK=32), dict(num_warps=1)
    return found


def compile_for(architecture, kernel, types, constants, options):
    """One kernel's machine code; pointers and sizes are multiples of 16, as those of the real models are."""
    names = [*types, *constants]
    even = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind != "fp32"}
    types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, types, constants, even)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(compiled):
    """Registers per thread, bytes of local memory per thread (spills) and of shared memory per program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        reader = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, compiled.metadata.shared


def programs(registers, shared, warps, architecture):
    """How many programs a multiprocessor holds: 64 warps, 65,536 registers (given out by 256), its shared memory."""
    per_warp = -(-registers * 32 // 256) * 256
    by_memory = SHARED[architecture] * 1024 // (shared + 1024)  # the system takes 1 KB a program
    return min(64 // warps, 65536 // (per_warp * warps), by_memory, 32)


def measure():
    for name, (kernel, types, constants, options) in cases().items():
        for architecture in SHARED:
            registers, spills, shared = usage(compile_for(architecture, kernel, types, constants, options))
            held = programs(registers, shared, options["num_warps"], architecture)
            yield {
                "kernel": name,
                "architecture": f"sm_{architecture}",
                "registers": registers,
                "spills": spills,
                "shared": shared,
                "programs": held,
                "warps": held * options["num_warps"],
            }


def table(rows):
    """A row per kernel, a column per Triton and architecture."""
    columns = list(dict.fromkeys((row["triton"], row["architecture"]) for row in rows))
    lines = ["| | " + " | ".join(f"{architecture}, Triton {version}" for version, architecture in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = {(row["triton"], row["architecture"]): row for row in rows if row["kernel"] == kernel}
        text = [
            f"{row['registers']}, {row['spills']}, {row['programs']} ({row['warps']})" if row else ""
            for row in map(cells.get, columns)
        ]
        lines.append(f"| {kernel} | " + " | ".join(text) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a kernel spills")
    args = parser.parse_args()
    rows = [{"triton": triton.__version__, **row} for row in measure()]
    if not args.check:
        old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        kept = [row for row in old if row["triton"] != triton.__version__] + rows
        kept.sort(key=lambda row: [int(n) for n in row["triton"].split(".")])
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
        RESULTS.with_suffix(".md").write_text(
            "# Triton kernels as machine code\n\nRegisters per thread, bytes spilled per thread, programs that a "
            "multiprocessor holds (and their warps, of 64), from `python -m benchmarks.registers`. The loss's sweeps: "
            f"block x warps, bf16 where nothing else is said, with entropy and gradient.\n\n{table(kept)}\n"
        )
    print(table(rows))
    sys.exit(any(row["spills"] for row in rows))


if __name__ == "__main__":
    main()
