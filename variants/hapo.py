"""HAPO: tokens are treated by their entropy, h_t in [-1, 1]: log H_t against the median of its response, largest = 1.

    A = (r - mean) / std over the tokens of the group, so that long responses weigh by their length
    A_t = A (1 + h) where r leaves the middle half of the clip (h > 0) or stays in it (h <= 0), else A
    clip (low (1 - h), high) where h <= 0, (low, high (1 + h)) where h > 0

Source: arXiv 2509.16591 (code: starriver030515/HAPO), whose medians are the batch's; ours are the response's, so that
micro-batches do not matter. Its temperature by entropy is left out. What we saw: row `hapo` of results/README.md.

    python variants/hapo.py --model M --init runs/sft --data data/clevr --out runs/hapo --mini-batch 96
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from train_rl import clipped


def heat(entropy, mask):
    """h (b,R): how far a token's log-entropy is from its response's median, the farthest on each side 1 or -1."""
    logs = entropy.clamp(min=1e-6).log().masked_fill(mask == 0, torch.nan)
    h = (logs - logs.nanmedian(1, keepdim=True).values).nan_to_num()  # (b,R)
    above, below = h.clamp(min=0), -h.clamp(max=0)
    scaled = lambda side: side / side.amax(1, keepdim=True).clamp(min=1e-6)
    return scaled(above) - scaled(below)


class Learner(train_rl.Learner):
    def credit(self, data, progress):
        rewards, A, kept = super().credit(data, progress)
        n, groups = data.lengths * kept, len(data.groups)  # (B,) tokens
        sums = lambda x: torch.zeros(groups, dtype=x.dtype).index_add(0, data.ids, x)[data.ids]  # (B,) over the group
        off = rewards - sums(n * rewards) / sums(n).clamp(min=1)
        own = off / ((sums(n * off**2) / sums(n).clamp(min=1)).sqrt() + 1e-6)
        calm = sums((kept & (own.abs() >= 5)).long()) == 0
        return rewards, torch.where(calm & kept & (A != 0), own.to(A), A), kept

    def objective(self, micro):
        h, ratio = heat(micro.entropy, micro.mask), (micro.logp - micro.logp_old).exp()
        low, high = self.clip[0] * (1 - h.clamp(max=0)), self.clip[1] * (1 + h.clamp(min=0))  # (b,R) each
        middle = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
        A = torch.where(middle == (h > 0), micro.A, micro.A * (1 + h))  # sure ones in the middle, unsure ones outside
        return clipped(micro.logp, micro.logp_old, A, micro.mask, (low, high))


def main(argv=None):
    train_rl.main(argv, __doc__, Learner=Learner)


if __name__ == "__main__":
    command(main)
