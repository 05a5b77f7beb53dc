"""Truncated importance sampling: weigh each token by how the trainer's probability differs from the sampler's.

    weight of a token of a standard response: min(pi_old(o_t|x) / pi_sampler(o_t|x), cap)

For samplers whose numerics differ from the trainer's (bf16 on GPUs). Policy-aware responses keep weight 1: their
sampler differs by design. Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL".

    python variants/tis.py --model M --init runs/sft --data data/clevr --out runs/tis --cap 2
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from support.config import option
from train_rl import token_ratio


@dataclass
class Config(train_rl.Config):
    """the variant"""

    cap: float = option(2.0, "largest weight of a token", above=0)


class Learner(train_rl.Learner):
    def objective(self, micro):
        weight = token_ratio(micro.logp_old, micro.logp_sampler).clamp(max=self.config.cap)  # (b,R)
        return super().objective(micro) * torch.where(micro.aware, 1, weight)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
