"""Stage 3, RL with PolicyRollout: sample, judge, learn, report.

    J = 1/(G+K) sum_i { min[r_i A_i, clip(r_i, 1 - low, 1 + high) A_i] - beta KL(pi || pi_ref) },    r_i = pi(o_i|x) / pi_old(o_i|x)

o_1 .. o_G come from pi_old(.|x), o_G+1 .. o_G+K from pi_old(.|P, x); all are one group, and the loss reads all of them behind x
alone, so that what the policy in the prompt made likely becomes likely without it. K = 0 is plain GRPO (DAPO, ...).

    python train_rl.py --model M --init runs/sft --data data/clevr --out runs/rl --algorithm dapo --group-size 5 --policy-rollouts 5
    torchrun --nproc_per_node 8 train_rl.py ...           the same gradients on any number of ranks

To try a loss of your own, add a function to LOSSES (tests/fork has one in 12 lines). Axes: N responses, R their tokens, D width,
V vocab; x the query with its pictures, P the policy.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

import model as qwen
from data import InputError, command
from data.dataset import load_items, load_policies
from data.rewards import guarded, load
from kernels.advantage import group_advantage
from kernels.logprob import linear_logprob
from rollout import PolicyRollout
from train_sft import Examples
from training import (CommonConfig, Run, batches, collate, learned_hidden, option, pack, packing_pays, parse, redefault,
                      replayed_items, rng, token_logprobs, tracker)

# -- 1. losses: pure functions of (N,R) tensors, one value a token -------------------------------------------------------
# logp, old: log-probabilities now and when the responses were sampled, both behind x alone; A: advantage (N,1) or (N,R);
# mask: 1 on the response; clip: (low, high)


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
    over: str = "sequences"  # mean over: sequences (of token means) | tokens of the step | tokens of the update | length
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
KLS = {  # of d = log pi_ref - log pi
    "k1": lambda d: -d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: d.exp() - d - 1,
}


def token_weights(over, mask, counts, length):
    """What each token counts in the loss, (N,R); counts: sequences and tokens over all ranks and micro-batches."""
    if over == "sequences":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(counts[over], 1)
    return mask / max(counts["sequences"] * length if over == "length" else counts[over], 1)


def bapo_clip(run, logp, old, A, mask, target=0.45):
    """BAPO: widen the clip, above and then below, until positive advantages make `target` of what the objective sums up."""
    bounds = [(0.4, 0.2 + 0.05 * i) for i in range(17)] + [(0.4 - 0.05 * i, 1.0) for i in range(1, 5)]
    terms = [(clipped(logp, old, A, mask, clip).abs() * mask) for clip in bounds]
    sums = run.sum([float((t * (A > 0)).sum()) for t in terms] + [float(t.sum()) for t in terms])
    shares = [positive / max(whole, 1e-12) for positive, whole in zip(sums, sums[len(bounds) :])]
    return next((clip for clip, share in zip(bounds, shares) if share >= target), bounds[-1])


# -- 2. config (the rest of it: training.CommonConfig) -------------------------------------------------------------------


@dataclass
class Config(CommonConfig):
    split: str = redefault(CommonConfig, "split", "rl.jsonl")
    lr: float = redefault(CommonConfig, "lr", 1e-6)
    batch_size: int = option(384, "queries a step, over all ranks", least=1)
    micro_batch: int = option(4, "responses a forward pass of learning; lower it when memory runs out, results stay the same", least=1)
    epochs: float = redefault(CommonConfig, "epochs", 2.0)
    replay_weight: float = option(1.0, "weight of the supervised loss on --replay's items, which joins each step", least=0)

    algorithm: str = option("grpo", "what is optimised", choices=tuple(LOSSES))
    group_size: int = option(5, "G, responses a query, sampled without the policy", least=0)
    policy_rollouts: int = option(5, "K, responses a query besides, sampled with the policy in the prompt; 0: none; the paper: K = G", least=0)
    temperature: float = option(1.0, "of sampling, and of the log-probabilities in the loss", above=0)
    min_response: int = option(0, "words before a response may end", least=0)
    budget: int = option(1 << 17, "tokens of prompts and responses that sampling holds at a time", least=1)
    reward: str = option("accuracy=0.9,format=0.1", "names of data.rewards or module:function, with weights; the first tells right from wrong")
    reward_seconds: float = option(5.0, "after which a reward function is given up", above=0)
    max_failed: float = option(0.5, "share of rewards that may raise, hang or be no number before the run stops", least=0, most=1)
    overlong: int = option(0, "tokens before --max-response over which the reward falls to -1; 0: no penalty", least=0)

    clip_low: float = option(-1.0, "the ratio is clipped below 1 - this; -1: the algorithm's own")
    clip_high: float = option(-1.0, "the ratio is clipped above 1 + this; -1: the algorithm's own")
    beta: float = option(-1.0, "weight of the KL to the start model; -1: the algorithm's own")
    kl: str = option("k3", "estimator of that KL", choices=tuple(KLS))
    inner_epochs: int = option(1, "passes over each step's responses", least=1)
    mini_batch: int = option(0, "queries an update, over all ranks; 0: all of the step", least=0)
    importance_cap: float = option(0.0, "cap of the weight pi_trainer / pi_sampler of a token; 0: no weight", least=0)
    dynamic_tries: int = option(-1, "DAPO's dynamic sampling: batches drawn at most until --batch-size groups have both right and wrong "
                                "responses, then the run ends; 0: off; -1: 20 for dapo, else off", least=-1)  # fmt: skip
    shared_prefix: str = option("auto", "responses share the forward pass of their query", choices=("auto", "on", "off"))

    separate_halves: bool = option(False, "group statistics of the standard and the policy-aware responses apart")
    standard_only: bool = option(False, "gradients from the standard responses only")
    aware_loss: str = option("same", "loss of policy-aware responses: same as the others; truncated: against pi_old(o|P,x), capped at 5; "
                             "shaped: that ratio as r / (r + 0.01)", choices=tuple(AWARE))  # fmt: skip
    aware_right_only: bool = option(False, "keep policy-aware responses only where they are right")
    aware_bonus: float = option(0.0, "added to the reward of right policy-aware responses, falling to 0 over the run", least=0)
    frozen_sampler: bool = option(False, "the start model samples the policy-aware half; each policy is then read once a run")
    noise: float = option(0.0, "NoisyRollout: the other half sees noised pictures (deviation, in normalised pixels) and no policy", least=0)
    opcd_weight: float = option(0.0, "weight of OPCD's token advantage beside the algorithm's own", least=0)
    opcd_words: int = option(0, "OPCD as a KL over this many likeliest words; 0: the log-ratio of the sampled word", least=0)

    check: int = option(64, "queries on which accuracy with and without the policy is compared before training; 0: none", least=0)
    validation: str = option("test.jsonl", "file of the validation items, inside --data")
    validate_every: int = option(0, "steps between validations without the policy; 0: none", least=0)
    validate_items: int = option(128, "queries a validation, the first so many", least=1)
    samples_every: int = option(10, "steps between whole groups in samples.jsonl; 0: none", least=0)
    tracker: str = option("", "also log to", choices=("", "tensorboard", "wandb"))


# -- 3. judge --------------------------------------------------------------------------------------------------------------


def overlong_penalty(length, most, buffer):
    """DAPO's soft penalty: 0 up to most - buffer tokens, then falling to -1 at most (0 without a buffer)."""
    return 0.0 if not buffer else -min(max(length - (most - buffer), 0) / buffer, 1.0)


