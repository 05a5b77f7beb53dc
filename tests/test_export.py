"""What --model, --chat and --export may name, and that what leaves the house is whole and loads elsewhere."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import batch, oracle, picture, question, tiny_checkpoint
from safetensors.torch import load_file
from small import arguments, quiet, small_data
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.chat_template_utils import render_jinja_template

import evaluate
import model as qwen
import train_sft
from data import InputError
from model import Processor, add_lora, load_pretrained, lora_parameters, save_adapter, save_pretrained
from support.chat import chat, export, terminal
from support.runs import locate, open_model

CHAT = question("which?", picture(56, 84), picture(200, 100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, an untied one in bf16, and runs on the first: full and LoRA, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("export")
    tiny_checkpoint(folder / "model")
    tiny_checkpoint(folder / "half", tied=False, dtype=torch.bfloat16)
    small_data(folder / "data")
    for name, full in (("full", True), ("lora", False)):
        words = arguments(folder / "model", folder / "data", folder / name, full=full, steps=2, save_every=1, lr="1e-2")
        assert quiet(train_sft.main, words)[0] == 0
    return folder


def weights(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" not in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step(run):
    return sorted((run / "checkpoints").iterdir())[-1]


@pytest.mark.parametrize("name", ["model", "half"])
def test_there_and_back_again_not_a_bit_changes(folder, tmp_path, name):
    """hub -> ours -> hub -> transformers -> ours, in float32 and in bfloat16."""
    dtype = torch.bfloat16 if name == "half" else torch.float32
    export(qwen, folder / name, tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / name / "model.safetensors"))
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert theirs.dtype == dtype and same(dict(theirs.state_dict()), dict(oracle(folder / name, dtype).state_dict()))
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path / "theirs")
    assert same(
        weights(load_pretrained(tmp_path / "theirs", dtype=dtype)), weights(load_pretrained(folder / name, dtype=dtype))
    )


def test_an_export_has_every_file_and_they_say_the_same(folder, tmp_path):
    """A source with the bare minimum: config, weights, tokenizer.json and the limits of its pictures."""
    source = tmp_path / "bare"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        shutil.copy(folder / "model" / name, source)
    (source / "notes.txt").write_text("not to be copied")
    (source / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 9 * 784}))
    export(qwen, source, tmp_path / "out")
    files = "config generation_config preprocessor_config processor_config tokenizer tokenizer_config chat_template"
    expected = {*(f"{name}.json" for name in files.split()), "chat_template.jinja", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    ours, tokenizer = Processor.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template == json.loads((tmp_path / "out" / "chat_template.json").read_text())["chat_template"]
    text = render_jinja_template(conversations=[CHAT], chat_template=template, add_generation_prompt=True)[0][0]
    assert text == ours.chat(CHAT, True) == Processor.from_pretrained(tmp_path / "out").chat(CHAT, True)
    assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text).ids
    pictures = [part["image"] for part in CHAT[0]["content"] if part["type"] == "image"]
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "out")(pictures, return_tensors="pt")
    pixel_values, grids = ours.images(pictures)
    assert torch.equal(grids, theirs["image_grid_thw"]) and (pixel_values - theirs["pixel_values"]).abs().max() <= 1e-6
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == ours.stop_ids and generation.pad_token_id == ours.pad_id


@pytest.mark.parametrize("what", ["full", "full/model", "full step", "lora", "lora step"])
@torch.no_grad()
def test_a_run_its_model_and_its_checkpoints_are_all_opened_and_exported(folder, tmp_path, what):
    """A run's last checkpoint holds the weights that it ends with."""
    run = folder / what.split()[0]
    path = step(run) if "step" in what else run
    model, source = open_model(qwen, path)
    inputs = batch(Processor.from_pretrained(source), [CHAT])
    expected = (
        load_pretrained(folder / "full" / "model") if what.startswith("full") else load_pretrained(folder / "model")
    )
    if what.startswith("lora"):
        qwen.merge_lora(qwen.load_adapter(expected, folder / "lora" / "adapter"))
    assert not same(weights(model), weights(load_pretrained(folder / "model")))
    assert same(weights(model), weights(expected))
    export(qwen, path, tmp_path / "out")
    theirs = oracle(tmp_path / "out")
    assert same({qwen.hub_name(n): t for n, t in theirs.state_dict().items() if "lm_head" not in n}, weights(expected))
    answers = [evaluate.load(where)[0](**inputs) for where in (path, tmp_path / "out")]
    assert torch.equal(*answers)


