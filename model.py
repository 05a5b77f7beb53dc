"""Qwen2.5-VL in one file: what the model computes, how it is stored, and how pictures and chats become its input.

    1. Config           sizes, from any of the three layouts of config.json
    2. Vision tower     patches -> windows -> blocks -> merged tokens
    3. Text model       grouped-query attention, M-RoPE, SwiGLU
    4. Qwen25VL         pictures into text, positions, masks, the head
    5. Cache            keys and values of what was read
    6. Load and save    safetensors in the hub's names
    7. LoRA             adapters by hand, in PEFT's file format
    8. Processor        pictures -> patches, messages -> tokens

    python model.py --describe PATH | --chat PATH [--image FILE] [--adapter FOLDER]

Axes: B batch, T tokens, S keys, H heads, G kv heads, K head dim, D width, N patches, M merged tokens (4 patches each),
V vocab. Architecture: Qwen2.5-VL Technical Report, arXiv 2502.13923. Parameters are named as on the hub.
"""

import math
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import InputError, command
from support.files import TensorFile, check_tensors, expect, find_folder, read, read_json, replacing, write_json

# -- 1. config --------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Config:
    """Sizes of one model; `raw` is the config.json they were read from, which `save_pretrained` writes back."""

    vision: VisionConfig
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple  # frequencies per axis of the position (time, height, width); they sum to half the head dim
    tie_word_embeddings: bool
    image_token_id: int
    raw: dict = field(repr=False)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, raw, where="config.json"):
        """Read a parsed config.json: flat as on the hub, with `text_config`, or with `text_config.rope_parameters`.

        Raises InputError that names the key at fault, what it holds, and `where`.
        """
        text = {**raw, **read(raw, "text_config", dict, where, default={})}
        rope = read(text, "rope_parameters" if text.get("rope_parameters") else "rope_scaling", dict, where, default={})
        vision = read(raw, "vision_config", dict, where)
        vision = {"in_channels": vision.get("in_chans"), **vision}

        def sizes(cls, section):
            plain = [each for each in fields(cls) if each.type in (int, float, tuple)]
            return {f.name: read(section, f.name, f.type, where, getattr(cls, f.name, None)) for f in plain}

        tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        tower = VisionConfig(**sizes(VisionConfig, vision))
        config = cls(vision=tower, **sizes(cls, {**text, **rope}), tie_word_embeddings=tied, raw=raw)
        kind, sliding = rope.get("rope_type", rope.get("type", "mrope")), text.get("use_sliding_window")
        expect(where, "rope type", kind, kind in ("mrope", "default"), "'mrope'")
        expect(where, "use_sliding_window", sliding, not sliding, "false")
        for part in (text, vision):
            expect(where, "hidden_act", part.get("hidden_act"), part.get("hidden_act") in ("silu", None), "'silu'")
        heads, side = config.num_attention_heads, tower.patch_size * tower.spatial_merge_size
        for part, key, fits, expected in (
            (config, "hidden_size", lambda n: n % (2 * heads) == 0, f"a multiple of twice the {heads} heads"),
            (config, "num_key_value_heads", lambda n: heads % n == 0, f"a divisor of the {heads} heads"),
            (config, "mrope_section", lambda s: 2 * sum(s) == config.head_dim, "a sum of half the head dim"),
            (tower, "hidden_size", lambda n: n % (4 * tower.num_heads) == 0, "a multiple of 4 x num_heads"),
            (tower, "out_hidden_size", lambda n: n == config.hidden_size, f"hidden_size = {config.hidden_size}"),
            (tower, "window_size", lambda n: n >= side, f"a merged token, {side}, at least"),
        ):
            expect(where, key, getattr(part, key), fits(getattr(part, key)), expected)
        return config


