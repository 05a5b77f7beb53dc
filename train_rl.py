"""Stage 3, RL with PolicyRollout: sample, judge, learn, report.

    J = 1/(G+K) sum_i { min[r_i A_i, clip(r_i, 1 - low, 1 + high) A_i] - beta KL(pi || pi_ref) }
    r_i = pi(o_i|x) / pi_old(o_i|x)

o_1 .. o_G come from pi_old(.|x), o_G+1 .. o_G+K from pi_old(.|P, x); all are one group, and the loss reads all of them
behind x alone, so that what the policy in the prompt made likely becomes likely without it. K = 0 is plain GRPO.

    python train_rl.py --model M --init runs/sft --data data/clevr --out runs/rl --group-size 5 --policy-rollouts 5
    torchrun --nproc_per_node 8 train_rl.py ...           the same gradients on any number of ranks

The loop is `train`, at the end. A loss of your own is one more function in LOSSES (tests/fork has one in 12 lines).
Groups are sampled by rollout.py, judged and laid out as tensors by support/groups.py; support/metrics.py reports.

Axes: N responses, n of a micro-batch, R their tokens, M tokens in a line, F rewards, D width, V vocab; x the query
with its pictures, P the policy.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from data import InputError, command
from data.dataset import load_items, load_policies
from data.rewards import load
from kernels.advantage import group_advantage
from rollout import PolicyRollout
from support.batching import words_kl
from support.config import CommonConfig, option, parse, redefault
from support.groups import Replay, Sampler, start_models
from support.metrics import Reporter, Tally
from training import Run

# -- 1. losses: pure functions of (N,R) tensors, one value a token -----------------------------------------------------
# logp, old: log-probabilities now and when the responses were sampled, both behind x alone; A: advantage (N,1) or
# (N,R); mask: 1 where a response has a token; clip: (low, high)


def clipped(logp, old, A, mask, clip):
    """-min(r A, clip(r, 1 - low, 1 + high) A): GRPO, Dr.GRPO, DAPO and BNPO, which differ in what they divide by."""
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * A, ratio.clamp(1 - clip[0], 1 + clip[1]) * A)


def gspo(logp, old, A, mask, clip):
    """The same with one ratio a sequence, exp of the mean log-ratio."""
    log_ratio = ((logp - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (N,1)
    return clipped(log_ratio, torch.zeros_like(log_ratio), A, mask, clip).expand_as(logp)


def sapo(logp, old, A, mask, clip):
    """-A sigmoid(tau (r - 1)) 4 / tau: a soft gate in place of the clip, tau 1.0 for A > 0, else 1.05."""
    tau = torch.where(A > 0, 1.0, 1.05)
    return -A * torch.sigmoid(tau * ((logp - old).exp() - 1)) * 4 / tau


def cispo(logp, old, A, mask, clip):
    """-stopgrad(clip(r)) A logp: the ratio only weighs, so that every token keeps its gradient."""
    return -(logp - old).exp().clamp(1 - clip[0], 1 + clip[1]).detach() * A * logp


def shaped(logp, old, A, mask, clip):
    """-r / (r + 0.01) A: what the model finds unlikely without the policy pulls most (ICPO)."""
    ratio = (logp - old).exp()
    return -ratio / (ratio + 0.01) * A


class Loss(NamedTuple):
    function: callable
    over: str = "sequences"  # mean over sequences (of token means) | tokens of the step | tokens of the update | length
    advantage: str = "grpo"  # grpo | dr_grpo | gdpo | opcd
    clip: tuple = (0.2, 0.2)
    beta: float = 0.0  # of the KL to the start model


LOSSES = {
    "grpo": Loss(clipped, clip=(0.2, 0.3), beta=0.01),
    "dr_grpo": Loss(clipped, "length", "dr_grpo"),
    "dapo": Loss(clipped, "tokens of the step", clip=(0.2, 0.28)),
    "bnpo": Loss(clipped, "tokens of the update"),
    "gspo": Loss(gspo, clip=(3e-4, 4e-4)),
    "sapo": Loss(sapo),
    "cispo": Loss(cispo, "tokens of the step", clip=(1.0, 4.0)),
    "gdpo": Loss(clipped, advantage="gdpo"),
    "bapo": Loss(clipped, "tokens of the step"),  # its clip is found anew for each update
    "opcd": Loss(cispo, advantage="opcd", clip=(1.0, 4.0)),  # no reward: the start model with P in its prompt teaches
}
AWARE = {"same": None, "truncated": cispo, "shaped": shaped}  # the last two against the true sampler pi_old(o|P,x)
KLS = {"k1": lambda d: -d, "k2": lambda d: d**2 / 2, "k3": lambda d: d.exp() - d - 1}  # of d = log pi_ref - log pi


def token_weights(over, mask, counts, length):
    """What each token counts in the loss, (N,R); counts: sequences and tokens over all ranks and micro-batches."""
    if over == "sequences":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(counts[over], 1)
    return mask / max(counts["sequences"] * length if over == "length" else counts[over], 1)


def bapo_clip(run, logp, old, A, mask, target=0.45):
    """BAPO: widen the clip, first above, then below, until positive advantages make `target` of the objective's sum."""
    bounds = [(0.4, 0.2 + 0.05 * i) for i in range(17)] + [(0.4 - 0.05 * i, 1.0) for i in range(1, 5)]
    terms = [(clipped(logp, old, A, mask, clip).abs() * mask) for clip in bounds]
    sums = run.sum([float((t * (A > 0)).sum()) for t in terms] + [float(t.sum()) for t in terms])
    shares = [positive / max(whole, 1e-12) for positive, whole in zip(sums, sums[len(bounds) :])]
    return next((clip for clip, share in zip(bounds, shares) if share >= target), bounds[-1])


