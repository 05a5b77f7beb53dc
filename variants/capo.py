"""CAPO: within a response, the tokens of wrong steps are charged. The judge of steps is the gold chain, not an LLM.

    A_t = A - penalty 1[o_<=t has left the item's gold chain of thought, if it has one]

Ours knows the answer: an upper bound. Source: arXiv 2508.02298; claim: above GRPO. What we saw: row `capo`.

    python variants/capo.py --model M --init runs/sft --data data/clevr --out runs/capo
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import rollout
import train_rl
from data import command
from data.dataset import target
from support.config import option
from train_sft import response_ids


@dataclass
class Config(train_rl.Config):
    """the variant"""

    penalty: float = option(0.5, "what a token of a wrong step costs, in advantage", least=0)


class WithGold(rollout.PolicyRollout):
    def __call__(self, model, items, seeds):
        gold = lambda item: response_ids(self.processor, target(item)) if item.get("cot") else None
        given = [item.get("given", item) for item in items]
        items = [{**item, "given": {**plain, "gold": gold(plain)}} for item, plain in zip(items, given)]
        return super().__call__(model, items, seeds)


class Learner(train_rl.Learner):
    def live(self, data):
        return data.kept

    def objective(self, micro):
        wrong = torch.zeros_like(micro.mask)  # (b,R)
        for row, number in zip(wrong, micro.rows):
            gold, tokens = micro.data.groups[micro.data.ids[number]].item["gold"], micro.data.list[number].tokens
            left = [gold is not None and tokens[: t + 1] != gold[: t + 1] for t in range(len(tokens))]
            row[: len(left)] = torch.tensor(left).to(row)
        A = micro.A - self.config.penalty * wrong
        return self.loss.function(micro.logp, micro.logp_old, A, micro.mask, self.clip)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner, PolicyRollout=WithGold)


if __name__ == "__main__":
    command(main)
