"""Checkpoints in and out: every layout, transformers on both sides, and files that are damaged."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import oracle, question, tiny_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as house
from data import InputError
from model import Processor, add_lora, library_name, load_pretrained, merge_lora, save_pretrained

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("loading"), tied=False)


@pytest.fixture
def copy(folder, tmp_path):
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_in_library_names_load_as_hub_names_do(folder, copy):
    tensors = load_file(copy / "model.safetensors")
    renamed = {library_name(name): tensor for name, tensor in tensors.items()}
    assert {"model.language_model.layers.0.mlp.up_proj.weight", "model.visual.merger.ln_q.weight"} <= renamed.keys()
    save_file(renamed, copy / "model.safetensors")
    assert same(load_pretrained(copy), load_pretrained(folder))


def test_shards_are_written_above_the_limit_and_read_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("support.files.SHARD_BYTES", 300_000)
    save_pretrained(load_pretrained(folder), tmp_path / "sharded")
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "sharded" / name).stat().st_size < 310_000 for name in files)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in load_pretrained(folder).parameters())
    assert same(load_pretrained(tmp_path / "sharded"), load_pretrained(folder))
    assert same(oracle(tmp_path / "sharded"), oracle(folder))


def test_a_save_replaces_all_weights_of_the_one_before(folder, tmp_path, monkeypatch):
    """Old shards beside a new single file would be read by whoever finds the old index first."""
    model = load_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.setattr("support.files.SHARD_BYTES", 300_000)
        save_pretrained(model, tmp_path / "out")
    save_pretrained(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert same(load_pretrained(tmp_path / "out"), model)


def test_transformers_reads_our_save_and_we_read_its(folder, tmp_path):
    reference = oracle(folder)
    reference.save_pretrained(tmp_path / "theirs")
    assert same(load_pretrained(tmp_path / "theirs"), load_pretrained(folder))
    save_pretrained(load_pretrained(folder), tmp_path / "ours")
    assert same(oracle(tmp_path / "ours"), reference)


def test_a_tied_head_is_neither_written_nor_missed(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_pretrained(folder)
    assert model.head_weight is model.model.embed_tokens.weight
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # as some writers do
    save_file(tensors, folder / "model.safetensors")
    assert same(load_pretrained(folder), model)
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight of its own, expected the embedding"):
        load_pretrained(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_cast_to_the_wanted_type(tmp_path, stored, wanted):
    folder = tiny_checkpoint(tmp_path, dtype=stored)
    tensors = load_file(folder / "model.safetensors")
    for name, p in load_pretrained(folder, dtype=wanted).named_parameters():
        assert tensors[name].dtype == stored and p.dtype == wanted
        assert torch.equal(p, tensors[name].to(wanted))


def test_what_was_loaded_does_not_hang_on_the_file(folder, copy):
    """Training overwrites the checkpoint that it started from; the weights must not change under it."""
    model = load_pretrained(copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert same(model, load_pretrained(folder))


def test_a_save_carries_the_tokenizer_the_processor_and_the_chat(folder, tmp_path):
    model = load_pretrained(folder, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "out")
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert Processor.from_pretrained(tmp_path / "out").encode(question("hi")).input_ids.numel() > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((folder / "config.json").read_text()), "torch_dtype": "bfloat16"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_merged_lora_is_saved_as_plain_weights_and_unmerged_is_refused(folder, tmp_path):
    model = add_lora(load_pretrained(folder), 2, 4)
    with pytest.raises(InputError, match="LoRA beside the weights"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    merge_lora(model)
    save_pretrained(model, tmp_path / "out")
    weight = {
        name: load_pretrained(path).model.layers[0].mlp.up_proj.weight
        for name, path in (("saved", tmp_path / "out"), ("before", folder))
    }
    assert torch.equal(weight["saved"], model.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight["saved"], weight["before"])


def test_a_failed_save_leaves_what_was_there(folder, copy, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = load_pretrained(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr(house, "write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the high-water mark is read from Linux's /proc")
def test_peak_memory_is_the_model_and_its_largest_tensor(tmp_path):
    """Measured in a fresh process on a checkpoint large beside torch itself; stored in bf16 and loaded in fp32."""
    folder = tiny_checkpoint(tmp_path, width=512, layers=12, vocab_size=30_000, dtype=torch.bfloat16)
    program = """
import re, sys, torch
from model import load_pretrained
def peak():  # getrusage would tell that of the parent process where it was higher
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
load_pretrained(sys.argv[2])
before = peak()
model = load_pretrained(sys.argv[1])
sizes = [p.nbytes for p in model.parameters()]
print(peak() - before, sum(sizes), max(sizes))
"""
    small = tiny_checkpoint(tmp_path / "small")
    run = [sys.executable, "-c", program, folder, small]
    found, total, largest = map(int, subprocess.check_output(run, cwd=ROOT, text=True).split())
    assert total > 150e6
    assert found <= total + largest + 10e6


def test_a_hub_id_is_found_in_the_cache_offline_and_named_when_it_is_not(folder, tmp_path):
    """huggingface-hub's own layout and its HF_HUB_OFFLINE, in a process of its own: both are read at import."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def describe(name):
        run = [sys.executable, "model.py", "--describe", name]
        return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert "parameters" in describe("someone/tiny").stdout
    absent = describe("someone/else")
    assert absent.returncode == 2 and absent.stderr.count("\n") == 1
    assert "someone/else: found no such folder and no such model on the hub" in absent.stderr


