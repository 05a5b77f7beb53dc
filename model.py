"""Qwen2.5-VL in one file: what the model computes, how it is stored, and how pictures and chats become its input.

    1. Config           the three layouts of config.json
    2. Vision tower     patches -> windows -> blocks -> merged tokens
    3. Text model       grouped-query attention, M-RoPE, SwiGLU
    4. Qwen25VL         pictures into text, positions, masks, the head
    5. Cache            keys and values of what was read
    6. Load and save    safetensors in the hub's names
    7. LoRA             adapters by hand, in PEFT's file format
    8. Processor        pictures -> patches, messages -> tokens
    9. Commands         python model.py --describe PATH, python model.py --chat PATH [--image F] [--adapter A]

Axes: B batch, T tokens, S keys, H heads, G kv heads, K head dim, D width, N patches, M merged tokens (4 patches each), V vocab.
Architecture: Qwen2.5-VL Technical Report, arXiv 2502.13923. Parameter names are those of the checkpoints on the hub.
"""

import argparse
import json
import math
import mmap
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import InputError, command

# -- 1. config ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple
    window_size: int = 112  # pixels
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames; a still picture is shown twice
    spatial_merge_size: int = 2  # patches per side of a merged token
    in_channels: int = 3

    @property
    def patch_dim(self):
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class Config:
    """Sizes of one model; `raw` is the config.json they were read from, written back by `save_pretrained`."""

    vision: VisionConfig
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple  # frequencies of the (time, height, width) axes; they sum to half the head dim
    tie_word_embeddings: bool
    image_token_id: int
    raw: dict = field(repr=False)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, raw, where="config.json"):
        """Read a parsed config.json: flat (the hub's), with `text_config`, or with `text_config.rope_parameters`.

        Raises InputError that names the key and `where` it was looked for.
        """
        if not isinstance(raw, dict):
            raise InputError(f"{where}: found {type(raw).__name__}, expected a JSON object")

        def read(section, key, kind, *old_names, default=None):
            found = [section[name] for name in (key, *old_names) if name in section] or [default]
            if found[0] is None:
                raise InputError(f"{where}: found no {key!r}, expected a value of Qwen2.5-VL's config")
            number = {int: int, float: (int, float), dict: dict, list: (list, tuple)}[kind]
            good = isinstance(found[0], number) and not isinstance(found[0], bool)
            if kind in (int, float):
                good = good and found[0] > 0
            if kind is list:
                good = good and all(isinstance(item, int) and item >= 0 for item in found[0])
            if not good:
                kinds = {int: "a positive integer", float: "a positive number", dict: "an object", list: "a list of integers"}
                raise InputError(f"{where}: found {key} = {found[0]!r}, expected {kinds[kind]}")
            return tuple(found[0]) if kind is list else found[0]

        text = {**raw, **(read(raw, "text_config", dict, default={}))}
        vision = read(raw, "vision_config", dict)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "mrope")) not in ("mrope", "default"):
            raise InputError(f"{where}: found rope type {rope.get('rope_type', rope.get('type'))!r}, expected mrope or default")
        if text.get("use_sliding_window"):
            raise InputError(f"{where}: found use_sliding_window = true, expected full attention in the text model")
        for name, section in (("", text), ("vision_config.", vision)):
            if section.get("hidden_act", "silu") != "silu":
                raise InputError(f"{where}: found {name}hidden_act = {section['hidden_act']!r}, expected 'silu'")

        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        config = cls(
            vision=VisionConfig(
                **{key: read(vision, key, int) for key in ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")},
                fullatt_block_indexes=read(vision, "fullatt_block_indexes", list),
                in_channels=read(vision, "in_channels", int, "in_chans", default=3),
                **{
                    key: read(vision, key, int, default=getattr(VisionConfig, key))
                    for key in ("window_size", "patch_size", "temporal_patch_size", "spatial_merge_size")
                },
            ),
            vocab_size=read(text, "vocab_size", int),
            **{key: read(text, key, int) for key in sizes},
            rms_norm_eps=read(text, "rms_norm_eps", float),
            rope_theta=read({**text, **rope}, "rope_theta", float),
            mrope_section=read(rope, "mrope_section", list),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            image_token_id=read(raw, "image_token_id", int),
            raw=raw,
        )
        tower = config.vision
        for whole, part, of, by in (
            (config.hidden_size, 2 * config.num_attention_heads, "hidden_size", "twice num_attention_heads"),
            (config.num_attention_heads, config.num_key_value_heads, "num_attention_heads", "num_key_value_heads"),
            (tower.hidden_size, 4 * tower.num_heads, "vision_config.hidden_size", "four times num_heads"),
            (tower.window_size, tower.patch_size * tower.spatial_merge_size, "window_size", "patch_size x spatial_merge_size"),
        ):
            if whole % part:
                raise InputError(f"{where}: found {of} = {whole}, expected a multiple of {by} = {part}")
        if 2 * sum(config.mrope_section) != config.head_dim:
            raise InputError(
                f"{where}: found mrope_section {list(config.mrope_section)}, expected a sum of {config.head_dim // 2}, half the head dim"
            )
        if tower.out_hidden_size != config.hidden_size:
            raise InputError(
                f"{where}: found out_hidden_size = {tower.out_hidden_size}, expected the text model's hidden_size {config.hidden_size}"
            )
        return config


# -- 2. vision tower ----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times the weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width, inner, bias):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x, cos, sin):
    """Rotary embedding of x (..., K): the pair (x[i], x[i + K/2]) turns by angle i; cos and sin are (..., K/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def run(block, *inputs, keep):
    """A block with its activations kept for the backward pass, or computed again there (gradient checkpointing)."""
    if keep or not torch.is_grad_enabled():
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False)


@dataclass(frozen=True)
class Arrangement:
    """The patches of a batch ordered so that those which attend to each other are neighbours, equal groups together.

    Then attention needs no mask: each run of `count` groups of `length` patches is one dense batch.
    """

    order: torch.Tensor  # (N,) which patch stands at each place
    cos: torch.Tensor  # (N, K/2) fp32, in this order
    sin: torch.Tensor
    runs: tuple  # of (count, length)


@lru_cache(maxsize=8)
def arrange(grids, config, device):
    """Arrange a batch of pictures by window and by frame; grids are ((t, h, w), ...) in patches.

    The patches of a picture come merge block by merge block, (t, h/2, w/2, 2, 2), and no order here breaks a block up.
    Returns (windows, frames, from window to frame order (N,), back (N,), from windows to the merged tokens' own order (M,)).
    """
    merge = config.spatial_merge_size
    side = config.window_size // config.patch_size // merge  # of a window, in merged tokens
    windows, frames, places, start = [], [], [], 0
    for t, h, w in grids:
        tokens = start + np.arange(t * h * w // merge**2).reshape(t, h // merge, w // merge)
        start += tokens.size
        for frame in tokens:
            frames.append(frame.ravel())
            for top in range(0, h // merge, side):
                windows += [frame[top : top + side, x : x + side].ravel() for x in range(0, w // merge, side)]
        place = rearrange(np.indices((h, w)), "two (h a) (w b) -> (h w a b) two", a=merge, b=merge)
        places.append(np.tile(place, (t, 1)))

    # The angles: half of the frequencies turn with the row, half with the column.
    spread = config.hidden_size // config.num_heads // 2
    frequency = 10000.0 ** -(torch.arange(0, spread, 2, dtype=torch.float) / spread)  # (K/4,)
    angles = torch.from_numpy(np.concatenate(places)).float()[..., None] * frequency  # (N, 2, K/4)
    angles = angles.flatten(1)  # (N, K/2)

    def arrangement(groups):
        groups = sorted(groups, key=len)
        merged = np.concatenate(groups)  # (M,)
        order = torch.from_numpy((merged[:, None] * merge**2 + np.arange(merge**2)).ravel())  # (N,)
        runs = tuple((len(list(run)), length * merge**2) for length, run in groupby(map(len, groups)))
        cos, sin = angles[order].cos(), angles[order].sin()
        return merged, Arrangement(order.to(device), cos.to(device), sin.to(device), runs)

    with torch.inference_mode(False):  # kept for later calls, which may train
        by_window, windows = arrangement(windows)
        _, frames = arrangement(frames)
        restore = torch.from_numpy(by_window.argsort()).to(device)
        to_frames, to_windows = windows.order.argsort()[frames.order], frames.order.argsort()[windows.order]
    return windows, frames, to_frames, to_windows, restore


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, runs):
        qkv = rearrange(self.qkv(x), "n (three h k) -> n three h k", three=3, h=self.heads)
        qk = rotate(qkv[:, :2].float(), cos[:, None, None], sin[:, None, None]).to(qkv.dtype)  # (N, 2, H, K)
        outputs, start = [], 0
        for count, length in runs:
            here = slice(start, start + count * length)
            q, k = rearrange(qk[here], "(c n) two h k -> two c h n k", c=count)  # each (count, H, length, K)
            v = rearrange(qkv[here, 2], "(c n) h k -> c h n k", c=count)
            outputs.append(rearrange(F.scaled_dot_product_attention(q, k, v), "c h n k -> (c n) (h k)"))
            start = here.stop
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))  # (N, D)


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=1e-6)
        self.norm2 = RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x, cos, sin, runs):
        x = x + self.attn(self.norm1(x), cos, sin, runs)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Stored as a 3-D convolution whose stride is its kernel: a linear map of each patch."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches):  # (N, 1176) -> (N, D)
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight)


class Merger(nn.Module):
    """Four neighbouring patches become one token of the text model."""

    def __init__(self, config):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x):  # (N, D) -> (M, text D)
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, pixel_values, grid_thw):
        """Pictures as the text model sees them.

        pixel_values: (N, 1176) patches of all pictures, from `Processor.images`; grid_thw: (n, 3) their grids in patches.
        Returns (M, D) merged tokens, picture after picture, row by row. Raises InputError where the two disagree.
        """
        grids = tuple(map(tuple, grid_thw.tolist()))
        patches = sum(t * h * w for t, h, w in grids)
        if pixel_values.shape != (patches, self.config.patch_dim):
            expected = f"({patches}, {self.config.patch_dim}) for the grids {list(grids)[:4]}"
            raise InputError(f"pixel_values: found shape {tuple(pixel_values.shape)}, expected {expected}")
        windows, frames, to_frames, to_windows, restore = arrange(grids, self.config, pixel_values.device)
        x = self.patch_embed(pixel_values.index_select(0, windows.order))  # (N, D)
        for i, block in enumerate(self.blocks):
            if i in self.config.fullatt_block_indexes:
                x = x.index_select(0, to_frames)
                x = run(block, x, frames.cos, frames.sin, frames.runs, keep=not self.checkpointing)
                x = x.index_select(0, to_windows)
            else:
                x = run(block, x, windows.cos, windows.sin, windows.runs, keep=not self.checkpointing)
        return self.merger(x).index_select(0, restore)  # (M, D)


# -- 3. text model ------------------------------------------------------------------------------------------------------


def attend(q, k, v, mask=None):
    """softmax(q k' / sqrt(K)) v with the mask, or causally without one: the last query sees every key.

    q: (B, H, T, K); k, v: (B, G, S, K); mask: None or bool (B, 1, T, S), true where a query sees a key. Returns (B, H, T, K).
    """
    T, S = q.shape[2], k.shape[2]
    if mask is None and 1 < T < S:  # new tokens after held ones: SDPA's own causal mask would align at the start
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        inner, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.k_proj = nn.Linear(config.hidden_size, shared)
        self.v_proj = nn.Linear(config.hidden_size, shared)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        q = rotate(rearrange(self.q_proj(x), "b t (h k) -> b h t k", k=self.head_dim), cos, sin)
        k = rotate(rearrange(self.k_proj(x), "b t (g k) -> b g t k", k=self.head_dim), cos, sin)
        v = rearrange(self.v_proj(x), "b t (g k) -> b g t k", k=self.head_dim)
        y = attend(q, k, v, mask) if cache is None else cache.attend(self.layer, q, k, v, mask)  # (B, H, T, K)
        return self.o_proj(rearrange(y, "b h t k -> b t (h k)"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, position_ids, mask, cache):  # x (B, T, D), position_ids (3, B, T)
        cos, sin = self.rope(position_ids, x.dtype)
        for block in self.layers:
            x = run(block, x, cos, sin, mask, cache, keep=not self.checkpointing)
        return self.norm(x)

    def rope(self, position_ids, dtype):
        """M-RoPE: each frequency follows one axis of the position, by sections: time, height, width.

        position_ids: (3, B, T). Returns cos and sin, each (B, 1, T, K/2); the angles are computed in fp32.
        """
        half = self.config.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float, device=position_ids.device) / half
        frequency = 1.0 / self.config.rope_theta**exponent  # (K/2,)
        axis = [i % 3 for i, width in enumerate(self.config.mrope_section) for _ in range(width)]  # (K/2,)
        angles = position_ids[axis].movedim(0, -1).float() * frequency  # (B, T, K/2)
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


# -- 4. the model -------------------------------------------------------------------------------------------------------


class Qwen25VL(nn.Module):
    """Reads tokens and pictures, gives hidden states; `logits` turns those into scores of the next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source = None  # the folder it was loaded from
        self.visual = VisionTower(config.vision)
        self.model = TextModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        """(V, D), the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden):
        """Scores of the next token (..., V) from hidden states (..., D)."""
        return F.linear(hidden, self.head_weight)

    def enable_gradient_checkpointing(self, flag=True):
        """Compute every block again in the backward pass instead of keeping its activations."""
        self.visual.checkpointing = self.model.checkpointing = flag

    def forward(
        self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, position_ids=None, cache=None,
        *, image_embeds=None,
    ):  # fmt: skip
        """Hidden states (B, T, D) after the final norm.

        input_ids: (B, T). Every picture stands as a run of image tokens; `pixel_values` (N, 1176) and `image_grid_thw`
          (n, 3) list the pictures of the whole batch in reading order, or `image_embeds` (M, D) what `visual` made of them.
        attention_mask: None, all tokens are read, causally; or (B, T), with a cache (B, held + T), 0 at padding on either
          side; or bool (B, T, S), what each position sees, which needs `position_ids` (3, B, T) as well.
        cache: an object as `Cache` below. Without `position_ids` the positions go on where the cache ended.
        Raises InputError where image tokens and pictures do not match.
        """
        T = input_ids.shape[1]
        x = self.model.embed_tokens(input_ids)  # (B, T, D)
        if pixel_values is not None:
            image_embeds = self.visual(pixel_values, image_grid_thw)  # (M, D)
        if image_embeds is not None:
            here = input_ids == self.config.image_token_id  # (B, T)
            if here.sum() != len(image_embeds):
                raise InputError(f"found {here.sum()} image tokens in input_ids, expected {len(image_embeds)}, as the pictures have")
            x = x.masked_scatter(here[..., None], image_embeds.to(x.dtype))

        if position_ids is None:
            new = None if attention_mask is None else attention_mask[:, -T:]
            position_ids, delta = self.positions(input_ids, new, image_grid_thw)
            if cache is not None:
                position_ids = position_ids + cache.position[:, None] if cache.length else position_ids
                count = T if new is None else new.sum(1)
                cache.position = cache.position + count + delta
        mask = self.mask(attention_mask, T, 0 if cache is None else cache.length)
        return self.model(x, position_ids, mask, cache)

    def mask(self, attention_mask, T, held):
        """What each of T new positions sees after `held` old ones, bool (B, 1, T, S); None where plain causal attention will do."""
        if attention_mask is None:
            return None
        if attention_mask.dim() == 3:
            return attention_mask[:, None].bool()
        seen = attention_mask.bool()  # (B, S)
        if bool((seen[:, 1:] <= seen[:, :-1]).all()) and (held == 0 or bool(seen[:, -1].all())):
            return None  # padding on the right only: causal attention does not reach it
        causal = torch.ones(T, held + T, dtype=torch.bool, device=seen.device).tril(held)
        itself = torch.eye(held + T, dtype=torch.bool, device=seen.device)[held:]  # padding sees itself, else softmax of nothing
        return (causal & seen[:, None, None] | itself)

    def positions(self, input_ids, attention_mask=None, image_grid_thw=None):
        """M-RoPE positions: text counts up on all axes; a picture spans (time, height, width) from where it starts.

        input_ids: (B, T); attention_mask: (B, T) or None, masked tokens count nothing; image_grid_thw: (n, 3) in patches.
        Returns position_ids (3, B, T), zero where masked, and delta (B,): the token after a row's last has the position
        (number of unmasked tokens) + delta. Raises InputError where image tokens and grids do not match.
        """
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        image = (input_ids == self.config.image_token_id) & valid  # (B, T)
        merge = self.config.vision.spatial_merge_size
        grids = [] if image_grid_thw is None else image_grid_thw.tolist()
        grids = [(t, h // merge, w // merge) for t, h, w in grids]  # in merged tokens
        if (found := int(image.sum())) != (expected := sum(t * h * w for t, h, w in grids)):
            raise InputError(f"found {found} image tokens in input_ids, expected {expected} for {len(grids)} pictures")

        advance = (valid & ~image).long()  # (B, T) how far each token moves the position on
        if grids:  # a picture does so with its last token, by its longer side
            ends = torch.tensor(grids).prod(1).cumsum(0) - 1  # (n,) among all image tokens
            last = image.flatten().nonzero()[ends.to(image.device), 0]
            advance.view(-1)[last] = torch.tensor([max(h, w) for _, h, w in grids], device=last.device)
        position_ids = (advance.cumsum(1) - advance).expand(3, -1, -1).clone()  # (3, B, T)
        if grids:
            offsets = np.concatenate([np.indices(grid).reshape(3, -1) for grid in grids], axis=1)  # (3, M)
            position_ids[:, image] += torch.from_numpy(offsets).to(position_ids.device)
        position_ids.masked_fill_(~valid, 0)
        return position_ids, advance.sum(1) - valid.sum(1)


# -- 5. cache -----------------------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of everything read so far.

    The model calls `attend` once per layer and reads `length`; it keeps in `position` (B,) where the next token goes when
    nobody passes `position_ids`. Any object with these three can stand in for it.
    """

    def __init__(self):
        self.held = {}  # layer -> keys and values, each (B, G, S, K)
        self.length = 0
        self.position = 0

    def attend(self, layer, q, k, v, mask):
        """Append k, v (B, G, T, K) and attend with q (B, H, T, K) over all held tokens."""
        if layer in self.held:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.held[layer], (k, v)))
        self.held[layer] = k, v
        self.length = k.shape[2]
        return attend(q, k, v, mask)


# -- 6. load and save ---------------------------------------------------------------------------------------------------

SHARD_BYTES = 5 * 10**9
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPANIONS = (  # what stands beside the weights: tokenizer, processor, chat
    "tokenizer.json tokenizer_config.json vocab.json merges.txt added_tokens.json special_tokens_map.json "
    "preprocessor_config.json processor_config.json video_preprocessor_config.json chat_template.json "
    "chat_template.jinja generation_config.json"
).split()


def hub_name(name):
    """The hub's name of a parameter, given that or the in-library one (model.language_model.*, model.visual.*)."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


def library_name(name):
    """The in-library name, which PEFT's files use, of a hub name."""
    name = re.sub(r"^model\.", "model.language_model.", name)
    return re.sub(r"^visual\.", "model.visual.", name)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: found no such file, expected a JSON file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: found {error}, expected a readable JSON file") from None


def find_folder(path_or_hub_id):
    """The local folder of a checkpoint; a hub id is downloaded into huggingface-hub's cache (HF_HUB_OFFLINE is honoured)."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_hub_id)):
        raise InputError(f"{path_or_hub_id}: found no such folder, expected a checkpoint's folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download  # only here: it is slow to import

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client's errors have no common base
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path_or_hub_id}: found no such folder, and no such model on the hub ({reason})") from None


class TensorFile:
    """A memory-mapped safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes.

    `entries` is {name: (dtype, shape, first byte, last byte + 1)}. Raises InputError for a file cut short or damaged.
    """

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > size - 8:
                    raise InputError(f"{path}: found {size} bytes, expected a safetensors header of {length} bytes; cut short?")
                header = json.loads(file.read(length))
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise InputError(f"{path}: {error.strerror}, expected a safetensors file") from None
        except ValueError as error:
            raise InputError(f"{path}: found a damaged header ({error}), expected safetensors") from None
        self.entries = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            except (KeyError, TypeError, ValueError):
                raise InputError(f"{path}: found a damaged entry for {name}, expected dtype, shape and data_offsets") from None
            if dtype not in DTYPES:
                raise InputError(f"{path}: found {name} of dtype {dtype}, expected one of {', '.join(DTYPES)}")
            first, last = first + 8 + length, last + 8 + length
            if last - first != math.prod(shape) * DTYPES[dtype].itemsize or first < 8 + length:
                raise InputError(f"{path}: found {last - first} bytes of {name}, expected {dtype} {list(shape)}")
            if last > size:
                raise InputError(f"{path}: found {size} bytes, expected {last} for {name}; cut short?")
            self.entries[name] = DTYPES[dtype], shape, first, last

    def read(self, name, device, dtype):
        """One tensor, cast and placed; the mapped pages are given back at once, so that they never add up."""
        stored, shape, first, last = self.entries[name]
        source = torch.frombuffer(self.bytes, dtype=stored, count=math.prod(shape), offset=first).view(shape)
        tensor = torch.empty(shape, dtype=dtype, device=device).copy_(source)
        if hasattr(mmap, "MADV_DONTNEED"):
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self.bytes.madvise(mmap.MADV_DONTNEED, page, last - page)
        return tensor


def weight_files(folder):
    """The safetensors files of a checkpoint: those of its index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{index}: found no weight_map, expected tensor names and their files")
        return [TensorFile(folder / name) for name in sorted(set(names.values()))]
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: found no model.safetensors or model.safetensors.index.json, expected a checkpoint")
    return [TensorFile(folder / "model.safetensors")]


def load_pretrained(path_or_hub_id, device="cpu", dtype=torch.float32):
    """The model of a checkpoint in the hub's layout, on `device` in `dtype`, tensor by tensor from the mapped files.

    path_or_hub_id: a folder with config.json and safetensors (one or sharded, hub or in-library names), or an id on the hub.
    Raises InputError that names every missing, unexpected and mis-shaped tensor.
    """
    folder = find_folder(path_or_hub_id)
    config = Config.from_json(read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        model = Qwen25VL(config)
    model.source = folder

    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {hub_name(name): (file, name) for file in weight_files(folder) for name in file.entries}
    shapes = {name: file.entries[stored][1] for name, (file, stored) in found.items()}
    if config.tie_word_embeddings and shapes.get("lm_head.weight") == expected["model.embed_tokens.weight"]:
        del found["lm_head.weight"]  # some writers store the tied head as well
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    faults += [
        f"{name} of shape {list(shapes[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in found and shapes[name] != shape
    ]
    if faults:
        raise InputError(f"{folder}: found {len(faults)} tensors that do not fit config.json: {'; '.join(faults)}")

    for name, (file, stored) in found.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(file.read(stored, device, dtype)))
    return model


def save_pretrained(model, folder):
    """Write the checkpoint that transformers and vLLM load: hub names, shards above 5 GB, the source's tokenizer files.

    The folder appears whole or not at all. Raises InputError where LoRA has not been merged: `merge_lora` first, or `save_adapter`.
    """
    if any(not layer.merged for layer in lora_layers(model).values()):
        raise InputError(f"{folder}: found LoRA beside the weights, expected merge_lora(model) first, or save_adapter")
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if ".lora_" not in name}
    shards, size = [{}], 0
    for name, tensor in weights.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes

    with replacing(folder) as new:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        names = names if len(shards) > 1 else ["model.safetensors"]
        for name, shard in zip(names, shards):
            write_tensors(shard, new / name)
        if len(shards) > 1:
            where = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
            total = sum(tensor.nbytes for tensor in weights.values())
            write_json({"metadata": {"total_size": total}, "weight_map": where}, new / "model.safetensors.index.json")
        stored = str(model.head_weight.dtype).removeprefix("torch.")
        write_json({**model.config.raw, "torch_dtype": stored}, new / "config.json")
        for name in COMPANIONS:
            if model.source is not None and (Path(model.source) / name).is_file():
                shutil.copyfile(Path(model.source) / name, new / name)


