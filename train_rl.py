"""Stage 3, RL with PolicyRollout: sample, judge, learn, report.

    J = 1/(G+K) sum_i { min[r_i A_i, clip(r_i, 1 - low, 1 + high) A_i] - beta KL(pi || pi_ref) }
    r_i = pi(o_i|x) / pi_old(o_i|x)

o_1 .. o_G come from pi_old(.|x), o_G+1 .. o_G+K from pi_old(.|P, x); all are one group, and the loss reads all of them
given x alone, so that what the policy in the prompt made likely becomes likely without it. K = 0 is plain GRPO.

    python train_rl.py --model M --init runs/sft --data data/clevr --out runs/rl --group-size 5 --policy-rollouts 5
    torchrun --nproc_per_node 8 train_rl.py ...           the same gradients on any number of ranks

A loss of your own is one more entry of LOSSES; another method is a file in variants/ that overrides Learner.credit
(what a response is worth), Learner.objective (a token's loss) or PolicyRollout.policy_prompt (what the others see).

Three log-probabilities of a response, everywhere: `logp` of the model now, `logp_old` of the model before the step's
updates, both given x alone, and `logp_sampler` of whoever sampled it, given what it saw. Axes: model.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from data import InputError, command, judge
from data.dataset import load_items, load_policies
from kernels.advantage import group_advantage
from rollout import PolicyRollout, Sampler, Sampling
from support.batching import whole_batches
from support.config import VALIDATION_ITEMS, CommonConfig, Judge, option, parse, redefault, refuse
from support.judging import Judging, complaint, load_environment, load_rewards
from support.metrics import Reporter, Reporting, Tally
from train_sft import Replay
from training import Run

# -- 1. losses: pure functions of (b,R) tensors, one value per token ---------------------------------------------------
# logp, logp_old: see above; A: advantage (b,1) or (b,R); mask: 1 where a response has a token; clip: (low, high)


def token_ratio(logp, logp_old, mask=None):
    """r of each token, (b,R), from log r within +-20: e^89 would be infinite, and 0 times infinity a NaN gradient."""
    return (logp - logp_old).clamp(-20, 20).exp()


def sequence_ratio(logp, logp_old, mask):
    """GSPO's one ratio per sequence, (b,1): exp of the mean log-ratio."""
    return token_ratio(((logp - logp_old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1), 0)


def surrogate(ratio, A, clip):
    """-min(r A, clip(r, 1 - low, 1 + high) A)."""
    return -torch.minimum(ratio * A, ratio.clamp(1 - clip[0], 1 + clip[1]) * A)


def clipped(logp, logp_old, A, mask, clip):
    """The surrogate of each token: GRPO, Dr.GRPO, DAPO and BNPO, which differ in what they divide by."""
    return surrogate(token_ratio(logp, logp_old), A, clip)


def gspo(logp, logp_old, A, mask, clip):
    """The surrogate of each sequence."""
    return surrogate(sequence_ratio(logp, logp_old, mask), A, clip).expand_as(logp)


def sapo(logp, logp_old, A, mask, clip):
    """-A sigmoid(tau (r - 1)) 4 / tau: a soft gate in place of the clip, tau 1.0 for A > 0, else 1.05."""
    tau = torch.where(A > 0, 1.0, 1.05)
    return -A * torch.sigmoid(tau * (token_ratio(logp, logp_old) - 1)) * 4 / tau


def cispo(logp, logp_old, A, mask, clip):
    """-stopgrad(clip(r)) A logp: the ratio is only a weight, so that every token keeps its gradient."""
    return -token_ratio(logp, logp_old).clamp(1 - clip[0], 1 + clip[1]).detach() * A * logp


class Loss(NamedTuple):
    function: callable
    over: str = "sequences"  # mean over sequences (of token means) | tokens of the step | tokens of the update | length
    advantage: str = "grpo"  # grpo | dr_grpo: divided by the group's deviation, or not
    clip: tuple = (0.2, 0.2)
    ratio: callable = token_ratio  # what the clip bounds, for the log; None: nothing is clipped
    beta: float = 0.0  # of the KL to the start model
    tries: int = 0  # dynamic sampling: batches drawn at most; 0: off
    without_advantage: bool = False  # has a response whose advantage is 0 a gradient of its own? (with beta it has one)


LOSSES = {
    "grpo": Loss(clipped, clip=(0.2, 0.3), beta=0.01),
    "dr_grpo": Loss(clipped, "length", "dr_grpo"),
    "dapo": Loss(clipped, "tokens of the step", clip=(0.2, 0.28), tries=20),
    "bnpo": Loss(clipped, "tokens of the update"),
    "gspo": Loss(gspo, clip=(3e-4, 4e-4), ratio=sequence_ratio),
    "sapo": Loss(sapo, ratio=None),
    "cispo": Loss(cispo, "tokens of the step", clip=(1.0, 4.0)),
}


def k3(d):
    """exp(d) - d - 1 of d = log pi_ref - log pi, at most 10 as in verl: an estimate of KL(pi || pi_ref), at least 0.

    On responses drawn from pi(. | P, x) it estimates no KL, though it still keeps pi near pi_ref where they lead.
    """
    d = d.clamp(-20, 20)
    return (d.exp() - d - 1).clamp(max=10)


def token_weights(over, mask, counts, length):
    """What each token counts in the loss, (B,R); counts: sequences and tokens over all ranks and micro-batches."""
    if over == "sequences":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(counts[over], 1)
    return mask / max(counts["sequences"] * length if over == "length" else counts[over], 1)


def overlong_penalty(length, most, buffer):
    """DAPO's soft penalty: 0 up to most - buffer tokens, then falling to -1 at most (0 without a buffer)."""
    return 0.0 if not buffer else -min(max(length - (most - buffer), 0) / buffer, 1.0)


# -- 2. options (the rest of them: support/config.py) ------------------------------------------------------------------


@dataclass
class Method:
    """the method"""

    algorithm: str = option("grpo", "what is optimised", choices=tuple(LOSSES))
    group_size: int = option(5, "G, responses per query sampled without the policy", least=0, most=4096)
    policy_rollouts: int = option(5, "K, more with the policy in the prompt; the paper: K = G", least=0, most=4096)
    frozen_sampler: str = option(
        "",
        "who samples those K; start: the model before this run; base: --model; empty: the model itself",
        choices=("", "start", "base"),
    )
    clip_low: float | None = option(None, "the ratio is clipped below 1 - this; none: the algorithm's own", least=0)
    clip_high: float | None = option(None, "the ratio is clipped above 1 + this; none: the algorithm's own", least=0)
    beta: float | None = option(None, "weight of the KL to the start model; none: the algorithm's own", least=0)
    inner_epochs: int = option(1, "passes over each step's responses", least=1)
    mini_batch: int = option(
        128, "queries per update, over all ranks, and per draw of dynamic sampling; 0: all of the step", least=0
    )
    dynamic_tries: int | None = option(None, "dynamic sampling: draws at most; none: the algorithm's own", least=0)


@dataclass
class Config(Method, Sampling, Judging, Judge, Reporting, CommonConfig):
    """RL"""

    split: str = redefault(CommonConfig, "split", "rl.jsonl")
    lr: float = redefault(CommonConfig, "lr", 1e-6)
    batch_size: int = option(384, "queries per step, over all ranks", least=1, most=1 << 20)
    epochs: float = redefault(CommonConfig, "epochs", 2.0)


# -- 3. learn ----------------------------------------------------------------------------------------------------------


class Learner:
    """The updates of a step: inner epochs of mini-batches, whose gradients are sums over micro-batches and ranks.

    start: gives a context with the start model, which is pi_ref given x. rewards: [(name, function, weight)].
    replay: train_sft.Replay or None. A variant overrides `credit` or `objective`.
    """

    losses = LOSSES
    needs_start = False  # does a variant's objective read the start model, even without beta?
    needs_policy_prompts = False  # does it read (P, x), even without K?
    smallest_group = 2  # responses per query

    @classmethod
    def check(cls, config):
        """Refuse options that cannot learn anything together; a variant adds its own."""
        G, K = config.group_size, config.policy_rollouts
        refuse(G + K < cls.smallest_group, f"groups of {G} + {K} responses", f"{cls.smallest_group} at least")
        refuse(config.frozen_sampler and not K, "--frozen-sampler", "--policy-rollouts above 0 for it to write")

    def __init__(self, config, run, model, start, optimizer, rewards, replay, pad_id):
        self.config, self.run, self.model, self.start, self.optimizer = config, run, model, start, optimizer
        self.rewards, self.replay, self.pad_id = rewards, replay, pad_id
        self.loss = self.losses[config.algorithm]
        own = lambda option, default: default if option is None else option
        self.clip = own(config.clip_low, self.loss.clip[0]), own(config.clip_high, self.loss.clip[1])
        self.beta = own(config.beta, self.loss.beta)

    def credit(self, data, progress):
        """What each response is worth -> rewards (B,), advantages (B,), and which ones are learned from, bool (B,).

        All G + K responses to a query are one group. progress: share of the run that is done.
        """
        penalty = [overlong_penalty(n, self.config.max_response, self.config.overlong) for n in data.lengths.tolist()]
        weights = torch.tensor([weight for _, _, weight in self.rewards], dtype=torch.float64)
        rewards = data.rewards @ weights + torch.tensor(penalty, dtype=torch.float64)  # NaN where a function failed
        return rewards.nan_to_num(), group_advantage(rewards, data.ids, self.loss.advantage), ~rewards.isnan()

    def objective(self, micro):
        """The loss of each token, (b,R), of a MicroBatch, without the KL to the start model."""
        return self.loss.function(micro.logp, micro.logp_old, micro.A, micro.mask, self.clip)

    def ratio(self, micro):
        """What the clip bounds, (b,R), for the log alone: NaN where nothing is clipped."""
        nothing = torch.full_like(micro.mask, torch.nan)
        ratio = self.loss.ratio
        return nothing if ratio is None else ratio(micro.logp, micro.logp_old, micro.mask).expand_as(nothing)

    def __call__(self, data, step, steps):
        """Learn from a step's Responses that have been given credit -> Tally of this rank."""
        config, run, tally = self.config, self.run, Tally()
        whole = run.sum(int(data.lengths[data.kept].sum()))
        updates = -(-config.batch_size // (config.mini_batch or config.batch_size))
        if config.inner_epochs * updates > 1:
            data.logp_old, _ = self.logprobs(data, self.live(data))
        for number in [*range(updates)] * config.inner_epochs:
            chosen = data.kept & (data.places[data.ids] % updates == number)  # (B,)
            self.add_gradients(data, chosen, whole / updates, tally)
            if self.replay:
                self.replay(self.model, step, number, updates)
            run.reduce_gradients(self.model)
            tally.updated(run.update(self.model, self.optimizer, step, steps), run.world)
        return tally

    def live(self, data):
        """Which responses have a gradient at all, bool (B,)."""
        without_advantage = bool(self.beta) or self.loss.without_advantage
        return data.kept & ((data.A != 0) | without_advantage)

    def add_gradients(self, data, chosen, step_tokens, tally):
        """Add those of one update, from the responses `chosen` (B,); step_tokens: per update of the step, all ranks."""
        sequences, tokens = self.run.sum([int(chosen.sum()), int(data.lengths[chosen].sum())])
        counts = {"sequences": sequences, "tokens of the step": step_tokens, "tokens of the update": tokens}
        weights = token_weights(self.loss.over, data.mask, counts, self.config.max_response)  # (B,R)
        for rows in data.micro_batches(self.run, self.model, chosen & self.live(data), self.needs_policy_prompts):
            micro = data.take(rows)
            with self.run.autocast():
                micro.logp, micro.entropy, micro.hidden = micro.read(self.model, self.config.temperature, self.pad_id)
            if micro.logp_old is None:
                micro.logp_old = micro.logp.detach()  # the only update: on-policy
            loss = self.objective(micro)  # (b,R)
            if self.beta:
                micro.kl = k3(self.start_logprobs(micro)[0] - micro.logp)
                loss = loss + self.beta * micro.kl
            loss = (weights[rows] * loss).sum()
            loss.backward()
            tally.learned(loss, micro, self.ratio(micro), self.clip)

    def start_logprobs(self, micro, with_policy=False):
        """The start model's log-probabilities (b,R) given x or (P, x), hidden states (L,D), output weights (V,D)."""
        with torch.no_grad(), self.start() as start, self.run.autocast():
            logp, _, hidden = micro.read(start, self.config.temperature, self.pad_id, with_policy)
            return logp, hidden, start.head_weight

    @torch.no_grad()
    def logprobs(self, data, which):
        """log pi (B,R) of the responses marked in `which` (B,), as the model is now, and entropies (B,R)."""
        logp, entropy = torch.zeros_like(data.mask), torch.zeros_like(data.mask)
        for rows in data.micro_batches(self.run, self.model, which):
            with self.run.autocast():
                read = data.take(rows).read(self.model, self.config.temperature, self.pad_id)
            logp[rows], entropy[rows], _ = read
        return logp, entropy


# -- 4. train ----------------------------------------------------------------------------------------------------------


def train(config, Learner=Learner, PolicyRollout=PolicyRollout):
    Learner.check(config)
    with Run(config, stage="rl") as run:
        policies = load_policies(config.data, config.media)
        loss = Learner.losses[config.algorithm]
        rewards = load_rewards(config.reward, config.reward_seconds, judge.of(config, policies))
        model, processor = run.load()
        sections = {name: [node["id"] for node in policy["nodes"]] for name, policy in policies.items()}  # for PA3
        loaded = load_items(config.data, config.split, policies, config.media)
        items = [{**item, "sections": sections.get(item["policy"], [])} for item in loaded]
        held_out = load_items(config.data, config.validation, policies, config.media) if config.validate_every else []

        beta = loss.beta if config.beta is None else config.beta
        start, frozen = run.frozen_models(model, beta or Learner.needs_start, config.frozen_sampler)
        kinds = dict(sampler=frozen, keep_policy_prompts=Learner.needs_policy_prompts, options=config)
        kinds["environment"] = load_environment(config.environment, config.reward_seconds)
        limits = dict(max_prompt=config.max_prompt, max_tokens=config.max_response, budget=config.budget)
        G, K = config.group_size, config.policy_rollouts
        rollout = PolicyRollout(processor, policies, G, K, temperature=config.temperature, **kinds, **limits)
        replay = Replay(config, run, processor) if config.replay else None
        run.examine(processor, config.data, {config.split: items, config.validation: held_out}, policies, K and "both")
        learner = Learner(config, run, model, start, run.optimizer(model), rewards, replay, processor.pad_id)
        tries = loss.tries if config.dynamic_tries is None else config.dynamic_tries
        sampler = Sampler(config, run, model, rollout, items, rewards, tries)
        report = Reporter(config, run, model, rollout, held_out[:VALIDATION_ITEMS], rewards, learner.logprobs)

        steps = run.total_steps(whole_batches(len(items), config.batch_size))
        for step in run.steps(model, learner.optimizer, steps):
            if step == 0:
                report.does_the_policy_help(items)

            data, cursor = sampler(run.extra.get("cursor", 0))  # sample, judge
            if sampler.too_many_failed:
                run.checkpoints.save(step, model, learner.optimizer, {"cursor": cursor})
                raise InputError(f"step {step}: {sampler.complaint()}; saved, --resume continues")
            if data is None:
                report.say(f"rl: ends at step {step}: {sampler.complaint()}")
                break

            rewards_total, data.A, data.kept = learner.credit(data, step / steps)  # (B,) each
            with run.phase("learn"):
                tally = learner(data, step, steps)
            report(step, data, rewards_total, tally, sampler.drawn)
            run.extra = {"cursor": cursor}
            run.checkpoint(step + 1, model, learner.optimizer, run.extra)
        if failures := complaint():
            report.say(f"rl: rewards that failed: {failures}")
        run.finish(model)


def main(argv=None, doc=__doc__, Config=Config, **variant):
    """variant: Learner=, PolicyRollout= of a file in variants/."""
    train(parse(Config, doc, argv), **variant)


if __name__ == "__main__":
    command(main)
