"""XRPO's advantage: right responses that the model finds unlikelier than their siblings count more.

    A > 0: A + min(max(l (1 - e), 0), k A),     e = exp(s - mean of s in the group),  s = mean_t log pi_old(o_t|x,o_<t)

Policy-aware responses are the novel ones here: drawn given P, weighed given x. Its planning of rollouts is left out; l
and k are ours. Source: arXiv 2510.06672; claim: up to +4 % pass@1. What we saw: row `xrpo` of results/README.md.

    python variants/xrpo.py --model M --init runs/sft --data data/clevr --out runs/xrpo
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

    novelty: float = option(1.0, "l, weight of the bonus", least=0)
    most: float = option(0.5, "k, the bonus as a share of the advantage, at most", least=0)


class Learner(train_rl.Learner):
    def credit(self, data, progress):
        rewards, data.A, kept = super().credit(data, progress)
        A, (data.logp_old, _) = data.A, self.logprobs(data, kept)  # (B,), (B,R)
        s = (data.logp_old * data.mask).sum(1).cpu() / data.lengths  # (B,)
        total = lambda x: torch.zeros(len(data.groups), dtype=x.dtype).index_add(0, data.ids, x * kept)[data.ids]
        e = (s - total(s) / total(torch.ones_like(s)).clamp(min=1)).exp()
        bonus = torch.minimum((self.config.novelty * (1 - e)).clamp(min=0), self.config.most * A)
        return rewards, torch.where(A > 0, A + bonus, A), kept


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