def write_json(value, path):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(tensors, path):
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{path}: {error}") from None


@contextmanager
def replacing(folder):
    """A folder beside `folder` to write into, which takes its place at the end; on an error nothing has changed."""
    folder = Path(folder)
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    new.mkdir(parents=True)
    try:
        yield new
        if folder.is_dir():  # the new files first: a reader in between finds each file whole
            old = {path.name for path in folder.glob("*.safetensors*")} - {path.name for path in new.iterdir()}
            for path in new.iterdir():
                os.replace(path, folder / path.name)
            for name in old:
                os.unlink(folder / name)
            new.rmdir()
        else:
            os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


# -- 7. LoRA ------------------------------------------------------------------------------------------------------------

PLAIN_LORA = {  # what PEFT may say in adapter_config.json and still mean W + scale B A
    "bias": ["none"],
    "use_dora": [False],
    "lora_bias": [False],
    "fan_in_fan_out": [False],
    "init_lora_weights": [True, False, "gaussian"],  # others change W itself
    "alpha_pattern": [{}],
    "modules_to_save": [[]],
    "layer_replication": [[]],
    "trainable_token_indices": [[]],
}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """W x + scale B A x, with W as it stood in the model and under its old name; A and B are kept in fp32.

    LoRA, arXiv 2106.09685; the scale is alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732).
    """

    def __init__(self, linear, rank, alpha, dropout, rslora):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.active, self.merged, self.original = True, False, None

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x):  # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)
        if self.merged or not self.active:
            return y
        narrow = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., rank)
        return y + F.linear(narrow, self.lora_B.to(x.dtype)) * self.scale

    @torch.no_grad()
    def merge(self):
        if not self.merged:
            self.original = self.weight.data  # kept: taking the product off again would not give the same bits
            self.weight.data = (self.original.float() + self.scale * self.lora_B @ self.lora_A).to(self.original.dtype)
            self.merged = True

    def unmerge(self):
        if self.merged:
            self.weight.data, self.original, self.merged = self.original, None, False


