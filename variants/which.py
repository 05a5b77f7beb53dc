"""Which responses and tokens are learned from: not those that were cut, or only where the model hesitates.

--drop-truncated    DAPO's overlong filtering (arXiv 2503.14476): responses that --max-response cut count in the group's
                    statistics, and are not learned from
--uncertain Q       the share Q of a step's tokens with the highest entropy (arXiv 2506.01939: 0.2 does as well as all)

python variants/which.py --model M --init runs/sft --data data/clevr --out runs/which --uncertain 0.2
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from support.config import option


@dataclass
class Config(train_rl.Config):
    """the variant"""

    drop_truncated: bool = option(False, "learn from no response that --max-response cut")
    uncertain: float = option(1.0, "share of the tokens that is learned from, by entropy", above=0, most=1)


class Learner(train_rl.Learner):
    def credit(self, data, progress):
        rewards, A, kept = super().credit(data, progress)
        finished = torch.tensor([response.finished for response in data.list], dtype=torch.bool)
        return rewards, A, kept & finished if self.config.drop_truncated else kept

    def add_gradients(self, data, chosen, step_tokens, tally):
        if self.config.uncertain < 1:
            mine = chosen & self.live(data)  # (B,)
            _, entropy = self.logprobs(data, mine)  # (B,R)
            tokens = data.mask.bool() & mine[:, None].to(data.mask.device)
            data.uncertain = entropy >= threshold(self.run, entropy[tokens], self.config.uncertain)
        super().add_gradients(data, chosen, step_tokens, tally)

    def objective(self, micro):
        loss = super().objective(micro)
        return loss * micro.data.uncertain[micro.rows] if self.config.uncertain < 1 else loss


def threshold(run, values, share, most=20.0):
    """What `share` of the values (n,) of all ranks reaches, by bisection; they are in [0, most]."""
    wanted, low, high = share * run.sum(len(values)), 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        enough = run.sum(int((values >= middle).sum())) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return low


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