def judge(config, rewards, processor, group):
    """Each reward of each response of a group: (G + K, rewards) float64, NaN where it failed."""
    prompt = processor.decode(group.prompt.input_ids.tolist())
    texts = [processor.decode(response.tokens) for response in group.responses]
    return torch.tensor([[guarded(f, prompt, text, group.item, config.reward_seconds) for _, f, _ in rewards] for text in texts],
                        dtype=torch.float64)  # fmt: skip


def advantages(kind, parts, weights, ids, run):
    """Advantages (N,) of rewards parts (N,n) with weights (n,), in groups ids (N,); NaN rewards give 0 and count nowhere."""
    if kind != "gdpo":
        return group_advantage(parts @ weights, ids, "dr_grpo" if kind == "dr_grpo" else "grpo")
    z = sum(w * group_advantage(part, ids) for part, w in zip(parts.T, weights))  # each reward by its own deviation,
    valid = ~parts.isnan().any(1)
    n, total, squares = run.sum([float(valid.sum()), float(z[valid].sum()), float((z[valid] ** 2).sum())])
    deviation = math.sqrt(max(squares - total**2 / max(n, 1), 0) / max(n - 1, 1))
    return torch.where(valid, (z - total / max(n, 1)) / (deviation + 1e-4), 0)  # then all over the batch