def lora_layers(model):
    """{hub name: LoRALinear} in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model):
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def add_lora(model, rank, alpha, targets=None, dropout=0.0, rslora=False):
    """Put LoRA on linear layers and freeze everything else, in place.

    targets: None, the seven projections of every text block; names, these projections of every text block; or one regular
      expression over whole module names, which may reach the vision tower too. Raises InputError where nothing matches.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise InputError(f"found LoRA rank {rank}, alpha {alpha}, dropout {dropout}, expected rank >= 1, alpha > 0, 0 <= dropout < 1")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(targets, str):
        chosen = [n for n in linear if any(re.fullmatch(targets, alias) for alias in (n, library_name(n)))]
    else:
        text = [name for name in linear if name.startswith("model.layers.")]
        chosen = [name for name in text if name.rpartition(".")[2] in (targets or TEXT_TARGETS)]
    if not chosen:
        raise InputError(f"found no linear layer that matches the LoRA targets {targets!r}, expected one at least")
    model.requires_grad_(False)
    for name in chosen:
        wrap(model, name, rank, alpha, dropout, rslora)
    return model


def wrap(model, name, rank, alpha, dropout, rslora):
    owner, _, leaf = name.rpartition(".")
    layer = LoRALinear(model.get_submodule(name), rank, alpha, dropout, rslora)
    setattr(model.get_submodule(owner), leaf, layer)


