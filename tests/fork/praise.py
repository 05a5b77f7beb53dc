"""A fork of the objective: likelihood of right responses beside the algorithm's own loss.

python tests/fork/praise.py --model M --data D --out runs/praise
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_rl
from data import command


class Learner(train_rl.Learner):
    def objective(self, micro):
        return super().objective(micro) - 0.1 * (micro.A > 0) * micro.logp


def main(argv=None):
    train_rl.main(argv, __doc__, Learner=Learner)


if __name__ == "__main__":
    command(main)
