"""What the three training scripts and evaluate.py share: config, ranks, batches, checkpoints, metrics.

A reader of the method needs none of it. A script reads

    with Run(config, stage="sft") as run:
        model, processor = run.load()
        optimizer = run.optimizer(model)
        for step in range(run.restore(model, optimizer), steps):
            ... backward of a loss whose denominator is global ...
            run.reduce_gradients(model)                       # the one collective: gradients are SUMMED over ranks
            run.report(step, {"loss": loss, "grad_norm": run.update(model, optimizer, step, steps)})
            run.checkpoint(step + 1, model, optimizer)        # also where SIGTERM ends the run, with exit code 0
        return run.finish(model, results)

Axes: B batch, T tokens, R learned tokens of a row, N learned tokens of a batch, D width.
"""

import argparse
import atexit
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
import types
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import model as qwen
from checkpoint import Checkpoints, cut_logs, trainable, write_json
from data import InputError, command
from kernels.logprob import linear_logprob

# -- 1. config: defaults < --config file.json < flags -----------------------------------------------------------------


def option(default, help, **limits):
    """A config field: its default, its --help line (unit, when to change it), and limits: least, above, most, choices."""
    return field(default=default, metadata={"help": help, **limits})


def redefault(base, name, default):
    """The same option as in `base` with another default."""
    return field(default=default, metadata=base.__dataclass_fields__[name].metadata)


@dataclass
class CommonConfig:
    model: str = option("", "checkpoint: folder in the hub's layout, hub id, or the folder of a finished run", required=True)
    data: str = option("", "folder of policies.json and the .jsonl files", required=True)
    split: str = option("", "file of the items to learn from, inside --data")
    out: str = option("", "folder of this run: config, metrics, checkpoints, final weights", required=True)
    init: str = option("", "start from the stage before: the folder of its run (its adapter is continued, or merged by --full)")
    adapter: str = option("", "start from this LoRA adapter on top of --model")
    full: bool = option(True, "tune all parameters; --no-full tunes a LoRA adapter")
    lora_rank: int = option(8, "rank of the adapter", least=1)
    lora_alpha: float = option(16.0, "scale of the adapter: alpha / rank multiplies B A x", above=0)
    lora_dropout: float = option(0.0, "dropout before A, probability", least=0, most=0.99)
    lora_targets: str = option("", "projections with an adapter: names by commas, or one regex; empty: all of the text model")
    train_vision: bool = option(True, "with --full, tune the vision tower and merger, too")
    lr: float = option(1e-5, "peak learning rate", above=0)
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay, on matrices only", least=0)
    beta2: float = option(0.999, "AdamW's second-moment decay", above=0, most=0.9999)
    warmup: int = option(0, "steps of linear warm-up", least=0)
    schedule: str = option("constant", "learning rate after the warm-up", choices=("constant", "linear", "cosine"))
    batch_size: int = option(128, "items an update, over all ranks and micro-batches", least=1)
    micro_batch: int = option(4, "items a forward pass; lower it when memory runs out, results stay the same", least=1)
    epochs: float = option(1.0, "passes over the data", above=0)
    steps: int = option(0, "updates; 0: as many as --epochs needs", least=0)
    replay: str = option("", "folder of other policies' items, learned with their policy in the prompt: keeps the model reading policies")
    replay_split: str = option("sft.jsonl", "file of the items to replay, inside --replay")
    replay_share: float = option(0.5, "share of each batch that is replayed, where --replay is given", least=0, most=0.9)
    workers: int = option(4, "threads that read and scale pictures one step ahead on GPU machines; 0: none", least=0)
    max_prompt: int = option(4096, "longest prompt in tokens, pictures included; a longer one is an error, never cut", least=1)
    max_response: int = option(2048, "longest response in tokens", least=1)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    max_skipped: float = option(0.1, "share of updates that NaN or infinity may cost before the run stops (from step 10 on)", least=0, most=1)
    seed: int = option(0, "of data order, masks, dropout and sampling", least=0)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of matrix products; weights and AdamW stay float32. auto: bfloat16 on GPUs, float32 on CPUs",
                        choices=("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third more time")
    compile: bool = option(False, "torch.compile each layer: minutes at the start, faster steps on GPUs")
    fsdp: str = option("auto", "shard weights, gradients and AdamW over ranks (full only); auto: on several GPUs",
                       choices=("auto", "on", "off"))
    save_every: int = option(0, "steps between checkpoints; 0: only when a signal ends the run, so that --resume works", least=0)
    async_save: bool = option(False, "write checkpoints in a thread while training goes on: for large models")
    keep: int = option(2, "newest checkpoints to keep (the best, where a run names one, stays besides)", least=1)
    resume: bool = option(False, "continue from the newest whole checkpoint of --out (from the start if there is none)")
    overwrite: bool = option(False, "delete the run that --out holds")
    timeout: float = option(30.0, "minutes that a rank waits for the others before it gives up", above=0)


