"""variants/: each file against its formula by hand, run as a script runs it, and made wrong on purpose."""

import copy
import dataclasses
import inspect
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from again import changed
from rl_bench import READ, Bench, config, distance, draw, gradients, reader_folder, rl_folder, run
from test_rl import logprobs

import train_rl
from data import InputError
from variants import bapo, dual, entropy, gdpo, halves, icpo, noisy, opcd, tis, which

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "variants").glob("*.py") if path.stem != "__init__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rl_folder(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def drawn(folder):
    return draw(folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return reader_folder(tmp_path_factory.mktemp("variants-reader"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_variant_is_its_difference(path):
    """Formula, source and an example command in the docstring, its own few flags, and nothing that train_rl.py has."""
    source = path.read_text()
    assert len(source.splitlines()) <= 80 and f"python variants/{path.name}" in source
    assert "argparse" not in source and "for step in" not in source


def test_a_variant_runs_as_a_script_from_anywhere(tmp_path):
    """torchrun is given a file: it has to find the house by itself, not by what happens to be installed."""
    done = subprocess.run(
        [sys.executable, "-I", ROOT / "variants" / "noisy.py", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--noise" in done.stdout and "the method:" in done.stdout


# -- by hand -----------------------------------------------------------------------------------------------------------


def micro(**more):
    """Two responses of three and two tokens, the second one policy-aware, float64."""
    double = lambda rows: torch.tensor(rows, dtype=torch.float64)
    logp_old = double([[-1.0, -2.0, -0.5], [-0.7, -1.5, 0.0]])
    return SimpleNamespace(
        logp_old=logp_old,
        logp=(logp_old + double([[1.5, 0.75, 1.1], [1.6, 0.7, 3.0]]).log()).requires_grad_(),
        logp_sampler=logp_old - double([[0.0, 1.0, -1.0], [0.5, 3.0, 0.0]]),
        A=double([[2.0], [-0.5]]),
        mask=double([[1, 1, 1], [1, 1, 0]]),
        aware=torch.tensor([[False], [True]]),
        **more,
    )


def learner(method, **options):
    """A variant's Learner without a model."""
    plain = dict(algorithm="grpo", clip_low=None, clip_high=None, beta=None, max_response=10, overlong=0)
    rewards = options.pop("rewards", [("accuracy", None, 1.0)])
    settings = SimpleNamespace(**{**plain, **options})
    return method.Learner(settings, Bench(settings), None, None, None, rewards, None, 0)


def judged(rewards, aware, lengths=None):
    rewards, n = torch.tensor(rewards, dtype=torch.float64), len(rewards)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    return SimpleNamespace(
        rewards=rewards,
        ids=torch.zeros(n, dtype=torch.long),
        aware=torch.tensor(aware, dtype=torch.bool),
        lengths=torch.tensor(lengths or [3] * n),
    )


def of_each(method, **options):
    """(the objective's values (2,3), its gradient by logp) and what grpo itself gives for the same micro-batch."""
    ours, plain = micro(), micro()
    values = learner(method, **options).objective(ours)
    values.sum().backward()
    clipped = learner(train_rl).objective(plain)
    clipped.sum().backward()
    return values.detach(), ours.logp.grad, clipped.detach(), plain.logp.grad


def test_icpo_shapes_the_true_ratio_of_policy_aware_responses():
    """-r / (r + 0.01) A with r against the sampler that saw P; its derivative by log r is -0.01 r / (r + 0.01)^2 A."""
    values, grads, clipped, plain = of_each(icpo, ratio="shaped", bonus=0.0)
    m = micro()
    r = (m.logp - m.logp_sampler).exp().detach()[1]
    assert torch.allclose(values[1], 0.5 * r / (r + 0.01)) and torch.allclose(values[0], clipped[0])
    assert torch.allclose(grads[1], 0.5 * 0.01 * r / (r + 0.01) ** 2) and torch.allclose(grads[0], plain[0])
    same, _, clipped, _ = of_each(icpo, ratio="plain", bonus=0.0)
    assert torch.equal(same, clipped)


def test_icpo_drops_wrong_policy_aware_responses_and_praises_right_ones():
    """Of [0, 1, 0, 1], the last two policy-aware: the third counts nowhere, the fourth has the bonus that is left."""
    data = judged([0.0, 1.0, 0.0, 1.0], [False, False, True, True])
    rewards, A, kept = learner(icpo, ratio="shaped", bonus=0.4).credit(data, progress=0.25)
    left = torch.tensor([0.0, 1.0, 1.3], dtype=torch.float64)
    z = ((left - left.mean()) / (left.std() + 1e-4)).float()
    assert kept.tolist() == [True, True, False, True] and torch.allclose(A, torch.tensor([z[0], z[1], 0, z[2]]))
    assert rewards[3] == pytest.approx(1.3)


def test_halves_ratio_is_the_true_samplers_capped():
    values, grads, clipped, plain = of_each(halves, ablate="ratio")
    m = micro()
    r = (m.logp - m.logp_sampler).exp().detach()[1].clamp(max=5.0)
    assert (r == 5).any() and torch.allclose(values[1], 0.5 * r * m.logp.detach()[1])
    assert torch.allclose(grads[1], 0.5 * r) and torch.allclose(grads[0], plain[0])
    assert torch.equal(of_each(halves, ablate="statistics")[0], clipped)


def test_halves_statistics_and_gradients():
    data = judged([0.0, 0.0, 1.0, 0.0], [False, False, True, True])
    _, A, kept = learner(halves, ablate="statistics").credit(data, 0.0)
    z = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert torch.allclose(A, torch.tensor([0, 0, z, -z])) and kept.all()
    _, A, kept = learner(halves, ablate="gradients").credit(data, 0.0)
    assert kept.tolist() == [True, True, False, False] and A[0] < 0 < A[2]


def test_tis_caps_the_weight_of_standard_tokens_only():
    """min(pi_old / pi_sampler, cap) on the standard response: 1, 2 (e capped) and 1/e; none on the other."""
    values, grads, clipped, plain = of_each(tis, cap=2.0)
    weight = torch.tensor([[1.0, 2.0, math.exp(-1)], [1, 1, 1]], dtype=torch.float64)
    assert torch.allclose(values, clipped * weight) and torch.allclose(grads, plain * weight)


def test_gdpo_scales_each_reward_by_its_own_deviation():
    """A reward that hardly varies is not drowned by one that varies much; then z-score over the batch."""
    parts = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.01], [1.0, 0.01], [math.nan, 0.0]]
    first = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    small = torch.tensor([0.0, 0.0, 0.01, 0.01, 0.0], dtype=torch.float64)
    second = ((small - small.mean()) / (small.std() + 1e-4))[:4]
    z = torch.tensor([-first, first, -first, first], dtype=torch.float64) + 0.5 * second
    two = [("a", None, 1.0), ("b", None, 0.5)]
    _, found, kept = learner(gdpo, rewards=two).credit(judged(parts, [False] * 5), 0.0)
    expected = (z - z.mean()) / (z.std() + 1e-4)
    assert (
        torch.allclose(found[:4].double(), expected, atol=1e-4)
        and found[4] == 0
        and kept.tolist() == [True] * 4 + [False]
    )


def test_gdpo_leaves_a_right_answer_with_a_small_penalty_above_the_wrong_ones():
    """Two right, one of them a little too long: divided by its own deviation that would cost all it gained."""
    data = judged([1.0, 1.0, 0.0, 0.0], [False] * 4, lengths=[3, 951, 3, 3])
    A = learner(gdpo, max_response=1000, overlong=50).credit(data, 0.0)[1]
    assert A[0] > A[1] > 0 > A[2] and A[1] > 0.9 * A[0] and torch.allclose(A[2], A[3])


def test_bapo_widens_the_clip_until_positives_weigh_enough():
    mask, one = torch.ones(1, 2, dtype=torch.float64), Bench(None)
    a, old = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert bapo.balanced_clip(one, old, old, a, mask, 0.45) == (0.4, 0.2)  # half and half: the narrowest will do
    logp = torch.tensor([[2.0, 1.9]], dtype=torch.float64).log()  # the positive is cut at 1 + high, the negative is not
    low, high = bapo.balanced_clip(one, logp, old, a, mask, 0.45)
    assert low == 0.4 and high == pytest.approx(0.6)  # 1.6 / (1.6 + 1.9) is the first share of .45
    assert bapo.balanced_clip(one, logp, old, -a.abs(), mask, 0.45) == pytest.approx((0.2, 1.0))  # no positives: widest


def test_dual_bounds_what_a_bad_token_can_cost():
    """A = -0.5 at a ratio of 1.6: c = 1.5 cuts 0.8 to 0.75, with no gradient; a ratio within and A > 0 stay."""
    values, grads, clipped, plain = of_each(dual, most=1.5)
    assert torch.equal(values[0], clipped[0]) and torch.equal(grads[0], plain[0])
    assert clipped[1, 0] == pytest.approx(0.8) and values[1, 0] == pytest.approx(0.75) and values[1, 1] == clipped[1, 1]
    assert grads[1, 0] == 0 < plain[1, 0]
    plain = dict(group_size=2, policy_rollouts=0, frozen_sampler="", clip_high=None)
    for flags, line in (
        ({"algorithm": "sapo", "most": 3}, "sapo, expected one of grpo, dr_grpo, dapo, bnpo"),
        ({"algorithm": "grpo", "most": 1.3}, "--most 1.3, expected more than the clip, 1.3"),
    ):
        with pytest.raises(InputError, match=line):
            dual.Learner.check(SimpleNamespace(**plain, **flags))


def test_which_drops_what_was_cut():
    """It counts in the group's statistics, and is not learned from."""
    data = judged([0.0, 1.0, 0.0, 1.0], [False] * 4)
    data.list = [SimpleNamespace(finished=finished) for finished in (True, True, False, True)]
    _, A, kept = learner(which, drop_truncated=True, uncertain=1.0).credit(data, 0.0)
    assert kept.tolist() == [True, True, False, True] and torch.equal(A, learner(train_rl).credit(data, 0.0)[1])
    assert learner(which, drop_truncated=False, uncertain=1.0).credit(data, 0.0)[2].all()


def test_which_learns_from_the_share_of_tokens_that_is_least_certain():
    """The quantile of all ranks' tokens, found from counts alone."""
    values, bench = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3, Bench(None)
    for share in (0.01, 0.2, 0.5, 1.0):
        assert (values >= which.threshold(bench, values, share)).sum() == pytest.approx(1000 * share, abs=1)
    ours = micro(data=SimpleNamespace(uncertain=torch.tensor([[True, False, True], [False, True, True]])), rows=[0, 1])
    one, plain = learner(which, drop_truncated=False, uncertain=0.5), learner(train_rl).objective(micro())
    assert torch.equal(one.objective(ours), plain * ours.data.uncertain)


def test_entropy_is_that_of_the_softmax_with_its_gradient():
    """In bf16 autocast, too, it is made in fp32."""
    torch.manual_seed(0)
    h, W = torch.randn(5, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    logp = (h.double() @ W.double().T / 0.7).log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1)
    own = torch.autograd.grad(expected.sum(), (h, W))
    with torch.autocast("cpu", torch.bfloat16):
        found = entropy.entropy(h, W, 0.7, rows=2)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), (h, W), allow_unused=True), own):
        assert ours is not None and torch.allclose(ours, theirs, atol=1e-5)


