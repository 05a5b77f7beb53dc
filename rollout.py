"""Sampling groups of responses, with the policy in the prompt and without: PolicyRollout.

    1. The next word      temperature, top-k, top-p, inverse-CDF sampling with one uniform a (seed, position)
    2. sample             each picture encoded once, each policy and prompt read once, continuous slots (support/cache.py)
    3. PolicyRollout      G responses to x, K more to (P, x): one group

A row is a place where a response is written. When the response ends, its row takes the next one that waits, within a
budget of tokens. What is drawn depends on the prompt and on the response's seed alone, not on what else is sampled.

Axes: B prompts of one prefill, R rows, T tokens, D width, V vocab.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import model as qwen
from data import InputError
from data.dataset import messages
from support.cache import Segment, Slots, padding_bias
from support.prepacked import prepacked

# -- 1. the next word --------------------------------------------------------------------------------------------------


def uniforms(seed, count):
    """The random numbers of one response, float64 (count,), one a position: they depend on its seed alone."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


@dataclass
class Rules:
    """How the next word is drawn from the scores."""

    temperature: float
    top_k: int
    top_p: float
    min_tokens: int
    stop_ids: torch.Tensor
    banned_ids: torch.Tensor

    def draw(self, logits, u, used):
        """One word a row and its log-probability under the distribution it was drawn from.

        logits (R,V) fp32, overwritten; u (R,) float64 in [0, 1); used (R,) words written so far. Returns words (R,) and
        logp (R,) float64; at temperature 0 the best word, and its log-probability at temperature 1.
        """
        logits[:, self.banned_ids] = -torch.inf
        if self.min_tokens and int(used.min()) < self.min_tokens:
            early = (used < self.min_tokens).to(logits.device)[:, None]
            logits[:, self.stop_ids] = logits[:, self.stop_ids].masked_fill(early, -torch.inf)
        if self.temperature not in (0, 1):
            logits /= self.temperature
        logits = truncate(logits, self.top_k, self.top_p)
        best = logits.argmax(-1) if self.temperature == 0 else None
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # (R,V)
        whole = weights if weights.shape[1] % 128 == 0 else F.pad(weights, (0, -weights.shape[1] % 128))
        blocks = whole.unflatten(1, (-1, 128))  # (R, V/128, 128): only their sums are added up in float64
        mass = blocks.sum(-1).double().cumsum(-1)  # (R, V/128)
        words = invert(mass, blocks, u.to(mass.device)[:, None]) if best is None else best
        return words, (weights.gather(1, words[:, None]).double().log() - mass[:, -1:].log())[:, 0]


