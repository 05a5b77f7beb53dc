"""The variants of 2025 and 2026: each against its formula in plain Python floats, token by token, on random groups.

`VALUES` has the loss of a token and its derivative by log pi, `CREDIT` what a response is worth; `MUTATIONS` are faults
that one of them has to notice. What reads the model twice is held against two forward passes of its own.
"""

import copy
import dataclasses
import importlib
import importlib.util
import math
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from again import changed
from rl_bench import READ, Bench, config, distance, draw, gradients, reader_folder, rl_folder, run
from test_rl import logprobs

import train_rl
from data import InputError
from rollout import Group, Responses
from support.engine import Response
from variants import capo, filtered, hints, opcd, rlsd, sdpg, sdpo, srpo

ROOT = Path(__file__).resolve().parents[1]
FIELD = "capo dcpo dispo filtered hapo hdpo hints iwopd lld pidistill riskpo rlsd sdpg sdpo skill0 srpo".split()
FIELD += ["xrpo"]
G, K, BATCH = 3, 3, 5
LOW, HIGH = 0.2, 0.28


# -- a random step -----------------------------------------------------------------------------------------------------


def step(seed):
    """Responses to BATCH queries in groups of 3 to 6, of 1 to 6 tokens, float64; every eleventh reward failed."""
    draw = random.Random(seed)
    normal = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(draw.randrange(10**6))).double()
    groups = []
    for g in range(BATCH):
        n = draw.randint(G, G + K)
        tokens = [[draw.randrange(3) for _ in range(draw.randint(1, 6))] for _ in range(n)]
        rewards = [float(draw.random() < 0.2 + 0.1 * g) if draw.random() > 1 / 11 else math.nan for _ in range(n)]
        gold = [draw.randrange(3) for _ in range(4)] if g else None
        written = [Response(row, [0.0] * len(row), True) for row in tokens]
        aware, item = [i >= G for i in range(n)], {"gold": gold}
        prompts = [f"{g}-{i}" for i in range(n)]
        groups.append(Group(item, None, prompts, written, aware, torch.tensor(rewards)[:, None].double()))
    data = Responses(groups, draw.sample(range(BATCH), BATCH), 1, torch.device("cpu"))
    data.mask = data.mask.double()
    shape = data.mask.shape
    data.logp_old = (-1 - normal(*shape).abs()) * data.mask
    data.logp_sampler = torch.where(data.aware[:, None], data.logp_old + normal(*shape), data.logp_old) * data.mask
    data.A, data.kept = normal(len(data.list)), torch.ones(len(data.list), dtype=torch.bool)
    # now, what the teacher gives, the entropies of both: (B,R) each
    more = dict(now=data.logp_old + 0.4 * normal(*shape), teacher=data.logp_old + normal(*shape))
    return data, SimpleNamespace(**more, entropy=normal(*shape).abs(), teacher_entropy=normal(*shape).abs())


def learner(method, **options):
    """A variant's Learner without a model; what it would read of one is replaced by the numbers of `step`."""
    Config = getattr(method, "Config", train_rl.Config)
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    given = dict(group_size=G, policy_rollouts=K, batch_size=BATCH, clip_low=LOW, clip_high=HIGH, overlong=0)
    if defaults["algorithm"] == "grpo":
        given["algorithm"] = "dapo"
    settings = SimpleNamespace(**{**defaults, **given, **options})
    return method.Learner(settings, Bench(settings), None, None, None, [("accuracy", None, 1.0)], None, 0)


