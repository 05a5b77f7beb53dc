"""Qwen2.5-VL in one file: what the model computes, how it is stored, and how pictures and chats become its input.

    1. Config           sizes; support/layouts.py reads them, from any layout of config.json
    2. Vision tower     patches -> windows -> blocks -> merged tokens
    3. Text model       grouped-query attention, M-RoPE, SwiGLU
    4. Qwen25VL         pictures into text, positions, masks, the head
    5. Cache            keys and values of what was read
    6. Load and save    safetensors in the hub's names
    7. LoRA             adapters by hand, in PEFT's file format
    8. Processor        pictures -> patches, messages -> tokens

    python model.py --describe PATH | --chat PATH [--image FILE] | --export PATH --out FOLDER    [--adapter FOLDER]

PATH: a checkpoint, a hub id, the folder of a run or one of its checkpoints. Architecture: Qwen2.5-VL Technical Report,
arXiv 2502.13923. Parameters are named as on the hub. What the files of a checkpoint may say: support/layouts.py.

Axes, in every file of the project:

    B  rows of a batch: sequences, prompts, responses (b of a micro-batch)      V  vocabulary
    T  tokens of a row                  S  keys attended to                     D  width
    R  tokens of the longest response   L  learned tokens of a batch            H  heads       J  kv heads
    U  patches of pictures              I  image tokens (four patches each)     C  channels of a head
    G, K  responses per query (Q) without / with the policy in the prompt       F  reward functions
"""

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import InputError, command
from support.files import (
    TensorFile,
    check_tensors,
    copy_files,
    expect,
    find_folder,
    read_json,
    replacing,
    shown,
    stored_once,
    weight_files,
    write_json,
    write_tensors,
)
from support.layouts import check_limits, config_to_save, read_adapter, read_config, read_pictures, read_tokenizer
from support.pictures import open_image, smart_resize, to_rgb
from support.template import ControlTokens, read_template

# -- 1. config --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple
    window_size: int  # pixels
    patch_size: int  # pixels
    temporal_patch_size: int  # frames; a still picture is shown twice
    spatial_merge_size: int  # patches per side of an image token
    in_channels: int


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
    mrope_section: tuple  # frequencies per axis of the position (time, height, width); they sum to C/2
    tie_word_embeddings: bool
    image_token_id: int
    raw: dict = field(repr=False)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, raw, where="config.json"):
        """The sizes in a parsed config.json. Raises InputError that names `where`, the key at fault and its value."""
        text, vision = read_config(raw, where)
        return cls(vision=VisionConfig(**vision), **text, raw=raw)


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
    """Rotary embedding: the pair (x[i], x[i + C/2]) turns by angle i. x: (..., C); cos, sin: (..., C/2)."""
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

    order: torch.Tensor  # (U,) the patch at each place
    cos: torch.Tensor  # (U, C/2) fp32, in this order
    sin: torch.Tensor
    runs: tuple  # of (count, length)


