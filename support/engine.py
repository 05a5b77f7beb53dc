"""Sampling: from prompts to responses, each picture encoded once, each shared prefix and prompt read once.

    1. The next token    temperature, top-k, top-p, inverse-CDF sampling with one uniform per (seed, position)
    2. Prompts           pictures encoded once, prefixes that several prompts share
    3. sample            rows that write responses; when one ends, its row takes the next that waits

A response may be a dialogue (support/dialogue.py), which where a turn ends may give the row a tool's result to read;
then it writes on. What is drawn depends on the prompt and on the response's seed alone, not on what else is sampled.
Keys and values live in support/cache.py.
"""

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from data import InputError
from support.cache import Segment, Slots, decoding_cache
from support.prepacked import prepacked

# -- 1. the next token -------------------------------------------------------------------------------------------------


def uniforms(seed, count):
    """The random numbers of one response, float64 (count,), one per position: they depend on its seed alone."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


@dataclass
class Rules:
    """How the next token is drawn from the logits."""

    temperature: float
    top_k: int
    top_p: float
    min_tokens: int  # before a stop token may be drawn
    stop_ids: torch.Tensor
    banned_ids: torch.Tensor

    def draw(self, logits, u, used):
        """One token per row and its log-probability under the distribution it was drawn from.

        logits (B,V) fp32, overwritten; u (B,) float64 in [0, 1); used (B,) tokens written so far. Returns tokens (B,)
        and logp (B,) float64; at temperature 0 the best token, and its log-probability at temperature 1. All tensors
        are on one device, and nothing here waits for it.
        """
        logits.index_fill_(1, self.banned_ids, -torch.inf)
        if self.min_tokens:
            early = used[:, None] < self.min_tokens
            logits[:, self.stop_ids] = logits[:, self.stop_ids].masked_fill(early, -torch.inf)
        if self.temperature not in (0, 1):
            logits /= self.temperature
        logits = truncate(logits, self.top_k, self.top_p)
        best = logits.argmax(-1) if self.temperature == 0 else None
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # (B,V)
        padded = weights if weights.shape[1] % 128 == 0 else F.pad(weights, (0, -weights.shape[1] % 128))
        blocks = padded.unflatten(1, (-1, 128))  # (B, V/128, 128): only their sums are added up in float64
        mass = blocks.sum(-1).double().cumsum(-1)  # (B, V/128)
        tokens = invert(mass, blocks, u[:, None]) if best is None else best
        return tokens, (weights.gather(1, tokens[:, None]).double().log() - mass[:, -1:].log())[:, 0]


def truncate(logits, top_k, top_p):
    """-inf for all tokens but the top_k best (0: all), of those all but the fewest that reach the share top_p."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what stands before a token reaches the share already; never the first
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def invert(mass, blocks, u):
    """The token (B,) where the cumulative distribution passes u (B,1): first its block of 128, then the token.

    mass (B, V/128) float64: cumulative weight at each block's end; blocks (B, V/128, 128) fp32.
    """
    u = below(u * mass[:, -1:], mass[:, -1:])
    block = torch.searchsorted(mass, u, right=True)  # (B,1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, 128))[:, 0].double().cumsum(-1)  # (B,128)
    rest = below(u - torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0), inside[:, -1:])
    return (block * 128 + torch.searchsorted(inside, rest, right=True))[:, 0]


def below(x, end):
    """x, but less than `end`: rounding must not pass the last token."""
    return torch.minimum(x, end.nextafter(torch.zeros_like(end)))


# -- 2. prompts -------------------------------------------------------------------------------------------------------

PREFILL = 1 << 14  # tokens of one prefill pass, padding included
BUDGET = 1 << 17  # tokens of prompts and responses held at a time on a CPU
SHARE = 0.8  # of a GPU's free memory that keys and values may take; the rest is for what a pass computes
ROWS = 1024  # written at a time at most: their logits are fp32


