"""SDPG: the algorithm's own loss, and where a response did well also the distance to the model that reads the policy.

    loss + s b KL(pi(.|x,o_<t) || stopgrad pi(.|P,x,o_<t)) 1[A > 0] + s a KL(pi || pi_ref),     a: --beta, b: --distil

s rises to 1 over the first tenth of the run and then falls to 0 (our choice of their warm-up and decay); the KL is over
the --top-tokens likeliest tokens and the rest as one. Source: arXiv 2606.04036; claim: above GRPO, OPSD and RLSD in one
repository. What we saw: row `sdpg` of results/README.md.

    python variants/sdpg.py --model M --init runs/sft --data data/clevr --out runs/sdpg --group-size 8
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_rl
from data import command
from support.config import option, redefault
from variants.opcd import tokens_kl
from variants.rlsd import SelfTeacher


@dataclass
class Config(train_rl.Config):
    """the variant"""

    distil: float = option(1e-3, "b, weight of the distance to the teacher", least=0)
    top_tokens: int = option(100, "KL over this many likeliest tokens, and the rest as one", least=1)
    beta: float = redefault(train_rl.Config, "beta", 1e-3)
    policy_rollouts: int = redefault(train_rl.Config, "policy_rollouts", 0)


class Distiller(SelfTeacher):
    def divergence(self, micro):
        """KL(pi || teacher) (b,R) over --top-tokens tokens and the rest as one, and the teacher's entropy (b,R)."""
        _, entropy, hidden = self.teacher(micro)
        W, settings = self.model.head_weight, (self.config.top_tokens, self.config.temperature)
        with self.run.autocast():
            return micro.spread(tokens_kl(micro.hidden, W, hidden, W.detach(), *settings)), entropy


class Learner(Distiller):
    def __call__(self, data, step, steps):
        s = min(10 * (step + 1) / steps, 1, (1 - step / steps) / 0.9)
        self.distil, self.beta = s * self.config.distil, s * self.config.beta
        return super().__call__(data, step, steps)

    def objective(self, micro):
        return super().objective(micro) + self.distil * self.divergence(micro)[0] * (micro.A > 0)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
