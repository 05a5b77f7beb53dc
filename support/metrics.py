"""What a run of train_rl.py tells about itself. No part of the method.

metrics.jsonl holds one row per step; means over all ranks:

    reward, reward/NAME             of all responses; each function of --reward without its weight
    reward_standard, accuracy       of the G sampled without the policy
    reward_aware, accuracy_aware    of the K sampled with it
    dead_groups                     share of groups whose responses all have the same reward: nothing to learn from
    loss, grad_norm                 an on-policy loss near 0 is normal: all ratios are 1, a group's advantages sum to 0
    entropy, kl, clipped_low, clipped_high      of the learned tokens; the last two: the share that the clip leaves out
    length, length_max, truncated   of responses in tokens; share that --max-response cut
    failed                          share of rewards that raised, hung or were no number
    rollout_train_difference        |log pi of the trainer - of the sampler|, tokens of standard responses. Only the
                                    sampler bans vision tokens (and --min-response early stops): the probability of
                                    these is in it, none to speak of in a trained model, .02 in a random one
    speed                           seconds, tokens a second by phase, memory: what differs from run to run

validation.jsonl has accuracies, samples.jsonl whole groups; python -m data.inspect shows all three. Axes: model.py.
"""

import sys
from dataclasses import dataclass

import torch

from data import InputError
from data.rewards import score
from support.batching import batches
from support.config import option


@dataclass
class Reporting:
    """reporting"""

    check: int = option(64, "queries on which the policy in the prompt is tried before training; 0: none", least=0)
    samples_every: int = option(10, "steps between whole groups in samples.jsonl; 0: none", least=0)


class Tally(dict):
    """Sums over the learned tokens of this rank."""

    def __init__(self):
        names = "loss tokens entropy kl clipped_low clipped_high standard_tokens difference".split()
        super().__init__(dict.fromkeys(names, 0.0))
        self.first = {}  # {response of the first group: its logp (R,) before the first update that it is in}

    @torch.no_grad()
    def add(self, loss, micro, here, clip):
        """Count a rollout.MicroBatch: loss (), the weight `here` of its responses, clip (low, high)."""
        mask, ratio = here * micro.mask, (micro.logp - micro.logp_old).exp()  # (b,R)
        sums = {
            "loss": loss,
            "tokens": mask.sum(),
            "entropy": (micro.entropy * mask).sum(),
            "clipped_low": ((ratio < 1 - clip[0]) & (micro.A < 0)).mul(mask).sum(),
            "clipped_high": ((ratio > 1 + clip[1]) & (micro.A > 0)).mul(mask).sum(),
            "standard_tokens": (mask * ~micro.aware).sum(),
            "difference": ((micro.logp_old - micro.logp_sampler).abs() * mask * ~micro.aware).sum(),
            "kl": 0.0 if micro.kl is None else (micro.kl * mask).sum(),
        }
        for name, value in sums.items():
            self[name] += value
        for row, logp in zip(micro.rows, micro.logp.detach()):
            if micro.data.rows[row][0] == 0:
                self.first.setdefault(row, logp)