def parse(config_class, doc, argv=None):
    """The config of a command: dataclass defaults, then the JSON of --config FILE, then flags; InputError for what is unknown.

    Field `batch_size` is the flag --batch-size; a bool is --full / --no-full. Each option's metadata is its --help line.
    """
    kinds = {name: _kind(hint) for name, hint in typing.get_type_hints(config_class).items()}
    options = {f.name: f for f in dataclasses.fields(config_class)}
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: _refuse(f"{message} (--help lists the flags)")
    parser.add_argument("--config", metavar="FILE", help="JSON of option names and values; flags win over it")
    for name, f in options.items():
        text = f.metadata["help"].replace("%", "%%") + ("" if f.metadata.get("required") else f" (default: {f.default!r})")
        extra = {"action": argparse.BooleanOptionalAction} if kinds[name] is bool else {"metavar": name.upper()}
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **extra)
    flags = vars(parser.parse_args(argv))
    values = _read_config(flags.pop("config"), options)
    values |= flags
    config = config_class(**{name: _convert(name, value, kinds[name], options[name].metadata) for name, value in values.items()})
    for name, f in options.items():
        if f.metadata.get("required") and not getattr(config, name):
            raise InputError(f"--{name.replace('_', '-')} is missing: {f.metadata['help']}")
    return config


def _refuse(message):
    raise InputError(message)


def _kind(hint):
    """The plain type of an annotation: int of int | None."""
    return next((a for a in typing.get_args(hint) if a is not types.NoneType), hint)


def _read_config(path, options):
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: {error}, expected a JSON file") from None
    if not isinstance(values, dict) or set(values) - set(options):
        unknown = ", ".join(sorted(set(values) - set(options))) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"--config {path}: found {unknown}, expected one object of known options (--help lists them)")
    return values


def _convert(name, value, kind, limits):
    """One option's value in its type and within its limits; text comes from flags, JSON values from --config."""
    flag = "--" + name.replace("_", "-")
    try:
        good = isinstance(value, (str, kind)) or (kind is float and type(value) is int)
        if not good or (kind is not bool and isinstance(value, bool)) or (kind is bool and isinstance(value, str)):
            raise ValueError
        value = kind(value)
    except ValueError:
        raise InputError(f"{flag}: found {value!r}, expected {'a' if kind is not int else 'an'} {kind.__name__}") from None
    if "choices" in limits and value not in limits["choices"]:
        raise InputError(f"{flag}: found {value!r}, expected one of {', '.join(limits['choices'])}")
    if kind in (int, float) and not (math.isfinite(value) and value >= limits.get("least", -math.inf)
                                     and value > limits.get("above", -math.inf) and value <= limits.get("most", math.inf)):
        bounds = [f"{word} {limits[key]}" for key, word in (("least", "at least"), ("above", "above"), ("most", "at most")) if key in limits]
        raise InputError(f"{flag}: found {value}, expected a finite number {' and '.join(bounds)}")
    return value


# -- 2. batches -------------------------------------------------------------------------------------------------------


def rng(*key):
    """A numpy generator that depends on nothing but the integers of `key`, e.g. (seed, step, item): resuming replays nothing."""
    return np.random.default_rng(key)


