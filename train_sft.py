"""Stage 2, CoT-SFT: answer without the policy in the prompt, and reason in its terms before answering.

    L = -1/|O| sum_{o in O} log p(o_t | Q, I, o_<t),     response o = [C; A]

with O the response tokens of the global batch: neither prompt nor picture carries loss, and the policy P is not there.
LoRA of rank 8 by default, as in the paper. Options that leave it: --answer-only is its "direct SFT" baseline,
--policy-in-prompt trains with the policy that the test takes away, --replay DIR fills a share of each batch with other
policies' items, their policy in the prompt, so that the model keeps following policies in its prompt.

    python train_sft.py --model M --init runs/cpt --data data/clevr --out runs/sft
    torchrun --nproc_per_node 4 train_sft.py ...          the same result on any number of ranks
"""

from dataclasses import dataclass

import torch

from data import InputError, command
from data.dataset import load_items, load_policies, messages, target
from support.batching import Ahead, batches, collate, mixture, replayed_items, share, token_logprobs
from support.config import VALIDATION_ITEMS, CommonConfig, option, parse, redefault
from support.metrics import tracker
from training import Run

# -- 1. options (the rest of them: support/config.py) ------------------------------------------------------------------


@dataclass
class Config(CommonConfig):
    """the method"""

    split: str = redefault(CommonConfig, "split", "sft.jsonl")
    full: bool = redefault(CommonConfig, "full", False)
    lr: float = redefault(CommonConfig, "lr", 1e-4)
    batch_size: int = redefault(CommonConfig, "batch_size", 64)
    epochs: float = redefault(CommonConfig, "epochs", 5.0)
    answer_only: bool = option(False, "learn the answer without its chain of thought: direct SFT")
    policy_in_prompt: bool = option(False, "put each item's policy in its prompt")


# -- 2. what is learned ------------------------------------------------------------------------------------------------


class Examples:
    """A file of items as (prompt: Encoded, response: token ids, None): what is read, and what is learned."""

    def __init__(self, folder, split, processor, config, policy_in_prompt=False):
        self.folder, self.split = folder, split
        self.policies = load_policies(folder, config.media)
        self.items = load_items(folder, split, self.policies, config.media)
        self.processor, self.config, self.policy_in_prompt = processor, config, policy_in_prompt

    def source(self):
        """What Run.examine looks at."""
        return self.folder, {self.split: self.items}, self.policies, "with" if self.policy_in_prompt else "without"

    def __len__(self):
        return len(self.items)

    def size(self, i):
        """Characters: near enough to tokens for dealing out work evenly."""
        policy = self.policies.get(self.items[i]["policy"]) if self.policy_in_prompt else None
        return (
            len(policy["text"] if policy else "") + len(self.items[i]["question"]) + len(self.items[i].get("cot", ""))
        )

    def encode(self, step, i):
        """Item i, the same in every step."""
        item = self.items[i]
        policy = self.policies.get(item["policy"]) if self.policy_in_prompt else None
        prompt = self.processor.encode(messages(item, policy), add_generation_prompt=True)
        response = response_ids(self.processor, target(item, cot=not getattr(self.config, "answer_only", False)))
        check_length(item, "prompt", prompt.input_ids, self.config.max_prompt, prompt)
        check_length(item, "response", response, self.config.max_response)
        return prompt, response, None


def response_ids(processor, text):
    """A response in tokens, ended as the model has to end it: with the token that stops generation."""
    return processor.tokens(text) + [processor.stop_ids[0]]


def check_length(item, what, ids, most, prompt=None):
    """Never cut a sequence: name the item that is too long, and the pictures (of `prompt`: Encoded) in it."""
    if len(ids) > most:
        found = f"found a {what} of {len(ids)} tokens"
        if prompt and prompt.image_tokens:
            found += f", {prompt.image_tokens} of them of pictures (--max-pixels makes these smaller)"
        raise InputError(f"item {item['id']}: {found}, expected at most --max-{what} {most}")


# -- 3. the loss of stages 1 and 2 -------------------------------------------------------------------------------------


def likelihood(run, model, parts, weight=1.0):
    """Add the gradient of weight * L to the model's, L = -1/n sum_t log p(x_t | x_<t) over the n learned tokens of all
    ranks' micro-batches -> (L, n, tokens read), each over all ranks. parts: [Batch].
    """
    counts = [(len(batch.index), int(batch.attention_mask.sum())) for batch in parts]
    learned, seen = run.sum([sum(count) for count in zip(*counts)] or [0, 0])
    loss = 0.0
    for batch in parts:
        with run.autocast():
            logp, _ = token_logprobs(model, batch.to(run.device))  # (L,)
        part = -logp.sum() / max(learned, 1)
        (weight * part).backward()
        loss += part.detach()
    return run.sum(loss), int(learned), seen


