"""What the files of a checkpoint say, whoever saved it: read as transformers reads it, or refused by name."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import transformers
from helpers import SPECIAL, batch, oracle, oracle_inputs, picture, question, tiny_checkpoint, tiny_config
from safetensors.torch import load_file, save_file
from savers import SAVERS
from test_model import SIZES_OF_OFFICIAL_MODELS, official_config
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import model as house
from data import InputError
from model import Config, Processor, load_pretrained, save_pretrained, stored_tensors
from support.files import find_folder


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("layouts"), tied=request.param == "tied")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("one"), tied=False)


@pytest.fixture
def copy(one, tmp_path):
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(one, tmp_path / "copy"))


def edit(path, change):
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value))


def same_sizes(a, b):
    return {**vars(a), "raw": None} == {**vars(b), "raw": None}


# -- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saver", SAVERS)
@torch.no_grad()
def test_logits_of_every_saver_s_layout_are_those_of_transformers(folder, tmp_path, saver):
    raw = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(json.dumps(SAVERS[saver](raw)))
    inputs = batch(Processor.from_pretrained(tmp_path / "copy"), [question("what?", picture(140, 196))])
    model = load_pretrained(tmp_path / "copy")
    theirs = oracle(tmp_path / "copy")(**oracle_inputs(inputs)).logits
    assert (model.logits(model(**inputs)) - theirs).abs().max() <= 3e-5
    assert same_sizes(model.config, Config.from_json(raw))


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("size", SIZES_OF_OFFICIAL_MODELS)
def test_official_sizes_are_read_from_every_layout_and_saved_in_the_hub_s(size, saver):
    raw = official_config(size)
    config = Config.from_json(SAVERS[saver](raw))
    assert same_sizes(config, Config.from_json(raw))
    saved = house.config_to_save(config, "bfloat16")
    assert same_sizes(Config.from_json(saved), config) and "text_config" not in saved
    assert saved["rope_scaling"]["mrope_section"] == [16, 24, 24] and saved["torch_dtype"] == "bfloat16"
    assert "dtype" not in saved and "dtype" not in saved["vision_config"]


def test_what_a_saver_left_out_is_the_class_s_default():
    """4.49 saved a 7B's tower as its width alone; depth, heads and the rest are transformers' defaults."""
    vision = SAVERS["4.49"](official_config("7B"))["vision_config"]
    assert "depth" not in vision and "num_heads" not in vision and "out_hidden_size" not in vision
    found = Config.from_json({**official_config("7B"), "vision_config": vision}).vision
    assert (found.depth, found.num_heads, found.intermediate_size, found.out_hidden_size) == (32, 16, 3420, 3584)
    assert found.fullatt_block_indexes == (7, 15, 23, 31)


def inside(**changes):
    """A hybrid whose text_config says something else than the top level; None: leaves it out there."""
    raw = SAVERS["4.52"](tiny_config(tied=False))
    raw["text_config"] = {key: value for key, value in {**raw["text_config"], **changes}.items() if value != "absent"}
    return raw


def test_nulls_hide_nothing_and_the_rope_of_rope_scaling_wins():
    plain = Config.from_json(tiny_config(tied=False))
    nulls = dict.fromkeys(("hidden_size", "rms_norm_eps", "rope_scaling", "rope_theta", "image_token_id"))
    assert same_sizes(Config.from_json(inside(**nulls)), plain)
    both = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 3, 4], "rope_theta": 5.0}}
    assert same_sizes(Config.from_json({**tiny_config(tied=False), **both}), plain)  # as transformers has it
    theta = {"rope_scaling": {**tiny_config()["rope_scaling"], "rope_theta": 5e5}}
    assert Config.from_json({**tiny_config(), **theta}).rope_theta == 5e5


def flat(**changes):
    return {**tiny_config(tied=False), **changes}


def tower(**changes):
    return flat(vision_config={**tiny_config()["vision_config"], **changes})


def sections(*values):
    return flat(rope_scaling={"type": "mrope", "mrope_section": list(values)})


REFUSED = {  # what config.json says: what the line says
    "Qwen2-VL": (flat(model_type="qwen2_vl"), r"model_type = 'qwen2_vl' \(Qwen2-VL\), expected 'qwen2_5_vl'"),
    "Qwen3-VL": (flat(model_type="qwen3_vl"), r"'qwen3_vl' \(Qwen3-VL\)"),
    "Qwen2.5, text": (flat(model_type="qwen2"), r"'qwen2' \(Qwen2 or Qwen2.5 for text alone\)"),
    "another": (flat(model_type="llava"), r"'llava' \(another architecture\)"),
    "no text as a type": (flat(model_type=7), r"model_type = 7 \(no name\)"),
    "AWQ": (flat(quantization_config={"quant_method": "awq", "bits": 4}), "quantised weights .*: awq"),
    "GPTQ": (flat(quantization_config={"quant_method": "gptq"}), "quantised weights .*: gptq"),
    "FP8": (flat(quantization_config={"quant_method": "fp8"}), "quantised weights .*: fp8"),
    "bitsandbytes": (inside(quantization_config={"quant_method": "bitsandbytes"}), "quantised weights .*: bitsandb"),
    "sizes that disagree": (inside(hidden_size=128), "hidden_size = 128 in text_config and 64 beside it"),
    "eps that disagree": (inside(rms_norm_eps=1e-5), "rms_norm_eps = 1e-05 in text_config and 1e-06 beside it"),
    "ropes that disagree": (inside(rope_theta=1e4), "rope_theta = 10000.0 in text_config and 1000000.0 beside"),
    "images that disagree": (inside(image_token_id=7), "image_token_id = 7 in text_config and 280 beside it"),
    "eps that transformers would not see": (inside(rms_norm_eps="absent"), "rms_norm_eps = 1e-06 beside a text_config"),
    "infinite eps": (flat(rms_norm_eps=float("inf")), "rms_norm_eps = inf, expected a positive number"),
    "no number as eps": (flat(rms_norm_eps=float("nan")), "rms_norm_eps = nan"),
    "infinite theta": (flat(rope_theta=float("inf")), "rope_theta = inf"),
    "text for a flag": (flat(tie_word_embeddings="false"), "tie_word_embeddings = 'false', expected true or false"),
    "full attention nowhere": (tower(fullatt_block_indexes=[-1, 99]), r"fullatt_block_indexes = \(-1, 99\), expected"),
    "sections below 0": (sections(-1, 5, 4), "mrope_section = .*, expected positive sections"),
    "two sections": (sections(4, 4), "mrope_section = .*, expected three"),
    "interleaved sections": (flat(rope_scaling={"mrope_section": [2, 3, 3], "mrope_interleaved": True}), "interleaved"),
    "ten million layers": (flat(num_hidden_layers=10**7), "num_hidden_layers = 10000000, expected 1000 at most"),
    "ten million blocks": (tower(depth=10**7), "depth = 10000000, expected 1000 at most"),
    "a vocabulary of 10**30": (flat(vocab_size=10**30), "vocab_size = 1000000"),
    "a width of 10**9": (flat(hidden_size=10**9), "hidden_size = 1000000000, expected"),
    "an image token beyond the vocabulary": (flat(image_token_id=288), "image_token_id = 288, expected less than 288"),
    "a head dim of its own": (flat(head_dim=128), "head_dim = 128, expected hidden_size"),
    "a tower with another rope": (tower(rope_parameters={"rope_theta": 5.0}), "rope_theta = 5.0, expected 10000.0"),
    "another tower": (tower(model_type="siglip"), "vision_config.model_type = 'siglip'"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_config_that_means_something_else_is_refused_by_name(fault):
    raw, message = REFUSED[fault]
    with pytest.raises(InputError, match=message) as error:
        Config.from_json(raw)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# -- which files are read ---------------------------------------------------------------------------------------------


def renamed(folder, change, name="model.safetensors"):
    """A second file of weights, every tensor changed."""
    save_file({key: change(t) for key, t in load_file(folder / "model.safetensors").items()}, folder / name)


@torch.no_grad()
def test_a_single_file_wins_over_an_index_and_stray_shards_are_not_read(copy, monkeypatch):
    """As in transformers; and the ranks of FSDP read the files that one process reads (support/sharding.py)."""
    expected = load_pretrained(copy).state_dict()
    renamed(copy, lambda t: t + 1, "zz.safetensors")
    names = dict.fromkeys(expected, "zz.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model = load_pretrained(copy)
    theirs = {house.hub_name(name): t for name, t in oracle(copy).state_dict().items()}
    assert all(
        torch.equal(t, expected[name]) and torch.equal(t, theirs[name]) for name, t in model.state_dict().items()
    )
    assert {file.path.name for file, _ in stored_tensors(model).values()} == {"model.safetensors"}
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors: found no such file but model-0.*another name") as error:
        (copy / "model.safetensors.index.json").unlink()
        load_pretrained(copy)
    assert str(copy) in str(error.value)


def only(name, text=b"x"):
    """Another file in the place of the weights."""

    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(text)

    return damage


def index(*names):
    def damage(folder):
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        names_of = {f"tensor {i}": name for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names_of}))

    return damage


def twice(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "model.language_model.norm.weight": tensors["model.norm.weight"].clone()},
        folder / "model.safetensors",
    )


def linked(name):
    def damage(folder):
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


def fifo(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def device(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


DAMAGED = {  # what is done to the folder: what the line says
    "pickles": (only("pytorch_model.bin"), "no such file but pytorch_model.bin .*pickles"),
    "GGUF": (only("model-q4.gguf"), "no such file but model-q4.gguf .*llama.cpp"),
    "an adapter": (only("adapter_model.safetensors"), "adapter_model.safetensors .*--adapter"),
    "a path in the index": (
        index("../outside.safetensors"),
        r"found a file named '../outside.safetensors', expected a",
    ),
    "an absolute path in the index": (index("/etc/outside.safetensors"), "found a file named '/etc/outside"),
    "no name in the index": (index(7), "weight_map = 7, expected file names"),
    "nothing in the index": (index(), "weight_map = {}, expected a file"),
    "a tensor stored twice": (twice, "found model.*norm.weight a second time, after model.safetensors's"),
    "weights outside": (linked("model.safetensors"), "model.safetensors: found a link to .*, expected a file inside"),
    "a config outside": (linked("config.json"), "config.json: found a link to"),
    "a config that never answers": (fifo("config.json"), "config.json: found something else than a regular file"),
    "weights that never end": (device, "model.safetensors: found something else than a regular file"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_folder_is_read_by_plain_names_and_nowhere_else(copy, fault):
    damage, message = DAMAGED[fault]
    damage(copy)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(copy)
    assert "\n" not in str(error.value)


def test_a_hub_cache_links_into_its_own_blobs(one, tmp_path):
    home = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    home.mkdir(parents=True)
    blobs.mkdir()
    for path in one.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (home / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    assert Processor.from_pretrained(home) and load_pretrained(home)
    (tmp_path / "secret").write_text("{}")
    (home / "chat_template.json").unlink()
    (home / "chat_template.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="chat_template.json: found a link to"):
        Processor.from_pretrained(home)


def test_a_save_copies_a_fixed_list_of_files_and_keeps_to_the_umask(one, copy, tmp_path):
    (copy / "notes.txt").symlink_to("/etc/hostname")
    (copy / "zero.txt").write_text("not ours")
    before = os.umask(0o027)
    try:
        save_pretrained(load_pretrained(copy), tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in one.iterdir()}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


def test_the_hub_is_asked_for_an_id_alone(tmp_path, monkeypatch):
    """Not for a path that is mistyped, and not where the first part of the id is a folder here."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name, hub in (("runs/typo", "download"), ("someone/model", ""), ("../x", "download"), ("a/b/c", "download")):
        with pytest.raises(InputError, match="found no such folder"):
            find_folder(name, hub)
    assert find_folder("someone/model") == tmp_path and asked == ["someone/model"]