# -- 2. options (the rest of them: config.CommonConfig) ----------------------------------------------------------------


@dataclass
class Config(CommonConfig):
    split: str = redefault(CommonConfig, "split", "rl.jsonl")
    lr: float = redefault(CommonConfig, "lr", 1e-6)
    batch_size: int = option(384, "queries a step, over all ranks", least=1)
    micro_batch: int = option(4, "responses a forward pass of learning; fewer need less memory, same results", least=1)
    epochs: float = redefault(CommonConfig, "epochs", 2.0)
    replay_weight: float = option(1.0, "weight of the supervised loss on --replay's items in each step", least=0)

    algorithm: str = option("grpo", "what is optimised", choices=tuple(LOSSES))
    group_size: int = option(5, "G, responses a query, sampled without the policy", least=0)
    policy_rollouts: int = option(
        5, "K, responses a query besides, sampled with the policy in the prompt; 0: none; the paper: K = G", least=0
    )
    temperature: float = option(1.0, "of sampling, and of the log-probabilities in the loss", above=0)
    min_response: int = option(0, "words before a response may end", least=0)
    budget: int = option(1 << 17, "tokens of prompts and responses that sampling holds at a time", least=1)
    reward: str = option(
        "accuracy=0.9,format=0.1",
        "names of data.rewards or module:function, with weights; the first tells right from wrong",
    )
    reward_seconds: float = option(5.0, "after which a reward function is given up", above=0)
    max_failed: float = option(0.5, "share of rewards that may raise, hang or be NaN", least=0, most=1)
    overlong: int = option(0, "tokens before --max-response over which the reward falls to -1; 0: no penalty", least=0)

    clip_low: float = option(-1.0, "the ratio is clipped below 1 - this; -1: the algorithm's own")
    clip_high: float = option(-1.0, "the ratio is clipped above 1 + this; -1: the algorithm's own")
    beta: float = option(-1.0, "weight of the KL to the start model; -1: the algorithm's own")
    kl: str = option("k3", "estimator of that KL", choices=tuple(KLS))
    inner_epochs: int = option(1, "passes over each step's responses", least=1)
    mini_batch: int = option(0, "queries an update, over all ranks; 0: all of the step", least=0)
    importance_cap: float = option(0.0, "cap of a token's weight pi_trainer / pi_sampler; 0: no weight", least=0)
    dynamic_tries: int = option(
        -1,
        "DAPO's dynamic sampling: batches drawn at most for --batch-size groups with right "
        "and wrong ones, else the run ends; 0: off; -1: 20 for dapo",
        least=-1,
    )
    shared_prefix: str = option("auto", "responses share their query's forward pass", choices=("auto", "on", "off"))

    separate_halves: bool = option(False, "group statistics of the standard and the policy-aware responses apart")
    standard_only: bool = option(False, "gradients from the standard responses only")
    aware_loss: str = option(
        "same",
        "loss of policy-aware responses; truncated: against pi_old(o|P,x), capped at 5; "
        "shaped: that ratio as r / (r + 0.01)",
        choices=tuple(AWARE),
    )
    aware_right_only: bool = option(False, "keep policy-aware responses only where they are right")
    aware_bonus: float = option(0.0, "added to the reward of right policy-aware responses, falling to 0", least=0)
    frozen_sampler: str = option(
        "",
        "who samples the policy-aware half; empty: the model itself; start: it as it was "
        "before this run; base: --model without --init, if the stages before wore away its "
        "reading of policies. A frozen one reads each policy once",
        choices=("", "start", "base"),
    )
    noise: float = option(
        0.0,
        "NoisyRollout: instead of the policy the other half sees pictures with noise of this "
        "deviation, in normalised pixels",
        least=0,
    )
    opcd_weight: float = option(0.0, "weight of OPCD's token advantage beside the algorithm's own", least=0)
    opcd_words: int = option(0, "OPCD as a KL over so many likeliest words; 0: log-ratio of the sampled word", least=0)

    check: int = option(64, "queries on which the policy in the prompt is tried before training; 0: none", least=0)
    validation: str = option("test.jsonl", "file of the validation items, inside --data")
    validate_every: int = option(0, "steps between validations without the policy; 0: none", least=0)
    validate_items: int = option(128, "queries a validation, the first so many", least=1)
    samples_every: int = option(10, "steps between whole groups in samples.jsonl; 0: none", least=0)
    tracker: str = option("", "also log to", choices=("", "tensorboard", "wandb"))