def reader(run, own, replay, pad_id):
    """step -> [Batch]: this rank's micro-batches of an update, of own items and of those to replay.

    own, replay: have len(), size(i) and encode(step, i) -> (prompt, target, learn) as collate takes them.
    """

    def keys(step):
        chosen = mixture(step, len(own), len(replay), run.config)
        sizes = [(replay if replayed else own).size(i) for replayed, i in chosen]
        return [(step, *key) for key in share(chosen, sizes, run.rank, run.world)]

    rows = Ahead(keys, lambda step, replayed, i: (replay if replayed else own).encode(step, i), run.workers)
    return lambda step: micro_batches(run, run.together(lambda: rows(step)), pad_id)


def micro_batches(run, rows, pad_id):
    """A rank's rows (prompt, target, learn) as [Batch], those of one length together, see Run.micro_batches."""
    length = lambda row: len(row[0].input_ids) + len(row[1])
    parts = run.micro_batches(sorted(rows, key=length), lambda part: len(part) * max(map(length, part)))
    return [collate(*zip(*part), pad_id=pad_id) for part in parts]


class Replay:
    """Items of other policies, each with its policy in the prompt, whose supervised loss joins each step of RL."""

    def __init__(self, config, run, processor):
        self.config, self.run, self.pad_id = config, run, processor.pad_id
        self.examples = Examples(config.replay, "sft.jsonl", processor, config, policy_in_prompt=True)
        run.examine(processor, *self.examples.source(), what="the items to replay")

    def __call__(self, model, step, part=0, parts=1):
        """Add the gradient of their loss to the model's: of those of a step, update number `part` of `parts`."""
        config, run = self.config, self.run
        chosen = batches(len(self.examples), replayed_items(config), config.seed + 1, step)[part::parts]
        chosen = chosen[run.rank :: run.world]
        rows = [self.examples.encode(step, i) for i in chosen]
        likelihood(run, model, micro_batches(run, rows, self.pad_id))


@torch.no_grad()
def held_out_loss(run, model, items, pad_id):
    """L of items that are not learned, over all ranks. items: see `reader`; the first VALIDATION_ITEMS of them."""
    mine = range(run.rank, min(len(items), VALIDATION_ITEMS), run.world)
    total, learned = torch.zeros((), dtype=torch.float64), 0
    for batch in micro_batches(run, [items.encode(0, i) for i in mine], pad_id):
        with run.autocast():
            logp, _ = token_logprobs(model, batch.to(run.device))  # (L,)
        total, learned = total - logp.double().sum().cpu(), learned + len(logp)
    total, learned = run.sum([float(total), learned])
    return total / learned


# -- 4. train ----------------------------------------------------------------------------------------------------------


def learn(run, model, processor, own, held_out=None):
    """The loop of stages 1 and 2: read a global batch, add up gradients, update, report. own: see `reader`.

    held_out: likewise, items whose loss is reported every --validate-every steps; the best checkpoint stays.
    """
    config, track = run.config, tracker(run.config, run)
    replay = config.replay and Examples(config.replay, "sft.jsonl", processor, config, True)
    run.examine(processor, *own.source())
    if replay:
        run.examine(processor, *replay.source(), what="the items to replay")
    read = reader(run, own, replay, processor.pad_id)
    optimizer = run.optimizer(model)
    steps = run.total_steps(len(own), config.batch_size - replayed_items(config))

    for step in run.steps(model, optimizer, steps):
        with run.phase("read"):
            parts = read(step)
        with run.phase("learn"):
            loss, tokens, seen = likelihood(run, model, parts)  # L and its number of tokens, over all ranks
            run.reduce_gradients(model)
            grad_norm = run.update(model, optimizer, step, steps)
        metrics, score = {"loss": loss, "grad_norm": grad_norm, "tokens": tokens}, None
        if held_out and ((step + 1) % config.validate_every == 0 or step + 1 == steps):
            with run.phase("validate"), run.gathered(model):
                metrics["validation_loss"] = held_out_loss(run, model, held_out, processor.pad_id)
            score = -metrics["validation_loss"]
        run.report(step, metrics, seen)
        track(step, metrics)
        run.checkpoint(step + 1, model, optimizer, score=score)
    run.finish(model)


def train(config):
    with Run(config, stage="sft") as run:
        model, processor = run.load()
        examples = lambda split: Examples(config.data, split, processor, config, config.policy_in_prompt)
        held_out = examples(config.validation) if config.validate_every else None
        learn(run, model, processor, examples(config.split), held_out)


def main(argv=None):
    train(parse(Config, __doc__, argv))


if __name__ == "__main__":
    command(main)
