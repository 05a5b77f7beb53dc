"""The memory plan: parameter counts that are known, and a peak that is measured."""

import json
import subprocess
import sys

import pytest
from helpers import tiny_checkpoint
from small import ROOT, arguments, small_data

import plan
from training import parse

COUNTS = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344}


def planned(*words):
    return plan.plan(parse(plan.Config, "", [str(word) for word in words]))


@pytest.mark.parametrize("size", COUNTS)
def test_the_official_sizes_have_their_parameters(size):
    assert sum(p.numel() for p in plan.architecture(size).parameters()) == COUNTS[size]


def test_levers_lower_the_peak():
    base = ["--model", "7B", "--gpus", 8, "--micro-batch", 2, "--stage", "cpt"]
    peak = planned(*base)["peak"]
    for lever in (["--gradient-checkpointing"], ["--micro-batch", 1], ["--gpus", 16], ["--no-train-vision"], ["--prompt", 1024]):
        assert planned(*base, *lever)["peak"] < peak


def test_lora_holds_frozen_weights_once_and_sixteen_bytes_a_trained_parameter():
    result = planned("--model", "7B", "--no-full", "--stage", "sft")
    assert result["parts"]["frozen weights (bf16)"] == 2 * COUNTS["7B"]
    assert result["trained"] == 8 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert result["parts"]["adapter, gradient, AdamW (fp32)"] == 16 * result["trained"]


def test_the_plan_is_within_15_percent_of_the_measured_peak(tmp_path):
    """Full CPT in fp32 on a CPU, a model of 30 M parameters: the growth of the resident set from before the load."""
    tiny_checkpoint(tmp_path / "model", width=512, layers=6, vision_width=64, vocab_size=8192)
    small_data(tmp_path / "data", items=6)
    path = tmp_path / "data" / "policies.json"
    policies = json.loads(path.read_text())
    for policy in policies:
        policy["text"] += " go on" * 100
    path.write_text(json.dumps(policies))
    words = arguments(tmp_path / "model", tmp_path / "data", tmp_path / "out", steps=2, batch_size=4, micro_batch=4)
    code = (
        "import resource, sys, torch, train_cpt\n"
        "p = torch.nn.Parameter(torch.ones(9)); p.grad = p.data; torch.optim.AdamW([p], fused=True).step()\n"
        "pages = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "train_cpt.main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    measured = int(done.stdout.split()[-1])
    tokens = int([line for line in done.stdout.splitlines() if "tokens" in line][0].split("tokens ")[1]) // 4
    expected = planned("--model", tmp_path / "model", "--stage", "cpt", "--micro-batch", 4, "--prompt", tokens, "--response", 1,
                       "--patches", 64, "--dtype", "float32")["peak"]  # fmt: skip
    assert expected == pytest.approx(measured, rel=0.15)
