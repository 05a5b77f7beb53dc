"""What the three training scripts share: where they start, their ranks, folder, optimiser, checkpoints and metrics.

A reader of the method can skip this file. A script reads

    with Run(config, stage="sft") as run:
        model, processor = run.load()
        optimizer = run.optimizer(model)
        for step in run.steps(model, optimizer, total):       # from where --resume finds it
            ... backward of a loss whose denominator is global ...
            run.reduce_gradients(model)                       # the one collective: gradients are SUMMED over ranks
            grad_norm = run.update(model, optimizer, step, total)
            run.report(step, {"loss": loss, "grad_norm": grad_norm})
            run.checkpoint(step + 1, model, optimizer)        # also where SIGTERM ends the run, with exit code 0
        run.finish(model)

Flags: support/config.py; a run's folder: support/folder.py; a checkpoint's files: support/checkpoint.py; FSDP:
support/sharding.py. `python training.py plan` (support/plan.py) estimates what a run needs in memory.
"""

import atexit
import contextlib
import dataclasses
import json
import math
import os
import resource
import secrets
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import model as qwen
from data import InputError, check, command, lasting_output, plain
from support import folder
from support.batching import is_fsdp, rng
from support.checkpoint import Checkpoints, cut_logs, not_finite, to_json, trainable, write_json
from support.runs import is_step, load_weights, locate, own_start, run_config
from support.sharding import shard, unsharded, whole

# -- 1. what a run does to a model -------------------------------------------------------------------------------------


def _dissolve_lora(model):
    """Merge the adapter and put plain linear layers back: what was frozen under it can be tuned again.

    Layer by layer: a merged one keeps its original weight as long as it is there.
    """
    layers = qwen.lora_layers(model)
    while layers:
        name, layer = layers.popitem()
        layer.become("merged")
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, plain)


def round_matrices(model, dtype):
    """Store in `dtype` what autocast would round to it in each product; in place."""
    for layer in qwen.linear_layers(model).values():
        layer.to(dtype)


@contextlib.contextmanager
def put_back(model, weights):
    """The model with these values of its trainable weights, {name: tensor}."""
    parameters = trainable(model)
    now = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = weights[name]
        yield model
    finally:
        for name, p in parameters.items():
            p.data = now[name]


def compile_blocks(model, backend="inductor"):
    """Compile what stands before and after each attention, once for all layers, for learning and for sampling.

    Attention stays as it is: what its caches hold, and who reads it, changes from step to step, and which patches of a
    picture attend to one another from size to size. The number of tokens or patches is left open. On a GPU a step of
    sampling becomes a CUDA graph (support/cache.py).
    """
    model.compiled = True
    for block in [*model.model.layers, *model.visual.blocks]:
        for part in "before_attention", "after_attention":
            setattr(block, part, torch.compile(getattr(block, part), backend=backend, dynamic=True))


# -- 2. the run -------------------------------------------------------------------------------------------------------

