"""What a step of RL learns from: groups, sampled and judged batch by batch, as the tensors that the learner reads.

    Sampler      queries -> PolicyRollout -> rewards; with dynamic sampling until enough groups can teach something
    Responses    what came of it on this rank, flat: N responses of R tokens at most
    Replay       besides, where --replay asks for it: supervised items of other policies

Axes: N responses, n some of them, R their tokens, M tokens one after the other, F rewards, D width.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch

import model as qwen
from data.rewards import guarded
from kernels.logprob import linear_logprob
from support.batching import batches, collate, lay_out, learned_hidden, replayed_items, rng
from train_sft import Examples
from training import likelihood


def start_models(config, run, model, referred):
    """-> (context with the start model, as a reference or teacher; who samples the policy-aware half, None: the model).

    Where only LoRA is trained, on a base of its own, the start model is the model with its adapter switched off.
    """
    samples = config.frozen_sampler == "start"
    whole = samples or referred and (config.full or run.adapter)
    frozen = run.load("start")[0] if whole else None
    sampler = frozen if samples else run.load("base")[0] if config.frozen_sampler else None
    return lambda: nullcontext(frozen) if frozen else qwen.adapter_off(model), sampler


class Sampler:
    """Sample and judge: PolicyRollout on the next batch of queries; with dynamic sampling, on the next few."""

    def __init__(self, config, run, model, rollout, items, rewards, tries):
        self.config, self.run, self.model, self.rollout = config, run, model, rollout
        self.items, self.rewards, self.tries = items, rewards, tries

    def draw(self, number):
        """This rank's queries of batch `number`, sampled and judged -> [Group]."""
        config, run, size = self.config, self.run, self.config.group_size + self.config.policy_rollouts
        mine = batches(len(self.items), config.batch_size, config.seed, number, run.rank, run.world)
        seeds = [rng(config.seed, number, i).integers(2**62, size=size).tolist() for i in mine]
        with run.phase("sample"), run.gathered(self.model), run.gathered(self.rollout.sampler or self.model):
            groups = self.rollout(self.model, [self.items[i] for i in mine], seeds)
        with run.phase("judge"):
            return [judge(group, self.rewards, self.rollout.processor, config.reward_seconds) for group in groups]

    def __call__(self, cursor):
        """A step's groups, from batch number `cursor` on -> (Responses | None where they do not suffice, next cursor).

        Dynamic sampling (tries > 0) keeps groups with both right and wrong responses, and draws on until --batch-size
        of them are found. The ranks tell each other which queries have one, a sum of zeros and ones, and so number them
        alike: the first --batch-size are the step, on any number of ranks. `failed` and `judged` count rewards.
        """
        size, run, mine = self.config.batch_size, self.run, slice(self.run.rank, None, self.run.world)
        groups, places, found, failed, judged = [], [], 0, 0, 0
        for number in range(cursor, cursor + max(self.tries, 1)):
            drawn = self.draw(number)
            live = torch.zeros(size)  # (queries of the batch,)
            live[mine] = torch.tensor([float(not self.tries or right_and_wrong(group)) for group in drawn])
            live = torch.tensor(run.sum(live.tolist()))  # now of all ranks
            place = (found + live.cumsum(0) - live).long()  # (queries,) where in the step each live one stands
            for group, good, at in zip(drawn, live[mine].tolist(), place[mine].tolist()):
                if good and at < size:
                    groups.append(group)
                    places.append(at)
            failed += sum(int(group.rewards.isnan().sum()) for group in drawn)
            judged += sum(group.rewards.numel() for group in drawn)
            found += int(live.sum())
            if found >= size:
                break
        self.failed, self.judged = run.sum([failed, judged])
        if not self.rollout.sampler:
            self.rollout.prefixes.clear()  # the weights are about to move
        full = found >= size
        return Responses(groups, places, len(self.rewards), run.device) if full else None, number + 1

    @property
    def too_many_failed(self):
        """Did more of the last step's rewards fail than --max-failed allows?"""
        return self.failed > self.config.max_failed * self.judged

    def complaint(self):
        """Why the run cannot go on from the last step's groups."""
        if self.too_many_failed:
            found = f"{self.failed:.0f} of {self.judged:.0f} rewards raised, hung or were no number"
            return f"{found}, expected at most --max-failed {self.config.max_failed}"
        found = f"no {self.config.batch_size} groups with right and wrong responses"
        return f"{found} in {self.tries} batches (--dynamic-tries)"


