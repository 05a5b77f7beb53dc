"""Latent actions (Li et al., arXiv 2601.07516): a policy draws one of K codes, and the best word given it follows.

    h_t        the base's hidden state after its final norm, which every module here reads
    inverse    causal blocks over h, K logits: the code a_t that explains token t + 1, read from place t + 1
    codebook   C (K,D)
    merge      x <- x + W3(silu(W1[x;c]) * W2[x;c]) from x = h, c = C[a_t]; then the base's norm and head: words
    policy     causal blocks over h, K logits: what RL trains, alone
    P, P'      from states of text to states of text with its picture, and back: mu and s = log sigma^2 of a Gaussian

A code acts on one token: neither code nor merged state enters the base's cache. The state that this model gives a token
is [u; h] (2D wide), u from the policy, and its head, [W; 0] (K,2D), reads u: to the losses of train_rl.py codes are
words. The parameters stand among the base's, as model.latents.*, in the same files. Axes: model.py; K codes.
"""

import dataclasses
import math
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

import model as qwen
from kernels.logprob import linear_logprob
from support import engine
from support.config import refuse

# -- 1. modules --------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Causal blocks over h, a norm, and a head (K,D) for codes. layers: their numbers, by which a cache knows them."""

    def __init__(self, config, layers, K):
        super().__init__()
        self.layers = nn.ModuleList(qwen.Block(config, layer) for layer in layers)
        self.norm = qwen.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, K, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None, keep=True):  # (B,T,D) -> (B,T,D)
        for block in self.layers:
            x = qwen.run(block, x, cos, sin, mask, cache, keep=keep)
        return self.norm(x)


class Merge(nn.Module):
    """x + W3(silu(W1[x;c]) * W2[x;c])."""

    def __init__(self, D, inner):
        super().__init__()
        self.w1, self.w2 = (nn.Linear(2 * D, inner, bias=False) for _ in range(2))
        self.w3 = nn.Linear(inner, D, bias=False)

    def forward(self, x, c):  # (...,D) each
        both = torch.cat([x, c], -1)
        return x + self.w3(F.silu(self.w1(both)) * self.w2(both))


