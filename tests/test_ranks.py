"""1 = 2 = 4 ranks: one global batch gives the same losses and weights, replicated, sharded (FSDP2) and with LoRA."""

import json
import os
import sys

import pytest
import torch
from helpers import tiny_checkpoint
from safetensors.torch import load_file
from small import arguments, free_port, metrics, on_ranks, quiet, small_data

import train_cpt
import train_sft

SCRIPTS = {"cpt": train_cpt.main, "sft": train_sft.main}
RUNS = {  # name: (stage, flags); two ranks do all of it in one process each, one rank the same in this one
    "cpt-replicated": ("cpt", {"steps": 3, "kinds": "applied,document,section"}),
    "cpt-sharded": ("cpt", {"steps": 3, "kinds": "applied,document,section", "fsdp": "on"}),
    "cpt-epoch": ("cpt", {"epochs": 0.5, "batch-size": 4, "fsdp": "on"}),
    "sft": ("sft", {"steps": 3, "replay": "DATA"}),
    "sft-sharded": ("sft", {"steps": 3, "full": True, "fsdp": "on", "gradient_checkpointing": True}),
}


def run_all(folder, world):
    for name, (stage, flags) in RUNS.items():
        flags = {key: f"{folder}/data" if value == "DATA" else value for key, value in flags.items()}
        code, errors = quiet(SCRIPTS[stage], arguments(f"{folder}/model", f"{folder}/data", f"{folder}/{name}-{world}", **flags))
        if code:
            sys.exit(f"{name}: {errors}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(sys.argv[1], int(os.environ["WORLD_SIZE"]))
    sys.exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data", items=8)
    run_all(folder, 1)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    for code, output in on_ranks(2, __file__, folder):
        assert code == 0, output
    return folder


def weights(folder):
    (path,) = folder.glob("*/*.safetensors")
    return torch.cat([t.flatten() for _, t in sorted(load_file(path).items())])


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_learn_what_one_learns(two, name):
    one, other = metrics(two / f"{name}-1"), metrics(two / f"{name}-2")
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert b == pytest.approx(a, rel=1e-6)
    a, b = weights(two / f"{name}-1"), weights(two / f"{name}-2")
    assert (a - b).norm() / a.norm() < 1e-6
