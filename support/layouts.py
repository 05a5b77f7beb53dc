"""What the files of a checkpoint say, whichever program saved them.

    1. config.json              flat, with `text_config`, or with `text_config.rope_parameters`; see `read_config`
    2. the picture processor    preprocessor_config.json, or inside processor_config.json
    3. the tokenizer            tokenizer.json, or vocab.json and merges.txt
    4. adapter_config.json      PEFT's options, a closed set

What a saver left out takes the default of transformers' class, as savers leave out what equals it; null counts as left
out. What is read otherwise than transformers reads it would be wrong silently, so that is refused by name.
"""

import json
import math
import re

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from data import InputError
from support.files import expect, find_file, read, read_json, read_text, shown

# -- 1. config.json ---------------------------------------------------------------------------------------------------

TEXT = {  # key -> (kind, default of transformers' class)
    "vocab_size": (int, 152064),
    "hidden_size": (int, 8192),
    "intermediate_size": (int, 29568),
    "num_hidden_layers": (int, 80),
    "num_attention_heads": (int, 64),
    "num_key_value_heads": (int, 8),
    "rms_norm_eps": (float, 1e-5),
    "rope_theta": (float, 1e6),
    "mrope_section": (tuple, None),
}
VISION = {
    "depth": (int, 32),
    "hidden_size": (int, 3584),
    "intermediate_size": (int, 3420),
    "num_heads": (int, 16),
    "out_hidden_size": (int, 3584),
    "fullatt_block_indexes": (tuple, [7, 15, 23, 31]),
    "window_size": (int, 112),
    "patch_size": (int, 14),
    "temporal_patch_size": (int, 2),
    "spatial_merge_size": (int, 2),
    "in_channels": (int, 3),
}
OTHERS = {  # model_type -> what people call it
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL, a mixture of experts",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen2": "Qwen2 or Qwen2.5 for text alone",
    "qwen2_moe": "Qwen2, a mixture of experts for text alone",
    "qwen3": "Qwen3 for text alone",
    "qwen3_moe": "Qwen3, a mixture of experts for text alone",
}
MOST_LAYERS, LARGEST = 1000, 10**7  # of blocks, of any size: a config of 10**7 blocks takes hours to build


def read_config(raw, where):
    """The sizes in a parsed config.json -> (text, vision), dicts of values that fit together.

    text has the keys of TEXT, `tie_word_embeddings` and `image_token_id`; vision those of VISION. Raises InputError
    that names `where`, the key at fault and its value.
    """
    kind = raw.get("model_type")
    if kind not in (None, "qwen2_5_vl"):
        called = OTHERS.get(kind, "another architecture") if isinstance(kind, str) else "no name"
        found = f"model_type = {shown(repr(kind))} ({called})"
        raise InputError(f"{where}: found {found}, expected 'qwen2_5_vl' (Qwen2.5-VL)")
    nested = read(raw, "text_config", dict, where, default={})
    tower = read(raw, "vision_config", dict, where)
    for section, name, own in (
        (nested, "text_config", "qwen2_5_vl_text"),
        (tower, "vision_config", "qwen2_5_vl_vision"),
    ):
        kind = section.get("model_type")
        expect(where, f"{name}.model_type", kind, kind in (None, "qwen2_5_vl", own), repr(own))
    for section in (raw, nested, tower):
        act, quantised = section.get("hidden_act"), section.get("quantization_config")
        expect(where, "hidden_act", act, act in (None, "silu"), "'silu'")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            found = f"quantised weights (quantization_config: {shown(str(method))})"
            raise InputError(f"{where}: found {found}, expected plain float32, float16 or bfloat16 weights")

    text = _text(raw, nested, where)
    tower = {"in_channels": tower.get("in_chans"), **{key: value for key, value in tower.items() if value is not None}}
    vision = {key: read(tower, key, kind, where, default) for key, (kind, default) in VISION.items()}
    theta = read(tower, "rope_parameters", dict, where, default={}).get("rope_theta", 10000.0)
    expect(where, "vision_config.rope_parameters.rope_theta", theta, theta == 10000.0, "10000.0")
    _check_sizes(text, vision, where)
    return text, vision


