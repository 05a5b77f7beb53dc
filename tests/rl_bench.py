"""RL without a run: groups drawn from a tiny model, and the gradients of one step, on one rank or several threads."""

import atexit
import copy
import dataclasses
import functools
import json
import shutil
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path

import torch
from helpers import tiny_checkpoint
from small import arguments, metrics, small_data, write_lines

import train_rl
from data.dataset import load_items, load_policies
from model import Processor, load_pretrained, save_pretrained
from rollout import PolicyRollout, Responses
from support.batching import collate, token_logprobs
from support.config import parse
from training import Run

REWARDS = Path(__file__).with_name("reward_functions.py")


def rl_folder(folder):
    """A tiny model and six items with pictures."""
    tiny_checkpoint(folder / "model", width=32, layers=1, vision_width=16, vision_depth=2)
    small_data(folder / "data", items=6)
    return folder


def config(folder, method=train_rl, **flags):
    """The config of train_rl or of a variant."""
    flags = {"batch_size": 4, "group_size": 2, "policy_rollouts": 2, "max_response": 6, "check": 0, **flags}
    Config = getattr(method, "Config", train_rl.Config)
    return parse(Config, "", arguments(folder / "model", folder / "data", folder / "out", **flags))


def run(folder, name, data="data", model="model", method=train_rl, **flags):
    """A run of train_rl or of a variant -> the rows of its metrics."""
    flags = {
        "steps": 20,
        "batch_size": 4,
        "group_size": 8,
        "policy_rollouts": 0,
        "micro_batch": 64,
        "max_response": 3,
        "lr": 1e-2,
        "reward": f"{REWARDS}:vowels",
        "beta": 0.0,
        "check": 0,
        "dynamic_tries": 0,
        **flags,
    }
    method.main(arguments(folder / model, folder / data, folder / name, **flags))
    return metrics(folder / name)


class Bench:
    """A run in this thread, one of `world`, that keeps its gradients instead of making a step."""

    def __init__(self, config, rank=0, world=1, common=None):
        self.config, self.rank, self.world, self.common = config, rank, world, common
        self.device, self.fsdp, self.workers, self.gradients = torch.device("cpu"), False, 0, []

    micro_batches = Run.micro_batches

    def sum(self, x):
        if self.world == 1:
            return x
        self.common["values"][self.rank] = x
        self.common["barrier"].wait()
        values = list(self.common["values"])
        self.common["barrier"].wait()
        return [sum(parts) for parts in zip(*values)] if isinstance(x, list) else sum(values)

    def together(self, work):
        return work()

    def autocast(self):
        return nullcontext()

    def phase(self, name):
        return nullcontext()

    def gathered(self, model):
        return nullcontext()

    def reduce_gradients(self, model):
        pass

    def update(self, model, optimizer, step, steps):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        return 0.0


def draw(folder, load_pretrained=load_pretrained):
    """Four groups of 2 + 2 on pictures, drawn from a model a little away from the one that learns: ratios differ.

    -> (the model that learns, the one that drew, groups, processor)
    """
    torch.manual_seed(0)
    model, processor = load_pretrained(folder / "model"), Processor.from_pretrained(folder / "model")
    policies = load_policies(folder / "data")
    items = load_items(folder / "data", "rl.jsonl", policies)[:4]
    rollout = PolicyRollout(processor, policies, 2, 2, max_tokens=6, stop_ids=list(range(60)))
    groups = rollout(model.eval(), items, [[10 * i + k for k in range(4)] for i in range(4)])
    groups = [dataclasses.replace(group, rewards=torch.ones(4, 1, dtype=torch.float64)) for group in groups]
    start = copy.deepcopy(model)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model, start, groups, processor


