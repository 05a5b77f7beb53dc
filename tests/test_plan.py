"""The memory plan: parameter counts that are known, and a peak that is measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_checkpoint
from small import ROOT, arguments, metrics, quiet, small_data, start_ranks

import train_cpt
from support import plan
from support.config import parse
from support.engine import fitting
from train_rl import Config

MICRO = 4

COUNTS = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344}


def planned(*words):
    return plan.plan(parse(plan.Config, "", [str(word) for word in words]))


@pytest.mark.parametrize("size", COUNTS)
def test_the_official_sizes_have_their_parameters(size):
    assert sum(p.numel() for p in plan.architecture(size).parameters()) == COUNTS[size]


def test_levers_lower_the_peak():
    base = ["--model", "7B", "--gpus", 8, "--micro-batch", 2, "--stage", "cpt"]
    peak = planned(*base)["peak"]
    lists = "--gradient-checkpointing", "--micro-batch 1", "--gpus 16", "--no-train-vision", "--prompt 1024"
    for lever in map(str.split, lists):
        assert planned(*base, *lever)["peak"] < peak


def test_lora_holds_frozen_weights_once_and_sixteen_bytes_a_trained_parameter():
    result = planned("--model", "7B", "--no-full", "--stage", "sft")
    assert result["parts"]["frozen weights (bf16)"] == 2 * COUNTS["7B"]
    assert result["trained"] == 8 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert result["parts"]["adapter, gradient, AdamW (fp32)"] == 16 * result["trained"]


def test_a_plan_of_the_official_model_downloads_nothing(monkeypatch):
    monkeypatch.setattr(plan.qwen, "find_folder", lambda name: pytest.fail(f"asked for {name}"))
    assert sum(p.numel() for p in plan.architecture("Qwen/Qwen2.5-VL-7B-Instruct").parameters()) == COUNTS["7B"]


@pytest.mark.parametrize("words", ["--no-full", "--full --gpus 4 --gradient-checkpointing"])
def test_without_a_budget_the_plan_says_what_sampling_will_choose(monkeypatch, words):
    """Of a card that holds the plan's parts and whole weights, engine.fitting takes what the plan says; it fits."""
    text = plan.architecture("7B").config
    result = planned("--model", "7B", *words.split())
    taken = sum(result["parts"].values()) + ("--full" in words) * 2 * COUNTS["7B"]
    free = lambda *_: (int(80e9 - taken), int(80e9))
    for name, value in dict(mem_get_info=free, memory_reserved=lambda *_: 5, memory_allocated=lambda *_: 5).items():
        monkeypatch.setattr(plan.torch.cuda, name, value)
    weight = SimpleNamespace(is_cuda=True, device="cuda", element_size=lambda: 2)
    assert result["held"] == pytest.approx(fitting(SimpleNamespace(head_weight=weight, config=text)), abs=1)
    assert parse(Config, "", ["--model", "m", "--data", "d", "--out", "o"]).budget == 0  # RL leaves the choice to it
    assert result["peak"] <= 80e9
    assert planned("--model", "7B", *words.split(), "--budget", 1000)["held"] == 1000
    assert planned("--model", "7B", *words.split(), "--memory", 1)["held"] == 4096 + 2048  # one row, whether it fits


def growth(folder, ranks):
    """Run full CPT in copies of this process, one a rank; each adds a line: bytes its resident set grew by at most.

    A smaller run comes first: what Python, AdamW and FSDP load at their first step is not the model's.
    """
    status = lambda key: 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def train(model, out, **flags):
        quiet(train_cpt.main, arguments(folder / model, folder / "data", folder / out, fsdp="on", **flags))

    def work():
        train("small", "first", steps=1, batch_size=ranks)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        train("model", "out", steps=2, batch_size=MICRO * ranks, micro_batch=MICRO)
        os.write(1, f"growth {status('VmHWM') - before}\n".encode())  # at once: lines of two ranks must not mix

    processes = start_ranks(ranks, work, folder / f"{ranks}.log")
    [process.join() for process in processes]
    sys.exit(max(process.exitcode for process in processes))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_is_within_15_percent_of_the_measured_peak(tmp_path, ranks):
    """Full CPT in fp32 on a CPU, a model of 8 M parameters, whole or sharded over two ranks (FSDP2)."""
    tiny_checkpoint(tmp_path / "model", width=384, layers=4, vision_width=64, vocab_size=4096)
    tiny_checkpoint(tmp_path / "small")
    small_data(tmp_path / "data", items=6)
    path = tmp_path / "data" / "policies.json"
    policies = json.loads(path.read_text())
    for policy in policies:
        policy["text"] += " go on" * 60
    path.write_text(json.dumps(policies))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    code = f"import pathlib, test_plan; test_plan.growth(pathlib.Path({str(tmp_path)!r}), {ranks})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    log = (tmp_path / f"{ranks}.log").read_text()
    measured = max(int(size) for size in re.findall(r"growth (\d+)", log))
    tokens = metrics(tmp_path / "out")[0]["tokens"] // (MICRO * ranks)
    expected = planned(
        "--model",
        tmp_path / "model",
        "--stage",
        "cpt",
        "--micro-batch",
        MICRO,
        "--prompt",
        tokens,
        "--response",
        1,
        "--patches",
        64,
        "--dtype",
        "float32",
        "--gpus",
        ranks,
    )["peak"]
    assert expected == pytest.approx(measured, rel=0.15)
