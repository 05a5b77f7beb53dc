"""Keys and values held once: what a policy, its prompts and their responses share is read from where it lies.

    policy prefix   held once, by every query that names the policy     (1, G, S, K) a layer
      prompt        held once, by all responses to it                   (B, G, S, K), the prompts of one prefill
        response    one slot each, given on when the response ends      (R, G, S, K)

A decoding step multiplies the queries of all rows that share a segment with its keys in one batched product, and joins
the parts by their log-sum-exp: no key or value is ever copied to where it is used. Both caches follow the protocol of
model.Cache.

Axes: B prompts, R rows (responses being written), T tokens, S keys, H heads, G kv heads, K head dim.
"""

import math

import numpy as np
import torch
from einops import rearrange

import model as qwen

# -- 1. parts of attention ---------------------------------------------------------------------------------------------

SCORES = 1 << 24  # scores held at a time where no fused kernel gives the log-sum-exp


def attend_part(q, k, v, bias=None, causal=False):
    """Attention over one part of the keys, and the logarithm of what its softmax divided by.

    q (B,G,T,K), k and v (B,G,S,K), bias added to the scores, as (B,G,T,S). Returns (B,G,T,K) and fp32 (B,G,T,1).
    """
    if q.device.type == "cpu":  # tiles stay in the processor's cache: 2 to 4 times the speed of the plain form
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
        return out, lse[..., None]
    return attend_plainly(q, k, v, bias, causal)


def attend_plainly(q, k, v, bias=None, causal=False):
    """`attend_part` in matrix products, some queries at a time."""
    outs, lses, S = [], [], k.shape[2]
    for start in range(0, q.shape[2], size := max(1, SCORES // (q.shape[0] * q.shape[1] * S))):
        rows = q[:, :, start : start + size]
        scores = torch.matmul(rows / math.sqrt(q.shape[-1]), k.mT).float()  # (B,G,T,S)
        if bias is not None:
            scores += bias
        if causal:
            scores += torch.full_like(scores[0, 0], -torch.inf).triu(1 + start)
        lses.append(scores.logsumexp(-1, keepdim=True))
        outs.append(torch.matmul(scores.sub_(lses[-1]).exp_().to(v.dtype), v))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def join(outs, lses):
    """Attention over several sets of keys, from that over each: exactly the softmax over their union.

    outs (L,...,K) of L sets, lses (L,...,1) fp32, -inf where a set is not seen. Returns (...,K).
    """
    return (outs * lses.softmax(0).to(outs.dtype)).sum(0)


def padding_bias(lengths, S, like):
    """0 where a row's keys are real, -inf behind them: (B,1,1,S); None where every row is full."""
    lengths = torch.as_tensor(lengths, device=like.device)
    behind = torch.arange(S, device=like.device) >= lengths[:, None]
    return like.new_zeros(behind.shape).masked_fill_(behind, -torch.inf)[:, None, None]


# -- 2. caches ---------------------------------------------------------------------------------------------------------


class Segment:
    """Cache of one forward pass over prompts: keeps their keys and values, and lets them see the prefix they share.

    A finished one is only read: `keys[layer]`, `values[layer]` (B,G,S,K), `bias` over padding, `parent`, the prefix.
    """

    def __init__(self, parent=None):
        self.parent = parent
        self.keys, self.values, self.bias = [], [], None
        self.length = 0  # the model's protocol: tokens seen before, which matter only to masks that we never pass

    def attend(self, layer, q, k, v, mask):
        self.keys.append(k)
        self.values.append(v)
        if self.parent is None:
            return qwen.attend(q, k, v)
        B, r = len(q), q.shape[1] // k.shape[1]
        own = attend_part(q, k.repeat_interleave(r, 1), v.repeat_interleave(r, 1), causal=True)
        asked = rearrange(q, "b (g r) t k -> 1 g (b r t) k", r=r)
        prefix = attend_part(asked, self.parent.keys[layer], self.parent.values[layer])
        prefix = [rearrange(x, "1 g (b r t) k -> b (g r) t k", b=B, r=r) for x in prefix]
        return join(*map(torch.stack, zip(own, prefix)))

    def keep(self, rows):
        """Forget all prompts but these (B',)."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.bias = None if self.bias is None else self.bias[rows]


class Slots:
    """Cache of decoding: a place for each row's own tokens, and which rows read which place of which segment."""

    def __init__(self, model, rows, capacity):
        config, like = model.config, model.head_weight
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]  # zeros: what is masked is finite
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.readers, self.length = [], 0

    def connect(self, where):
        """Group the rows by what they read. where: {row: (segment, index in it)} of the rows that are alive."""
        grids = {}  # (level, segment): {index: rows}
        for row, (segment, index) in where.items():
            grids.setdefault((1, segment), {}).setdefault(index, []).append(row)
            if segment.parent is not None:
                grids.setdefault((2, segment.parent), {}).setdefault(0, []).append(row)
        self.readers = []
        for (level, segment), readers in grids.items():
            grid = np.full((len(segment.keys[0]), max(map(len, readers.values()))), -1)  # (B, rows at most), -1: none
            for index, rows in readers.items():
                grid[index, : len(rows)] = rows
            rows, real = torch.from_numpy(grid.ravel()), torch.from_numpy(np.flatnonzero(grid.ravel() >= 0))
            device = segment.keys[0].device
            real = None if len(real) == len(rows) else real.to(device)
            rows = rows.clamp(min=0).to(device)
            self.readers.append((level, segment, rows, rows if real is None else rows[real], real))
        self.levels = 1 + max((level for level, *_ in self.readers), default=0)

    def set(self, place):
        """Before a step: the place (R,) in each slot where the new token goes; it sees all before and itself."""
        R, G, C, _ = self.keys[0].shape
        self.span = int(place.max()) + 1
        even = self.span == int(place.min()) + 1
        place = torch.from_numpy(place).to(self.keys[0].device)
        self.bias = None if even else padding_bias(place + 1, self.span, self.keys[0])
        self.into = (torch.arange(R * G, device=place.device).view(R, G) * C + place[:, None]).flatten()  # (R*G,)

    def attend(self, layer, q, k, v, mask):
        keys, values = self.keys[layer], self.values[layer]
        keys.view(-1, k.shape[-1]).index_copy_(0, self.into, k.view(-1, k.shape[-1]))
        values.view(-1, k.shape[-1]).index_copy_(0, self.into, v.view(-1, k.shape[-1]))
        (R, H, _, K), G = q.shape, k.shape[1]
        q = q.view(R, G, H // G, K)
        outs = q.new_zeros(self.levels, R, G, H // G, K)  # of each level: own tokens, prompt, prefix
        lses = q.new_full((self.levels, R, G, H // G, 1), -torch.inf, dtype=torch.float)
        outs[0], lses[0] = attend_part(q, keys[:, :, : self.span], values[:, :, : self.span], self.bias)
        for level, segment, rows, readers, real in self.readers:
            B = len(segment.keys[layer])
            asked = q[rows].view(B, -1, G, H // G, K).transpose(1, 2).reshape(B, G, -1, K)  # (B, G, N * H/G, K)
            parts = attend_part(asked, segment.keys[layer], segment.values[layer], segment.bias)
            for into, part in zip((outs, lses), parts):
                part = part.unflatten(2, (-1, H // G)).transpose(1, 2).flatten(0, 1)  # (B * N, G, H/G, K or 1)
                into[level, readers] = part if real is None else part[real]
        return join(outs, lses).view(R, H, 1, K)

    def keep(self, rows):
        """Give up all slots but these (R',)."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
