"""From a query to the tensors of a step: groups of responses, sampled with the policy in the prompt and without.

    1. PolicyRollout   o_1 .. o_G ~ pi(. | x),  o_G+1 .. o_G+K ~ pi(. | P, x):  one group
    2. judge           each reward function on each response
    3. Sampler         queries -> groups -> rewards; with dynamic sampling until enough groups can teach something
    4. Responses       what came of it on this rank as tensors, and their log-probabilities given x alone

x = (Q, I) is the query with its pictures, P the policy. How tokens are drawn: support/engine.py. Axes: model.py.
"""

from dataclasses import dataclass, replace

import torch

import model as qwen
from data import InputError
from data.dataset import messages
from data.rewards import score
from kernels.logprob import linear_logprob
from support.batching import Ahead, batches, lay_out, learned_hidden, read_together, rng
from support.config import option
from support.dialogue import Dialogues, as_judged
from support.engine import common_length, sample
from support.judging import MAX_FAILED, complaint
from support.metrics import Means, is_right


@dataclass
class Sampling:
    """sampling"""

    temperature: float = option(1.0, "of sampling, and of the log-probabilities in the loss", least=0.01)
    budget: int = option(0, "tokens of prompts and responses that sampling holds; 0: what memory allows", least=0)


# -- 1. PolicyRollout --------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The responses to one query, all learned as responses to x: G written without the policy, then K with it."""

    item: dict
    prompt: qwen.Encoded  # x
    policy_prompt: qwen.Encoded | None  # (P, x)
    responses: list  # engine.Response, G + K
    aware: list  # bool per response: written with the policy in the prompt
    rewards: torch.Tensor | None = None  # (G+K,F) float64, once judged