@lru_cache(maxsize=8)
def arrange(grids, config, device):
    """Arrange a batch of pictures by window and by frame; grids: ((t, h, w), ...) in patches.

    The patches of a picture come merge block by merge block, (t, h/2, w/2, 2, 2); no order here breaks up a block.
    Returns (windows, frames, window -> frame order (U,), frame -> window order (U,), window -> picture order (I,)).
    """
    merge = config.spatial_merge_size
    side = config.window_size // config.patch_size // merge  # of a window, in image tokens
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

    spread = config.hidden_size // config.num_heads // 2  # half of the channels turn with the row, half with the column
    frequency = 1.0 / 10000.0 ** (torch.arange(0, spread, 2, dtype=torch.float) / spread)  # (C/4,)
    angles = torch.from_numpy(np.concatenate(places)).float()[:, :, None] * frequency  # (U, 2, C/4)
    angles = angles.flatten(1)  # (U, C/2)

    def arrangement(groups):
        groups = sorted(groups, key=len)
        patches = np.concatenate(groups)[:, None] * merge**2 + np.arange(merge**2)  # (I, 4)
        order = torch.from_numpy(patches.ravel())  # (U,)
        runs = tuple((len(list(run)), length * merge**2) for length, run in groupby(map(len, groups)))
        return Arrangement(order.to(device), angles[order].cos().to(device), angles[order].sin().to(device), runs)

    with torch.inference_mode(False):  # kept for later calls, which may train
        windows, frames = arrangement(windows), arrangement(frames)
        back = windows.order.argsort()  # (U,)
        to_frames, to_windows = back[frames.order], frames.order.argsort()[windows.order]
        return windows, frames, to_frames, to_windows, back[:: merge**2] // merge**2


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin):  # -> queries and keys (U, 2, H, C), values (U, H, C)
        qkv = rearrange(self.qkv(x), "u (three h c) -> u three h c", three=3, h=self.heads)
        return rotate(qkv[:, :2].float(), cos[:, None, None], sin[:, None, None]).to(qkv.dtype), qkv[:, 2]


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = (RMSNorm(config.hidden_size, eps=1e-6) for _ in range(2))
        self.attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x, cos, sin, runs):
        outputs, sizes = [], [count * length for count, length in runs]
        parts = [part.split(sizes) for part in self.before_attention(x, cos, sin)]
        for (count, _), qk, v in zip(runs, *parts):
            q, k = rearrange(qk, "(g u) two h c -> two g h u c", g=count)  # each (count, H, length, C)
            y = F.scaled_dot_product_attention(q, k, rearrange(v, "(g u) h c -> g h u c", g=count))
            outputs.append(rearrange(y, "g h u c -> (g u) (h c)"))
        return self.after_attention(x, torch.cat(outputs))  # (U, D)

    def before_attention(self, x, cos, sin):
        return self.attn(self.norm1(x), cos, sin)

    def after_attention(self, x, y):
        x = x + self.attn.proj(y)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Stored as a 3-D convolution whose stride is its kernel, which is a linear map of each patch."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches):  # (U, 1176) -> (U, D)
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class Merger(nn.Module):
    """Four neighbouring patches become one token of the text model."""

    def __init__(self, config):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)
        inner, outer = nn.Linear(self.width, self.width), nn.Linear(self.width, config.out_hidden_size)
        self.mlp = nn.Sequential(inner, nn.GELU(), outer)

    def forward(self, x):  # (U, vision D) -> (I, D)
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
        """Pictures as the text model reads them: (I, D) image tokens, picture after picture, row by row.

        pixel_values: (U, 1176) patches of all pictures, as `Processor.images` orders them; grid_thw: (n, 3) in patches.
        Raises InputError where the two disagree.
        """
        grids = tuple(map(tuple, grid_thw.tolist()))
        patches = sum(t * h * w for t, h, w in grids)
        if len(pixel_values) != patches:
            raise InputError(f"found {len(pixel_values)} patches in pixel_values, expected {patches} as in grid_thw")
        windows, frames, to_frames, to_windows, to_pictures = arrange(grids, self.config, pixel_values.device)
        keep = not self.checkpointing
        x = self.patch_embed(pixel_values.index_select(0, windows.order))  # (U, vision D)
        for i, block in enumerate(self.blocks):
            if i in self.config.fullatt_block_indexes:
                x = run(block, x.index_select(0, to_frames), frames.cos, frames.sin, frames.runs, keep=keep)
                x = x.index_select(0, to_windows)
            else:
                x = run(block, x, windows.cos, windows.sin, windows.runs, keep=keep)
        return self.merger(x).index_select(0, to_pictures)  # (I, D)


# -- 3. text model ----------------------------------------------------------------------------------------------------

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each new shape for a second, and nearly every batch has one


def attend(q, k, v, mask=None):
    """softmax(q k' / sqrt(C)) v under a mask, or without one causally: the last query sees every key.

    q: (B, H, T, C); k, v: (B, J, S, C); mask: None, or bool (B, 1, T, S), true where a query sees a key.
    Returns (B, H, T, C).
    """
    H, T, J, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if T == 1 and H != J:  # the heads that share keys become the queries of one attention: no copy of the keys per head
        q = rearrange(q, "b (j r) 1 c -> b j r c", j=J)
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b j r c -> b (j r) 1 c")
    if mask is None and T < S:  # new tokens after held ones; SDPA's own causal mask aligns with the first key
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None and q.is_cuda and H != J:  # no fused kernel of CUDA takes both a mask and shared heads
        k, v = k.repeat_interleave(H // J, 1), v.repeat_interleave(H // J, 1)
        J = H
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != J)