def batches(n_items, batch_size, seed, step, rank=0, world=1, limit=None):
    """Item indices of this rank's share of the global batch number `step`.

    The stream is one shuffled epoch behind the other, so no item is dropped at an epoch's end; `limit` (items) ends it,
    and its last batch may be short. Ranks take every world-th index: together they hold each of the batch exactly once.
    """
    start, stop = step * batch_size, min((step + 1) * batch_size, limit or math.inf)
    chosen = []
    for epoch in range(start // n_items, -(-stop // n_items)):
        order = rng(seed, epoch).permutation(n_items)
        chosen += order[max(start - epoch * n_items, 0): stop - epoch * n_items].tolist()
    return chosen[rank::world]


def replayed_items(config):
    """How many items of each batch come from --replay."""
    return round(config.batch_size * config.replay_share) if config.replay else 0


def mixture(step, n_items, n_replay, config):
    """The global batch of update `step` as (replayed: bool, index): first the own items, then those of --replay."""
    replayed = replayed_items(config)
    limit = None if config.steps else round(n_items * config.epochs)
    chosen = [(False, i) for i in batches(n_items, config.batch_size - replayed, config.seed, step, limit=limit)]
    return chosen + ([(True, i) for i in batches(n_replay, replayed, config.seed + 1, step)] if replayed else [])


def share(chosen, sizes, rank, world):
    """This rank's part of a global batch: equal counts, near-equal sizes (dealt to and fro), sorted by size for little padding."""
    order = sorted(range(len(chosen)), key=lambda i: (sizes[i], i))
    return [chosen[i] for turn, i in enumerate(order) if turn % (2 * world) in (rank, 2 * world - 1 - rank)]


class Ahead:
    """[make(*key) for key in keys(step)], with the next step's made in threads meanwhile; in line where workers = 0."""

    def __init__(self, keys, make, workers):
        self.keys, self.make, self.futures = keys, make, {}
        self.pool = ThreadPoolExecutor(workers) if workers else None

    def __call__(self, step):
        if not self.pool:
            return [self.make(*key) for key in self.keys(step)]
        for s in (step, step + 1):
            if s not in self.futures:
                self.futures[s] = [self.pool.submit(self.make, *key) for key in self.keys(s)]
        return [future.result() for future in self.futures.pop(step)]


@dataclass
class Batch:
    """Right-padded rows: what the model reads and which of its predictions count."""

    input_ids: torch.Tensor              # (B,T) int64
    attention_mask: torch.Tensor         # (B,T) int64: 1 where a token stands
    labels: torch.Tensor                 # (B,T) int64: the token after position t where it is learned, else -100
    index: torch.Tensor                  # (N,) int64: flat positions b*T + t of the learned ones
    pixel_values: torch.Tensor | None    # (patches, 1176) fp32, the rows' pictures one after the other
    image_grid_thw: torch.Tensor | None  # (pictures, 3) int64
    position_ids: torch.Tensor | None = None  # (3,B,T) int64 where rows are packed; attention_mask is then bool (B,T,T)

    def to(self, device):
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{name: t if t is None else t.to(device, non_blocking=True) for name, t in moved.items()})


def collate(prompts, targets, learn=None, *, pad_id):
    """Rows `prompt + target` as one Batch.

    prompts: model.Encoded each; targets: token ids each (list or tensor); learn: bool (T,) each over the whole row, the
    tokens whose prediction counts (None: those of the target).
    """
    rows = [torch.cat([p.input_ids, torch.as_tensor(t, dtype=torch.long)]) for p, t in zip(prompts, targets, strict=True)]
    learn = learn or [None] * len(rows)
    learn = [torch.arange(len(row)) >= len(p.input_ids) if l is None else l for row, p, l in zip(rows, prompts, learn)]
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for b, (row, counts) in enumerate(zip(rows, learn)):
        input_ids[b, :len(row)] = row
        attention_mask[b, :len(row)] = 1
        labels[b, :len(row) - 1] = torch.where(counts[1:], row[1:], -100)  # position t predicts token t + 1
    pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
    grids = [p.grid_thw for p in prompts if p.pixel_values is not None]
    return Batch(input_ids, attention_mask, labels, (labels != -100).flatten().nonzero().squeeze(1),
                 torch.cat(pixels) if pixels else None, torch.cat(grids) if grids else None)