def test_entropy_pulls_at_dead_groups_as_well(folder, drawn):
    """The bonus over the mean of tokens of each response, on top of nothing; it raises the entropy."""
    model, start, groups, processor = drawn
    (found,) = gradients(config(folder, entropy, bonus=0.5, beta=0.0), drawn, entropy, A=torch.zeros(16))
    ours = copy.deepcopy(model)
    for group in groups:
        for response in group.responses:
            prompt, first = group.prompt, len(group.prompt.input_ids) - 1
            ids = torch.cat([prompt.input_ids, torch.tensor(response.tokens)])[None]
            hidden = ours(ids, None, prompt.pixel_values, prompt.grid_thw)[0, first:-1]
            logp = ours.logits(hidden).log_softmax(-1)
            (0.5 / 16 * (logp.exp() * logp).sum(-1).mean()).backward()
    expected = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert distance([found], [expected]) < 1e-4


def test_tokens_kl_is_a_kl_that_grows_to_the_whole_one():
    """The likeliest tokens and all others as one: never below 0, never above the KL over the vocabulary, and equal to
    it once that is all. Logits near 30 keep their digits under autocast.
    """
    torch.manual_seed(0)
    h, g, W = 3 * torch.randn(50, 6), 3 * torch.randn(50, 6), torch.randn(50, 6)
    p, q = ((x.double() @ W.T.double() / 0.7).log_softmax(-1) for x in (h, g))
    expected, before = (p.exp() * (p - q)).sum(-1), torch.zeros(50).double()
    assert p.min() < -30
    for count in (1, 5, 20, 50, 1000):
        with torch.autocast("cpu", torch.bfloat16):
            found = opcd.tokens_kl(h, W, g, W, count, 0.7).double()
        assert (found > before - 1e-5).all() and (found < expected + 1e-4).all(), count
        before = found
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(opcd.tokens_kl(h, W, h, W, 3, 0.7), torch.zeros(50), atol=1e-6)


