"""Generation as a checkpoint's generation_config.json asks for it, and transformers does it: for evaluate.py alone.

The hub's file of Qwen2.5-VL says do_sample with a temperature of 1e-6 and a repetition_penalty of 1.05: that is what a
user of the stock model gets, and not its greedy answer. The penalty divides the positive scores of all tokens that have
been read or written, and multiplies the negative ones (Keskar et al., arXiv 1909.05858).
"""

import math

import torch

from data import InputError
from support.engine import truncate
from support.files import expect, find_file, read, read_json

IGNORED = (  # what says nothing about which token comes next
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache"),
    *("max_length", "max_new_tokens", "cache_implementation"),
)
DEFAULTS = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}  # transformers'


def read_generation(folder):
    """The settings of a checkpoint's generation_config.json, keys as in DEFAULTS. Raises InputError for other ways."""
    path = find_file(folder, "generation_config.json")
    if path is None:
        raise InputError(f"{folder}: found no generation_config.json, expected one for --stock-generation")
    given = {key: value for key, value in read_json(path).items() if value is not None and key not in IGNORED}
    for key in given.keys() - DEFAULTS.keys():
        usual = given[key] in (False, 0, 1, 1.0, [], {})  # off, or one beam, group, sequence, penalty
        expect(path, key, given[key], usual, f"one of {', '.join(DEFAULTS)}")
    kinds = {"do_sample": bool, "top_k": int, "temperature": float, "top_p": float, "repetition_penalty": float}
    given = {key: value for key, value in given.items() if key in DEFAULTS and (key, value) != ("top_k", 0)}
    return {**DEFAULTS, **{key: read(given, key, kinds[key], path) for key in given}}


@torch.no_grad()
def generate(qwen, model, processor, prompt, settings, max_tokens, seed=0):
    """(token ids, finished) of the response to one prompt (model.Encoded). qwen: the module model.py."""
    generator, device = torch.Generator().manual_seed(seed), model.head_weight.device
    ids, cache = prompt.input_ids[None].to(device), qwen.Cache()  # (1, T)
    pictures = [] if prompt.grid_thw is None else [prompt.pixel_values.to(device), prompt.grid_thw]
    hidden = model(ids, None, *pictures, cache=cache)  # (1, T, D)
    answer = []
    while len(answer) < max_tokens:
        scores = model.logits(hidden[:, -1]).float()  # (1, V)
        seen = scores.gather(1, ids)  # (1, T)
        penalty = settings["repetition_penalty"]
        scores = scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
        scores[:, processor.banned_ids] = -math.inf
        if settings["do_sample"]:
            scores = truncate(scores / settings["temperature"], settings["top_k"], settings["top_p"])
            token = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator).to(device)  # (1, 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        if token.item() in processor.stop_ids:
            return answer, True
        answer.append(token.item())
        ids = torch.cat([ids, token], dim=1)
        hidden = model(token, cache=cache)  # (1, 1, D)
    return answer, False