# -- 2. vision tower --------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, times the weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


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
    """Rotary embedding: the pair (x[i], x[i + K/2]) turns by angle i. x: (..., K); cos, sin: (..., K/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def run(block, *inputs, keep):
    """A block that keeps its activations for the backward pass, or computes them there again (checkpointing)."""
    if keep or not torch.is_grad_enabled():
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False)


@dataclass(frozen=True)
class Arrangement:
    """An order of patches in which those that attend to each other are neighbours, and groups of one size as well.

    So attention needs no mask: each run of `count` groups of `length` patches is one dense batch.
    """

    order: torch.Tensor  # (N,) the patch at each place
    cos: torch.Tensor  # (N, K/2) fp32, in this order
    sin: torch.Tensor
    runs: tuple  # of (count, length)


@lru_cache(maxsize=8)
def arrange(grids, config, device):
    """Arrange a batch of pictures by window and by frame; grids: ((t, h, w), ...) in patches.

    The patches of a picture come merge block by merge block, (t, h/2, w/2, 2, 2); no order here breaks up a block.
    Returns (windows, frames, window -> frame order (N,), frame -> window order (N,), window -> picture order (M,)).
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

    spread = config.hidden_size // config.num_heads // 2  # half of the head dim turns with the row, half with column
    frequency = 1.0 / 10000.0 ** (torch.arange(0, spread, 2, dtype=torch.float) / spread)  # (K/4,)
    angles = torch.from_numpy(np.concatenate(places)).float()[:, :, None] * frequency  # (N, 2, K/4)
    angles = angles.flatten(1)  # (N, K/2)

    def arrangement(groups):
        groups = sorted(groups, key=len)
        patches = np.concatenate(groups)[:, None] * merge**2 + np.arange(merge**2)  # (M, 4)
        order = torch.from_numpy(patches.ravel())  # (N,)
        runs = tuple((len(list(run)), length * merge**2) for length, run in groupby(map(len, groups)))
        return Arrangement(order.to(device), angles[order].cos().to(device), angles[order].sin().to(device), runs)

    with torch.inference_mode(False):  # kept for later calls, which may train
        windows, frames = arrangement(windows), arrangement(frames)
        back = windows.order.argsort()  # (N,)
        to_frames, to_windows = back[frames.order], frames.order.argsort()[windows.order]
        return windows, frames, to_frames, to_windows, back[:: merge**2] // merge**2


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
        return self.proj(torch.cat(outputs))  # (N, D)


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
    """Stored as a 3-D convolution whose stride is its kernel, which is a linear map of each patch."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches):  # (N, 1176) -> (N, D)
        weight = self.proj.weight.flatten(1)  # (D, 1176)
        return F.linear(patches.to(weight.dtype), weight)


class Merger(nn.Module):
    """Four neighbouring patches become one token of the text model."""

    def __init__(self, config):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)
        inner, outer = nn.Linear(self.width, self.width), nn.Linear(self.width, config.out_hidden_size)
        self.mlp = nn.Sequential(inner, nn.GELU(), outer)

    def forward(self, x):  # (N, vision D) -> (M, D)
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
        """Pictures as the text model reads them: (M, D) merged tokens, picture after picture, row by row.

        pixel_values: (N, 1176) patches of all pictures, as `Processor.images` orders them; grid_thw: (n, 3) in patches.
        Raises InputError where the two disagree.
        """
        grids = tuple(map(tuple, grid_thw.tolist()))
        patches = sum(t * h * w for t, h, w in grids)
        if len(pixel_values) != patches:
            raise InputError(f"found {len(pixel_values)} patches in pixel_values, expected {patches} as in grid_thw")
        windows, frames, to_frames, to_windows, to_pictures = arrange(grids, self.config, pixel_values.device)
        keep = not self.checkpointing
        x = self.patch_embed(pixel_values.index_select(0, windows.order))  # (N, vision D)
        for i, block in enumerate(self.blocks):
            if i in self.config.fullatt_block_indexes:
                x = run(block, x.index_select(0, to_frames), frames.cos, frames.sin, frames.runs, keep=keep)
                x = x.index_select(0, to_windows)
            else:
                x = run(block, x, windows.cos, windows.sin, windows.runs, keep=keep)
        return self.merger(x).index_select(0, to_pictures)  # (M, D)


# -- 3. text model ----------------------------------------------------------------------------------------------------

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each new shape for a second, and nearly every batch has one


def attend(q, k, v, mask=None):
    """softmax(q k' / sqrt(K)) v under a mask, or without one causally: the last query sees every key.

    q: (B, H, T, K); k, v: (B, G, S, K); mask: None, or bool (B, 1, T, S), true where a query sees a key.
    Returns (B, H, T, K).
    """
    H, T, G, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if T == 1 and H != G:  # the heads that share keys become the queries of one attention: no copy of the keys per head
        q = rearrange(q, "b (g r) 1 k -> b g r k", g=G)
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b g r k -> b (g r) 1 k")
    if mask is None and T < S:  # new tokens after held ones; SDPA's own causal mask aligns with the first key
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None and q.is_cuda and H != G:  # no fused kernel of CUDA takes both a mask and shared heads
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        G = H
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != G)


class Attention(nn.Module):
    """Projections with the rotary embedding; which keys are seen, and where they lie, is the block's and its cache's."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width, shared = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, shared)
        self.v_proj = nn.Linear(width, shared)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin):
        """Queries (B, H, T, K), keys and values (B, G, T, K)."""
        q = rotate(rearrange(self.q_proj(x), "b t (h k) -> b h t k", k=self.head_dim), cos, sin)
        k = rotate(rearrange(self.k_proj(x), "b t (g k) -> b g t k", k=self.head_dim), cos, sin)
        return q, k, rearrange(self.v_proj(x), "b t (g k) -> b g t k", k=self.head_dim)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.self_attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache):
        q, k, v = self.before_attention(x, cos, sin)
        y = attend(q, k, v, mask) if cache is None else cache.attend(self.layer, q, k, v, mask)  # (B, H, T, K)
        return self.after_attention(x, y)

    def before_attention(self, x, cos, sin):
        return self.self_attn(self.input_layernorm(x), cos, sin)

    def after_attention(self, x, y):
        x = x + self.self_attn.o_proj(rearrange(y, "b h t k -> b t (h k)"))
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # a draw on the meta device takes seconds: torch imports its compiler for it
            nn.init.normal_(self.weight, std=0.02)


class TextModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, position_ids, mask, cache):  # x (B, T, D), position_ids (3, B, T), mask as in `attend`
        cos, sin = self.rope(position_ids, x.dtype)
        for block in self.layers:
            x = run(block, x, cos, sin, mask, cache, keep=not self.checkpointing)
        return self.norm(x)

    def rope(self, position_ids, dtype):
        """M-RoPE: each frequency turns with one axis of the position, by sections (time, height, width).

        position_ids: (3, B, T). Returns cos and sin, each (B, 1, T, K/2); the angles themselves are fp32.
        """
        half = self.config.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float, device=position_ids.device) / half
        frequency = 1.0 / self.config.rope_theta**exponent  # (K/2,)
        sections = enumerate(self.config.mrope_section)
        turning = [position_ids[i % 3, :, None, :, None].expand(-1, -1, -1, width) for i, width in sections]
        angles = torch.cat(turning, -1).float() * frequency  # (B, 1, T, K/2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


# -- 4. the model -----------------------------------------------------------------------------------------------------


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
        """Logits of the next token (..., V) from hidden states (..., D). A GPU makes fp32 of halves, without gradient."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            logits = torch.mm(hidden.flatten(0, -2), self.head_weight.T, out_dtype=torch.float32)
            return logits.unflatten(0, hidden.shape[:-1])
        return F.linear(hidden, self.head_weight)

    def enable_gradient_checkpointing(self, flag=True):
        """Compute every block again in the backward pass instead of keeping its activations."""
        self.visual.checkpointing = self.model.checkpointing = flag

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_thw=None,
        position_ids=None,
        cache=None,
        *,
        image_embeds=None,
    ):
        """Hidden states (B, T, D) after the final norm.

        input_ids: (B, T), with every picture as a run of image tokens. `pixel_values` (N, 1176) and `image_grid_thw`
          (n, 3) hold all pictures of the batch in reading order; `image_embeds` (M, D) what `visual` made of them.
        attention_mask: None, everything is read, causally; (B, T), with a cache (B, held + T), 0 at padding on either
          side; or bool (B, T, S), what each position sees, itself at least, together with its `position_ids` (3, B, T).
        cache: an object like `Cache`. Without `position_ids`, positions go on where its last token stood.
        Raises InputError where image tokens and pictures do not match.
        """
        T, held = input_ids.shape[1], 0 if cache is None else cache.length
        x = self.model.embed_tokens(input_ids)  # (B, T, D)
        if pixel_values is not None:
            image_embeds = self.visual(pixel_values, image_grid_thw)  # (M, D)
        if image_embeds is not None:
            here = input_ids == self.config.image_token_id  # (B, T)
            if (found := int(here.sum())) != len(image_embeds):
                raise InputError(f"found {found} image tokens in input_ids, expected {len(image_embeds)} features")
            x = x.masked_scatter(here[..., None], image_embeds.to(x.dtype))
        if position_ids is None:
            new = None if attention_mask is None else attention_mask[:, -T:]
            position_ids, delta = self.positions(input_ids, new, image_grid_thw)
            if cache is not None:
                position_ids = position_ids + cache.position
                cache.position = cache.position + delta[:, None] + (T if new is None else new.sum(1, keepdim=True))
        return self.model(x, position_ids, self.visible(attention_mask, T, held), cache)

    def visible(self, attention_mask, T, held):
        """What T tokens see after `held` old ones: bool (B, 1, T, held + T), or None where causality says it all."""
        if attention_mask is None:
            return None
        if attention_mask.dim() == 3:
            return attention_mask[:, None].bool()
        read = attention_mask.bool()  # (B, held + T)
        if bool(read.all()) or held == 0 and bool((read[:, 1:] <= read[:, :-1]).all()):
            return None  # padding on the right only: no token before it looks that far
        causal = torch.ones(T, held + T, dtype=torch.bool, device=read.device).tril(held)
        itself = causal.triu(held)  # padding sees itself: a softmax over nothing is not a number
        return causal & read[:, None, None] | itself

    def positions(self, input_ids, attention_mask=None, image_grid_thw=None):
        """M-RoPE positions: text counts up on all axes, a picture spans (time, height, width) from where it starts.

        input_ids: (B, T); attention_mask: (B, T) or None, masked tokens count nothing; image_grid_thw: (n, 3), patches.
        Returns position_ids (3, B, T), 0 where masked, and delta (B,): the next token's position is the number of
        unmasked ones plus delta. Raises InputError where image tokens and grids do not match.
        """
        read = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        image = (input_ids == self.config.image_token_id) & read  # (B, T)
        merge = self.config.vision.spatial_merge_size
        grids = [] if image_grid_thw is None else image_grid_thw.tolist()
        grids = [(t, h // merge, w // merge) for t, h, w in grids]  # in merged tokens
        sizes = [t * h * w for t, h, w in grids]
        if (found := int(image.sum())) != sum(sizes):
            raise InputError(f"found {found} image tokens in input_ids, expected {sum(sizes)} for {len(grids)} grids")

        advance = (read & ~image).long()  # (B, T) by how much each token moves the position on
        if grids:  # a picture does so at its end, by its longer side
            ends = image.flatten().nonzero()[np.cumsum(sizes) - 1, 0]  # (n,)
            advance.view(-1)[ends] = torch.tensor([max(h, w) for _, h, w in grids], device=ends.device)
        position_ids = (advance.cumsum(1) - advance).expand(3, -1, -1).clone()  # (3, B, T)
        if grids:
            offsets = np.concatenate([np.indices(grid).reshape(3, -1) for grid in grids], axis=1)  # (3, M)
            position_ids[:, image] += torch.from_numpy(offsets).to(position_ids.device)
        return position_ids * read, advance.sum(1) - read.sum(1)


# -- 5. cache ---------------------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of everything read so far.

    The model calls `attend` once per layer, reads `length` (tokens held), and, where nobody passes `position_ids`,
    keeps in `position` (B, 1) where the next token stands. Any object with these can take its place.
    """

    def __init__(self):
        self.held = {}  # layer -> its keys and values, each (B, G, S, K)
        self.length = 0
        self.position = 0

    def attend(self, layer, q, k, v, mask):
        """Append k, v (B, G, T, K), then attend with q (B, H, T, K) to all that is held; mask as in `attend` above."""
        if layer in self.held:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.held[layer], (k, v)))
        self.held[layer] = k, v
        self.length = k.shape[2]
        return attend(q, k, v, mask)


