"""Checkpoints of a training run: whole or absent, readable on any number of ranks, safetensors and JSON only.

    <out>/checkpoints/step-00000120/shard-00000-of-00002.safetensors    a rank's rows of parameters and AdamW's moments
                                    state.json                          step, checksums, config, code version, counters

A checkpoint is written aside (step-N.tmp), forced to the disk and renamed: a folder without .tmp is a whole one, and
what the disk damages later fails its checksum. No random states are stored: randomness derives from (seed, step, item).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import InputError


def trainable(model):
    """{name: parameter} of what the optimiser moves, in the model's own order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shard_name(rank, shards):
    return f"shard-{rank:05d}-of-{shards:05d}.safetensors"


class Checkpoints:
    """The checkpoints of a Run. Replicated weights are one shard, rank 0's; under FSDP a rank writes its own rows."""

    def __init__(self, run):
        self.run, self.folder = run, run.out / "checkpoints"
        self.shards = run.world if run.fsdp else 1

    # -- write

    def save(self, step, model, optimizer, extra, score=None):
        """Write step's checkpoint aside, and publish it once every rank has written its shard.

        Raises InputError where the disk has no room; what is aside then disappears, and the older checkpoints stay.
        """
        run, final = self.run, self.folder / f"step-{step:08d}"
        tensors = {}
        for name, p in trainable(model).items():
            for key, t in {"param": p.detach(), **optimizer.state.get(p, {})}.items():
                t = t.to_local() if hasattr(t, "to_local") else t
                tensors[f"{key}.{name}"] = t.cpu().contiguous()
        aside = final.with_suffix(".tmp")
        size = sum(t.nbytes for t in tensors.values())
        run.on_main(lambda: self._prepare(aside, final, size))
        crc, failure = 0, None
        try:
            if run.rank < self.shards:
                save_file(tensors, aside / shard_name(run.rank, self.shards))
                crc = sync(aside / shard_name(run.rank, self.shards))
        except (OSError, SafetensorError) as error:
            failure = error
        if run.max(0 if failure is None else 1):
            if run.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            reason = failure or "another rank could not write its shard"
            raise InputError(f"{final}: {reason}; the checkpoint is not there, older ones are")
        sums = run.sum([crc if r == run.rank else 0 for r in range(run.world)])
        state = {
            "step": step,
            "stage": run.stage,
            "skipped": run.skipped,
            "extra": extra,
            "score": score,
            "config": dataclasses.asdict(run.config),
            "version": code_version(),
            "torch": torch.__version__,
            "shards": [int(x) for x in sums][: self.shards],
        }
        run.on_main(lambda: self._publish(aside, final, state))

    def _prepare(self, aside, final, size):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        free, need = shutil.disk_usage(aside).free, size * self.shards + 2**20
        if free < need:
            aside.rmdir()
            sizes = f"found {free / 2**30:.2f} GB of free disk, expected {need / 2**30:.2f} GB"
            raise InputError(f"{final}: {sizes} for a checkpoint")

    def _publish(self, aside, final, state):
        try:
            write_json(aside / "state.json", state, synced=True)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one, that --resume has skipped
            os.replace(aside, final)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_folder(self.folder)
        self._prune()

    def _prune(self):
        """Keep the newest --keep, and the one with the best score."""
        whole = self.names()
        scores = {name: self.state(name).get("score") for name in whole}
        best = max((name for name in whole if scores[name] is not None), key=lambda name: scores[name], default=None)
        for name in whole[self.run.config.keep :]:
            if name != best:
                shutil.rmtree(self.folder / name)

    # -- read

    def names(self):
        """Newest first."""
        return sorted((path.name for path in self.folder.glob("step-????????")), reverse=True)

    def state(self, name):
        try:
            return json.loads((self.folder / name / "state.json").read_text())
        except (OSError, ValueError):
            return {}

    def newest_whole(self):
        """The name of the newest checkpoint that is as it was written, to the last bit; a line for a damaged one."""
        for path in self.folder.glob("*.tmp"):  # a kill came in between
            shutil.rmtree(path)
        for name in self.names():
            try:
                sums = self.state(name)["shards"]
                damaged = [
                    shard_name(r, len(sums))
                    for r, crc in enumerate(sums)
                    if checksum(self.folder / name / shard_name(r, len(sums))) != crc
                ]
                if not damaged:
                    return name
                reason = f"{damaged[0]} has another checksum than when it was written"
            except (OSError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"
            print(f"{self.folder / name}: skipped, it is damaged ({reason})", file=sys.stderr, flush=True)
        return None

    def restore(self, model, optimizer):
        """Read the newest whole checkpoint into model and optimiser, on any number of ranks -> its state, or None."""
        name = self.run.on_main(self.newest_whole)
        if name is None:
            return None
        state = self.state(name)
        shards = len(state["shards"])
        with contextlib.ExitStack() as stack:
            paths = [self.folder / name / shard_name(r, shards) for r in range(shards)]
            files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            known = set(files[0].keys())
            for key, p in trainable(model).items():
                if f"param.{key}" not in known:
                    raise InputError(f"{self.folder / name}: found no {key}, expected a checkpoint of this model")
                for part in ("param", "step", "exp_avg", "exp_avg_sq"):
                    if f"{part}.{key}" in known:
                        t = self._rows(files, f"{part}.{key}", p)
                        p.data.copy_(t) if part == "param" else optimizer.state[p].__setitem__(part, t)
        return state

    def _rows(self, files, key, p):
        """This rank's rows of a tensor that lies in `files` in equal chunks, the last shorter; a scalar as it is."""
        if not files[0].get_slice(key).get_shape():  # AdamW's step, which the fused kernel wants beside the weights
            return files[0].get_tensor(key).to("cpu" if self.run.fsdp else p.device)
        start, stop, rows = 0, p.shape[0], p.shape[0]
        if self.run.fsdp:  # fully_shard's own rule: chunks of ceil(rows / ranks)
            chunk = -(-rows // self.run.world)
            start, stop = min(self.run.rank * chunk, rows), min((self.run.rank + 1) * chunk, rows)
        held = -(-rows // len(files))
        local = torch.cat(
            [
                file.get_slice(key)[max(start - r * held, 0) : max(min(stop - r * held, held), 0)]
                for r, file in enumerate(files)
            ]
        ).to(p.device)
        if not self.run.fsdp:
            return local
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def cut_logs(folder, step):
    """Drop from <folder>/*.jsonl the rows of steps that will be done again, and a line that a kill cut short."""
    for path in Path(folder).glob("*.jsonl"):
        rows = []
        for line in path.read_text().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                if line.endswith("\n") and json.loads(line).get("step", 0) < step:
                    rows.append(line)
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(rows))
        os.replace(aside, path)


# -- files ------------------------------------------------------------------------------------------------------------


def write_json(path, value, synced=False):
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    aside = Path(f"{path}.tmp")
    try:
        aside.write_text(json.dumps(value, indent=1) + "\n")
        if synced:
            sync(aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def checksum(path):
    """CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc


def sync(path):
    """Force a file to the disk -> its checksum."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return checksum(path)


def sync_folder(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def code_version():
    """The commit of this code, read from .git; empty outside a clone."""
    git = Path(__file__).resolve().parents[1] / ".git"
    with contextlib.suppress(OSError):
        head = (git / "HEAD").read_text().strip()
        return (git / head[5:]).read_text().strip() if head.startswith("ref: ") else head
    return ""
