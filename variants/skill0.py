"""SKILL0: the policy is withdrawn: the policy-aware responses fall to none over the run, and only helpful ones stay.

    kept = standard responses, and of each group the first round(K (1 - progress)) policy-aware ones, if these K are
    right more often than the standard ones

Group statistics are over what is kept; what is dropped was sampled all the same. Source: arXiv 2604.02268, which
shortens the context itself; claim: +9.7 on ALFWorld. What we saw: row `skill0` of results/README.md.

    python variants/skill0.py --model M --init runs/sft --data data/clevr --out runs/skill0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from variants.hdpo import Gate


class Learner(Gate):
    def gate(self, data, progress):
        right = (data.rewards[:, 0] >= 1).double()  # (B,)
        mean = lambda half: sums(right * half, data) / sums(half, data).clamp(min=1)  # (groups,)
        helps = mean(data.aware.double()) > mean((~data.aware).double())
        number = torch.tensor([i - self.config.group_size for _, i in data.rows])  # (B,) of a policy-aware response
        return helps[data.ids] & (number < round(self.config.policy_rollouts * (1 - progress)))


def sums(values, data):
    """Of values (B,) over each group, (groups,)."""
    return torch.zeros(len(data.groups), dtype=values.dtype).index_add(0, data.ids, values)


def main(argv=None):
    train_rl.main(argv, __doc__, Learner=Learner)


if __name__ == "__main__":
    command(main)