def test_a_stale_type_is_not_written_beside_the_true_one(copy, tmp_path):
    edit(copy / "config.json", lambda raw: raw.update(SAVERS["5.24"](raw)))
    save_pretrained(load_pretrained(copy), tmp_path / "out", torch.bfloat16)
    from transformers import AutoModelForImageTextToText

    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


# -- the picture processor --------------------------------------------------------------------------------------------

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
LIMITS = {  # the limits in preprocessor_config.json, and what processor_config.json holds
    "both": ({"min_pixels": 4 * 784, "max_pixels": 64 * 784}, None),
    "nulls beside a size": (
        {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 3136, "longest_edge": 9 * 784}},
        None,
    ),
    "limits before a size": (
        {"min_pixels": 3136, "max_pixels": 9 * 784, "size": {"shortest_edge": 3136, "longest_edge": 64 * 784}},
        None,
    ),
    "one limit": ({"max_pixels": 9 * 784}, None),
    "none": ({}, None),
    "all null": ({"min_pixels": None, "max_pixels": None, "size": None}, None),
    "the newer file wins": ({"max_pixels": 64 * 784}, {"image_processor": {"max_pixels": 9 * 784}}),
    "a newer file without them": ({"max_pixels": 9 * 784}, {"processor_class": "Qwen2_5_VLProcessor"}),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits_of_a_picture_are_those_of_transformers(copy, case):
    limits, newer = LIMITS[case]
    if case in ("none", "all null") and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("transformers 5.17 takes those of the processor before")
    plain = json.loads((copy / PREPROCESSOR).read_text())
    plain = {key: value for key, value in plain.items() if not key.endswith("pixels")}
    (copy / PREPROCESSOR).write_text(json.dumps({**plain, **limits}))
    if newer:
        (copy / PROCESSOR).write_text(
            json.dumps(
                {**newer, "image_processor": {**plain, **newer["image_processor"]}}
                if "image_processor" in newer
                else newer
            )
        )
    reference = Qwen2VLImageProcessorPil.from_pretrained(copy)
    pictures = [picture(w, h) for w, h in ((20, 20), (448, 616), (1200, 900), (10, 2000))]
    pixel_values, grids = Processor.from_pretrained(copy).images(pictures)
    expected = reference(pictures, return_tensors="pt")
    assert torch.equal(grids, expected["image_grid_thw"])
    assert (pixel_values - expected["pixel_values"]).abs().max() <= 1e-6