def _text(raw, nested, where):
    """The text model's values: text_config's where there is one, else the top level's."""
    top, inner = (_with_rope(section, where) for section in (raw, nested))
    text = {}
    for key, (kind, default) in {**TEXT, "image_token_id": (int, 151655)}.items():
        outer, own = top.get(key), inner.get(key)
        if None not in (outer, own) and outer != own:
            found = f"{key} = {shown(repr(own))} in text_config and {shown(repr(outer))} beside it"
            raise InputError(f"{where}: found {found}, expected one value")
        # transformers reads text_config alone where there is one; what is absent from it has the class's value there
        if nested and key in TEXT and key not in inner and outer not in (None, default):
            found = f"{key} = {shown(repr(outer))} beside a text_config without it, which means {default}"
            raise InputError(f"{where}: found {found}, expected one value")
        if key == "num_key_value_heads" and None in (inner.get(key, 0), top.get(key, 0)):  # null: as many as heads
            default = text["num_attention_heads"]
        text[key] = read({key: outer if own is None else own}, key, kind, where, default)
    for key in ("tie_word_embeddings", "use_sliding_window"):  # on where either place says so, as in transformers
        text[key] = any([read(section, key, bool, where, default=False) for section in (raw, nested)])
    expect(where, "use_sliding_window", True, not text.pop("use_sliding_window"), "false")
    size = nested.get("head_dim") or raw.get("head_dim")
    own = text["hidden_size"] // text["num_attention_heads"]
    expect(where, "head_dim", size, size in (None, own), f"hidden_size / num_attention_heads = {own}")
    return text


def _with_rope(section, where):
    """A section with what its rope says, which stands before the section's own: rope_scaling, else rope_parameters."""
    key = "rope_scaling" if section.get("rope_scaling") or "rope_parameters" not in section else "rope_parameters"
    rope = read(section, key, dict, where, default={})
    kind = rope.get("rope_type", rope.get("type", "mrope"))
    expect(where, "rope type", kind, kind in ("mrope", "default"), "'mrope'")
    for name, plain in (("mrope_interleaved", False), ("partial_rotary_factor", 1.0)):
        expect(where, name, rope.get(name), rope.get(name) in (None, plain), repr(plain))
    told = {name: rope[name] for name in ("mrope_section", "rope_theta") if rope.get(name) is not None}
    return {**section, **({"mrope_section": None} if key in section else {}), **told}


def _check_sizes(text, vision, where):
    heads, towers = text["num_attention_heads"], vision["num_heads"]
    side = vision["patch_size"] * vision["spatial_merge_size"]  # of a merged token, pixels
    half = text["hidden_size"] // heads // 2
    full, depth = vision["fullatt_block_indexes"], vision["depth"]
    for section, key in [(section, key) for section in (text, vision) for key in section]:
        expect(
            where,
            key,
            section[key],
            not isinstance(section[key], int) or section[key] <= LARGEST,
            f"{LARGEST:,} at most",
        )
    usual = full == tuple(VISION["fullatt_block_indexes"][1])  # of a shallower tower, those that it has
    for section, key, fits, expected in (
        (text, "num_hidden_layers", text["num_hidden_layers"] <= MOST_LAYERS, f"{MOST_LAYERS} at most"),
        (vision, "depth", depth <= MOST_LAYERS, f"{MOST_LAYERS} at most"),
        (text, "hidden_size", text["hidden_size"] % (2 * heads) == 0, f"a multiple of twice the {heads} heads"),
        (text, "num_key_value_heads", heads % text["num_key_value_heads"] == 0, f"a divisor of the {heads} heads"),
        (text, "mrope_section", len(text["mrope_section"]) == 3, "three sections: time, height, width"),
        (text, "mrope_section", min(text["mrope_section"], default=0) > 0, "positive sections"),
        (text, "mrope_section", sum(text["mrope_section"]) == half, f"a sum of half the head dim, {half}"),
        (text, "image_token_id", text["image_token_id"] < text["vocab_size"], f"less than {text['vocab_size']} tokens"),
        (vision, "hidden_size", vision["hidden_size"] % (4 * towers) == 0, "a multiple of 4 x num_heads"),
        (vision, "out_hidden_size", vision["out_hidden_size"] == text["hidden_size"], f"{text['hidden_size']}, text's"),
        (vision, "window_size", vision["window_size"] >= side, f"a merged token, {side}, at least"),
        (vision, "fullatt_block_indexes", usual or all(0 <= i < depth for i in full), f"blocks from 0 to {depth - 1}"),
    ):
        expect(where, key, section[key], fits, expected)


