"""What a step reads: which items, dealt out to which rank, as which tensors; and log-probabilities of what it learns.

Randomness derives from (seed, step, item) alone. So any number of ranks sees the same global batch, and a run that is
resumed replays nothing.

Axes: model.py.
"""

import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from kernels.logprob import linear_logprob
from support.config import refuse

# -- 1. which items ---------------------------------------------------------------------------------------------------


def rng(*key):
    """A numpy generator that depends on nothing but the integers of `key`, say (seed, step, item)."""
    return np.random.default_rng(key)


def batches(n_items, batch_size, seed, step, rank=0, world=1, limit=None, whole=False):
    """Item indices of this rank's share of the global batch number `step`.

    The stream is one shuffled epoch after another, so no item is dropped at an epoch's end; `limit` (items) ends it,
    and its last batch may be short. whole: an epoch is as many whole batches as it has, so that none holds an item
    twice. Ranks take every world-th index: together they hold each of the batch exactly once.
    """
    start, stop = step * batch_size, min((step + 1) * batch_size, limit or math.inf)
    epoch_size = whole_batches(n_items, batch_size) if whole else n_items
    chosen = []
    for epoch in range(start // epoch_size, -(-stop // epoch_size)):
        order = rng(seed, epoch).permutation(n_items)
        chosen += order[max(start - epoch * epoch_size, 0) : stop - epoch * epoch_size].tolist()
    return chosen[rank::world]


def whole_batches(n_items, batch_size):
    """How many items the whole batches of an epoch hold; all of them where there are too few for one."""
    return n_items - n_items % batch_size if n_items >= batch_size else n_items


def replayed_items(config):
    """How many items of each batch come from --replay."""
    return round(config.batch_size * config.replay_share) if config.replay else 0


def mixture(step, n_items, n_replay, config):
    """The global batch of update `step` as (replayed: bool, index): first the own items, then those of --replay."""
    replayed = replayed_items(config)
    limit = None if config.steps else round(n_items * config.epochs)
    chosen = [(False, i) for i in batches(n_items, config.batch_size - replayed, config.seed, step, limit=limit)]
    return chosen + ([(True, i) for i in batches(n_replay, replayed, config.seed + 1, step)] if replayed else [])


def share(chosen, sizes, rank, world):
    """This rank's part of a global batch, sorted by size for little padding.

    Dealt to and fro, so that all ranks get as many, of nearly the same size together. sizes: one for each of `chosen`.
    """
    order = sorted(range(len(chosen)), key=lambda i: (sizes[i], i))
    return [chosen[i] for turn, i in enumerate(order) if turn % (2 * world) in (rank, 2 * world - 1 - rank)]


class Ahead:
    """[make(*key) for key in keys(step)], with the next step's made in threads meanwhile; in line where workers = 0."""

    def __init__(self, keys, make, workers):
        self.keys, self.make, self.futures = keys, make, {}
        self.pool = ThreadPoolExecutor(workers) if workers else None

    def __call__(self, step):
        if not self.pool:
            return [self.make(*key) for key in self.keys(step)]
        for s in (step, step + 1):
            if s not in self.futures:
                self.futures[s] = [self.pool.submit(self.make, *key) for key in self.keys(s)]
        return [future.result() for future in self.futures.pop(step)]


# -- 2. as tensors ----------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Right-padded rows: what the model reads and which of its predictions count."""

    input_ids: torch.Tensor  # (B,T) int64
    attention_mask: torch.Tensor  # (B,T) int64: 1 where a token stands
    labels: torch.Tensor  # (B,T) int64: the token after position t where it is learned, else -100
    index: torch.Tensor  # (L,) int64: flat positions b*T + t of the learned ones
    pixel_values: torch.Tensor | None  # (patches, 1176) fp32, the rows' pictures one after the other
    image_grid_thw: torch.Tensor | None  # (pictures, 3) int64
    position_ids: torch.Tensor | None = None  # (3,B,T) int64 where rows are packed
    parts: torch.Tensor | None = None  # (B,T) int64 there: 0 the prompt, 1, 2, ... its responses, -1 padding

    def mask(self):
        """What packed rows see, bool (B,T,T), made where the batch is; None: what causality allows."""
        if self.parts is None:
            return None
        seen, sees = self.parts[:, None, :], self.parts[:, :, None]
        return ((seen == 0) | (seen == sees)).tril()

    def to(self, device):
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{name: t if t is None else t.to(device, non_blocking=True) for name, t in moved.items()})


