"""Two-sided clip: a token that became much likelier although it was bad costs at most --most times its advantage.

    -min(min(r, c) A, clip(r, 1 - low, 1 + high) A)

For A < 0 the plain surrogate has no bound. It is the dual clip of arXiv 1912.09729 (verl's and EasyR1's default, c = 3)
and TRL's `delta`. With one update per step all ratios are 1, and nothing changes.

    python variants/dual.py --model M --init runs/sft --data data/clevr --out runs/dual --most 3
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_rl
from data import command
from support.config import option, refuse
from train_rl import LOSSES, clipped


@dataclass
class Config(train_rl.Config):
    """the variant"""

    most: float = option(3.0, "c, the largest ratio that counts", above=1)


class Learner(train_rl.Learner):
    @classmethod
    def check(cls, config):
        super().check(config)
        plain = [name for name, loss in LOSSES.items() if loss.function is clipped]
        refuse(config.algorithm not in plain, f"--algorithm {config.algorithm}", f"one of {', '.join(plain)}")
        high = LOSSES[config.algorithm].clip[1] if config.clip_high is None else config.clip_high
        refuse(config.most <= 1 + high, f"--most {config.most}", f"more than the clip, {1 + high}")

    def objective(self, micro):
        return super().objective(micro).minimum(self.config.most * micro.A.abs())  # A > 0 has negative losses only


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
