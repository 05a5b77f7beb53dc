"""pi-Distill: the policy-aware responses are learned twice, given x by the student and given (P, x) by the teacher.

    aware rows: a L(pi(o|P,x) / pi_old(o|P,x), A_t) + (1 - a) L(pi(o|x) / pi_old(o|x), A)
                A_t = A - b (log pi_old(o_t|P,x) - log pi_old(o_t|x))

L is the algorithm's own loss. Teacher and student are one model, which so goes on reading policies. Source: arXiv
2602.04942; claim: above SFT + RL on tau-bench. What we saw: row `pidistill` of results/README.md, column `with P`.

    python variants/pidistill.py --model M --init runs/sft --data data/clevr --out runs/pidistill
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

    share: float = option(0.5, "a, the teacher's share in a policy-aware response", least=0, most=1)
    stay: float = option(0.01, "b, what the teacher pays for leaving the student", least=0)


class Learner(train_rl.Learner):
    needs_policy_prompts = True

    def objective(self, micro):
        student, a = super().objective(micro), self.config.share
        with self.run.autocast():  # all rows, so that ranks that shard the weights read as often as one another
            logp, *_ = micro.read(self.model, self.config.temperature, self.pad_id, with_policy=True)  # (b,R)
        A = micro.A - self.config.stay * (micro.logp_sampler - micro.logp_old)
        teacher = self.loss.function(logp, micro.logp_sampler, A, micro.mask, self.clip)
        return torch.where(micro.aware, a * teacher + (1 - a) * student, student)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
