"""BAPO (arXiv 2510.18927): the clip is found anew for each update, so that A > 0 keeps its share.

The clip widens, first above, then below, until responses with A > 0 make --target of sum |min(r A, clip(r) A)|. With
one update per step all ratios are 1 and the algorithm's own clip stands.

    python variants/bapo.py --model M --init runs/sft --data data/clevr --out runs/bapo --mini-batch 96
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_rl
from data import command
from support.config import option
from train_rl import Loss, clipped

BOUNDS = [(0.4, 0.2 + 0.05 * i) for i in range(17)] + [(0.4 - 0.05 * i, 1.0) for i in range(1, 5)]  # (low, high)


@dataclass
class Config(train_rl.Config):
    """the variant"""

    target: float = option(0.45, "share of the objective's sum that positive advantages are to make", least=0, most=1)
    algorithm: str = option("bapo", "what is optimised", choices=("bapo",))


def balanced_clip(run, logp, logp_old, A, mask, target):
    """The first of BOUNDS at which A > 0 makes `target` of the sum of |clipped| over all ranks; else the widest."""
    terms = [clipped(logp, logp_old, A, mask, clip).abs() * mask for clip in BOUNDS]  # (B,R) each
    sums = run.sum([float((t * (A > 0)).sum()) for t in terms] + [float(t.sum()) for t in terms])
    shares = [positive / max(whole, 1e-12) for positive, whole in zip(sums, sums[len(BOUNDS) :])]
    return next((clip for clip, share in zip(BOUNDS, shares) if share >= target), BOUNDS[-1])


class Learner(train_rl.Learner):
    losses = {"bapo": Loss(clipped, "tokens of the step")}

    def add_gradients(self, data, chosen, step_tokens, tally):
        if data.logp_old is not None:
            mine = chosen & self.live(data)  # (B,)
            (logp, _), mask = self.logprobs(data, mine), data.mask * mine[:, None].to(data.mask)  # (B,R)
            A = data.A[:, None].to(logp)
            self.clip = balanced_clip(self.run, logp, data.logp_old, A, mask, self.config.target)
        super().add_gradients(data, chosen, step_tokens, tally)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
