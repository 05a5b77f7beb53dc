"""What each part of PolicyRollout does: four ablations of its two halves.

--ablate statistics   mean and deviation of the standard and of the policy-aware half apart
--ablate gradients    the policy-aware half counts in the statistics, but only the standard half has gradients
--ablate negatives    wrong policy-aware responses count in the statistics, but are not pushed down
--ablate ratio        policy-aware responses against their true sampler, -min(r, 5) A log pi with
                      r = pi(o|x) / pi_old(o|P,x), where PolicyRollout takes pi_old(o|x)

python variants/halves.py --model M --init runs/sft --data data/clevr --out runs/halves --ablate statistics
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from kernels.advantage import group_advantage
from support.config import option, refuse
from train_rl import cispo


@dataclass
class Config(train_rl.Config):
    """the variant"""

    ablate: str = option(
        "", "what is taken away", choices=("statistics", "gradients", "negatives", "ratio"), required=True
    )


class Learner(train_rl.Learner):
    @classmethod
    def check(cls, config):
        super().check(config)
        G, K, least = config.group_size, config.policy_rollouts, 2 if config.ablate == "statistics" else 1
        refuse(min(G, K) < least, f"halves of {G} and {K}", f"{least} responses in each at least")

    def credit(self, data, progress):
        rewards, A, kept = super().credit(data, progress)
        if self.config.ablate == "statistics":
            A = group_advantage(rewards.masked_fill(~kept, torch.nan), 2 * data.ids + data.aware, self.loss.advantage)
        if self.config.ablate == "gradients":
            kept = kept & ~data.aware
        if self.config.ablate == "negatives":
            kept = kept & ~(data.aware & (A < 0))
        return rewards, A, kept

    def objective(self, micro):
        loss = super().objective(micro)
        if self.config.ablate != "ratio":
            return loss
        other = cispo(micro.logp, micro.logp_sampler, micro.A, micro.mask, clip=(1.0, 4.0))  # r is capped at 5
        return torch.where(micro.aware, other, loss)

    def ratio(self, micro):
        ratio = super().ratio(micro)
        return ratio.masked_fill(micro.aware, torch.nan) if self.config.ablate == "ratio" else ratio


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