def collate(prompts=(), targets=(), learn=None, *, pad_id):
    """Rows `prompt + target` as one Batch.

    prompts: model.Encoded each; targets: token ids each (list or tensor); learn: bool (T,) each over the whole row, the
    tokens whose prediction counts (None: those of the target). Of no rows: a token of padding, nothing learned.
    """
    targets = [torch.as_tensor(target, dtype=torch.long) for target in targets]
    rows = [torch.cat([prompt.input_ids, target]) for prompt, target in zip(prompts, targets, strict=True)]
    learn = [
        torch.arange(len(row)) >= len(prompt.input_ids) if given is None else given
        for row, prompt, given in zip(rows, prompts, learn or [None] * len(rows))
    ]
    length = max([1, *map(len, rows)])
    input_ids = torch.full((max(len(rows), 1), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for b, (row, counts) in enumerate(zip(rows, learn)):
        input_ids[b, : len(row)] = row
        attention_mask[b, : len(row)] = 1
        labels[b, : len(row) - 1] = torch.where(counts[1:], row[1:], -100)  # position t predicts token t + 1
    learned = (labels != -100).flatten().nonzero().squeeze(1)
    return Batch(input_ids, attention_mask, labels, learned, *pictures_of(prompts))


def tokens_of(response):
    """Token ids (R,) of a response, which of them it has written, bool (R,), and what pictures it has read, [Encoded].

    response: token ids, all of them written, or an engine.Response, which may have read results of tools.
    """
    tokens = torch.as_tensor(getattr(response, "tokens", response), dtype=torch.long)
    if not (reads := getattr(response, "reads", ())):
        return tokens, torch.ones_like(tokens, dtype=torch.bool), []
    return tokens, response.written, [read for _, read in reads if read.grid_thw is not None]


def pictures_of(members):
    """Patches and grids of the pictures of these Encoded, one after the other; (None, None) without any."""
    members = [each for each in members if each.pixel_values is not None]
    if not members:
        return None, None
    return torch.cat([each.pixel_values for each in members]), torch.cat([each.grid_thw for each in members])


def pack(model, prompts, responses, pad_id):
    """Rows [prompt, response, response, ...]: the prompt is read once, each response sees it and itself (exact).

    prompts: Encoded each; responses: [[response]], those of each prompt, see `tokens_of`. A response starts with the
    prompt's last token, which predicts its first, so that every place predicts one token; positions restart after the
    prompt.
    """
    responses = [[tokens_of(response) for response in group] for group in responses]
    shared = [prompt.input_ids[:-1] for prompt in prompts]
    length = max(len(s) + sum(len(tokens) for tokens, *_ in group) for s, group in zip(shared, responses))
    input_ids, labels = torch.full((len(prompts), length), pad_id), torch.full((len(prompts), length), -100)
    part = torch.full_like(input_ids, -1)
    position_ids, read = torch.zeros(3, *input_ids.shape, dtype=torch.long), []
    for b, (prompt, group) in enumerate(zip(prompts, responses)):
        places, delta = model.positions(prompt.input_ids[None], None, prompt.grid_thw)
        stop = len(shared[b])
        input_ids[b, :stop], part[b, :stop], position_ids[:, b, :stop] = shared[b], 0, places[:, 0, :-1]
        read.append(prompt)
        for number, (tokens, written, pictures) in enumerate(group, 1):
            here = slice(stop, stop + len(tokens))
            input_ids[b, here] = torch.cat([prompt.input_ids[-1:], tokens[:-1]])
            labels[b, here], part[b, here] = tokens.masked_fill(~written, -100), number
            places, _ = model.positions(input_ids[b : b + 1, here], None, pictures_of(pictures)[1])
            position_ids[:, b, here] = len(shared[b]) + delta + places[:, 0]
            read += pictures
            stop = here.stop
    return Batch(
        input_ids,
        (part >= 0).long(),
        labels,
        (labels != -100).flatten().nonzero()[:, 0],
        *pictures_of(read),
        position_ids,
        part,
    )


def by_prompt(pairs):
    """[(prompt, response)], those of one prompt one after the other -> prompts, and [[response]] to each."""
    groups = [[*group] for _, group in itertools.groupby(pairs, lambda pair: id(pair[0]))]
    return [group[0][0] for group in groups], [[response for _, response in group] for group in groups]


def row_lengths(pairs):
    """Tokens of each row, of responses packed after one prompt and of one a row."""
    prompts, responses = by_prompt(pairs)
    lengths = [[len(getattr(response, "tokens", response)) for response in group] for group in responses]
    packed = [len(prompt.input_ids) - 1 + sum(group) for prompt, group in zip(prompts, lengths)]
    return packed, [len(prompt.input_ids) + length for prompt, group in zip(prompts, lengths) for length in group]


def packing_pays(model, pairs, most=1 << 14):
    """Are responses packed after one prompt (dense mask) cheaper to read than one by one (causal), in operations?

    pairs: [(prompt, response)], those of one prompt one after the other.
    """
    c, (packed, alone) = model.config, row_lengths(pairs)
    per_token = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim + 3 * c.intermediate_size  # in widths
    cost = lambda lengths, dense: sum(t * (per_token + dense * t) for t in lengths)
    packed = [length + 1 for length in packed]  # as many as the same tokens have alone: one response is not packed
    return max(packed, default=0) <= most and cost(packed, dense=2) < cost(alone, dense=1)


def padded_tokens(model, pairs):
    """How many tokens `lay_out` makes of them, padding included."""
    packed, alone = row_lengths(pairs)
    lengths = packed if packing_pays(model, pairs) else alone
    return len(lengths) * max(lengths)


def read_together(run, model, pairs):
    """{n: (prompt, response)} as lists of n, one for each forward pass, see Run.micro_batches.

    Those of one prompt stay together where sharing it pays, else those of one length.
    """
    tokens = lambda part: padded_tokens(model, [pairs[n] for n in part])
    shared = packing_pays(model, [*pairs.values()])
    return run.micro_batches([*pairs] if shared else sorted(pairs, key=lambda n: tokens([n])), tokens)


def lay_out(model, pairs, pad_id):
    """[(prompt, response)] as one Batch: responses packed after their prompts where that pays, else one per row."""
    if packing_pays(model, pairs):
        return pack(model, *by_prompt(pairs), pad_id)
    rows = []
    for prompt, response in pairs:
        tokens, written, pictures = tokens_of(response)
        pixels, grids = pictures_of([prompt, *pictures])
        learn = torch.cat([torch.zeros_like(prompt.input_ids, dtype=torch.bool), written])
        rows.append((dataclasses.replace(prompt, pixel_values=pixels, grid_thw=grids), tokens, learn))
    return collate(*zip(*rows), pad_id=pad_id)


# -- 3. what the model makes of them ----------------------------------------------------------------------------------


def is_fsdp(model):
    return hasattr(model, "unshard")  # fully_shard mixes FSDPModule in; asking so spares its import, two seconds


def learned_hidden(model, batch):
    """The hidden states that predict the learned tokens of the batch -> (L,D), in the order of batch.index."""
    # padding stands on the right, where causal attention does not reach it: only packed rows need a mask
    hidden = model(
        batch.input_ids, batch.mask(), batch.pixel_values, batch.image_grid_thw, batch.position_ids
    )  # (B,T,D)
    if batch.pixel_values is None and is_fsdp(model):  # each rank must give the tower's weights a gradient, here zero
        patch = torch.zeros(4, 1176, device=hidden.device)
        hidden = hidden + 0 * model.visual(patch, torch.tensor([[1, 2, 2]], device=hidden.device)).sum()
    return hidden.flatten(0, 1)[batch.index]


def token_logprobs(model, batch, *, temperature=1.0, entropy=False):
    """log p of the batch's learned tokens -> (L,) float32, in the order of batch.index, and entropies (L,) | None."""
    refuse(hasattr(model, "Decoder"), "a model that draws actions", "one that draws words, whose probability is asked")
    hidden, targets = learned_hidden(model, batch), batch.labels.flatten()[batch.index]  # (L,D), (L,)
    return linear_logprob(hidden, model.head_weight, targets, temperature=temperature, return_entropy=entropy)
