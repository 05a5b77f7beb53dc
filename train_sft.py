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

from data import InputError, command
from data.dataset import load_items, load_policies, messages, target
from support.batching import Ahead, batches, collate, mixture, replayed_items, share, token_logprobs
from support.config import CommonConfig, option, parse, redefault
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
        self.policies = load_policies(folder)
        self.items = load_items(folder, split, self.policies)
        self.processor, self.config, self.policy_in_prompt = processor, config, policy_in_prompt

    def __len__(self):
        return len(self.items)

    def size(self, i):
        """Characters: near enough to tokens for dealing out work evenly."""
        policy = self.policies[self.items[i]["policy"]]["text"] if self.policy_in_prompt else ""
        return len(policy) + len(self.items[i]["question"]) + len(self.items[i].get("cot", ""))

    def encode(self, step, i):
        """Item i, the same in every step."""
        item = self.items[i]
        policy = self.policies[item["policy"]] if self.policy_in_prompt else None
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
    return lambda step: [collate(*zip(*part), pad_id=pad_id) for part in run.micro_batches(rows(step))]


class Replay:
    """Items of other policies, each with its policy in the prompt, whose supervised loss joins each step of RL."""

    def __init__(self, config, run, processor):
        self.config, self.run, self.pad_id = config, run, processor.pad_id
        self.examples = Examples(config.replay, "sft.jsonl", processor, config, policy_in_prompt=True)

    def __call__(self, model, step, part=0, parts=1):
        """Add the gradient of their loss to the model's: of those of a step, update number `part` of `parts`."""
        config, run = self.config, self.run
        chosen = batches(len(self.examples), replayed_items(config), config.seed + 1, step)[part::parts]
        chosen = chosen[run.rank :: run.world]
        parts = run.micro_batches([self.examples.encode(step, i) for i in chosen])
        likelihood(run, model, [collate(*zip(*part), pad_id=self.pad_id) for part in parts])


# -- 4. train ----------------------------------------------------------------------------------------------------------


def learn(run, model, processor, own):
    """The loop of stages 1 and 2: read a global batch, add up gradients, update, report. own: see `reader`."""
    config = run.config
    replay = config.replay and Examples(config.replay, "sft.jsonl", processor, config, True)
    micro_batches = reader(run, own, replay, processor.pad_id)
    optimizer = run.optimizer(model)
    steps = run.total_steps(len(own), config.batch_size - replayed_items(config))

    for step in run.steps(model, optimizer, steps):
        with run.phase("read"):
            parts = micro_batches(step)
        with run.phase("learn"):
            loss, tokens, seen = likelihood(run, model, parts)  # L and its number of tokens, over all ranks
            run.reduce_gradients(model)
            grad_norm = run.update(model, optimizer, step, steps)
        run.report(step, {"loss": loss, "grad_norm": grad_norm, "tokens": tokens}, seen)
        run.checkpoint(step + 1, model, optimizer)
    run.finish(model)


def train(config):
    with Run(config, stage="sft") as run:
        model, processor = run.load()
        own = Examples(config.data, config.split, processor, config, config.policy_in_prompt)
        learn(run, model, processor, own)


def main(argv=None):
    train(parse(Config, __doc__, argv))


if __name__ == "__main__":
    command(main)