class Reporter:
    """Writes the three files. items: to validate on; rewards: [(name, function, weight)]."""

    def __init__(self, config, run, model, rollout, items, rewards):
        self.config, self.run, self.model, self.rollout = config, run, model, rollout
        self.items, self.rewards, self.track = items, rewards, tracker(config, run)

    def __call__(self, step, data, rewards, tally, grad_norm, failed):
        """The row of a step, and what is due after it. rewards (B,): totals; failed: a share."""
        run, right, lengths = self.run, (data.rewards[:, 0] >= 1).double(), data.lengths
        dead = [bool((data.A[data.ids == g] == 0).all()) for g in range(len(data.groups))]
        cut = sum(not response.finished for response in data.list)
        sums = {**tally, "responses": len(lengths), "length": lengths.sum(), "cut": cut}
        sums |= {"groups": len(dead), "dead": sum(dead)}
        for half, rows in {"standard": ~data.aware, "aware": data.aware}.items():
            sums |= {f"n_{half}": rows.sum(), f"right_{half}": right[rows].sum(), f"reward_{half}": rewards[rows].sum()}
        named = [f"reward/{name}" for name, *_ in self.rewards]
        sums |= {name: part.nan_to_num().sum() for name, part in zip(named, data.rewards.T)}
        total = dict(zip(sums, run.sum([float(x) for x in sums.values()])))
        mean = lambda name, over: total[name] / max(total[over], 1)
        metrics = {
            "loss": total["loss"],
            "grad_norm": grad_norm,
            "reward": (total["reward_standard"] + total["reward_aware"]) / total["responses"],
            **{name: mean(name, "responses") for name in named},
            "accuracy": mean("right_standard", "n_standard"),
            "accuracy_aware": mean("right_aware", "n_aware"),
            "reward_standard": mean("reward_standard", "n_standard"),
            "reward_aware": mean("reward_aware", "n_aware"),
            "dead_groups": mean("dead", "groups"),
            "entropy": mean("entropy", "tokens"),
            "kl": mean("kl", "tokens"),
            "clipped_low": mean("clipped_low", "tokens"),
            "clipped_high": mean("clipped_high", "tokens"),
            "rollout_train_difference": mean("difference", "standard_tokens"),
            "length": mean("length", "responses"),
            "length_max": run.max(max([0, *lengths.tolist()])),
            "truncated": mean("cut", "responses"),
            "failed": failed,
        }
        run.report(step, metrics, total["length"], phase_tokens={"sample": total["length"], "learn": total["tokens"]})
        self.track(step, metrics)
        every, validate = self.config.samples_every, self.config.validate_every
        if every and step % every == 0 and data.groups and run.is_main:
            run.append("samples", self.sample(step, data, rewards, tally))
        if validate and (step + 1) % validate == 0:
            run.append("validation", {"step": step, "accuracy": self.accuracy(self.items), "n": len(self.items)})

    def sample(self, step, data, rewards, tally):
        """The first group, whole, for reading; "moved": how far each token's logp given x has grown in this step."""
        group, processor = data.groups[0], self.rollout.processor
        n, item = len(group.responses), group.item
        now = self.logprobs(data, n) if tally.first else []
        rows = []
        for i, response in enumerate(group.responses):
            row = {"text": processor.decode(response.tokens), "aware": group.aware[i], "finished": response.finished}
            row |= {"right": float(data.rewards[i, 0]) >= 1, "reward": float(rewards[i]), "advantage": float(data.A[i])}
            if i in tally.first and len(now):
                moved = (now[i] - tally.first[i])[: len(response.tokens)]
                row["tokens"] = [processor.decode([token]) for token in response.tokens]
                row["moved"] = [round(x, 4) for x in moved.tolist()]
            rows.append(row)
        item = {key: item[key] for key in ("id", "policy", "question", "answer")}
        return {"step": step, **item, "responses": rows}

    @torch.no_grad()
    def logprobs(self, data, n):
        """log pi (n,R) of the first n responses given x, as the model is now; [] where it is sharded over ranks."""
        if self.run.fsdp:
            return []
        logp = []
        for i in range(0, n, self.config.micro_batch):
            micro = data.take(list(range(i, min(i + self.config.micro_batch, n))))
            with self.run.autocast():
                logp += micro.read(self.model, self.config.temperature, self.rollout.processor.pad_id)[0]
        return logp

    def accuracy(self, items, policy_in_prompt=False):
        """Share of right greedy responses, over all ranks; each item's policy stands in its prompt, or not."""
        mine = items[self.run.rank :: self.run.world]
        with self.run.phase("validate"), self.run.gathered(self.model):
            answers = self.rollout.greedy(self.model, mine, policy_in_prompt)
        texts = [self.rollout.processor.decode(response.tokens) for _, response in answers]
        found = score(self.rewards[:1], [""] * len(mine), texts, mine, 60.0)
        return self.run.sum(sum(first == 1 for (first,) in found)) / len(items)

    def does_the_policy_help(self, items):
        """Before training: warn where the policy in the prompt does not raise accuracy, as PolicyRollout then harms."""
        config, rollout = self.config, self.rollout
        if not config.check or not (rollout.K or rollout.keep_policy_prompts):
            return
        items = [items[i] for i in batches(len(items), min(config.check, len(items)), config.seed, 0)]
        without, given = self.accuracy(items), self.accuracy(items, policy_in_prompt=True)
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

            wandb.init(project="trimpi", name=run.out.name, config=vars(config))
            return lambda step, metrics: wandb.log(metrics, step=step)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(f"--tracker {config.tracker}: {error}, expected it to be installed") from None
    writer = SummaryWriter(run.out / "tensorboard")
    return lambda step, metrics: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
