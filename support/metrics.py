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

validation.jsonl has accuracies, samples.jsonl whole groups. Axes: model.py.
"""

import sys
from dataclasses import dataclass

import torch

from data import InputError
from data.rewards import guarded
from support.batching import batches
from support.config import option


@dataclass
class Reporting:
    """reporting"""

    check: int = option(64, "queries on which the policy in the prompt is tried before training; 0: none", least=0)
    validation: str = option("test.jsonl", "file of the validation items, inside --data")
    validate_every: int = option(0, "steps between validations without the policy; 0: none", least=0)
    validate_items: int = option(128, "queries per validation", least=1)
    samples_every: int = option(10, "steps between whole groups in samples.jsonl; 0: none", least=0)
    tracker: str = option("", "also log to", choices=("", "tensorboard", "wandb"))


class Tally(dict):
    """Sums over the learned tokens of this rank."""

    def __init__(self):
        names = "loss tokens entropy kl clipped_low clipped_high standard_tokens difference".split()
        super().__init__(dict.fromkeys(names, 0.0))

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
        if every and step % every == 0 and data.groups:
            run.append("samples", self.sample(step, data.groups[0], rewards, data.A))
        if validate and (step + 1) % validate == 0:
            run.append("validation", {"step": step, "accuracy": self.accuracy(self.items), "n": len(self.items)})

    def sample(self, step, group, rewards, A):
        """A whole group, for reading; rewards and A begin with its own."""
        texts = [self.rollout.processor.decode(response.tokens) for response in group.responses]
        rows = [
            dict(zip(("text", "aware", "reward", "advantage"), values))
            for values in zip(texts, group.aware, rewards.tolist(), A.tolist())
        ]
        item = {"id": group.item["id"], "policy": group.item["policy"], "answer": group.item["answer"]}
        return {"step": step, **item, "responses": rows}

    def accuracy(self, items, policy_in_prompt=False):
        """Share of right greedy responses, over all ranks; each item's policy stands in its prompt, or not."""
        mine = items[self.run.rank :: self.run.world]
        with self.run.phase("validate"), self.run.gathered(self.model):
            answers = self.rollout.greedy(self.model, mine, policy_in_prompt)
        texts = [self.rollout.processor.decode(response.tokens) for _, response in answers]
        right = sum(guarded(self.rewards[0][1], "", text, item, 60.0) == 1 for text, item in zip(texts, mine))
        return self.run.sum(right) / len(items)

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
