"""The four places where researchers fork: each example in tests/fork/ applies, runs and stays within its limit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from again import load
from rl_bench import READ, reader_folder, rl_folder, run

ROOT = Path(__file__).resolve().parents[1]
FORK = ROOT / "tests" / "fork"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rl_folder(tmp_path_factory.mktemp("fork"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return reader_folder(tmp_path_factory.mktemp("fork-reader"))


def test_a_loss_per_token_is_a_diff_of_twelve_lines(folder, tmp_path, monkeypatch):
    """tests/fork/topr.diff applies to train_rl.py, climbs, and breaks none of the tests of the losses."""
    patch = FORK / "topr.diff"
    changed = [line for line in patch.read_text().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= 12
    shutil.copy(ROOT / "train_rl.py", tmp_path)
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    rows = run(folder, "topr", method=load(tmp_path / "train_rl.py", monkeypatch), algorithm="topr")
    assert rows[-1]["reward"] > 0.3
    (tmp_path / "tests").mkdir()
    for name in ("test_losses.py", "again.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_losses.py",
        "-k",
        "not noticed",
    ]
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["rloo", "praise", "half_policy"])
def test_a_fork_of_a_hook_is_one_method_in_one_file(name):
    """Credit, the objective, what the other half sees: nothing else has to be written."""
    source = (FORK / f"{name}.py").read_text()
    assert source.count("    def ") == 1 and len(source.splitlines()) <= 45


@pytest.mark.parametrize("name,flags", [("rloo", {}), ("praise", {}), ("half_policy", {"steps": 4})])
def test_a_fork_of_a_hook_runs(reader, monkeypatch, name, flags):
    rows = run(
        reader, name, method=load(FORK / f"{name}.py", monkeypatch), policy_rollouts=4, **{**READ, "steps": 12, **flags}
    )
    assert rows[0]["accuracy"] == 0 and rows[0]["grad_norm"] > 0
    assert rows[-1]["accuracy"] > 0.3 or "steps" in flags


def test_rloo_compares_with_the_mean_of_the_siblings(monkeypatch):
    from test_variants import judged, learner

    A = learner(load(FORK / "rloo.py", monkeypatch)).credit(judged([1.0, 0.0, 0.0, 1.0], [False] * 4), 0.0)[1]
    assert torch.allclose(A, torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3]))


def test_half_a_policy_keeps_half_of_its_sentences_with_their_pictures(monkeypatch):
    rollout = object.__new__(load(FORK / "half_policy.py", monkeypatch).HalfPolicy)
    policy = {"text": "One. Two <image>. Three. Four <image>.", "images": ["a", "b"]}
    rollout.policy, seen = lambda item: (policy, None), set()
    rollout.prompt = lambda item, policy: seen.add((policy["text"], *policy["images"]))
    for k in range(40):
        rollout.policy_prompt({"id": str(k)}, None)
    assert len(seen) == 6 and all(("Two" in s) == ("a" in p) and ("Four" in s) == ("b" in p) for s, *p in seen)
