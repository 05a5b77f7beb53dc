"""Stage 3, RL with PolicyRollout: sample, judge, learn, report.

    J = 1/(G+K) sum_i { min[r_i A_i, clip(r_i, 1 - low, 1 + high) A_i] - beta KL(pi || pi_ref) }
    r_i = pi(o_i|x) / pi_old(o_i|x)

o_1 .. o_G come from pi_old(.|x), o_G+1 .. o_G+K from pi_old(.|P, x); all are one group, and the loss reads all of them
given x alone, so that what the policy in the prompt made likely becomes likely without it. K = 0 is plain GRPO.

    python train_rl.py --model M --init runs/sft --data data/clevr --out runs/rl --group-size 5 --policy-rollouts 5
    torchrun --nproc_per_node 8 train_rl.py ...           the same gradients on any number of ranks

The loop is `train`, at the end. A loss of your own is one more entry of LOSSES; another method is a file in variants/
that overrides Learner.credit (what a response is worth), Learner.objective (the loss of a token) or
PolicyRollout.policy_prompt (what the other half sees). Axes: model.py.

Three log-probabilities of a response, everywhere: `logp` of the model now, `logp_old` of the model before the step's
updates, both given x alone, and `logp_sampler` of whoever sampled it, given what it saw.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

import model as qwen
from data import InputError, command, judge
from data.dataset import load_items, load_policies
from data.rewards import load
from kernels.advantage import group_advantage
from rollout import PolicyRollout, Sampler
from support.config import CommonConfig, Judge, option, parse, redefault
from support.metrics import Reporter, Reporting, Tally
from train_sft import Replay
from training import Run

# -- 1. losses: pure functions of (b,R) tensors, one value per token ---------------------------------------------------
# logp, logp_old: see above; A: advantage (b,1) or (b,R); mask: 1 where a response has a token; clip: (low, high)


def clipped(logp, logp_old, A, mask, clip):
    """-min(r A, clip(r, 1 - low, 1 + high) A): GRPO, Dr.GRPO, DAPO and BNPO, which differ in what they divide by."""
    ratio = (logp - logp_old).exp()
    return -torch.minimum(ratio * A, ratio.clamp(1 - clip[0], 1 + clip[1]) * A)


def gspo(logp, logp_old, A, mask, clip):
    """The same with one ratio per sequence, exp of the mean log-ratio."""
    log_ratio = ((logp - logp_old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (b,1)
    return clipped(log_ratio, torch.zeros_like(log_ratio), A, mask, clip).expand_as(logp)


def sapo(logp, logp_old, A, mask, clip):
    """-A sigmoid(tau (r - 1)) 4 / tau: a soft gate in place of the clip, tau 1.0 for A > 0, else 1.05."""
    tau = torch.where(A > 0, 1.0, 1.05)
    return -A * torch.sigmoid(tau * ((logp - logp_old).exp() - 1)) * 4 / tau


def cispo(logp, logp_old, A, mask, clip):
    """-stopgrad(clip(r)) A logp: the ratio is only a weight, so that every token keeps its gradient."""
    return -(logp - logp_old).exp().clamp(1 - clip[0], 1 + clip[1]).detach() * A * logp


class Loss(NamedTuple):
    function: callable
    over: str = "sequences"  # mean over sequences (of token means) | tokens of the step | tokens of the update | length
    advantage: str = "grpo"  # grpo | dr_grpo: divided by the group's deviation, or not
    clip: tuple = (0.2, 0.2)
    beta: float = 0.0  # of the KL to the start model
    tries: int = 0  # dynamic sampling: batches drawn at most; 0: off
    without_advantage: bool = False  # has a response whose advantage is 0 a gradient of its own? (with beta it has one)


LOSSES = {
    "grpo": Loss(clipped, clip=(0.2, 0.3), beta=0.01),
    "dr_grpo": Loss(clipped, "length", "dr_grpo"),
    "dapo": Loss(clipped, "tokens of the step", clip=(0.2, 0.28), tries=20),
    "bnpo": Loss(clipped, "tokens of the update"),
    "gspo": Loss(gspo, clip=(3e-4, 4e-4)),
    "sapo": Loss(sapo),
    "cispo": Loss(cispo, "tokens of the step", clip=(1.0, 4.0)),
}


def k3(log_ratio):
    """exp(d) - d - 1 of d = log pi_ref - log pi: an estimate of KL(pi || pi_ref) that is never negative."""
    return log_ratio.exp() - log_ratio - 1


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
    group_size: int = option(5, "G, responses per query sampled without the policy", least=0)
    policy_rollouts: int = option(5, "K, further ones sampled with the policy in the prompt; the paper: K = G", least=0)
    frozen_sampler: str = option(
        "",
        "who samples those K; start: the model before this run; base: --model; empty: the model itself",
        choices=("", "start", "base"),
    )
    clip_low: float | None = option(None, "the ratio is clipped below 1 - this; none: the algorithm's own", least=0)
    clip_high: float | None = option(None, "the ratio is clipped above 1 + this; none: the algorithm's own", least=0)
    beta: float | None = option(None, "weight of the KL to the start model; none: the algorithm's own", least=0)
    inner_epochs: int = option(1, "passes over each step's responses", least=1)
    mini_batch: int = option(0, "queries per update, over all ranks; 0: all of the step", least=0)
    dynamic_tries: int | None = option(None, "dynamic sampling: batches drawn at most; none: the algorithm's own")


@dataclass
class Sampling:
    """sampling"""

    temperature: float = option(1.0, "of sampling, and of the log-probabilities in the loss", least=0.01)
    min_response: int = option(0, "tokens before a response may end", least=0)
    budget: int = option(
        0, "tokens of prompts and responses that sampling holds at a time; 0: what memory allows", least=0
    )


@dataclass
class Judging:
    """judging"""

    reward: str = option("accuracy=0.9,format=0.1", "names of data.rewards or module:function, with weights")
    reward_seconds: float = option(5.0, "seconds after which a reward function is given up", above=0)
    max_failed: float = option(0.5, "share of rewards that may raise, hang or be NaN", least=0, most=1)
    overlong: int = option(0, "tokens before --max-response over which the reward falls by 1; 0: none", least=0)


@dataclass
class Config(Method, Sampling, Judging, Judge, Reporting, CommonConfig):
    """RL"""

    split: str = redefault(CommonConfig, "split", "rl.jsonl")
    lr: float = redefault(CommonConfig, "lr", 1e-6)
    batch_size: int = option(384, "queries per step, over all ranks", least=1)
    micro_batch: int = option(4, "responses per forward pass of learning; fewer need less memory", least=1)
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

    def __call__(self, data, step, steps):
        """Learn from a step's Responses that have been given credit -> (mean gradient norm, Tally of this rank)."""
        config, run = self.config, self.run
        whole = run.sum(int(data.lengths[data.kept].sum()))
        updates = -(-config.batch_size // (config.mini_batch or config.batch_size))
        if config.inner_epochs * updates > 1:
            data.logp_old = self.logprobs(data, self.live(data))
        tally, norms = Tally(), []
        for number in [*range(updates)] * config.inner_epochs:
            chosen = data.kept & (data.places[data.ids] % updates == number)  # (B,)
            self.add_gradients(data, chosen, whole / updates, tally)
            if self.replay:
                self.replay(self.model, step)
            run.reduce_gradients(self.model)
            norms.append(run.update(self.model, self.optimizer, step, steps))
        return sum(norms) / len(norms), tally

    def live(self, data):
        """Which responses have a gradient at all, bool (B,)."""
        without_advantage = bool(self.beta) or self.loss.without_advantage
        return data.kept & ((data.A != 0) | without_advantage)

    def add_gradients(self, data, chosen, step_tokens, tally):
        """Add those of one update, from the responses `chosen` (B,); step_tokens: per update of the step, all ranks."""
        sequences, tokens = self.run.sum([int(chosen.sum()), int(data.lengths[chosen].sum())])
        counts = {"sequences": sequences, "tokens of the step": step_tokens, "tokens of the update": tokens}
        weights = token_weights(self.loss.over, data.mask, counts, self.config.max_response)  # (B,R)
        rows = (chosen & self.live(data)).nonzero()[:, 0].tolist()
        for rows, here in self.run.micro_batches(rows, spare=[0] if len(data.list) else []):
            micro = data.take(rows)
            with self.run.autocast():
                micro.logp, micro.entropy, micro.hidden = micro.read(self.model, self.config.temperature, self.pad_id)
            if micro.logp_old is None:
                micro.logp_old = micro.logp.detach()  # the only update: on-policy
            loss = self.objective(micro)  # (b,R)
            if self.beta:
                micro.kl = k3(self.start_logprobs(micro)[0] - micro.logp)
                loss = loss + self.beta * micro.kl
            loss = (here * weights[rows] * loss).sum()
            loss.backward()
            tally.add(loss, micro, here, self.clip)

    def start_logprobs(self, micro, with_policy=False):
        """The start model's log-probabilities (b,R) given x or (P, x), hidden states (L,D), output weights (V,D)."""
        with torch.no_grad(), self.start() as start, self.run.autocast():
            logp, _, hidden = micro.read(start, self.config.temperature, self.pad_id, with_policy)
            return logp, hidden, start.head_weight

    @torch.no_grad()
    def logprobs(self, data, which):
        """log pi (B,R) of the responses marked in `which` (B,), as the model is now."""
        logp = torch.zeros_like(data.mask)
        for rows, _ in self.run.micro_batches(which.nonzero()[:, 0].tolist(), spare=[0] if len(data.list) else []):
            with self.run.autocast():
                logp[rows] = data.take(rows).read(self.model, self.config.temperature, self.pad_id)[0]
        return logp


# -- 4. train ----------------------------------------------------------------------------------------------------------


def frozen_models(config, run, model, needs_start):
    """-> (context with the start model, as reference or teacher; who samples the other half, None: the model itself).

    Where only LoRA is trained, on a base of its own, the start model is the model with its adapter switched off.
    """
    samples = config.frozen_sampler == "start"
    own = samples or needs_start and (config.full or run.adapter)
    start = run.load("start")[0] if own else None
    sampler = start if samples else run.load("base")[0] if config.frozen_sampler else None
    return lambda: nullcontext(start) if start else qwen.adapter_off(model), sampler


def train(config, Learner=Learner, PolicyRollout=PolicyRollout):
    if config.group_size + config.policy_rollouts < Learner.smallest_group:
        found = f"{config.group_size} + {config.policy_rollouts} responses per query"
        raise InputError(f"found {found}, expected a group of {Learner.smallest_group} at least")
    with Run(config, stage="rl") as run:
        policies = load_policies(config.data, config.media)
        loss, rewards = Learner.losses[config.algorithm], load(config.reward, judge.of(config, policies))
        model, processor = run.load()
        sections = {name: [node["id"] for node in policy["nodes"]] for name, policy in policies.items()}  # for PA3
        items = load_items(config.data, config.split, policies, config.media)
        items = [{**item, "sections": sections.get(item["policy"], [])} for item in items]
        held_out = load_items(config.data, config.validation, policies, config.media) if config.validate_every else []

        beta = loss.beta if config.beta is None else config.beta
        start, frozen = frozen_models(config, run, model, beta or Learner.needs_start)
        kinds = dict(sampler=frozen, keep_policy_prompts=Learner.needs_policy_prompts, options=config)
        limits = dict(max_prompt=config.max_prompt, max_tokens=config.max_response, min_tokens=config.min_response)
        drawn = dict(temperature=config.temperature, budget=config.budget)
        G, K = config.group_size, config.policy_rollouts
        rollout = PolicyRollout(processor, policies, G, K, **kinds, **limits, **drawn)
        replay = Replay(config, run, processor) if config.replay else None
        run.examine(processor, config.data, {config.split: items, config.validation: held_out}, policies, K and "both")
        learner = Learner(config, run, model, start, run.optimizer(model), rewards, replay, processor.pad_id)
        tries = loss.tries if config.dynamic_tries is None else config.dynamic_tries
        sampler = Sampler(config, run, model, rollout, items, rewards, tries)
        report = Reporter(config, run, model, rollout, held_out[: config.validate_items], rewards)

        steps = run.total_steps(len(items), config.batch_size)
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
                grad_norm, tally = learner(data, step, steps)
            report(step, data, rewards_total, tally, grad_norm, sampler.failed / sampler.judged)
            run.extra = {"cursor": cursor}
            run.checkpoint(step + 1, model, learner.optimizer, run.extra)
        run.finish(model)


def main(argv=None, doc=__doc__, Config=Config, **variant):
    """variant: Learner=, PolicyRollout= of a file in variants/."""
    train(parse(Config, doc, argv), **variant)


if __name__ == "__main__":
    command(main)
