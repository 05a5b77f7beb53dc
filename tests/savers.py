"""config.json of one model as versions of transformers save it, from the hub's flat form.

Written down from saves that these versions made of the hub's configs (3B to 72B) and of tiny ones; each function gives
what they wrote but for keys that say nothing about the model (versions, names, generation).
"""

VISION_DEFAULTS = {  # of the class: 4.49 does not write what equals them
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
TOP = ("architectures", "model_type", "vision_config", "torch_dtype")
AXIAL = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}, "model_type": "qwen2_5_vl_vision"}
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")


def rope(raw, key="rope_scaling"):
    return {key: {"mrope_section": raw["rope_scaling"]["mrope_section"], "rope_type": "default", "type": "default"}}


def flat(raw):
    """4.50 and 4.51, with every value of the tower."""
    return {**raw, **rope(raw), "vision_config": {**raw["vision_config"], "in_channels": 3}}


def sparse(raw):
    """4.49: the tower's values that are not the class's."""
    vision = raw["vision_config"]
    kept = {key: vision[key] for key in vision if key not in VISION_DEFAULTS or vision[key] != VISION_DEFAULTS[key]}
    return {**raw, **rope(raw), "vision_config": kept}


def hybrid(raw, layer_types=True, dtype="torch_dtype", nulls=True):
    """4.52 to 4.57: the text's values twice; the ids null inside; true of tied heads is said inside only."""
    text = {key: value for key, value in raw.items() if key not in (*TOP, "tie_word_embeddings")}
    text |= {"model_type": "qwen2_5_vl_text", dtype: raw["torch_dtype"], **rope(raw)}
    if nulls:
        text |= {"image_token_id": None, "video_token_id": None}
    else:
        text = {key: value for key, value in text.items() if key not in IDS[:4]}
    if layer_types:
        text |= {"layer_types": ["full_attention"] * raw["num_hidden_layers"], "sliding_window": None}
    top = {key: value for key, value in flat(raw).items() if key not in ("torch_dtype", "tie_word_embeddings")}
    (text if raw["tie_word_embeddings"] else top)["tie_word_embeddings"] = raw["tie_word_embeddings"]
    return {**top, dtype: raw["torch_dtype"], "text_config": text}


def nested(raw, vision={}):
    """5.x: the text's values inside only, the rope's in one place."""
    outside = (*TOP, *IDS, "tie_word_embeddings", "rope_scaling", "rope_theta")
    text = {key: value for key, value in raw.items() if key not in outside}
    theta = {"rope_theta": raw["rope_theta"], "type": "mrope"}
    text |= {"model_type": "qwen2_5_vl_text", "dtype": raw["torch_dtype"], "sliding_window": None, "pad_token_id": None}
    text |= {"layer_types": ["full_attention"] * raw["num_hidden_layers"]}
    text["rope_parameters"] = {**rope(raw)["rope_scaling"], **theta}
    top = {key: raw[key] for key in ("architectures", "model_type", *IDS, "tie_word_embeddings")}
    vision = {**raw["vision_config"], "in_channels": 3, **vision}
    return {**top, "dtype": raw["torch_dtype"], "text_config": text, "vision_config": vision}


SAVERS = {
    "hub": lambda raw: raw,
    "4.49": sparse,
    "4.51": flat,
    "4.52": lambda raw: hybrid(raw, layer_types=False),
    "4.53 to 4.55": hybrid,
    "4.56": lambda raw: hybrid(raw, dtype="dtype"),
    "4.57": lambda raw: hybrid(raw, dtype="dtype", nulls=False),
    "5.0": nested,
    "5.24": lambda raw: nested(raw, AXIAL),
}
