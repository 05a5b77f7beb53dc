"""Filtered distillation: likelihood of the right policy-aware responses, without the policy. Nothing is pushed down.

    loss -log pi(o_t|x,o_<t) for right o,     o ~ pi_start(.|P,x)

What PolicyRollout is without its own responses, advantages and ratio; rejection-sampled SFT, whose samples are drawn as
they are needed (--frozen-sampler "" draws them from the model itself: expert iteration). Source: RFT, arXiv 2308.01825.
What we saw: row `filtered` of results/README.md.

    python variants/filtered.py --model M --init runs/sft --data data/clevr --out runs/filtered
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from support.config import option, redefault
from train_rl import Loss


@dataclass
class Config(train_rl.Config):
    """the variant"""

    algorithm: str = option("filtered", "what is optimised", choices=("filtered",))
    group_size: int = redefault(train_rl.Config, "group_size", 0)
    policy_rollouts: int = redefault(train_rl.Config, "policy_rollouts", 8)
    frozen_sampler: str = redefault(train_rl.Config, "frozen_sampler", "start")


def surprise(logp, logp_old, A, mask, clip):
    return -logp


class Learner(train_rl.Learner):
    losses = {"filtered": Loss(surprise, "tokens of the update", without_advantage=True)}
    smallest_group = 1

    def credit(self, data, progress):
        rewards, A, kept = super().credit(data, progress)
        return rewards, torch.zeros_like(A), kept & (data.rewards[:, 0] >= 1)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