# -- 6. load and save -------------------------------------------------------------------------------------------------

SHARD_BYTES, INDEX = 5 * 10**9, "model.safetensors.index.json"


def hub_name(name):
    """The hub's name of a parameter, given that or the in-library one (model.language_model.*, model.visual.*)."""
    return re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", name))


def library_name(name):
    """The in-library name, which PEFT's files use, of a hub name."""
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name))


def load_pretrained(path_or_hub_id, device="cpu", dtype=torch.float32):
    """The model of a checkpoint, on `device` in `dtype`, read tensor by tensor from the mapped files.

    path_or_hub_id: a folder with config.json and safetensors (one or sharded, hub or in-library names), or a hub id.
    Raises InputError for a bad config or file, and names every missing, unexpected and mis-shaped tensor.
    """
    folder = find_folder(path_or_hub_id)
    config = Config.from_json(read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        model = Qwen25VL(config)
    model.source = folder

    names = {"model.safetensors"}
    if (folder / INDEX).is_file():
        names = set(map(str, read(read_json(folder / INDEX), "weight_map", dict, folder / INDEX).values()))
    files = [TensorFile(folder / name) for name in sorted(names)]
    where = {hub_name(name): (file, name) for file in files for name in file.entries}
    head = where.pop("lm_head.weight", None) if config.tie_word_embeddings else None  # some store a tied head as well
    expected = {name: p.shape for name, p in model.named_parameters()}
    check_tensors(folder, expected, {name: file.entries[stored]["shape"] for name, (file, stored) in where.items()})
    for name, (file, stored) in where.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(file.read(stored, device, dtype)))
    if head:
        pair = head, where["model.embed_tokens.weight"]
        if not torch.equal(*(file.read(name, "cpu", dtype) for file, name in pair)):
            raise InputError(
                f"{folder}: found an lm_head.weight of its own, expected the embedding, as the two are tied"
            )
    return model