def objective(method, seed, more=()):
    """What a variant makes of a step -> (loss (B,R), its derivatives by logp and the teacher's logp), and the step."""
    data, x = step(seed)
    rows = random.Random(seed).sample(range(len(data.list)), len(data.list))  # in any order
    micro = data.take(rows)
    micro.logp, teacher = x.now[rows].requires_grad_(), x.teacher[rows].requires_grad_()
    micro.entropy = x.entropy[rows]
    micro.read = lambda *_, with_policy: (teacher, x.teacher_entropy[rows], None)
    one = learner(method)
    for name, value in dict(more).items():
        setattr(one, name, value)
    one.teacher = lambda _: (teacher.detach(), x.teacher_entropy[rows], None)
    one.start_logprobs = lambda _, with_policy: (teacher.detach(), None, None)
    one.divergence = lambda m: (0.5 * (m.logp - teacher.detach()) ** 2, x.teacher_entropy[rows])  # stands for the KL
    before = micro.A.clone()
    loss = one.objective(micro)
    (loss * micro.mask).sum().backward()
    assert torch.equal(micro.A, before)  # a loss does not edit what it is given
    empty = torch.zeros_like(micro.logp)
    found = [loss.detach(), micro.logp.grad, empty if teacher.grad is None else teacher.grad]
    back = torch.tensor(rows).argsort()
    return [part[back] for part in found], data, x


class Row:
    """One response in floats."""

    def __init__(self, data, x, b):
        n = int(data.lengths[b])
        floats = lambda values: values[b, :n].tolist()
        self.n, self.A, self.aware, self.g = n, float(data.A[b]), bool(data.aware[b]), int(data.ids[b])
        self.right = float(data.rewards[b, 0]) == 1
        self.old, self.sampler, self.logp = floats(data.logp_old), floats(data.logp_sampler), floats(x.now)
        self.teacher, self.entropy, self.teacher_entropy = map(floats, (x.teacher, x.entropy, x.teacher_entropy))
        self.r = [math.exp(now - old) for now, old in zip(self.logp, self.old)]
        self.tokens, self.gold = data.list[b].tokens, data.groups[self.g].item["gold"]


def clipped(r, A, low=1 - LOW, high=1 + HIGH):
    """(value, derivative by log r) of -min(r A, clip(r) A)."""
    inside = min(max(r, low), high)
    return (-r * A, -r * A) if r * A <= inside * A else (-inside * A, 0.0)


def weighed(r, A, logp, low, high):
    """CISPO's."""
    w = min(max(r, 1 - low), 1 + high)
    return -w * A * logp, -w * A


def plus(*parts):
    return tuple(map(sum, zip(*parts)))


def times(c, part):
    return tuple(c * p for p in part)


# -- the loss of a token, and its derivative by log pi -----------------------------------------------------------------


def by_rlsd(o, t, mix=0.3):
    sign = (o.A > 0) - (o.A < 0)
    trust = min(max(math.exp(sign * (o.teacher[t] - o.old[t])), 0.8), 1.2)
    return clipped(o.r[t], (1 - mix) * o.A + mix * o.A * trust)


def kl(o, t):
    """The stand-in of `objective` for a KL."""
    d = o.logp[t] - o.teacher[t]
    return d * d / 2, d


def by_iwopd(o, t):
    gaps = [T - S for T, S in zip(o.teacher, o.logp)]
    w = 1 + 0.5 * (1 - sum(map(abs, gaps[:t])) / sum(map(abs, gaps)))
    return weighed(o.r[t], w * gaps[t], o.logp[t], LOW, HIGH)


def by_dcpo(o, t):
    q = math.exp(o.old[t])
    low = 0.5 + 0.5 * math.sqrt(max(1 - 4 * LOW / q, 0))
    return clipped(o.r[t], o.A, low, min(0.5 + 0.5 * math.sqrt(1 + 4 * HIGH / q), 10))


