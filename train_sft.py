"""Stage 2, CoT-SFT: answer without the policy in the prompt, and think in its words before answering.

    L = -1/|O| sum_{o in O} log p(o_t | Q, I, o_<t),     response o = [C; A]

with O the response tokens of the global batch: neither prompt nor picture carries loss, and the policy P is not there.
LoRA of rank 8 by default, as in the paper. Options that leave it: --answer-only is its "direct SFT" baseline,
--policy-in-prompt trains with the policy that the test takes away, --replay DIR fills a share of each batch with other
policies' items, their policy in the prompt, so that the model does not forget how to read one.

    python train_sft.py --model M --init runs/cpt --data data/clevr --out runs/sft
    torchrun --nproc_per_node 4 train_sft.py ...          the same result on any number of ranks
"""

from dataclasses import dataclass

from data import InputError, command
from data.dataset import load_items, load_policies, messages, target
from training import CommonConfig, Run, likelihood, option, parse, reader, redefault, replayed_items

# -- 1. config (the rest of it: training.CommonConfig) ----------------------------------------------------------------


@dataclass
class Config(CommonConfig):
    split: str = redefault(CommonConfig, "split", "sft.jsonl")
    full: bool = redefault(CommonConfig, "full", False)
    lr: float = redefault(CommonConfig, "lr", 1e-4)
    batch_size: int = redefault(CommonConfig, "batch_size", 64)
    epochs: float = redefault(CommonConfig, "epochs", 5.0)
    answer_only: bool = option(False, "learn the answer without its chain of thought: direct SFT")
    policy_in_prompt: bool = option(False, "put each item's policy in its prompt")


# -- 2. what is learned -----------------------------------------------------------------------------------------------


class Examples:
    """A file of items as (prompt: Encoded, response: token ids, None): what the model reads, and what it shall say."""

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

    def read(self, step, i):
        """Item i, the same in every step."""
        item = self.items[i]
        policy = self.policies[item["policy"]] if self.policy_in_prompt else None
        prompt = self.processor.encode(messages(item, policy), add_generation_prompt=True)
        response = response_ids(self.processor, target(item, cot=not getattr(self.config, "answer_only", False)))
        check_length(item, "prompt", prompt.input_ids, self.config.max_prompt)
        check_length(item, "response", response, self.config.max_response)
        return prompt, response, None


def response_ids(processor, text):
    """A response in tokens, ended as the model has to end it: with the token that stops generation."""
    return processor.tokenizer.encode(text, add_special_tokens=False).ids + [processor.stop_ids[0]]


def check_length(item, what, ids, most):
    """Never cut a sequence: name the item that is too long."""
    if len(ids) > most:
        found = f"found a {what} of {len(ids)} tokens"
        raise InputError(f"item {item['id']}: {found}, expected at most --max-{what} {most}")


# -- 3. train ---------------------------------------------------------------------------------------------------------


def train(config):
    with Run(config, stage="sft") as run:
        model, processor = run.load()
        own = Examples(config.data, config.split, processor, config, config.policy_in_prompt)
        replay = config.replay and Examples(config.replay, config.replay_split, processor, config, True)
        read = reader(run, own, replay, processor.pad_id)
        optimizer = run.optimizer(model)
        steps = run.total_steps(len(own), config.batch_size - replayed_items(config))

        for step in run.steps(model, optimizer, steps):
            with run.phase("read"):
                parts = read(step)
            with run.phase("learn"):
                loss, tokens, seen = likelihood(run, model, parts)  # L and |O|, over all ranks
                run.reduce_gradients(model)
                grad_norm = run.update(model, optimizer, step, steps)
            run.report(step, {"loss": loss, "grad_norm": grad_norm, "tokens": tokens}, seen)
            run.checkpoint(step + 1, model, optimizer)
        run.finish(model)


def main(argv=None):
    train(parse(Config, __doc__, argv))


if __name__ == "__main__":
    command(main)
