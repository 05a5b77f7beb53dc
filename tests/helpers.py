"""Tiny random checkpoints in the hub's layout, pictures and chats: what the tests of every part start from."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model import Config, Processor, Qwen25VL, save_pretrained

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
# Merges of a few words that our data say often; everything else is spelt in bytes.
MERGES = "t h,i n,e r,a n,o x,Ġ a,y e,ye s,n o,th e,an s,i s".split(",")
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
SPLIT += r"\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer():
    """Byte-level BPE built as Qwen's is: its split, NFC, 256 byte tokens, some merges, its special tokens."""
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    bpe = models.BPE({token: id for id, token in enumerate(vocabulary)}, [tuple(merge.split()) for merge in MERGES])
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def tiny_config(tied=True, width=64, layers=3, vision_width=32, vision_depth=3, **changes):
    """config.json of a tiny model in the flat layout of the hub, every official key in it."""
    half = width // 4 // 2  # of the head dim, with 4 heads
    time, row = half // 4, half - half // 4 - 3 * half // 8  # in the official proportions, 16 : 24 : 24
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": 268,
        "eos_token_id": 270,
        "vision_start_token_id": 277,
        "vision_end_token_id": 278,
        "vision_token_id": 279,
        "image_token_id": 280,
        "video_token_id": 281,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vision_depth,
            "hidden_act": "silu",
            "hidden_size": vision_width,
            "intermediate_size": 3 * vision_width,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [time, row, half - time - row]},
        "vocab_size": 288,  # six rows more than there are tokens, as the official ones have
        **changes,
    }


def tiny_checkpoint(folder, tied=True, seed=0, scale=0.08, dtype=torch.float32, **config):
    """Write a random Qwen2.5-VL checkpoint into `folder`, every file a real one has; returns the folder as a Path.

    config: changes to `tiny_config` (width, layers, vision_width, vision_depth, or any key of config.json).
    scale: standard deviation of the weights, large enough that every part shows in the logits.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = tiny_config(tied, **config)
    with torch.device("meta"):
        model = Qwen25VL(Config.from_json(raw))
    model = randomize(model.to_empty(device="cpu"), seed, scale).to(dtype)
    save_pretrained(model, folder)
    write_companions(folder)
    return folder


def randomize(model, seed=0, scale=0.08):
    """Normal weights and biases, norms around one: no parameter may be wrong unnoticed. In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, scale, generator=generator)
            if "norm" in name or "ln_q" in name:
                p.add_(1.0)
    return model


def write_companions(folder):
    """Tokenizer, processor, chat template and generation settings, as the hub's files are."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    files = {
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        "chat_template.json": {"chat_template": TEMPLATE},
        "generation_config.json": {"pad_token_id": 268, "eos_token_id": [270, 268], "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "bos_token": None,
            "model_max_length": 131072,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def picture(width, height, seed=0):
    """A picture with an edge in every region and some noise, so that no two patches are alike."""
    rng = np.random.default_rng([seed, width, height])
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 20) + y / rng.uniform(3, 20) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 127 + 90 * np.stack(waves, axis=-1) + rng.uniform(-30, 30, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def question(text, *pictures, answer=None):
    """A chat with some pictures before a text, and an answer where one is given."""
    content = [*({"type": "image", "image": image} for image in pictures), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def batch(processor: Processor, chats, side="left"):
    """Chats as one padded batch: the keyword arguments of a model."""
    encoded = [processor.encode(chat) for chat in chats]
    longest = max(len(e.input_ids) for e in encoded)
    ids = torch.full((len(chats), longest), processor.pad_id)
    mask = torch.zeros((len(chats), longest), dtype=torch.long)
    for row, e in enumerate(encoded):
        place = slice(longest - len(e.input_ids), None) if side == "left" else slice(len(e.input_ids))
        ids[row, place], mask[row, place] = e.input_ids, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any(e.grid_thw is not None for e in encoded):
        inputs["pixel_values"] = torch.cat([e.pixel_values for e in encoded if e.grid_thw is not None])
        inputs["image_grid_thw"] = torch.cat([e.grid_thw for e in encoded if e.grid_thw is not None])
    return inputs


def oracle(folder, dtype=torch.float32):
    """The same checkpoint in transformers."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def oracle_inputs(inputs, image_token_id=280):
    """`batch` as transformers takes it: without the kind of each token it would fall back to positions on one axis."""
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == image_token_id).int()}


def random_table():
    """Attributes of 300 random pictures of the tiny world: int8 (S, 3, 4), -1 where no object is."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, [3, 8, 2, 2], size=(300, 3, 4)).astype(np.int8)
    for s, count in enumerate(rng.integers(1, 4, 300)):
        table[s, count:] = -1
    return table