class PolicyRollout:
    """G responses to x and K to (P, x) make one group; the loss reads all of them given x alone. K = 0 is plain GRPO.

    max_prompt: tokens; a longer prompt is an InputError. sampling: further arguments of `sample`.
    sampler: another model that writes the policy-aware half; a frozen one reads each policy once per run.
    keep_policy_prompts: groups carry (P, x) even where K = 0, for a teacher that reads it.
    environment: of data/tools.py, for dialogues. options: the run's config, for a variant, as is `policy_prompt`.
    """

    def __init__(
        self,
        processor,
        policies,
        G,
        K,
        *,
        max_prompt=1 << 30,
        sampler=None,
        keep_policy_prompts=False,
        environment=None,
        options=None,
        **sampling,
    ):
        self.processor, self.policies, self.G, self.K, self.max_prompt = processor, policies, G, K, max_prompt
        self.sampler, self.keep_policy_prompts, self.options = sampler, keep_policy_prompts, options
        self.dialogues = Dialogues(environment, processor)
        self.sampling = {"stop_ids": processor.stop_ids, "banned_ids": processor.banned_ids, **sampling}
        self.prefixes = {}  # keys and values of policies; to be emptied when the weights move
        self.scaled = {}  # policies with their pictures scaled, and alone in a prompt: {name: (policy, Encoded)}

    def __call__(self, model, items, seeds):
        """Groups of items (data.dataset), with seeds [[int]] of G + K responses each."""
        scaled = [self.scale(item) for item in items]  # each picture is decoded once, for x and for (P, x)
        x = [self.prompt(item) for item in scaled]
        P_x = [self.policy_prompt(*pair) for pair in zip(scaled, x)] if self.K or self.keep_policy_prompts else []

        aware = [False] * self.G + [True] * self.K
        plain_seeds, aware_seeds = [s[: self.G] for s in seeds], [s[self.G :] for s in seeds]
        if self.K and not self.sampler:  # the model writes both halves: one call keeps more rows busy
            counts = [self.G] * len(x) + [self.K] * len(x)
            shared = self.shared(items, P_x, [0] * len(x)) | self.dialogues(items * 2)
            both = sample(model, x + P_x, counts, seeds=plain_seeds + aware_seeds, **shared, **self.sampling)
            responses = [o + o_aware for o, o_aware in zip(both[: len(x)], both[len(x) :])]
        else:
            responses = sample(model, x, self.G, seeds=plain_seeds, **self.dialogues(items), **self.sampling)
        if self.K and self.sampler:
            shared = self.shared(items, P_x) | self.dialogues(items)
            own = sample(self.sampler, P_x, self.K, seeds=aware_seeds, **shared, **self.sampling)
            responses = [o + o_aware for o, o_aware in zip(responses, own)]
        return [  # with the items as they were given, without patches
            Group(item["given"], prompt, policy_prompt, written, aware)
            for item, prompt, policy_prompt, written in zip(scaled, x, P_x or [None] * len(x), responses)
        ]

    def policy_prompt(self, item, x):
        """What the other half sees, Encoded: the policy, then the query. x: the prompt without it."""
        return self.prompt(item, self.policy(item)[0])

    def greedy(self, model, items, policy_in_prompt=False):
        """[(prompt, best Response)] to items, without the policies or with them in the prompt."""
        prompts = [self.prompt(item, self.policy(item)[0] if policy_in_prompt else None) for item in items]
        shared = (self.shared(items, prompts) if policy_in_prompt else {}) | self.dialogues(items)
        responses = sample(model, prompts, 1, **{**self.sampling, **shared, "prefixes": None, "temperature": 0.0})
        return [(prompt, response) for prompt, (response,) in zip(prompts, responses)]

    # -- prompts

    def prompt(self, item, policy=None):
        """The item's prompt as the model reads it, Encoded, with a policy in front where one is given."""
        prompt = self.processor.encode(self.dialogues.chat(messages(item, policy)), add_generation_prompt=True)
        if len(prompt.input_ids) > self.max_prompt:
            found = f"found a prompt of {len(prompt.input_ids)} tokens, {prompt.image_tokens} of them of pictures"
            found += " (--max-pixels makes these smaller)" * bool(prompt.image_tokens)
            raise InputError(f"item {item['id']}: {found}, expected at most --max-prompt {self.max_prompt}")
        return prompt

    def policy(self, item):
        """The item's policy with its pictures scaled, and the prompt that holds nothing else; read once per run."""
        name = item["policy"]
        if name not in self.scaled:
            policy = self.scale(self.policies[name]) if name else None
            alone = self.processor.encode(self.dialogues.chat(messages({"images": [], "question": ""}, policy)))
            self.scaled[name] = policy, alone
        return self.scaled[name]

    def scale(self, entry):
        """An item or policy with its pictures decoded and scaled: (patches, grid) for each path; `given`: as it was."""
        pictures = [p if isinstance(p, tuple) else self.processor.images([qwen.open_image(p)]) for p in entry["images"]]
        return {**entry, "images": pictures, "given": entry.get("given", entry)}

    def shared(self, items, prompts, before=()):
        """What `sample` reads once: the tokens that each prompt shares with its policy alone; `before`: of others."""
        lengths = [common_length(prompt, self.policy(item)[1]) for item, prompt in zip(items, prompts)]
        return {"shared": [*before, *lengths], "prefixes": self.prefixes}


# -- 2. judge ----------------------------------------------------------------------------------------------------------


def judge(groups, rewards, processor):
    """The groups with the rewards of their responses, (G+K,F) float64, NaN where one raised, hung or was no number."""
    prompts = [processor.decode(group.prompt.input_ids.tolist()) for group in groups for _ in group.responses]
    texts, items = as_judged(processor, [(group.item, o) for group in groups for o in group.responses])
    found = torch.tensor(score(rewards, prompts, texts, items), dtype=torch.float64)  # (B,F)
    parts = found.split([len(group.responses) for group in groups]) if groups else []
    return [replace(group, rewards=part) for group, part in zip(groups, parts)]


def right_and_wrong(group):
    """Does the first reward, accuracy, tell the responses apart? The total would let well-formed wrong groups pass.

    A response with a reward that failed is not learned from, and so tells nothing.
    """
    judged = ~group.rewards.isnan().any(1)  # (G+K,)
    return group.rewards[judged, 0].unique().numel() > 1


# -- 3. sampler --------------------------------------------------------------------------------------------------------