def save_pretrained(model, folder):
    """Write a checkpoint that transformers and vLLM load: hub names, shards above 5 GB, the source's tokenizer files.

    The folder appears whole or stays as it was. Raises InputError while LoRA is not merged into the weights.
    """
    if any(layer.state != "merged" for layer in lora_layers(model).values()):
        raise InputError(f"{folder}: found LoRA beside the weights, expected merge_lora first, or save_adapter")
    shards, sizes = [{}], [0]
    for name, p in model.named_parameters():
        if ".lora_" in name:
            continue
        if shards[-1] and sizes[-1] + p.nbytes > SHARD_BYTES:
            shards, sizes = [*shards, {}], [*sizes, 0]
        shards[-1][name] = p.detach().contiguous()
        sizes[-1] += p.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    with replacing(folder) as new:
        for name, shard in zip(names, shards):
            save_file(shard, new / name, metadata={"format": "pt"})
        if len(shards) > 1:
            where = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
            write_json(new / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": where})
        dtype = str(model.head_weight.dtype).removeprefix("torch.")
        write_json(new / "config.json", {**model.config.raw, "torch_dtype": dtype})
        for path in Path(model.source).iterdir() if model.source else ():  # tokenizer, processor and chat files
            if path.suffix in (".json", ".jinja", ".txt") and path.name not in ("config.json", INDEX):
                shutil.copyfile(path, new / path.name)


# -- 7. LoRA ----------------------------------------------------------------------------------------------------------

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = {  # what adapter_config.json may say of PEFT's options so that an adapter is W + scale B A
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian"],  # other ways change W itself
    **dict.fromkeys(["use_dora", "lora_bias", "fan_in_fan_out"], [False]),
    **dict.fromkeys(["rank_pattern", "alpha_pattern"], [{}]),
    **dict.fromkeys(["modules_to_save", "layer_replication", "trainable_token_indices"], [[]]),
}


class LoRALinear(nn.Linear):
    """W x + scale B A x; W keeps its name in the model, A and B are fp32 whatever W is.

    The scale is alpha / rank (arXiv 2106.09685), or with rslora alpha / sqrt(rank) (arXiv 2312.03732).
    The adapter is `beside` the weight, `merged` into it, or `off`.
    """

    def __init__(self, linear, rank, alpha, dropout, rslora):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.state = "beside"

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x):  # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)
        if self.state != "beside":
            return y
        narrow = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., rank)
        return y + self.scale * F.linear(narrow, self.lora_B.to(x.dtype))

    def with_adapter(self):  # (out, in)
        return (self.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)

    @torch.no_grad()
    def become(self, state):
        if state == self.state:
            return
        if self.state == "merged":
            self.weight.data = self.original
        elif state == "merged":
            self.original = self.weight.data  # kept: subtracting the product again would not give the same bits
            self.weight.data = self.with_adapter()
        self.state = state