def pack(model, prompts, responses, pad_id):
    """Rows [prompt, response, response, ...]: the prompt is read once, each response sees it and itself (exact).

    prompts: Encoded each; responses: [[token ids]], those of each prompt. A response starts with the prompt's last token,
    which predicts its first, so that every place predicts one token; positions restart behind the prompt.
    """
    shared = [prompt.input_ids[:-1] for prompt in prompts]
    length = max(len(s) + sum(map(len, group)) for s, group in zip(shared, responses))
    input_ids, labels = torch.full((len(prompts), length), pad_id), torch.full((len(prompts), length), -100)
    part = torch.full_like(input_ids, -1)  # 0 the prompt, 1, 2, ... its responses, -1 padding
    position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.long)
    for b, (prompt, group) in enumerate(zip(prompts, responses)):
        places, delta = model.positions(prompt.input_ids[None], None, prompt.grid_thw)
        stop = len(shared[b])
        input_ids[b, :stop], part[b, :stop], position_ids[:, b, :stop] = shared[b], 0, places[:, 0, :-1]
        for number, tokens in enumerate(map(torch.as_tensor, group), 1):
            here = slice(stop, stop + len(tokens))
            input_ids[b, here] = torch.cat([prompt.input_ids[-1:], tokens[:-1]])
            labels[b, here], part[b, here] = tokens, number
            position_ids[:, b, here] = len(shared[b]) + delta + torch.arange(len(tokens))
            stop = here.stop
    sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])  # (B,T,S), and nothing that comes later
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.grid_thw for prompt in prompts if prompt.pixel_values is not None]
    return Batch(input_ids, sees.tril(), labels, (labels != -100).flatten().nonzero()[:, 0],
                 torch.cat(pixels) if pixels else None, torch.cat(grids) if grids else None, position_ids)


def packing_pays(model, prompts, responses, most=1 << 14):
    """Is it cheaper to read responses packed behind one prompt (dense mask) than one by one (causal), in operations?"""
    c = model.config
    per_token = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim + 3 * c.intermediate_size  # products, in widths
    packed = [len(prompt.input_ids) + sum(map(len, group)) for prompt, group in zip(prompts, responses)]
    alone = [len(prompt.input_ids) + len(tokens) for prompt, group in zip(prompts, responses) for tokens in group]
    return max(packed) <= most and sum(t * (per_token + 2 * t) for t in packed) < sum(t * (per_token + t) for t in alone)


def learned_hidden(model, batch):
    """The hidden states that predict the learned tokens of the batch -> (N,D), in the order of batch.index."""
    # padding stands on the right, where causal attention does not reach it: only packed rows need a mask
    mask = None if batch.position_ids is None else batch.attention_mask
    hidden = model(batch.input_ids, mask, batch.pixel_values, batch.image_grid_thw, batch.position_ids)  # (B,T,D)
    if batch.pixel_values is None and _is_fsdp(model):  # each rank must give the tower's weights a gradient, here zero
        patch = torch.zeros(4, 1176, device=hidden.device)
        hidden = hidden + 0 * model.visual(patch, torch.tensor([[1, 2, 2]], device=hidden.device)).sum()
    return hidden.flatten(0, 1)[batch.index]


def token_logprobs(model, batch, *, temperature=1.0, entropy=False):
    """log p of every learned token of the batch -> (N,) float32, in the order of batch.index, and their entropies (N,) | None."""
    targets = batch.labels.flatten()[batch.index]                                                    # (N,)
    return linear_logprob(learned_hidden(model, batch), model.head_weight, targets, temperature=temperature, return_entropy=entropy)


def response_logprobs(model, batch, *, temperature=1.0, entropy=False):
    """The same laid out by rows -> (logp (B,R), entropy (B,R) | None): row b's learned tokens from the left, then zeros."""
    counts = (batch.labels != -100).sum(1)                                                # (B,)
    where = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]       # (B,R)
    spread = lambda x: None if x is None else x.new_zeros(where.shape).masked_scatter(where, x)
    return tuple(spread(x) for x in token_logprobs(model, batch, temperature=temperature, entropy=entropy))


# -- 3. where a run starts --------------------------------------------------------------------------------------------


def locate(path):
    """A --model or --init value as (base checkpoint: folder or hub id, adapter folder | None).

    A run's folder names what it made: <run>/model, or <run>/adapter on top of the base that its config.json records.
    """
    path = str(path)
    if os.path.isdir(os.path.join(path, "model")):
        return os.path.join(path, "model"), None
    if os.path.isdir(os.path.join(path, "adapter")):
        return _run_config(path)["base"], os.path.join(path, "adapter")
    if "base" in _run_config(path):
        raise InputError(f"{path}: a run that has not ended, expected its model/ or adapter/ (continue it with --resume)")
    return path, None


def _run_config(folder):
    """The config.json of a run's folder; {} where there is none or it is a model's own."""
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        return config if "stage" in config else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json: {error}, expected the JSON of a run or of a model") from None


def _is_fsdp(model):
    return hasattr(model, "unshard")  # fully_shard mixes FSDPModule in; asking so spares its import, two seconds


