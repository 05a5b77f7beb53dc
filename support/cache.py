"""Keys and values held once: what a policy, its prompts and their responses share is read from where it lies.

    policy prefix   held once, by every query that names the policy     (1,J,S,C) per layer
      prompt        held once, by all responses to it                   (B,J,S,C), the prompts of one prefill
        response    one slot each, given on when the response ends      (B,J,S,C), B rows being written

    1. Parts of attention   over some of the keys, joined by their log-sum-exp
    2. Segment              prompts being read: they see the prefix that they share
    3. Slots                responses being written, on a CPU: one batched product per segment, no key or value copied
    4. Arena                the same on a GPU: one kernel (kernels/decode_triton.py) reads ranges of one arena per layer

The caches follow the protocol of model.Cache. Axes: model.py; B is also the rows of a decoding step.
"""

import math
import sys
import weakref
from importlib.util import find_spec

import numpy as np
import torch
from einops import rearrange

import model as qwen
from data import plain

# -- 1. parts of attention ---------------------------------------------------------------------------------------------

SCORES = 1 << 24  # scores held at a time where no fused kernel gives the log-sum-exp


def attend_part(q, k, v, bias=None, causal=False):
    """Attention over one part of the keys, and the logarithm of what its softmax divided by.

    q (B,J,T,C), k and v (B,J,S,C), bias added to the scores, as (B,J,T,S). Returns (B,J,T,C) and fp32 (B,J,T,1).
    """
    if q.device.type == "cpu":  # tiles stay in the processor's cache: 2 to 4 times the speed of the plain form
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
    elif bias is not None:
        return attend_plainly(q, k, v, bias, causal)
    elif q.dtype == torch.float32:  # flash attention is for halves
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        lse = lse[:, :, : q.shape[2]]  # it comes padded
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse[..., None]


