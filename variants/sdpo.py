"""SDPO: the model that has read a right sibling teaches itself without it; no policy is read, no reward is weighed.

    loss  min(r, 2) KL(pi(.|x,o_<t) || stopgrad pi(.|o+,x,o_<t)),     o+ the first right response of o's group

KL over the --top-tokens likeliest tokens and the rest as one. o+ stands where a policy would; it does not learn itself,
nor does a group without one. Source: arXiv 2601.20802, whose teacher is a moving average and whose divergence is JSD;
claim: GRPO's accuracy with a tenth of the samples. What we saw: row `sdpo` of results/README.md.

    python variants/sdpo.py --model M --init runs/sft --data data/clevr --out runs/sdpo --group-size 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rollout
import train_rl
from data import command
from variants.sdpg import Distiller
from variants.srpo import Config


class Siblings(rollout.PolicyRollout):
    def __call__(self, model, items, seeds):
        """policy_prompt is a list, (o, x) of each response o, until credit has chosen one."""
        groups = super().__call__(model, items, seeds)
        for group in groups:
            item, texts = self.scale(group.item), [self.processor.decode(o.tokens) for o in group.responses]
            group.policy_prompt = [self.prompt(item, {"text": text, "images": []}) for text in texts]
        return groups


class Learner(Distiller):
    def credit(self, data, progress):
        rewards, A, kept = super().credit(data, progress)
        for g, group in enumerate(data.groups):
            rows = (data.ids == g).nonzero()[:, 0]
            right = (data.rewards[rows, 0] >= 1).nonzero()[:, 0].tolist()
            kept[rows[right[:1]] if right else rows] = False
            group.policy_prompt = group.policy_prompt[right[0] if right else 0]
        return rewards, A, kept  # A is no part of the objective

    def live(self, data):
        return data.kept

    def objective(self, micro):
        return (micro.logp - micro.logp_old).exp().clamp(max=2).detach() * self.divergence(micro)[0]


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner, PolicyRollout=Siblings)


if __name__ == "__main__":
    command(main)