def by_hapo(o, t):
    logs = [math.log(max(h, 1e-6)) for h in o.entropy]
    off = [x - sorted(logs)[(o.n - 1) // 2] for x in logs]
    side = max([abs(d) for d in off if d * off[t] > 0], default=1.0)
    h = off[t] / side
    low, high = LOW * (1 - h) if h <= 0 else LOW, HIGH * (1 + h) if h > 0 else HIGH
    middle = 1 - low / 2 < o.r[t] < 1 + high / 2
    plain = middle if h > 0 else not middle
    return clipped(o.r[t], o.A if plain else o.A * (1 + h), 1 - low, 1 + high)


def by_lld(o, t):
    lost = [old - now for old, now in zip(o.old, o.logp)]
    guards = o.A > 0 and sum(lost) > 0 and lost[t] > 0
    return plus(clipped(o.r[t], o.A), (0.1 * lost[t], -0.1) if guards else (0.0, 0.0))


def by_capo(o, t):
    wrong = o.gold is not None and o.tokens[: t + 1] != o.gold[: t + 1]
    return clipped(o.r[t], o.A - 0.5 * wrong)


def by_pidistill(o, t, share=0.5, stay=0.01):
    """Also the derivative by the teacher's logp, which learns, too."""
    student = clipped(o.r[t], o.A)
    if not o.aware:
        return *student, 0.0
    A = o.A - stay * (o.sampler[t] - o.old[t])
    value, slope = clipped(math.exp(o.teacher[t] - o.sampler[t]), A)
    return share * value + (1 - share) * student[0], (1 - share) * student[1], share * slope


VALUES = {  # variant: (value and derivative by hand, what its Learner has set before)
    "rlsd": (by_rlsd, {"mix": 0.3}),
    "sdpg": (lambda o, t: plus(clipped(o.r[t], o.A), times(0.7, kl(o, t)) if o.A > 0 else (0, 0)), {"distil": 0.7}),
    "srpo": (lambda o, t: clipped(o.r[t], o.A) if o.right else times(math.exp(-o.teacher_entropy[t]), kl(o, t)), {}),
    "sdpo": (lambda o, t: times(min(o.r[t], 2), kl(o, t)), {}),
    "iwopd": (by_iwopd, {}),
    "pidistill": (by_pidistill, {}),
    "dcpo": (by_dcpo, {}),
    "hapo": (by_hapo, {}),
    "dispo": (lambda o, t: weighed(o.r[t], o.A, o.logp[t], *((LOW, HIGH) if o.A > 0 else (1.0, 4.0))), {}),
    "capo": (by_capo, {}),
    "lld": (by_lld, {}),
    "filtered": (lambda o, t: (-o.logp[t], -1.0), {}),
}


def check_values(name, method):
    by_hand, more = VALUES[name]
    for seed in range(6):
        found, data, x = objective(method, seed, more)
        for b in range(len(data.list)):
            o = Row(data, x, b)
            for t in range(o.n):
                expected = (*by_hand(o, t), 0.0)[:3]
                assert [float(part[b, t]) for part in found] == pytest.approx(expected, abs=1e-9), (seed, b, t)


@pytest.mark.parametrize("name", VALUES)
def test_loss_and_gradient_of_each_token_are_the_formula(name):
    check_values(name, importlib.import_module(f"variants.{name}"))


# -- what a response is worth ------------------------------------------------------------------------------------------


def z(values):
    """GRPO's z-scores of a list; None is left out and gives 0."""
    there = [v for v in values if v is not None]
    if len(there) < 2:
        return [0.0] * len(values)
    mean, deviation = statistics.mean(there), statistics.stdev(there)
    return [0.0 if v is None else (v - mean) / (deviation + 1e-4) for v in values]


def members(data, g):
    """[(number in the group, row, reward | None)]"""
    rows = [b for b in range(len(data.list)) if data.ids[b] == g]
    found = [float(data.rewards[b, 0]) for b in rows]
    return [(i, b, None if math.isnan(r) else r) for (i, b), r in zip(enumerate(rows), found)]


def gated(keeps):
    """Advantages over what is kept: keeps(i, group's members) says so of a policy-aware response."""

    def by_hand(data, x, progress):
        A, kept = {}, {}
        for g in range(BATCH):
            group = members(data, g)
            for i, b, r in group:
                kept[b] = r is not None and (i < G or keeps(i, group, progress))
            for (_, b, _), a in zip(group, z([r if kept[b] else None for _, b, r in group])):
                A[b] = a
        return A, kept

    return by_hand


def share(group, half):
    right = [r == 1 for i, _, r in group if half(i)]
    return sum(right) / max(len(right), 1)


def of_hints(i, group, progress):
    tiers = [-1 if j < G else (j - G) // (K // 3) for j, _, r in group if r == 1]
    return (i - G) // (K // 3) == min(tiers, default=2)


def of_skill0(i, group, progress):
    return share(group, lambda j: j >= G) > share(group, lambda j: j < G) and i - G < round(K * (1 - progress))


def by_riskpo(data, x, progress, low=0.2, high=0.8, weight=0.5, size=4):
    number = {b: i for g in range(BATCH) for i, b, _ in members(data, g)}
    bundle = {b: int(data.places[data.ids[b]]) // size for b in number}
    S = [[0.0] * (G + K) for _ in range(math.ceil(BATCH / size))]
    for g in range(BATCH):
        for i, b, r in members(data, g):
            S[bundle[b]][i] += r or 0.0
    ordered = sorted(s for row in S for s in row)

    def quantile(q):
        at = q * (len(ordered) - 1)
        below = int(at)
        return ordered[below] + (at - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])

    a, b_ = quantile(low), quantile(high)
    u = lambda s: (1 + weight) / low * min(s - a, 0) + min(max(s, a), b_) / (high - low)
    A = [z([u(s) for s in row]) for row in S]
    kept = {b: r is not None for g in range(BATCH) for _, b, r in members(data, g)}
    return {b: A[bundle[b]][i] for b, i in number.items()}, kept


def by_xrpo(data, x, progress):
    A, kept = {}, {}
    for g in range(BATCH):
        group = members(data, g)
        s = {b: statistics.mean(data.logp_old[b, : int(data.lengths[b])].tolist()) for _, b, _ in group}
        mean = statistics.mean([s[b] for _, b, r in group if r is not None] or [0.0])
        for (_, b, r), a in zip(group, z([r for *_, r in group])):
            bonus = min(max(1.0 * (1 - math.exp(s[b] - mean)), 0), 0.5 * a)
            A[b], kept[b] = a + bonus if a > 0 else a, r is not None
    return A, kept


def by_hapo_credit(data, x, progress):
    A, kept = {}, {}
    for g in range(BATCH):
        group = members(data, g)
        n = {b: int(data.lengths[b]) for _, b, _ in group}
        total = sum(n[b] for _, b, r in group if r is not None)
        mean = sum(n[b] * r for _, b, r in group if r is not None) / max(total, 1)
        deviation = math.sqrt(sum(n[b] * (r - mean) ** 2 for _, b, r in group if r is not None) / max(total, 1))
        own = {b: 0.0 if r is None else (r - mean) / (deviation + 1e-6) for _, b, r in group}
        plain = z([r for *_, r in group])
        for (_, b, r), a in zip(group, plain):
            A[b], kept[b] = (own[b] if all(abs(v) < 5 for v in own.values()) and a else a), r is not None
    return A, kept


def by_sdpo(data, x, progress):
    """No advantages: the first right response teaches all others of its group."""
    kept = {}
    for g in range(BATCH):
        group = members(data, g)
        first = next((b for _, b, r in group if r == 1), None)
        kept |= {b: r is not None and first is not None and b != first for _, b, r in group}
    return None, kept


CREDIT = {
    "hdpo": gated(lambda i, group, progress: not any(r == 1 for j, _, r in group if j < G)),
    "hints": gated(of_hints),
    "skill0": gated(of_skill0),
    "riskpo": by_riskpo,
    "xrpo": by_xrpo,
    "hapo": by_hapo_credit,
    "sdpo": by_sdpo,
    "filtered": lambda data, *_: (
        dict.fromkeys(range(len(data.list)), 0.0),
        {b: r == 1 for g in range(BATCH) for _, b, r in members(data, g)},
    ),
}


def check_credit(name, method):
    for seed, progress in ((0, 0.0), (1, 0.4), (2, 0.5), (3, 0.9), *((seed, 0.1) for seed in range(4, 12))):
        data, x = step(seed)
        A, kept = CREDIT[name](data, x, progress)
        one, logp_old = learner(method), data.logp_old
        one.logprobs, data.logp_old = lambda data, which: (logp_old, None), None
        _, found, keeps = one.credit(data, progress)
        data.logp_old = logp_old
        assert keeps.tolist() == [kept[b] for b in range(len(data.list))], seed
        if A is not None:
            live = lambda values: [float(values[b]) * kept[b] for b in range(len(data.list))]
            assert live(found) == pytest.approx(live(A), abs=2e-5), seed
        if name == "sdpo":
            chosen = [next((i for i, _, r in members(data, g) if r == 1), 0) for g in range(BATCH)]
            assert [group.policy_prompt for group in data.groups] == [f"{g}-{i}" for g, i in enumerate(chosen)]


@pytest.mark.parametrize("name", CREDIT)
def test_worth_of_each_response_is_the_formula(name):
    check_credit(name, importlib.import_module(f"variants.{name}"))


def test_riskpo_does_not_depend_on_the_number_of_ranks():
    """A bundle's queries lie on several ranks: the sums are taken over all of them."""
    method = importlib.import_module("variants.riskpo")
    data, _ = step(3)
    whole = learner(method).credit(data, 0.0)[1]
    parts, tables = [[0, 2, 4], [1, 3]], []
    for turn in range(2):  # once to hear what each rank adds, once with the sum of both
        for k, mine in enumerate(parts):
            part = Responses([data.groups[g] for g in mine], data.places[mine].tolist(), 1, torch.device("cpu"))
            one = learner(method)
            one.run.sum = tables.append if turn == 0 else lambda values: [sum(pair) for pair in zip(*tables)]
            if turn == 0:
                with pytest.raises(TypeError):  # it heard no sum
                    one.credit(part, 0.0)
            else:
                theirs = torch.cat([whole[data.ids == g] for g in mine])
                assert torch.allclose(one.credit(part, 0.0)[1], theirs)


# -- schedules, and who has a gradient ---------------------------------------------------------------------------------


def test_schedules_of_the_teacher(monkeypatch):
    """RLSD's share falls from .5 to 0 in 50 steps; SDPG's two weights rise over a tenth of the run, then fall to 0."""
    monkeypatch.setattr(train_rl.Learner, "__call__", lambda self, data, step, steps: None)
    one = learner(rlsd)
    assert [one(None, s, 100) or one.mix for s in (0, 25, 50, 99)] == [0.5, 0.25, 0, 0]
    one = learner(sdpg, distil=2.0, beta=1.0)
    found = [one(None, s, 100) or (one.distil, one.beta) for s in (0, 9, 10, 55, 100)]
    assert found == [pytest.approx((2 * s, s)) for s in (0.1, 1, 1, 0.5, 0)]


@pytest.mark.parametrize("method", [srpo, sdpo, capo, filtered])
def test_responses_without_an_advantage_learn_where_the_reward_is_not_all(method):
    """A group that is all wrong has no advantages, but a teacher, or steps that were wrong."""
    data, _ = step(0)
    data.A = torch.zeros_like(data.A)
    live = learner(method).live(data)
    wrong = data.rewards[:, 0] < 1
    assert torch.equal(live, wrong if method is srpo else data.kept)


def test_a_truncated_kl_without_its_rest_would_be_negative():
    """KL over C tokens and the rest as one, in float64 by hand: never below 0."""
    torch.manual_seed(0)
    h, W = torch.randn(50, 6), 0.5 * torch.randn(30, 6)
    g = h + 0.5 * torch.randn(50, 6)
    p, q = ((x.double() @ W.T.double()).softmax(-1) for x in (h, g))
    top = p.topk(4).indices
    bucketed = lambda x: torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)], 1)
    P, Q = bucketed(p), bucketed(q)
    found = opcd.tokens_kl(h, W, g, W, 4, 1.0).double()
    assert torch.allclose(found, (P * (P / Q).log()).sum(1), atol=1e-5) and (found >= 0).all()
    assert ((P[:, :4] * (P[:, :4] / Q[:, :4]).log()).sum(1) < 0).any()


