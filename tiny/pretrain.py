"""The tiny base from nothing: a Qwen2.5-VL of 1.9 M parameters that sees small scenes and follows new policies.

    python -m tiny.pretrain --out runs/tiny                       about two hours on two cores; run it again to go on
    python -m tiny.pretrain --out runs/weak --vision tiny/base --pictures 12000 --text-steps 1400 --keep-every 25
                                                                  weak readers with the eyes of a finished base
    python -m tiny.pretrain --out runs/tools --world tools --pictures 24000 --seed 5 --batch 9216 --text-steps 2400
                                                                  goes on from tiny/base: tool policies, in an hour

    1. pictures   96,000 scenes with the object that each pixel shows
    2. vision     size, colour, material and shape of every patch's object; full pictures and crops
    3. features   the frozen tower's view of every picture, kept
    4. words      the merger maps what a picture token shows to the sum of its words; attention starts as a lookup
    5. text       tiny/stream.py: looking, looking up, applying policies of one to six layers, with crops at the end

From random weights, most of such a training is spent learning to look a name up. Here the weights start as the circuit
that does it (previous token -> matching token -> copy), and a few hundred steps finish it. Muon moves the matrices,
AdamW the rest.

With --world tools stages 2 and 4 are the finished base (--vision): its words, and more, get the tool policies of
tiny/tools.py as a second task beside the first.

Axes: model.py; B is also pictures.
"""

import argparse
import copy
import json
import math
import os
import time
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data import InputError, claim, command
from data.clevr import ATTRIBUTES, COLORS, MATERIALS, RADIUS, SHAPES, SIZES
from data.clevr_policy import CROP as MARGIN
from model import Config, Qwen25VL, arrange, load_pretrained, save_pretrained
from tiny import tools
from tiny.stream import Stream, ToolStream, crops_by_value, rows
from tiny.world import ACTIONS, CROP, ID, NODES, POLICIES, SIDE, TOKENS, pictures, write_tokenizer

HELD = 2000  # pictures that training never sees
SAVE_EVERY = 250  # steps of the vision stage
LAYERS, WIDTH, HEADS = 4, 128, 4
THETA = 1e6  # slow rotary frequencies leave dimensions that compare words wherever they stand

CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_act": "silu",
    "vocab_size": len(TOKENS), "hidden_size": WIDTH, "intermediate_size": 384, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "rms_norm_eps": 1e-6, "rope_theta": THETA,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "bos_token_id": ID["<|endoftext|>"], "eos_token_id": ID["<|im_end|>"],
    "vision_start_token_id": ID["<|vision_start|>"], "vision_end_token_id": ID["<|vision_end|>"],
    "vision_token_id": ID["<|vision_pad|>"], "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_config": {
        "depth": 3, "hidden_size": WIDTH, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [2], "window_size": SIDE, "patch_size": 14, "temporal_patch_size": 2,
        "spatial_merge_size": 2, "in_chans": 3, "hidden_act": "silu", "tokens_per_second": 2},
}  # fmt: skip


OURS = "pictures *.npy *.pt features.done rendezvous log.jsonl base base-* curve.png *.tmp .base*".split()


# -- 1. optimiser ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix by five Newton-Schulz steps: all directions move alike."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, alike in shapes.items():  # matrices of one shape as one batch
                updates = []
                for p in alike:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                step = orthogonal(torch.stack(updates)) * max(1, shape[0] / shape[1]) ** 0.5
                for p, change in zip(alike, step):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])


