"""What a run of train_rl.py tells about itself. No part of the method.

metrics.jsonl holds one row per step: means over all ranks and updates; what was not measured is not there.

    reward, reward/NAME             of all responses; each function of --reward without its weight
    reward_standard, accuracy       of the G sampled without the policy
    reward_aware, accuracy_aware    of the K sampled with it
    dead_groups                     share of groups whose responses all have the same reward: nothing to learn from
    draws, drawn_...                draws of the step, and accuracy and dead groups of all that was drawn: with dynamic
                                    sampling everything else is of the groups that were kept
    loss, grad_norm                 an on-policy loss near 0 is normal: all ratios are 1, a group's advantages sum to 0
    entropy, kl                     of the learned tokens
    clipped_low, clipped_high       share of the learned standard tokens whose ratio, as the loss takes it, is clipped;
    clipped_..._aware               of the policy-aware ones
    length, length_max, truncated   of responses in tokens that they have written; share that --max-response cut, or
                                    their environment's limit of turns
    turns, calls, calls_failed      of dialogues, per response: its turns, results of tools, and how many were errors
    failed                          share of rewards that raised, hung or were no number
    rollout_train_difference        |log pi of the trainer - of the sampler|, tokens of standard responses. Only the
                                    sampler bans vision tokens: their probability is in it, none to speak of in a
                                    trained model, .02 in a random one
    speed                           seconds, tokens a second by phase, memory: what differs from run to run

validation.jsonl has accuracies, samples.jsonl whole groups; python -m data.inspect shows all three. Axes: model.py.
"""

import sys
from dataclasses import dataclass

import torch

from data import InputError
from data.rewards import score
from data.tools import failed
from support.batching import batches
from support.config import option
from support.dialogue import as_judged

SAMPLES_EVERY = 10  # steps between whole groups in samples.jsonl


@dataclass
class Reporting:
    """reporting"""

    check: int = option(64, "queries on which the policy in the prompt is tried before training; 0: none", least=0)


class Means(dict):
    """{name: (sum, weight)} of this rank. All ranks name the same: names is one string with spaces between them."""

    def __init__(self, names):
        super().__init__({name: (0.0, 0.0) for name in names.split()})

    def add(self, name, values, where=True):
        """Count values, a tensor: those that are finite, each as often as `where` says (a mask, or weights)."""
        where = values.isfinite() * where
        self.count(name, (values.nan_to_num(0.0, 0.0, 0.0) * where).sum(), where.sum())

    def count(self, name, total, weight):
        self[name] = self[name][0] + total, self[name][1] + weight

    def over(self, run):
        """{name: mean over all ranks, None where nothing was counted}, and {name: weight} as `weights`."""
        told = run.sum([float(x) for pair in self.values() for x in pair])
        self.weights = dict(zip(self, told[1::2]))
        return {name: x / n if n else None for name, x, n in zip(self, told[::2], told[1::2])}


class Tally(Means):
    """What one step's updates tell."""

    def __init__(self):
        clips = "clipped_low clipped_high clipped_low_aware clipped_high_aware"
        super().__init__(f"loss grad_norm entropy kl {clips} rollout_train_difference")
        self.first = {}  # {response of the first group: its logp (R,) before the first update that it is in}

    @torch.no_grad()
    def learned(self, loss, micro, ratio, clip):
        """Count a rollout.MicroBatch: loss (), what clip = (low, high) bounds (b,R), NaN where nothing is clipped."""
        self.count("loss", loss, 0)
        self.add("entropy", micro.entropy, micro.mask)
        self.add("rollout_train_difference", (micro.logp_old - micro.logp_sampler).abs(), micro.mask * ~micro.aware)
        if micro.kl is not None:
            self.add("kl", micro.kl, micro.mask)
        beyond = {"low": (ratio < 1 - clip[0]) & (micro.A < 0), "high": (ratio > 1 + clip[1]) & (micro.A > 0)}
        for half, rows in {"": ~micro.aware, "_aware": micro.aware}.items():
            for side, cut in beyond.items():
                self.add(f"clipped_{side}{half}", cut.float(), micro.mask * rows * ~ratio.isnan())
        for row, logp in zip(micro.rows, micro.logp.detach()):
            if micro.data.rows[row][0] == 0:
                self.first.setdefault(row, logp)

    def updated(self, grad_norm, world):
        """Count an update, which every rank of `world` counts."""
        self.count("loss", 0.0, 1 / world)
        self.add("grad_norm", torch.tensor(grad_norm))


def is_right(rewards):
    """1.0 where the first reward, accuracy, is 1, else 0.0; NaN where it failed. rewards (B,F) -> (B,)."""
    return (rewards[:, 0] >= 1).double().masked_fill(rewards[:, 0].isnan(), torch.nan)


