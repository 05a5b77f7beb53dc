"""Wrong versions of the Triton kernels, one line changed each, and the test that notices, under Triton's interpreter.

    python tests/wrong_kernels.py [--only TEXT | --fast]

Each version replaces the kernel in memory and the tests run until one fails. The table goes to
benchmarks/results/wrong_kernels.md; a version that no test notices is named and ends the command with exit code 1.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402 (the interpreter is chosen when Triton is imported)

# name: (module, what stands there, what stands there instead, tests that are tried first)
WRONG = {
    "the maximum starts at 0": (
        "logprob_triton",
        "m = tl.full((BLOCK,), -1.0e30,",
        "m = tl.full((BLOCK,), 0.0,",
        "maximum",
    ),
    "the maximum starts at -inf": (
        "logprob_triton",
        "m = tl.full((BLOCK,), -1.0e30,",
        "m = tl.full((BLOCK,), float('-inf'),",
        "minus_inf",
    ),
    "p in bf16 before the subtraction": (
        "logprob_triton",
        "d = tl.where(v == y, 1.0, -tl.exp2((l - top) * bits) * per_rest)",
        "total = rest / tl.load(scale + row) * inverse_temperature if LOSS else rest\n"
        "            p = (tl.exp2((l - top) * bits) / total).to(tl.bfloat16).to(tl.float32)\n"
        "            d = (tl.where(v == y, 1.0, 0.0) - p) * total * per_rest",
        "interpreter or two",
    ),
    "1 - p_y as a difference": ("logprob_triton", "rest / total * inverse", "(1 - e_y / total) * inverse", "sure"),
    "no column mask: the rest of the block counts as 0": (
        "logprob_triton",
        'l = tl.load(logits + v, mask=v < V, other=float("-inf"))\n            above',
        "l = tl.load(logits + v, mask=v < V, other=0.0)\n            above",
        "phantom",
    ),
    "the last, partial block is left out": (
        "logprob_triton",
        "for start in range(0, V, BLOCK):\n            v = start + lanes\n"
        '            l = tl.load(logits + v, mask=v < V, other=float("-inf"))\n            above',
        "for start in range(0, V // BLOCK * BLOCK, BLOCK):\n            v = start + lanes\n"
        '            l = tl.load(logits + v, mask=v < V, other=float("-inf"))\n            above',
        "phantom",
    ),
    "sums are not rescaled when the maximum rises": (
        "logprob_triton",
        "s = shrink * s + e",
        "s = s + e",
        "maximum or errors",
    ),
    "the lanes' sums meet as they are": ("logprob_triton", "s = tl.exp2(gap) * s", "s = s", "maximum or errors"),
    "the entropy's sum misses the shift": (
        "logprob_triton",
        "t = shrink * (t + gap * s)",
        "t = shrink * t",
        "minus_inf or errors",
    ),
    "0 * -inf in the entropy": ("logprob_triton", "e * tl.where(e > 0, x, 0.0)  # 0", "e * x  # 0", "minus_inf"),
    "the target counts twice": (
        "logprob_triton",
        "e = tl.where(v == y, 0.0, tl.exp2(x))\n            gap",
        "e = tl.exp2(x)\n            gap",
        "phantom",
    ),
    "the temperature is missing from the gradient": (
        "logprob_triton",
        "rest / total * inverse_temperature",
        "rest / total",
        "errors",
    ),
    "the temperature is missing from the second sweep": (
        "logprob_triton",
        "-tl.exp2((l - top) * bits)",
        "-tl.exp2((l - top) * BITS)",
        "two",
    ),
    "targets beyond the vocabulary are read": ("logprob_triton", "(y >= 0) & (y < V)", "(y >= 0)", "out_of_bounds"),
    "negative targets are read": ("logprob_triton", "(y >= 0) & (y < V)", "(y < V)", "out_of_bounds"),
    "rows lie V apart in the direction": (
        "logprob_triton",
        "direction += row * stride",
        "direction += row * V",
        "interpreter",
    ),
    "the kept sum counts the target": (
        "logprob_triton",
        "tl.store(others + row, rest)",
        "tl.store(others + row, total)",
        "errors",
    ),
    "a single sweep that misses is believed": (
        "logprob_triton",
        "return s < 2.0**REACH",
        "return s < float('inf')",
        "made_again",
    ),
    "a single sweep ignores the target's height": (
        "logprob_triton",
        "tl.where(y >= 0, l_y, first)), -1.0e30)",
        "first), -1.0e30)",
        "two",
    ),
    "a single sweep counts the target twice": (
        "logprob_triton",
        "e = tl.where(v == y, 0.0, tl.exp2(x))\n        s += e",
        "e = tl.exp2(x)\n        s += e",
        "two",
    ),
    "0 * -inf in a single sweep's entropy": ("logprob_triton", "t += e * tl.where(e > 0, x, 0.0)", "t += e * x", "two"),
    "a single sweep's product misses the target's row": (
        "logprob_triton",
        "W_y - times_head(powers, W)",
        "-times_head(powers, W)",
        "errors",
    ),
    "a row's new token is not seen": (
        "decode_triton",
        "s = tl.full((QUERIES,), 1.0, tl.float32)",
        "s = tl.full((QUERIES,), 0.0, tl.float32)",
        "",
    ),
    "tokens beyond a range count as 0": (
        "decode_triton",
        "sees[:, None] & (token < end)[None, :]",
        "sees[:, None]",
        "",
    ),
    "rows of a tile see each other's tokens": (
        "decode_triton",
        "start, end, member == n,",
        "start, end, member >= 0,",
        "",
    ),
    "a range is seen by all of its tile": (
        "decode_triton",
        "sees = (member >= tl.load(it + 2)) & (member < tl.load(it + 3))",
        "sees = member >= 0",
        "",
    ),
    "values are not rescaled when the maximum rises": ("decode_triton", "a = a * shrink[:, None]", "a = a", ""),
    "the new key is not kept": ("decode_triton", "    tl.store(keys + to, k_i, mask=first)\n", "", ""),
    "the deviation divides by n": ("advantage_triton", "tl.maximum(n - 1, 1)", "tl.maximum(n, 1)", ""),
    "rewards are measured from 0": (
        "advantage_triton",
        'tl.full((), float("inf"), tl.float64)',
        "tl.full((), 0.0, tl.float64)",
        "nothing",
    ),
    "NaN rewards count as members": (
        "advantage_triton",
        "n += tl.sum(real.to(tl.float64), 0)",
        "n += tl.sum(inside.to(tl.float64), 0)",
        "",
    ),
}


def wrong_module(module, right, wrong, folder):
    """The module's source with one change, imported from a file (the interpreter reads a kernel's source)."""
    source = (ROOT / "kernels" / f"{module}.py").read_text()
    assert right in source, f"{module}.py: found nowhere, expected: {right}"
    path = Path(folder) / f"{module}_{abs(hash(wrong))}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"kernels.{module}", path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed


class FirstFailure:
    name = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.name is None:
            self.name = report.nodeid.split("/")[-1].split("::")[-1]


def noticed_by(name):
    """The first test that fails with this version of the kernel, or None."""
    module, right, wrong, first = WRONG[name]
    full, tests = f"kernels.{module}", str(ROOT / "tests" / f"test_{module.split('_')[0]}.py")
    with tempfile.TemporaryDirectory() as folder:
        original = importlib.import_module(full)
        sys.modules[full] = wrong_module(module, right, wrong, folder)
        setattr(importlib.import_module("kernels"), module, sys.modules[full])
        try:
            for chosen in dict.fromkeys([first, ""]):
                failure = FirstFailure()
                pytest.main(
                    [
                        tests,
                        "-x",
                        "-q",
                        "--no-header",
                        "--capture=fd",
                        "--tb=no",
                        "-p",
                        "no:cacheprovider",
                        "-W",
                        "ignore",
                        "-k",
                        chosen,
                    ],
                    plugins=[failure],
                )
                if failure.name:
                    return failure.name
        finally:
            sys.modules[full] = original
            setattr(importlib.import_module("kernels"), module, original)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="only versions whose name contains this text")
    parser.add_argument(
        "--fast", action="store_true", help="only versions that a test of a few given rows notices (CI runs these)"
    )
    args = parser.parse_args()
    fast = {"maximum", "minus_inf", "phantom", "interpreter"}
    chosen = [name for name in WRONG if args.only in name and (not args.fast or WRONG[name][3] in fast)]
    found = {name: noticed_by(name) for name in chosen}
    table = "| wrong version | noticed by |\n| --- | --- |\n"
    table += "".join(f"| {name} | {test or '**nothing**'} |\n" for name, test in found.items())
    print(table)
    if len(chosen) == len(WRONG):
        (ROOT / "benchmarks" / "results" / "wrong_kernels.md").write_text(
            "One line of a Triton kernel changed, and the first test that fails (`python tests/wrong_kernels.py`).\n\n"
            + table
        )
    sys.exit(0 if chosen and all(found.values()) else 1)


if __name__ == "__main__":
    main()
