"""A fork of credit: RLOO, each response against the mean of its siblings (arXiv 2402.14740).

python tests/fork/rloo.py --model M --data D --out runs/rloo
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_rl
from data import command
from kernels.advantage import group_advantage


class Learner(train_rl.Learner):
    def credit(self, data, progress):
        rewards, _, kept = super().credit(data, progress)
        n = data.ids.bincount()[data.ids]  # (B,) responses of each one's group
        A = group_advantage(rewards.masked_fill(~kept, float("nan")), data.ids, "dr_grpo") * n / (n - 1).clamp(min=1)
        return rewards, A, kept


def main(argv=None):
    train_rl.main(argv, __doc__, Learner=Learner)


if __name__ == "__main__":
    command(main)