# -- 3. judge: rewards and advantages ----------------------------------------------------------------------------------


def overlong_penalty(length, most, buffer):
    """DAPO's soft penalty: 0 up to most - buffer tokens, then falling to -1 at most (0 without a buffer)."""
    return 0.0 if not buffer else -min(max(length - (most - buffer), 0) / buffer, 1.0)


def advantages(kind, parts, weights, ids, run):
    """Advantages (N,) of rewards parts (N,F) with weights (F,) in groups ids (N,); NaN gives 0 and counts nowhere."""
    if kind != "gdpo":
        return group_advantage(parts @ weights, ids, "dr_grpo" if kind == "dr_grpo" else "grpo")
    z = sum(w * group_advantage(part, ids) for part, w in zip(parts.T, weights))  # each reward by its own deviation,
    valid = ~parts.isnan().any(1)
    n, total, squares = run.sum([float(valid.sum()), float(z[valid].sum()), float((z[valid] ** 2).sum())])
    deviation = math.sqrt(max(squares - total**2 / max(n, 1), 0) / max(n - 1, 1))
    return torch.where(valid & (z != 0), (z - total / max(n, 1)) / (deviation + 1e-4), 0)  # then all over the batch


def credit(config, run, data, rewards, progress):
    """What each response is worth -> rewards (N,), advantages (N,), and which responses are learned from, bool (N,).

    rewards: those of --reward, [(name, function, weight)]; progress: share of the run that is done. All G + K responses
    to a query are one group, unless --separate-halves takes their statistics apart.
    """
    aware, right = data.aware, data.rewards[:, 0] >= 1
    penalty = [overlong_penalty(length, config.max_response, config.overlong) for length in data.lengths.tolist()]
    bonus = config.aware_bonus * (1 - progress) * (aware & right)
    parts = torch.column_stack([data.rewards, torch.tensor(penalty, dtype=torch.float64), bonus.double()])  # (N,F+2)
    weights = torch.tensor([*(weight for _, _, weight in rewards), 1.0, 1.0], dtype=torch.float64)
    if config.aware_right_only:
        parts[aware & ~right] = math.nan
    ids = 2 * data.ids + aware if config.separate_halves else data.ids
    A = advantages(LOSSES[config.algorithm].advantage, parts, weights, ids, run)
    kept = ~parts.isnan().any(1) & ~(aware & config.standard_only)
    return parts.nan_to_num() @ weights, A, kept


# -- 4. learn ----------------------------------------------------------------------------------------------------------