def config_to_save(config, dtype):
    """config.json for a model.Config and weights in `dtype`, e.g. "bfloat16": the hub's flat layout.

    Every version since 4.49 reads that one. What the source's file said in another layout moves; what it left out is
    written; no section keeps a `dtype`, which newer versions obey before `torch_dtype`.
    """
    own = ("dtype", "torch_dtype", "rope_parameters", "text_config", "vision_config", "layer_types")
    kept = lambda section: {key: value for key, value in section.items() if key not in own}
    raw, tower = config.raw, kept(config.raw["vision_config"])
    nested = {key: value for key, value in kept(raw.get("text_config") or {}).items() if value is not None}
    flat = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], **nested, **kept(raw), "model_type": "qwen2_5_vl"}
    said = read(raw, "rope_scaling", dict, "config.json", default={})
    rope = said if said.get("mrope_section") else {"type": "mrope", "mrope_section": list(config.mrope_section)}
    sizes = {key: getattr(config, key) for key in TEXT if key != "mrope_section"}
    more = {"tie_word_embeddings": config.tie_word_embeddings, "image_token_id": config.image_token_id}
    vision = {key: getattr(config.vision, key) for key in VISION if key != "in_channels"}
    vision |= {"fullatt_block_indexes": list(config.vision.fullatt_block_indexes), "model_type": "qwen2_5_vl"}
    vision |= {} if "in_channels" in tower else {"in_chans": config.vision.in_channels}
    return {**flat, **sizes, **more, "rope_scaling": rope, "torch_dtype": dtype, "vision_config": {**tower, **vision}}


# -- 2. the picture processor -----------------------------------------------------------------------------------------

PICTURES = {  # key -> (kind, default of transformers' class); the sizes have to be the model's
    "patch_size": (int, 14),
    "temporal_patch_size": (int, 2),
    "merge_size": (int, 2),
    "min_pixels": (int, 56 * 56),
    "max_pixels": (int, 1280 * 28 * 28),
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
LARGEST_LEAST = 16384 * 28 * 28  # pixels that every picture may be enlarged to: the hub's max_pixels


def read_pictures(folder, vision):
    """What becomes of a picture: a dict with the keys of PICTURES, `image_mean` and `image_std`.

    vision: the model's VisionConfig. An `image_processor` inside processor_config.json wins, as in transformers.
    """
    path = find_file(folder, "processor_config.json")
    options = read(read_json(path), "image_processor", dict, path, default={}) if path else {}
    if not options:
        path = folder / "preprocessor_config.json"
        options = read_json(path)
    size = read(options, "size", dict, path, default={})
    given = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    given |= {key: value for key, value in options.items() if value is not None}
    kind = str(given.get("image_processor_type", "Qwen2VLImageProcessor"))
    known = re.fullmatch(r"Qwen2(_5_)?VLImageProcessor(Fast|Pil)?", kind)
    expect(path, "image_processor_type", kind, known, "'Qwen2VLImageProcessor'")
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        expect(path, key, given.get(key), given.get(key, True) is True, "true")
    expect(path, "resample", given.get("resample"), given.get("resample", 3) == 3, "3, bicubic")
    factor = given.get("rescale_factor", 1 / 255)
    expect(path, "rescale_factor", factor, isinstance(factor, float) and math.isclose(factor, 1 / 255), f"{1 / 255}")

    found = {key: read(given, key, kind, path, default) for key, (kind, default) in PICTURES.items()}
    for key, own in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        expect(path, key, found[key], found[key] == own, f"{own} as in config.json")
    check_limits(path, found["min_pixels"], found["max_pixels"])
    for key, usual, least in (("image_mean", MEAN, -math.inf), ("image_std", STD, 1e-6)):
        value = found[key] = given.get(key, usual)
        numbers = isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) for x in value)
        expect(
            path,
            key,
            value,
            numbers and all(least < x < math.inf for x in value),
            "three numbers, of a deviation above 0",
        )
    return found