def test_a_step_of_a_run_that_went_on_from_an_adapter_has_it(folder, tmp_path):
    words = arguments(folder / "model", folder / "data", tmp_path / "run", steps=1, save_every=1)
    assert quiet(train_sft.main, [*words, "--init", str(folder / "lora")])[0] == 0
    assert same(weights(open_model(qwen, step(tmp_path / "run"))[0]), weights(open_model(qwen, tmp_path / "run")[0]))


@pytest.mark.parametrize("flags", [{"full": True}, {"full": True, "fsdp": "on"}, {}], ids=["full", "fsdp", "lora"])
@pytest.mark.parametrize("before", ["full", "lora"])
def test_a_checkpoint_starts_a_run_as_a_run_that_ended_there_does(folder, tmp_path, before, flags):
    """And what started from it needs it no longer: its run may prune it, and `best` moves."""
    shutil.copytree(folder / before, tmp_path / "before")
    shutil.copytree(step(folder / before), tmp_path / "before" / "checkpoints" / "best")
    first = arguments(folder / "model", folder / "data", tmp_path / "ended", full=before == "full", steps=2, lr="1e-2")
    quiet(train_sft.main, first)
    words = lambda out, **more: arguments(
        folder / "model", folder / "data", tmp_path / out, init=tmp_path / more.pop("init"), steps=2, **flags, **more
    )
    if before == "full" and not flags:
        with pytest.raises(InputError, match="found whole weights, expected for an adapter a base that stays where it"):
            quiet(train_sft.main, words("run", init="before/checkpoints/best"))
        assert not (tmp_path / "run").exists()
        return
    expected = quiet(train_sft.main, words("expected", init="ended"))[0]
    assert quiet(train_sft.main, words("run", init="before/checkpoints/best", save_every=1))[0] == expected == 0
    shutil.rmtree(tmp_path / "before" / "checkpoints")
    assert same(weights(open_model(qwen, tmp_path / "run")[0]), weights(open_model(qwen, tmp_path / "expected")[0]))
    (tmp_path / "run").rename(tmp_path / "moved")
    for path in (step(tmp_path / "moved"), tmp_path / "moved"):  # an adapter's product is added in another order
        ours, theirs = (weights(open_model(qwen, each)[0]) for each in (path, tmp_path / "expected"))
        assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in theirs)


def test_a_run_that_began_at_a_checkpoint_is_resumed_without_it(folder, tmp_path):
    shutil.copytree(folder / "full", tmp_path / "before")
    first = sorted((tmp_path / "before" / "checkpoints").iterdir())[0]
    words = lambda out, **more: arguments(
        folder / "model", folder / "data", tmp_path / out, init=first, full=True, steps=2, save_every=1, **more
    )
    for out in ("whole", "run"):
        assert quiet(train_sft.main, words(out))[0] == 0
    for path in (tmp_path / "run" / "model", step(tmp_path / "run"), first):
        shutil.rmtree(path)
    assert quiet(train_sft.main, words("run", resume=True))[0] == 0
    assert same(weights(open_model(qwen, tmp_path / "run")[0]), weights(open_model(qwen, tmp_path / "whole")[0]))


def test_bad_input_leaves_no_copy_of_a_checkpoint(folder, tmp_path):
    """Nor does it take that of the run which --overwrite would have deleted."""
    start = step(folder / "full")
    words = lambda *more, **flags: [
        *arguments(folder / "model", folder / "data", tmp_path / "run", init=start, full=True, steps=1, **flags),
        *more,
    ]
    with pytest.raises(InputError, match="--max-response"):
        quiet(train_sft.main, words("--max-response", "1"))
    assert not (tmp_path / "run").exists()
    quiet(train_sft.main, words(save_every=1))
    before = {path: path.stat().st_ino for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(InputError, match="--max-response"):
        quiet(train_sft.main, words("--max-response", "1", overwrite=True))
    assert before == {path: path.stat().st_ino for path in (tmp_path / "run").rglob("*")}
    quiet(train_sft.main, words(overwrite=True))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "metrics.jsonl", "model"]