# -- 4. sample -------------------------------------------------------------------------------------------------------------


class Responses:
    """The responses of this rank's groups, flat: N of them, R tokens at most."""

    def __init__(self, groups, parts, places, device):
        self.groups, self.places = groups, torch.tensor(places, dtype=torch.long)  # place of each group in the step, over all ranks
        self.rows = [(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))]
        self.list = [groups[g].responses[i] for g, i in self.rows]
        self.ids = torch.tensor([g for g, _ in self.rows], dtype=torch.long)  # (N,)
        self.aware = torch.tensor([groups[g].aware[i] for g, i in self.rows], dtype=torch.bool)
        self.parts = torch.cat([torch.zeros(0, parts[0].shape[1] if parts else 1, dtype=torch.float64), *parts])  # rewards (N,n)
        self.lengths = torch.tensor([len(response.tokens) for response in self.list], dtype=torch.long)
        self.mask = (torch.arange(max([1, *self.lengths.tolist()])) < self.lengths[:, None]).float().to(device)  # (N,R)
        self.sampled = torch.zeros_like(self.mask)
        for row, response in zip(self.sampled, self.list):
            row[: len(response.tokens)] = torch.tensor(response.logprobs)

    def spread(self, rows, values):
        """Values of the tokens of some rows one after the other, (n,) -> (len(rows),R)."""
        mask = self.mask[rows].bool()
        return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)


def collect(config, run, model, rollout, items, rewards, cursor):
    """Sample and judge until the step is full -> (Responses, next cursor, full, failed rewards, all rewards)."""
    tries = config.dynamic_tries if config.dynamic_tries >= 0 else 20 * (config.algorithm == "dapo")
    groups, parts, places, count, failed, judged = [], [], [], 0, 0, 0
    for _ in range(max(tries, 1)):
        mine = batches(len(items), config.batch_size, config.seed, cursor, run.rank, run.world)
        seeds = [rng(config.seed, cursor, i).integers(2**62, size=config.group_size + config.policy_rollouts).tolist() for i in mine]
        with run.phase("sample"), run.gathered(model), run.gathered(rollout.sampler or model):
            drawn = rollout(model, [items[i] for i in mine], seeds)
        with run.phase("judge"):
            scores = [judge(config, rewards, rollout.processor, group) for group in drawn]
        live = torch.zeros(config.batch_size)  # over all ranks: groups to learn from, with dynamic sampling not all right or wrong
        live[run.rank :: run.world] = torch.tensor([float(not tries or bool(s[:, 0].nan_to_num().unique().numel() > 1)) for s in scores])
        order = count + torch.tensor(run.sum(live.tolist())).cumsum(0).long() - 1  # (batch_size,) place in the step, if live
        for at, group, part in zip(range(run.rank, config.batch_size, run.world), drawn, scores):
            if live[at] and order[at] < config.batch_size:
                groups, parts, places = [*groups, group], [*parts, part], [*places, int(order[at])]
        failed, judged = failed + int(sum(s.isnan().sum() for s in scores)), judged + sum(s.numel() for s in scores)
        count, cursor = int(order[-1]) + 1, cursor + 1
        if count >= config.batch_size:
            break
    return Responses(groups, parts, places, run.device), cursor, count >= config.batch_size, *run.sum([failed, judged])


