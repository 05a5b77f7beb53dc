"""NoisyRollout (arXiv 2504.13055): instead of the policy, the other half sees Gaussian noise on its pictures.

o_G+1 .. o_G+K ~ pi_old(. | Q, I + sigma n),     n ~ N(0, 1) per value of the normalised patches

python variants/noisy.py --model M --init runs/sft --data data/clevr --out runs/noisy --noise 0.5
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import model as qwen
import rollout
import train_rl
from data import InputError, command
from support.config import option, redefault, refuse


@dataclass
class Config(train_rl.Config):
    """the variant"""

    noise: float = option(0.5, "sigma, deviation of the noise in normalised pixels", above=0)
    check: int = redefault(train_rl.Config, "check", 0)  # no policy is read


class Learner(train_rl.Learner):
    @classmethod
    def check(cls, config):
        super().check(config)
        refuse(not config.policy_rollouts, "--policy-rollouts 0", "responses to noised pictures")


class NoisyRollout(rollout.PolicyRollout):
    def policy_prompt(self, item, x):
        if x.pixel_values is None:
            raise InputError(f"item {item['id']}: found no picture, expected one that noise can be added to")
        generator = torch.Generator().manual_seed(int(hashlib.sha1(item["id"].encode()).hexdigest()[:15], 16))
        noise = torch.randn(x.pixel_values.shape, generator=generator)  # (U,1176)
        return qwen.Encoded(x.input_ids, x.pixel_values + self.options.noise * noise, x.grid_thw)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner, PolicyRollout=NoisyRollout)


if __name__ == "__main__":
    command(main)
