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
    "the maximum starts at 0": ("logprob_triton", "tl.full((), -3.0e38, tl.float32)", "tl.full((), 0.0, tl.float32)", "maximum"),
    "the maximum starts at -inf": ("logprob_triton", "-3.0e38", "float('-inf')", "minus_inf"),
    "p in bf16 before the subtraction": (
        "logprob_triton", "d = tl.where(v == y, 1.0, -tl.exp(l - m) * per_rest)",
        "p = (tl.exp(l - m) / total).to(tl.bfloat16).to(tl.float32)\n"
        "            d = (tl.where(v == y, 1.0, 0.0) - p) * total * per_rest", "sure or rounded"),
    "1 - p_y as a difference": ("logprob_triton", "rest / total * inverse", "(1 - e_y / total) * inverse", "sure"),
    "no column mask: the rest of the block counts as 0": (
        "logprob_triton", 'l = tl.load(logits + v, mask=v < V, other=float("-inf")) * inverse_temperature\n            above',
        "l = tl.load(logits + v, mask=v < V, other=0.0) * inverse_temperature\n            above", "phantom"),
    "the last, partial block is left out": (
        "logprob_triton", "t = tl.zeros((BLOCK,), tl.float32)\n        for start in range(0, V, BLOCK):",
        "t = tl.zeros((BLOCK,), tl.float32)\n        for start in range(0, V // BLOCK * BLOCK, BLOCK):", "phantom"),
    "sums are not rescaled when the maximum rises": ("logprob_triton", "s = shrink * s + e", "s = s + e", "maximum or errors"),
    "the entropy's sum misses the shift": ("logprob_triton", "t + (m - above) * s", "t", "minus_inf or errors"),
    "0 * -inf in the entropy": ("logprob_triton", "e * tl.where(e > 0, l - above, 0.0)", "e * (l - above)", "minus_inf"),
    "the target counts twice": ("logprob_triton", "e = tl.where(v == y, 0.0, tl.exp(l - above))", "e = tl.exp(l - above)", "phantom"),
    "the temperature is missing from the gradient": ("logprob_triton", "rest / total * inverse_temperature", "rest / total", "errors"),
    "the temperature is missing from the second sweep": (
        "logprob_triton", 'float("-inf")) * inverse_temperature\n            d', 'float("-inf"))\n            d', "errors"),
    "targets beyond the vocabulary are read": ("logprob_triton", "(y >= 0) & (y < V)", "(y >= 0)", "out_of_bounds"),
    "negative targets are read": ("logprob_triton", "(y >= 0) & (y < V)", "(y < V)", "out_of_bounds"),
    "rows lie V apart in the direction": ("logprob_triton", "direction += row * stride", "direction += row * V", "interpreter"),
    "the kept sum counts the target": ("logprob_triton", "tl.store(others + row, rest)", "tl.store(others + row, total)", "errors"),
    "the deviation divides by n": ("advantage_triton", "tl.maximum(n - 1, 1)", "tl.maximum(n, 1)", ""),
    "rewards are measured from 0": ("advantage_triton", 'tl.full((), float("inf"), tl.float64)', "tl.full((), 0.0, tl.float64)", "nothing"),
    "NaN rewards count as members": ("advantage_triton", "n += tl.sum(real.to(tl.float64), 0)", "n += tl.sum(inside.to(tl.float64), 0)", ""),
}  # fmt: skip


def wrong_module(module, right, wrong, folder):
    """The module's source with one change, imported from a file of its own (the interpreter reads a kernel's source)."""
    source = (ROOT / "kernels" / f"{module}.py").read_text()
    assert source.count(right) == 1, f"{module}.py: found {source.count(right)} times, expected once: {right}"
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