# -- with a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rl_folder(tmp_path_factory.mktemp("field"))


@pytest.fixture(scope="module")
def drawn(folder):
    return draw(folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return reader_folder(tmp_path_factory.mktemp("field-reader"))


def two_passes(name, ours, theirs, group, response, A, aware):
    """The loss of a response's tokens from log-probabilities of whole forward passes: ours learns, theirs is fixed."""
    own = logprobs(ours, group.prompt, response.tokens)
    if name == "rlsd":
        with torch.no_grad():
            d = logprobs(theirs, group.policy_prompt, response.tokens) - own
        return -(A * (0.5 + 0.5 * (math.copysign(1, A) * d).exp().clamp(0.8, 1.2)) * (own - own.detach()).exp())
    if name == "pidistill":
        student = -A * (own - own.detach()).exp()
        if not aware:
            return student
        logp, sampled = logprobs(ours, group.policy_prompt, response.tokens), torch.tensor(response.logprobs)
        ratio, shifted = (logp - sampled).exp(), A - 0.01 * (sampled - own.detach())
        return 0.5 * student - 0.5 * torch.minimum(ratio * shifted, ratio.clamp(0.8, 1.2) * shifted)

    def distribution(model, prompt):
        ids = torch.cat([prompt.input_ids, torch.tensor(response.tokens)])[None]
        hidden = model(ids, None, prompt.pixel_values, prompt.grid_thw)[0, len(prompt.input_ids) - 1 : -1]
        return model.logits(hidden).log_softmax(-1)

    p = distribution(ours, group.prompt)
    with torch.no_grad():
        q = distribution(theirs, group.policy_prompt)
    kl = (p.exp() * (p - q)).sum(-1)
    if name == "srpo":  # all of them are wrong
        return (q.exp() * q).sum(-1).exp() * kl
    return -A * (own - own.detach()).exp() + 0.3 * kl * (A > 0)


@pytest.mark.parametrize("name", ["rlsd", "sdpg", "srpo", "pidistill"])
def test_gradient_is_that_of_two_forward_passes(folder, drawn, name):
    """Who is read with the policy and who without, and who learns: the model itself, as it is now, teaches."""
    method = importlib.import_module(f"variants.{name}")
    model, start, groups, processor = drawn
    if name == "srpo":
        groups = [dataclasses.replace(group, rewards=torch.zeros_like(group.rewards)) for group in groups]
    flags = {"sdpg": dict(distil=0.3, top_tokens=1000), "srpo": dict(top_tokens=1000)}.get(name, {})
    settings = config(folder, method, micro_batch=4, clip_low=0.2, clip_high=0.2, beta=0.0, **flags)
    A = torch.linspace(-1.5, 2.0, 16)
    wide = dict(settings=settings, drawn=(model, start, groups, processor), method=method, A=A)
    if name == "sdpg":  # past its warm-up

        class Learner(sdpg.Learner):
            def __call__(self, data, step, steps):
                self.distil = self.config.distil
                return train_rl.Learner.__call__(self, data, step, steps)

        wide["method"] = SimpleNamespace(Learner=Learner)
    found = gradients(**wide)[0]
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    for g, group in enumerate(groups):
        for k, response in enumerate(group.responses):
            loss = two_passes(name, ours, theirs, group, response, float(A[4 * g + k]), group.aware[k])
            (loss.mean() / 16).backward()
    expected = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert distance([found], [expected]) < 1e-4


@pytest.mark.parametrize("name", [name for name in VALUES if name not in ("sdpo", "capo")])
def test_gradient_does_not_depend_on_how_the_work_is_split(folder, drawn, name):
    """Nothing is a statistic of a micro-batch or of a rank."""
    method, flags = importlib.import_module(f"variants.{name}"), {}
    if name == "iwopd":  # a sharper teacher: what is left between nearly equal log-probabilities would be rounding
        model, start, groups, processor = drawn
        start = copy.deepcopy(start)
        start.head_weight.data *= 20
        drawn = model, start, groups, processor
    if name == "sdpg":
        flags = dict(beta=0.0)
    whole = gradients(config(folder, method, micro_batch=16, inner_epochs=2, **flags), drawn, method, off_policy=True)
    split = config(folder, method, micro_batch=3, inner_epochs=2, **flags)
    assert len(whole) == 2 and distance(gradients(split, drawn, method, world=2, off_policy=True), whole) < 1e-5


RUNS = {"hints": dict(policy_rollouts=6), "filtered": dict(group_size=0, policy_rollouts=8)}
RUNS |= {name: dict(policy_rollouts=0, group_size=8) for name in ("srpo", "iwopd")}


@pytest.mark.parametrize("name", FIELD)
def test_each_runs_on_a_model_that_reads_policies(reader, name):
    flags = {**READ, "policy_rollouts": 4, "steps": 2, "inner_epochs": 2, **RUNS.get(name, {})}
    rows = run(reader, name, method=importlib.import_module(f"variants.{name}"), **flags)
    assert len(rows) == 2 and rows[0]["grad_norm"] > 0
    if flags["policy_rollouts"]:
        assert rows[0]["accuracy_aware"] > 0.3


def test_filtered_distillation_learns_from_right_responses_alone(reader):
    flags = {**READ, "group_size": 0, "policy_rollouts": 8, "steps": 25}
    rows = run(reader, "filtered-long", method=filtered, **{**flags, "validate_every": 25})
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_the_tiers_of_hints_are_three_prompts(reader):
    """A heading, the section where the path ends, the whole policy: in that order, and each for a third of K."""
    sections = ["N1 cube then N2 else A3 .", "N2 red then A1 else A2 ."]
    whole = " ".join(["policy P : start N1 .", *sections])
    nodes = [{"id": section[:2], "section": section} for section in sections]
    rollout = hints.Hints(SimpleNamespace(stop_ids=[], banned_ids=[]), {}, 2, 3)
    rollout.policy = lambda item: ({"text": whole, "images": [], "nodes": nodes}, None)
    rollout.prompt = lambda item, policy: policy["text"]
    texts = []
    for rollout.tier in range(3):
        texts.append(rollout.policy_prompt({"path": [{"node": "N1"}, {"node": "N2"}]}, None))
    assert texts == ["policy P : start N1 .", f"policy P : start N1 . {sections[1]}", whole]
    with pytest.raises(InputError, match="multiple of 3"):
        run(reader, "hints-4", method=hints, **{**READ, "policy_rollouts": 4, "steps": 1})


# -- wrong versions ----------------------------------------------------------------------------------------------------

MUTATIONS = {  # (file, what stands there, what stands there instead)
    "rlsd: sign": ("rlsd", "(micro.A.sign() * d)", "d"),
    "rlsd: clip": ("rlsd", ".clamp(0.8, 1.2)", ".clamp(0.8, 1.3)"),
    "rlsd: mix": ("rlsd", "1 - self.mix + self.mix", "1 + self.mix"),
    "sdpg: gate": ("sdpg", "(micro.A > 0)", "(micro.A < 0)"),
    "srpo: mask": ("srpo", "torch.where(right,", "torch.where(~right,"),
    "srpo: entropy": ("srpo", "(-entropy).exp()", "entropy.exp()"),
    "sdpo: cap": ("sdpo", "clamp(max=2)", "clamp(max=9)"),
    "sdpo: teacher learns": ("sdpo", "kept[rows[right[:1]] if right else rows]", "kept[rows[:0] if right else rows]"),
    "sdpo: last right": ("sdpo", "group.policy_prompt[right[0]", "group.policy_prompt[right[-1]"),
    "iwopd: sign": ("iwopd", "1 + early * (1 -", "1 + early * (0 +"),
    "iwopd: own token": ("iwopd", "(size.cumsum(1) - size)", "size.cumsum(1)"),
    "hdpo: any half": ("hdpo", " & ~data.aware  # (B,)", "  # (B,)"),
    "hdpo: statistics": ("hdpo", "masked_fill(~kept, torch.nan)", "masked_fill(rewards.isnan(), torch.nan)"),
    "pidistill: halves": ("pidistill", "torch.where(micro.aware,", "torch.where(~micro.aware,"),
    "pidistill: ratio": ("pidistill", "function(logp, micro.logp_sampler,", "function(logp, micro.logp_old,"),
    "pidistill: sign": ("pidistill", "micro.A - self.config.stay", "micro.A + self.config.stay"),
    "skill0: grows": ("skill0", "policy_rollouts * (1 - progress)", "policy_rollouts * progress"),
    "skill0: never mind": ("skill0", "helps[data.ids] & ", ""),
    "dcpo: low": ("dcpo", "(1 - 4 * clip[0] / q)", "(1 - 4 * clip[0] * q)"),
    "dcpo: high": ("dcpo", "4 * clip[1] / q", "4 * clip[0] / q"),
    "hapo: middle": ("hapo", "middle == (h > 0)", "middle == (h < 0)"),
    "hapo: mask": ("hapo", ".masked_fill(mask == 0, torch.nan)", ""),
    "hapo: clip": ("hapo", "(1 - h.clamp(max=0))", "(1 + h.clamp(max=0))"),
    "hapo: lengths": ("hapo", "data.lengths * kept, len", "data.lengths * 0 + kept, len"),
    "riskpo: utility": ("riskpo", "clamp(max=0)", "clamp(min=0)"),
    "riskpo: bundle": ("riskpo", "data.places[data.ids] //", "data.ids //"),
    "dispo: side": ("dispo", "micro.A < 0", "micro.A > 0"),
    "xrpo: familiar": ("xrpo", "novelty * (1 - e)", "novelty * (e - 1)"),
    "xrpo: wrong ones, too": ("xrpo", "torch.where(A > 0, A + bonus, A)", "A + bonus"),
    "xrpo: mask": ("xrpo", "x * kept", "x"),
    "capo: sign": ("capo", "micro.A - self", "micro.A + self"),
    "capo: one token": ("capo", "tokens[: t + 1] != gold[: t + 1]", "tokens[t : t + 1] != gold[t : t + 1]"),
    "hints: last tier": ("hints", '"amin"', '"amax"'),
    "lld: side": ("lld", "(micro.A > 0)", "(micro.A < 0)"),
    "lld: response": ("lld", " & (lost.detach().sum(1, keepdim=True) > 0)", ""),
    "lld: gains": ("lld", "lost.clamp(min=0)", "lost"),
    "filtered: wrong ones": ("filtered", "kept & (data.rewards[:, 0] >= 1)", "kept"),
    "filtered: sign": ("filtered", "return -logp", "return logp"),
}


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_variant_is_noticed(wrong, tmp_path, monkeypatch):
    name, right, instead = MUTATIONS[wrong]
    module = changed(ROOT / "variants" / f"{name}.py", right, instead, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        for table, check in ((VALUES, check_values), (CREDIT, check_credit)):
            if name in table:
                check(name, module)


def test_each_is_a_short_file_and_stands_in_both_tables():
    """20 to 60 lines, held against a formula here."""
    assert set(VALUES) | set(CREDIT) == set(FIELD) == {name for name, *_ in MUTATIONS.values()}
    lines = {name: len((ROOT / "variants" / f"{name}.py").read_text().splitlines()) for name in FIELD}
    assert not {name: n for name, n in lines.items() if not 20 <= n <= 60}