def linear_layers(model, kind=nn.Linear):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def lora_layers(model):
    return linear_layers(model, LoRALinear)


def lora_parameters(model):
    return [p for name, p in model.named_parameters() if ".lora_" in name]


def add_lora(model, rank, alpha, targets=None, dropout=0.0, rslora=False):
    """Put LoRA on linear layers, in place, and freeze everything else; returns the model.

    targets: None, all seven projections of every text block; a list, those of them by name; a string, one regular
      expression over whole module names, which can reach the vision tower too. Raises InputError where nothing matches.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        found = f"rank {rank}, alpha {alpha}, dropout {dropout}"
        raise InputError(f"LoRA: found {found}, expected rank >= 1, alpha > 0 and dropout in [0, 1)")

    def chosen(name):
        if isinstance(targets, str):
            return re.fullmatch(targets, name) or re.fullmatch(targets, library_name(name))
        return name.startswith("model.layers.") and name.rpartition(".")[2] in (targets or TEXT_TARGETS)

    if any(layer.state != "merged" for layer in lora_layers(model).values()):
        raise InputError("LoRA: found an adapter in the model, expected it merged before another one")
    layers = {name: layer for name, layer in linear_layers(model).items() if chosen(name)}
    if not layers:
        raise InputError(f"LoRA: found no linear layer that fits the targets {targets!r}, expected one at least")
    model.requires_grad_(False)
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, LoRALinear(layer, rank, alpha, dropout, rslora))
    return model


def set_trainable(model, vision, text=True):
    """Train or freeze the vision tower with its merger, and the text model; weights under LoRA's model stay frozen."""
    adapted = bool(lora_layers(model))
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            p.requires_grad_(vision if name.startswith("visual.") else text and not adapted)


def merge_lora(model):
    """Add each adapter to its weight: the model runs at its old speed and can be saved whole."""
    for layer in lora_layers(model).values():
        layer.become("merged")


def unmerge_lora(model):
    """Bring back the weights as they were, to the bit."""
    for layer in lora_layers(model).values():
        layer.become("beside")


@contextmanager
def adapter_off(model):
    """The model without its adapters (the reference policy); merged ones are taken off and put back."""
    before = [(layer, layer.state) for layer in lora_layers(model).values()]
    try:
        for layer, _ in before:
            layer.become("off")
        yield model
    finally:
        for layer, state in before:
            layer.become(state)