class Projector(nn.Module):
    """(mu, s): two MLPs D -> D/2 -> tanh -> D; s = log sigma^2 is kept in (-1, 1) by a tanh."""

    def __init__(self, D):
        super().__init__()
        self.mean, self.spread = (
            nn.Sequential(nn.Linear(D, D // 2), nn.Tanh(), nn.Linear(D // 2, D)) for _ in range(2)
        )

    def forward(self, x):
        return self.mean(x), self.spread(x).tanh()


class Latents(nn.Module):
    """All that latent actions add. inverse, merge, policy: blocks of each; 308 + 225 + 617 M parameters at 3B."""

    def __init__(self, config, K, inverse, merge, policy):
        super().__init__()
        D, L = config.hidden_size, config.num_hidden_layers
        self.inverse = Reader(config, range(inverse), K)
        self.codebook = nn.Embedding(K, D)
        self.merge = nn.ModuleList(Merge(D, config.intermediate_size) for _ in range(merge))
        self.policy = Reader(config, range(L, L + policy), K)
        self.project, self.project_back = Projector(D), Projector(D)
        if not self.codebook.weight.is_meta:
            nn.init.kaiming_uniform_(self.codebook.weight)


class TextModel(qwen.TextModel):
    acting = True  # False: h alone, which is all that inverse, merge and projectors read

    def forward(self, x, position_ids, mask, cache):
        h = super().forward(x, position_ids, mask, cache)  # (B,T,D)
        if not self.acting:
            return h
        turn = self.rope(position_ids, h.dtype)
        return torch.cat([self.latents.policy(h.detach(), *turn, mask, cache, not self.checkpointing), h], -1)


# -- 2. the model ------------------------------------------------------------------------------------------------------

ALL = "inverse codebook merge policy project project_back".split()


class Sizes(qwen.Config):
    """A Config as caches see it: states of twice the width, keys of the policy's blocks, too."""

    head_dim = property(lambda self: self.hidden_size // 2 // self.num_attention_heads)


class LatentVLM(qwen.Qwen25VL):
    """A Qwen2.5-VL that draws codes. Its `logits` are those of the words given the best code: --chat reads them."""

    @property
    def latents(self):
        return self.model.latents

    @property
    def word_head(self):
        """(V,D)"""
        return super().head_weight

    @property
    def head_weight(self):
        """[W; 0] (K,2D): what turns states [u; h] into logits of codes."""
        W = self.latents.policy.head.weight
        return torch.cat([W, torch.zeros_like(W)], 1)

    def merged(self, h, c):
        """What the base's head reads (...,D), from states h and code vectors c (...,D)."""
        for block in self.latents.merge:
            h = block(h, c)
        return self.model.norm(h)

    def words_of(self, h, codes):
        """Logits of the next word (...,V), fp32, given states h (...,D) and codes (...), or one code for all."""
        c = self.latents.codebook.weight[codes].to(h.dtype).expand_as(h)
        return F.linear(self.merged(h, c), self.word_head).float()

    def code_logits(self, hidden):
        return F.linear(hidden.chunk(2, -1)[0], self.latents.policy.head.weight).float()

    def logits(self, hidden):
        return self.words_of(hidden.chunk(2, -1)[1], self.code_logits(hidden).argmax(-1))

    def states(self, batch):
        """Of a collated Batch: h (B,T,D), and the (cos, sin) by which blocks over it turn."""
        self.model.acting = False
        try:
            h = self(batch.input_ids, None, batch.pixel_values, batch.image_grid_thw)
        finally:
            self.model.acting = True
        position_ids, _ = self.positions(batch.input_ids, None, batch.image_grid_thw)
        return h, self.model.rope(position_ids, h.dtype)

    def learn(self, *names, base=False):
        """Freeze all but these of the latents, and where `base` the base's text blocks and head."""
        self.requires_grad_(False)
        for name in names:
            getattr(self.latents, name).requires_grad_(True)
        if base:
            self.model.layers.requires_grad_(True)
            self.word_head.requires_grad_(True)

    def prepare(self, run):
        """A run is about to train this model: RL the policy alone. Refuses what does not go with codes."""
        config = run.config
        expected = "train_rl.py, or python -m variants.latent.train"
        refuse(run.stage in ("cpt", "sft"), f"latent actions in {self.source}", expected)
        refuse(not config.full, "--no-full with latent actions", "--full: RL trains their policy alone, without LoRA")
        refuse(config.adapter or run.adapter, "an adapter with latent actions", "whole weights")
        refuse(run.fsdp, "latent actions under FSDP", "--fsdp off: only the policy has gradients and moments")
        other = getattr(config, "frozen_sampler", "")
        refuse(
            other == "base", "--frozen-sampler base with latent actions", "start, or the model: the base draws words"
        )
        refuse(config.replay, "--replay with latent actions", "none: items teach words")
        if run.stage != "rl":
            return
        self.learn("policy")
        frozen = [self.visual, self.model.layers, *(getattr(self.latents, name) for name in ALL if name != "policy")]
        for layer in (layer for module in frozen for layer in qwen.linear_layers(module).values()):
            layer.to(run.dtype)  # as autocast would, once

    @contextmanager
    def as_sampled(self):
        """Within, `config` has the sizes of what a cache holds."""
        plain, more = self.config, len(self.latents.policy.layers)
        values = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        wide = {"hidden_size": 2 * plain.hidden_size, "num_hidden_layers": plain.num_hidden_layers + more}
        self.config = Sizes(**{**values, **wide})
        try:
            yield self
        finally:
            self.config = plain

    @staticmethod
    def Decoder(*arguments):
        return Decoder(*arguments)


class Decoder(engine.Decoder):
    """Draws codes by the temperature, top-k and top-p of the rules; their bans and stops are of words."""

    def __init__(self, model, prompts, seeds, max_tokens, budget, shared, prefixes):
        L = model.config.num_hidden_layers
        budget = budget * L // (L + len(model.latents.policy.layers))  # a token holds more keys in the same memory
        self.codes = {}  # (prompt, number of a response): its codes so far
        with model.as_sampled():
            super().__init__(model, prompts, seeds, max_tokens, budget, shared, prefixes)

    def choose(self, rules, u, used):
        none = rules.stop_ids[:0]
        of_codes = dataclasses.replace(rules, min_tokens=0, stop_ids=none, banned_ids=none)
        codes, logp = of_codes.draw(self.model.code_logits(self.hidden), u, used)  # (B,) each
        for row, code in zip(self.rows, codes.tolist()):
            if row:
                self.codes.setdefault((row.prompt, row.number), []).append(code)
        return emit(self.model, self.hidden, codes, rules, used), logp

    def end(self, r, finished):
        row = self.rows[r]
        super().end(r, finished)
        self.responses[row.prompt][row.number].actions = self.codes.pop((row.prompt, row.number))


def emit(model, hidden, codes, rules, used):
    """x_{t+1} = argmax f_world(x_1..t, a_t) (B,), equation 9: temperature and truncation belong to codes alone."""
    words = model.words_of(hidden.chunk(2, -1)[1], codes).index_fill_(1, rules.banned_ids, -torch.inf)  # (B,V)
    early = (used < rules.min_tokens)[:, None]
    words[:, rules.stop_ids] = words[:, rules.stop_ids].masked_fill(early, -torch.inf)
    return words.argmax(-1)


# -- 3. losses: equations 1 to 8 of the paper, one value for each of L tokens ------------------------------------------


def gumbel(logits, noise, tau=2.0):
    """Straight-through Gumbel-softmax: p = softmax((logits + noise) / tau) -> onehot(argmax p) (L,K), p's gradient."""
    p = ((logits + noise) / tau).softmax(-1)
    hard = F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
    return hard - p.detach() + p


def gumbel_noise(logits, generator=None):
    u = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    return -(-u.clamp(1e-20, 1 - 1e-7).log()).log()


def inverse_loss(merged, head, tokens):
    """(1) -log f_world(x_{t+1} | e_t, c_{a_t}) from merged states (L,D), the base's head (V,D) and tokens (L,)."""
    return -linear_logprob(merged, head, tokens)[0]


def balance(logits):
    """log K - H(mean p), a number: 0 where the codes are used alike on average.

    The paper's 1e-3 sum p log p of each token leaves 4 of 16 codes in use; this one, ours, all of them.
    """
    mean = logits.softmax(-1).mean(0)  # (K,)
    return math.log(len(mean)) + (mean * mean.clamp(min=1e-20).log()).sum()


def embed(h, paired, project):
    """(2) e = h where a row has a picture, else the mean of P(h). h (B,T,D), paired (B,) bool."""
    return h if bool(paired.all()) else torch.where(paired[:, None, None], h, project(h)[0])


def gaussian(target, mu, s):
    """sum_i (target_i - mu_i)^2 exp(-s_i) + s_i, all (L,D): a Gaussian's -log p, twice and but for a constant."""
    return ((target - mu) ** 2 * (-s).exp() + s).sum(-1)


def text_to_pair(e_pair, e_text, project):
    """(3) of states with the picture, given those without, by P."""
    return gaussian(e_pair, *project(e_text))


def pair_to_text(e_pair, e_text, project_back):
    """(4) the same with roles swapped, by P'."""
    return gaussian(e_text, *project_back(e_pair))


def projection(e_pair, e_text, project, project_back):
    """(5) = (3) + (4)."""
    return text_to_pair(e_pair, e_text, project) + pair_to_text(e_pair, e_text, project_back)


def cycle(e_text, project, project_back):
    """(7) of text alone: back to where it came from, by P' of the mean of P."""
    return gaussian(e_text, *project_back(project(e_text)[0]))


def joint_projection(e_pair, e_text, alone, project, project_back):
    """(6) = (5) on pairs (L,D), and (7) on states `alone` (n,D) of text-only rows -> values (L,) and (n,)."""
    return projection(e_pair, e_text, project, project_back), cycle(alone, project, project_back)


def clone(u, head, codes):
    """(8) -log pi(a_t | e_1..t) of the inverse model's codes (L,), from the policy's states u (L,D), head (K,D)."""
    return -linear_logprob(u, head, codes)[0]


def diversity(responses):
    """(10) 1 / the mean similarity of a prompt's responses [[word]]: cosines of word counts (the paper: BGE-M3)."""
    words = sorted({word for response in responses for word in response})
    counts = torch.tensor([[response.count(word) for word in words] for response in responses], dtype=torch.float64)
    unit = F.normalize(counts, dim=1)  # (n,V)
    n = len(unit)
    return float(n * (n - 1) / ((unit @ unit.T).sum() - unit.square().sum()).clamp(min=1e-9))


# -- 4. load -----------------------------------------------------------------------------------------------------------


def attach(model, K=128, inverse=4, merge=2, policy=8):
    """Make a model.Qwen25VL a LatentVLM, in place; torch's generator draws its latents. Returns it."""
    latents = Latents(model.config, K, inverse, merge, policy).to(model.head_weight)
    model.__class__, model.model.__class__ = LatentVLM, TextModel
    model.model.latents = latents
    return model


def sizes_of(shapes):
    """{K, inverse, merge, policy} of the stored tensors {name: shape}."""
    count = lambda part: len({m[1] for name in shapes if (m := re.search(rf"latents\.{part}\.(\d+)\.", name))})
    K = next(shape[0] for name, shape in shapes.items() if name.endswith("latents.codebook.weight"))
    return dict(K=K, inverse=count(r"inverse\.layers"), merge=count("merge"), policy=count(r"policy\.layers"))


def load_pretrained(path, device="cpu", dtype=torch.float32):
    """model.load_pretrained for a folder whose files hold latents as well."""
    folder = qwen.find_folder(path)
    config = qwen.Config.from_json(qwen.read_json(folder / "config.json"), folder / "config.json")
    shapes = {name: entry["shape"] for file in qwen.weight_files(folder) for name, entry in file.entries.items()}
    with torch.device("meta"):
        model = attach(qwen.Qwen25VL(config), **sizes_of(shapes))
    model.source = folder
    for name, (file, stored) in qwen.stored_tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(file.read(stored, device, dtype)))
    return model