class Sampler:
    """Sample and judge: PolicyRollout on the next queries; with dynamic sampling, until enough groups teach something.

    rewards: [(name, function, weight)]; tries: draws at most of dynamic sampling, 0 without it.
    """

    def __init__(self, config, run, model, rollout, items, rewards, tries):
        self.config, self.run, self.model, self.rollout = config, run, model, rollout
        self.items, self.rewards, self.tries = items, rewards, tries
        self.size = min(config.mini_batch or config.batch_size, config.batch_size) if tries else config.batch_size
        self.scaled = Ahead(self.queries, rollout.scale, run.workers)  # a draw ahead

    def queries(self, number):
        """This rank's items of draw `number`: [(item,)]."""
        share = dict(rank=self.run.rank, world=self.run.world, whole=True)
        return [(self.items[i],) for i in batches(len(self.items), self.size, self.config.seed, number, **share)]

    def draw(self, number):
        """This rank's queries of draw `number`, sampled and judged -> [Group]."""
        config, run, rollout = self.config, self.run, self.rollout
        places = range(run.rank, self.size, run.world)  # in the draw: a query that comes twice has other responses
        seeds = [rng(config.seed, number, p).integers(2**62, size=rollout.G + rollout.K).tolist() for p in places]
        with run.phase("read"):
            queries = run.together(lambda: self.scaled(number))

        def work():
            with run.phase("sample"), run.gathered(self.model), run.gathered(rollout.sampler or self.model):
                groups = rollout(self.model, queries, seeds)
            with run.phase("judge"):
                return judge(groups, self.rewards, rollout.processor)

        return run.together(work)

    def __call__(self, cursor):
        """A step's groups, from draw number `cursor` on -> (Responses | None where they do not suffice, next cursor).

        Dynamic sampling (tries > 0) keeps groups with both right and wrong responses, and draws on until --batch-size
        of them are found. The ranks tell each other which queries have one, a sum of zeros and ones, and so number them
        alike: the first --batch-size are the step, on any number of ranks. `drawn` tells of all that was drawn.
        """
        size, run, mine = self.config.batch_size, self.run, slice(self.run.rank, None, self.run.world)
        groups, places, found, means = [], [], 0, Means("failed drawn_accuracy drawn_accuracy_aware drawn_dead_groups")
        for number in range(cursor, cursor + max(self.tries, 1)):
            drawn = self.draw(number)
            live = torch.zeros(self.size)  # (queries of the draw,)
            live[mine] = torch.tensor([float(not self.tries or right_and_wrong(group)) for group in drawn])
            live = torch.tensor(run.sum(live.tolist()))  # now of all ranks
            place = (found + live.cumsum(0) - live).long()  # (queries,) where in the step each live one stands
            for group, good, at in zip(drawn, live[mine].tolist(), place[mine].tolist()):
                if good and at < size:
                    groups.append(group)
                    places.append(at)
            for group in drawn:
                right, aware = is_right(group.rewards), torch.tensor(group.aware)
                means.add("failed", group.rewards.isnan())
                means.add("drawn_accuracy", right, ~aware)
                means.add("drawn_accuracy_aware", right, aware)
                means.add("drawn_dead_groups", torch.tensor(not right_and_wrong(group)))
            found += int(live.sum())
            if found >= size:
                break
        told = means.over(run)
        self.drawn = {**told, "draws": number + 1 - cursor} if self.tries else {"failed": told["failed"]}
        if not self.rollout.sampler:
            self.rollout.prefixes.clear()  # the weights are about to move
        return Responses(groups, places, len(self.rewards), run.device) if found >= size else None, number + 1

    @property
    def too_many_failed(self):
        """Did more of the last step's rewards fail than MAX_FAILED allows?"""
        return self.drawn["failed"] > MAX_FAILED

    def complaint(self):
        """Why the run cannot go on from the last step's groups."""
        if self.too_many_failed:
            found = f"found a share of {self.drawn['failed']:.3g} of the rewards that failed ({complaint()})"
            return f"{found}, expected at most a share of {MAX_FAILED}"
        found = f"no {self.config.batch_size} groups with right and wrong responses"
        dead = f"a share of {self.drawn['drawn_dead_groups']:.3g} was all right or all wrong"
        return f"{found} in {self.tries} draws of {self.size} queries (--dynamic-tries): {dead}"


# -- 4. responses ------------------------------------------------------------------------------------------------------