def save_adapter(model, folder):
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them, under in-library names."""
    layers = lora_layers(model)
    if not layers:
        raise InputError(f"{folder}: found no LoRA in the model, expected add_lora first")
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    everywhere = {n for n in linear_layers(model) if n.startswith("model.layers.") and n.rpartition(".")[2] in leaves}
    each = "|".join(re.escape(library_name(name)) for name in layers)
    layer = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source and str(model.source),
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout.p,
        "use_rslora": layer.rslora,
        "bias": "none",
        # a plain list of names would have PEFT wrap the vision tower's MLP as well
        "target_modules": rf".*language_model.*\.({'|'.join(leaves)})" if everywhere == layers.keys() else each,
        "inference_mode": True,
    }
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if ".lora_" in name}
    tensors = {f"base_model.model.{library_name(name)}.weight": p for name, p in tensors.items()}
    with replacing(folder) as new:
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(new / "adapter_config.json", config)


def load_adapter(model, folder):
    """Read an adapter in PEFT's format, under in-library or hub names; LoRA is added where the model has none.

    Returns the model. Raises InputError that names the tensors that do not fit, or the PEFT option unknown here.
    """
    folder = find_folder(folder)
    path, config = folder / "adapter_config.json", read_json(folder / "adapter_config.json")
    for key, known in PLAIN.items():
        expect(path, key, config.get(key), config.get(key) in (None, *known), repr(known[0]))
    file = TensorFile(folder / "adapter_model.safetensors")
    stored = {hub_name(re.sub(r"^base_model\.model\.|(\.default)?\.weight$", "", name)): name for name in file.entries}
    present, linear = lora_layers(model), linear_layers(model)
    layers = present or {name: linear[name] for name in sorted({n.rpartition(".")[0] for n in stored} & linear.keys())}
    rank, alpha = read(config, "r", int, path), read(config, "lora_alpha", float, path)
    rank = next(iter(present.values())).rank if present else rank
    expected = {f"{name}.lora_A": (rank, layer.in_features) for name, layer in layers.items()}
    expected |= {f"{name}.lora_B": (layer.out_features, rank) for name, layer in layers.items()}
    check_tensors(file.path, expected, {name: file.entries[stored[name]]["shape"] for name in stored})
    if not present:
        add_lora(model, rank, alpha, "|".join(map(re.escape, layers)), config.get("lora_dropout") or 0.0)
    unmerge_lora(model)
    for layer in lora_layers(model).values():
        layer.alpha, layer.rslora = alpha, bool(config.get("use_rslora"))
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.copy_(file.read(stored[name], p.device, p.dtype))
    return model


# -- 8. processor -----------------------------------------------------------------------------------------------------

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# What the official chat template says between its {% %} and {{ }}, but for the default system message.
TEMPLATE = {"<|im_start|>", "<|im_end|>", "<|im_start|>assistant", PICTURE, PICTURE.replace("image", "video")}
TEMPLATE |= {"Picture", "Video", ":"}  # numbers of the pictures, off unless asked for


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
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise anything on damaged files
        raise InputError(f"{path}: found {type(error).__name__} ({error}), expected a readable picture") from None


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Sides in multiples of `factor`, with an area within the limits, close to the old aspect ratio. All in pixels."""
    if not 0 < max(height, width) <= 200 * min(height, width):
        raise InputError(f"found a picture of {width}x{height} pixels, expected an aspect ratio of 200 at most")
    h, w = round(height / factor) * factor, round(width / factor) * factor  # banker's rounding: 70 -> 56
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def read_template(folder):
    """The default system message of a checkpoint's chat template, None where it has none.

    Raises InputError for a template that is not Qwen2.5-VL's, as only that one is written out here.
    """
    path = next((folder / n for n in ("chat_template.jinja", "chat_template.json") if (folder / n).is_file()), None)
    path = path or folder / "tokenizer_config.json"
    if not path.is_file() or path.suffix == ".json" and not read_json(path).get("chat_template"):
        return "You are a helpful assistant."
    template = path.read_text(encoding="utf-8") if path.suffix == ".jinja" else read_json(path)["chat_template"]
    said = {text.strip() for text in re.split(r"\{[%{#].*?[%}#]\}", str(template), flags=re.DOTALL)} - {""}
    systems = [text for text in said if re.fullmatch(r"<\|im_start\|>system\n.*<\|im_end\|>", text, re.DOTALL)]
    if not {"<|im_end|>", PICTURE} <= said or said - TEMPLATE - set(systems[:1]):
        raise InputError(f"{path}: found a chat template of another kind, expected Qwen2.5-VL's ChatML")
    return systems[0][len("<|im_start|>system\n") : -len("<|im_end|>")] if systems else None


