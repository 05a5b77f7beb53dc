"""A true entropy bonus: the entropy of each token's distribution is part of the loss, and its gradient with it.

    loss of a token: that of the algorithm - bonus H,     H = -sum_v pi(v) log pi(v)

It acts on every response, dead groups too. The logits of a few tokens at a time are made again in the backward pass.

    python variants/entropy.py --model M --init runs/sft --data data/clevr --out runs/entropy --bonus 0.01
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.checkpoint import checkpoint

import train_rl
from data import command
from support.config import option
from support.sharding import gathered
from train_rl import LOSSES


@dataclass
class Config(train_rl.Config):
    """the variant"""

    bonus: float = option(0.01, "weight of the entropy, nats", above=0)


class Learner(train_rl.Learner):
    losses = {name: loss._replace(without_advantage=True) for name, loss in LOSSES.items()}

    def objective(self, micro):
        W = gathered(self.model.head_weight)[: self.model.vocabulary]
        H = micro.spread(entropy(micro.hidden, W, self.config.temperature))  # (b,R)
        return super().objective(micro) - self.config.bonus * H


def entropy(h, W, temperature, rows=256):
    """-sum_v p log p of softmax(h W^T / temperature), (L,) in fp32 nats. h: hidden states (L,D); W: weights (V,D)."""

    def of(h):
        logp = (h.float() @ W.float().T / temperature).log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    with torch.autocast(h.device.type, enabled=False):
        return torch.cat([checkpoint(of, part, use_reentrant=False) for part in h.split(rows)])


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
