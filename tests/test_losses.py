"""Every loss, KL, advantage and denominator against the same written out by hand in float64, token by token.

At the end MUTATIONS makes train_rl.py wrong, a sign, a clip or a denominator at a time, and these tests have to notice.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from again import changed

import train_rl
from data.referral import invented, recall
from support.metrics import Tally
from train_rl import LOSSES, k3, overlong_penalty, token_weights

# Two responses, of three tokens and of two; ratios on both sides of every clip, with both signs of the advantage; the
# second's third token is padding.
RATIOS = [[6.0, 0.75, 1.1], [1.6, 0.7, 3.0]]
A = [2.0, -0.5]
LENGTHS = [3, 2]
OLD = [[-1.0, -2.0, -0.5], [-0.7, -1.5, 0.0]]


FORMULAS = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "sapo", "cispo")  # a fork adds its own here and to `by_hand`


def by_hand(name):
    """-> one value per token, in plain Python."""
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
            elif name == "cispo":
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


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_equals_its_formula(name):
    logp, old, a, mask = tensors()
    loss = LOSSES[name].function(logp, old, a, mask, LOSSES[name].clip)
    assert torch.allclose(loss * mask, by_hand(name), atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_is_the_derivative_of_the_formula(name):
    """Where the clip binds it is zero, except for CISPO; elsewhere its sign is that of -A."""
    logp, old, a, mask = tensors()
    (LOSSES[name].function(logp, old, a, mask, LOSSES[name].clip) * mask).sum().backward()
    if name == "cispo":
        low, high = LOSSES[name].clip
        expected = -torch.tensor(RATIOS, dtype=torch.float64).clamp(1 - low, 1 + high) * a * mask
        assert torch.allclose(logp.grad, expected, atol=1e-12)
    elif name == "gspo":  # the first sequence lies beyond its clip where it binds, the second does not
        s = torch.tensor([[(6.0 * 0.75 * 1.1) ** (1 / 3)], [(1.6 * 0.7) ** 0.5]], dtype=torch.float64)
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


def test_kl_estimator():
    """k3 of d = log pi_ref - log pi is never negative, 0 at d = 0, and its mean over samples of pi is the KL."""
    d = torch.tensor([-0.5, 0.0, 2.0], dtype=torch.float64)
    assert torch.allclose(k3(d), torch.tensor([math.exp(-0.5) - 0.5, 0.0, math.exp(2) - 3], dtype=torch.float64))
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    assert torch.allclose((p * k3(q.log() - p.log())).sum(), (p * (p / q).log()).sum())


def test_nothing_overflows():
    """Whatever two log-probabilities are, loss and gradient are finite: e^89 is infinite in fp32, 0 x inf is NaN."""
    for name, loss in LOSSES.items():
        for gap in (-1000.0, -89.0, 89.0, 1000.0):
            for sign in (-1.0, 1.0):
                logp = torch.full((1, 2), gap, requires_grad=True)
                mask = torch.ones(1, 2)
                value = loss.function(logp, torch.zeros(1, 2), torch.tensor([[sign]]), mask, loss.clip).sum()
                value.backward()
                assert value.isfinite() and logp.grad.isfinite().all(), (name, gap, sign)
    for gap in (-1000.0, -100.0, 100.0, 1000.0):
        d = torch.tensor([gap], requires_grad=True)
        k3(d).sum().backward()
        assert k3(d).item() == 10 and d.grad.isfinite().all()


def test_what_is_clipped_is_told_by_the_ratio_of_the_loss():
    """GSPO clips sequences: both of this one lie beyond, though only some of their tokens do; SAPO clips nothing."""
    logp, old, a, mask = tensors()
    told = {}
    for name in ("grpo", "gspo", "sapo", "cispo"):
        one, tally = learner(algorithm=name), Tally()
        micro = SimpleNamespace(logp=logp, logp_old=old, logp_sampler=old, A=a, mask=mask, entropy=mask, kl=None)
        micro.rows, micro.data = [0, 1], SimpleNamespace(rows=[(0, 0), (0, 1)])
        micro.aware = torch.tensor([[False], [True]])
        tally.learned(torch.tensor(0.0), micro, one.ratio(micro), one.clip)
        means = tally.over(SimpleNamespace(sum=lambda x: x))
        told[name] = [means[f"clipped_{k}"] for k in ("low", "high", "low_aware", "high_aware")]
    # by hand: A > 0 with ratios 6, .75 and 1.1 (the third within), A < 0 with 1.6 and .7; means 1.70 and 1.06
    assert told["grpo"] == pytest.approx([0, 1 / 3, 1 / 2, 0]) and told["sapo"] == [None] * 4
    assert told["gspo"] == [0, 1, 0, 0] and told["cispo"] == pytest.approx([0, 1 / 3, 0, 0])


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
    """What each algorithm averages over, its advantage, clip, KL and dynamic sampling, as the papers have them."""
    table = {name: (loss.over, loss.advantage, loss.clip, loss.beta, loss.tries) for name, loss in LOSSES.items()}
    assert (
        table.items()
        >= {
            "grpo": ("sequences", "grpo", (0.2, 0.3), 0.01, 0),
            "dr_grpo": ("length", "dr_grpo", (0.2, 0.2), 0, 0),
            "dapo": ("tokens of the step", "grpo", (0.2, 0.28), 0, 20),
            "bnpo": ("tokens of the update", "grpo", (0.2, 0.2), 0, 0),
            "gspo": ("sequences", "grpo", (3e-4, 4e-4), 0, 0),
            "sapo": ("sequences", "grpo", (0.2, 0.2), 0, 0),
            "cispo": ("tokens of the step", "grpo", (1.0, 4.0), 0, 0),
        }.items()
    )


def learner(**options):
    """A Learner without a model, for what needs none; options: of train_rl.Config."""
    config = SimpleNamespace(algorithm="grpo", clip_low=None, clip_high=None, beta=None, max_response=10, overlong=0)
    vars(config).update(options)
    return train_rl.Learner(config, None, None, None, None, options.get("rewards", [("r", None, 1.0)]), None, 0)


def test_an_option_left_out_is_the_algorithms_own():
    """None, resolved once; 0 is a value."""
    own, given = learner(algorithm="dapo"), learner(algorithm="grpo", clip_low=0.0, beta=0.0)
    assert own.clip == (0.2, 0.28) and own.beta == 0 and given.clip == (0.0, 0.3) and given.beta == 0


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo"])
def test_credit_by_hand(advantage):
    """Both halves of a group share one mean and one deviation (ddof 1); a failed reward counts nowhere."""
    parts = torch.tensor([[0.0, 0], [0, 0], [1, 0], [1, 0], [3, 1], [3, 1], [9, math.nan]], dtype=torch.float64)
    aware = torch.tensor([False, False, True, True, False, True, True])
    data = SimpleNamespace(
        rewards=parts, ids=torch.tensor([0, 0, 0, 0, 1, 1, 1]), aware=aware, lengths=torch.full((7,), 5)
    )
    algorithm = {"grpo": "grpo", "dr_grpo": "dr_grpo"}[advantage]
    rewards, A, kept = learner(algorithm=algorithm, rewards=[("a", None, 1.0), ("b", None, 2.0)]).credit(data, 0.0)
    z = 0.5 if advantage == "dr_grpo" else 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert torch.allclose(A, torch.tensor([-z, -z, z, z, 0, 0, 0])) and rewards.tolist() == [0, 0, 1, 1, 5, 5, 0]
    assert kept.tolist() == [True] * 6 + [False]


def test_overlong_penalty():
    """0 up to M - C, then (M - C - L) / C, at most -1."""
    assert [overlong_penalty(length, 100, 20) for length in (10, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert overlong_penalty(100, 100, 0) == 0


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
    "ratio: no bound": (".clamp(-20, 20).exp()", ".exp()"),
    "clipped: no clip": ("ratio.clamp(1 - clip[0], 1 + clip[1]) * A)", "ratio * A)"),
    "clipped: no lower clip": ("ratio.clamp(1 - clip[0], 1 + clip[1]) * A)", "ratio.clamp(max=1 + clip[1]) * A)"),
    "clipped: no upper clip": ("ratio.clamp(1 - clip[0], 1 + clip[1]) * A)", "ratio.clamp(min=1 - clip[0]) * A)"),
    "clipped: clips swapped": ("ratio.clamp(1 - clip[0], 1 + clip[1])", "ratio.clamp(1 - clip[1], 1 + clip[0])"),
    "clipped: the better of the two": ("-torch.minimum(ratio", "-torch.maximum(ratio"),
    "gspo: sign": ("return surrogate(sequence_ratio", "return -surrogate(sequence_ratio"),
    "gspo: ratio of tokens": (
        "surrogate(sequence_ratio(logp, logp_old, mask)",
        "surrogate(token_ratio(logp, logp_old)",
    ),
    "gspo: mean over padding": ("/ mask.sum(1, keepdim=True).clamp(min=1), 0)", "/ mask.shape[1], 0)"),
    "gspo: logs the ratio of tokens": (", ratio=sequence_ratio)", ")"),
    "sapo: logs a clip": (", ratio=None)", ")"),
    "gspo: padding summed": ("((logp - logp_old) * mask).sum", "(logp - logp_old).sum"),
    "sapo: sign": ("return -A * torch.sigmoid", "return A * torch.sigmoid"),
    "sapo: one tau": ("torch.where(A > 0, 1.0, 1.05)", "torch.ones_like(A)"),
    "sapo: no 4 / tau": ("- 1)) * 4 / tau", "- 1))"),
    "cispo: sign": ("return -token_ratio(logp, logp_old).clamp", "return token_ratio(logp, logp_old).clamp"),
    "cispo: no clip": (".clamp(1 - clip[0], 1 + clip[1]).detach()", ".detach()"),
    "cispo: gradient through the ratio": ("1 + clip[1]).detach()", "1 + clip[1])"),
    "grpo: clip": ("clip=(0.2, 0.3)", "clip=(0.2, 0.2)"),
    "grpo: no KL": ("clip=(0.2, 0.3), beta=0.01)", "clip=(0.2, 0.3))"),
    "dr_grpo: denominator": ('Loss(clipped, "length", "dr_grpo")', 'Loss(clipped, advantage="dr_grpo")'),
    "dr_grpo: deviation": ('Loss(clipped, "length", "dr_grpo")', 'Loss(clipped, "length")'),
    "dapo: clip": ("clip=(0.2, 0.28)", "clip=(0.2, 0.2)"),
    "dapo: denominator": ('Loss(clipped, "tokens of the step", clip', "Loss(clipped, clip"),
    "bnpo: denominator": ('"bnpo": Loss(clipped, "tokens of the update")', '"bnpo": Loss(clipped)'),
    "gspo: clip": ("clip=(3e-4, 4e-4)", "clip=(0.2, 0.2)"),
    "cispo: denominator": ('"cispo": Loss(cispo, "tokens of the step"', '"cispo": Loss(cispo, "sequences"'),
    "token mean over padding": (
        "mask / mask.sum(1, keepdim=True).clamp(min=1) / max(counts[over], 1)",
        "mask / mask.shape[1] / max(counts[over], 1)",
    ),
    "sequences: sum, not mean": (".clamp(min=1) / max(counts[over], 1)", ".clamp(min=1)"),
    "length: tokens instead": ('counts["sequences"] * length if', 'counts["sequences"] if'),
    "one count of tokens": ('"length" else counts[over], 1)', '"length" else counts["tokens of the update"], 1)'),
    "k3: sign of d": ("return (d.exp() - d - 1)", "return ((-d).exp() + d - 1)"),
    "k3: sign": ("return (d.exp() - d - 1)", "return (1 + d - d.exp())"),
    "k3: no bound of d": ("d = d.clamp(-20, 20)", "d = d + 0"),
    "k3: no bound": (".clamp(max=10)", ""),
    "advantage: dr_grpo divides": ("data.ids, self.loss.advantage)", 'data.ids, "grpo")'),
    "credit: failed ones are kept": ("~rewards.isnan()", "rewards.isnan() | True"),
    "clip: 0 is the algorithm's own": ("default if option is None else option", "option or default"),
    "overlong: a bonus": ("else -min(max(length", "else min(max(length"),
    "overlong: denominator": ("0) / buffer, 1.0)", "0) / most, 1.0)"),
}


def check_everything():
    for name in FORMULAS:
        test_loss_equals_its_formula(name)
        test_gradient_is_the_derivative_of_the_formula(name)
    for advantage in ("grpo", "dr_grpo"):
        test_credit_by_hand(advantage)
    test_table_of_losses()
    test_an_option_left_out_is_the_algorithms_own()
    test_denominators()
    test_kl_estimator()
    test_nothing_overflows()
    test_what_is_clipped_is_told_by_the_ratio_of_the_loss()
    test_overlong_penalty()


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_sign_clip_or_denominator_is_noticed(wrong, tmp_path, monkeypatch):
    right, instead = MUTATIONS[wrong]
    module = changed(Path(__file__).resolve().parents[1] / "train_rl.py", right, instead, tmp_path, monkeypatch)
    monkeypatch.setitem(globals(), "train_rl", module)
    for name in ("k3", "LOSSES", "overlong_penalty", "token_weights"):
        monkeypatch.setitem(globals(), name, getattr(module, name))
    with pytest.raises(AssertionError):
        check_everything()
