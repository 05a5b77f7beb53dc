"""Dual clip: a wrong response whose tokens have become much likelier is pushed down no harder than c times.

    A < 0: -max(min(r A, clip(r) A), c A)       A > 0: the algorithm's own loss

Bites where r > c: policy-aware responses after several updates per step. Source: arXiv 1912.09729; PAPO (2507.06448)
uses c = 3 on multimodal GRPO; claim: stability. What we saw: row `dualclip` of results/README.md.

    python variants/dualclip.py --model M --init runs/sft --data data/clevr --out runs/dualclip --mini-batch 96
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from support.config import option


@dataclass
class Config(train_rl.Config):
    """the variant"""

    dual: float = option(3.0, "c, the largest ratio of a token with A < 0", above=1)


class Learner(train_rl.Learner):
    def objective(self, micro):
        loss = super().objective(micro)
        return torch.where(micro.A < 0, torch.minimum(loss, -self.config.dual * micro.A), loss)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
