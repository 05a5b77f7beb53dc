"""Scaf-GRPO's tiers: as little of the policy as makes a response right, and only where none without it is right.

    K = 3 k responses: k see the policy's first sentence, k that and the section where the item's path ends, k all of P
    kept = standard responses; where none is right also the first tier that has a right one, or else the last

Source: arXiv 2510.19807; claim: +44 % on AIME24 over GRPO. What we saw: row `hints` of results/README.md.

    python variants/hints.py --model M --init runs/sft --data data/clevr --out runs/hints --policy-rollouts 3
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import rollout
import train_rl
from data import InputError, command
from variants.hdpo import Gate


class Hints(rollout.PolicyRollout):
    def __call__(self, model, items, seeds):
        G, K, k = self.G, self.K, self.K // 3
        if not K or K % 3:
            raise InputError(f"found --policy-rollouts {K}, expected a multiple of 3, as many for each tier")
        groups = None
        for self.tier, start in enumerate((0, G + k, G + 2 * k)):
            self.G, self.K = 0 if groups else G, k
            drawn = super().__call__(model, items, [s[start : start + self.G + k] for s in seeds])
            for group, before in zip(drawn, groups or ()):
                group.responses, group.aware = before.responses + group.responses, before.aware + group.aware
            groups = drawn
        self.G, self.K = G, K
        return groups

    def policy_prompt(self, item, x):
        policy, _ = self.policy(item)
        heading, end = policy["text"].partition(".")[0] + ".", (item.get("path") or [{"node": ""}])[-1]["node"]
        section = next((node["section"] for node in policy["nodes"] if node["id"] == end), "")
        hints = [{"text": text, "images": []} for text in (heading, f"{heading} {section}")]
        return self.prompt(item, [*hints, policy][self.tier])


class Learner(Gate):
    def gate(self, data, progress):
        G, k, right = self.config.group_size, self.config.policy_rollouts // 3, data.rewards[:, 0] >= 1
        tier = torch.tensor([(i - G) // k if i >= G else -1 for _, i in data.rows])  # (B,) -1: without the policy
        first = torch.full((len(data.groups),), 2).scatter_reduce(0, data.ids, torch.where(right, tier, 2), "amin")
        return tier == first[data.ids]  # first: of each group, the tier that has a right one


def main(argv=None):
    train_rl.main(argv, __doc__, Learner=Learner, PolicyRollout=Hints)


if __name__ == "__main__":
    command(main)