def set_trainable(model, vision, text=True):
    """Train or freeze the vision tower with its merger, and the text model; with LoRA the weights under it stay frozen."""
    adapted = bool(lora_layers(model))
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            p.requires_grad_(vision if name.startswith("visual.") else text and not adapted)


def merge_lora(model):
    """Add every adapter to its weight, so that the model runs at its old speed; `unmerge_lora` restores the exact weights."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model):
    for layer in lora_layers(model).values():
        layer.unmerge()


@contextmanager
def adapter_off(model):
    """The model without its adapters, as the reference policy; merged ones are taken off and put back."""
    layers = lora_layers(model).values()
    before = [(layer, layer.active, layer.merged) for layer in layers]
    unmerge_lora(model)
    for layer in layers:
        layer.active = False
    try:
        yield model
    finally:
        for layer, active, merged in before:
            layer.active = active
            if merged:
                layer.merge()


def save_adapter(model, folder):
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them: in-library names, a regular expression."""
    layers = lora_layers(model)
    if not layers:
        raise InputError(f"{folder}: found no LoRA in the model, expected add_lora first")
    first = next(iter(layers.values()))
    prefix = "base_model.model."
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{prefix}{library_name(name)}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"{prefix}{library_name(name)}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    whole = [n for n, m in model.named_modules() if n.startswith("model.layers.") and n.rpartition(".")[2] in leaves]
    if set(whole) == set(layers):
        pattern = rf".*language_model.*\.({'|'.join(leaves)})"
    else:
        pattern = "|".join(re.escape(library_name(name)) for name in layers)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.source) if model.source is not None else None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "bias": "none",
        "target_modules": pattern,
        "inference_mode": True,
    }
    with replacing(folder) as new:
        write_tensors(tensors, new / "adapter_model.safetensors")
        write_json(config, new / "adapter_config.json")


