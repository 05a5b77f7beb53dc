"""LLDS, a guard against likelihood displacement: what did well must not fall while other responses are pushed down.

    loss + g max(log pi_old(o_t|x) - log pi(o_t|x), 0) for A > 0, if sum_t (log pi_old - log pi)(o_t|x) > 0

Bites with several updates per step. Source: arXiv 2512.04220, of which we read the abstract; the gate and g are ours.
Claim: no collapse of multi-turn GRPO, +38 % at 3B. What we saw: row `lld` of results/README.md.

    python variants/lld.py --model M --init runs/sft --data data/clevr --out runs/lld --mini-batch 96
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_rl
from data import command
from support.config import option


@dataclass
class Config(train_rl.Config):
    """the variant"""

    guard: float = option(0.1, "g, weight of what right responses have lost", least=0)


class Learner(train_rl.Learner):
    def objective(self, micro):
        lost = (micro.logp_old - micro.logp) * micro.mask  # (b,R)
        falls = (micro.A > 0) & (lost.detach().sum(1, keepdim=True) > 0)
        return super().objective(micro) + self.config.guard * lost.clamp(min=0) * falls


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
