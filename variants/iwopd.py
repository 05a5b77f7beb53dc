"""IW-OPD: on-policy distillation that weighs early tokens more, where the student has left the teacher least.

    A_t = w_t a_t,   a_t = log pi_start(o_t|P,x) - log pi(o_t|x),   w_t = 1 + g (1 - sum_{s<t} |a_s| / sum_s |a_s|)

Everything else is opcd.py's. Source: arXiv 2606.22600; claim: up to +6.9 on AIME25 over plain distillation (2605.21606
claims the opposite: rising weights). What we saw: row `iwopd` of results/README.md.

    python variants/iwopd.py --model M --init runs/sft --data data/clevr --out runs/iwopd --group-size 8
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_rl
from data import command
from support.config import option, redefault
from train_rl import Loss, cispo
from variants import opcd


@dataclass
class Config(train_rl.Config):
    """the variant"""

    early: float = option(0.5, "g, how much more the first token counts than the last", least=0)
    algorithm: str = option("iwopd", "what is optimised", choices=("iwopd",))
    policy_rollouts: int = redefault(train_rl.Config, "policy_rollouts", 0)


def weights(gap, early):
    """w (b,R) of gaps a (b,R), which are 0 where no token stands."""
    size = gap.abs()
    return 1 + early * (1 - (size.cumsum(1) - size) / size.sum(1, keepdim=True).clamp(min=1e-12))


class Learner(opcd.Learner):
    losses = {"iwopd": Loss(cispo, clip=(1.0, 4.0), without_advantage=True)}

    def objective(self, micro):
        gap = (self.start_logprobs(micro, with_policy=True)[0] - micro.logp.detach()) * micro.mask  # (b,R)
        A = weights(gap, self.config.early) * gap
        return self.loss.function(micro.logp, micro.logp_old, A, micro.mask, self.clip)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