def parts(message):
    """The content of a message as a list of {"type": "text", "text"} and {"type": "image", "image"}."""
    content = message.get("content")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image") or part["type"] not in part:
            raise InputError(f"found {part!r:.80} in a message, expected a text part or an image part")
    return content


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
        """Read a checkpoint's tokenizer.json, preprocessor_config.json and chat template.

        Raises InputError that names the file and the special token, key or template at fault.
        """
        self, folder = cls(), find_folder(path_or_hub_id)
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise InputError(f"{path}: found {error}, expected a tokenizer") from None
        ids = {token: self.tokenizer.token_to_id(token) for token in SPECIAL}
        if missing := [token for token, id in ids.items() if id is None]:
            raise InputError(f"{path}: found no {', '.join(missing)}, expected Qwen2.5-VL's special tokens")
        self.image_pad_id, self.video_pad_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
        told = read_json(folder / "config.json").get("image_token_id")
        expect(path, "<|image_pad|>", self.image_pad_id, self.image_pad_id == told, f"{told} as in config.json")
        self.vision_start_id, self.vision_end_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
        self.pad_id, self.stop_ids = ids["<|endoftext|>"], [ids["<|im_end|>"], ids["<|endoftext|>"]]
        self.banned_ids = [ids[token] for token in SPECIAL[3:]]  # never sampled: pictures come from the prompt only

        path = folder / "preprocessor_config.json"
        options = read_json(path if path.is_file() else folder / "processor_config.json")
        options = options.get("image_processor", options)  # where transformers 5 keeps them
        size = options.get("size") or {}
        options.setdefault("min_pixels", size.get("shortest_edge"))
        options.setdefault("max_pixels", size.get("longest_edge"))
        for key in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            setattr(self, key, read(options, key, int, path))
        for key in ("image_mean", "image_std"):
            value = options.get(key)
            expect(path, key, value, isinstance(value, list) and len(value) == 3, "three numbers")
            setattr(self, key, np.array(value, dtype=np.float32)[:, None])  # (3, 1)
        self.system = read_template(folder)
        return self

    def images(self, pictures):
        """Patches (N, 1176) fp32 of PIL.Images, and their grids (n, 3) int64: (1, height, width) in patches."""
        patches, grids, merge, side = [], [], self.merge_size, self.patch_size
        for image in map(to_rgb, pictures):
            h, w = smart_resize(image.height, image.width, side * merge, self.min_pixels, self.max_pixels)
            levels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))  # (h, w, 3) uint8
            order = "(h a p) (w b q) c -> (h w a b) c (p q)"  # merge block by merge block
            levels = rearrange(levels, order, a=merge, b=merge, p=side, q=side)
            pixels = (levels.astype(np.float32) / 255 - self.image_mean) / self.image_std  # (N, 3, 196)
            patches.append(np.repeat(pixels[:, :, None], self.temporal_patch_size, axis=2).reshape(len(pixels), -1))
            grids.append((1, h // side, w // side))
        return torch.from_numpy(np.concatenate(patches)), torch.tensor(grids)

    def chat(self, messages, add_generation_prompt=False):
        """The text of a chat in ChatML, one image token per picture, as the official template writes it.

        messages: [{"role", "content"}], the content a string or a list of text and image parts (see `parts`).
        """
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        text = ""
        for message in messages:
            said = "".join(part["text"] if part["type"] == "text" else PICTURE for part in parts(message))
            text += f"<|im_start|>{message['role']}\n{said}<|im_end|>\n"
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def encode(self, messages, add_generation_prompt=False):
        """Tokens of a chat and patches of its pictures: paths, PIL.Images, or what `images` made of one. -> `Encoded`."""
        ids = self.tokenizer.encode(self.chat(messages, add_generation_prompt), add_special_tokens=False).ids
        pictures = [part["image"] for message in messages for part in parts(message) if part["type"] == "image"]
        pictures = [image if isinstance(image, (Image.Image, tuple)) else open_image(image) for image in pictures]
        if (found := ids.count(self.image_pad_id)) != len(pictures):
            raise InputError(f"found {found} image tokens in a chat, expected {len(pictures)}, one a picture")
        if not pictures:
            return Encoded(torch.tensor(ids), None, None)
        scaled = [image if isinstance(image, tuple) else self.images([image]) for image in pictures]
        pixel_values, grid_thw = map(torch.cat, zip(*scaled))  # (N, 1176), (n, 3)
        merged = iter((grid_thw.prod(1) // self.merge_size**2).tolist())
        ids = [copy for id in ids for copy in [id] * (next(merged) if id == self.image_pad_id else 1)]
        return Encoded(torch.tensor(ids), pixel_values, grid_thw)

    def decode(self, ids):
        """Text of token ids, without special tokens such as <|im_end|>."""
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)


if __name__ == "__main__":  # those who only want to read or import the model can skip the commands
    from support.chat import main

    command(main)
