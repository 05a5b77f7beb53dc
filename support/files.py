"""Files of a model: JSON that is what it should be, tensors read from where they are mapped, folders that appear whole.

Nothing here knows what the model is; every fault is an InputError in one line that names the file, what was found in it
and what was expected.
"""

import json
import mmap
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import InputError

# -- 1. folders and JSON ----------------------------------------------------------------------------------------------

KINDS = {  # of values in JSON: what is asked for, and whether a value is that
    int: ("a positive integer", lambda value: isinstance(value, int) and value > 0),
    float: ("a positive number", lambda value: isinstance(value, (int, float)) and value > 0),
    tuple: ("a list of integers", lambda value: isinstance(value, list) and all(isinstance(i, int) for i in value)),
    dict: ("an object", lambda value: isinstance(value, dict)),
}


def expect(where, key, value, fits, expected):
    if not fits:
        raise InputError(f"{where}: found {key} = {value!r}, expected {expected}")


def read(section, key, kind, where, default=None):
    """section[key], which has to be of a kind in KINDS; null counts as absent."""
    value = default if section.get(key) is None else section[key]
    expect(where, key, value, not isinstance(value, bool) and KINDS[kind][1](value), KINDS[kind][0])
    return tuple(value) if kind is tuple else value


def read_json(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else "no such file"
        raise InputError(f"{path}: found {reason}, expected JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def find_folder(path_or_hub_id):
    """The folder of a checkpoint; a hub id goes through huggingface-hub and its cache, so HF_HUB_OFFLINE works."""
    name = str(path_or_hub_id)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise InputError(f"{name}: found no such folder, expected a checkpoint's folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # the client's errors have no common base
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{name}: found no such folder and no such model on the hub ({reason})") from None


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(folder):
    """A folder beside `folder` to write into, whose files take their places at the end; on an error none does."""
    folder = Path(folder)
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        new.mkdir(parents=True)
        yield new
        if not folder.is_dir():
            os.replace(new, folder)
            return
        stale = {path.name for path in folder.glob("*.safetensors*")} - {path.name for path in new.iterdir()}
        for path in new.iterdir():
            os.replace(path, folder / path.name)
        for name in stale:  # shards of what stood here before
            os.unlink(folder / name)
    except SafetensorError as error:  # a full disk, say
        raise InputError(f"{folder}: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


# -- 2. tensors -------------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFile:
    """A memory-mapped safetensors file: 8 bytes of header length, a JSON header, the bytes of the tensors."""

    def __init__(self, path):
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # the library's own check of the header and of the file's length
                pass
            with open(path, "rb") as file:
                self.start = 8 + int.from_bytes(file.read(8), "little")
                self.entries = json.loads(file.read(self.start - 8))  # name -> {"dtype", "shape", "data_offsets"}
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: found {error}, expected a whole safetensors file") from None
        self.entries.pop("__metadata__", None)
        for name, entry in self.entries.items():
            if entry["dtype"] not in DTYPES:
                raise InputError(f"{path}: found {name} in {entry['dtype']}, expected one of {', '.join(DTYPES)}")

    def read(self, name, device, dtype):
        """One tensor, cast and placed. Its mapped pages are given back at once, so that they never add up."""
        entry, (first, last) = self.entries[name], (self.start + byte for byte in self.entries[name]["data_offsets"])
        stored = DTYPES[entry["dtype"]]
        source = torch.frombuffer(self.bytes, dtype=stored, count=(last - first) // stored.itemsize, offset=first)
        tensor = torch.empty(entry["shape"], dtype=dtype, device=device).copy_(source.view(entry["shape"]))
        if hasattr(mmap, "MADV_DONTNEED"):
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self.bytes.madvise(mmap.MADV_DONTNEED, page, last - page)
        return tensor


def check_tensors(where, expected, found):
    """Raise InputError that names every missing, unexpected and mis-shaped tensor; both are {name: shape}."""
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if tuple(found[name]) != tuple(expected[name]):
            faults.append(f"{name} of shape {list(found[name])}, expected {list(expected[name])}")
    if faults:
        raise InputError(f"{where}: found {len(faults)} tensors that do not fit: {'; '.join(sorted(faults))}")
