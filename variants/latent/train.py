"""Stages 1 to 5 of latent actions; stage 6, RL of the policy alone, is train_rl.py --init the folder of stage 5.

    1  inverse learning   (1) on pairs                       trains inverse model, codebook, merge
    2  projectors         (5) on pairs                       P, P'
    3  joint              (1) and (6) on pairs and text      all of these
    4  cloning            (8) on pairs and text              the policy
    5  SFT                next token, the policy's best codes fed: the base's text blocks and head

Every stage starts from the one before with --init, stage 1 from a plain model. Pairs are items with a picture, text is
items without one; prompts carry no loss. Equations: variants/latent/actions.py.

    python -m variants.latent.train --stage 1 --model M --data data/captions --out runs/latent1
    python -m variants.latent.train --stage 3 --model M --init runs/latent2 --data data/captions --out runs/latent3
"""

import sys
from dataclasses import dataclass

import torch

from data import command
from model import Encoded
from support.batching import collate
from support.config import CommonConfig, option, parse, redefault, refuse
from train_sft import Examples, reader
from training import Run
from variants.latent import actions


@dataclass
class Config(CommonConfig):
    """latent actions"""

    split: str = redefault(CommonConfig, "split", "pairs.jsonl")
    text: str = option("text.jsonl", "stages 3 and 4: file of items without pictures, inside --data; empty: none")
    gate: str = option("", "file of items whose answers RL has to find: the end tells which share is in reach")
    codes: int = option(128, "stage 1: K, codes; fewer than the words at a place, or they only rename them", least=2)
    inverse_blocks: int = option(4, "stage 1: blocks of the inverse model", least=1)
    merge_blocks: int = option(2, "stage 1: layers of the merge", least=1)
    policy_blocks: int = option(8, "stage 1: blocks of the policy", least=1)
    keep_states: bool = option(False, "stages 1 to 4: keep the frozen base's states of all items; for small data")
    tau: float = option(2.0, "temperature of the Gumbel-softmax", above=0)
    balance: float = option(0.1, "weight of the term that keeps all codes in use", least=0)
    joint: float = option(1e-3, "stage 3: weight of (6) beside (1)", least=0)
    projector: bool = option(True, "read text through P; --no-projector: as it is")
    cycle: bool = option(True, "stage 3: (7) on text")
    train_vision: bool = redefault(CommonConfig, "train_vision", False)
    lr: float = redefault(CommonConfig, "lr", 1e-4)
    schedule: str = redefault(CommonConfig, "schedule", "cosine")
    batch_size: int = redefault(CommonConfig, "batch_size", 16)
    micro_batch: int = redefault(CommonConfig, "micro_batch", 16)


# -- 1. what is read ---------------------------------------------------------------------------------------------------


class Corpus:
    """Several Examples as one."""

    def __init__(self, *parts):
        self.where = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self):
        return len(self.where)

    def size(self, i):
        part, i = self.where[i]
        return part.size(i)

    def encode(self, step, i):
        part, i = self.where[i]
        return part.encode(step, i)


