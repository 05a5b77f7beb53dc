"""Every loss, KL, advantage and denominator against the same written out by hand in float64, token by token."""

import math

import pytest
import torch

from batching import words_kl
from data.referral import invented, recall
from train_rl import KLS, LOSSES, advantages, bapo_clip, overlong_penalty, shaped, token_weights

# Two responses, of three tokens and of two; ratios on both sides of every clip, with both signs of the advantage.
RATIOS = [[1.5, 0.5, 1.1], [1.6, 0.4, 1.0]]
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
    elif name == "gspo":  # both sequences' ratios lie beyond their clips on the side where it binds, or not at all
        s = torch.tensor([[(1.5 * 0.5 * 1.1) ** (1 / 3)], [(1.6 * 0.4) ** 0.5]], dtype=torch.float64)
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
    """sequences: mean of token means; length: a constant; tokens of the step and of the update differ with mini-batches."""
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    counts = {"sequences": 8, "tokens of the update": 20, "tokens of the step": 60 / 2}
    expected = {"sequences": [1 / 24, 1 / 8], "length": [1 / 80, 1 / 80], "tokens of the update": [1 / 20] * 2, "tokens of the step": [1 / 30] * 2}
    for over, (first, second) in expected.items():
        weights = token_weights(over, mask, counts, 10)
        assert torch.allclose(weights, mask * torch.tensor([[first], [second]])), over
    assert {name: loss.over for name, loss in LOSSES.items()} == {
        "grpo": "sequences", "dr_grpo": "length", "dapo": "tokens of the step", "bnpo": "tokens of the update", "gspo": "sequences",
        "sapo": "sequences", "cispo": "tokens of the step", "gdpo": "sequences", "bapo": "tokens of the step", "opcd": "sequences",
    }  # fmt: skip


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
    logp = torch.tensor([[2.0, 1.9]], dtype=torch.float64).log()  # r = 2 and 1.9: the positive is cut at 1 + high, the negative is not
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
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(words_kl(h, W, g, W, 1000, 0.7).double(), expected, atol=1e-5)
    assert torch.allclose(words_kl(h, W, h, W, 3, 0.7), torch.zeros(4))


def test_pa3_rewards_recall_and_penalise():
    """Two of three sections that apply, one that does not, and one that the policy does not have."""
    item = {"sections": ["N1", "N2", "N3", "N4"], "path": [{"node": n, "answer": "yes"} for n in ("N1", "N2", "N3")], "answer": "A"}
    response = "<think>N1 asks: red? yes. N2 asks: blue? no. N4 no. N17 yes.</think>\\boxed{A}"
    assert recall("", response, item) == 2 / 4 and invented("", response, item) == -1 / 4
    assert recall("", "<think>N1. N2. N3.</think>\\boxed{A}", item) == 1 and invented("", "no thoughts", item) == 0