class Attention(nn.Module):
    """Projections with the rotary embedding; which keys are seen, and where they lie, is up to block and cache."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width, shared = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, shared)
        self.v_proj = nn.Linear(width, shared)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin):
        """Queries (B, H, T, C), keys and values (B, J, T, C)."""
        q = rotate(rearrange(self.q_proj(x), "b t (h c) -> b h t c", c=self.head_dim), cos, sin)
        k = rotate(rearrange(self.k_proj(x), "b t (j c) -> b j t c", c=self.head_dim), cos, sin)
        return q, k, rearrange(self.v_proj(x), "b t (j c) -> b j t c", c=self.head_dim)


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
        y = attend(q, k, v, mask) if cache is None else cache.attend(self.layer, q, k, v, mask)  # (B, H, T, C)
        return self.after_attention(x, y)

    def before_attention(self, x, cos, sin):
        return self.self_attn(self.input_layernorm(x), cos, sin)

    def after_attention(self, x, y):
        x = x + self.self_attn.o_proj(rearrange(y, "b h t c -> b t (h c)"))
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

        position_ids: (3, B, T). Returns cos and sin, each (B, 1, T, C/2); the angles themselves are fp32.
        """
        half = self.config.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float, device=position_ids.device) / half
        frequency = 1.0 / self.config.rope_theta**exponent  # (C/2,)
        sections = enumerate(self.config.mrope_section)
        turning = [position_ids[i % 3, :, None, :, None].expand(-1, -1, -1, width) for i, width in sections]
        angles = torch.cat(turning, -1).float() * frequency  # (B, 1, T, C/2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


# -- 4. the model -----------------------------------------------------------------------------------------------------


class Qwen25VL(nn.Module):
    """Reads tokens and pictures, gives hidden states; `logits` turns those into scores of the next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source = None  # the folder it was loaded from
        self.compiled = False  # by training.compile_blocks
        self.vocabulary = config.vocab_size  # rows of the head that are tokens; RL learns from what can be sampled
        self.visual = VisionTower(config.vision)
        self.model = TextModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        """(V, D), the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden):
        """Logits of the next token (..., V) from hidden states (..., D); on a GPU in fp32, without gradient."""
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

        input_ids: (B, T), with every picture as a run of image tokens. `pixel_values` (U, 1176) and `image_grid_thw`
          (n, 3) hold all pictures of the batch in reading order; `image_embeds` (I, D) what `visual` made of them.
        attention_mask: None, everything is read, causally; (B, T), with a cache (B, held + T), 0 at padding on either
          side; or bool (B, T, S), what each position sees, itself at least, together with its `position_ids` (3, B, T).
        cache: an object like `Cache`. Without `position_ids`, positions go on where its last token stood.
        Raises InputError where image tokens and pictures do not match.
        """
        T, held = input_ids.shape[1], 0 if cache is None else cache.length
        x = self.model.embed_tokens(input_ids)  # (B, T, D)
        if pixel_values is not None:
            image_embeds = self.visual(pixel_values, image_grid_thw)  # (I, D)
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
        grids = [(t, h // merge, w // merge) for t, h, w in grids]  # in image tokens
        sizes = [t * h * w for t, h, w in grids]
        if (found := int(image.sum())) != sum(sizes):
            raise InputError(f"found {found} image tokens in input_ids, expected {sum(sizes)} for {len(grids)} grids")

        advance = (read & ~image).long()  # (B, T) by how much each token moves the position on
        if grids:  # a picture does so at its end, by its longer side
            ends = image.flatten().nonzero()[np.cumsum(sizes) - 1, 0]  # (n,)
            advance.view(-1)[ends] = torch.tensor([max(h, w) for _, h, w in grids], device=ends.device)
        position_ids = (advance.cumsum(1) - advance).expand(3, -1, -1).clone()  # (3, B, T)
        if grids:
            offsets = np.concatenate([np.indices(grid).reshape(3, -1) for grid in grids], axis=1)  # (3, I)
            position_ids[:, image] += torch.from_numpy(offsets).to(position_ids.device)
        return position_ids * read, advance.sum(1) - read.sum(1)


# -- 5. cache ---------------------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of everything read so far.

    The model calls `attend` once per layer, reads `length` (tokens held), and, where nobody passes `position_ids`,
    keeps in `position` (B, 1) where the next token stands. Any object with these can take its place.
    """

    def __init__(self):
        self.held = {}  # layer -> its keys and values, each (B, J, S, C)
        self.length = self.position = 0

    def attend(self, layer, q, k, v, mask):
        """Append k, v (B, J, T, C), then attend with q (B, H, T, C) to all that is held; mask as in `attend` above."""
        if layer in self.held:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.held[layer], (k, v)))
        self.held[layer] = k, v
        self.length = k.shape[2]
        return attend(q, k, v, mask)