def paired(batch, image_id):
    """Which rows have a picture, bool (B,), and which of the L learned tokens stand in one, bool (L,)."""
    rows = (batch.input_ids == image_id).any(1)
    return rows, rows[batch.index // batch.input_ids.shape[1]]


def without_pictures(batch, rows, processor):
    """The rows marked in `rows` (B,) without their pictures, as a Batch; the learned tokens are the same."""
    drop = torch.tensor([processor.vision_start_id, processor.image_pad_id, processor.vision_end_id])
    prompts, learn = [], []
    for ids, labels, read in zip(batch.input_ids[rows], batch.labels[rows], batch.attention_mask[rows]):
        kept = (read == 1) & ~torch.isin(ids, drop)
        prompts.append(Encoded(ids[kept], None, None))
        learn.append(torch.cat([torch.tensor([False]), labels[:-1] != -100])[kept])
    return collate(prompts, [[]] * len(prompts), learn, pad_id=processor.pad_id)


# -- 2. the losses of a micro-batch ------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the modules read of a batch: e (B,T,D), turn, index, tokens (L,), and which of these have a picture (L,)."""

    e: torch.Tensor
    turn: tuple
    index: torch.Tensor
    tokens: torch.Tensor
    paired: torch.Tensor

    def at(self, x, shift=0):
        """States (L,...) of the places that predict the tokens; shift 1: of the tokens themselves."""
        return x.flatten(0, 1)[self.index + shift]


def look(model, batch, project):
    """The frozen base reads a batch, once where it stays; project: text is read through P."""
    rows, tokens = paired(batch, model.config.image_token_id)
    if not hasattr(batch, "states"):
        with torch.no_grad():
            batch.states = model.states(batch)
    h, turn = batch.states
    e = actions.embed(h, rows, model.latents.project) if project else h
    return Seen(e, turn, batch.index, batch.labels.flatten()[batch.index], tokens)


def code_logits(model, seen):
    """The inverse model's (L,K): a_t is read from place t + 1."""
    return seen.at(model.latents.inverse(seen.e, *seen.turn), 1) @ model.latents.inverse.head.weight.T


def inverse_terms(model, batch, config, processor):
    """(1) and the balance of codes."""
    seen = look(model, batch, config.projector)
    logits = code_logits(model, seen)
    codes = actions.gumbel(logits, actions.gumbel_noise(logits), config.tau)  # (L,K)
    merged = model.merged(seen.at(seen.e), codes @ model.latents.codebook.weight)
    loss = actions.inverse_loss(merged, model.word_head, seen.tokens)
    return {"loss": (loss, 1.0, "all"), "balance": (actions.balance(logits).expand_as(loss), config.balance, "all")}


def projector_terms(model, batch, config, processor, weight=1.0):
    """(6); on pairs alone it is (5)."""
    seen, modules = look(model, batch, project=False), (model.latents.project, model.latents.project_back)
    if not hasattr(batch, "blind"):
        batch.blind = without_pictures(batch, paired(batch, model.config.image_token_id)[0], processor)
    blind, h = look(model, batch.blind, project=False), seen.at(seen.e)  # (L,D)
    pairs, alone = actions.joint_projection(h[seen.paired], blind.at(blind.e), h[~seen.paired], *modules)
    terms = {"projection": (pairs, weight, "pairs"), "cycle": (alone, weight, "text")}
    return terms if config.cycle else {"projection": terms["projection"]}


def joint_terms(model, batch, config, processor):
    """(1) and (6)."""
    more = projector_terms(model, batch, config, processor, config.joint) if config.projector else {}
    return inverse_terms(model, batch, config, processor) | more


def clone_terms(model, batch, config, processor):
    """(8); u reads e, as the inverse model does."""
    seen = look(model, batch, config.projector)
    codes = code_logits(model, seen).argmax(-1)
    u = seen.at(model.latents.policy(seen.e, *seen.turn))
    return {"loss": (actions.clone(u, model.latents.policy.head.weight, codes), 1.0, "all")}


def sft_terms(model, batch, config, processor):
    """-log f_world(x_{t+1} | x_1..t, a_t) with a_t the policy's best code."""
    hidden = model(batch.input_ids, None, batch.pixel_values, batch.image_grid_thw).flatten(0, 1)[batch.index]  # (L,2D)
    codes = model.code_logits(hidden.detach()).argmax(-1)
    merged = model.merged(hidden.chunk(2, -1)[1], model.latents.codebook.weight[codes])
    tokens = batch.labels.flatten()[batch.index]
    return {"loss": (actions.inverse_loss(merged, model.word_head, tokens), 1.0, "all")}


# -- 3. what is watched ------------------------------------------------------------------------------------------------


@torch.no_grad()
def reach(model, h, tokens):
    """Which tokens (L,) are the best word of any code, given states h (L,D), and how many words are at each place."""
    best = [model.words_of(h, code).argmax(-1) for code in range(len(model.latents.codebook.weight))]  # K of (L,)
    best = torch.stack(best).sort(0).values
    return (best == tokens).any(0), 1 + (best[1:] != best[:-1]).sum(0)


@torch.no_grad()
def watched(model, batch, config, stage):
    """Codes in use and exp of their entropy, right words, the same under shuffled codes, words in reach of a place."""
    seen, K = look(model, batch, config.projector), len(model.latents.codebook.weight)
    codes = code_logits(model, seen).argmax(-1)
    share = torch.bincount(codes, minlength=K) / len(codes)
    if stage == 4:
        own = seen.at(model.latents.policy(seen.e, *seen.turn)) @ model.latents.policy.head.weight.T
        return {"clones": float((own.argmax(-1) == codes).float().mean())}
    e = seen.at(seen.e)
    right = lambda codes: float((model.words_of(e, codes).argmax(-1) == seen.tokens).float().mean())
    within, words = reach(model, e, seen.tokens)
    return {
        "codes_used": int((share > 0).sum()),
        "codes_even": float(torch.special.entr(share).sum().exp()),
        "right": right(codes),
        "right_shuffled": right(codes[torch.randperm(len(codes))]),
        "in_reach": float(within.float().mean()),
        "words_in_reach": float(words.float().mean()),
    }


@torch.no_grad()
def gate(model, processor, examples, most=128):
    """Share of the answers of which every word is in reach, and words in reach of a place: what RL can find at all."""
    whole, words = [], []
    for i in range(min(len(examples), most)):
        batch = collate(*zip(examples.encode(0, i)), pad_id=processor.pad_id).to(model.word_head.device)
        h = model.states(batch)[0].flatten(0, 1)[batch.index]
        within, many = reach(model, h, batch.labels.flatten()[batch.index])
        whole.append(bool(within.all()))
        words += many.tolist()
    return sum(whole) / len(whole), sum(words) / len(words)


# -- 4. train ----------------------------------------------------------------------------------------------------------


STAGES = {  # what is learned, and {name: (values (n,), weight, the count that they are a mean over)}
    1: (("inverse", "codebook", "merge"), inverse_terms),
    2: (("project", "project_back"), projector_terms),
    3: (("inverse", "codebook", "merge", "project", "project_back"), joint_terms),
    4: (("policy",), clone_terms),
    5: ((), sft_terms),
}
KEPT = {}  # of --keep-states, by data and base: {number: micro-batches}, which stages in one process share


def update(run, model, parts, stage, processor):
    """Add the gradient of a stage's losses to the model's, means over all ranks -> {name: mean}."""
    counts, image = {"all": 0, "pairs": 0, "text": 0}, model.config.image_token_id
    for batch in parts:
        pairs = int(paired(batch, image)[1].sum())
        for name, n in (("all", len(batch.index)), ("pairs", pairs), ("text", len(batch.index) - pairs)):
            counts[name] += n
    counts = dict(zip(counts, run.sum([*counts.values()])))
    sums = {}
    for batch in parts:
        with run.autocast():
            found = STAGES[stage][1](model, batch, run.config, processor)
        loss = 0.0
        for name, (values, weight, over) in found.items():
            part = values.sum() / max(counts[over], 1)
            loss, sums[name] = loss + weight * part, sums.get(name, 0.0) + float(part.detach())
        loss.backward()
    return dict(zip(sums, run.sum([*sums.values()])))


def train(config, stage):
    with Run(config, stage=f"latent{stage}") as run:
        model, processor = run.load()
        if stage == 1:
            torch.manual_seed(config.seed)
            sizes = dict(inverse=config.inverse_blocks, merge=config.merge_blocks, policy=config.policy_blocks)
            model = actions.attach(model, config.codes, **sizes)
        refuse(not isinstance(model, actions.LatentVLM), f"no latents in {run.base}", "the stage before (--init)")
        model.prepare(run)
        model.learn(*STAGES[stage][0], base=stage == 5)
        files = [config.split, config.text] if stage in (3, 4) and config.text else [config.split]
        examples = [Examples(config.data, name, processor, config) for name in files]
        for name, part in zip(files, examples):
            run.examine(processor, *part.source(), what=f"the data in {name}")
        own = Corpus(*examples)
        read, epoch = reader(run, own, "", processor.pad_id), max(len(own) // config.batch_size, 1)
        keep = config.keep_states and stage < 5  # an epoch's batches come again
        same = keep and float(sum(p.detach().double().abs().sum() for p in model.model.layers.parameters()))
        kept = KEPT.setdefault((config.data, *files, config.batch_size, config.seed, same), {}) if keep else {}
        optimizer = run.optimizer(model)
        steps = run.total_steps(len(own), config.batch_size)
        for step in run.steps(model, optimizer, steps):
            with run.phase("read"):
                number = step % epoch if keep else step
                parts = kept.get(number) or [batch.to(run.device) for batch in read(number)]
                kept |= {number: parts} if keep else {}
            with run.phase("learn"):
                means = update(run, model, parts, stage, processor)
                run.reduce_gradients(model)
                means["grad_norm"] = run.update(model, optimizer, step, steps)
            if stage in (1, 3, 4) and parts and (step % max(steps // 10, 1) == 0 or step + 1 == steps):
                means |= watched(model, parts[0], config, stage)
            run.report(step, means, int(sum(batch.attention_mask.sum() for batch in parts)))
            run.checkpoint(step + 1, model, optimizer)
        if config.gate and run.is_main:
            whole, words = gate(model, processor, Examples(config.data, config.gate, processor, config))
            said = f"{100 * whole:.0f} % of the answers in {config.gate} are in reach of the codes, {words:.2f} words"
            warning = " (warning: RL cannot find the others; longer stages 1 and 3, more text)" * (whole < 0.25)
            print(f"gate: {said} at a place{warning}", flush=True)
            run.append("validation", {"step": steps, "in_reach": whole, "words_in_reach": words})
        run.finish(model)


def main(argv=None):
    argv = [*(sys.argv[1:] if argv is None else argv)]
    at = argv.index("--stage") if "--stage" in argv else len(argv)
    stage = "".join(argv[at + 1 : at + 2])
    help = "--help" in argv
    refuse(not help and stage not in map(str, STAGES), f"--stage {stage or '(none)'}", "1, 2, 3, 4 or 5")
    train(parse(Config, __doc__, argv[:at] + argv[at + 2 :]), int(stage or 0))


if __name__ == "__main__":
    command(main)
