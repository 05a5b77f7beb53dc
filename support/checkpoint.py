"""Checkpoints of a training run: whole or absent, readable on any number of ranks, safetensors and JSON only.

    <out>/checkpoints/step-00000120/shard-00000-of-00002.safetensors    a rank's rows of parameters and AdamW's moments
                                    state.json                          step, checksums, run, config, counters

A checkpoint is written aside (step-N.tmp), forced to the disk and renamed: a folder without .tmp is a whole one, and
what the disk damages later fails its checksum; then it is renamed to step-N.damaged, and never counts again. No random
states are stored: randomness derives from (seed, step, item).
"""

import contextlib
import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import InputError, write_text
from support.files import read_json
from support.folder import need_room


def trainable(model):
    """{name: parameter} of what the optimiser moves, in the model's own order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def not_finite(model):
    """The name of a parameter that holds NaN or infinity (in this rank's rows); "" where none does."""
    local = lambda p: p.to_local() if hasattr(p, "to_local") else p
    return next((name for name, p in model.named_parameters() if not local(p.detach()).isfinite().all()), "")


def shard_name(rank, shards):
    return f"shard-{rank:05d}-of-{shards:05d}.safetensors"


class Checkpoints:
    """The checkpoints of a Run. Replicated weights are one shard, rank 0's; under FSDP a rank writes its own rows."""

    def __init__(self, run):
        self.run, self.folder = run, run.out / "checkpoints"
        self.shards = run.world if run.fsdp else 1

    # -- write

    def save(self, step, model, optimizer, extra, score=None, alone=False):
        """Write step's checkpoint aside, and publish it once every rank has written its shard.

        alone: this rank has all weights and cannot reach the others. Raises InputError where the disk has no room or a
        weight is no number; what is aside then disappears, and the older checkpoints stay.
        """
        run, final = self.run, self.folder / f"step-{step:08d}"
        writes = alone or run.rank < self.shards
        aside = final.with_suffix(f".{run.rank}.tmp" if alone else ".tmp")
        on_main, most = (lambda work: work(), lambda x: x) if alone else (run.on_main, run.max)
        tensors, wrong = {}, ""
        for name, p in trainable(model).items():
            for key, t in {"param": p.detach(), **optimizer.state.get(p, {})}.items():
                t = t.to_local() if hasattr(t, "to_local") else t
                wrong = wrong or ("" if t.isfinite().all() else f"{key}.{name}")
                tensors[f"{key}.{name}"] = t.cpu().contiguous()
        if most(int(bool(wrong))):
            raise InputError(f"{final}: found NaN or infinity in {wrong or 'another rank'}, expected numbers")
        size = self.shards * sum(t.nbytes for t in tensors.values())
        on_main(lambda: self._prepare(aside, size))
        crc, failure = 0, None
        try:
            if writes:
                path = aside / shard_name(0 if alone else run.rank, self.shards)
                save_file(tensors, path)
                crc = sync(path)
        except (OSError, SafetensorError) as error:
            failure = error
        if most(0 if failure is None else 1):
            if run.is_main or alone:
                shutil.rmtree(aside, ignore_errors=True)
            reason = failure or "another rank could not write its shard"
            raise InputError(f"{final}: {reason}; the checkpoint is not there, older ones are")
        sums = [crc] if alone else run.sum([crc if r == run.rank else 0 for r in range(run.world)])
        state = {
            **run.identity(),
            "step": step,
            "skipped": run.skipped,
            "extra": extra,
            "score": score,
            "version": code_version(),
            "torch": torch.__version__,
            "shards": [int(x) for x in sums][: self.shards],
        }
        on_main(lambda: self._publish(aside, final, state))

    def _prepare(self, aside, size):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            need_room(aside, size + 2**20, "a checkpoint")
        except InputError:
            aside.rmdir()
            raise

    def _publish(self, aside, final, state):
        try:
            write_json(aside / "state.json", {**state, "checksum": checksum_of(state)}, synced=True)
            for path in aside.iterdir():
                path.chmod((aside / "state.json").stat().st_mode)  # the umask's: safetensors writes 0600
            if not final.exists():
                os.replace(aside, final)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        shutil.rmtree(aside, ignore_errors=True)  # the run has this one already
        sync_folder(self.folder)
        self._prune()

    def _prune(self):
        """Keep the newest --keep, and the one with the best score."""
        whole = {name: state for name in self.names() if (state := self.state(name))}
        scores = {name: state["score"] for name, state in whole.items() if state["score"] is not None}
        best = max(scores, key=scores.get, default=None)
        if best:
            (self.folder / "best.new").unlink(missing_ok=True)
            (self.folder / "best.new").symlink_to(best)
            os.replace(self.folder / "best.new", self.folder / "best")
        for name in [*whole][self.run.config.keep :]:
            if name != best:
                shutil.rmtree(self.folder / name)

    def size(self):
        """Bytes of those that are here."""
        return sum(path.stat().st_size for path in self.folder.glob("step-*/*"))

    # -- read

    def names(self):
        """Newest first."""
        return sorted((path.name for path in self.folder.glob("step-????????")), reverse=True)

    def state(self, name):
        """Its state.json; {} where that is not as it was written, or says another step than the folder's name."""
        try:
            state = read_json(self.folder / name / "state.json")
            whole = state.pop("checksum") == checksum_of(state) and state["shards"]
            return state if whole and name == f"step-{state['step']:08d}" else {}
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return {}

    def newest_state(self):
        """The newest state that can be read; {} without one."""
        return next((state for name in self.names() if (state := self.state(name))), {})

    def newest_whole(self):
        """The name of the newest checkpoint that is as it was written, to the last bit; None where there is none.

        Damaged ones are put away with a line each. Raises InputError where all are damaged, or one is another run's.
        """
        for path in self.folder.glob("*.tmp"):  # a kill came in between
            shutil.rmtree(path)
        damaged, names = [], self.names()
        for name in names:
            reason = self._damage(name)
            if not reason:
                break
            damaged.append(name)
            print(f"{self.folder / name}: skipped, it is damaged ({reason})", file=sys.stderr, flush=True)
        if names and damaged == names:
            found = f"found {len(names)} checkpoints, none of them whole"
            expected = "expected one (--overwrite without --resume starts the run anew)"
            raise InputError(f"{self.folder}: {found}, {expected}")
        for name in damaged:
            os.replace(self.folder / name, self.folder / f"{name}.damaged")
        return names[len(damaged)] if names else None

    def _damage(self, name):
        """What is wrong with a checkpoint; "" where it is as it was written."""
        state = self.state(name)
        if not state:
            return "its state.json is not as it was written"
        if state["run"] != self.run.id:
            raise InputError(f"{self.folder / name}: found a checkpoint of another run, expected those of this one")
        try:
            for rank, crc in enumerate(state["shards"]):
                shard = shard_name(rank, len(state["shards"]))
                if checksum(self.folder / name / shard) != crc:
                    return f"{shard} has another checksum than when it was written"
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return ""

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


def cut_logs(folder, names, step):
    """Drop from a run's logs the rows of steps that will be done again, and what a kill or a bad disk left of lines."""
    for path in (Path(folder) / name for name in names):
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            aside = path.with_name(f"{path.name}.tmp")
            aside.write_bytes(b"".join(line for line in lines if line.endswith(b"\n") and step_of(line) < step))
            os.replace(aside, path)


def step_of(line):
    """The step of a row, math.inf of what is no row."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
        return math.inf


# -- files ------------------------------------------------------------------------------------------------------------


def to_json(value, **layout):
    """JSON that every reader takes: NaN and infinity, which JSON does not know, become null."""

    def finite(x):
        if isinstance(x, dict):
            return {key: finite(each) for key, each in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(each) for each in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(value), allow_nan=False, **layout)


def write_json(path, value, synced=False):
    """A value as JSON, NaN as null, by `write_text`."""
    write_text(path, to_json(value, indent=1) + "\n", synced)


def checksum_of(value):
    """CRC-32 of a JSON value, however it is laid out."""
    return zlib.crc32(json.dumps(json.loads(to_json(value)), sort_keys=True).encode())


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