# -- 6. load and save -------------------------------------------------------------------------------------------------


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
    for name, (file, stored) in stored_tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(file.read(stored, device, dtype)))
    return model


def stored_tensors(model):
    """{parameter: (TensorFile, name there)} in the folder that a model comes from: all of its parameters, no others."""
    where = stored_once(weight_files(model.source), hub_name)
    expected = {name: p.shape for name, p in model.named_parameters()}
    head = where.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None  # some store a tied head too
    check_tensors(model.source, expected, {name: file.entries[key]["shape"] for name, (file, key) in where.items()})
    if head:
        (file, key), (other, name) = head, where["model.embed_tokens.weight"]
        if not torch.equal(file.mapped(key), other.mapped(name).to(file.mapped(key).dtype)):
            expected = "the embedding, as config.json ties the two"
            raise InputError(f"{model.source}: found an lm_head.weight of its own, expected {expected}")
    return where


def save_pretrained(model, folder, dtype=None):
    """Write a checkpoint that transformers and vLLM load: hub names, shards above 5 GB, the source's tokenizer files.

    dtype: of the stored weights (None: as they are). The folder appears whole or stays as it was. Raises InputError
    while LoRA is not merged into the weights.
    """
    if any(layer.state != "merged" for layer in lora_layers(model).values()):
        raise InputError(f"{folder}: found LoRA beside the weights, expected merge_lora first, or save_adapter")
    dtype = dtype or model.head_weight.dtype
    with replacing(folder) as new:
        write_tensors(new, {name: p.detach() for name, p in model.named_parameters() if ".lora_" not in name}, dtype)
        write_json(new / "config.json", config_to_save(model.config, str(dtype).removeprefix("torch.")))
        if model.source:
            copy_files(model.source, new)


# -- 7. LoRA ----------------------------------------------------------------------------------------------------------

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
      expression over whole module names, which can reach the vision tower too.
    Raises InputError where a target matches nothing, or what has no adapter here: the head and the embedding, whose
    weights are multiplied without their modules, convolutions and norms.
    """
    if rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        found = f"rank {rank}, alpha {alpha}, dropout {dropout}"
        raise InputError(f"LoRA: found {found}, expected rank >= 1, alpha > 0 and dropout in [0, 1)")
    if any(layer.state != "merged" for layer in lora_layers(model).values()):
        raise InputError("LoRA: found an adapter in the model, expected it merged before another one")
    layers = targeted(model, targets)
    model.requires_grad_(False)
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, LoRALinear(layer, rank, alpha, dropout, rslora))
    return model


def targeted(model, targets):
    """{name: linear layer}, in the model's order, of what `add_lora` is asked for; its refusals are made here."""
    holders = {name.rpartition(".")[0] for name, _ in model.named_parameters()} | {"lm_head"}  # there when tied, too
    if isinstance(targets, str):
        try:
            fits = re.compile(targets).fullmatch
        except re.error as error:
            raise InputError(
                f"LoRA: found the targets {shown(targets)} ({error}), expected a regular expression"
            ) from None
        chosen = {name for name in holders if fits(name) or fits(library_name(name))}
    else:
        text, leaf = {n for n in holders if n.startswith("model.layers.")}, lambda name: name.rpartition(".")[2]
        chosen = {name for name in text if leaf(name) in (targets or TEXT_TARGETS)}
        if absent := sorted(set(targets or ()) - set(map(leaf, chosen))):
            expected = f"names among {', '.join(TEXT_TARGETS)}"
            raise InputError(f"LoRA: found the targets {', '.join(absent)}, expected {expected}")
    layers = {name: layer for name, layer in linear_layers(model).items() if name in chosen and name != "lm_head"}
    if (others := sorted(chosen - layers.keys())) or not layers:
        found = f"the targets {shown(repr(targets))}, which match {', '.join(others[:3]) or 'nothing'}"
        raise InputError(f"LoRA: found {found}, expected linear layers of the blocks or of the merger alone")
    return layers


def set_trainable(model, vision, text=True):
    """Train or freeze the vision tower with its merger, and the text model; weights under LoRA's model stay frozen."""
    adapted = bool(lora_layers(model))
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            p.requires_grad_(vision if name.startswith("visual.") else text and not adapted)