def test_what_a_variant_does_not_clip_is_not_told_as_clipped():
    """Policy-aware responses of ICPO and of the ratio ablation have losses of their own; OPCD has no clip to tell."""
    for method, flags in ((icpo, {"ratio": "shaped", "bonus": 0.0}), (halves, {"ablate": "ratio"})):
        assert learner(method, **flags).ratio(micro()).isnan().tolist() == [[False] * 3, [True] * 3]
    for method, flags in ((icpo, {"ratio": "plain", "bonus": 0.0}), (halves, {"ablate": "gradients"})):
        assert not learner(method, **flags).ratio(micro()).isnan().any()
    assert opcd.Learner.losses["opcd"].ratio is None


# -- gradients of the whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_tokens", [0, 300])
def test_opcd_is_the_difference_of_two_forward_passes(folder, drawn, top_tokens):
    """The gradient of -(log teacher(o|P,x) - log pi(o|x)) log pi(o|x), or of KL(pi || teacher) over all tokens.

    With one prompt for both it vanishes.
    """
    _, start, groups, processor = drawn
    settings = config(folder, opcd, micro_batch=4, top_tokens=top_tokens)
    found = gradients(settings, (start, start, groups, processor), opcd)[0]
    ours = copy.deepcopy(start)

    def hidden(model, prompt, tokens):
        ids = torch.cat([prompt.input_ids, torch.tensor(tokens)])[None]
        return model(ids, None, prompt.pixel_values, prompt.grid_thw)[0, len(prompt.input_ids) - 1 : -1]

    for group in groups:
        for response in group.responses:
            if top_tokens:
                p = ours.logits(hidden(ours, group.prompt, response.tokens)).log_softmax(-1)
                with torch.no_grad():
                    q = start.logits(hidden(start, group.policy_prompt, response.tokens)).log_softmax(-1)
                (1 / 16 * (p.exp() * (p - q)).sum(-1).mean()).backward()
            else:
                own = logprobs(ours, group.prompt, response.tokens)
                with torch.no_grad():
                    gap = logprobs(start, group.policy_prompt, response.tokens) - own
                (-1 / 16 * (gap * own).mean()).backward()
    expected = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert distance([found], [expected]) < 1e-4
    same = [dataclasses.replace(g, policy_prompt=g.prompt) for g in groups]
    nothing = gradients(settings, (start, start, same, processor), opcd)[0]
    assert max(g.abs().max() for g in nothing.values()) < 1e-3 * max(g.abs().max() for g in found.values())