def load_adapter(model, folder):
    """Read an adapter in PEFT's format, with in-library or hub names, into the model; LoRA is added where it is absent.

    Raises InputError that names the file and the tensors that do not fit, or the option of PEFT that this file knows nothing of.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: found peft_type {config.get('peft_type')!r}, expected 'LORA'")
    for key, known in PLAIN_LORA.items():
        if config.get(key) not in (None, *known):
            raise InputError(f"{path}: found {key} = {config[key]!r}, expected plain LoRA ({known[0]!r})")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise InputError(f"{path}: found lora_alpha = {config.get('lora_alpha')!r}, expected a number")

    file = TensorFile(folder / "adapter_model.safetensors")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    pairs, faults = {}, []
    for stored, (_, shape, _, _) in file.entries.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", stored)
        name = hub_name(match[1]) if match else None
        if name not in linear:
            faults.append(f"unexpected {stored}")
            continue
        width = linear[name].in_features if match[2] == "A" else linear[name].out_features
        if len(shape) != 2 or shape[match[2] == "A"] != width:
            faults.append(f"{stored} of shape {list(shape)} for a layer of width {width}")
        else:
            pairs.setdefault(name, {})[match[2]] = stored, shape[match[2] == "B"]
    layers = lora_layers(model)
    for name, pair in pairs.items():
        ranks = {rank for _, rank in pair.values()} | ({layers[name].rank} if name in layers else set())
        if len(pair) < 2 or len(ranks) > 1:
            faults.append(f"lora_{' and '.join(sorted(pair))} of {name} with rank {' and '.join(map(str, ranks))}")
    faults += [f"missing {name}" for name in layers if name not in pairs]
    faults += [f"unexpected {name}" for name in pairs if layers and name not in layers]
    if faults or not pairs:
        raise InputError(f"{file.path}: found tensors that do not fit the model: {'; '.join(faults) or 'none at all'}")

    unmerge_lora(model)
    if not layers:
        model.requires_grad_(False)
    for name, pair in pairs.items():
        if not layers:
            wrap(model, name, pair["A"][1], config["lora_alpha"], config.get("lora_dropout") or 0.0, False)
        layer = model.get_submodule(name)
        layer.alpha, layer.rslora = config["lora_alpha"], bool(config.get("use_rslora"))
        for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            parameter.data.copy_(file.read(pair[side][0], parameter.device, parameter.dtype))
    return model


# -- 8. processor -------------------------------------------------------------------------------------------------------

SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>".split()
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# What the official chat template says between its {% %} and {{ }}, but for the system message, which may be another.
TEMPLATE = {"<|im_start|>", "<|im_end|>", "<|im_start|>assistant", PICTURE, PICTURE.replace("image", "video")}
TEMPLATE |= {"Picture", "Video", ":"}  # its numbering of pictures, off unless asked for


def to_rgb(image):
    """Any PIL.Image as RGB: transparency on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path):
    """A picture file as an upright RGB PIL.Image. Raises InputError that names the file where it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise anything on damaged files
        raise InputError(f"{path}: found {type(error).__name__} ({error}), expected a readable picture") from None


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Sides in multiples of `factor`, close to the old aspect ratio, with an area within the limits. All in pixels."""
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise InputError(f"found a picture of {width}x{height} pixels, expected an aspect ratio of 200 at most")
    h, w = round(height / factor) * factor, round(width / factor) * factor  # banker's rounding: 70 -> 56
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