# -- bad files --------------------------------------------------------------------------------------------------------


def tensors(change):
    def damage(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return damage


def config(change):
    def damage(folder):
        raw = json.loads((folder / "config.json").read_text())
        change(raw)
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


def file(change, name="model.safetensors"):
    def damage(folder):
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(change(held))

    return damage


def index(value):
    def damage(folder):  # a single file would be read before it
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))

    return damage


def wrong_length(held):
    return struct.pack("<Q", 10**12) + held[8:]


NORM, HEAD = "model.norm.weight", "lm_head.weight"
BAD = {
    "no folder": (lambda folder: shutil.rmtree(folder), "copy: found no such folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: found no such file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: found no such file"),
    "missing tensor": (tensors(lambda held: held.pop(NORM)), f"1 tensors .*: missing {NORM}$"),
    "missing head": (tensors(lambda held: held.pop(HEAD)), f"missing {HEAD}"),
    "unexpected tensor": (tensors(lambda held: held.update(extra=torch.zeros(1))), "unexpected extra"),
    "mis-shaped tensor": (
        tensors(lambda held: held.update({NORM: torch.zeros(3)})),
        rf"{NORM} of shape \[3\], expected \[64\]",
    ),
    "several at once": (
        tensors(lambda held: (held.pop(NORM), held.pop(HEAD), held.update(extra=torch.zeros(1)))),
        f"3 tensors .*: missing {HEAD}; missing {NORM}; unexpected extra",
    ),
    "quantised tensor": (tensors(lambda held: held.update({NORM: torch.zeros(64, dtype=torch.int8)})), f"{NORM} in I8"),
    "cut short": (file(lambda held: held[:-1000]), "model.safetensors: found .* whole safetensors file"),
    "cut in the header": (file(lambda held: held[:100]), "model.safetensors: found .* whole safetensors file"),
    "empty file": (file(lambda held: b""), "model.safetensors: found .* whole safetensors file"),
    "wrong header length": (file(wrong_length), "model.safetensors: found .* whole safetensors file"),
    "damaged header": (file(lambda held: held[:20] + b"\0" * 30 + held[50:]), "model.safetensors: found .* whole"),
    "not safetensors": (file(lambda held: b"PK\x03\x04" + b"pickle" * 99), "model.safetensors: found .* whole"),
    "index without a map": (index({}), "index.json: found weight_map = None, expected an object"),
    "index a list": (index([]), "found list, expected"),
    "index with a missing file": (
        index({"weight_map": {NORM: "model-7.safetensors"}}),
        "model-7.safetensors: found no such file",
    ),
    "config not JSON": (file(lambda held: held[:-30], "config.json"), "config.json: found .* expected JSON"),
    "config a list": (file(lambda held: b"[]", "config.json"), "config.json: found list, expected a JSON object"),
    "config without a size": (
        config(lambda raw: raw.pop("hidden_size")),
        "mrope_section = .*, expected a sum of half the head dim, 1024",
    ),
    "config without vision": (config(lambda raw: raw.pop("vision_config")), "vision_config = None, expected an object"),
    "config without sections": (config(lambda raw: raw.pop("rope_scaling")), "mrope_section = None"),
    "config with text as a size": (config(lambda raw: raw.update(vocab_size="big")), "vocab_size = 'big'"),
    "config with a negative size": (config(lambda raw: raw["vision_config"].update(depth=-1)), "depth = -1"),
    "config with true as a size": (config(lambda raw: raw.update(num_hidden_layers=True)), "num_hidden_layers = True"),
    "config with odd heads": (
        config(lambda raw: raw.update(num_attention_heads=5)),
        "hidden_size = 64, expected a mult",
    ),
    "config with odd kv heads": (config(lambda raw: raw.update(num_key_value_heads=3)), "num_key_value_heads = 3"),
    "config with odd sections": (
        config(lambda raw: raw["rope_scaling"].update(mrope_section=[1, 1, 1])),
        r"mrope_section = \(1, 1, 1\), expected",
    ),
    "config with another width": (config(lambda raw: raw["vision_config"].update(out_hidden_size=9)), "out_hidden"),
    "config with a rope of text": (config(lambda raw: raw.update(rope_scaling="mrope")), "rope_scaling = 'mrope'"),
    "config with another rope": (config(lambda raw: raw["rope_scaling"].update(type="yarn")), "rope type = 'yarn'"),
    "config with a sliding window": (config(lambda raw: raw.update(use_sliding_window=True)), "use_sliding_window"),
    "config with another activation": (config(lambda raw: raw.update(hidden_act="gelu")), "hidden_act = 'gelu'"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_checkpoint_is_named_with_its_fault_in_one_line(copy, fault):
    damage, message = BAD[fault]
    damage(copy)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(copy)
    assert "copy" in str(error.value)


def test_a_command_ends_in_one_line_and_exit_code_2(copy):
    file(lambda held: held[:-1000])(copy)
    run = [sys.executable, "model.py", "--chat", str(copy)]
    said = subprocess.run(run, cwd=ROOT, input="", capture_output=True, text=True)
    assert said.returncode == 2 and said.stdout == "" and said.stderr.count("\n") == 1
    assert said.stderr.startswith(f"error: {copy}/model.safetensors: found")