@pytest.mark.parametrize(
    "method,flags",
    [
        (opcd, {}),
        (opcd, {"top_tokens": 9}),
        (bapo, {}),
        (icpo, {}),
        (tis, {}),
        (halves, {"ablate": "ratio"}),
        (dual, {"most": 1.4}),
        (which, {"uncertain": 0.3}),
        (entropy, {}),
    ],
)
def test_gradient_does_not_depend_on_how_the_work_is_split(folder, drawn, method, flags):
    if method is opcd:  # a sharper teacher: what is left between nearly equal log-probabilities would be rounding
        model, start, groups, processor = drawn
        start = copy.deepcopy(start)
        start.head_weight.data *= 20
        drawn = model, start, groups, processor
    flags = dict(inner_epochs=2, **flags)
    whole = gradients(config(folder, method, micro_batch=16, **flags), drawn, method, off_policy=True)
    split = gradients(config(folder, method, micro_batch=3, **flags), drawn, method, world=2, off_policy=True)
    assert len(whole) == 2 and distance(split, whole) < 1e-6


# -- runs --------------------------------------------------------------------------------------------------------------


def test_opcd_learns_from_the_policy_without_a_reward(reader):
    rows = run(reader, "opcd", method=opcd, top_tokens=300, **{**READ, "group_size": 8, "steps": 25})
    assert rows[0]["accuracy"] == 0 and rows[-1]["accuracy"] > 0.6


@pytest.mark.parametrize(
    "method,flags",
    [
        (icpo, {"bonus": 0.5}),
        (halves, {"ablate": "statistics"}),
        (halves, {"ablate": "gradients"}),
        (halves, {"ablate": "ratio"}),
        (tis, {"cap": 2.0, "inner_epochs": 2}),
        (gdpo, {}),
        (bapo, {"inner_epochs": 2}),
        (dual, {"inner_epochs": 2}),
        (which, {"uncertain": 0.3}),
        (entropy, {}),
    ],
)
def test_variants_run_on_a_model_that_reads_policies(reader, method, flags):
    name = "-".join(map(str, [method.__name__, *flags.values()]))
    rows = run(reader, name, method=method, policy_rollouts=4, **{**READ, "steps": 3, **flags})
    assert rows[0]["accuracy_aware"] > 0.5
    # with statistics apart, the standard half has nothing right and the other may have nothing wrong
    assert rows[0]["grad_norm"] > 0 or flags.get("ablate") == "statistics"


