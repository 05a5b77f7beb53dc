"""One global batch gives the same losses and weights on any number of ranks: replicated, sharded (FSDP2), with LoRA."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint
from safetensors.torch import load_file
from small import ROOT, arguments, free_port, metrics, quiet, small_data, start_ranks, write_lines

import train_cpt
import train_rl
import train_sft

WORLDS = (2, 4)
SCRIPTS = {"cpt": train_cpt.main, "sft": train_sft.main, "rl": train_rl.main}
PORO = {
    "steps": 2,
    "group_size": 2,
    "policy_rollouts": 2,
    "check": 0,
    "max_response": 8,
    "reward": "small:length",
    "beta": 0.01,
}
SHARDED = {"steps": 3, "kinds": "applied,document,section", "fsdp": "on", "save_every": 1}
SHARDING = {"": {"fsdp": "off"}, "-sharded": {"fsdp": "on"}}
ODD = {**PORO, "steps": 0, "epochs": 3, "split": "odd.jsonl", "reward": "small:of_one", "beta": 0, "lr": "1e-5"}
REPLAY = {"replay": "DATA/two", "mini_batch": 2, "max_response": 32, "epochs": 2}
DRAWS = {"algorithm": "dapo", "dynamic_tries": 20, "mini_batch": 2, "reward": "small:of_two", "epochs": 1}
RUNS = {  # name: (stage, flags); one rank does all of it in this process
    "cpt-replicated": ("cpt", {"steps": 3, "kinds": "applied,document,section"}),
    "cpt-sharded": ("cpt", SHARDED),
    "cpt-epoch": ("cpt", {"epochs": 0.5, "batch-size": 4, "fsdp": "on"}),
    # AdamW divides a gradient by its own size: rounding in one that should be 0 moves its weight by up to the rate
    "sft": ("sft", {"steps": 3, "replay": "DATA", "lr": "2e-5"}),
    "rl": ("rl", {**PORO, "full": False, "lr": "1e-4"}),
    "rl-sharded": ("rl", {**PORO, "fsdp": "on", "lr": "1e-5"}),
    "sft-sharded": ("sft", {"steps": 3, "full": True, "fsdp": "on", "gradient_checkpointing": True}),
    # steps of RL that are odd: no live group on a rank, or anywhere; no picture in a step; epochs of one whole batch;
    # fewer items to replay than ranks; more draws than one, of fewer queries than ranks
    **{f"rl-dead{name}": ("rl", {**ODD, **fsdp}) for name, fsdp in SHARDING.items()},
    **{f"rl-replay{name}": ("rl", {**ODD, **REPLAY, **fsdp}) for name, fsdp in SHARDING.items()},
    "rl-draws": ("rl", {**ODD, **DRAWS, "fsdp": "on"}),  # replicated: test_rl.py
}


def run_all(folder, world):
    for name, (stage, flags) in RUNS.items():
        flags = {k: v.replace("DATA", f"{folder}/data") if k == "replay" else v for k, v in flags.items()}
        words = arguments(f"{folder}/model", f"{folder}/data", f"{folder}/{name}-{world}", **flags)
        code, errors = quiet(SCRIPTS[stage], words)
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
    """All of RUNS, and what one rank began, on `world` ranks: one process imports torch, they are copies of it."""
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
    rows = [json.loads(line) for line in (folder / "data" / "rl.jsonl").read_text().splitlines()]
    text = [{**row, "images": []} for row in rows]
    write_lines(folder / "data" / "odd.jsonl", [*text[:2], rows[2], *text[3:6]])
    shutil.copytree(folder / "data", folder / "data" / "two")
    write_lines(folder / "data" / "two" / "sft.jsonl", rows[:2])
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """The folder in which one, two and four ranks have done all of RUNS, each on one thread: sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_all(folder, 1)
    torch.set_num_threads(threads)
    for world in WORLDS:
        on_ranks(folder, world)
    return folder


def weights(folder):
    (path,) = folder.glob("*/*.safetensors")
    return torch.cat([t.flatten() for _, t in sorted(load_file(path).items())])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_learns_what_one_learns(ranks, name, world):
    """Losses, gradient norms, rewards and final weights; four ranks hold one item of each batch."""
    one, other = metrics(ranks / f"{name}-1"), metrics(ranks / f"{name}-{world}")
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-6)
    a, b = weights(ranks / f"{name}-1"), weights(ranks / f"{name}-{world}")
    assert (a - b).norm() / a.norm() < 1e-6


def test_the_odd_steps_are_odd(ranks):
    """A live group, with a picture; none, and no picture; a live one again: else the test above would test nothing."""
    rows = metrics(ranks / "rl-dead-1")
    assert [row["dead_groups"] == 1 for row in rows] == [False, True, False]
    assert [row["grad_norm"] == 0 for row in rows] == [False, True, False]
    assert metrics(ranks / "rl-draws-1")[0]["draws"] > 2


@pytest.mark.parametrize("to", [1, *WORLDS])
def test_a_checkpoint_is_continued_on_another_number_of_ranks(ranks, to):
    if to == 1:
        assert quiet(train_cpt.main, move(ranks, 2, to=1))[0] == 0
    for a, b in zip(metrics(ranks / "cpt-sharded-1"), metrics(ranks / f"moved-{to}"), strict=True):
        assert b == pytest.approx(a, rel=1e-6)
    a, b = weights(ranks / "cpt-sharded-1"), weights(ranks / f"moved-{to}")
    assert (a - b).norm() / a.norm() < 1e-6


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_nodes_of_which_one_dies_and_comes_back_learn_what_one_process_learns(folder, tmp_path):
    """Two torchrun agents meet over loopback, as two machines do. One is killed with its worker and started again: the
    other's worker fails, waits for it, and both go on from the newest checkpoint. Without the variable torchrun hands
    the new workers the store of the old ones, and gloo calls the dead (torch 2.13).
    """
    flags = {"steps": 30, "save_every": 1}  # not over before this process, on a busy machine, has seen the second
    assert quiet(train_sft.main, arguments(folder / "model", folder / "data", tmp_path / "alone", **flags))[0] == 0
    port, out = free_port(), tmp_path / "nodes"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def node(number):
        conf = f"is_host={int(number == 0)},keep_alive_interval=1"
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc_per_node",
            "1",
            "--max-restarts",
            "3",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "test",
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-conf",
            conf,
            "--monitor-interval",
            "0.2",
            "train_sft.py",
        ]
        words += arguments(folder / "model", folder / "data", out, resume=True, **flags)
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)

    host, other = node(0), node(1)
    try:
        while not [path for path in out.glob("checkpoints/step-????????") if path.name > "step-00000001"]:
            assert host.poll() is None and other.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        for pid in [other.pid, *children(other.pid)]:
            os.kill(pid, signal.SIGKILL)
        other.wait()
        assert not (out / "adapter").exists()  # the run was in the middle
        other = node(1)
        codes = [host.wait(300), other.wait(300)]
    finally:
        for agent in (host, other):
            for pid in [*(children(agent.pid) if agent.poll() is None else []), agent.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert codes == [0, 0], (tmp_path / "log").read_text()
    for a, b in zip(metrics(tmp_path / "alone"), metrics(out), strict=True):
        assert b == pytest.approx(a, rel=1e-6)