def test_limits_of_the_command_win(one):
    processor = Processor.from_pretrained(one, min_pixels=4 * 784, max_pixels=16 * 784)
    assert processor.images([picture(600, 600)])[1].prod() <= 16 * 4
    with pytest.raises(InputError, match="max_pixels = 784, expected min_pixels = 3136 at least"):
        Processor.from_pretrained(one, max_pixels=784)


BAD_PICTURES = {
    "another patch": ({"patch_size": 16}, "patch_size = 16, expected 14 as in config.json"),
    "another merge": ({"merge_size": 1}, "merge_size = 1, expected 2 as in config.json"),
    "another time": ({"temporal_patch_size": 1}, "temporal_patch_size = 1, expected 2"),
    "no deviation": ({"image_std": [0, 0, 0]}, r"image_std = \[0, 0, 0\], expected"),
    "an infinite mean": ({"image_mean": [float("inf"), 0, 0]}, "image_mean = "),
    "a size of one number": ({"size": 336}, "size = 336, expected an object"),
    "six gigabytes": ({"min_pixels": 4 * 10**8, "max_pixels": 10**9}, "min_pixels = 400000000, expected 12,845,056"),
    "limits the wrong way round": ({"min_pixels": 10**6, "max_pixels": 10**5}, "max_pixels = 100000, expected min_pix"),
    "no resize": ({"do_resize": False}, "do_resize = False, expected true"),
    "another filter": ({"resample": 2}, "resample = 2, expected 3, bicubic"),
    "another scale": ({"rescale_factor": 1.0}, "rescale_factor = 1.0"),
    "another processor": ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type = 'Siglip"),
}


