"""One global batch gives the same losses and weights on any number of ranks: replicated, sharded (FSDP2), with LoRA."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint
from safetensors.torch import load_file
from small import ROOT, arguments, free_port, metrics, quiet, small_data, start_ranks

import train_cpt
import train_rl
import train_sft

WORLDS = (2, 4)
SCRIPTS = {"cpt": train_cpt.main, "sft": train_sft.main, "rl": train_rl.main}
PORO = {"steps": 2, "group_size": 2, "policy_rollouts": 2, "check": 0, "max_response": 8, "reward": "small:length", "beta": 0.01}
SHARDED = {"steps": 3, "kinds": "applied,document,section", "fsdp": "on", "save_every": 1}
RUNS = {  # name: (stage, flags); one rank does all of it in this process
    "cpt-replicated": ("cpt", {"steps": 3, "kinds": "applied,document,section"}),
    "cpt-sharded": ("cpt", SHARDED),
    "cpt-epoch": ("cpt", {"epochs": 0.5, "batch-size": 4, "fsdp": "on"}),
    "sft": ("sft", {"steps": 3, "replay": "DATA"}),
    "rl": ("rl", {**PORO, "full": False, "lr": "1e-4"}),
    "rl-sharded": ("rl", {**PORO, "fsdp": "on", "lr": "1e-5"}),
    "sft-sharded": ("sft", {"steps": 3, "full": True, "fsdp": "on", "gradient_checkpointing": True}),
}


def run_all(folder, world):
    for name, (stage, flags) in RUNS.items():
        flags = {key: f"{folder}/data" if value == "DATA" else value for key, value in flags.items()}
        code, errors = quiet(SCRIPTS[stage], arguments(f"{folder}/model", f"{folder}/data", f"{folder}/{name}-{world}", **flags))
        if code:
            sys.exit(f"{name}: {errors}")


def move(folder, world, to):
    """A run of `world` ranks as it was after its first step, and the arguments that continue it on `to` ranks."""
    out = folder / f"moved-{to}"
    shutil.copytree(folder / f"cpt-sharded-{world}", out)
    shutil.rmtree(out / "model")
    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    return arguments(folder / "model", folder / "data", out, resume=True, **SHARDED)


def on_ranks(folder, world):
    """All of RUNS, and what one rank began, on `world` ranks: one process imports torch and starts them as its copies."""
    words = [sys.executable, __file__, folder, world, *move(folder, 1, to=world)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([str(word) for word in words], env=env, cwd=ROOT, check=True, timeout=300)


def main(folder, world, *words):
    import torch.distributed.fsdp  # noqa: F401

    def work():
        run_all(folder, int(world))
        train_cpt.main(words)

    ranks = start_ranks(int(world), work, f"{folder}/{world}.log")
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(Path(f"{folder}/{world}.log").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data", items=8)
    run_all(folder, 1)
    for world in WORLDS:
        on_ranks(folder, world)
    return folder


def weights(folder):
    (path,) = folder.glob("*/*.safetensors")
    return torch.cat([t.flatten() for _, t in sorted(load_file(path).items())])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_learns_what_one_learns(folder, name, world):
    """Losses, gradient norms, rewards and final weights; four ranks hold one item of each batch."""
    one, other = metrics(folder / f"{name}-1"), metrics(folder / f"{name}-{world}")
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-6)
    a, b = weights(folder / f"{name}-1"), weights(folder / f"{name}-{world}")
    assert (a - b).norm() / a.norm() < 1e-6


@pytest.mark.parametrize("to", [1, *WORLDS])
def test_a_checkpoint_is_continued_on_another_number_of_ranks(folder, to):
    if to == 1:
        assert quiet(train_cpt.main, move(folder, 2, to=1))[0] == 0
    for a, b in zip(metrics(folder / "cpt-sharded-1"), metrics(folder / f"moved-{to}"), strict=True):
        assert b == pytest.approx(a, rel=1e-6)
    a, b = weights(folder / "cpt-sharded-1"), weights(folder / f"moved-{to}")
    assert (a - b).norm() / a.norm() < 1e-6


def test_two_nodes_learn_what_one_process_learns(folder, tmp_path):
    """Two torchrun agents meet over loopback, as two machines do; the run ends as one process's."""
    assert quiet(train_sft.main, arguments(folder / "model", folder / "data", tmp_path / "alone", steps=4))[0] == 0
    port, out = free_port(), tmp_path / "nodes"
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--monitor-interval", "0.2", "train_sft.py",
             *arguments(folder / "model", folder / "data", out, steps=4)]  # fmt: skip
    agent = lambda: subprocess.Popen([sys.executable, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    nodes = [agent()]
    time.sleep(2)  # the first one hosts the rendezvous
    nodes.append(agent())
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    for a, b in zip(metrics(tmp_path / "alone"), metrics(out), strict=True):
        assert b == pytest.approx(a, rel=1e-6)