@dataclass
class Encoded:
    """A chat as the model reads it."""

    input_ids: torch.Tensor  # (T,) int64, with as many image tokens per picture as it has merged tokens
    pixel_values: torch.Tensor | None  # (N, 1176) fp32
    grid_thw: torch.Tensor | None  # (n, 3) int64


class Processor:
    """Pictures to patches, messages to tokens, tokens to text."""

    @classmethod
    def from_pretrained(cls, path_or_hub_id):
        """Read tokenizer.json, preprocessor_config.json and the chat template of a checkpoint.

        Raises InputError where a special token is missing, a key is, or the template is not Qwen2.5-VL's.
        """
        self, folder = cls(), find_folder(path_or_hub_id)
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise InputError(f"{path}: found {error}, expected a tokenizer of the tokenizers library") from None
        ids = {token: self.tokenizer.token_to_id(token) for token in SPECIAL}
        if missing := [token for token, id in ids.items() if id is None]:
            raise InputError(f"{path}: found no {', '.join(missing)}, expected Qwen2.5-VL's special tokens")
        if (folder / "config.json").is_file():
            told = read_json(folder / "config.json").get("image_token_id", ids["<|image_pad|>"])
            if told != ids["<|image_pad|>"]:
                raise InputError(f"{path}: found id {ids['<|image_pad|>']} of <|image_pad|>, expected {told} as in config.json")
        self.image_pad_id, self.video_pad_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
        self.vision_start_id, self.vision_end_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
        self.pad_id = ids["<|endoftext|>"]
        self.stop_ids = [ids["<|im_end|>"], ids["<|endoftext|>"]]
        self.banned_ids = [ids[token] for token in SPECIAL[3:]]

        path = folder / "preprocessor_config.json"
        nested = not path.is_file() and (folder / "processor_config.json").is_file()
        path = folder / "processor_config.json" if nested else path
        options = read_json(path).get("image_processor", {}) if nested else read_json(path)
        size = options.get("size") or {}
        found = {
            "min_pixels": options.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": options.get("max_pixels") or size.get("longest_edge"),
            **{key: options.get(key) for key in ("patch_size", "temporal_patch_size", "merge_size")},
        }
        for key, value in found.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{path}: found {key} = {value!r}, expected a positive integer")
            setattr(self, key, value)
        for key in ("image_mean", "image_std"):
            if not isinstance(options.get(key), list) or len(options[key]) != 3:
                raise InputError(f"{path}: found {key} = {options.get(key)!r}, expected three numbers")
            setattr(self, key, np.array(options[key], dtype=np.float32))
        self.system = self.read_template(folder)
        return self

    def read_template(self, folder):
        """The system message of the checkpoint's chat template, None where it adds none."""
        default = "You are a helpful assistant."
        path = folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.is_file() else None
        for name in ("chat_template.json", "tokenizer_config.json"):
            if template is None and (folder / name).is_file():
                path = folder / name
                template = read_json(path).get("chat_template")
        if template is None:
            return default
        said = {literal.strip() for literal in re.split(r"\{[%{#].*?[%}#]\}", template, flags=re.DOTALL)} - {""}
        systems = [text for text in said if text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>")]
        if not {"<|im_end|>", PICTURE} <= said or said - TEMPLATE - set(systems) or len(systems) > 1:
            raise InputError(f"{path}: found a chat template of another kind, expected Qwen2.5-VL's ChatML")
        return systems[0][len("<|im_start|>system\n") : -len("<|im_end|>")] if systems else None

    def images(self, pictures):
        """Patches (N, 1176) fp32 of a list of PIL.Images and their grids (n, 3) int64 as (1, height, width) in patches."""
        patches, grids = [], []
        for image in map(to_rgb, pictures):
            limits = self.min_pixels, self.max_pixels
            h, w = smart_resize(image.height, image.width, self.patch_size * self.merge_size, *limits)
            image = image.resize((w, h), Image.Resampling.BICUBIC)
            pixels = (np.asarray(image, dtype=np.float32) / 255 - self.image_mean) / self.image_std  # (h, w, 3)
            blocks = "(h a p) (w b q) c -> (h w a b) c p q"  # merge block by merge block
            patch = rearrange(pixels, blocks, a=self.merge_size, b=self.merge_size, p=self.patch_size, q=self.patch_size)
            patch = np.repeat(patch[:, :, None], self.temporal_patch_size, axis=2)  # (N, 3, 2, 14, 14)
            patches.append(patch.reshape(len(patch), -1))
            grids.append((1, h // self.patch_size, w // self.patch_size))
        return torch.from_numpy(np.concatenate(patches)), torch.tensor(grids)

    def chat(self, messages, add_generation_prompt=False):
        """The text of a chat in ChatML, with one image token per picture; what the official template gives.

        messages: [{"role", "content"}], the content a string or a list of {"type": "text", "text"} and {"type": "image", "image"}.
        """
        text = ""
        if self.system is not None and (not messages or messages[0].get("role") != "system"):
            text += f"<|im_start|>system\n{self.system}<|im_end|>\n"
        for message in messages:
            body = "".join(part["text"] if part["type"] == "text" else PICTURE for part in parts(message))
            text += f"<|im_start|>{message['role']}\n{body}<|im_end|>\n"
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def encode(self, messages, add_generation_prompt=False):
        """Tokens of a chat and the patches of its pictures (paths or PIL.Images), as `Encoded`."""
        ids = self.tokenizer.encode(self.chat(messages, add_generation_prompt), add_special_tokens=False).ids
        pictures = [part["image"] for message in messages for part in parts(message) if part["type"] == "image"]
        pictures = [image if isinstance(image, Image.Image) else open_image(image) for image in pictures]
        if ids.count(self.image_pad_id) != len(pictures):
            raise InputError(f"found {ids.count(self.image_pad_id)} image tokens in the chat, expected {len(pictures)}, one a picture")
        if not pictures:
            return Encoded(torch.tensor(ids), None, None)
        pixel_values, grid_thw = self.images(pictures)
        counts = iter((grid_thw.prod(1) // self.merge_size**2).tolist())
        ids = [copy for id in ids for copy in [id] * (next(counts) if id == self.image_pad_id else 1)]
        return Encoded(torch.tensor(ids), pixel_values, grid_thw)

    def decode(self, ids):
        """Text of token ids, without special tokens such as <|im_end|>."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)


def parts(message):
    """The content of a message as a list of {"type": "text" | "image", ...}."""
    content = message.get("content")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list) or not all(isinstance(part, dict) and part.get("type") in part for part in content):
        raise InputError(f"found a message with content {content!r:.80}, expected a text or a list of text and image parts")
    return content


# -- 9. commands --------------------------------------------------------------------------------------------------------


def describe(path):
    """Print the architecture of a checkpoint, from its config alone: sizes, parameters by part, memory."""
    folder = find_folder(path)
    config = Config.from_json(read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        model = Qwen25VL(config)
    vision, count = config.vision, lambda module: sum(p.numel() for p in module.parameters())
    rows = {
        "vision tower": count(model.visual) - count(model.visual.merger),
        "merger": count(model.visual.merger),
        "embedding": count(model.model.embed_tokens),
        "text blocks": count(model.model) - count(model.model.embed_tokens),
        "head": 0 if config.tie_word_embeddings else count(model.lm_head),
    }
    total = sum(rows.values())
    print(f"{path}: Qwen2.5-VL with {total:,} parameters")
    print(f"  vision: {vision.depth} blocks, width {vision.hidden_size}, {vision.num_heads} heads, windows of {vision.window_size} px,")
    print(f"          full attention in blocks {', '.join(map(str, vision.fullatt_block_indexes))}")
    print(f"  text:   {config.num_hidden_layers} blocks, width {config.hidden_size}, {config.num_attention_heads} heads sharing")
    print(f"          {config.num_key_value_heads} keys and values, M-RoPE sections {list(config.mrope_section)}, {config.vocab_size:,} tokens")
    for name, size in rows.items():
        tied = " (tied to the embedding)" if name == "head" and not size else ""
        print(f"  {name:<14}{size:>18,}{size / total:>7.1%}{tied}")
    add_lora(model, rank := 64, alpha=128)
    adapter = sum(p.numel() for p in lora_parameters(model))
    gigabytes = 2 * total / 1e9
    print(f"  weights in bf16      {gigabytes:.2f} GB")
    print(f"  LoRA of rank {rank}      {adapter:,} parameters; training holds {gigabytes + 16 * adapter / 1e9:.2f} GB and activations")
    print("                       (bf16 weights; adapter, gradient and two Adam moments in fp32)")


@torch.inference_mode()
def chat(path, image, adapter, max_tokens):
    """Answer the lines of standard input, greedily, each answer streamed as it comes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(path, device, torch.bfloat16 if device == "cuda" else torch.float32)
    processor = Processor.from_pretrained(path)
    if adapter:
        merge_lora(load_adapter(model, adapter))
    pictures = [{"type": "image", "image": open_image(image)}] if image else []
    messages = []
    print("Ask; an empty line or Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if not line.strip():
            break
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": line.strip()}]})
        pictures = []  # shown with the first question
        prompt = processor.encode(messages, add_generation_prompt=True)
        inputs = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw}
        inputs = {name: value.to(device) for name, value in inputs.items() if value is not None}
        ids, answer, text, cache = prompt.input_ids[None].to(device), [], "", Cache()
        while len(answer) < max_tokens:
            ids = model.logits(model(ids, cache=cache, **inputs)[:, -1]).argmax(-1, keepdim=True)  # (1, 1)
            inputs = {}
            if ids.item() in processor.stop_ids:
                break
            answer.append(ids.item())
            longer = processor.decode(answer)
            if not longer.endswith("\N{REPLACEMENT CHARACTER}"):  # else the bytes of a character are still coming
                print(longer[len(text) :], end="", flush=True)
                text = longer
        print(flush=True)
        messages.append({"role": "assistant", "content": processor.decode(answer)})


def main():
    parser = argparse.ArgumentParser(description="Look at a Qwen2.5-VL checkpoint, or talk to it.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--describe", metavar="PATH", help="print sizes, parameters and memory of a checkpoint (folder or hub id)")
    what.add_argument("--chat", metavar="PATH", help="answer the lines of standard input with a checkpoint (folder or hub id)")
    parser.add_argument("--image", metavar="FILE", help="with --chat: a picture shown with the first question (default: none)")
    parser.add_argument("--adapter", metavar="FOLDER", help="with --chat: a LoRA adapter in PEFT's format (default: none)")
    parser.add_argument("--max-tokens", type=int, default=512, help="with --chat: longest answer, in tokens (default: %(default)s)")
    args = parser.parse_args()
    if args.describe:
        describe(args.describe)
    else:
        chat(args.chat, args.image, args.adapter, args.max_tokens)


if __name__ == "__main__":
    command(main)
