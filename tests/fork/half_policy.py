"""A fork of what the policy-aware half sees: a random half of the policy's sentences, drawn anew for each query.

python tests/fork/half_policy.py --model M --data D --out runs/half
"""

import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rollout
import train_rl
from data import command
from data.dataset import IMAGE


class HalfPolicy(rollout.PolicyRollout):
    def policy_prompt(self, item, x):
        policy, _ = self.policy(item)
        sentences, pictures = re.split(r"(?<=\.) ", policy["text"]), iter(policy["images"])
        pairs = [(text, [next(pictures) for _ in range(text.count(IMAGE))]) for text in sentences]
        kept = sorted(random.Random(item["id"]).sample(range(len(pairs)), -(-len(pairs) // 2)))
        text, images = " ".join(pairs[k][0] for k in kept), [p for k in kept for p in pairs[k][1]]
        return self.prompt(item, {**policy, "text": text, "images": images})


def main(argv=None):
    train_rl.main(argv, __doc__, PolicyRollout=HalfPolicy)


if __name__ == "__main__":
    command(main)
