"""DCPO: the clip widens for tokens that were unlikely, q = pi_old(o_t|x): a small probability can afford a large ratio.

    -min(r A, clip(r, low, high) A),    low = (1 + sqrt(max(1 - 4 e_low / q, 0))) / 2
                                        high = min((1 + sqrt(1 + 4 e_high / q)) / 2, 10)

which are the r with |r (r - 1)| q = e. Bites with several updates per step. Its mean over a query's
earlier epochs is left out. Source: arXiv 2509.02333; claim: above DAPO with a tenth of the tokens clipped. What we saw:
row `dcpo` of results/README.md.

    python variants/dcpo.py --model M --init runs/sft --data data/clevr --out runs/dcpo --mini-batch 96
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from support.config import option
from train_rl import Loss


@dataclass
class Config(train_rl.Config):
    """the variant"""

    algorithm: str = option("dcpo", "what is optimised", choices=("dcpo",))


def dynamically_clipped(logp, logp_old, A, mask, clip):
    q, ratio = logp_old.exp(), (logp - logp_old).exp()
    low = 0.5 + 0.5 * (1 - 4 * clip[0] / q).clamp(min=0).sqrt()
    high = (0.5 + 0.5 * (1 + 4 * clip[1] / q).sqrt()).clamp(max=10)
    return -torch.minimum(ratio * A, ratio.clamp(low, high) * A)


class Learner(train_rl.Learner):
    losses = {"dcpo": Loss(dynamically_clipped, clip=(0.16, 0.2))}


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