def merge_lora(model):
    """Add each adapter to its weight: the model runs at its old speed and can be saved whole.

    The sum is made in fp32 and stored in the weight's own type: in bf16 each weight is rounded to 8 bits, by 0.2 % at
    most, so that what an adapter says in smaller steps is lost. `python model.py --export` measures how much that was.
    """
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


def stored_adapter(folder):
    """An adapter in PEFT's format -> (its file, {our name of a tensor: its own}, rank, alpha, dropout, rslora)."""
    folder = find_folder(folder, hub="")
    settings = read_adapter(folder / "adapter_config.json")
    file = TensorFile(folder / "adapter_model.safetensors")
    short = lambda name: hub_name(re.sub(r"^base_model\.model\.|(\.default)?\.weight$", "", name))
    return file, {name: key for name, (_, key) in stored_once([file], short).items()}, *settings


def load_adapter(model, folder):
    """Read an adapter in PEFT's format, under in-library or hub names; LoRA is added where the model has none.

    Returns the model. Raises InputError that names the tensors that do not fit, or the PEFT option unknown here.
    """
    file, stored, rank, alpha, dropout, rslora = stored_adapter(folder)
    present, named = lora_layers(model), {name.rpartition(".")[0] for name in stored} - {"lm_head"}
    layers = present or {name: layer for name, layer in sorted(linear_layers(model).items()) if name in named}
    rank = next(iter(present.values())).rank if present else rank
    expected = {f"{name}.lora_A": (rank, layer.in_features) for name, layer in layers.items()}
    expected |= {f"{name}.lora_B": (layer.out_features, rank) for name, layer in layers.items()}
    check_tensors(file.path, expected, {name: file.entries[stored[name]]["shape"] for name in stored})
    if not present:
        add_lora(model, rank, alpha, "|".join(map(re.escape, layers)), dropout)
    unmerge_lora(model)
    for layer in lora_layers(model).values():
        layer.alpha, layer.rslora = alpha, rslora
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.copy_(file.read(stored[name], p.device, p.dtype))
    return model


# -- 8. processor -----------------------------------------------------------------------------------------------------

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


def parts(message):
    """The content of a message as a list of {"type": "text", "text"} and {"type": "image", "image"}."""
    content = message.get("content")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image") or part["type"] not in part:
            raise InputError(f"found {part!r:.80} in a message, expected a text part or an image part")
        if part["type"] == "text" and not isinstance(part["text"], str):
            raise InputError(f"found a text of {part['text']!r:.80} in a message, expected a string")
    return content


@dataclass
class Encoded:
    """A chat as the model reads it."""

    input_ids: torch.Tensor  # (T,) int64, with as many image tokens per picture as it has merged tokens
    pixel_values: torch.Tensor | None  # (U, 1176) fp32
    grid_thw: torch.Tensor | None  # (n, 3) int64

    @property
    def image_tokens(self):
        return 0 if self.grid_thw is None else int(self.grid_thw.prod(1).sum()) // 4