def truncate(logits, top_k, top_p):
    """-inf for all words but the top_k best (0: all), of those all but the fewest that reach the share top_p."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what stands before a word reaches the share already; never the first
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def invert(mass, blocks, u):
    """The word (R,) where the cumulative distribution passes u (R,1): first its block of 128 words, then the word.

    mass (R, V/128) float64: cumulative weight at each block's end; blocks (R, V/128, 128) fp32.
    """
    below = lambda x, end: torch.minimum(x, end.nextafter(torch.zeros_like(end)))  # rounding must not pass the last
    u = below(u * mass[:, -1:], mass[:, -1:])
    block = torch.searchsorted(mass, u, right=True)  # (R,1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, 128))[:, 0].double().cumsum(-1)  # (R,128)
    rest = below(u - torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0), inside[:, -1:])
    return (block * 128 + torch.searchsorted(inside, rest, right=True))[:, 0]


# -- 2. sample ---------------------------------------------------------------------------------------------------------

PREFILL = 1 << 14  # tokens of one prefill pass, padding included
BUDGET = 1 << 17  # tokens of prompts and responses held at a time


@dataclass
class Response:
    tokens: list  # up to and with the stop token
    logprobs: list  # of each token, under the distribution it was drawn from
    finished: bool  # False: cut at max_tokens


class Pictures:
    """The pictures of all prompts, numbered by content, so that equal ones are one; each encoded when first needed."""

    def __init__(self, model):
        self.model, self.merge = model, model.config.vision.spatial_merge_size**2
        self.patches, self.features = {}, {}  # by number

    def read(self, prompt):
        """A prompt as (key (T,), [(place, number) of its pictures]): equal keys read alike, now and in later calls.

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
        """Features (M, D) of these pictures one after the other; None without pictures."""
        if new := [i for i in dict.fromkeys(numbers) if i not in self.features]:
            device = self.model.head_weight.device
            pixels = torch.cat([self.patches[i][0] for i in new])  # (N, 1176)
            grids = torch.stack([self.patches[i][1] for i in new])  # (n,3)
            features = self.model.visual(pixels.to(device), grids.to(device))
            self.features |= dict(zip(new, features.split((grids.prod(1) // self.merge).tolist())))
        return torch.cat([self.features[i] for i in numbers]) if numbers else None


def shared_prefixes(keys, known=()):
    """How many first tokens each prompt shares with others, grouped: [(length, prompts)], every prompt in one group.

    Sorted prompts that begin alike are neighbours; two belong together if they share a quarter of their tokens at
    least, and half of what either shares with its other neighbour: one policy each, though all may begin alike.
    keys: int64 (T,) each; known: prefixes held already, as bytes (8 a token), which win.
    """
    held, rest = {}, []  # prompts by the prefix that they find there, and the others
    lengths = sorted({len(prefix) // 8 for prefix in known}, reverse=True)
    for i, key in enumerate(keys):
        prefixes = (key[:n].tobytes() for n in lengths if n < len(key))
        found = next((prefix for prefix in prefixes if prefix in known), None)
        held.setdefault(found, []).append(i) if found else rest.append(i)
    rest.sort(key=lambda i: keys[i].tobytes())

    def common(a, b):
        n = min(len(a), len(b)) - 1  # a prompt keeps its last token to itself: the response starts from it
        differ = np.flatnonzero(a[:n] != b[:n])
        return int(differ[0]) if len(differ) else n

    edges = [0, *(common(keys[i], keys[j]) for i, j in zip(rest, rest[1:])), 0]  # what each shares with the one before
    clusters = []
    for n, i in enumerate(rest):
        edge = edges[n]
        near = 2 * edge >= max(edges[max(n - 1, 0)], edges[n + 1])
        if edge and near and 4 * edge >= len(keys[i]):
            length, members = clusters[-1]
            clusters[-1] = (min(length or edge, edge), [*members, i])
        else:
            clusters.append((0, [i]))
    return [(len(prefix) // 8, members) for prefix, members in held.items()] + clusters


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
    budget=BUDGET,
    prefixes=None,
):
    """n responses to each prompt -> [[Response]], in the order of the prompts.

    prompts: model.Encoded each; n: int, or one for each prompt.
    max_tokens: longest response; min_tokens: how many words come before a stop token may.
    temperature 0: greedy. top_k 0 and top_p 1 leave the distribution whole. banned_ids are never drawn.
    seeds: [[int]], one a response (default: from the numbers of prompt and response).
    budget: tokens of prompts and responses held at a time; what does not fit waits.
    prefixes: a dict that keeps the shared prefixes for later calls; empty it when the weights change.
    """
    counts = [n] * len(prompts) if isinstance(n, int) else list(n)
    seeds = seeds or [[(p << 32) + i for i in range(count)] for p, count in enumerate(counts)]
    if [len(s) for s in seeds] != counts or max_tokens < 1 or temperature < 0:
        found = f"found {len(prompts)} prompts, {counts} responses, {[len(s) for s in seeds]} seeds"
        raise InputError(
            f"{found}, max_tokens {max_tokens}, temperature {temperature}; expected a seed a response, a "
            "positive length, no negative temperature"
        )
    decoder = Decoder(model, prompts, seeds, max_tokens, budget, {} if prefixes is None else prefixes)
    stop_ids, banned_ids = (torch.tensor(ids, dtype=torch.long) for ids in (stop_ids, banned_ids))
    rules = Rules(temperature, top_k, top_p, min_tokens, stop_ids, banned_ids)
    with prepacked(model):
        while decoder.waiting or decoder.alive.any():
            decoder.admit()
            decoder.write(rules)
    return decoder.responses


class Decoder:
    """Responses on their way: R rows, each writing one; a row whose response ends takes the next that waits.

    A response is named (p, i): number i to prompt p. `waiting` holds those without a row yet, `ready` the prompts that
    have been read. Prompts that share a prefix are read together and follow one another.
    """

    def __init__(self, model, prompts, seeds, max_tokens, budget, prefixes):
        self.model, self.prompts, self.seeds, self.max_tokens = model, prompts, seeds, max_tokens
        self.device, self.pictures = model.head_weight.device, Pictures(model)
        self.keys = [self.pictures.read(prompt) for prompt in prompts]
        self.responses, self.left = [[None] * len(s) for s in seeds], [len(s) for s in seeds]
        self.prefixes, self.prefix = prefixes, {}  # {bytes: Segment}; {p: tokens that the prompt shares}
        self.ready, order = {}, []  # {p: (Segment, index there, last hidden state (D,), position of the first word)}
        for length, members in shared_prefixes([key for key, _ in self.keys], prefixes):
            self.prefix |= {p: length for p in members}
            order += sorted(members, key=lambda p: len(self.keys[p][0]))
        self.waiting = [(p, i) for p in order for i in range(len(seeds[p]))][::-1]  # the next is the last

        own = [math.ceil((len(self.keys[p][0]) - self.prefix[p]) / len(seeds[p])) for p, _ in self.waiting]
        R = max(1, min(len(self.waiting), budget // (max_tokens + max(own, default=0))))  # a row bears part of a prompt
        self.slots = Slots(model, R, max_tokens)
        self.hidden = model.head_weight.new_zeros(R, model.config.hidden_size)  # (R,D) what the next word is drawn from
        self.alive, self.job = np.zeros(R, dtype=bool), np.zeros((R, 2), dtype=np.int64)  # is it writing; which (p, i)
        self.used, self.start = np.zeros((2, R), dtype=np.int64)  # words written; position of the first
        self.chance, self.logps = np.zeros((2, R, max_tokens))
        self.words = np.zeros((R, max_tokens), dtype=np.int64)

    # -- prompts

    def admit(self):
        """Give free rows to waiting responses, once an eighth of the rows is free: so prompts are read in batches."""
        free = np.flatnonzero(~self.alive)
        if not self.waiting:
            return self.shrink() if len(free) >= len(self.alive) / 4 else None
        if len(free) < len(self.alive) / 8:
            return None
        jobs = [self.waiting.pop() for _ in free[: len(self.waiting)]]
        self.read(list(dict.fromkeys(p for p, _ in jobs if p not in self.ready)))
        for row, (p, i) in zip(free, jobs):
            self.alive[row], self.job[row], self.used[row] = True, (p, i), 0
            _, _, self.hidden[row], self.start[row] = self.ready[p]
            self.chance[row] = uniforms(self.seeds[p][i], self.max_tokens)
        self.connect()

    def read(self, new):
        """Read prompts: those of one prefix in one pass, as far as PREFILL allows, after the prefix itself."""
        while new:
            length, key = self.prefix[new[0]], self.keys[new[0]][0]
            name = key[:length].tobytes()
            if length and name not in self.prefixes:
                self.prefixes[name] = self.forward(new[:1], None, 0, length)[0]
            longest, members = 0, []
            for p in new:
                key = self.keys[p][0]
                longest = max(longest, len(key) - length)
                if key[: self.prefix[p]].tobytes() != name or longest * len(members) > PREFILL:
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
        segment = Segment(parent)
        ids, position_ids = ids[:, seen].to(self.device), position_ids[:, :, seen].to(self.device)
        embeds = self.pictures.encode(pictures)
        x = self.model(ids, position_ids=position_ids, cache=segment, image_embeds=embeds)  # (B,T,D)
        own = (last or lengths) - first  # tokens read of each prompt
        if last is None and int(own.min()) < x.shape[1]:
            segment.bias = padding_bias(own, x.shape[1], x)
        return segment, x[torch.arange(len(x)), own - 1], lengths + delta

    def connect(self):
        jobs = self.job[self.alive, 0]
        self.slots.connect({int(row): self.ready[p][:2] for row, p in zip(np.flatnonzero(self.alive), jobs)})

    def shrink(self):
        """Nothing waits: drop the rows that have ended, and the prompts that nobody reads."""
        rows = np.flatnonzero(self.alive)
        for name in ("alive", "job", "used", "start", "chance", "logps", "words"):
            setattr(self, name, getattr(self, name)[rows])
        self.hidden = self.hidden[rows]
        self.slots.keep(torch.from_numpy(rows).to(self.device))
        of = {}
        for p, (segment, *_) in self.ready.items():
            of.setdefault(segment, []).append(p)
        for segment, prompts in of.items():
            if 2 * len(prompts) <= len(segment.keys[0]):
                segment.keep(torch.tensor([self.ready[p][1] for p in prompts], device=self.device))
                self.ready |= {p: (segment, b, *self.ready[p][2:]) for b, p in enumerate(prompts)}
        self.connect()

    # -- responses

    def write(self, rules):
        """Draw the next word of every row, end the responses that are whole, and read the words of the others."""
        u = self.chance[np.arange(len(self.used)), self.used.clip(max=self.max_tokens - 1)]
        logits = self.model.logits(self.hidden).float()  # (R,V)
        words, logps = rules.draw(logits, torch.from_numpy(u), torch.from_numpy(self.used))
        rows = np.flatnonzero(self.alive)
        self.words[rows, self.used[rows]] = words.cpu().numpy()[rows]
        self.logps[rows, self.used[rows]] = logps.cpu().numpy()[rows]
        self.used[rows] += 1
        stopped = np.isin(self.words[rows, self.used[rows] - 1], rules.stop_ids.numpy())
        for row, finished in zip(rows, stopped):
            if finished or self.used[row] == self.max_tokens:
                self.end(row, bool(finished))
        if self.alive.any():
            place = np.where(self.alive, self.used, self.used[self.alive].max()) - 1  # where each row's word belongs
            self.slots.set(place)
            position_ids = torch.from_numpy(self.start + place).to(self.device).expand(3, -1)[..., None]  # (3,R,1)
            self.hidden = self.model(words[:, None], position_ids=position_ids, cache=self.slots)[:, 0]

    def end(self, row, finished):
        p, i = self.job[row]
        words, logps = (x[row, : self.used[row]].tolist() for x in (self.words, self.logps))
        self.responses[p][i] = Response(words, logps, finished)
        self.alive[row] = False
        self.left[p] -= 1
        if not self.left[p]:
            del self.ready[p]


# -- 3. PolicyRollout --------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The responses to one query, all learned as responses to x: G written without the policy, then K with it."""

    item: dict
    prompt: qwen.Encoded  # x = (Q, I), without the policy
    policy_prompt: qwen.Encoded | None  # (P, x); with noise, x with its pictures noised
    responses: list
    aware: list  # bool a response: written with the policy in the prompt
    rewards: torch.Tensor | None = None  # (G + K, rewards) float64, once judged


class PolicyRollout:
    """o_1 .. o_G from pi(. | x) and o_G+1 .. o_G+K from pi(. | P, x): one group.

    The loss reads all G + K behind x alone: gradients flow along the path without the policy. K = 0 is plain GRPO.
    max_prompt: tokens; a longer prompt is an InputError. sampling: what `sample` takes besides.
    sampler: another model that writes the policy-aware half (the frozen start model reads each policy once a run).
    teach: groups carry their policy prompt without K, too (OPCD).
    noise: instead of the policy, the other half sees Gaussian noise of this deviation on its pictures (NoisyRollout).
    """

    def __init__(
        self, processor, policies, G, K, *, max_prompt=1 << 30, sampler=None, noise=0.0, teach=False, **sampling
    ):
        self.processor, self.policies, self.G, self.K, self.max_prompt = processor, policies, G, K, max_prompt
        self.sampler, self.noise, self.teach, self.sampling = sampler, noise, teach, sampling
        self.prefixes = {}  # what has been read of the policies; to be emptied when the weights move

    def __call__(self, model, items, seeds):
        """Groups of items (data.dataset), with seeds [[int]] of G + K responses each."""
        G, K, common = self.G, self.K, {**self.sampling, "prefixes": self.prefixes}
        x = [self.encode(item) for item in items]
        other = [self.other(*pair) for pair in zip(items, x)] if K or self.teach else [None] * len(x)
        first, second = [s[:G] for s in seeds], [s[G : G + K] for s in seeds]
        if not K:
            plain, aware = sample(model, x, G, seeds=first, **self.sampling), [[]] * len(x)
        elif self.sampler:
            plain = sample(model, x, G, seeds=first, **self.sampling)
            aware = sample(self.sampler, other, K, seeds=second, **common)
        else:
            both = sample(model, x + other, [G] * len(x) + [K] * len(x), seeds=first + second, **common)
            plain, aware = both[: len(x)], both[len(x) :]
        marks = [False] * G + [True] * K
        return [Group(*group, marks) for group in zip(items, x, other, (a + b for a, b in zip(plain, aware)))]

    def greedy(self, model, items, policies=None):
        """Texts of the best responses, without the policies or with them in the prompt."""
        prompts = [self.encode(item, policies and policies[item["policy"]]) for item in items]
        responses = sample(model, prompts, 1, **{**self.sampling, "temperature": 0.0})
        return [self.processor.decode(response.tokens) for (response,) in responses]

    def encode(self, item, policy=None):
        prompt = self.processor.encode(messages(item, policy), add_generation_prompt=True)
        if len(prompt.input_ids) > self.max_prompt:
            pictures = int((prompt.input_ids == self.processor.image_pad_id).sum())
            found = f"found a prompt of {len(prompt.input_ids)} tokens, {pictures} of them of pictures"
            raise InputError(f"item {item['id']}: {found}, expected at most --max-prompt {self.max_prompt}")
        return prompt

    def other(self, item, x):
        """The prompt of the other half: (P, x), or x with noise."""
        if not self.noise or x.pixel_values is None:
            return self.encode(item, self.policies[item["policy"]])
        generator = torch.Generator().manual_seed(int(hashlib.sha1(item["id"].encode()).hexdigest()[:15], 16))
        noise = torch.randn(x.pixel_values.shape, generator=generator)
        return qwen.Encoded(x.input_ids, x.pixel_values + self.noise * noise, x.grid_thw)