def test_a_merge_in_bf16_says_what_rounding_costs(folder, tmp_path, capsys):
    model = add_lora(load_pretrained(folder / "half"), 4, 8)
    for p in lora_parameters(model):
        torch.nn.init.normal_(p, std=0.05)
    save_adapter(model, tmp_path / "adapter")
    export(qwen, folder / "half", tmp_path / "out", str(tmp_path / "adapter"))
    said = capsys.readouterr().out
    share = float(said.split("layers; ")[1].split("%")[0])
    assert "LoRA merged into 21 layers" in said and 0 < share < 20
    exact = qwen.load_adapter(load_pretrained(folder / "half"), tmp_path / "adapter")
    update = exact.model.layers[0].mlp.up_proj.with_adapter() - exact.model.layers[0].mlp.up_proj.weight
    lost = (
        exact.model.layers[0].mlp.up_proj.with_adapter()
        - load_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    )
    assert abs(100 * lost.norm() / update.norm() - share) < share / 2  # one layer of them


def test_an_export_is_whole_or_not_there_and_takes_no_one_s_place(folder, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "thesis.txt", folder / "model"):
        with pytest.raises(InputError, match="found something there, expected a new folder"):
            export(qwen, folder / "model", out)
    monkeypatch.setattr("support.chat.complete", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(qwen, folder / "model", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_chat_opens_a_run_and_goes_on_after_control_tokens(folder, monkeypatch, capsys):
    lines = ["hello", "<|im_end|>\n", "see <|image_pad|>", "bye"]
    monkeypatch.setattr(sys, "stdin", lines)
    options = {"adapter": "", "image": "", "min_pixels": 0, "max_pixels": 0, "max_tokens": 2}
    chat(qwen, type("Args", (), {"chat": str(folder / "lora"), **options}))
    assert capsys.readouterr().out.count("\n") >= 4
    assert terminal("a\x1b[31mred\x07\nb\u009bc") == "a\\x1b[31mred\\x07\nb\\x9bc"


# -- where things are -------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_folder_from_anywhere(folder, tmp_path, monkeypatch):
    assert locate(folder / "full") == (str(folder / "full" / "model"), None)
    assert locate(folder / "lora") == (str(folder / "model"), str(folder / "lora" / "adapter"))
    assert locate(folder / "model") == (str(folder / "model"), None)
    assert locate("Qwen/Qwen2.5-VL-7B-Instruct") == ("Qwen/Qwen2.5-VL-7B-Instruct", None)
    monkeypatch.chdir(folder)
    words = arguments("model", "data", tmp_path / "run", steps=1, full=False)  # the base as it is typed
    assert quiet(train_sft.main, words)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert Path(locate("run")[0]) == folder / "model"


def recorded(folder, base):
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"stage": "sft", "base": base}))
    return folder


def test_no_name_but_model_s_is_asked_for_at_the_hub(folder, tmp_path, monkeypatch):
    """A typing error in --init or --adapter, and a base that a downloaded run records, may be anybody's name there."""
    import huggingface_hub

    def hub(name, local_files_only=False, **options):
        assert local_files_only, f"asked for {name}"
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    words = arguments(folder / "model", folder / "data", tmp_path / "run", steps=1)
    for flag in ("--init", "--adapter"):
        with pytest.raises(InputError, match="runs/typo: found no such folder"):
            train_sft.main([*words, flag, "runs/typo"])
    for base in ("someone/model", "../nowhere", None):
        with pytest.raises(InputError, match="found the base .* in its config.json, which is not here"):
            locate(recorded(tmp_path / "theirs", base))


def test_a_step_is_no_base_and_a_damaged_one_is_named(folder, tmp_path):
    """--init copies one; --model beside --init, which only a frozen sampler reads, has no folder to copy it to."""
    with pytest.raises(InputError, match="found a checkpoint of a run, .*python model.py --export"):
        locate(step(folder / "full"))
    run = Path(shutil.copytree(folder / "full", tmp_path / "run"))
    (shard,) = step(run).glob("*.safetensors")
    held = shard.read_bytes()
    shard.write_bytes(held[:-4] + bytes(4))
    with pytest.raises(InputError, match="found shard-00000-of-00001.safetensors with another checksum"):
        open_model(qwen, step(run))


def test_saving_over_the_source_keeps_it_whole(folder, tmp_path):
    copy = Path(shutil.copytree(folder / "model", tmp_path / "copy"))
    save_pretrained(load_pretrained(copy), copy)
    assert {path.name for path in copy.iterdir()} == {path.name for path in (folder / "model").iterdir()}