def test_noise_needs_a_picture(reader, folder):
    with pytest.raises(InputError, match="found no picture"):
        run(reader, "noisy-text", method=noisy, policy_rollouts=2, **{**READ, "steps": 1})
    rows = run(folder, "noisy", method=noisy, policy_rollouts=2, steps=1)
    assert rows[0]["grad_norm"] > 0


# -- wrong versions ----------------------------------------------------------------------------------------------------

MUTATIONS = {  # (file, what stands there, what stands there instead)
    "shaped: sign": ("icpo", "return -ratio / (ratio + 0.01)", "return ratio / (ratio + 0.01)"),
    "shaped: denominator": ("icpo", "(ratio + 0.01) * A", "(ratio + 0.1) * A"),
    "icpo: old ratio": ("icpo", "shaped(micro.logp, micro.logp_sampler", "shaped(micro.logp, micro.logp_old"),
    "icpo: wrong ones kept": ("icpo", "kept & (right | ~data.aware)", "kept"),
    "icpo: bonus grows": ("icpo", "bonus * (1 - progress)", "bonus * progress"),
    "halves: no cap": ("halves", "clip=(1.0, 4.0)", "clip=(1.0, 99.0)"),
    "halves: standard half instead": ("halves", "torch.where(micro.aware, other", "torch.where(~micro.aware, other"),
    "halves: common statistics": ("halves", "2 * data.ids + data.aware", "2 * data.ids"),
    "halves: the other half learns": ("halves", "kept & ~data.aware", "kept & data.aware"),
    "tis: no cap": ("tis", ".clamp(max=self.config.cap)", ""),
    "tis: upside down": (
        "tis",
        "token_ratio(micro.logp_old, micro.logp_sampler)",
        "token_ratio(micro.logp_sampler, micro.logp_old)",
    ),
    "gdpo: no deviation of the batch": ("gdpo", "(deviation + 1e-4)", "1.0"),
    "gdpo: variance by n": ("gdpo", "/ max(n - 1, 1))", "/ max(n, 1))"),
    "gdpo: scaled penalty": ("gdpo", 'group_advantage(penalty, ids, "dr_grpo")', "group_advantage(penalty, ids)"),
    "dual: on everything": ("dual", ".minimum(self.config.most * micro.A.abs())", ".clamp(max=self.config.most)"),
    "which: cut ones kept": ("which", "kept & finished if", "kept if"),
    "which: statistics, too": (
        "which",
        "return rewards, A, kept & finished",
        "return rewards, A * finished, kept & finished",
    ),
    "which: the certain ones": ("which", "int((values >= middle).sum())", "int((values <= middle).sum())"),
    "entropy: no gradient": ("entropy", "logp = (h.float()", "logp = (h.detach().float()"),
    "entropy: sign": ("entropy", "return -(logp.exp() * logp)", "return (logp.exp() * logp)"),
    "entropy: no temperature": ("entropy", " / temperature).log_softmax", ").log_softmax"),
    "opcd: no tail": ("opcd", "torch.cat([logp, rest], 1).log_softmax(-1)", "logp"),
    "opcd: half precision": ("opcd", "torch.autocast(h.device.type, enabled=False)", "torch.autocast(h.device.type)"),
    "opcd: no normaliser": ("opcd", "+ likeliest[:, None]", ""),
    "bapo: negatives counted": ("bapo", "(t * (A > 0)).sum()", "(t * (A < 0)).sum()"),
}


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_variant_is_noticed(wrong, tmp_path, monkeypatch):
    name, right, instead = MUTATIONS[wrong]
    module = changed(ROOT / "variants" / f"{name}.py", right, instead, tmp_path, monkeypatch)
    monkeypatch.setitem(globals(), name, module)
    # those without fixtures: by hand, or of one function
    tests = [f for key, f in sorted(globals().items()) if key.startswith((f"test_{name}_", f"test_{STEMS.get(name)}_"))]
    with pytest.raises(AssertionError):
        for function in tests:
            if not inspect.signature(function).parameters:
                function()


STEMS = {"opcd": "tokens_kl"}