def pictures_to_save(processor):
    """preprocessor_config.json of a model.Processor, with every key that some version of transformers reads."""
    sizes = {key: getattr(processor, key) for key in PICTURES}
    limits = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        **{"resample": 3, "rescale_factor": 1 / 255, "size": limits, **sizes},
        **{"image_mean": processor.image_mean, "image_std": processor.image_std},
    }


def check_limits(where, least, most):
    """Limits of a picture's area, pixels: refuse what no picture fits, and what would fill the memory with one."""
    expect(where, "min_pixels", least, least <= LARGEST_LEAST, f"{LARGEST_LEAST:,} at most")
    expect(where, "max_pixels", most, most >= max(least, 28 * 28), f"min_pixels = {least} at least")


# -- 3. the tokenizer -------------------------------------------------------------------------------------------------

PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
PIECES += r"\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen2's split of a text before its merges
TOKENIZER_BYTES = 256 << 20


def read_tokenizer(folder):
    """The tokenizers.Tokenizer of a checkpoint; truncation and padding that a program left in it are off."""
    path = folder / "tokenizer.json"
    vocabulary = find_file(folder, "vocab.json")
    try:
        if vocabulary and find_file(folder, path.name) is None:
            return _tokenizer_from_merges(folder)
        tokenizer = tokenizers.Tokenizer.from_str(read_text(path, TOKENIZER_BYTES))
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{path}: found {shown(str(error))}, expected a tokenizer") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _tokenizer_from_merges(folder):
    """Qwen2's tokenizer from the files of its slow form: vocab.json, merges.txt, and tokenizer_config.json's tokens."""
    merges = [line.split(" ") for line in read_text(folder / "merges.txt").splitlines() if line[:8] != "#version"]
    merges = [tuple(pair) for pair in merges if len(pair) == 2]
    tokenizer = tokenizers.Tokenizer(BPE(json.loads(read_text(folder / "vocab.json")), merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    path = folder / "tokenizer_config.json"
    added = read(read_json(path), "added_tokens_decoder", dict, path)
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    for id, token in sorted(added.items(), key=lambda pair: int(pair[0])):
        given = {flag: bool(token.get(flag)) for flag in flags}
        add = tokenizer.add_special_tokens if given["special"] else tokenizer.add_tokens
        add([AddedToken(token["content"], **given)])
        found = tokenizer.token_to_id(token["content"])
        expect(path, token["content"], found, found == int(id), f"the id {id}")
    return tokenizer


# -- 4. adapter_config.json -------------------------------------------------------------------------------------------

PLAIN = {  # PEFT's options, and what they may be so that an adapter is W + scale B A: None, anything, as the files tell
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "use_rslora")),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")),
    **dict.fromkeys(("task_type", "inference_mode", "auto_mapping", "peft_version", "revision")),
    **dict.fromkeys(("base_model_name_or_path", "megatron_core", "qalora_group_size", "runtime_config")),
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian"],  # other ways change W itself
}


def read_adapter(path):
    """(rank, alpha, dropout, rslora) of PEFT's adapter_config.json.

    Raises InputError that names an option which makes the adapter something else, or which nobody here knows.
    """
    config = read_json(path)
    for key, value in config.items():
        if key not in PLAIN:  # off, or a way to compute that changes the result
            expect(path, key, value, value in (None, False) or value in ({}, [], ""), "no such option of LoRA")
        elif PLAIN[key]:
            expect(path, key, value, value is None or value in PLAIN[key], repr(PLAIN[key][0]))
    expect(path, "peft_type", config.get("peft_type"), config.get("peft_type") == "LORA", "'LORA'")
    dropout = config.get("lora_dropout") or 0.0
    fits = type(dropout) in (int, float) and 0 <= dropout < 1
    expect(path, "lora_dropout", dropout, fits, "a probability below 1")
    rslora = read(config, "use_rslora", bool, path, default=False)
    return read(config, "r", int, path), read(config, "lora_alpha", float, path), dropout, rslora