@pytest.mark.parametrize("fault", BAD_PICTURES)
def test_a_picture_processor_that_means_something_else_is_refused(copy, fault):
    changes, message = BAD_PICTURES[fault]
    edit(copy / PREPROCESSOR, lambda options: options.update(changes))
    with pytest.raises(InputError, match=message) as error:
        Processor.from_pretrained(copy)
    assert PREPROCESSOR in str(error.value)


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def test_truncation_and_padding_that_a_program_left_are_off(one, copy):
    tokenizer = Processor.from_pretrained(one).tokenizer
    tokenizer.enable_truncation(24)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(copy / "tokenizer.json"))
    chat = question("a question that has many more than four and twenty tokens, as most of them do")
    expected = Processor.from_pretrained(one).encode(chat).input_ids
    assert len(expected) > 24 and torch.equal(Processor.from_pretrained(copy).encode(chat).input_ids, expected)


TEXTS = [
    "what is this?",
    "  two  spaces\n\n\nlines\t",
    "caf\u00e9 cafe\u0301 \u732b 123 it's",
    "<|im_end|>x<|image_pad|>",
]


def test_a_slow_tokenizer_s_files_make_the_same_tokens(one, copy):
    held = json.loads((one / "tokenizer.json").read_text())
    vocabulary = held["model"]["vocab"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(vocabulary))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in held["model"]["merges"]]
    (copy / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    tokens = {str(token.pop("id")): token for token in held["added_tokens"]}
    edit(copy / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=tokens))
    ours, plain = Processor.from_pretrained(copy).tokenizer, Processor.from_pretrained(one).tokenizer
    theirs = AutoTokenizer.from_pretrained(copy)
    for text in TEXTS:
        assert ours.encode(text).ids == plain.encode(text).ids == theirs(text)["input_ids"], text
    assert [ours.token_to_id(token) for token in SPECIAL] == [plain.token_to_id(token) for token in SPECIAL]


def test_rows_that_pad_the_vocabulary_are_banned(one):
    processor = Processor.from_pretrained(one)
    names = {processor.tokenizer.id_to_token(id) for id in processor.banned_ids}
    assert names == {None, *(token for token in house.SPECIAL[3:])}
    assert set(range(282, 288)) <= set(processor.banned_ids) and len(processor.banned_ids) == 5 + 6


def test_more_tokens_than_the_embedding_has_rows_are_refused(copy):
    tokenizer = Processor.from_pretrained(copy).tokenizer
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(7)])
    tokenizer.save(str(copy / "tokenizer.json"))
    with pytest.raises(InputError, match="the tokenizer's last id = 288, expected less than vocab_size = 288"):
        Processor.from_pretrained(copy)
