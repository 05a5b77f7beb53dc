"""Every loss of train_rl.py against TRL's, value and gradient, where TRL is installed (tried with 1.16).

189 comparisons: nine settings of the algorithm (seven losses; the two-sided clip, and the share of uncertain tokens),
seven of the clip, the KL and the batch, three draws. Two differ, on purpose: TRL's BNPO divides by the tokens of a
micro-batch, ours by those of the update, on any split; TRL's bias-corrected KL is no option here.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from rl_bench import Bench

import train_rl
from support.metrics import Tally
from train_rl import LOSSES, token_weights
from variants import dual, which

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed", exc_type=ImportError)

# ours: (Learner, algorithm, its options), theirs: what TRL calls the same
METHODS = {
    "grpo": (train_rl, "grpo", {}, {"loss_type": "grpo"}),
    "dr_grpo": (train_rl, "dr_grpo", {}, {"loss_type": "dr_grpo"}),
    "dapo": (train_rl, "dapo", {}, {"loss_type": "dapo"}),
    "bnpo": (train_rl, "bnpo", {}, {"loss_type": "bnpo"}),
    "gspo": (train_rl, "gspo", {}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "sapo": (train_rl, "sapo", {}, {"loss_type": "sapo"}),
    "cispo": (train_rl, "cispo", {}, {"loss_type": "cispo"}),
    "dual": (dual, "grpo", {"most": 1.5}, {"loss_type": "grpo", "delta": 1.5}),
    "which": (which, "dapo", {"uncertain": 0.25}, {"loss_type": "dapo", "top_entropy_quantile": 0.25}),
}
SETTINGS = {
    "as published": {},
    "on-policy": {"spread": 0.0},
    "KL": {"beta": 0.04},
    "wide clip": {"clip_low": 0.4, "clip_high": 2.0},
    "narrow clip, KL": {"clip_low": 0.01, "clip_high": 0.02, "beta": 0.3},
    "one long row": {"lengths": (9, 1, 1, 1, 1, 1)},
    "six groups in two parts": {"parts": 2},
}


def case(seed, spread=0.4, lengths=(9, 4, 7, 1, 3, 8), **_):
    """Log-probabilities, old ones, a reference's, entropies (B,R), advantages (B,) and mask (B,R), float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(len(lengths), max(lengths), generator=g, dtype=torch.float64)
    logp = -draw().abs() - 0.05
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).double()
    return logp, logp - spread * draw(), logp + 0.3 * draw(), draw().abs(), draw()[:, 0], mask


def ours(name, logp, logp_old, reference, entropy, A, mask, options):
    """(loss, gradient (B,R)) of a Learner's objective and token weights, over parts of the batch."""
    method, algorithm, more, _ = METHODS[name]
    plain = dict(algorithm=algorithm, clip_low=None, clip_high=None, beta=0.0, drop_truncated=False, uncertain=1.0)
    config = SimpleNamespace(**{**plain, **more, **options})
    learner = method.Learner(config, Bench(config), None, None, None, [], None, 0)
    logp, tokens = logp.clone().requires_grad_(), mask.sum()
    counts = {"sequences": len(mask), "tokens of the step": tokens, "tokens of the update": tokens}
    weights = token_weights(learner.loss.over, mask, {k: float(v) for k, v in counts.items()}, 20)
    data, tally, total = SimpleNamespace(rows=[(1, 0)] * len(mask)), Tally(), 0.0
    if config.uncertain < 1:
        data.uncertain = entropy >= which.threshold(learner.run, entropy[mask.bool()], config.uncertain)
    for rows in torch.arange(len(mask)).chunk(options.get("parts", 1)):
        micro = SimpleNamespace(logp=logp[rows], logp_old=logp_old[rows], A=A[rows, None], mask=mask[rows], data=data)
        micro.rows, micro.aware, micro.logp_sampler = rows, torch.zeros(len(rows), 1, dtype=torch.bool), logp_old[rows]
        micro.entropy, micro.kl = entropy[rows], train_rl.k3(reference[rows] - logp[rows]) if learner.beta else None
        loss = learner.objective(micro) + (learner.beta * micro.kl if learner.beta else 0)
        loss = (weights[rows] * loss).sum()
        loss.backward()
        total += loss.detach()
        tally.learned(loss.detach(), micro, learner.ratio(micro), learner.clip)
    return total, logp.grad, tally.over(SimpleNamespace(sum=lambda x: x))


