"""RiskPO: what counts is the lower part of the distribution of rewards, over bundles of queries.

    S = sum of the m-th rewards of --bundle queries,   a, b its quantiles --low and --high over the step
    A = z-score in the bundle of u(S) = (1 + w) / low min(S - a, 0) + clip(S, a, b) / (high - low)

the gradient of (1 + w) RVaR_0:low + RVaR_low:high (mixed value at risk). Theirs tracks the quantiles over the run and
bundles 5. Source: arXiv 2510.00911; claim: above GRPO and DAPO on pass@1 and pass@k. What we saw: row `riskpo` of
results/README.md.

    python variants/riskpo.py --model M --init runs/sft --data data/clevr --out runs/riskpo --bundle 4
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from kernels.advantage import group_advantage
from support.config import option


@dataclass
class Config(train_rl.Config):
    """the variant"""

    bundle: int = option(4, "queries whose rewards are added up", least=1)
    low: float = option(0.2, "quantile below which rewards count 1 + w times", above=0, most=1)
    high: float = option(0.8, "quantile above which they count no more", above=0, most=1)
    weight: float = option(0.5, "w", least=0)


def utility(S, low, high, weight):
    a, b = S.flatten().quantile(torch.tensor([low, high], dtype=S.dtype))
    return (1 + weight) / low * (S - a).clamp(max=0) + S.clamp(a, b) / (high - low)


class Learner(train_rl.Learner):
    def credit(self, data, progress):
        rewards, _, kept = super().credit(data, progress)
        config, M = self.config, self.config.group_size + self.config.policy_rollouts
        bundle = data.places[data.ids] // config.bundle  # (B,) of each response
        member = torch.tensor([m for _, m in data.rows], dtype=torch.long)
        S = torch.zeros(-(-config.batch_size // config.bundle), M, dtype=rewards.dtype)  # (bundles,M)
        S.index_put_((bundle, member), rewards, accumulate=True)
        S = torch.tensor(self.run.sum(S.flatten().tolist()), dtype=rewards.dtype).view_as(S)  # a bundle may span ranks
        A = group_advantage(utility(S, config.low, config.high, config.weight), mode=self.loss.advantage)
        return rewards, A[bundle, member], kept


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