def attend_plainly(q, k, v, bias=None, causal=False):
    """`attend_part` in matrix products, some queries at a time."""
    outs, lses, S = [], [], k.shape[2]
    for start in range(0, q.shape[2], size := max(1, SCORES // (q.shape[0] * q.shape[1] * S))):
        rows = q[:, :, start : start + size]
        scores = torch.matmul(rows / math.sqrt(q.shape[-1]), k.mT).float()  # (B,J,T,S)
        if bias is not None:
            scores += bias
        if causal:
            scores += torch.full_like(scores[0, 0], -torch.inf).triu(1 + start)
        lses.append(scores.logsumexp(-1, keepdim=True))
        outs.append(torch.matmul(scores.sub_(lses[-1]).exp_().to(v.dtype), v))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def join(outs, lses):
    """Attention over several sets of keys, from that over each: exactly the softmax over their union.

    outs (n,...,C) of n sets, lses (n,...,1) fp32, -inf where a set is not seen. Returns (...,C).
    """
    return (outs * lses.softmax(0).to(outs.dtype)).sum(0)


def padding_bias(lengths, S, like):
    """0 where a row's keys are real, -inf behind them: (B,1,1,S); None where every row is full."""
    lengths = torch.as_tensor(lengths, device=like.device)
    behind = torch.arange(S, device=like.device) >= lengths[:, None]
    return like.new_zeros(behind.shape).masked_fill_(behind, -torch.inf)[:, None, None]


# -- 2. prompts being read ---------------------------------------------------------------------------------------------


class Segment:
    """Cache of one forward pass over prompts: keeps their keys and values, and lets them see the prefix they share.

    A finished one is only read: `keys[layer]`, `values[layer]` (B,J,S,C), `lengths`, the tokens of each prompt, `bias`
    over padding, `parent`, the prefix.
    """

    def __init__(self, parent, lengths):
        self.parent, self.lengths = parent, lengths
        self.keys, self.values, self.bias = [], [], None
        self.length = 0  # the model's protocol: tokens seen before, which matter only to masks that we never pass

    def attend(self, layer, q, k, v, mask):
        self.keys.append(k)
        self.values.append(v)
        if layer == 0 and min(self.lengths) < k.shape[2]:
            self.bias = padding_bias(self.lengths, k.shape[2], k)
        if self.parent is None:
            return qwen.attend(q, k, v)
        B, r = len(q), q.shape[1] // k.shape[1]
        own = attend_part(q, k.repeat_interleave(r, 1), v.repeat_interleave(r, 1), causal=True)
        asked = rearrange(q, "b (j r) t c -> 1 j (b r t) c", r=r)
        prefix = attend_part(asked, self.parent.keys[layer], self.parent.values[layer])
        prefix = [rearrange(x, "1 j (b r t) c -> b (j r) t c", b=B, r=r) for x in prefix]
        return join(*map(torch.stack, zip(own, prefix)))

    def keep(self, prompts):
        """Forget all prompts but these."""
        self.lengths = [self.lengths[b] for b in prompts]
        self.bias = None if self.bias is None else self.bias[prompts]
        keep_rows(self, prompts)


def keep_rows(cache, rows):
    """Only these rows of all keys and values, layer by layer: an old layer goes before the next new one comes."""
    rows = torch.tensor(rows, device=cache.keys[0].device)
    for held in cache.keys, cache.values:
        for layer, x in enumerate(held):
            held[layer] = x[rows]


# -- 3. responses being written, on a CPU ------------------------------------------------------------------------------


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
            grid = np.full((len(segment.lengths), max(map(len, readers.values()))), -1)  # (B, rows at most), -1: none
            for index, rows in readers.items():
                grid[index, : len(rows)] = rows
            rows, real = torch.from_numpy(grid.ravel()), torch.from_numpy(np.flatnonzero(grid.ravel() >= 0))
            device = segment.keys[0].device
            real = None if len(real) == len(rows) else real.to(device)
            rows = rows.clamp(min=0).to(device)
            self.readers.append((level, segment, rows, rows if real is None else rows[real], real))
        self.levels = 1 + max((level for level, *_ in self.readers), default=0)

    def set(self, place):
        """Before a step: the place (B,) in each slot where the new token goes; it sees all before and itself."""
        B, J, capacity, _ = self.keys[0].shape
        self.span = int(place.max()) + 1
        even = self.span == int(place.min()) + 1
        place = torch.from_numpy(place).to(self.keys[0].device)
        self.bias = None if even else padding_bias(place + 1, self.span, self.keys[0])
        self.into = (
            torch.arange(B * J, device=place.device).view(B, J) * capacity + place[:, None]
        ).flatten()  # (B*J,)

    def attend(self, layer, q, k, v, mask):
        keys, values = self.keys[layer], self.values[layer]
        keys.view(-1, k.shape[-1]).index_copy_(0, self.into, k.view(-1, k.shape[-1]))
        values.view(-1, k.shape[-1]).index_copy_(0, self.into, v.view(-1, k.shape[-1]))
        (B, H, _, C), J = q.shape, k.shape[1]
        q = q.view(B, J, H // J, C)
        own = attend_part(q, keys[:, :, : self.span], values[:, :, : self.span], self.bias)
        return self.with_shared(layer, q, own).view(B, H, 1, C)

    def with_shared(self, layer, q, own):
        """Attention (B,J,T,C) of q (B,J,T,C), T queries per row, to its prompt and prefix as well; own: to its own."""
        B, J, T, C = q.shape
        outs = q.new_zeros(self.levels, B, J, T, C)  # of each level: own tokens, prompt, prefix
        lses = q.new_full((self.levels, B, J, T, 1), -torch.inf, dtype=torch.float)
        outs[0], lses[0] = own
        for level, segment, rows, readers, real in self.readers:
            prompts = len(segment.lengths)
            asked = q[rows].view(prompts, -1, J, T, C).transpose(1, 2).reshape(prompts, J, -1, C)  # rows by prompt
            parts = attend_part(asked, segment.keys[layer], segment.values[layer], segment.bias)
            for into, part in zip((outs, lses), parts):
                part = part.unflatten(2, (-1, T)).transpose(1, 2).flatten(0, 1)  # (rows of all, J, T, C or 1)
                into[level, readers] = part if real is None else part[real]
        return join(outs, lses)

    def reading(self, rows, starts, lengths, where):
        """Cache of one pass over more tokens of some rows, whose own go on there; see SlotsReading."""
        return SlotsReading(self, rows, starts, lengths, where)

    def keep(self, rows):
        """Give up all slots but these."""
        keep_rows(self, rows)

    def step(self, read, *inputs):
        return read(*inputs)


class SlotsReading(Slots):
    """Cache of one pass over tokens that rows are given to read, say what a tool has answered.

    rows: which slots; starts: tokens that each holds; lengths: tokens that it reads, padded in the pass to the longest;
    where: (segment, index in it) that each sees.
    """

    def __init__(self, slots, rows, starts, lengths, where):
        self.keys, self.values, self.length = slots.keys, slots.values, 0
        self.connect(dict(enumerate(where)))
        _, J, capacity, _ = self.keys[0].shape
        device = self.keys[0].device
        self.rows, starts, lengths = (torch.tensor(x, device=device) for x in (rows, starts, lengths))
        new = torch.arange(int(lengths.max()), device=device)  # (T,)
        place, self.real = starts[:, None] + new, new < lengths[:, None]  # (B,T) each
        heads = self.rows[:, None, None] * J + torch.arange(J, device=device)  # (B,1,J)
        self.into = (heads * capacity + place[..., None])[self.real].flatten()  # (L*J,)
        self.span = int((starts + lengths).max())
        hidden = torch.arange(self.span, device=device) > place[..., None]  # (B,T,S)
        self.bias = self.keys[0].new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]  # (B,1,T,S)

    def attend(self, layer, q, k, v, mask):
        (B, H, T, C), J = q.shape, k.shape[1]
        for held, new in (self.keys[layer], k), (self.values[layer], v):
            held.view(-1, C).index_copy_(0, self.into, new.transpose(1, 2)[self.real].flatten(0, 1))
        keys, values = (held[layer][self.rows, :, : self.span] for held in (self.keys, self.values))
        q = q.reshape(B, J, -1, C)  # the heads that share keys, one after the other
        own = attend_part(q, keys, values, self.bias.repeat(1, 1, H // J, 1))
        return self.with_shared(layer, q, own).view(B, H, T, C)


# -- 4. responses being written, on a GPU ------------------------------------------------------------------------------

PLAIN_STEPS = 3  # before one is recorded: kernels are compiled and loaded, and workspaces made, outside of a graph


class Replayed:
    """read(*inputs) -> tensor, recorded after some plain calls as one CUDA graph: from then on the host asks for the
    inputs' copies and one launch, not for eight hundred.

    All that `read` touches beside its inputs has to stay where it is, and no number in it may come from the host.
    The tensor is overwritten by the next call. What cannot be recorded goes on in plain calls.
    """

    def __init__(self, read):
        self.read, self.calls, self.graph = read, 0, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == PLAIN_STEPS + 1:
            self.inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL watches from another
                    self.output = self.read(*self.inputs)
                self.graph = graph
            except RuntimeError as error:
                print(f"warning: decoding without a CUDA graph ({plain(error)})", file=sys.stderr, flush=True)
        if self.graph is None:
            return self.read(*inputs)
        for held, x in zip(self.inputs, inputs):
            held.copy_(x)
        self.graph.replay()
        return self.output


class Arena:
    """Cache of decoding: per layer one arena of keys and values (S,J,C), in which all that a row sees are ranges.

    The first rows * capacity tokens are the rows' own. Behind them lie the segments that rows read, copied there once,
    each as long as the Segment is referred to anywhere. Where room is short, the arena grows, layer by layer.
    All that a step reads stays where it is until the arena grows or gives up rows: so steps can be replayed.
    """

    def __init__(self, model, rows, capacity, room):
        from kernels.decode_triton import MOST, attend_ranges

        config, like = model.config, model.head_weight
        shape = (rows * capacity + room, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = ([like.new_empty(shape) for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.attend_ranges, self.length, self.taken = attend_ranges, 0, rows * capacity
        self.own = torch.arange(rows, device=like.device, dtype=torch.int32) * capacity
        self.place, self.tiles, self.ranges = torch.empty_like(self.own), None, None
        self.replays, self.replayed = model.compiled, None
        self.held = weakref.WeakKeyDictionary()  # {Segment: where its prompts start, and its last one ends}
        cores = torch.cuda.get_device_properties(like.device).multi_processor_count
        enough = lambda N: -(-rows // N) * config.num_key_value_heads >= 2 * cores  # programs for all multiprocessors
        self.N = max([N for N in range(1, MOST + 1) if N & (N - 1) == 0 and enough(N)], default=1)  # rows of a tile

    def connect(self, where):
        """Tiles of rows that read alike. where: {row: (segment, index in it)} of the rows that are alive."""
        reads = [[] for _ in self.own]  # of each row, ranges (start, end)
        for row, (segment, index) in where.items():
            for part, i in (segment.parent, 0), (segment, index):
                if part is not None:
                    reads[row].append(self.range(part, i))
        for segment, _ in where.values():  # a prefix is still needed by prompts to come
            segment.keys.clear()
            segment.values.clear()
        N, order = self.N, sorted(range(len(reads)), key=reads.__getitem__)
        tiles = np.full((-(-len(order) // N), N), -1, dtype=np.int32)
        tiles.ravel()[: len(order)] = order
        ranges = np.zeros((len(tiles), 2 * N, 4), dtype=np.int32)  # start, end, seen from row .. to row of the tile
        for tile, into in zip(tiles, ranges):
            seen = {}
            for n, row in enumerate(tile[tile >= 0]):
                for one in reads[row]:
                    seen.setdefault(one, []).append(n)
            for place, (one, readers) in zip(into, seen.items()):
                place[:] = *one, readers[0], readers[-1] + 1
        if self.tiles is None:
            self.tiles, self.ranges = (self.there(x) for x in (tiles, ranges))
        self.tiles.copy_(torch.from_numpy(tiles), non_blocking=True)
        self.ranges.copy_(torch.from_numpy(ranges), non_blocking=True)

    def range(self, segment, index):
        if segment not in self.held:
            self.copy(segment)
        starts = self.held[segment]
        return starts[index], starts[index + 1]

    def copy(self, segment):
        """Give a segment its place: its prompts one after the other, without their padding."""
        start, size = self.taken, sum(segment.lengths)
        for held in sorted(self.held.values()):
            if held[0] - start >= size:
                break  # a gap that is large enough
            start = held[-1]
        S, longest = len(self.keys[0]), segment.keys[0].shape[2]
        real = np.concatenate([b * longest + np.arange(n) for b, n in enumerate(segment.lengths)])
        real = self.there(real)
        for arena, new in (self.keys, segment.keys), (self.values, segment.values):
            for layer, x in enumerate(new):
                if start + size > S:
                    self.replayed = None
                    arena[layer] = torch.cat([arena[layer], x.new_empty(start + size - S + S // 8, *x.shape[1::2])])
                arena[layer][start : start + size] = x.transpose(1, 2).flatten(0, 1)[real]
        self.held[segment] = (start + np.cumsum([0, *segment.lengths])).tolist()

    def set(self, place):
        """Before a step: how many tokens (B,) each row has written; its new one goes behind them."""
        torch.add(self.own, self.there(place.astype(np.int32)), out=self.place)

    def there(self, x):
        return torch.from_numpy(x).to(self.own.device, non_blocking=True)

    def attend(self, layer, q, k, v, mask):
        new = [x.flatten(1, 2).contiguous() for x in (q, k, v)]  # (B,H,C), (B,J,C)
        where = self.tiles, self.ranges, self.own, self.place
        return self.attend_ranges(*new, self.keys[layer], self.values[layer], *where)[:, :, None]

    def reading(self, rows, starts, lengths, where):
        """Cache of one pass over more tokens of some rows, whose own go on there; see ArenaReading."""
        return ArenaReading(self, rows, starts, lengths, where)

    def keep(self, rows):
        """Give up all rows but these."""
        self.own = self.own[torch.tensor(rows, device=self.own.device)]
        self.place, self.tiles, self.replayed = torch.empty_like(self.own), None, None

    def step(self, read, *inputs):
        """read(*inputs), a step of the model with this cache; replayed where that is wanted."""
        self.replayed = self.replayed or Replayed(read)
        return (self.replayed if self.replays else read)(*inputs)


class ArenaReading(Arena):
    """SlotsReading in an arena: to its kernel each of the tokens is a row, which sees those of its row before it."""

    def __init__(self, arena, rows, starts, lengths, where):
        vars(self).update(vars(arena))
        member = np.repeat(np.arange(len(rows)), lengths)  # (L,) of each token
        number = np.concatenate([np.arange(n) for n in lengths])
        self.own = arena.own[self.there(np.array(rows)[member])]
        self.place, self.tiles, self.ranges = torch.empty_like(self.own), None, None
        self.connect({i: where[b] for i, b in enumerate(member)})
        self.set(np.array(starts)[member] + number)
        self.token = self.there(member), self.there(number)  # (L,) each: where it stands in the pass

    def attend(self, layer, q, k, v, mask):
        for held, new in (self.keys[layer], k), (self.values[layer], v):  # before the kernel, which orders no rows
            held[self.place] = new.transpose(1, 2)[self.token]
        out = torch.zeros_like(q.transpose(1, 2))  # (B,T,H,C)
        q, k, v = (x.transpose(1, 2)[self.token][:, :, None] for x in (q, k, v))  # (L,heads,1,C)
        out[self.token] = super().attend(layer, q, k, v, mask)[:, :, 0]
        return out.transpose(1, 2)


def decoding_cache(model, rows, capacity, room):
    """Slots, or on a GPU that Triton serves an Arena; room: tokens of prompts that it should hold without growing."""
    C = model.config.head_dim
    if model.head_weight.is_cuda and find_spec("triton") and C >= 16 and C & (C - 1) == 0:
        return Arena(model, rows, capacity, room)
    return Slots(model, rows, capacity)