class Processor:
    """Pictures to patches, messages to tokens, tokens to text."""

    @classmethod
    def from_pretrained(cls, path_or_hub_id, min_pixels=0, max_pixels=0):
        """Read a checkpoint's tokenizer, picture processor and chat template.

        min_pixels, max_pixels: limits of a picture's area after resizing (0: the checkpoint's own).
        Raises InputError that names the file and the special token, key or template at fault.
        """
        self, folder = cls(), find_folder(path_or_hub_id)
        config = Config.from_json(read_json(folder / "config.json"), folder / "config.json")
        self.tokenizer = read_tokenizer(folder)
        self.control = ControlTokens(self.tokenizer)
        ids = {token: self.tokenizer.token_to_id(token) for token in SPECIAL}
        if missing := [token for token, id in ids.items() if id is None]:
            raise InputError(f"{folder}: found no {', '.join(missing)}, expected Qwen2.5-VL's special tokens")
        self.image_pad_id, self.video_pad_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
        told = config.image_token_id
        expect(folder, "<|image_pad|>", self.image_pad_id, self.image_pad_id == told, f"{told} as in config.json")
        self.vision_start_id, self.vision_end_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
        self.pad_id, self.stop_ids = ids["<|endoftext|>"], [ids["<|im_end|>"], ids["<|endoftext|>"]]
        known, rows = set(self.tokenizer.get_vocab().values()), config.vocab_size
        expect(folder, "the tokenizer's last id", max(known), max(known) < rows, f"less than vocab_size = {rows}")
        self.vocabulary = max(known) + 1
        # never sampled: pictures come from the prompt only, and the rows that pad the embedding are no tokens
        self.banned_ids = [ids[token] for token in SPECIAL[3:]] + sorted(set(range(rows)) - known)

        for key, value in read_pictures(folder, config.vision).items():
            setattr(self, key, value)
        self.min_pixels, self.max_pixels = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        check_limits("limits of a picture's area", self.min_pixels, self.max_pixels)
        self.mean, self.std = (np.array(x, np.float32)[:, None] for x in (self.image_mean, self.image_std))  # (3, 1)
        self.render = read_template(folder)
        return self

    def images(self, pictures):
        """Patches (U, 1176) fp32 of PIL.Images, and their grids (n, 3) int64: (1, height, width) in patches."""
        patches, grids, merge, side = [], [], self.merge_size, self.patch_size
        for image in map(to_rgb, pictures):
            h, w = smart_resize(image.height, image.width, side * merge, self.min_pixels, self.max_pixels)
            levels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))  # (h, w, 3) uint8
            order = "(h a p) (w b q) c -> (h w a b) c (p q)"  # merge block by merge block
            levels = rearrange(levels, order, a=merge, b=merge, p=side, q=side)
            pixels = (levels.astype(np.float32) / 255 - self.mean) / self.std  # (U, 3, 196)
            patches.append(np.repeat(pixels[:, :, None], self.temporal_patch_size, axis=2).reshape(len(pixels), -1))
            grids.append((1, h // side, w // side))
        return torch.from_numpy(np.concatenate(patches)), torch.tensor(grids)

    def chat(self, messages, add_generation_prompt=False):
        """The text of a chat by the checkpoint's template (the official one: ChatML), one image token per picture.

        messages: [{"role", "content"}], the content a string or a list of text and image parts (see `parts`).
        """
        return self.control.unmark(self._marked(messages, add_generation_prompt))

    def _marked(self, messages, add_generation_prompt):
        """The same, with the control tokens marked that stand in a text of the chat."""
        mark, chat = self.control.mark, []
        for message in messages:
            own = [{**part, "text": mark(part["text"])} if part["type"] == "text" else part for part in parts(message)]
            content = own[0]["text"] if isinstance(message["content"], str) else own
            chat.append({**message, "role": mark(message["role"]), "content": content})
        return self.render(chat, add_generation_prompt)

    def tokens(self, text):
        """Token ids of a text, which has no control tokens: what looks like one is plain text."""
        return self.control.encode(self.control.mark(text))

    def encode(self, messages, add_generation_prompt=False):
        """Tokens of a chat and patches of its pictures: paths, PIL.Images, or what `images` made of one. -> `Encoded`.

        Control tokens come from the template alone: in a text of the chat they are plain text.
        """
        ids = self.control.encode(self._marked(messages, add_generation_prompt))
        pictures = [part["image"] for message in messages for part in parts(message) if part["type"] == "image"]
        pictures = [image if isinstance(image, (Image.Image, tuple)) else open_image(image) for image in pictures]
        if (found := ids.count(self.image_pad_id)) != len(pictures):
            raise InputError(f"found {found} image tokens in a chat, expected {len(pictures)}, one per picture")
        if not pictures:
            return Encoded(torch.tensor(ids), None, None)
        scaled = [image if isinstance(image, tuple) else self.images([image]) for image in pictures]
        pixel_values, grid_thw = map(torch.cat, zip(*scaled))  # (U, 1176), (n, 3)
        merged = iter((grid_thw.prod(1) // self.merge_size**2).tolist())
        ids = [copy for id in ids for copy in [id] * (next(merged) if id == self.image_pad_id else 1)]
        return Encoded(torch.tensor(ids), pixel_values, grid_thw)

    def decode(self, ids):
        """Text of token ids, without special tokens such as <|im_end|>."""
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def look(self, path):
        """A picture file as a PIL.Image, and how many tokens it becomes; raises InputError where it cannot be read."""
        image = open_image(path)
        return image, self.picture_tokens(*image.size)

    def picture_tokens(self, width, height):
        """How many tokens a picture of so many pixels becomes; raises InputError where it is too long and thin."""
        side = self.patch_size * self.merge_size
        h, w = smart_resize(height, width, side, self.min_pixels, self.max_pixels)
        return h * w // side**2


if __name__ == "__main__":  # those who only want to read or import the model can skip the commands
    import sys

    from support.chat import main

    command(lambda: main(sys.modules[__name__]))