class Responses:
    """The responses of this rank's groups, if it has any, as tensors: B, of R tokens at most, in the groups' order.

    places: of each group in the step, over all ranks. ids, aware, lengths (B,): group, was P in the prompt, tokens.
    rewards (B,F) float64, NaN where one failed. mask (B,R): 1 where a response has written a token, not read it.
    logp_sampler (B,R): log-probabilities when sampled, given (P, x) where aware; logp_old (B,R), once the learner has
    read them: of the model before its updates, given x. A, kept (B,), once it has given credit: advantages, and which
    are learned from.
    """

    def __init__(self, groups, places, n_rewards, device):
        self.groups, self.places = groups, torch.tensor(places, dtype=torch.long)
        self.rows = [(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))]
        self.list = [groups[g].responses[i] for g, i in self.rows]
        self.ids = torch.tensor([g for g, _ in self.rows], dtype=torch.long)
        self.aware = torch.tensor([groups[g].aware[i] for g, i in self.rows], dtype=torch.bool)
        self.rewards = torch.cat([torch.zeros(0, n_rewards, dtype=torch.float64), *(group.rewards for group in groups)])
        mask = torch.zeros(len(self.list), max([1, *(len(response.tokens) for response in self.list)]))
        logp_sampler = torch.zeros_like(mask)
        for row, logp, response in zip(mask, logp_sampler, self.list):
            row[: len(response.tokens)] = response.written
            logp[: len(response.tokens)] = torch.tensor(response.logprobs)
        self.lengths = mask.sum(1).long()
        self.mask, self.logp_sampler = mask.to(device), logp_sampler.to(device)
        self.logp_old = self.A = self.kept = None

    def pairs(self, rows, with_policy=False):
        """{n: (prompt: Encoded, Response)} of the responses n in `rows`, the policy in the prompt or not."""
        prompt = "policy_prompt" if with_policy else "prompt"
        return {n: (getattr(self.groups[self.rows[n][0]], prompt), self.list[n]) for n in rows}

    def micro_batches(self, run, model, which, with_policy=False):
        """The responses marked in `which` (B,) as lists of rows read together, behind (P, x) if `with_policy`."""
        return read_together(run, model, self.pairs(which.nonzero()[:, 0].tolist(), with_policy))

    def take(self, rows):
        """The responses `rows` as a MicroBatch, on the device."""
        mask = self.mask[rows]
        aware, A = (x[rows, None].to(mask.device) for x in (self.aware, self.A))
        logp_old = None if self.logp_old is None else self.logp_old[rows]
        return MicroBatch(self, rows, mask, aware, A.to(mask.dtype), self.logp_sampler[rows], logp_old)


@dataclass
class MicroBatch:
    """b responses and what an objective may use of them; logp_old is that of now where there is one update only.

    b may be 0: under FSDP a rank with fewer micro-batches than another reads along.
    """

    data: Responses
    rows: list  # which responses of the step
    mask: torch.Tensor  # (b,R) 1 where a response has written a token
    aware: torch.Tensor  # (b,1) bool: written with the policy in the prompt
    A: torch.Tensor  # (b,1) advantages
    logp_sampler: torch.Tensor  # (b,R) when sampled, given (P, x) where aware, else x
    logp_old: torch.Tensor | None  # (b,R) before the step's updates, given x
    logp: torch.Tensor | None = None  # (b,R) now, given x: what has a gradient
    entropy: torch.Tensor | None = None  # (b,R) without one
    hidden: torch.Tensor | None = None  # (L,D) the states that predict the tokens
    kl: torch.Tensor | None = None  # (b,R) to the start model, where the objective has it

    def read(self, model, temperature, pad_id, with_policy=False):
        """log pi (b,R) of the responses given x, or given (P, x); entropies (b,R) and hidden states (L,D)."""
        batch = lay_out(model, [*self.data.pairs(self.rows, with_policy).values()], pad_id).to(self.mask.device)
        hidden, tokens = learned_hidden(model, batch), batch.labels.flatten()[batch.index]  # (L,D), (L,)
        if actions := [action for row in self.rows for action in self.data.list[row].actions or ()]:
            tokens = tokens.new_tensor(actions)  # these were drawn, and the words followed: model.Decoder
        how = dict(temperature=temperature, return_entropy=True, vocabulary=model.vocabulary)
        logp, entropy = linear_logprob(hidden, model.head_weight, tokens, **how)
        return self.spread(logp), self.spread(entropy), hidden

    def spread(self, values):
        """Values of all tokens one after another, (L,) -> (b,R)."""
        return torch.zeros_like(self.mask, dtype=values.dtype).masked_scatter(self.mask.bool(), values)