def judge(group, rewards, processor, seconds):
    """The group with the rewards of its responses, (G+K,F) float64, NaN where one raised, hung or was no number."""
    prompt = processor.decode(group.prompt.input_ids.tolist())
    texts = [processor.decode(response.tokens) for response in group.responses]
    found = [[guarded(function, prompt, text, group.item, seconds) for _, function, _ in rewards] for text in texts]
    return replace(group, rewards=torch.tensor(found, dtype=torch.float64))


def right_and_wrong(group):
    """Does the first reward, accuracy, tell the responses apart? The total would let well-formed wrong groups pass."""
    return bool(group.rewards[:, 0].nan_to_num().unique().numel() > 1)


class Responses:
    """The responses of this rank's groups, flat: N of them, in the order of the groups.

    places: of each group in the step, over all ranks. ids, aware, lengths (N,): group, was P in the prompt, tokens.
    rewards (N,F) float64, NaN where one failed. mask, sampled (N,R): 1 on tokens; their log-probability when sampled.
    """

    def __init__(self, groups, places, n_rewards, device):
        self.groups, self.places = groups, torch.tensor(places, dtype=torch.long)
        self.rows = [(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))]
        self.list = [groups[g].responses[i] for g, i in self.rows]
        self.ids = torch.tensor([g for g, _ in self.rows], dtype=torch.long)
        self.aware = torch.tensor([groups[g].aware[i] for g, i in self.rows], dtype=torch.bool)
        nothing = torch.zeros(0, n_rewards, dtype=torch.float64)  # of a rank that has no live group
        self.rewards = torch.cat([nothing, *(group.rewards for group in groups)])
        self.lengths = torch.tensor([len(response.tokens) for response in self.list], dtype=torch.long)
        self.mask = (torch.arange(max([1, *self.lengths.tolist()])) < self.lengths[:, None]).float().to(device)
        self.sampled = torch.zeros_like(self.mask)
        for row, response in zip(self.sampled, self.list):
            row[: len(response.tokens)] = torch.tensor(response.logprobs)

    def read(self, model, rows, temperature, shared_prefix, pad_id, policy=False):
        """log pi (n,R) of the responses `rows` behind x, or behind (P, x); entropies (M,) and hidden states (M,D)."""
        groups = {}  # those of one prompt together
        for n in rows:
            groups.setdefault(self.rows[n][0], []).append(self.list[n].tokens)
        prompts = [self.groups[g].policy_prompt if policy else self.groups[g].prompt for g in groups]
        batch = lay_out(model, prompts, list(groups.values()), shared_prefix, pad_id).to(self.mask.device)
        hidden, words = learned_hidden(model, batch), batch.labels.flatten()[batch.index]
        logp, entropy = linear_logprob(hidden, model.head_weight, words, temperature=temperature, return_entropy=True)
        return self.spread(rows, logp), entropy, hidden

    def spread(self, rows, values):
        """Values of the tokens of some rows one after the other, (M,) -> (n,R)."""
        mask = self.mask[rows].bool()
        return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)


class Replay:
    """Items of other policies, theirs in the prompt, whose supervised loss joins each step: a reader stays one."""

    def __init__(self, config, run, processor):
        self.config, self.run, self.pad_id = config, run, processor.pad_id
        self.examples = Examples(config.replay, config.replay_split, processor, config, policy_in_prompt=True)

    def __call__(self, model, step):
        """Add the gradient of --replay-weight times their loss to the model's."""
        config, run = self.config, self.run
        chosen = batches(len(self.examples), replayed_items(config), config.seed + 1, step, run.rank, run.world)
        parts = run.micro_batches([self.examples.read(step, i) for i in chosen])
        parts = [(collate(*zip(*part), pad_id=self.pad_id), weight) for part, weight in parts]
        likelihood(run, model, parts, config.replay_weight)