class Learner:
    """The updates of a step: inner epochs of mini-batches, whose gradients are sums over micro-batches and ranks.

    start: gives a context with the start model, which is pi_ref behind x, and behind (P, x) OPCD's teacher.
    replay: groups.Replay or None.
    """

    def __init__(self, config, run, model, start, optimizer, replay, pad_id):
        self.config, self.run, self.model, self.start, self.optimizer = config, run, model, start, optimizer
        self.replay, self.pad_id, self.loss = replay, pad_id, LOSSES[config.algorithm]
        own = lambda value, default: default if value == -1 else value
        self.clip = own(config.clip_low, self.loss.clip[0]), own(config.clip_high, self.loss.clip[1])
        self.beta = own(config.beta, self.loss.beta)
        self.opcd = 1.0 if self.loss.advantage == "opcd" else config.opcd_weight

    def __call__(self, data, A, kept, step, steps):
        """Learn from the `kept` responses (N,) with advantages A (N,) -> (mean gradient norm, Tally of this rank)."""
        config, run = self.config, self.run
        if self.loss.advantage == "opcd":  # no reward: the teacher alone gives advantages, to every token
            A, kept = torch.zeros_like(A), torch.ones_like(kept)
        live = kept & ((A != 0) | bool(self.beta or self.opcd or run.fsdp))  # the others have no gradient
        updates = -(-config.batch_size // (config.mini_batch or config.batch_size))
        old = self.logprobs(data, live) if config.inner_epochs * updates > 1 else None  # None: that of the only update
        whole = run.sum(int(data.lengths[kept].sum()))
        tally, norms = Tally(), []
        for update in [*range(updates)] * config.inner_epochs:
            mine = kept & (data.places[data.ids] % updates == update)
            sequences, tokens = run.sum([int(mine.sum()), int(data.lengths[mine].sum())])
            counts = {"sequences": sequences, "tokens of the step": whole / updates, "tokens of the update": tokens}
            weights = token_weights(self.loss.over, data.mask, counts, config.max_response)  # (N,R)
            if config.algorithm == "bapo" and old is not None:
                now, theirs = self.logprobs(data, mine & live), (mine & live)[:, None].to(old)
                self.clip = bapo_clip(run, now, old, A[:, None].to(now), data.mask * theirs)
            for rows, weight in run.micro_batches((mine & live).nonzero()[:, 0].tolist()):
                self.backward(data, rows, A, old, weight * weights, tally)
            if self.replay:
                self.replay(self.model, step)
            run.reduce_gradients(self.model)
            norms.append(run.update(self.model, self.optimizer, step, steps))
        return sum(norms) / len(norms), tally

    def backward(self, data, rows, A, old, weights, tally):
        """Gradients of a micro-batch: the responses `rows`, all of them behind x alone."""
        config, mask, sampled, weights = self.config, data.mask[rows], data.sampled[rows], weights[rows]  # (n,R)
        aware, A = data.aware[rows, None].to(mask.device), A[rows, None].to(mask)  # (n,1)
        logp, entropy, hidden = self.read(self.model, data, rows)  # (n,R), (M,), (M,D)
        before = logp.detach() if old is None else old[rows]
        reference, teacher = self.read_start(data, rows)
        if teacher and not config.opcd_words:
            A = A + self.opcd * (teacher[0] - logp.detach()) * mask  # (n,R)
        loss, kl = self.objective(logp, before, sampled, A, mask, aware, reference)
        if teacher and config.opcd_words:
            with self.run.autocast():
                words = words_kl(hidden, self.model.head_weight, *teacher[1:], config.opcd_words, config.temperature)
            loss = loss + self.opcd * data.spread(rows, words)
        loss = (weights * loss).sum()
        loss.backward()
        tally.add(
            loss,
            mask * (weights > 0),
            aware,
            A,
            self.clip,
            log_ratio=logp - before,
            kl=kl,
            entropy=data.spread(rows, entropy),
            difference=before - sampled,
        )

    def objective(self, logp, before, sampled, A, mask, aware, reference):
        """The loss of each token and its KL, (n,R): the algorithm's own, and what the options add to it.

        logp, before, sampled: log-probabilities now, when the step began, and of the sampler, who had the policy in its
        prompt where aware (n,1); reference: of the start model, None without KL; each (n,R), A (n,1) or (n,R).
        """
        config = self.config
        loss, kl = self.loss.function(logp, before, A, mask, self.clip), torch.zeros_like(logp)
        if AWARE[config.aware_loss]:
            loss = torch.where(aware, AWARE[config.aware_loss](logp, sampled, A, mask, (1.0, 4.0)), loss)
        if config.importance_cap:
            loss = loss * torch.where(aware, 1, (before - sampled).exp().clamp(max=config.importance_cap))
        if reference is not None:
            kl = KLS[config.kl](reference - logp)
            loss = loss + self.beta * kl
        return loss, kl

    def read(self, model, data, rows, policy=False):
        """log pi (n,R) of the responses `rows` behind x, or behind (P, x); entropies (M,) and hidden states (M,D)."""
        with self.run.autocast():
            return data.read(model, rows, self.config.temperature, self.config.shared_prefix, self.pad_id, policy)

    def read_start(self, data, rows):
        """The start model's log pi_ref (n,R), and OPCD's teacher; each None where it is not needed.

        The teacher has P in its prompt: log-probabilities (n,R), hidden states (M,D), output weights (V,D).
        """
        if not (self.beta or self.opcd):
            return None, None
        with torch.no_grad(), self.start() as start:
            reference = self.read(start, data, rows)[0] if self.beta else None
            logp, _, hidden = self.read(start, data, rows, policy=True) if self.opcd else (None,) * 3
            return reference, (logp, hidden, start.head_weight) if self.opcd else None

    @torch.no_grad()
    def logprobs(self, data, which):
        """log pi (N,R) of the responses marked in `which` (N,), before an update."""
        logp = torch.zeros_like(data.mask)
        for rows, _ in self.run.micro_batches(which.nonzero()[:, 0].tolist()):
            logp[rows] = self.read(self.model, data, rows)[0]
        return logp


# -- 5. train ----------------------------------------------------------------------------------------------------------


def prepare(config, run):
    """-> (model, Sampler, Learner, Reporter), as the options say."""
    loss, rewards = LOSSES[config.algorithm], load(config.reward)
    model, processor = run.load()
    policies = load_policies(config.data)
    sections = {name: [node["id"] for node in policy["nodes"]] for name, policy in policies.items()}  # for PA3
    items = load_items(config.data, config.split, policies)
    items = [{**item, "sections": sections[item["policy"]]} for item in items]
    held_out = load_items(config.data, config.validation, policies) if config.validate_every else []

    K = 0 if loss.advantage == "opcd" else config.policy_rollouts  # OPCD samples from pi(.|x) alone
    teach = bool(loss.advantage == "opcd" or config.opcd_weight)
    referred = teach or (loss.beta if config.beta == -1 else config.beta)
    start, sampler = start_models(config, run, model, referred)
    rollout = PolicyRollout(
        processor,
        policies,
        config.group_size,
        K,
        max_prompt=config.max_prompt,
        noise=config.noise,
        teach=teach,
        sampler=sampler,
        max_tokens=config.max_response,
        min_tokens=config.min_response,
        temperature=config.temperature,
        budget=config.budget,
        stop_ids=processor.stop_ids,
        banned_ids=processor.banned_ids,
    )
    replay = Replay(config, run, processor) if config.replay else None
    learner = Learner(config, run, model, start, run.optimizer(model), replay, processor.pad_id)
    tries = config.dynamic_tries if config.dynamic_tries >= 0 else 20 * (config.algorithm == "dapo")
    sampler = Sampler(config, run, model, rollout, items, rewards, tries)
    return model, sampler, learner, Reporter(config, run, model, rollout, held_out[: config.validate_items], rewards)


def train(config):
    G, K = config.group_size, config.policy_rollouts
    if G + K < 2 and config.algorithm != "opcd":
        raise InputError(f"found {G} + {K} responses a query, expected a group of 2 at least")
    with Run(config, stage="rl") as run:
        model, sampler, learner, report = prepare(config, run)
        steps = run.total_steps(len(sampler.items), config.batch_size)
        for step in run.steps(model, learner.optimizer, steps):
            if step == 0:
                report.does_the_policy_help(sampler.items)

            data, cursor = sampler(run.extra.get("cursor", 0))  # sample, judge
            if sampler.too_many_failed:
                run.checkpoints.save(step, model, learner.optimizer, {"cursor": cursor}, None, wait=True)
                raise InputError(f"step {step}: {sampler.complaint()}; saved, --resume continues")
            if data is None:
                report.say(f"rl: ends at step {step}: {sampler.complaint()}")
                break

            rewards, A, kept = credit(config, run, data, sampler.rewards, step / steps)  # (N,) each
            with run.phase("learn"):
                grad_norm, tally = learner(data, A, kept, step, steps)
            report(step, data, rewards, A, tally, grad_norm, sampler.failed / sampler.judged)
            run.extra = {"cursor": cursor}
            run.checkpoint(step + 1, model, learner.optimizer, run.extra)
        run.finish(model)


def main(argv=None):
    train(parse(Config, __doc__, argv))


if __name__ == "__main__":
    command(main)