class Pictures:
    """The pictures of all prompts, numbered by content, so that equal ones are one; each encoded when first needed."""

    def __init__(self, model):
        self.model, self.merge = model, model.config.vision.spatial_merge_size**2
        self.patches, self.features = {}, {}  # by number

    def key(self, prompt):
        """A prompt as (key (T,), [(place, number) of its pictures]): equal keys are the same prompt.

        The key is the token ids with those of picture number i replaced by -1 - i.
        """
        key, numbers = prompt.input_ids.cpu().numpy().copy(), []
        if prompt.grid_thw is None:
            return key, numbers
        counts = prompt.grid_thw.prod(1)  # (n,) patches
        for patches, grid in zip(prompt.pixel_values.split(counts.tolist()), prompt.grid_thw):
            content = hashlib.sha1(np.ascontiguousarray(patches.cpu().numpy()))
            content.update(str(grid.tolist()).encode())
            numbers.append(int.from_bytes(content.digest()[:7], "big"))
            self.patches[numbers[-1]] = patches, grid
        tokens = counts.numpy() // self.merge  # (n,)
        places = np.flatnonzero(key == self.model.config.image_token_id)
        key[places] = np.repeat(-1 - np.array(numbers), tokens)
        return key, list(zip(places[np.cumsum(tokens) - tokens].tolist(), numbers))

    def encode(self, numbers):
        """Features (I,D) of these pictures one after the other; None without pictures."""
        if new := [i for i in dict.fromkeys(numbers) if i not in self.features]:
            device = self.model.head_weight.device
            pixels = torch.cat([self.patches[i][0] for i in new])  # (U,1176)
            grids = torch.stack([self.patches[i][1] for i in new])  # (n,3)
            features = self.model.visual(pixels.to(device), grids.to(device))
            self.features |= dict(zip(new, features.split((grids.prod(1) // self.merge).tolist())))
        return torch.cat([self.features[i] for i in numbers]) if numbers else None


def common_length(prompt, start):
    """How many tokens two prompts (Encoded) begin with alike, their pictures aside."""
    n = min(len(prompt.input_ids), len(start.input_ids))
    differ = (prompt.input_ids[:n] != start.input_ids[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


# -- 3. sample ---------------------------------------------------------------------------------------------------------


@dataclass
class Response:
    tokens: list  # up to and with the stop token; of a dialogue, the results that it has read among them
    logprobs: list  # of each token, under the distribution it was drawn from; 0 of what was read
    finished: bool  # False: cut at max_tokens, or by its dialogue's limits
    reads: list = field(default_factory=list)  # [(place in tokens, Encoded)]: results, which it has not written
    turns: list | None = None  # [{"role", "text"}] of a dialogue
    actions: list | None = None  # what was drawn for each token, in an action space other than words

    @property
    def written(self):
        """Which tokens it has written, bool (R,)."""
        mask = torch.ones(len(self.tokens), dtype=torch.bool)
        for place, read in self.reads:
            mask[place : place + len(read.input_ids)] = False
        return mask


@torch.no_grad()
def sample(
    model,
    prompts,
    n,
    *,
    max_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_tokens=0,
    stop_ids=(),
    banned_ids=(),
    seeds=None,
    budget=0,
    shared=None,
    prefixes=None,
    dialogue=None,
):
    """n responses to each prompt -> [[Response]], in the order of the prompts.

    prompts: model.Encoded each; n: int, or one for each prompt.
    max_tokens: longest response; min_tokens: how many tokens come before a stop token may.
    temperature 0: greedy. top_k 0 and top_p 1 leave the distribution whole. banned_ids are never drawn.
    seeds: [[int]], one per response (default: from the numbers of prompt and response).
    budget: tokens of prompts and responses held at a time, 0: as many as suit the device; what does not fit waits.
    shared: [int], how many tokens at each prompt's start (its policy) are read once for all prompts that begin so.
    prefixes: a dict that keeps those for later calls; empty it when the weights change.
    dialogue: dialogue(p) is a new one for a response to prompt p; its reply(tokens of a turn, room) is what the row
      reads next, an Encoded of at most `room` tokens, or None where the response ends.
    """
    counts = [n] * len(prompts) if isinstance(n, int) else list(n)
    seeds = seeds or [[(p << 32) + i for i in range(count)] for p, count in enumerate(counts)]
    if [len(s) for s in seeds] != counts or max_tokens < 1 or temperature < 0:
        raise InputError(
            f"found {len(prompts)} prompts, {counts} responses, {[len(s) for s in seeds]} seeds, "
            f"max_tokens {max_tokens}, temperature {temperature}; expected one seed per response, a positive length, "
            "no negative temperature"
        )
    decoder = getattr(model, "Decoder", Decoder)(
        model, prompts, seeds, max_tokens, budget or fitting(model), shared, {} if prefixes is None else prefixes
    )
    decoder.dialogue = dialogue or (lambda p: None)
    ids = [torch.tensor(list(given), dtype=torch.long, device=decoder.device) for given in (stop_ids, banned_ids)]
    rules = Rules(temperature, top_k, top_p, min_tokens, *ids)
    with prepacked(model):
        while decoder.waiting or any(decoder.rows):
            decoder.admit()
            decoder.step(rules, set(stop_ids))
    return decoder.responses


def fitting(model):
    """Tokens whose keys and values fit the device beside the model."""
    W, config = model.head_weight, model.config
    if not W.is_cuda:
        return BUDGET
    free = torch.cuda.mem_get_info(W.device)[0] + torch.cuda.memory_reserved(W.device)  # torch keeps what it has freed
    free -= torch.cuda.memory_allocated(W.device)
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * W.element_size()
    return int(SHARE * free) // bytes_per_token


@dataclass
class Row:
    """A response being written."""

    prompt: int
    number: int  # among the responses to its prompt
    position: int  # of its first token; after pictures among its tokens, less by what these take less than tokens
    uniforms: np.ndarray  # (max_tokens,) float64
    tokens: list
    logprobs: list
    dialogue: object  # None: the response is its first turn
    reads: list = field(default_factory=list)
    turn: int = 0  # where it began, among the tokens


class Decoder:
    """B rows, each writing one response; a row whose response ends takes the next that waits.

    `waiting` holds (prompt, number) of the responses without a row, `ready` the prompts that have been read. Prompts
    that share a prefix are read together and follow one another.
    """

    def __init__(self, model, prompts, seeds, max_tokens, budget, shared, prefixes):
        self.model, self.prompts, self.seeds, self.max_tokens = model, prompts, seeds, max_tokens
        self.device, self.pictures = model.head_weight.device, Pictures(model)
        self.keys = [self.pictures.key(prompt) for prompt in prompts]
        self.responses, self.left = [[None] * len(s) for s in seeds], [len(s) for s in seeds]
        self.ready = {}  # {p: (Segment, index there, last hidden state (D,), position of the first token)}
        self.prefixes = prefixes  # {name: Segment}
        # what each prompt shares, as bytes of its key; it keeps its last token to itself, as the response starts there
        self.prefix = [
            key[: min(n, len(key) - 1)].tobytes() for (key, _), n in zip(self.keys, shared or [0] * len(prompts))
        ]
        first = {name: p for p, name in reversed([*enumerate(self.prefix)])}
        order = sorted(range(len(prompts)), key=lambda p: (first[self.prefix[p]], len(self.keys[p][0])))
        self.waiting = [(p, i) for p in order for i in range(len(seeds[p]))][::-1]  # the next is the last

        own = [math.ceil(self.own_length(p) / len(seeds[p])) for p, _ in self.waiting]
        fit = budget // (max_tokens + max(own, default=0))  # a row bears part of a prompt
        B = max(1, min(len(self.waiting), ROWS, fit))
        self.rows = [None] * B
        self.slots = decoding_cache(model, B, max_tokens, room=max(budget - B * max_tokens, 0))
        self.hidden = model.head_weight.new_zeros(B, model.config.hidden_size)  # (B,D): the next token is drawn from it

    def shared_length(self, p):
        return len(self.prefix[p]) // 8  # bytes per token id

    def own_length(self, p):
        return len(self.keys[p][0]) - self.shared_length(p)

    # -- prompts

    def admit(self):
        """Give free rows to waiting responses, once an eighth of the rows is free: so prompts are read in batches."""
        free = [r for r, row in enumerate(self.rows) if row is None]
        if not self.waiting:
            return self.shrink() if len(free) >= len(self.rows) / 4 else None
        if len(free) < len(self.rows) / 8:
            return None
        jobs = [self.waiting.pop() for _ in free[: len(self.waiting)]]
        self.read_prompts(list(dict.fromkeys(p for p, _ in jobs if p not in self.ready)))
        for r, (p, i) in zip(free, jobs):
            _, _, self.hidden[r], position = self.ready[p]
            self.rows[r] = Row(p, i, position, uniforms(self.seeds[p][i], self.max_tokens), [], [], self.dialogue(p))
        self.connect()

    def read_prompts(self, new):
        """Read prompts: those of one prefix in one pass, as far as PREFILL allows, after the prefix itself."""
        while new:
            name, length = self.prefix[new[0]], self.shared_length(new[0])
            if length and name not in self.prefixes:
                self.prefixes[name] = self.forward(new[:1], None, 0, length)[0]
            longest, members = 0, []
            for p in new:
                longest = max(longest, self.own_length(p))
                if self.prefix[p] != name or longest * len(members) > PREFILL:
                    break
                members.append(p)
            segment, hidden, position = self.forward(members, self.prefixes.get(name), length, None)
            for b, p in enumerate(members):
                self.ready[p] = segment, b, hidden[b], int(position[b])
            new = new[len(members) :]

    def forward(self, members, parent, first, last):
        """Read tokens first..last of some prompts -> (Segment, last hidden states (B,D), next positions (B,))."""
        prompts, lengths = [self.prompts[p] for p in members], torch.tensor([len(self.keys[p][0]) for p in members])
        ids = torch.zeros(len(members), int(lengths.max()), dtype=torch.long)  # (B,T)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt.input_ids)] = prompt.input_ids
        grids = [prompt.grid_thw for prompt in prompts if prompt.grid_thw is not None]
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        position_ids, delta = self.model.positions(ids, real, torch.cat(grids) if grids else None)
        seen = slice(first, last)
        pictures = [i for p in members for place, i in self.keys[p][1] if first <= place < (last or place + 1)]
        segment = Segment(parent, [last - first] if last else (lengths - first).tolist())
        ids, position_ids = ids[:, seen].to(self.device), position_ids[:, :, seen].to(self.device)
        embeds = self.pictures.encode(pictures)
        x = self.model(ids, position_ids=position_ids, cache=segment, image_embeds=embeds)  # (B,T,D)
        return segment, torch.stack([row[n - 1] for row, n in zip(x, segment.lengths)]), lengths + delta

    def connect(self):
        self.slots.connect({r: self.ready[row.prompt][:2] for r, row in enumerate(self.rows) if row})

    def shrink(self):
        """Nothing waits: drop the rows that have ended, and the prompts that nobody reads."""
        keep = [r for r, row in enumerate(self.rows) if row]
        self.rows, self.hidden = [self.rows[r] for r in keep], self.hidden[keep]
        self.slots.keep(keep)
        if isinstance(self.slots, Slots):  # an arena needs nothing of the segments that it has copied
            self.forget_prompts()
        self.connect()

    def forget_prompts(self):
        readers = {}
        for p, (segment, *_) in self.ready.items():
            readers.setdefault(segment, []).append(p)
        for segment, prompts in readers.items():
            if 2 * len(prompts) <= len(segment.lengths):
                segment.keep([self.ready[p][1] for p in prompts])
                self.ready |= {p: (segment, b, *self.ready[p][2:]) for b, p in enumerate(prompts)}

    # -- responses

    def step(self, rules, stops):
        """Draw the next token of every row, end the responses that are complete, and read the tokens of the others.

        One copy brings the rows' uniforms and lengths to the device, one fetches what was drawn: there the host waits.
        """
        state = [
            (row.uniforms[len(row.tokens)], len(row.tokens)) if row else (0.0, self.max_tokens) for row in self.rows
        ]
        u, used = torch.tensor(state, dtype=torch.float64).T.to(self.device, non_blocking=True)  # (B,) each
        tokens, logps = self.choose(rules, u, used)
        drawn = torch.stack([tokens.double(), logps]).tolist()
        replies = {}  # {row: what it reads next}
        for r, (row, token, logp) in enumerate(zip(self.rows, map(int, drawn[0]), drawn[1])):
            if row:
                row.tokens.append(token)
                row.logprobs.append(logp)
                if token in stops and (reply := self.reply(row)):
                    replies[r] = reply
                elif token in stops or len(row.tokens) == self.max_tokens:
                    self.end(r, token in stops)
        if any(self.rows):
            longest = max(len(row.tokens) for row in self.rows if row)
            place = np.array([len(row.tokens) if row else longest for row in self.rows]) - 1  # where the token belongs
            self.slots.set(place)
            position = np.array([row.position if row else 0 for row in self.rows]) + place
            position = torch.from_numpy(position).to(self.device, non_blocking=True)  # (B,)
            self.hidden = self.slots.step(self.read_tokens, tokens, position)
        waiting = sorted(replies, key=lambda r: -len(replies[r].input_ids))
        while waiting:
            most = max(1, PREFILL // len(replies[waiting[0]].input_ids))
            self.read_replies({r: replies[r] for r in waiting[:most]})
            waiting = waiting[most:]

    def reply(self, row):
        """What the row reads next, Encoded, where a turn of it has ended; None where the response has."""
        room = self.max_tokens - len(row.tokens) - 1  # it writes at least one token more
        return row.dialogue and row.dialogue.reply(row.tokens[row.turn :], room)

    def read_replies(self, replies):
        """Read what some rows are told, {row: Encoded}, in one pass, into their own keys and values."""
        members, read = [self.rows[r] for r in replies], list(replies.values())
        lengths = [len(reply.input_ids) for reply in read]
        ids = torch.zeros(len(read), max(lengths), dtype=torch.long)  # (B,T)
        for into, reply in zip(ids, read):
            into[: len(reply.input_ids)] = reply.input_ids
        grids = [reply.grid_thw for reply in read if reply.grid_thw is not None]
        real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        position_ids, delta = self.model.positions(ids, real, torch.cat(grids) if grids else None)
        starts = [len(row.tokens) for row in members]
        position_ids = position_ids + torch.tensor([row.position + n for row, n in zip(members, starts)])[:, None]
        embeds = self.pictures.encode([i for reply in read for _, i in self.pictures.key(reply)[1]])
        where = [self.ready[row.prompt][:2] for row in members]
        cache = self.slots.reading(list(replies), starts, lengths, where)
        inputs = ids.to(self.device), position_ids.to(self.device)
        x = self.model(inputs[0], position_ids=inputs[1], cache=cache, image_embeds=embeds)  # (B,T,D)
        for b, (r, row) in enumerate(zip(replies, members)):
            self.hidden[r] = x[b, lengths[b] - 1]
            row.reads.append((starts[b], read[b]))
            row.tokens += read[b].input_ids.tolist()
            row.logprobs += [0.0] * lengths[b]
            row.position, row.turn = row.position + int(delta[b]), len(row.tokens)

    def choose(self, rules, u, used):
        """The next token of each row and the log-probability of what was drawn, here itself; (B,) each."""
        return rules.draw(self.model.logits(self.hidden).float(), u, used)  # of logits (B,V)

    def read_tokens(self, tokens, position):
        """The model reads a token of each row, tokens (B,) at position (B,) -> hidden states (B,D)."""
        return self.model(tokens[:, None], position_ids=position.expand(3, -1)[..., None], cache=self.slots)[:, 0]

    def end(self, r, finished):
        """Row r is free; forget its prompt after the last response to it."""
        row = self.rows[r]
        turns = None
        if row.dialogue:
            finished, turns = row.dialogue.end(row.tokens[row.turn :], finished)
        self.responses[row.prompt][row.number] = Response(row.tokens, row.logprobs, finished, row.reads, turns)
        self.rows[r] = None
        self.left[row.prompt] -= 1
        if not self.left[row.prompt]:
            del self.ready[row.prompt]
