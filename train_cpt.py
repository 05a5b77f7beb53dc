"""Stage 1, VM-CPT: visually masked continual pre-training puts the policy itself into the weights.

    x = (P_T, P_I, I, Q, C, A)          the item with its policy in front
    L = -1/(sum_t m_t) sum_t m_t log p(x_t | x_<t),          m_t = 1[x_t is no visual token]

Every text token is learned, the policy's above all; pictures are read but not predicted. sum_t m_t runs over the global
batch. Full fine-tuning by default, as in the paper. Whether the policy stands in front is the item's `kind`:

    applied             (P, I, Q, C, A): the paper's form
    document            P alone                                                       ours, off by default
    section, response   asked and answered without P: one section, or the whole policy in the form of responses    ours

    python train_cpt.py --model M --data data/clevr --out runs/cpt
    torchrun --nproc_per_node 8 train_cpt.py ...          the same result on any number of ranks
"""

from dataclasses import dataclass

import torch

from data import InputError, command
from data.dataset import KINDS, load_items, load_policies, messages, target
from support.batching import rng
from support.config import CommonConfig, option, parse, redefault
from train_sft import check_length, learn, response_ids
from training import Run

# -- 1. options (the rest of them: support/config.py) ------------------------------------------------------------------


@dataclass
class Config(CommonConfig):
    """the method"""

    split: str = redefault(CommonConfig, "split", "cpt.jsonl")
    epochs: float = redefault(CommonConfig, "epochs", 5.0)
    kinds: str = option("applied", f"kinds of items to learn, by commas: {', '.join(KINDS)}")
    mask_visual: float = option(
        1.0, "share of the visual tokens that m_t masks, drawn anew for each update; 1 is the paper's", least=0, most=1
    )


# -- 2. what is learned ------------------------------------------------------------------------------------------------


class Sequences:
    """A file of items as (prompt: Encoded, response: token ids, m: bool (T,)) over the whole sequence x."""

    def __init__(self, folder, split, processor, config):
        kinds = config.kinds.split(",")
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise InputError(f"--kinds: found {', '.join(unknown)!r}, expected some of {', '.join(KINDS)}, by commas")
        self.policies = load_policies(folder, config.media)
        items = load_items(folder, split, self.policies, config.media)
        self.items = [item for item in items if item.get("kind", "applied") in kinds]
        if not self.items:
            raise InputError(f"{folder}/{split}: found no items of the kinds {config.kinds}, expected at least one")
        self.folder, self.split, self.processor, self.config = folder, split, processor, config
        self.visual = torch.tensor([*processor.banned_ids])  # what a picture is made of, its two marks included

    def source(self):
        """What Run.examine looks at."""
        return self.folder, {self.split: self.items}, self.policies, "kind"

    def __len__(self):
        return len(self.items)

    def policy(self, item):
        """The policy in front of the item; None where it is asked without."""
        return self.policies.get(item["policy"]) if item.get("kind", "applied") in ("applied", "document") else None

    def size(self, i):
        """Characters: near enough to tokens for dealing out work evenly."""
        item, policy = self.items[i], self.policy(self.items[i])
        parts = [item.get(key, "") for key in ("question", "cot", "answer")] + ([policy["text"]] if policy else [])
        return sum(map(len, parts))

    def encode(self, step, i):
        """Item i with the mask of this step."""
        item = self.items[i]
        text = target(item)
        prompt = self.processor.encode(messages(item, self.policy(item)), add_generation_prompt=bool(text))
        response = response_ids(self.processor, text) if text else []
        check_length(item, "prompt", prompt.input_ids, self.config.max_prompt, prompt)
        check_length(item, "response", response, self.config.max_response)
        x = torch.cat([prompt.input_ids, torch.tensor(response, dtype=torch.long)])  # (T,)
        return prompt, response, self.mask(x, step, i)

    def mask(self, x, step, i):
        """m (T,) bool: 1 where x_t is learned. Visual tokens are not, but for the share that --mask-visual leaves."""
        m = ~torch.isin(x, self.visual)
        if self.config.mask_visual < 1:
            m |= torch.from_numpy(rng(self.config.seed, step, i).random(len(x)) >= self.config.mask_visual)
        return m


# -- 3. train ----------------------------------------------------------------------------------------------------------


def train(config):
    with Run(config, stage="cpt") as run:
        model, processor = run.load()
        sequences = lambda split: Sequences(config.data, split, processor, config)
        held_out = sequences(config.validation) if config.validate_every else None
        learn(run, model, processor, sequences(config.split), held_out)


def main(argv=None):
    train(parse(Config, __doc__, argv))


if __name__ == "__main__":
    command(main)
