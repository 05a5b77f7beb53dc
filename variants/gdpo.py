"""GDPO (arXiv 2601.05242): each reward is scaled by its own deviation in the group, then the sum over the batch.

    A = z(sum_f w_f (r_f - mean_f) / (std_f + eps) + p - mean_p),    z over all responses of the step

So a reward that hardly varies is not drowned by one that varies much. The overlong penalty p keeps its own scale:
divided by its deviation, a small one would outweigh being right.

    python variants/gdpo.py --model M --init runs/sft --data data/clevr --out runs/gdpo
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from kernels.advantage import group_advantage


def decoupled_advantage(run, parts, weights, penalty, ids):
    """Advantages (B,) of rewards parts (B,F) with weights (F,) and a penalty (B,) in groups ids (B,); NaN gives 0."""
    z = sum(w * group_advantage(part, ids) for part, w in zip(parts.T, weights))  # (B,)
    z = z + group_advantage(penalty, ids, "dr_grpo")
    valid = ~parts.isnan().any(1)
    n, total, squares = run.sum([float(valid.sum()), float(z[valid].sum()), float((z[valid] ** 2).sum())])
    deviation = math.sqrt(max(squares - total**2 / max(n, 1), 0) / max(n - 1, 1))
    return torch.where(valid & (z != 0), (z - total / max(n, 1)) / (deviation + 1e-4), 0)


class Learner(train_rl.Learner):
    def credit(self, data, progress):
        rewards, _, kept = super().credit(data, progress)
        weights = torch.tensor([weight for _, _, weight in self.rewards], dtype=torch.float64)
        penalty = torch.where(kept, rewards - data.rewards @ weights, torch.nan)
        return rewards, decoupled_advantage(self.run, data.rewards, weights, penalty, data.ids), kept


def main(argv=None):
    train_rl.main(argv, __doc__, Learner=Learner)


if __name__ == "__main__":
    command(main)