MAY_CHANGE = {  # where a run is resumed: these change the path, not the goal
    "out",
    "resume",
    "overwrite",
    "save_every",
    "keep",
    "micro_batch",
    "fsdp",
    "device",
    "gradient_checkpointing",
    "compile",
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)  # end a run after its step, saved
PATIENCE = 30  # minutes that a rank waits for the others before it gives up
MOST_FAULTS = 50  # of the data, that are printed
MAX_SKIPPED = 0.1  # share of updates (of ten at least) that NaN or infinity may cost before the run stops
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
        half = config.dtype == "bfloat16" or (cuda and config.dtype == "auto")
        self.dtype = torch.bfloat16 if half else torch.float32
        several = self.world > 1
        self.fsdp = config.full and {"on": cuda or several, "auto": cuda and several, "off": False}[config.fsdp]
        self.start = config.init or config.model
        gone = config.resume and not os.path.exists(self.start)
        self._copied = is_step(self.start) or gone and bool(folder.matching(self.out, [f"{folder.START}*"]))
        if self._copied:
            self.base, self.adapter = self.start, None  # until load() has its copy
        else:
            self.base, self.adapter = locate(self.start, hub="" if config.init else "download")
        self.adapter = config.adapter or self.adapter
        self._lock, self._new = None, False
        self.id, self.digests = secrets.token_hex(4), {}  # of this run; of what it reads
        self.step, self.skipped, self.extra = 0, 0, {}
        self._learning, self._done, self._saved = None, 0, 0  # (model, optimizer); steps done, and saved
        self._between = True  # are the weights those after `_done` steps?
        minutes, number = config.save_every.endswith("m"), float(config.save_every.rstrip("m"))
        self._save_steps, self._save_seconds = (0, 60 * number) if minutes else (int(number), 0.0)  # 0: never
        self._saved_at = 0.0
        self.workers = 4 if cuda else 0  # on a CPU threads would only take turns with the training itself
        self._stop, self._phase, self._times, self._began = False, "setup", {}, time.perf_counter()
        if config.batch_size % self.world:
            raise InputError(f"--batch-size {config.batch_size}: found {self.world} ranks, expected a divisor of it")

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if (self.world > 1 or self.fsdp) and not dist.is_initialized():  # one group for all the runs of a process
            alone = {} if self.world > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=PATIENCE), **alone)
            atexit.register(dist.destroy_process_group)
        self._open_streams = contextlib.ExitStack()
        self._open_streams.enter_context(lasting_output())
        self.checkpoints = Checkpoints(self)
        try:
            ended = self.on_main(self._open)
        except BaseException:
            self._unlock()
            raise
        if ended:
            self._unlock()
            if self.is_main:
                print(f"{self.stage}: {self.out} holds the finished run, nothing is left to do", file=sys.stderr)
            sys.exit(0)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            caught = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores SIGHUP: keep it so
            self._handlers = {s: signal.signal(s, self._on_signal) for s in caught}
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._heartbeat, daemon=True)
        self._heart.start()
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            self._rescue(alone=True)
        self._ended.set()
        self._heart.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.world > 1 and kind not in (None, SystemExit):
            place = f"{self._phase!r} of step {self.step}"
            print(f"rank {self.rank}: failed in {place}: {plain(error)}", file=sys.stderr, flush=True)
        self._unlock()

    # -- the folder

    def _unlock(self):
        """Let go of the folder; where no step came about, bad input leaves nothing behind."""
        if self.is_main and self._lock and not self._lock.closed:
            if self._new and not self.checkpoints.names():
                folder.delete(self.out, ["checkpoints", "config.json"])
            folder.delete(self.out, self._others([f"{folder.START}*"]))
            folder.unlock(self.out, self._lock)
            with contextlib.suppress(OSError):
                self.out.rmdir()
        self._open_streams.close()

    def identity(self):
        """What a run is: to be resumed, it has to be started as the same."""
        base = os.path.abspath(self.base) if os.path.exists(self.base) else self.base
        config = dataclasses.asdict(self.config)
        return {"run": self.id, "stage": self.stage, "base": base, "digests": self.digests, "config": config}

    def _open(self):
        """Lock the folder; refuse somebody else's and another run's -> has this run ended already?"""
        config, out = self.config, self.out
        read = ("model", "init", "adapter", "data", "replay")
        folder.keep_apart(out, {f"--{name}": getattr(config, name) for name in read})
        folder.refuse_foreign(out, run_config(out) or self.checkpoints.newest_state())
        self._lock = folder.lock(out)
        folder.delete(out, self._others(folder.LEFTOVERS[1:]))  # a kill came while they were written
        before = self._before()
        if before and config.resume:
            changed = [
                f"{k} {before['config'].get(k)!r} -> {v!r}"
                for k, v in dataclasses.asdict(config).items()
                if k not in MAY_CHANGE and before["config"].get(k) != v
            ]
            if changed or before["stage"] != self.stage:
                raise InputError(
                    f"--resume {out}: the run was started as {before['stage']} with another config "
                    f"({', '.join(changed[:5])}), expected the same"
                )
            self.id = before["run"]
            return any(out.glob("model/*.safetensors")) or any(out.glob("adapter/*.safetensors"))
        if before and not config.overwrite:
            raise InputError(f"--out {out}: holds another run, expected a new folder, --resume or --overwrite")
        return False

    def _others(self, patterns):
        """What is in the folder of these names, but for the start of the run that it holds."""
        own = f"{folder.START}{self._before().get('run')}"
        return [name for name in folder.matching(self.out, patterns) if name != own]

    def _before(self):
        """The identity of the run in the folder; {} where there is none."""
        config = run_config(self.out)
        if not config:
            return self.checkpoints.newest_state()
        said = {key: config.pop(key, None) for key in ("run", "stage", "base", "digests")}
        return {**said, "config": config}

    def examine(self, processor, data, splits, policies, holds, what="the data"):
        """Before step 0: refuse items that would end the run later; where --resume finds them unchanged, not again.

        splits: {file in the folder `data`: items}; holds: is the policy in their prompts, see data.check.Limits.
        """
        self.on_main(lambda: self._examine(processor, data, splits, policies, holds or "without", what))

    def _examine(self, processor, data, splits, policies, holds, what):
        entries = [*policies.values(), *(item for items in splits.values() for item in items)]
        paths = [os.path.join(data, name) for name in ("policies.json", *splits)]
        paths += [path for entry in entries for path in entry["images"]]
        self.digests[what] = folder.digest(
            {os.path.relpath(path, data): path for path in paths if os.path.exists(path)}
        )
        before, config = self._before(), self.config
        if config.resume and before and (before["digests"] or {}).get(what) == self.digests[what]:
            return  # it was looked at when the run was started
        chains = what != "the data" or self.stage != "rl" and not getattr(config, "answer_only", False)  # are learned
        limits = check.Limits(config.max_prompt, config.max_response if chains else 1 << 30, holds)
        pictures, faults = check.Pictures(processor, sys.stderr.isatty()), []
        for name, items in splits.items():
            faults += check.look_over(items, policies, processor, limits, pictures)
            if (share := check.unknown_share(items, processor)) > 0.01:
                said = f"{100 * share:.0f} % of the tokens of {data}/{name} are unknown to the model's tokenizer"
                print(f"warning: {said}", file=sys.stderr, flush=True)
        for fault in faults[1:MOST_FAULTS]:
            print(plain(fault), file=sys.stderr, flush=True)
        if faults:
            more = f" (above: {min(len(faults), MOST_FAULTS) - 1} of {len(faults) - 1} more)" if faults[1:] else ""
            raise InputError(f"{data}/{faults[0]}{more}")

    def _begin(self, model):
        """All input has been read and is good: only now delete a run to be overwritten, and write config.json.

        -> (id of the run, digests of what it reads).
        """
        config, before = self.config, self._before()
        started = [Path(model.source), *([Path(self.adapter)] if self.adapter else [])]
        weights = {f"{n} {path.name}": path for n, at in enumerate(started) for path in at.glob("*.safetensors")}
        self.digests["the weights it starts from"] = folder.digest(weights)
        if config.resume and before:
            known = before["digests"] or {}
            if changed := [what for what, now in self.digests.items() if known.get(what, now) != now]:
                found = f"found that {' and '.join(changed)} changed since the run was started"
                raise InputError(f"--resume {self.out}: {found}, expected the same (or a new run elsewhere)")
        elif config.overwrite:
            folder.delete(self.out, folder.OWN)
        self._need_room(model)
        self._new = not (self.out / "config.json").exists()  # until its first step is done
        identity = self.identity()
        write_json(self.out / "config.json", {**identity, **identity.pop("config")})
        return self.id, self.digests

    def _need_room(self, model):
        """Refuse now what would end the run hours later: a disk with no room for its checkpoints and final weights."""
        learned, all_weights = trainable(model).values(), model.parameters()
        each = sum(p.numel() * (p.element_size() + 8) for p in learned)  # with AdamW's two moments
        final = sum(p.numel() * p.element_size() for p in (all_weights if self.config.full else learned))
        need = max((self.config.keep + 1) * each - self.checkpoints.size(), each) + final
        folder.need_room(self.out, need, f"{self.config.keep + 1} checkpoints (--keep) and the final weights")

    def append(self, name, row):
        """Add one line to <out>/<name>.jsonl; a row has its "step", so that a resumed run cuts what it does again."""
        if self.is_main:
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.write(to_json(row) + "\n")

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
            return x.tolist() if isinstance(x, torch.Tensor) else x
        x = torch.as_tensor(x, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
        return x.tolist()

    def micro_batches(self, rows, tokens):
        """Split a rank's rows, in their order, into parts of no more tokens than --micro-batch of the longest have.

        tokens(part): how many there are in a part as it is read, padding included.
        Under FSDP each forward pass is a collective: a rank with fewer parts than another adds empty ones, for which it
        reads a token of padding (`collate`), or the others would wait for it for ever.
        """
        parts, most = [], self.config.micro_batch * max((tokens([row]) for row in rows), default=0)
        for row in rows:
            if not parts or tokens([*parts[-1], row]) > most:
                parts.append([])
            parts[-1].append(row)
        missing = int(self.max(len(parts))) - len(parts) if self.fsdp else 0
        return parts + [[]] * missing

    def reduce_gradients(self, model):
        """Sum the gradients over the ranks, in one flat buffer; FSDP has already done it during the backward pass.

        A weight that nothing has reached has a gradient of 0, on one rank as on several: AdamW then treats it alike.
        """
        parameters = list(trainable(model).values())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.world == 1 or self.fsdp:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, summed in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(summed.view_as(p))

    # -- model and optimiser

    def load(self, frozen=""):
        """-> (model, processor): --model or --init with its adapter, trainable as --full says, on the device.

        frozen: "start", the same start as a reference policy; "base", --model without --init. Such a model has no
        gradients and computes bit for bit what the policy does before its first step: its matrices are in the compute
        dtype, to which autocast rounds the policy's; its adapter is beside or in the weights where the policy's is.
        """
        config = self.config
        if not frozen and self._copied:
            place = self.out / f"{folder.START}{self.id}"
            self.base, adapter = self.on_main(lambda: own_start(qwen, self.start, place, self.dtype, config.full))
            self.adapter = config.adapter or adapter
        elsewhere = frozen == "base" and config.init
        base, adapter = locate(config.model) if elsewhere else (self.base, self.adapter)
        torch.manual_seed(config.seed)  # a new adapter is drawn alike on every rank
        exact = config.full and not (frozen and self.fsdp)  # an adapter is merged before it is rounded
        # sharded: only shapes now; shard() then reads each rank's rows, and merges an adapter's into them
        device = "meta" if self.fsdp else self.device
        model = load_weights(qwen, base, device, torch.float32 if exact else self.dtype)
        if adapter and not self.fsdp:
            qwen.load_adapter(model, adapter)
            if config.full:
                _dissolve_lora(model)
        elif not config.full and not frozen:
            targets = config.lora_targets.split(",") if "," in config.lora_targets else config.lora_targets
            qwen.add_lora(model, config.lora_rank, 2 * config.lora_rank, targets or None)
        if not frozen:
            self.parameters = sum(p.numel() for p in model.parameters())
        if frozen:
            model.requires_grad_(False)
        elif config.full:
            qwen.set_trainable(model, vision=config.train_vision)
        if not frozen and hasattr(model, "prepare"):
            model.prepare(self)
        if frozen and exact:
            round_matrices(model, self.dtype)
        if config.gradient_checkpointing and not frozen:
            model.enable_gradient_checkpointing()
        if config.compile:
            compile_blocks(model)
        if self.fsdp:
            shard(model, self.device, self.dtype, self.rank, self.world, adapter)
        processor = qwen.Processor.from_pretrained(self.base, config.min_pixels, config.max_pixels)
        model.vocabulary = processor.vocabulary
        return model.train(not frozen), processor

    def frozen_models(self, model, needs_start, sampler=""):
        """-> (context with the start model: pi_ref or teacher; who samples the policy-aware half, None: the model).

        needs_start: is it read at all? sampler: "start", "base" (--model without --init) or "". Where only LoRA is
        trained, the start model is the model with its adapter as it is now.
        """
        full = self.config.full
        start = self.load("start")[0] if sampler == "start" or needs_start and full else None
        other = start if sampler == "start" else self.load("base")[0] if sampler else None
        if full:
            return lambda: contextlib.nullcontext(start), other
        adapter = {name: p.detach().clone() for name, p in trainable(model).items()}
        return lambda: put_back(model, adapter), other

    def autocast(self):
        """Matrix products in the compute dtype over float32 weights (FSDP casts by itself)."""
        on = self.dtype != torch.float32 and not self.fsdp
        return torch.autocast(self.device.type, self.dtype) if on else contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self, model):
        """For sampling: whole weights in the compute dtype, gathered or cast once, no gradients; yields the model."""
        masters, training = {}, model.training
        if not is_fsdp(model) and self.dtype != torch.float32:  # an adapter stays float32, as its layers expect
            masters = {p: p.data for name, p in model.named_parameters() if ".lora_" not in name}
        with unsharded(model):
            try:
                for p in masters:
                    p.data = p.data.to(self.dtype)
                with torch.no_grad():
                    yield model.eval()
            finally:
                model.train(training)
                for p, data in masters.items():
                    p.data = data

    def optimizer(self, model):
        """AdamW on what is trainable; weight decay on matrices only."""
        parameters = list(trainable(model).values())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        fused = not self.fsdp or self.device.type == "cuda"  # of DTensors on a CPU there is none
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, self.config.beta2), fused=fused)

    def learning_rate(self, step, steps):
        """The rate of update number `step` (from 0) of `steps`: warm-up, then --schedule."""
        config = self.config
        done = min(max(step - config.warmup, 0) / max(steps - config.warmup, 1), 1.0)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
        return config.lr * min((step + 1) / (config.warmup + 1), 1.0) * shape

    def update(self, model, optimizer, step, steps):
        """Clip, step, clear the gradients -> their norm before clipping.

        A norm of 0 leaves the weights as they are: neither momentum nor decay moves them where there is nothing to
        learn. One that is not finite skips the update and is counted; past MAX_SKIPPED of the updates the run ends.
        """
        gradients = [p.grad for p in trainable(model).values() if p.grad is not None]
        local = [g.to_local() for g in gradients] if self.fsdp else gradients
        norm = torch.stack(torch._foreach_norm(local)).norm() if local else torch.zeros((), device=self.device)
        norm = math.sqrt(self.sum(norm.double() ** 2)) if self.fsdp else norm.item()
        if norm > 0 and math.isfinite(norm):
            if norm > self.config.max_grad_norm:
                torch._foreach_mul_(local, self.config.max_grad_norm / norm)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step, steps)
            self._between = False
            optimizer.step()
        elif norm != 0:
            self.skipped += 1
            if self.skipped > MAX_SKIPPED * max(step + 1, 10):
                found = f"a gradient norm of {norm}, {self.skipped} of {step + 1} updates were skipped for such ones"
                most = f"a share of {MAX_SKIPPED} at most"
                raise InputError(f"step {step}: found {found}, expected {most}")
        optimizer.zero_grad()
        return norm

    # -- the loop

    def total_steps(self, n_items, per_update=None):
        """Updates of the whole run: --steps, or what --epochs of n_items items need, per_update of them each."""
        per_update = per_update or self.config.batch_size
        return self.config.steps or math.ceil(round(n_items * self.config.epochs) / per_update)

    def steps(self, model, optimizer, total):
        """The step numbers still to do, from where --resume finds the run; each is seeded by its number."""
        first = self.restore(model, optimizer)
        self._learning, self._done, self._saved = (model, optimizer), first, first
        self._saved_at = time.monotonic()
        self._bar = tqdm(
            initial=first,
            total=total,
            desc=self.stage,
            unit="step",
            leave=True,
            disable=not (self.is_main and sys.stderr.isatty()),
        )
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

    def report(self, step, metrics, tokens=0, phase_tokens=()):
        """One row of metrics.jsonl and of the terminal; "speed" holds what differs from run to run.

        tokens: those that all ranks have read in this step, for the rate, and on a known GPU for the MFU;
        phase_tokens: {phase: tokens} for a rate of each.
        """
        seconds = time.perf_counter() - self._began
        speed = {"seconds": round(seconds, 4), **{phase: round(t, 4) for phase, t in self._times.items()}}
        speed["memory_gb"] = memory_gb(self.device)
        for phase in phase_tokens:
            speed[f"{phase}_tokens_per_second"] = round(phase_tokens[phase] / max(self._times.get(phase, 0), 1e-9), 1)
        if tokens:
            speed["tokens_per_second"] = round(tokens / seconds, 1)
            card = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
            peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
            if peak:
                work = 6 if self.config.full else 4  # frozen weights need no gradient: a third of the work less
                speed["mfu"] = round(work * self.parameters * tokens / seconds / peak / self.world, 4)
        self._new = False
        measured = {name: x for name, x in metrics.items() if math.isfinite(x)}  # JSON knows no NaN
        metrics = {"step": step, **measured, "skipped": self.skipped}
        self.append("metrics", {**metrics, "speed": speed})
        line = "  ".join(f"{name} {x:.4g}" for name, x in list(metrics.items())[1:-1] if isinstance(x, (int, float)))
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
                place = f"{self.stage} step {self.step}, in {self._phase!r} for {since} s"
                print(f"rank {self.rank}: {place}", file=sys.stderr, flush=True)

    def _on_signal(self, number, frame):
        self._stop = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once

    # -- stop and go on

    def checkpoint(self, step, model, optimizer, extra=None, score=None):
        """Save after `step` updates where --save-every says so; after a signal save and end with exit code 0.

        extra: a JSON-able dict that the resumed run finds in run.extra. score: saves, too; the one with the highest is
        kept, and <out>/checkpoints/best leads to it.
        """
        self.extra, self._done, self._between = extra or {}, step, True
        late = self._save_seconds and time.monotonic() >= self._saved_at + self._save_seconds
        late = late or self._save_steps and step % self._save_steps == 0
        stop, late = self.max([int(self._stop), int(bool(late))])  # clocks and signals differ from rank to rank
        if stop or late or score is not None:
            self._save(score)
        if stop:
            if self.is_main:
                print(f"{self.stage}: stopped by a signal after step {step}, --resume continues", file=sys.stderr)
            sys.exit(0)

    def _save(self, score=None, alone=False):
        self._between = False  # where it fails there is no other try on the way out
        with self.phase("save"):
            self.checkpoints.save(self._done, *self._learning, self.extra, score, alone)
        self._between, self._saved, self._saved_at = True, self._done, time.monotonic()

    def _rescue(self, alone):
        """Save what was learned before the step that fails. alone: the other ranks do not know of it."""
        if self._between and self._done > self._saved and not (alone and self.fsdp):
            phase = self._phase
            try:
                self._save(alone=alone)
                said = "saved, --resume continues"
            except Exception as error:  # the one that came first is what matters
                said = f"and could not be saved: {plain(error)}"
            self._phase = phase
            if alone or self.is_main:
                print(f"{self.stage}: step {self.step} failed in {phase!r}, {said}", file=sys.stderr, flush=True)

    def together(self, work):
        """work() on every rank; where it fails on one of them, all save and end."""
        answer, failure = None, None
        try:
            answer = work()
        except Exception as error:
            failure = error
        if self.max(int(failure is not None)):
            self._rescue(alone=False)
            if failure:
                raise failure
            sys.exit(2)  # the rank at fault says why
        return answer

    def restore(self, model, optimizer):
        """With --resume, load the newest whole checkpoint -> its step; else 0. Logs are cut back to that step."""
        wrong = not_finite(model)
        if self.max(int(bool(wrong))):
            raise InputError(f"{self.base}: found NaN or infinity in {wrong or 'its weights'}, expected numbers")
        self.id, self.digests = self.on_main(lambda: self._begin(model))
        state = self.checkpoints.restore(model, optimizer) if self.config.resume else None
        state = state or {"step": 0, "skipped": 0, "extra": {}}
        self.skipped, self.extra = state["skipped"], state["extra"]
        if self.is_main:
            cut_logs(self.out, folder.LOGS, state["step"])
            if self.config.resume:
                print(f"{self.stage}: resumed after step {state['step']}", file=sys.stderr, flush=True)
        return state["step"]

    # -- the end

    def finish(self, model):
        """Write the final weights: <out>/model in the hub's layout, or <out>/adapter."""
        self._new = False
        if self._done > self._saved:  # whatever happens to the final weights
            self._save()
        self._between = False
        with self.phase("finish"):
            if self.fsdp:
                model = whole(model, self.dtype, self.is_main)
            if self.config.full:  # in one dtype, on any number of ranks
                self.on_main(lambda: qwen.save_pretrained(model, self.out / "model", self.dtype))
            else:
                self.on_main(lambda: qwen.save_adapter(model, self.out / "adapter"))
            asked = self._save_steps or (self.out / "checkpoints" / "best").exists()
            if self.is_main and not asked:  # nobody asked for those of certain steps: they guarded the run
                folder.delete(self.out, ["checkpoints", f"{folder.START}{self.id}"])


# -- 3. what it tells --------------------------------------------------------------------------------------------------


def memory_gb(device):
    """Peak memory of this process so far, GB: the GPU's, or the resident set."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["plan"]:
        found = argv[0] if argv else "no command"
        raise InputError(f"found {found}, expected: python training.py plan --model M (--help lists the flags)")
    from support import plan  # here, as it imports this file

    plan.main(argv[1:])


if __name__ == "__main__":
    command(main)
