"""SRPO: right responses learn from their reward, wrong ones from the model that reads the policy.

    right: the algorithm's own loss      wrong: exp(-H_t) KL(pi(.|x,o_<t) || stopgrad pi(.|P,x,o_<t))

H_t is the teacher's entropy: what it is unsure of counts less (exp is our choice). KL over the --top-tokens likeliest
tokens and the rest as one. Source: arXiv 2604.02288, whose teacher has read a right sibling; claim: +3.4 over GRPO,
+6.3 over SDPO. What we saw: row `srpo` of results/README.md.

    python variants/srpo.py --model M --init runs/sft --data data/clevr --out runs/srpo --group-size 8
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from support.config import option, redefault
from variants.sdpg import Distiller


@dataclass
class Config(train_rl.Config):
    """the variant"""

    top_tokens: int = option(100, "KL over this many likeliest tokens, and the rest as one", least=1)
    policy_rollouts: int = redefault(train_rl.Config, "policy_rollouts", 0)


class Learner(Distiller):
    def live(self, data):
        return data.kept & ((data.A != 0) | (data.rewards[:, 0] < 1))

    def objective(self, micro):
        right = (micro.data.rewards[micro.rows, :1] >= 1).to(micro.mask.device)  # (b,1)
        kl, entropy = self.divergence(micro)  # (b,R) each
        return torch.where(right, super().objective(micro), (-entropy).exp() * kl)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