def right_share(run, model, rollout, items, rewards, policies=None):
    """Share of right greedy responses, over all ranks; with policies, each item's policy stands in its prompt."""
    mine = items[run.rank :: run.world]
    with run.phase("validate"), run.gathered(model):
        texts = rollout.greedy(model, mine, policies)
    return run.sum(sum(guarded(rewards[0][1], "", text, item, 60.0) == 1 for text, item in zip(texts, mine))) / len(items)


# -- 5. learn --------------------------------------------------------------------------------------------------------------


def words_kl(h, W, h_teacher, W_teacher, count, temperature):
    """KL(pi || teacher) of each token over the `count` likeliest words of pi, (n,): OPCD beyond the sampled word."""
    with torch.no_grad():
        words = torch.cat([(rows @ W.T).topk(min(count, len(W))).indices for rows in h.split(256)])  # (n,count)

    def log_probs(h, W):  # one word's log-probability gives the normaliser of all
        logits = torch.einsum("nd,nkd->nk", h, W[words]).float() / temperature
        likeliest, _ = linear_logprob(h, W, words[:, 0], temperature=temperature)
        return logits - logits[:, :1] + likeliest[:, None]

    log_p, log_q = log_probs(h, W), log_probs(h_teacher, W_teacher)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


SEEN = "loss entropy kl clip_low clip_high tokens difference standard_tokens".split()  # sums over tokens that an update leaves


