"""The start model computes what the policy does before its first step: a KL that is not 0 there is noise."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny_checkpoint
from safetensors.torch import load_file
from small import ROOT, arguments, metrics, quiet, small_data, start_ranks

import train_rl
import train_sft
from model import Processor, add_lora, load_pretrained, lora_parameters, save_adapter
from support.batching import collate, token_logprobs
from train_sft import Config, Examples
from training import Run

PORO = {"group_size": 2, "policy_rollouts": 2, "check": 0, "max_response": 8, "reward": "small:length", "beta": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in float32, data, and a run that has made an adapter which shows in every product."""
    folder = tmp_path_factory.mktemp("reference")
    tiny_checkpoint(folder / "model", scale=0.3)
    small_data(folder / "data")
    model = add_lora(load_pretrained(folder / "model"), 4, 8)
    generator = torch.Generator().manual_seed(0)
    for p in lora_parameters(model):
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    save_adapter(model, folder / "adapted" / "adapter")
    (folder / "adapted" / "config.json").write_text(json.dumps({"stage": "sft", "base": str(folder / "model")}))
    return folder


STARTS = {
    "full": {},
    "full, from an adapter": {"init": "adapted"},
    "LoRA": {"full": False},
    "LoRA, from an adapter": {"full": False, "init": "adapted"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", STARTS)
def test_the_start_model_gives_the_policy_s_bits(folder, tmp_path, start, dtype):
    flags = {**STARTS[start], "init": STARTS[start].get("init") and str(folder / "adapted")}
    paths = {"model": str(folder / "model"), "data": str(folder / "data"), "out": str(tmp_path / "run")}
    config = Config(**{**flags, "init": flags["init"] or "", **paths}, device="cpu", dtype=dtype, batch_size=4)
    with Run(config, stage="rl") as run:
        policy, reference = run.load()[0], run.load("start")[0]
        rows = Examples(config.data, "sft.jsonl", Processor.from_pretrained(folder / "model"), config)
        batch = collate(*zip(*(rows.encode(0, i) for i in range(4))), pad_id=rows.processor.pad_id)
        with run.autocast():
            logp, entropy = token_logprobs(policy, batch, entropy=True)
            with torch.no_grad():
                expected, expected_entropy = token_logprobs(reference, batch, entropy=True)
    assert logp.requires_grad and not any(p.requires_grad for p in reference.parameters())
    assert torch.equal(logp, expected) and torch.equal(entropy, expected_entropy)


RUNS = {"sharded": {"fsdp": "on"}, "replicated": {"fsdp": "off"}, "lora": {"full": False}}


def test_kl_is_0_at_step_0_in_bf16_on_two_ranks_and_what_is_saved_is_of_one_type(folder):
    """Whatever the number of ranks, sharded or not, weights are saved in the type of the products."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, __file__, str(folder)], env=env, cwd=ROOT, check=True, timeout=300)
    words = arguments(folder / "model", folder / "data", folder / "one", steps=1, dtype="bfloat16", full=True)
    assert quiet(train_sft.main, words)[0] == 0
    for name in RUNS:
        assert metrics(folder / name)[0]["kl"] == 0.0, name
    for name in ("one", "sharded", "replicated"):
        tensors = load_file(folder / name / "model" / "model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
        assert json.loads((folder / name / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def main(folder):
    import torch.distributed.fsdp  # noqa: F401

    def work():
        for name, flags in RUNS.items():
            flags = {"steps": 1, "dtype": "bfloat16", **PORO, **flags}
            train_rl.main(arguments(f"{folder}/model", f"{folder}/data", f"{folder}/{name}", **flags))

    ranks = start_ranks(2, work, f"{folder}/log")
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(open(f"{folder}/log").read()[-2000:])


if __name__ == "__main__":
    main(*sys.argv[1:])