def orthogonal(x):
    """The orthogonal factor of a batch of matrices, roughly."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def set_rates(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * factor


# -- 2. vision ---------------------------------------------------------------------------------------------------------

LABELS = {"ground": 2, "size": 2, "color": 8, "material": 2, "shape": 3}  # what a patch is asked, and the answers
MEAN, STD = (
    np.array([0.48145466, 0.4578275, 0.40821073], np.float32),
    np.array([0.26862954, 0.26130258, 0.27577711], np.float32),
)


def patches(images):
    """uint8 (B, S, S, 3) -> the processor's patches without the doubled frame, (B, U, 588), by merge blocks."""
    x = (images.astype(np.float32) / 255 - MEAN) / STD
    g = images.shape[1] // 14
    x = x.reshape(-1, g // 2, 2, 14, g // 2, 2, 14, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return torch.from_numpy(np.ascontiguousarray(x.reshape(len(images), g * g, 588)))


def blocks(index, side, clear, some):
    """Which object a square of `side` pixels shows, by merge blocks: (B, squares), -1 ground, -2 too little to say."""
    g = index.shape[1] // side
    x = index.reshape(-1, g, side, g, side).transpose(0, 1, 3, 2, 4)
    if side == 14:
        x = x.reshape(-1, g // 2, 2, g // 2, 2, 14, 14).transpose(0, 1, 3, 2, 4, 5, 6)
    x = x.reshape(len(index), g * g, side * side)
    counts = np.stack([(x == k).sum(-1) for k in range(3)], -1)
    most = counts.max(-1)
    return np.where(most >= clear, counts.argmax(-1), np.where(most >= some, -2, -1))


def trunk(visual, x):
    """The tower up to its merger: (B, U, 588) -> (B, U, D). Pictures of one window need no rearrangement."""
    B, U, _ = x.shape
    side = math.isqrt(U)
    windows, *_ = arrange(((1, side, side),) * B, visual.config, x.device)
    x = F.linear(x, visual.patch_embed.proj.weight.sum(2).flatten(1)).flatten(0, 1)  # (B U, D)
    for block in visual.blocks:
        x = block(x, windows.cos, windows.sin, windows.runs)
    return x.view(B, U, -1)


def fitted(image, index, thing, rng, wider=1.0):
    """A square about one object, filled by it if `wider` is 1, enlarged to 56 pixels: picture, object index, inside?"""
    ys, xs = np.nonzero(index == thing)
    reach = max(6, max(np.ptp(ys), np.ptp(xs)) / 2 * rng.uniform(1.05, 1.45) + 1) * wider
    y, x = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
    box = int(x - reach), int(y - reach), int(x + reach) + 1, int(y + reach) + 1
    inside = min(box) >= 0 and max(box) <= SIDE
    box = [min(max(edge, 0), SIDE) for edge in box]
    cut = lambda a, how: np.asarray(Image.fromarray(a).crop(box).resize((CROP, CROP), how))
    return cut(image, Image.BICUBIC), cut(index.astype(np.uint8), Image.NEAREST).astype(np.int8), inside


def cut_out(image, index, spot, rng):
    """A window of 56 pixels about an object, at the picture's own scale."""
    x, y = np.clip(spot.astype(int) - CROP // 2 + rng.integers(-5, 6, 2), 0, SIDE - CROP)
    return image[y : y + CROP, x : x + CROP], index[y : y + CROP, x : x + CROP]


def train_vision(model, world, out, steps, batch=128):
    """Dense labels: every patch names its object. Every third batch are crops, the others shifted; half is mirrored."""
    image, index, table, spot = world
    visual, head = model.visual, nn.Linear(WIDTH, sum(LABELS.values()))
    matrices = [p for name, p in visual.blocks.named_parameters() if p.ndim == 2]
    rest = [
        *visual.patch_embed.parameters(),
        *[p for p in visual.blocks.parameters() if p.ndim < 2],
        *head.parameters(),
    ]
    optimizers = Muon(matrices, 0.02), torch.optim.AdamW(rest, 1.5e-3, betas=(0.9, 0.98), weight_decay=0.02)
    both = nn.ModuleDict({"model": model, "head": head})
    first = restore(out / "vision.pt", both, optimizers)
    for step in range(first, steps):
        rng = np.random.default_rng([step, 0])
        set_rates(optimizers, min(1, (step + 1) / 100, 1.02 - step / steps))
        s = np.sort(rng.choice(len(image) - HELD, batch, replace=False))
        x, shown, things = np.asarray(image[s]), np.asarray(index[s]), np.asarray(table[s])
        whole_scale = True
        if step % 3 == 2:
            which = (rng.random(batch) * (things[:, :, 0] >= 0).sum(1)).astype(int)
            whole_scale = rng.random() < 0.4
            cuts = [
                cut_out(x[b], shown[b], spot[s[b], k], rng) if whole_scale else fitted(x[b], shown[b], k, rng)[:2]
                for b, k in enumerate(which)
            ]
            x, shown = (np.stack(part) for part in zip(*cuts))
        else:  # an object is what it is wherever the patches' edges cut it
            down, right = rng.integers(15, size=2)
            x, shown = (
                np.pad(a, [(0, 0), (7, 7), (7, 7)] + [(0, 0)] * (a.ndim - 3), "reflect")[
                    :, down : down + SIDE, right : right + SIDE
                ]
                for a in (x, shown)
            )
        mirrored = rng.random(batch) < 0.5
        x, shown = (np.where(mirrored.reshape(-1, *[1] * (a.ndim - 1)), a[:, :, ::-1], a) for a in (x, shown))
        label = torch.from_numpy(blocks(shown, 14, 30, 8))  # (B, U)
        told = torch.from_numpy(things[np.arange(batch)[:, None], label.clamp(min=0)]).long()  # (B, U, 4)
        guess = dict(zip(LABELS, head(visual.merger.ln_q(trunk(visual, patches(x)))).split(list(LABELS.values()), -1)))
        loss, on, scores = F.cross_entropy(guess["ground"][label > -2], (label[label > -2] >= 0).long()), label >= 0, {}
        for column, name in enumerate(ATTRIBUTES):
            if name != "size" or whole_scale:
                loss = loss + (2 if name == "shape" else 1) * F.cross_entropy(
                    guess[name][on], told[on][:, column]
                )  # the slow one
                scores[name] = (guess[name][on].argmax(-1) == told[on][:, column]).float().mean().item()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 49:
            log(
                out,
                {
                    "stage": "vision",
                    "step": step + 1,
                    "loss": round(loss.item(), 4),
                    **{k: round(v, 4) for k, v in scores.items()},
                },
            )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(out / "vision.pt", both, step + 1, optimizers)


@torch.inference_mode()
def write_features(model, world, out, batch=128):
    """What the frozen tower makes of every picture (S, 64, D) and of two crops of each (2 S, 16, D), in half precision.

    One crop is filled by an object; the other is as wide as a large cube, so that small looks small
    (data.clevr_policy.croppable).
    """
    image, index, table, _ = world
    S, rng = len(image), np.random.default_rng(1)
    opened = lambda name, shape, dtype: np.lib.format.open_memmap(out / f"{name}.npy", "w+", dtype, shape)
    full, crop = opened("full", (S, 64, WIDTH), np.float16), opened("crop", (2 * S, 16, WIDTH), np.float16)
    clean = opened("clean", (2 * S,), np.int8)
    reach = {(size, shape): RADIUS[size] * MARGIN[shape] for size in SIZES for shape in SHAPES}
    kinds = list(ATTRIBUTES)

    def wider(thing):
        return reach["large", "cube"] / reach[SIZES[thing[kinds.index("size")]], SHAPES[thing[kinds.index("shape")]]]

    for start in range(0, S, batch):
        s = np.arange(start, min(start + batch, S))
        x, shown, things = np.asarray(image[s]), np.asarray(index[s]), np.asarray(table[s])
        thing = s % (things[:, :, 0] >= 0).sum(1)
        full[s] = trunk(model.visual, patches(x)).half()
        for first in (0, S):
            cuts = [fitted(x[b], shown[b], k, rng, wider(things[b, k]) if first else 1) for b, k in enumerate(thing)]
            crop[first + s] = trunk(model.visual, patches(np.stack([c for c, *_ in cuts]))).half()
            for b, (_, seen, inside) in enumerate(cuts):  # is the object whole and alone there?
                clean[first + s[b]] = inside and ((seen >= 0) & (seen != thing[b])).sum() < 12


# -- 3. a lookup to start from -----------------------------------------------------------------------------------------


@torch.no_grad()
def prepare(model, seed=0):
    """Set attention heads to look names up, and words to directions that picture tokens can be sums of.

    Layer 0: heads 0 and 1 pass on the token before; head 2 the latest node name, which is the sentence's; head 3 the
    words of the condition. Layer 1: head 0 passes on the sentence's name at the token before; heads 1 and 2 find the
    place whose token before equals this token, and copy what stands there. Layer 2: heads 0 and 1 the same within the
    sentence of the same name. Heads 3 of layer 1 and 2 of layer 2 attend to the picture tokens that show the words.
    Returns {word: direction (D,)} of the 15 attribute values, and the direction of "I am a picture".
    """
    g = torch.Generator().manual_seed(seed)
    D, C = WIDTH, WIDTH // HEADS
    half = C // 2
    frequency = THETA ** (-torch.arange(half) / half)
    still = [f for f in range(half) if frequency[f] < 0.003]
    still += [f + half for f in still]  # dimensions of a head that the position hardly turns
    frame = lambda n: torch.linalg.qr(torch.randn(D, n, generator=g))[0].T  # (n, D) orthonormal
    embedding, layers = model.model.embed_tokens.weight, model.model.layers

    axes = frame(D)
    attribute, picture, spoken = axes[0], axes[1], axes[2:17]
    words = [*SIZES, *COLORS, *MATERIALS, *SHAPES]
    for word, axis in zip(words, spoken):
        embedding[ID[word]] = 0.018 * torch.randn(D, generator=g) + 0.5 * attribute + 0.8 * axis
    kinds = {}
    for first, names in (("U", NODES), ("A", ACTIONS), ("P", POLICIES)):
        kinds[first] = F.normalize(torch.randn(D, generator=g), dim=0)
        for name in names:
            e = embedding[ID[name]]
            embedding[ID[name]] = e - e @ spoken.T @ spoken + 0.45 * kinds[first]

    def head(layer, h):
        at, own = layers[layer].self_attn, slice(h * C, (h + 1) * C)
        at.q_proj.weight[own] *= 0.1
        at.k_proj.weight[own] *= 0.1
        return at, own

    def values(at, own, read, write, gain):
        pad = lambda m: torch.cat([m, torch.zeros(C - len(m), D)])
        at.v_proj.weight[own], at.o_proj.weight[:, own] = pad(read), gain * pad(write).T

    def turned(strength, back, frequencies):
        """A query that, by rotary position alone, prefers keys [strength, 0] that stand `back` tokens before it."""
        q = torch.zeros(C)
        for f in frequencies:
            q[f], q[f + half] = strength * math.cos(back * frequency[f]), -strength * math.sin(back * frequency[f])
        return q

    def previous(layer, h, read, write):
        at, own = head(layer, h)
        at.q_proj.bias[own] = turned(8, 1, range(4))
        at.k_proj.bias[own] = torch.cat([torch.full((4,), 8.0), torch.zeros(C - 4)])
        values(at, own, read, write, 0.15)

    def recent(h, kind, back, frequencies, strength, read, write, gain):
        at, own = head(0, h)
        at.q_proj.bias[own] = turned(8, back, frequencies)
        for f in frequencies:
            at.k_proj.weight[own.start + f] += strength * kind
        values(at, own, read, write, gain)

    def match(layer, h, pairs, gain, read=None, write=None, out=0.12):
        at, own = head(layer, h)
        for d, (q, k) in zip(still, pairs):
            at.q_proj.weight[own.start + d] += gain * q
            at.k_proj.weight[own.start + d] += gain * k
        copied = frame(C)
        values(at, own, copied if read is None else read, copied if write is None else write, out)
        return at, own

    read, store = [frame(C) for _ in range(3)], frame(D).split(C)
    condition = frame(len(words))
    previous(0, 0, read[0], store[0])
    previous(0, 1, read[1], store[1])
    recent(2, kinds["U"], 0, (2, 3), 2.5, read[2], store[2], 0.15)
    recent(3, attribute, 5, (2,), 2.0, spoken, condition, 0.12)
    previous(1, 0, store[2], store[3])
    both = len(still) - 8
    for h in (0, 1):
        match(1, 1 + h, zip(read[h], store[h]), 2.7)
        name = [m if h == 0 else m.flip(0) for m in (store[2], store[3])]
        match(2, h, [*zip(name[0][:both], name[1][:both]), *zip(read[h][:8], store[h][:8])], 2.7)
    say = embedding[ID["yes"]] - embedding[ID["no"]]
    for layer, h in ((1, 3), (2, 2)):
        at, own = match(layer, h, zip(condition, spoken), 3.2, picture[None], say[None], 0.1)
        at.v_proj.bias[own.start] = -1.2
        for d in still[15:17]:
            at.q_proj.bias[own.start + d] = -6
            at.k_proj.weight[own.start + d] += 0.5 * picture
    return dict(zip(words, spoken)), picture


def initialise(model):
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data.fill_(float("norm" in name or "ln_q" in name))
        elif name.startswith("visual"):
            nn.init.normal_(p, std=0.02)
        elif name == "model.embed_tokens.weight":
            nn.init.normal_(p, std=0.08)
        else:
            nn.init.normal_(
                p, std=0.6 / p.shape[1] ** 0.5 * (0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
            )


def train_merger(model, world, full, directions, picture, out, steps, batch=192):
    """A picture token begins as the sum of the words for what it shows: least squares on the merger."""
    _, index, table, _ = world
    merger, rng = model.visual.merger, np.random.default_rng(2)
    basis = [torch.stack([directions[word] for word in words]) for words in ATTRIBUTES.values()]
    matrices = [p for p in merger.parameters() if p.ndim == 2]
    rest = [p for p in merger.parameters() if p.ndim == 1]
    optimizers = Muon(matrices, 0.02, weight_decay=0), torch.optim.AdamW(rest, 2e-3, betas=(0.9, 0.98))
    for step in range(steps):
        set_rates(optimizers, min(1, (step + 1) / 20, 1.05 - step / steps))
        s = np.sort(rng.choice(len(index) - HELD, batch, replace=False))
        label = torch.from_numpy(blocks(np.asarray(index[s]), 28, 60, 15))  # (B, 16)
        told = torch.from_numpy(table[s][np.arange(batch)[:, None], label.clamp(min=0)]).long()
        goal = (
            0.8 * sum(basis[k][told[..., k].clamp(min=0)] for k in range(4)) * (label >= 0)[..., None] + 0.6 * picture
        )
        found = merger(torch.from_numpy(np.asarray(full[s])).float().reshape(-1, WIDTH)).view(batch, 16, WIDTH)
        weight = (label > -2).float() * torch.where(label >= 0, 3.0, 1.0)
        loss = ((found - goal).square().mean(-1) * weight).sum() / weight.sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        merger.zero_grad()
        if step % 50 == 49:
            log(out, {"stage": "words", "step": step + 1, "loss": round(loss.item(), 6)})


# -- 4. text -----------------------------------------------------------------------------------------------------------

LOOK = [
    (0.04, "pairs", {}),
    (0.02, "copy", {}),
    (0.14, "recite", {"most": 12}),
    (0.06, "walk", {"depth": 2}),
    (0.08, "walk", {"depth": 3}),
    (0.26, "check", {"decisions": 10, "most": 1}),
    (0.32, "check", {"decisions": 10}),
    (0.08, "describe", {}),
]
APPLY = [
    (0.02, "pairs", {}),
    (0.01, "copy", {}),
    (0.08, "recite", {"most": 16}),
    (0.05, "walk", {"depth": 3}),
    (0.05, "walk", {"depth": 4}),
    (0.1, "check", {"decisions": 10, "most": 1}),
    (0.25, "check", {"decisions": 10}),
    (0.06, "describe", {}),
    *[(share, "apply", {"depth": depth}) for depth, share in ((1, 0.08), (2, 0.1), (3, 0.1), (4, 0.1))],
]
WHOLE = [
    (0.03, "recite", {"most": 20}),
    (0.03, "recite", {"most": 58, "each": 8}),
    (0.07, "recite", {"most": 12, "crops": True, "each": 6}),
    (0.02, "walk", {"depth": 4, "each": 6}),
    (0.04, "walk", {"depth": 6, "each": 8}),
    (0.05, "check", {"decisions": 10, "most": 1}),
    (0.17, "check", {"decisions": 10}),
    (0.02, "describe", {}),
    (0.05, "name_crop", {}),
    (0.02, "apply", {"depth": 1}),
    (0.05, "apply", {"depth": 2}),
    (0.06, "apply", {"depth": 3, "each": 5}),
    (0.09, "apply", {"depth": 4, "each": 6}),
    (0.1, "apply", {"depth": 6, "each": 8}),
    (0.05, "apply", {"depth": 2, "crops": True, "each": 5}),
    (0.07, "apply", {"depth": 3, "crops": True, "each": 6}),
    (0.08, "apply", {"depth": 4, "crops": True, "each": 7}),
]
# (share of the steps, mixture, tokens of a row, Muon's rate, AdamW's); the last phase decays over its second half.
# Slow at first: large steps would tear the prepared heads down before the rest of the model has learnt to use them.
PHASES = [(0.08, LOOK, 512, 0.004, 2e-3), (0.16, APPLY, 512, 0.008, 1.5e-3), (0.76, WHOLE, 1024, 0.007, 1.5e-3)]
TESTS = {
    "recite": ("recite", {"most": 12}),
    "walk 4": ("walk", {"depth": 4}),
    "check": ("check", {"decisions": 10}),
    **{f"U={n}": ("apply", {"depth": n, "blind": 0}) for n in (1, 2, 3, 4, 6)},
    **{f"M, U={n}": ("apply", {"depth": n, "blind": 0, "crops": True}) for n in (2, 3, 4, 6)},
}

# Tool policies beside ClevrPolicy: short ones first; the share of ClevrPolicy rises to a half.
KEPT = [(share, kind, more) for share, kind, more in WHOLE if kind in ("check", "apply", "recite", "walk", "name_crop")]


def with_tools(mixture, kept):
    """A mixture of tool policies whose share of ClevrPolicy's tokens is `kept`."""
    whole = sum(share for share, *_ in KEPT)
    return [(share * (1 - kept), *rest) for share, *rest in mixture] + [
        (share * kept / whole, *rest) for share, *rest in KEPT
    ]


PARTS = [(0.1, "which", {}), (0.04, "compare", {})]
FEW = [*PARTS, (0.26, "tool_recite", {"least": 3, "most": 8}), (0.6, "tools", {"least": 3, "most": 5})]
SOME = [*PARTS, (0.08, "tool_recite", {"least": 4, "most": 14}), (0.78, "tools", {"least": 3, "most": 9})]
MANY = [*PARTS, (0.04, "tool_recite", {"least": 6, "most": 14}), (0.82, "tools", {"least": 4, "most": 14})]
TOOL_PHASES = [
    (0.08, with_tools(FEW, 0.15), 1536, 0.006, 1.5e-3),
    (0.22, with_tools(SOME, 0.25), 1536, 0.006, 1.5e-3),
    (0.7, with_tools(MANY, 0.5), 1536, 0.006, 1.5e-3),
]
TOOL_TESTS = {
    "recited": ("tool_recite", {"least": 6, "most": 14}),
    "which": ("which", {"decisions": 1}),
    "compare": ("compare", {"decisions": 1}),
    **{f"tools={n}": ("tools", {"least": n, "most": n, "single": True, "blind": 0}) for n in (4, 8, 14)},
    **{f"U={n}": ("apply", {"depth": n, "blind": 0}) for n in (3, 6)},
    "M, U=3": ("apply", {"depth": 3, "blind": 0, "crops": True}),
}
WORLDS = {  # what a base learns: (tokens, stream, phases, tests)
    "clevr": (TOKENS, Stream, PHASES, TESTS),
    "tools": (tools.ALL_TOKENS, ToolStream, TOOL_PHASES, TOOL_TESTS),
}


def config(world):
    return Config.from_json({**CONFIG, "vocab_size": len(WORLDS[world][0])})


def stream(out, seed, world="clevr", held=False):
    """The text stream over the training pictures, or over those held out."""
    table, clean = np.load(out / "pictures" / "table.npy"), np.load(out / "clean.npy")
    which = np.arange(len(table) - HELD, len(table)) if held else np.arange(len(table) - HELD)
    return WORLDS[world][1](seed, table[which], crops_by_value(table, clean, which), first=int(which[0]))


@torch.no_grad()
def grown(base, seed):
    """The tool world's model with a finished base's weights; functions begin as names of nodes, tools as actions, both
    moved a little, other new words at random, and numbers that are near lie near."""
    model, old = Qwen25VL(config("tools")), load_pretrained(base).float().state_dict()
    g, table = torch.Generator().manual_seed(seed), old.pop("model.embed_tokens.weight")
    new = torch.randn(len(tools.ALL_TOKENS), WIDTH, generator=g) * table.std()
    new[: len(table)] = table
    for words, like in ((tools.FUNCTIONS, NODES), (tools.RULED.values(), NODES[14:]), (tools.TOOLS, ACTIONS)):
        for word, name in zip(words, like):
            if word not in ID:
                new[tools.IDS[word]] = table[ID[name]] + 0.2 * new[tools.IDS[word]]
    waves = torch.randn(2, 4, WIDTH, generator=g) * table.std() / 2
    for number, word in enumerate(tools.NUMBERS):
        phase = torch.tensor([number / 100 * math.pi * k for k in (1, 2, 4, 8)])
        new[tools.IDS[word]] = 0.5 * new[tools.IDS[word]] + phase.cos() @ waves[0] + phase.sin() @ waves[1]
    model.load_state_dict({**old, "model.embed_tokens.weight": new}, strict=False)
    return model


def draw(out, seed, world, mixture, count, length, queue):
    """A process of its own that packs rows ahead of the training."""
    source = stream(out, seed, world)
    while True:
        queue.put(rows(source, mixture, count, length))


class Packed:
    """Attention for packed rows, by model.Cache's protocol: group by group, where a query sees the prefix and itself.

    One mask over whole rows would give the same; most of its scores are between groups that do not see each other.
    """

    length = 0  # nothing is held from before

    def __init__(self, group, query):
        number = group + torch.arange(len(group))[:, None] * (
            group.max() + 1
        )  # (B, T), another one for each group of each row
        self.sizes = number.flatten().unique_consecutive(return_counts=True)[1].tolist()
        self.sees = [((q == 0) | (q == q[:, None])).tril() for q in query.flatten().split(self.sizes)]  # (n, n) each

    def attend(self, layer, q, k, v, mask):
        B, H, T, C = q.shape
        groups = [x.transpose(1, 2).flatten(0, 1).split(self.sizes) for x in (q, k, v)]  # (n, H, C) each
        heads = lambda x: x.transpose(0, 1)[None]  # (1, H, n, C)
        outs = [
            F.scaled_dot_product_attention(*map(heads, parts), attn_mask=sees)[0].transpose(0, 1)
            for *parts, sees in zip(*groups, self.sees)
        ]
        return torch.cat(outs).view(B, T, H, C).transpose(1, 2)


def predict(model, batch, full, crop):
    """Scores (n, V) of the n learned tokens of packed rows, their targets, weights, and where they stand (B, T)."""
    ids, group, query, place, target, weight, shown = (
        torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in batch
    )
    seen = [full[s] if s >= 0 else crop[~s] for s in shown]
    embeds = model.visual.merger(torch.from_numpy(np.concatenate(seen)).float()) if seen else None
    hidden = model(ids, position_ids=place, image_embeds=embeds, cache=Packed(group, query))  # (B, T, D)
    on = weight > 0
    return model.logits(hidden[on]), target[on], weight[on], on


@torch.no_grad()
def exact(model, source, full, crop, tests, count):
    """Share of queries whose every word is predicted, per test: what greedy answers would get exactly right."""
    scores = {}
    for name, (kind, arguments) in tests.items():
        length = 1024 if arguments.get("depth") == 6 or arguments.get("crops") or "least" in arguments else 512
        count_rows = max(1, count * 512 // length) * (4 if "least" in arguments else 1)  # one turn of few dialogues
        batch = rows(source, [(1, kind, arguments)], count_rows, length)
        logits, target, _, on = predict(model, batch, full, crop)
        row = on.nonzero()[:, 0].numpy()
        query = row * 10**6 + batch[1][on] * 1000 + batch[2][on]
        right = (logits.argmax(-1) == target).numpy()
        scores[name] = round(float(np.mean([right[query == q].all() for q in np.unique(query)])), 4)
    return scores


def schedule(step, steps, shares):
    """The phase that a step is in, and its factor on the rates: up over 30 steps of each phase, down over the last.

    Python's numbers: they go into text.pt, which is read without NumPy's.
    """
    ends = list(accumulate(round(share * steps) for share in shares))
    phase = min(bisect_right(ends, step), len(ends) - 1)
    begun = step - (ends[phase - 1] if phase else 0)
    return phase, min(1, (begun + 1) / 30, 2.06 * (1 - step / steps) / shares[-1] + 0.03)


def train_text(rank, ranks, out, world, steps, batch, seed, keep_every):
    """One of `ranks` processes of one thread each: its rows, the mean of all gradients, the same update."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out.resolve()}/rendezvous", rank=rank, world_size=ranks)
    model, (_, _, phases, tests) = Qwen25VL(config(world)), WORLDS[world]
    restore(out / "words.pt", model, ())
    model.visual.requires_grad_(False)
    model.visual.merger.requires_grad_(True)
    matrices = [p for name, p in model.named_parameters() if name.startswith("model.layers") and p.ndim == 2]
    ours = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    optimizers = Muon(matrices, 1.0), torch.optim.AdamW(rest, 1.0, betas=(0.9, 0.98), weight_decay=0.05)
    first = restore(out / "text.pt", model, optimizers)
    full, crop = (
        np.load(out / f"{name}.npy", mmap_mode="r") for name in ("full", "crop")
    )  # one copy for all processes
    held, queue, worker, now = stream(out, 7, world, held=True), mp.get_context("spawn").Queue(6), None, None
    for step in range(first, steps):
        phase, factor = schedule(step, steps, [share for share, *_ in phases])
        _, mixture, length, *rates = phases[phase]
        if phase != now:
            if worker:
                worker.terminate()
            now, queue = phase, mp.get_context("spawn").Queue(6)
            worker = mp.get_context("spawn").Process(
                target=draw,
                args=(out, seed + 1000 * step + rank, world, mixture, max(1, batch // ranks // length), length, queue),
                daemon=True,
            )
            worker.start()
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        logits, target, weight, _ = predict(model, queue.get(), full, crop)
        loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
        loss.backward()
        trained = [*matrices, *rest]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained])
        dist.all_reduce(flat)
        for p, part in zip(trained, (flat / ranks).split([p.numel() for p in trained])):
            p.grad = part.view_as(p)
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0 and step % 50 == 49:
            log(out, {"stage": "loss", "step": step + 1, "loss": round(loss.item(), 4)})
        if rank == 0 and step % 200 == 199:
            scores = exact(model, held, full, crop, tests, 6)
            log(
                out,
                {
                    "stage": "text",
                    "step": step + 1,
                    "tokens": (step + 1) * batch,
                    "loss": round(loss.item(), 4),
                    **scores,
                },
            )
            save(out / "text.pt", model, step + 1, optimizers)
        if rank == 0 and keep_every and (step + 1) % keep_every == 0:
            publish(copy.deepcopy(model), out / f"base-{step + 1}", world)
    if rank == 0:
        log(out, {"stage": "end", "step": steps, **exact(model, held, full, crop, tests, 12)})
        save(out / "text.pt", model, steps, optimizers)
    dist.barrier()
    worker.terminate()
    os._exit(0)  # the queue's own thread would wait for readers


# -- 5. all of it ------------------------------------------------------------------------------------------------------


def log(out, entry):
    entry = {"time": round(time.time()), **entry}
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    print("  ".join(f"{k} {v}" for k, v in entry.items() if k != "time"), flush=True)


def save(path, model, step=0, optimizers=()):
    torch.save(
        {"model": model.state_dict(), "step": step, "optimizers": [o.state_dict() for o in optimizers]}, f"{path}.tmp"
    )
    os.replace(f"{path}.tmp", path)


def restore(path, model, optimizers):
    """What `save` wrote, if it has: the number of steps that are done."""
    if not path.exists():
        return 0
    kept = torch.load(path, weights_only=True)
    model.load_state_dict(kept["model"])
    for optimizer, state in zip(optimizers, kept["optimizers"]):
        optimizer.load_state_dict(state)
    return kept["step"]


def publish(model, folder, world):
    """The checkpoint in the hub's layout, bf16, with its tokenizer and processor files."""
    save_pretrained(model.to(torch.bfloat16), folder)
    (tools.write_words if world == "tools" else write_tokenizer)(Path(folder))


def draw_curve(out, tests):
    """curve.png: exact answers of every test over the tokens of the text stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [entry for entry in map(json.loads, open(out / "log.jsonl")) if entry["stage"] == "text"]
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    for name in tests:
        axis.plot([e["tokens"] / 1e6 for e in entries], [e.get(name, math.nan) for e in entries], label=name)
    axis.set_xlabel("million tokens of text")
    axis.set_ylabel("queries answered exactly")
    axis.legend(fontsize=8, ncol=2)
    figure.tight_layout()
    figure.savefig(out / "curve.png", dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tiny.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/tiny", metavar="DIR", help="working folder; stages in it are kept (default runs/tiny)")
    add("--pictures", type=int, default=96000, help="scenes to draw, 2000 of them held out (default 96000)")
    add("--vision-steps", type=int, default=6000, help="batches of 128 pictures (default 6000)")
    add("--text-steps", type=int, default=3300, help="updates of the text stage (default 3300)")
    add("--batch", type=int, default=8192, help="tokens of an update, over all processes (default 8192)")
    add("--processes", type=int, default=2, help="processes of one thread each (default 2)")
    add("--seed", type=int, default=1, help="of the pictures, the weights and the stream (default 1)")
    add("--world", choices=WORLDS, default="clevr", help="tools: go on from a finished base, with tool policies")
    vision = "take the vision tower of this finished base instead of training one (default with tools: tiny/base)"
    add("--vision", metavar="DIR", help=vision)
    add("--keep-every", type=int, default=0, metavar="N", help="also keep base-N, base-2N, ... of the text stage")
    args = parser.parse_args(argv)
    positive = min(args.vision_steps, args.text_steps, args.processes) >= 1
    if not positive or args.pictures < HELD + 500 or args.batch < 1024 * args.processes:
        raise InputError(
            f"found {args.pictures} pictures, {args.batch} tokens of an update on {args.processes} processes, "
            f"expected {HELD + 500} pictures at least, positive steps, 1024 tokens per process at least"
        )
    out = Path(args.out)
    claim(out, "tiny.pretrain", OURS)
    if args.world == "tools":
        args.vision = args.vision or str(Path(__file__).resolve().parent / "base")
    drawn = pictures(out / "pictures", args.pictures, args.seed, args.processes)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.processes)
    if args.world == "tools":
        model = grown(args.vision, args.seed)
        save(out / "words.pt", model)
    else:
        model = Qwen25VL(config(args.world))
        initialise(model)
        if args.vision:  # but for what speaks to a model that has learnt
            tower = load_pretrained(args.vision).visual.state_dict()
            tower = {name: p for name, p in tower.items() if "merger.mlp" not in name}
            model.visual.load_state_dict(tower, strict=False)
        else:
            train_vision(model, drawn, out, args.vision_steps)
    done, steps = out / "features.done", args.vision or str(args.vision_steps)
    if not done.exists() or done.read_text() != steps:
        write_features(model, drawn, out)
        done.write_text(steps)
    if not (out / "words.pt").exists():
        directions, picture = prepare(model, args.seed)
        train_merger(model, drawn, np.load(out / "full.npy", mmap_mode="r"), directions, picture, out, 240)
        save(out / "words.pt", model)
    (out / "rendezvous").unlink(missing_ok=True)
    arguments = args.processes, out, args.world, args.text_steps, args.batch, args.seed, args.keep_every
    mp.spawn(train_text, arguments, args.processes)
    model.load_state_dict(torch.load(out / "text.pt", weights_only=True)["model"])
    publish(model, out / "base", args.world)
    draw_curve(out, WORLDS[args.world][3])
    print(out / "base")


if __name__ == "__main__":
    command(main)