class Learner:
    """The updates of a step. start: a context manager that gives the start model, without gradients."""

    def __init__(self, config, run, model, start, optimizer, replay, pad_id):
        self.config, self.run, self.model, self.start, self.optimizer = config, run, model, start, optimizer
        self.replay, self.pad_id, self.loss = replay, pad_id, LOSSES[config.algorithm]
        own = lambda value, default: default if value == -1 else value
        self.clip = own(config.clip_low, self.loss.clip[0]), own(config.clip_high, self.loss.clip[1])
        self.beta = own(config.beta, self.loss.beta)
        self.opcd = 1.0 if self.loss.advantage == "opcd" else config.opcd_weight

    def __call__(self, data, A, kept, step, steps):
        """Learn from the `kept` responses (N,) with advantages A (N,) -> (mean gradient norm, sums of SEEN over this rank)."""
        config, run = self.config, self.run
        updates = -(-config.batch_size // (config.mini_batch or config.batch_size))
        seen, norms, old = torch.zeros(len(SEEN), device=run.device), [], None
        live = kept & ((A != 0) | bool(self.beta or self.opcd or run.fsdp))  # the others have no gradient
        if config.inner_epochs * updates > 1:
            with torch.no_grad():
                old = self.logprobs(data, live)
        step_tokens = run.sum(int(data.lengths[kept].sum()))
        for _ in range(config.inner_epochs):
            for update in range(updates):
                mine = kept & (data.places[data.ids] % updates == update)
                sequences, tokens = run.sum([int(mine.sum()), int(data.lengths[mine].sum())])
                counts = {"sequences": sequences, "tokens of the update": tokens, "tokens of the step": step_tokens / updates}
                weights = token_weights(self.loss.over, data.mask, counts, config.max_response)  # (N,R)
                if config.algorithm == "bapo" and old is not None:
                    with torch.no_grad():
                        now = self.logprobs(data, mine & live)
                    self.clip = bapo_clip(run, now, old, A[:, None].to(now), data.mask * (mine & live)[:, None].to(now))
                for rows, weight in run.micro_batches((mine & live).nonzero()[:, 0].tolist()):
                    self.backward(data, rows, A, old, weight * weights, seen)
                if self.replay:
                    self.backward_replay(step)
                run.reduce_gradients(self.model)
                norms.append(run.update(self.model, self.optimizer, step, steps))
        return sum(norms) / len(norms), seen

    def backward(self, data, rows, A, old, weights, seen):
        """Gradients of a micro-batch: the objective of the responses `rows`, all behind x alone."""
        config, mask, aware, sampled = self.config, data.mask[rows], data.aware[rows, None].to(data.mask.device), data.sampled[rows]
        A = A[rows, None].to(mask)  # (n,1)
        logp, entropy, hidden = self.read(self.model, data, rows)  # (n,R)
        now = logp.detach()
        before = now if old is None else old[rows]
        kl = torch.zeros_like(now)
        if self.opcd or self.beta:
            with torch.no_grad(), self.start() as start:
                if self.opcd:
                    teacher, _, teacher_hidden = self.read(start, data, rows, policy=True)
                if self.beta:
                    reference, *_ = self.read(start, data, rows)
        if self.opcd and not config.opcd_words:
            A = A + self.opcd * (teacher - now) * mask  # (n,R)
        loss = self.loss.function(logp, before, A, mask, self.clip)
        if AWARE[config.aware_loss]:
            loss = torch.where(aware, AWARE[config.aware_loss](logp, sampled, A, mask, (1.0, 4.0)), loss)
        if config.importance_cap:
            loss = loss * torch.where(aware, 1, (before - sampled).exp().clamp(max=config.importance_cap))
        if self.beta:
            kl = KLS[config.kl](reference - logp)
            loss = loss + self.beta * kl
        if self.opcd and config.opcd_words:
            with self.run.autocast():
                words = words_kl(hidden, self.model.head_weight, teacher_hidden, start.head_weight, config.opcd_words, config.temperature)
            loss = loss + self.opcd * data.spread(rows, words)
        loss = (weights[rows] * loss).sum()
        loss.backward()

        ratio, standard = (now - before).exp(), mask * ~aware
        low, high = (ratio < 1 - self.clip[0]) & (A < 0), (ratio > 1 + self.clip[1]) & (A > 0)
        sums = [(x * mask).sum() for x in (data.spread(rows, entropy), kl.detach(), low, high, torch.ones_like(mask))]
        seen += torch.stack([loss.detach(), *sums, ((before - sampled).abs() * standard).sum(), standard.sum()])

    def backward_replay(self, step):
        """Gradients of the supervised loss on other policies, theirs in the prompt: the model goes on reading policies."""
        config, run = self.config, self.run
        chosen = batches(len(self.replay), replayed_items(config), config.seed + 1, step, run.rank, run.world)
        parts = [(collate(*zip(*part), pad_id=self.pad_id), w) for part, w in run.micro_batches([self.replay[i] for i in chosen])]
        tokens = run.sum(sum(w * len(batch.index) for batch, w in parts))
        for batch, weight in parts:
            with run.autocast():
                logp, _ = token_logprobs(self.model, batch.to(run.device))
            (-config.replay_weight * weight * logp.sum() / tokens).backward()

    def read(self, model, data, rows, policy=False):
        """log pi of the responses `rows` behind x, or behind (P, x) -> (n,R); entropies and hidden states a token (M,), (M,D)."""
        groups = {}
        for n in rows:
            groups.setdefault(data.rows[n][0], []).append(data.list[n].tokens)
        prompts = [data.groups[g].policy_prompt if policy else data.groups[g].prompt for g in groups]
        responses, how = list(groups.values()), self.config.shared_prefix
        if how == "on" or how == "auto" and packing_pays(model, prompts, responses):
            batch = pack(model, prompts, responses, self.pad_id)
        else:
            alone = [(prompt, tokens) for prompt, group in zip(prompts, responses) for tokens in group]
            batch = collate(*zip(*alone), pad_id=self.pad_id)
        batch = batch.to(self.run.device)
        with self.run.autocast():
            hidden, words = learned_hidden(model, batch), batch.labels.flatten()[batch.index]
            logp, entropy = linear_logprob(hidden, model.head_weight, words, temperature=self.config.temperature, return_entropy=True)
        return data.spread(rows, logp), entropy, hidden

    def logprobs(self, data, which):
        """log pi (N,R) of the responses marked in `which` (N,), before an update."""
        logp = torch.zeros_like(data.mask)
        for rows, _ in self.run.micro_batches(which.nonzero()[:, 0].tolist()):
            logp[rows] = self.read(self.model, data, rows)[0]
        return logp


# -- 6. train --------------------------------------------------------------------------------------------------------------


def train(config):
    if config.group_size + config.policy_rollouts < 2 and config.algorithm != "opcd":
        raise InputError(f"found {config.group_size} + {config.policy_rollouts} responses a query, expected a group of 2 at least")
    spec, rewards = LOSSES[config.algorithm], load(config.reward)
    G, K = config.group_size, 0 if spec.advantage == "opcd" else config.policy_rollouts  # OPCD samples from pi(.|x) alone
    with Run(config, stage="rl") as run:
        model, processor = run.load()
        policies = load_policies(config.data)
        known = {name: [node["id"] for node in policy["nodes"]] for name, policy in policies.items()}
        items = [{**item, "sections": known[item["policy"]]} for item in load_items(config.data, config.split, policies)]
        held_out = load_items(config.data, config.validation, policies)[: config.validate_items] if config.validate_every else []
        teach = spec.advantage == "opcd" or config.opcd_weight
        needs_start = teach or config.frozen_sampler or (spec.beta if config.beta == -1 else config.beta)
        whole = needs_start and (config.full or run.adapter or config.frozen_sampler)  # else the adapter is switched off
        frozen = run.load(frozen=True)[0] if whole else None
        rollout = PolicyRollout(
            processor, policies, G, K, max_prompt=config.max_prompt, sampler=frozen if config.frozen_sampler else None,
            noise=config.noise, teach=bool(teach), max_tokens=config.max_response, temperature=config.temperature,
            min_tokens=config.min_response, budget=config.budget, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids,
        )  # fmt: skip
        replay = Examples(config.replay, config.replay_split, processor, config, policy_in_prompt=True) if config.replay else None
        optimizer, track = run.optimizer(model), tracker(config, run)
        learner = Learner(config, run, model, lambda: nullcontext(frozen) if frozen else qwen.adapter_off(model), optimizer, replay,
                          processor.pad_id)  # fmt: skip
        weights = torch.tensor([w for *_, w in rewards] + [1.0, 1.0], dtype=torch.float64)
        steps, cursor = run.total_steps(len(items), config.batch_size), None

        for step in run.steps(model, optimizer, steps):
            if step == 0 and config.check and (K or teach) and not config.noise:
                chosen = [items[i] for i in batches(len(items), min(config.check, len(items)), config.seed, 0)]
                without, given = right_share(run, model, rollout, chosen, rewards), right_share(run, model, rollout, chosen, rewards, policies)
                run.append("validation", {"step": 0, "without_policy": without, "with_policy": given, "n": len(chosen)})
                if given <= without and run.is_main:
                    print(f"warning: accuracy {given:.3f} with the policy in the prompt is not above {without:.3f} without it: "
                          "policy-aware responses will teach nothing, and may harm (--policy-rollouts 0)", file=sys.stderr, flush=True)

            cursor = run.extra.get("cursor", 0) if cursor is None else cursor
            data, cursor, full, failed, judged = collect(config, run, model, rollout, items, rewards, cursor)
            if failed > config.max_failed * judged:
                run.checkpoints.save(step, model, optimizer, {"cursor": cursor}, None, wait=True)
                raise InputError(f"step {step}: {failed:.0f} of {judged:.0f} rewards raised, hung or were no number, expected at most "
                                 f"--max-failed {config.max_failed}; saved, --resume continues")
            if not full:
                if run.is_main:
                    print(f"rl: ends at step {step}: no {config.batch_size} groups with right and wrong responses in "
                          f"{config.dynamic_tries if config.dynamic_tries > 0 else 20} batches (--dynamic-tries)", flush=True)
                break

            right, lengths, aware = data.parts[:, 0] >= 1, data.lengths, data.aware
            overlong = [overlong_penalty(length, config.max_response, config.overlong) for length in lengths.tolist()]
            bonus = config.aware_bonus * (1 - step / steps) * (aware & right)
            parts = torch.cat([data.parts, torch.tensor(overlong, dtype=torch.float64)[:, None], bonus[:, None].double()], dim=1)  # (N,n)
            if config.aware_right_only:
                parts[aware & ~right] = math.nan
            kept = ~parts.isnan().any(1)
            ids = 2 * data.ids + aware if config.separate_halves else data.ids
            A = advantages(spec.advantage, parts, weights, ids, run)  # (N,)
            if config.standard_only:
                kept &= ~aware
            dead = [float(bool((A[data.ids == g] == 0).all())) for g in range(len(data.groups))]
            if spec.advantage == "opcd":
                A, kept = torch.zeros_like(A), torch.ones_like(kept)
            with run.phase("learn"):
                grad_norm, seen = learner(data, A, kept, step, steps)
            if not config.frozen_sampler:
                rollout.prefixes.clear()  # the weights have moved

            seen = dict(zip(SEEN, run.sum(seen.tolist())))
            halves = [[float(x) for x in (half.sum(), right[half].sum(), (parts.nan_to_num() @ weights)[half].sum())] for half in (~aware, aware)]
            cut = sum(not response.finished for response in data.list)
            sums = run.sum([len(data.list), int(lengths.sum()), cut, len(dead), sum(dead), *halves[0], *halves[1]])
            n, tokens, cut, groups, dead, n_standard, right_standard, r_standard, n_aware, right_aware, r_aware = sums
            named = dict(zip([name for name, *_ in rewards], run.sum(data.parts.nan_to_num().sum(0).tolist())))
            learned = max(seen["tokens"], 1)
            metrics = {
                "loss": seen["loss"], "grad_norm": grad_norm, "reward": (r_standard + r_aware) / n,
                **{f"reward/{name}": value / n for name, value in named.items()},
                "accuracy": right_standard / max(n_standard, 1), "accuracy_aware": right_aware / max(n_aware, 1),
                "reward_standard": r_standard / max(n_standard, 1), "reward_aware": r_aware / max(n_aware, 1),
                "dead_groups": dead / groups, "entropy": seen["entropy"] / learned, "kl": seen["kl"] / learned,
                "clipped_low": seen["clip_low"] / learned, "clipped_high": seen["clip_high"] / learned,
                "rollout_train_difference": seen["difference"] / max(seen["standard_tokens"], 1),
                "length": tokens / n, "length_max": run.max(int(lengths.max())), "truncated": cut / n, "failed": failed / judged,
            }  # fmt: skip
            run.report(step, metrics, tokens, phase_tokens={"sample": tokens, "learn": learned})
            track(step, metrics)
            if config.samples_every and step % config.samples_every == 0 and data.groups:
                run.append("samples", sample_row(step, data, A, parts @ weights, processor))
            if config.validate_every and (step + 1) % config.validate_every == 0:
                run.append("validation", {"step": step, "accuracy": right_share(run, model, rollout, held_out, rewards), "n": len(held_out)})
            run.extra = {"cursor": cursor}
            run.checkpoint(step + 1, model, optimizer, run.extra)
        run.finish(model)


def sample_row(step, data, A, reward, processor):
    """A whole group, for reading."""
    group = data.groups[0]
    rows = [{"text": processor.decode(response.tokens), "aware": aware, "reward": float(r), "advantage": float(a)}
            for response, aware, r, a in zip(group.responses, group.aware, reward, A)]  # fmt: skip
    return {"step": step, "id": group.item["id"], "policy": group.item["policy"], "answer": group.item["answer"], "responses": rows}


def main(argv=None):
    train(parse(Config, __doc__, argv))


if __name__ == "__main__":
    command(main)
