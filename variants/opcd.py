"""OPCD, on-policy context distillation: no reward; the start model with P in its prompt teaches the model without it.

    A_t = log pi_start(o_t|P,x) - log pi(o_t|x),    loss -stopgrad(clip(r)) A_t log pi,    o ~ pi(.|x)

or, with --top-tokens C, KL(pi || pi_start(.|P,x)) over the C likeliest tokens of pi and all others as one more. K = 0:
everything is sampled without the policy. Source: arXiv 2306.13649, with a teacher that sees the context.

    python variants/opcd.py --model M --init runs/sft --data data/clevr --out runs/opcd --group-size 8
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_rl
from data import command
from kernels.logprob import linear_logprob
from support.config import option, redefault
from support.sharding import gathered
from train_rl import Loss, cispo


@dataclass
class Config(train_rl.Config):
    """the variant"""

    top_tokens: int = option(0, "KL over this many likeliest tokens; 0: log-ratio of the sampled token", least=0)
    algorithm: str = option("opcd", "what is optimised", choices=("opcd",))
    policy_rollouts: int = redefault(train_rl.Config, "policy_rollouts", 0)


class Learner(train_rl.Learner):
    losses = {"opcd": Loss(cispo, clip=(1.0, 4.0), ratio=None, without_advantage=True)}
    needs_start = needs_policy_prompts = True
    smallest_group = 1

    def credit(self, data, progress):
        rewards, A, kept = super().credit(data, progress)
        return rewards, torch.zeros_like(A), torch.ones_like(kept)  # the teacher alone says what a token is worth

    def objective(self, micro):
        logp_teacher, hidden, W = self.start_logprobs(micro, with_policy=True)  # (b,R), (L,D), (V,D)
        if self.config.top_tokens:
            how = self.config.top_tokens, self.config.temperature, self.model.vocabulary
            return micro.spread(tokens_kl(micro.hidden, self.model.head_weight, hidden, W, *how))
        A = (logp_teacher - micro.logp.detach()) * micro.mask  # (b,R)
        return self.loss.function(micro.logp, micro.logp_old, A, micro.mask, self.clip)


def tokens_kl(h, W, h_teacher, W_teacher, count, temperature, vocabulary=None):
    """KL(pi || teacher) at each position over the `count` likeliest tokens of pi and the rest as one, (L,), in fp32.
    h, h_teacher: hidden states (L,D); W, W_teacher: output weights (V,D), of which `vocabulary` are tokens (None: all).
    """
    h, h_teacher = h.float(), h_teacher.float()
    W, W_teacher = (gathered(weight)[:vocabulary].float() for weight in (W, W_teacher))
    with torch.no_grad():
        tokens = torch.cat([(rows @ W.T).topk(min(count, len(W))).indices for rows in h.split(256)])  # (L,count)

    def log_probs(h, W):  # one token's log-probability gives the normaliser of all
        logits = torch.einsum("ld,lcd->lc", h, W[tokens]) / temperature
        likeliest, _ = linear_logprob(h, W, tokens[:, 0], temperature=temperature)
        logp = logits - logits[:, :1] + likeliest[:, None]
        rest = (1 - logp.exp().sum(1, keepdim=True)).clamp(min=1e-7).log()  # (L,1)
        return torch.cat([logp, rest], 1).log_softmax(-1)  # rounding aside it is one already

    with torch.autocast(h.device.type, enabled=False):
        log_p, log_q = log_probs(h, W), log_probs(h_teacher, W_teacher)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def main(argv=None):
    train_rl.main(argv, __doc__, Config, Learner=Learner)


if __name__ == "__main__":
    command(main)
