"""ICPO: learn from right policy-aware responses only, most from what the model finds unlikely without the policy.

    loss of a policy-aware response: -r / (r + 0.01) A,     r = pi(o|x) / pi_old(o|P,x), the true sampler
    reward + bonus (1 - progress) where a policy-aware response is right; wrong ones are dropped

Source: In-Context Policy Optimization's shaping of off-policy responses. --ratio plain keeps the algorithm's own loss.

    python variants/icpo.py --model M --init runs/sft --data data/clevr --out runs/icpo --policy-rollouts 1 --bonus 0.2
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
from train_rl import token_ratio


@dataclass
class Config(train_rl.Config):
    """the variant"""

    bonus: float = option(0.0, "added to the reward of right policy-aware responses, falling to 0", least=0)
    ratio: str = option("shaped", "loss of policy-aware responses", choices=("shaped", "plain"))


def shaped(logp, logp_sampler, A):
    """-r / (r + 0.01) A, (b,R): its derivative is largest where r is small."""
    ratio = token_ratio(logp, logp_sampler)
    return -ratio / (ratio + 0.01) * A


class Learner(train_rl.Learner):
    @classmethod
    def check(cls, config):
        super().check(config)
        refuse(not config.policy_rollouts, "--policy-rollouts 0", "policy-aware responses")

    def credit(self, data, progress):
        rewards, _, kept = super().credit(data, progress)
        right = data.rewards[:, 0] >= 1
        rewards = rewards + self.config.bonus * (1 - progress) * (data.aware & right)
        kept = kept & (right | ~data.aware)
        A = group_advantage(rewards.masked_fill(~kept, torch.nan), data.ids, self.loss.advantage)
        return rewards, A, kept

    def objective(self, micro):
        loss = super().objective(micro)
        if self.config.ratio == "plain":
            return loss
        other = shaped(micro.logp, micro.logp_sampler, micro.A)
        return torch.where(micro.aware, other, loss)

    def ratio(self, micro):
        ratio = super().ratio(micro)
        return ratio.masked_fill(micro.aware, torch.nan) if self.config.ratio == "shaped" else ratio


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