def theirs(name, logp, logp_old, reference, entropy, A, mask, options, **more):
    """The same of TRL's GRPOTrainer._compute_loss, a micro-batch at a time."""
    loss, flags = LOSSES[METHODS[name][1]], {**METHODS[name][3], **more}
    low, high = (options.get(f"clip_{side}", own) for side, own in zip(("low", "high"), loss.clip))
    logp, total, parts = logp.clone().requires_grad_(), 0.0, options.get("parts", 1)
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, **_: x,
        gather_for_metrics=lambda x: x,
    )
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=flags.get("top_entropy_quantile", 1.0),
        off_policy_mask_threshold=None,
        importance_sampling_level=flags.get("importance_sampling_level", "token"),
        loss_type=flags["loss_type"],
        beta=options.get("beta", 0.0),
        epsilon_low=low,
        epsilon_high=1 + high if flags["loss_type"] == "cispo" else high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        max_completion_length=20,
        current_gradient_accumulation_steps=parts,
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(
            delta=flags.get("delta"),
            use_bias_correction_kl=flags.get("use_bias_correction_kl", False),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=parts,
        ),
    )
    trainer.get_high_entropy_mask = lambda *a: grpo_trainer.GRPOTrainer.get_high_entropy_mask(trainer, *a)
    for rows in torch.arange(len(mask)).chunk(parts):
        trainer._get_per_token_logps_and_entropies = lambda *a, rows=rows, **k: (logp[rows], entropy[rows], None)
        nothing = torch.zeros(len(rows), 1, dtype=torch.long)
        inputs = {"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask[rows].long()}
        inputs |= {"completion_mask": mask[rows], "advantages": A[rows], "old_per_token_logps": logp_old[rows]}
        inputs |= {"ref_per_token_logps": reference[rows], "num_items_in_batch": mask.sum()}
        part = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
        part.backward()
        total += part.detach()
    return total, logp.grad, trainer._metrics["train"]


def close(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_are_trls(name, setting):
    """To 1e-10 in float64; where they differ, it is for the reason that the file names."""
    odd = {"cispo": "clip_low", "dual": "clip_high"}  # theirs has no lower clip, nor is delta below 1 + high
    options = {option: x for option, x in SETTINGS[setting].items() if option != odd.get(name)}
    for seed in range(3):
        inputs = case(seed, **options)
        loss, grad, told = ours(name, *inputs, options)
        value, gradient, metrics = theirs(name, *inputs, options)
        splits = "parts" in options
        if splits and name in ("bnpo", "which"):  # theirs depends on the split; without it both agree again
            assert name == "which" or not close(loss, value)  # two quantiles may choose the same tokens
            value, gradient, metrics = theirs(name, *inputs, {**options, "parts": 1})
        assert close(loss, value) and close(grad, gradient), seed
        if "clip_ratio/low_mean" in metrics and not splits and name != "dual":
            assert told["clipped_low"] == pytest.approx(metrics["clip_ratio/low_mean"][0]) or name == "gspo"
            assert told["clipped_high"] == pytest.approx(metrics["clip_ratio/high_mean"][0]) or name == "gspo"


def test_a_kl_with_a_ratio_is_the_other_difference():
    inputs = case(0)
    loss, *_ = ours("grpo", *inputs, {"beta": 0.3})
    value, *_ = theirs("grpo", *inputs, {"beta": 0.3}, use_bias_correction_kl=True)
    assert not close(loss, value)