def gradients(settings, drawn, method=train_rl, world=1, A=None, off_policy=False):
    """Of one step of four groups, summed over the ranks: [{name: gradient}], one per update.

    A (16,): advantages; by default from -1.5 to 2, the second group dead. off_policy: where there are several updates,
    logp_old is the sampler's, so that ratios differ from 1.
    """
    model, start, groups, processor = drawn
    common = {"values": [None] * world, "barrier": threading.Barrier(world)}
    if A is None:
        A = torch.linspace(-1.5, 2.0, 16)
        A[4:8] = 0.0
    benches = [Bench(settings, rank, world, common) for rank in range(world)]

    def work(bench):
        mine = list(range(4))[bench.rank :: world]
        data = Responses([groups[g] for g in mine], mine, 1, bench.device)
        data.A, data.kept = A.view(4, 4)[mine].flatten(), torch.ones(4 * len(mine), dtype=torch.bool)
        learner = getattr(method, "Learner", train_rl.Learner)(
            settings,
            bench,
            copy.deepcopy(model).train(),
            lambda: nullcontext(start),
            None,
            [("r", None, 1.0)],
            None,
            processor.pad_id,
        )
        if off_policy:
            read = learner.logprobs
            learner.logprobs = lambda data, which: (data.logp_sampler, read(data, which)[1])
        learner(data, 0, 1)

    threads = [threading.Thread(target=work, args=(bench,)) for bench in benches[1:]]
    for thread in threads:
        thread.start()
    work(benches[0])
    for thread in threads:
        thread.join()
    return [
        {n: sum(given[n] for given in update if n in given) for n in set().union(*update)}
        for update in zip(*(bench.gradients for bench in benches))
    ]


def distance(a, b):
    """Relative, over all parameters and updates."""
    pairs = [(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in y]
    size = lambda tensors: sum(x.double().square().sum() for x in tensors).sqrt()
    return size(p - q for p, q in pairs) / size(q for _, q in pairs)


def reader_folder(folder):
    """A model that reads policies: given one of four letters it says them, without one it says letters at random.

    Four of sixteen letters: GRPO would have to guess one in 65,536.
    """
    shutil.copytree(trained_reader(), folder / "model")
    (folder / "data").mkdir()
    policy = {"name": "P", "root": "", "nodes": [], "leaves": [], "text": "R K T B", "images": []}
    (folder / "data" / "policies.json").write_text(json.dumps([policy]))
    items = [{"id": f"i{i}", "policy": "P", "images": [], "question": "go", "answer": "RKTB"} for i in range(4)]
    for name in ("rl", "test"):
        write_lines(folder / "data" / f"{name}.jsonl", items)
    return folder


@functools.cache
def trained_reader():
    """The folder of that model, trained once per process."""
    folder = Path(tempfile.mkdtemp(prefix="reader-"))
    atexit.register(shutil.rmtree, folder)
    letters = "BCDFGHJKLMNPQRST"
    tiny_checkpoint(folder / "start", width=64, layers=2, vision_width=16, vision_depth=2, scale=0.05)
    torch.manual_seed(0)
    model, processor = load_pretrained(folder / "start"), Processor.from_pretrained(folder / "start")
    spell = lambda row: " ".join(letters[i] for i in row)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    item = lambda answer: {"id": "i", "policy": "P", "question": "go", "images": [], "answer": answer}
    rollout = PolicyRollout(processor, {}, 1, 0)
    for step in range(240):
        rows = torch.randint(16, (24, 4)).tolist()
        policies = [{"text": spell(row), "images": []} if b % 4 else None for b, row in enumerate(rows)]
        prompts = [rollout.prompt(item(""), policy) for policy in policies]
        answers = [processor.tokenizer.encode(spell(row).replace(" ", "")).ids[:4] for row in rows]
        logp, _ = token_logprobs(model, collate(prompts, answers, pad_id=processor.pad_id))
        (-logp.mean()).backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, 2 - 2 * step / 240)
        optimizer.step()
        optimizer.zero_grad()
    save_pretrained(model, folder / "model")
    return folder / "model"


READ = dict(steps=15, group_size=4, max_response=4, lr=2e-3, reward=f"{REWARDS}:exact")