def _dissolve_lora(model):
    """Merge the adapter and put plain linear layers back: what was frozen under it can be tuned again."""
    qwen.merge_lora(model)
    for name, layer in qwen.lora_layers(model).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, plain)


# -- 4. the run -------------------------------------------------------------------------------------------------------

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, for the MFU


class Run:
    """One training run: its ranks, folder, lock, checkpoints and metrics. Use as a context manager.

    rank, world: this process and their number (torchrun's). device, dtype: where and in what matrix products run.
    is_main: rank 0, which writes. extra: what the last checkpoint() was given, after --resume.
    """

    def __init__(self, config, stage):
        self.config, self.stage, self.out = config, stage, Path(config.out)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise InputError("--device: found cuda, expected cpu or auto: this machine has no usable GPU")
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if config.dtype == "bfloat16" or (cuda and config.dtype == "auto") else torch.float32
        self.fsdp = config.full and self.world > 1 and (config.fsdp == "on" or config.fsdp == "auto" and cuda)
        self.base, self.adapter = locate(config.init or config.model)
        self.adapter = config.adapter or self.adapter
        self._lock = None
        self.step, self.skipped, self.extra, self._spare = 0, 0, {}, []
        self.workers = config.workers if cuda else 0  # on a CPU threads would only take turns with the training itself
        self._stop, self._phase, self._times, self._began = False, "setup", {}, time.perf_counter()
        if config.batch_size % self.world:
            raise InputError(f"--batch-size {config.batch_size}: found {self.world} ranks, expected a number that divides it")

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():  # one group for all the runs of a process
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=timedelta(minutes=self.config.timeout))
            atexit.register(dist.destroy_process_group)
        try:
            self.on_main(self._open)
        except InputError:
            self._unlock()
            raise
        self.checkpoints = Checkpoints(self)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._heartbeat, daemon=True)
        self._heart.start()
        return self

    def __exit__(self, kind, error, trace):
        self._ended.set()
        self._heart.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._unlock()
        if self.world > 1 and kind not in (None, SystemExit):
            print(f"rank {self.rank}: failed in {self._phase!r} of step {self.step}: {error}", file=sys.stderr, flush=True)

    # -- the folder

    def _unlock(self):
        """Let go of the folder; one in which nothing came about disappears."""
        if self.is_main and self._lock and not self._lock.closed:
            (self.out / ".lock").unlink(missing_ok=True)
            self._lock.close()
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def _open(self):
        """Lock the folder; refuse another run's."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.out / ".lock", "w")
        except OSError as error:
            raise InputError(f"--out {self.out}: {error.strerror}, expected a folder that can be written") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
        except OSError:
            self._lock.close()
            raise InputError(f"--out {self.out}: another process is writing this run, expected a folder of its own") from None
        for path in [*self.out.glob(".model.*"), *self.out.glob(".adapter.*")]:  # a kill came while they were written
            shutil.rmtree(path)
        before = _run_config(self.out)
        if before and self.config.resume:
            free = {"out", "resume", "overwrite", "save_every", "async_save", "keep", "workers", "micro_batch", "fsdp", "timeout", "device",
                    "gradient_checkpointing", "compile", "max_skipped"}  # these change the path, not the goal
            changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in dataclasses.asdict(self.config).items()
                       if k not in free and before.get(k) != v]
            if changed or before["stage"] != self.stage:
                raise InputError(f"--resume {self.out}: the run was started as {before['stage']} with another config "
                                 f"({', '.join(changed)}), expected the same")
        elif (before or (self.out / "model").exists() or (self.out / "adapter").exists()) and not self.config.overwrite:
            raise InputError(f"--out {self.out}: holds another run, expected a new folder, --resume or --overwrite")

    def _begin(self):
        """All input has been read and is good: only now delete a run to be overwritten, and write config.json."""
        if self.config.overwrite and not self.config.resume:
            for name in ("config.json", "results.json", "checkpoints", "model", "adapter"):
                path = self.out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            for path in self.out.glob("*.jsonl"):
                path.unlink()
        base = os.path.abspath(self.base) if os.path.exists(self.base) else self.base
        write_json(self.out / "config.json", {"stage": self.stage, "base": base, **dataclasses.asdict(self.config)})

    def append(self, name, row):
        """Add one line to <out>/<name>.jsonl; a row has its "step", so that a resumed run cuts what it does again."""
        if self.is_main:
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    # -- ranks

    def on_main(self, work):
        """work() on rank 0 alone; its JSON-able value reaches every rank, and so does its failure."""
        if self.world == 1:
            return work()
        answer, failure = {}, None
        if self.is_main:
            try:
                answer = {"value": work()}
            except (InputError, OSError) as error:
                failure = error
        text = torch.tensor(list(json.dumps(answer).encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor(len(text), device=self.device)
        dist.broadcast(size, 0)
        text = text if self.is_main else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(text, 0)  # JSON: torch's own object collectives would unpickle what they receive
        if failure:
            raise failure
        answer = json.loads(bytes(text.tolist()))
        if "value" not in answer:
            sys.exit(2)  # rank 0 says why
        return answer["value"]

    def sum(self, x):
        """A number, or a list of numbers, summed over the ranks in float64."""
        return self._all_reduce(x, "SUM")

    def max(self, x):
        """The largest over the ranks of a number, or of each number of a list."""
        return self._all_reduce(x, "MAX")

    def _all_reduce(self, x, how):
        if self.world == 1:
            return x.item() if isinstance(x, torch.Tensor) else x
        x = torch.as_tensor(x, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
        return x.tolist()

    def micro_batches(self, rows):
        """Split a rank's rows into [(at most --micro-batch rows, weight 1.0)].

        Under FSDP each forward pass is a collective: a rank with fewer parts repeats a row with weight 0.0, or the others
        would wait for it for ever.
        """
        size = self.config.micro_batch
        parts = [(rows[i:i + size], 1.0) for i in range(0, len(rows), size)]
        if self.fsdp:
            self._spare = rows[:1] or self._spare
            if not self._spare:
                raise InputError(f"rank {self.rank}: found no item, expected at least as many items as ranks")
            parts += [(self._spare, 0.0)] * (int(self.max(len(parts))) - len(parts))
        return parts

    def reduce_gradients(self, model):
        """Sum the gradients over the ranks, in one flat buffer; FSDP has already done it during the backward pass."""
        if self.world == 1 or self.fsdp:
            return
        parameters = list(trainable(model).values())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, summed in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(summed.view_as(p))

    # -- model and optimiser

    def load(self, frozen=False):
        """-> (model, processor): --model or --init with its adapter, made trainable as --full says, placed on the device.

        frozen: the same start as a reference policy, without gradients, its adapter merged, in the compute dtype.
        """
        config = self.config
        torch.manual_seed(config.seed)  # a new adapter is drawn alike on every rank
        full = config.full or frozen
        dtype = self.dtype if frozen or not config.full else torch.float32
        # sharded: only shapes now, then each rank reads its rows; an adapter has to be merged into whole weights first
        device = self.device if not self.fsdp else "cpu" if self.adapter else "meta"
        model = qwen.load_pretrained(self.base, device, dtype)
        if self.adapter:
            qwen.load_adapter(model, self.adapter)
            if full:
                _dissolve_lora(model)
        elif not full:
            targets = config.lora_targets.split(",") if "," in config.lora_targets else config.lora_targets
            qwen.add_lora(model, config.lora_rank, config.lora_alpha, targets or None, dropout=config.lora_dropout)
        if full:
            qwen.set_trainable(model, vision=config.train_vision and not frozen, text=not frozen)
        if config.gradient_checkpointing and not frozen:
            model.enable_gradient_checkpointing()
        if config.compile:
            for layer in model.model.layers:
                layer.compile(dynamic=True)
        if self.fsdp:
            self._shard(model)
        return model.train(not frozen), qwen.Processor.from_pretrained(self.base)

    def _shard(self, model):
        """FSDP2 from outside: a unit a layer; the rest (tower, embedding, head) is one, as not every batch has pictures."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        half = self.dtype if self.dtype != torch.float32 else None
        precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in [*model.model.layers, model]:
            fully_shard(unit, mesh=mesh, mp_policy=precision)
            unit.set_gradient_divide_factor(1.0)  # sums, not means: the loss has its global denominator already
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        if next(model.parameters()).is_meta:
            model.to_empty(device=self.device)
            files = [qwen.TensorFile(path) for path in sorted(Path(model.source).glob("*.safetensors"))]
            stored = {qwen.hub_name(name): (file, name) for file in files for name in file.entries}
            for name, p in model.named_parameters():
                file, name = stored[name]
                rows = file.read(name, "cpu", p.dtype).chunk(self.world)
                local = p.detach().to_local()
                if self.rank < len(rows):
                    local.copy_(rows[self.rank])

    def autocast(self):
        """Matrix products in the compute dtype over float32 weights (FSDP casts by itself)."""
        on = self.dtype != torch.float32 and not self.fsdp
        return torch.autocast(self.device.type, self.dtype) if on else contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self, model):
        """For sampling: whole weights in the compute dtype, gathered or cast once, no gradients; yields the model."""
        units = [m for m in model.modules() if _is_fsdp(m)]
        masters = {} if units or self.dtype == torch.float32 else {p: p.data for p in model.parameters()}
        for p in masters:
            p.data = p.data.to(self.dtype)
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False)
        training = model.training
        try:
            with torch.no_grad():
                yield model.eval()
        finally:
            model.train(training)
            for p, data in masters.items():
                p.data = data
            for unit in units:
                unit.set_reshard_after_forward(unit is not model)
                unit.reshard()

    def optimizer(self, model):
        """AdamW on what is trainable; weight decay on matrices only."""
        parameters = list(trainable(model).values())
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.config.weight_decay},
                  {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, self.config.beta2), fused=not self.fsdp)

    def learning_rate(self, step, steps):
        """The rate of update number `step` (from 0) of `steps`: warm-up, then --schedule."""
        config = self.config
        done = min(max(step - config.warmup, 0) / max(steps - config.warmup, 1), 1.0)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
        return config.lr * min((step + 1) / (config.warmup + 1), 1.0) * shape

    def update(self, model, optimizer, step, steps):
        """Clip, step, clear the gradients -> their norm before clipping.

        A norm that is not finite skips the update and is counted; past --max-skipped of the updates the run ends.
        """
        gradients = [p.grad for p in trainable(model).values() if p.grad is not None]
        local = [g.to_local() for g in gradients] if self.fsdp else gradients
        norm = torch.stack(torch._foreach_norm(local)).norm() if local else torch.zeros((), device=self.device)
        norm = math.sqrt(self.sum(norm.double() ** 2)) if self.fsdp else norm.item()
        if math.isfinite(norm):
            if norm > self.config.max_grad_norm:
                torch._foreach_mul_(local, self.config.max_grad_norm / norm)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step, steps)
            optimizer.step()
        else:
            self.skipped += 1
            if self.skipped > self.config.max_skipped * max(step + 1, 10):
                raise InputError(f"step {step}: gradient norm {norm}, and {self.skipped} of {step + 1} updates were skipped for that "
                                 f"(--max-skipped {self.config.max_skipped}); expected finite losses: lower --lr")
        optimizer.zero_grad()
        return norm

    # -- the loop

    def total_steps(self, n_items, per_update=None):
        """Updates of the whole run: --steps, or what --epochs of n_items items need, so many (--batch-size) an update."""
        return self.config.steps or math.ceil(round(n_items * self.config.epochs) / (per_update or self.config.batch_size))

    def steps(self, model, optimizer, total):
        """The step numbers still to do, from where --resume finds the run; each is seeded by its number."""
        first = self.restore(model, optimizer)
        self._bar = tqdm(initial=first, total=total, desc=self.stage, unit="step", leave=True,
                         disable=not (self.is_main and sys.stderr.isatty()))
        self._total = total
        for self.step in range(first, total):
            torch.manual_seed(int(rng(self.config.seed, self.step, self.rank).integers(2**62)))  # dropout
            self._times, self._began = {}, time.perf_counter()
            yield self.step
        self._bar.close()

    @contextlib.contextmanager
    def phase(self, name):
        """Time a part of the step; heartbeats and failures name it."""
        before, self._phase, start = self._phase, name, time.perf_counter()
        yield
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - start
        self._phase = before  # not in a finally: after a failure it still says where

    def report(self, step, metrics, tokens=0, parameters=0, phase_tokens=()):
        """One row of metrics.jsonl and of the terminal; "speed" holds what differs from run to run.

        tokens: those that all ranks learned from in this step; parameters: the model's, for the MFU on a known GPU;
        phase_tokens: {phase: tokens} for a rate of each.
        """
        seconds = time.perf_counter() - self._began
        speed = {"seconds": round(seconds, 4), **{k: round(v, 4) for k, v in self._times.items()}, "memory_gb": memory_gb(self.device)}
        for phase in phase_tokens:
            speed[f"{phase}_tokens_per_second"] = round(phase_tokens[phase] / max(self._times.get(phase, 0), 1e-9), 1)
        if tokens:
            speed["tokens_per_second"] = round(tokens / seconds, 1)
            peak = next((v for k, v in PEAK_FLOPS.items() if self.device.type == "cuda"
                         and k in torch.cuda.get_device_name(self.device)), None)
            if peak and parameters:
                work = 6 if self.config.full else 4  # frozen weights need no gradient: a third of the work less
                speed["mfu"] = round(work * parameters * tokens / seconds / peak / self.world, 4)
        metrics = {"step": step, **metrics, "skipped": self.skipped}
        self.append("metrics", {**metrics, "speed": speed})
        line = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float)) and k not in ("step", "skipped"))
        if self.is_main and not self._bar.disable:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update()
        elif self.is_main and (step + 1 == self._total or step % max(self._total // 10, 1) == 0):
            print(f"{self.stage} step {step + 1}/{self._total}  {line}", flush=True)

    def _heartbeat(self, every=60):
        """A line a minute while one phase of one step lasts: who waits, and where."""
        last, since = None, 0
        while not self._ended.wait(every):
            now = (self.step, self._phase)
            since = since + every if now == last else 0
            last = now
            if since:
                print(f"rank {self.rank}: {self.stage} step {self.step} in {self._phase!r} for {since} s", file=sys.stderr, flush=True)

    def _on_signal(self, number, frame):
        self._stop = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once

    # -- stop and go on

    def checkpoint(self, step, model, optimizer, extra=None, score=None):
        """Save after `step` updates where --save-every says so; after SIGTERM or SIGINT save and end with exit code 0.

        extra: a JSON-able dict that the resumed run finds in run.extra. score: the checkpoint with the highest is kept, too.
        """
        stop = bool(self.max(int(self._stop)))  # a signal reaches the ranks at different moments
        with self.phase("save"):
            self.checkpoints.publish_if_done()
            if stop or (self.config.save_every and step % self.config.save_every == 0):
                self.checkpoints.save(step, model, optimizer, extra or {}, score, wait=stop or not self.config.async_save)
        if stop:
            if self.is_main:
                print(f"{self.stage}: stopped by a signal after step {step}; --resume continues", file=sys.stderr, flush=True)
            sys.exit(0)

    def restore(self, model, optimizer):
        """With --resume, load the newest whole checkpoint -> its step; else 0. Logs are cut back to that step."""
        self.on_main(self._begin)
        state = self.checkpoints.restore(model, optimizer) if self.config.resume else None
        state = state or {"step": 0, "skipped": 0, "extra": {}}
        self.skipped, self.extra = state["skipped"], state["extra"]
        if self.is_main:
            cut_logs(self.out, state["step"])
            if self.config.resume:
                print(f"{self.stage}: resumed after step {state['step']}", file=sys.stderr, flush=True)
        return state["step"]

    # -- the end

    def finish(self, model, results=None):
        """Write the final weights (<out>/model in the hub's layout, or <out>/adapter) and results.json -> results."""
        with self.phase("finish"):
            self.checkpoints.publish_if_done(wait=True)
            if self.fsdp:
                model = self._whole(model)
            name, save = ("model", qwen.save_pretrained) if self.config.full else ("adapter", qwen.save_adapter)
            self.on_main(lambda: save(model, self.out / name))
            if results is not None and self.is_main:
                write_json(self.out / "results.json", results)
        return results

    def _whole(self, model):
        """The sharded model with all its weights, on rank 0's CPU; one tensor at a time is gathered."""
        with torch.device("meta"):
            whole = qwen.Qwen25VL(model.config)
        whole.source = model.source
        for name, p in model.named_parameters():
            p = p.full_tensor()
            if self.is_main:
                owner, _, leaf = name.rpartition(".")
                setattr(whole.get_submodule(owner), leaf, torch.nn.Parameter(p.detach().to("cpu", self.dtype)))
        return whole


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


def memory_gb(device):
    """Peak memory of this process so far, GB: the GPU's, or the resident set."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["plan"]:
        raise InputError(f"found {' '.join(argv[:1]) or 'no command'}, expected: python training.py plan --model M (--help lists the flags)")
    import plan  # here, as it imports this file

    plan.main(argv[1:])


if __name__ == "__main__":
    command(main)