class Reporter:
    """Writes the three files. items: to validate on; rewards: [(name, function, weight)]; logprobs: the Learner's."""

    def __init__(self, config, run, model, rollout, items, rewards, logprobs):
        self.config, self.run, self.model, self.rollout, self.logprobs = config, run, model, rollout, logprobs
        self.items, self.rewards, self.track = items, rewards, tracker(config, run)

    def __call__(self, step, data, rewards, tally, drawn):
        """The row of a step, and what is due after it. rewards (B,): totals; drawn: what the Sampler tells."""
        run, config, lengths = self.run, self.config, data.lengths.double()
        named = " ".join(f"reward/{name}" for name, *_ in self.rewards)
        means = Means(
            f"reward {named} accuracy accuracy_aware reward_standard reward_aware dead_groups length truncated "
            "turns calls calls_failed"
        )
        judged = ~data.rewards.isnan().any(1)  # (B,)
        means.add("reward", rewards, judged)
        for name, part in zip(named.split(), data.rewards.T):
            means.add(name, part)
        for half, short, rows in (("_standard", "", ~data.aware), ("_aware", "_aware", data.aware)):
            means.add(f"accuracy{short}", is_right(data.rewards), rows)
            means.add(f"reward{half}", rewards, rows & judged)
        dead = [bool((data.A[data.ids == g] == 0).all()) for g in range(len(data.groups))]
        means.add("dead_groups", torch.tensor(dead, dtype=torch.double))
        means.add("length", lengths)
        means.add("truncated", torch.tensor([float(not response.finished) for response in data.list]))
        for turns in filter(None, (response.turns for response in data.list)):
            results = [failed(turn) for turn in turns if turn["role"] == "tool"]
            for name, n in zip(("turns", "calls", "calls_failed"), (len(results) + 1, len(results), sum(results))):
                means.count(name, n, 1)
        told, learned = means.over(run), tally.over(run)
        several = {"length_max": run.max(max([0, *data.lengths.tolist()])), **drawn}
        metrics = {"loss": learned.pop("loss"), "grad_norm": learned.pop("grad_norm"), **told, **learned, **several}
        metrics = {name: x for name, x in metrics.items() if x is not None}
        tokens = metrics["length"] * means.weights["length"]
        run.report(step, metrics, tokens, phase_tokens={"sample": tokens, "learn": tally.weights["entropy"]})
        self.track(step, metrics)
        if step % SAMPLES_EVERY == 0 and data.groups and run.is_main:
            run.append("samples", self.sample(step, data, rewards, tally))
        if config.validate_every and (step + 1) % config.validate_every == 0:
            found = self.accuracy(self.items, self.model)
            run.append("validation", {"step": step, "accuracy": found, "n": len(self.items)})

    def sample(self, step, data, rewards, tally):
        """The first group, whole, for reading; "moved": how far each token's logp given x has grown in this step."""
        group, processor = data.groups[0], self.rollout.processor
        item = group.item
        now = self.logprobs(data, data.ids == 0)[0] if tally.first and not self.run.fsdp else []  # there it is sharded
        rows = []
        for i, response in enumerate(group.responses):
            row = {"text": processor.decode(response.tokens), "aware": group.aware[i], "finished": response.finished}
            row |= {"turns": [dict(turn) for turn in response.turns]} if response.turns else {}
            row |= {"right": float(data.rewards[i, 0]) >= 1, "reward": float(rewards[i]), "advantage": float(data.A[i])}
            if i in tally.first and len(now):
                moved = (now[i] - tally.first[i])[: len(response.tokens)]
                tokens = [processor.decode([token]) for token in response.tokens]
                ends = [
                    0,
                    *(end for place, read in response.reads for end in (place, place + len(read.input_ids))),
                    None,
                ]
                for part, start, end in zip(row.get("turns", [row]), ends, ends[1:]):  # a turn, a result, a turn, ...
                    part["tokens"] = tokens[start:end]
                    part["moved"] = [round(x, 4) for x in moved[start:end].tolist()]
            rows.append(row)
        item = {key: item[key] for key in ("id", "policy", "question", "answer")}
        return {"step": step, **item, "responses": rows}

    def accuracy(self, items, model, policy_in_prompt=False):
        """Share of right greedy responses, over all ranks; each item's policy stands in its prompt, or not."""
        mine = items[self.run.rank :: self.run.world]
        with self.run.phase("validate"), self.run.gathered(model):
            answers = self.rollout.greedy(model, mine, policy_in_prompt)
        prompts = [self.rollout.processor.decode(prompt.input_ids.tolist()) for prompt, _ in answers]
        pairs = [(item, response) for item, (_, response) in zip(mine, answers)]
        texts, seen = as_judged(self.rollout.processor, pairs)
        found = score(self.rewards[:1], prompts, texts, seen)
        return self.run.sum(float(sum(row[0] == 1 for row in found))) / len(items)

    def does_the_policy_help(self, items):
        """Before training: warn where the policy in the prompt does not raise accuracy, as PolicyRollout then harms.

        Who will write the policy-aware responses is asked with the policy, the model that learns without.
        """
        config, rollout = self.config, self.rollout
        if not config.check or not (rollout.K or rollout.keep_policy_prompts):
            return
        items = [items[i] for i in batches(len(items), min(config.check, len(items)), config.seed, 0)]
        without = self.accuracy(items, self.model)
        given = self.accuracy(items, rollout.sampler or self.model, policy_in_prompt=True)
        self.run.append("validation", {"step": 0, "without_policy": without, "with_policy": given, "n": len(items)})
        if given <= without:
            self.say(
                f"warning: accuracy {given:.3f} with the policy in the prompt is not above {without:.3f} without: "
                "policy-aware responses will teach nothing, and may harm (--policy-rollouts 0)",
                sys.stderr,
            )

    def say(self, line, file=None):
        if self.run.is_main:
            print(line, file=file, flush=True)


def tracker(config, run):
    """track(step, metrics) to TensorBoard or wandb, where --tracker asks for it."""
    if not config.tracker or not run.is_main:
        return lambda step, metrics: None
    try:
        if config.tracker == "wandb":
            import wandb

            named = dict(project="trimpi", name=run.out.name, config=vars(config))
            wandb.init(**named, id=run.id, resume="allow")  # the id in config.json: --resume goes on in the same curves
            return lambda step, metrics: wandb.log(metrics, step=step)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(f"--tracker {config.tracker}: {error}, expected it to be installed") from None
    writer = SummaryWriter(run.out / "tensorboard")
    return lambda step, metrics: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
