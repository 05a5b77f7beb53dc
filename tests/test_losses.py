"""Every loss, KL, advantage and denominator against the same written out by hand in float64, token by token.

At the end MUTATIONS makes train_rl.py wrong, a sign, a clip or a denominator at a time, and these tests have to notice.
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_rl
from data.referral import invented, recall
from support.batching import words_kl
from train_rl import KLS, LOSSES, Learner, advantages, bapo_clip, overlong_penalty, shaped, token_weights

# Two responses, of three tokens and of two; ratios on both sides of every clip, with both signs of the advantage; the
# second's third token is padding.
RATIOS = [[1.5, 0.75, 1.1], [1.6, 0.7, 3.0]]
A = [2.0, -0.5]
LENGTHS = [3, 2]
OLD = [[-1.0, -2.0, -0.5], [-0.7, -1.5, 0.0]]


class One:
    """A run of one process."""

    def sum(self, x):
        return x


def by_hand(name):
    """-> one value a token, in plain Python."""
    low, high = LOSSES[name].clip
    rows = []
    for ratios, a, length, old in zip(RATIOS, A, LENGTHS, OLD):
        if name == "gspo":
            ratios = [math.exp(sum(math.log(r) for r in ratios[:length]) / length)] * 3
        row = []
        for r, o in zip(ratios, old):
            bounded = min(max(r, 1 - low), 1 + high)
            if name == "sapo":
                tau = 1.0 if a > 0 else 1.05
                row.append(-a * 4 / tau / (1 + math.exp(-tau * (r - 1))))
            elif name in ("cispo", "opcd"):
                row.append(-bounded * a * (o + math.log(r)))
            else:
                row.append(-min(r * a, bounded * a))
        rows.append(row[:length] + [0.0] * (3 - length))
    return torch.tensor(rows, dtype=torch.float64)


def tensors():
    old = torch.tensor(OLD, dtype=torch.float64)
    logp = (old + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]], dtype=torch.float64)
    return logp, old, torch.tensor(A, dtype=torch.float64)[:, None], mask


@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_its_formula(name):
    logp, old, a, mask = tensors()
    loss = LOSSES[name].function(logp, old, a, mask, LOSSES[name].clip)
    assert torch.allclose(loss * mask, by_hand(name), atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_derivative_of_the_formula(name):
    """Where the clip binds it is zero, except for CISPO; elsewhere its sign is that of -A."""
    logp, old, a, mask = tensors()
    (LOSSES[name].function(logp, old, a, mask, LOSSES[name].clip) * mask).sum().backward()
    if name in ("cispo", "opcd"):
        low, high = LOSSES[name].clip
        expected = -torch.tensor(RATIOS, dtype=torch.float64).clamp(1 - low, 1 + high) * a * mask
        assert torch.allclose(logp.grad, expected, atol=1e-12)
    elif name == "gspo":  # the first sequence lies beyond its clip where it binds, the second does not
        s = torch.tensor([[(1.5 * 0.75 * 1.1) ** (1 / 3)], [(1.6 * 0.7) ** 0.5]], dtype=torch.float64)
        low, high = LOSSES[name].clip
        free = ((a > 0) & (s < 1 + high)) | ((a < 0) & (s > 1 - low))
        assert torch.allclose(logp.grad, -s * a * free * mask, atol=1e-12)
    elif name == "sapo":
        r, tau = torch.tensor(RATIOS, dtype=torch.float64), torch.where(a > 0, 1.0, 1.05)
        gate = torch.sigmoid(tau * (r - 1))
        assert torch.allclose(logp.grad, -4 * a * gate * (1 - gate) * r * mask, atol=1e-6)
    else:
        r, (low, high) = torch.tensor(RATIOS, dtype=torch.float64), LOSSES[name].clip
        free = ((a > 0) & (r < 1 + high)) | ((a < 0) & (r > 1 - low))
        assert torch.allclose(logp.grad, -r * a * free * mask, atol=1e-12)


def test_inputs_are_left_alone():
    for name, loss in LOSSES.items():
        logp, old, a, mask = tensors()
        before = [t.detach().clone() for t in (logp, old, a, mask)]
        loss.function(logp, old, a, mask, loss.clip)
        assert all(torch.equal(t.detach(), b) for t, b in zip((logp, old, a, mask), before)), name


def test_shaped_ratio_pulls_most_where_the_word_is_unlikely():
    """ICPO: f(x) = x / (x + 0.01), whose derivative by log x is 0.01 x / (x + 0.01)^2."""
    r = torch.tensor([[0.001, 0.01, 0.5, 1.0]], dtype=torch.float64)
    logp = r.log().requires_grad_()
    loss = shaped(logp, torch.zeros_like(r), torch.tensor([[3.0]]), torch.ones_like(r), None)
    assert torch.allclose(loss, -3 * r / (r + 0.01))
    loss.sum().backward()
    assert torch.allclose(logp.grad, -3 * 0.01 * r / (r + 0.01) ** 2)
    assert logp.grad[0, 1] < logp.grad[0, 2] < logp.grad[0, 3]


def test_kl_estimators():
    d = torch.tensor([-0.5, 0.0, 2.0], dtype=torch.float64)  # log pi_ref - log pi
    assert torch.allclose(KLS["k1"](d), torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64))
    assert torch.allclose(KLS["k2"](d), torch.tensor([0.125, 0.0, 2.0], dtype=torch.float64))
    assert torch.allclose(KLS["k3"](d), torch.tensor([math.exp(-0.5) - 0.5, 0.0, math.exp(2) - 3], dtype=torch.float64))


def test_denominators():
    """sequences: mean of token means; length: a constant; tokens of step and update differ with mini-batches."""
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    counts = {"sequences": 8, "tokens of the update": 20, "tokens of the step": 60 / 2}
    expected = {
        "sequences": [1 / 24, 1 / 8],
        "length": [1 / 80, 1 / 80],
        "tokens of the update": [1 / 20] * 2,
        "tokens of the step": [1 / 30] * 2,
    }
    for over, (first, second) in expected.items():
        weights = token_weights(over, mask, counts, 10)
        assert torch.allclose(weights, mask * torch.tensor([[first], [second]])), over


def test_table_of_losses():
    """What each algorithm averages over, its advantage, clip and KL, as the papers have them."""
    table = {name: (loss.over, loss.advantage, loss.clip, loss.beta) for name, loss in LOSSES.items()}
    assert table == {
        "grpo": ("sequences", "grpo", (0.2, 0.3), 0.01),
        "dr_grpo": ("length", "dr_grpo", (0.2, 0.2), 0),
        "dapo": ("tokens of the step", "grpo", (0.2, 0.28), 0),
        "bnpo": ("tokens of the update", "grpo", (0.2, 0.2), 0),
        "gspo": ("sequences", "grpo", (3e-4, 4e-4), 0),
        "sapo": ("sequences", "grpo", (0.2, 0.2), 0),
        "cispo": ("tokens of the step", "grpo", (1.0, 4.0), 0),
        "gdpo": ("sequences", "gdpo", (0.2, 0.2), 0),
        "bapo": ("tokens of the step", "grpo", (0.2, 0.2), 0),
        "opcd": ("sequences", "opcd", (1.0, 4.0), 0),
    }


@pytest.mark.parametrize("aware_loss", ["same", "truncated", "shaped"])
def test_objective_adds_what_the_options_say(aware_loss):
    """Standard responses: clipped, weighed by min(old / sampled, cap), plus beta KL. Policy-aware: by --aware-loss."""
    logp, old, a, mask = tensors()
    sampled = old - torch.tensor([[0.0, 1.0, -1.0], [0.5, 3.0, 0.0]], dtype=torch.float64)
    reference, aware = logp.detach() + 0.3, torch.tensor([[False], [True]])
    options = SimpleNamespace(
        algorithm="grpo",
        clip_low=-1,
        clip_high=-1,
        beta=0.5,
        kl="k3",
        opcd_weight=0.0,
        aware_loss=aware_loss,
        importance_cap=2.0,
    )
    learner = Learner(options, None, None, None, None, None, 0)
    loss, kl = learner.objective(logp, old, sampled, a, mask, aware, reference)
    k3 = math.exp(0.3) - 0.3 - 1
    weight = [min(math.exp(d), 2.0) for d in (0.0, 1.0, -1.0)]
    first = [-min(r * 2.0, min(max(r, 0.8), 1.3) * 2.0) * w + 0.5 * k3 for r, w in zip(RATIOS[0], weight)]
    second = []
    for r, o, d in zip(RATIOS[1], OLD[1], (0.5, 3.0, 0.0)):
        true = r * math.exp(d)  # against what the sampler thought
        loss_of = {
            "same": -min(r * -0.5, min(max(r, 0.8), 1.3) * -0.5),
            "shaped": 0.5 * true / (true + 0.01),
            "truncated": 0.5 * min(true, 5.0) * (o + math.log(r)),
        }
        second.append(loss_of[aware_loss] + 0.5 * k3)
    assert torch.allclose(loss, torch.tensor([first, second], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(kl, torch.full_like(kl, k3))


def test_group_advantages_by_hand():
    """Both halves of a PolicyRollout group share one mean and one deviation (ddof 1)."""
    rewards = torch.tensor([0.0, 0.0, 1.0, 1.0, 3.0, 3.0], dtype=torch.float64)[:, None]
    ids, one = torch.tensor([0, 0, 0, 0, 1, 1]), torch.ones(1, dtype=torch.float64)
    z = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert torch.allclose(advantages("grpo", rewards, one, ids, One()), torch.tensor([-z, -z, z, z, 0, 0]))
    assert torch.allclose(advantages("dr_grpo", rewards, one, ids, One()), torch.tensor([-0.5, -0.5, 0.5, 0.5, 0, 0]))


def test_gdpo_scales_each_reward_by_its_own_deviation():
    """A reward that hardly varies is not drowned by one that varies much; then z-score over the batch."""
    parts = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.01], [1.0, 0.01], [math.nan, 0.0]], dtype=torch.float64)
    ids, weights = torch.zeros(5, dtype=torch.long), torch.tensor([1.0, 1.0], dtype=torch.float64)
    s = [0.5 / (math.sqrt(1 / 3) + 1e-4), None]
    small = torch.tensor([0.0, 0.0, 0.01, 0.01, 0.0], dtype=torch.float64)
    s[1] = ((small - small.mean()) / (small.std() + 1e-4))[:4].tolist()
    z = torch.tensor([-s[0] + s[1][0], s[0] + s[1][1], -s[0] + s[1][2], s[0] + s[1][3]])
    expected = (z - z.mean()) / (z.std() + 1e-4)
    found = advantages("gdpo", parts, weights, ids, One())
    assert torch.allclose(found[:4].double(), expected.double(), atol=1e-4) and found[4] == 0


def test_bapo_widens_the_clip_until_positives_weigh_enough():
    mask = torch.ones(1, 2, dtype=torch.float64)
    a, old = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    even = bapo_clip(One(), torch.zeros(1, 2, dtype=torch.float64), old, a, mask)
    assert even == (0.4, 0.2)  # half and half: the narrowest will do
    logp = torch.tensor([[2.0, 1.9]], dtype=torch.float64).log()  # the positive is cut at 1 + high, the negative is not
    low, high = bapo_clip(One(), logp, old, a, mask)
    assert low == 0.4 and high == pytest.approx(0.6)  # 1.6 / (1.6 + 1.9) is the first share of .45
    worst = bapo_clip(One(), logp, old, -a.abs(), mask)
    assert worst == pytest.approx((0.2, 1.0))  # no positives at all: the widest


def test_overlong_penalty():
    """0 up to M - C, then (M - C - L) / C, at most -1."""
    assert [overlong_penalty(length, 100, 20) for length in (10, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert overlong_penalty(100, 100, 0) == 0


def test_words_kl_over_the_whole_vocabulary_is_the_kl():
    torch.manual_seed(0)
    h, g, W = torch.randn(4, 6), torch.randn(4, 6), torch.randn(9, 6)
    p, q = (x.double() @ W.T.double() / 0.7 for x in (h, g))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(words_kl(h, W, g, W, 1000, 0.7).double(), expected, atol=1e-5)
    assert torch.allclose(words_kl(h, W, h, W, 3, 0.7), torch.zeros(4))


def test_pa3_rewards_recall_and_penalise():
    """Two of three sections that apply, one that does not, and one that the policy does not have."""
    path = [{"node": n, "answer": "yes"} for n in ("N1", "N2", "N3")]
    item = {"sections": ["N1", "N2", "N3", "N4"], "path": path, "answer": "A"}
    response = "<think>N1 asks: red? yes. N2 asks: blue? no. N4 no. N17 yes.</think>\\boxed{A}"
    assert recall("", response, item) == 2 / 4 and invented("", response, item) == -1 / 4
    assert recall("", "<think>N1. N2. N3.</think>\\boxed{A}", item) == 1 and invented("", "no thoughts", item) == 0


# -- wrong versions ----------------------------------------------------------------------------------------------------

MUTATIONS = {  # what is wrong: (what stands in train_rl.py, what stands there instead)
    "clipped: sign": ("return -torch.minimum(ratio * A", "return torch.minimum(ratio * A"),
    "clipped: no clip": ("ratio.clamp(1 - clip[0], 1 + clip[1]) * A)", "ratio * A)"),
    "clipped: no lower clip": ("ratio.clamp(1 - clip[0], 1 + clip[1]) * A)", "ratio.clamp(max=1 + clip[1]) * A)"),
    "clipped: no upper clip": ("ratio.clamp(1 - clip[0], 1 + clip[1]) * A)", "ratio.clamp(min=1 - clip[0]) * A)"),
    "clipped: clips swapped": ("ratio.clamp(1 - clip[0], 1 + clip[1])", "ratio.clamp(1 - clip[1], 1 + clip[0])"),
    "clipped: the better of the two": ("-torch.minimum(ratio", "-torch.maximum(ratio"),
    "gspo: sign": ("return clipped(log_ratio", "return -clipped(log_ratio"),
    "gspo: no clip": ("clipped(log_ratio, torch.zeros_like(log_ratio), A, mask, clip)", "(-log_ratio.exp() * A)"),
    "gspo: mean over padding": ("mask.sum(1, keepdim=True).clamp(min=1)  # (N,1)", "mask.shape[1]"),
    "gspo: padding summed": ("((logp - old) * mask).sum", "(logp - old).sum"),
    "sapo: sign": ("return -A * torch.sigmoid", "return A * torch.sigmoid"),
    "sapo: one tau": ("torch.where(A > 0, 1.0, 1.05)", "torch.ones_like(A)"),
    "sapo: no 4 / tau": ("- 1)) * 4 / tau", "- 1))"),
    "cispo: sign": ("return -(logp - old).exp().clamp", "return (logp - old).exp().clamp"),
    "cispo: no clip": (".clamp(1 - clip[0], 1 + clip[1]).detach()", ".detach()"),
    "cispo: gradient through the ratio": ("1 + clip[1]).detach()", "1 + clip[1])"),
    "shaped: sign": ("return -ratio / (ratio + 0.01)", "return ratio / (ratio + 0.01)"),
    "shaped: denominator": ("(ratio + 0.01) * A", "(ratio + 0.1) * A"),
    "grpo: clip": ("clip=(0.2, 0.3)", "clip=(0.2, 0.2)"),
    "grpo: no KL": ("clip=(0.2, 0.3), beta=0.01)", "clip=(0.2, 0.3))"),
    "dr_grpo: denominator": ('Loss(clipped, "length", "dr_grpo")', 'Loss(clipped, advantage="dr_grpo")'),
    "dr_grpo: deviation": ('Loss(clipped, "length", "dr_grpo")', 'Loss(clipped, "length")'),
    "dapo: clip": ("clip=(0.2, 0.28)", "clip=(0.2, 0.2)"),
    "dapo: denominator": ('Loss(clipped, "tokens of the step", clip', "Loss(clipped, clip"),
    "bnpo: denominator": ('"bnpo": Loss(clipped, "tokens of the update")', '"bnpo": Loss(clipped)'),
    "gspo: clip": ("clip=(3e-4, 4e-4)", "clip=(0.2, 0.2)"),
    "cispo: denominator": ('"cispo": Loss(cispo, "tokens of the step"', '"cispo": Loss(cispo, "sequences"'),
    "gdpo: advantage": ('Loss(clipped, advantage="gdpo")', "Loss(clipped)"),
    "bapo: denominator": ('"bapo": Loss(clipped, "tokens of the step")', '"bapo": Loss(clipped)'),
    "opcd: clip": ('advantage="opcd", clip=(1.0, 4.0)', 'advantage="opcd", clip=(0.2, 0.2)'),
    "k1: sign": ('"k1": lambda d: -d', '"k1": lambda d: d'),
    "k2: sign": ("lambda d: d**2 / 2", "lambda d: -(d**2) / 2"),
    "k2: denominator": ("lambda d: d**2 / 2", "lambda d: d**2"),
    "k3: sign of d": ("lambda d: d.exp() - d - 1", "lambda d: (-d).exp() + d - 1"),
    "k3: sign": ("lambda d: d.exp() - d - 1", "lambda d: -(d.exp() - d - 1)"),
    "KL rewarded": ("loss + self.beta * kl", "loss - self.beta * kl"),
    "KL the other way": ("(reference - logp)", "(logp - reference)"),
    "importance weight: no cap": (".exp().clamp(max=config.importance_cap)", ".exp()"),
    "importance weight upside down": ("(before - sampled).exp()", "(sampled - before).exp()"),
    "true sampler's ratio: no cap": ("A, mask, (1.0, 4.0)), loss)", "A, mask, (1.0, 99.0)), loss)"),
    "token mean over padding": (
        "mask / mask.sum(1, keepdim=True).clamp(min=1) / max(counts[over], 1)",
        "mask / mask.shape[1] / max(counts[over], 1)",
    ),
    "sequences: sum, not mean": (".clamp(min=1) / max(counts[over], 1)", ".clamp(min=1)"),
    "length: tokens instead": ('counts["sequences"] * length if', 'counts["sequences"] if'),
    "one count of tokens": ('"length" else counts[over], 1)', '"length" else counts["tokens of the update"], 1)'),
    "advantage: dr_grpo divides": ('"dr_grpo" if kind == "dr_grpo" else "grpo"', '"grpo"'),
    "gdpo: no deviation of the batch": ("(z - total / max(n, 1)) / (deviation + 1e-4)", "(z - total / max(n, 1))"),
    "gdpo: variance by n": ("/ max(n - 1, 1))", "/ max(n, 1))"),
    "bapo: negatives counted": ("(t * (A > 0)).sum()", "(t * (A < 0)).sum()"),
    "overlong: a bonus": ("else -min(max(length", "else min(max(length"),
    "overlong: denominator": ("0) / buffer, 1.0)", "0) / most, 1.0)"),
}


def check_everything():
    for name in LOSSES:
        test_loss_equals_its_formula(name)
        test_gradient_is_the_derivative_of_the_formula(name)
    for aware_loss in ("same", "truncated", "shaped"):
        test_objective_adds_what_the_options_say(aware_loss)
    test_table_of_losses()
    test_denominators()
    test_kl_estimators()
    test_shaped_ratio_pulls_most_where_the_word_is_unlikely()
    test_group_advantages_by_hand()
    test_gdpo_scales_each_reward_by_its_own_deviation()
    test_bapo_widens_the_clip_until_positives_weigh_enough()
    test_overlong_penalty()


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_sign_clip_or_denominator_is_noticed(wrong, tmp_path, monkeypatch):
    right, instead = MUTATIONS[wrong]
    source = Path(train_rl.__file__).read_text()
    assert source.count(right) == 1
    (tmp_path / "wrong.py").write_text(source.replace(right, instead))
    spec = importlib.util.spec_from_file_location("wrong", tmp_path / "wrong.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "wrong", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for name in ("KLS", "LOSSES", "Learner", "advantages", "bapo_clip", "overlong_penalty", "shaped", "token_weights"):
        monkeypatch.setitem(globals(), name, getattr(module, name))
    with pytest.raises(AssertionError):
        check_everything()
