"""Files of a model: JSON that is what it should be, tensors read from where they are mapped, folders that appear whole.

Nothing here knows what the model is; every fault is an InputError in one line that names the file, what was found in it
and what was expected.
"""

import json
import math
import mmap
import os
import re
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import InputError

# -- 1. folders and JSON ----------------------------------------------------------------------------------------------

KINDS = {  # of values in JSON: what is asked for, and whether a value is that
    int: (f"a positive integer, {10**9:,} at most", lambda value: isinstance(value, int) and 0 < value <= 10**9),
    float: ("a positive number", lambda value: isinstance(value, (int, float)) and 0 < value < math.inf),
    tuple: ("a list of integers", lambda value: isinstance(value, list) and all(type(i) is int for i in value)),
    dict: ("an object", lambda value: isinstance(value, dict)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
}
JSON_BYTES = 64 << 20  # the longest JSON that is read; a tokenizer.json has 11 MB
FILES = (  # of a checkpoint: those that are downloaded, and copied beside new weights
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


def shown(value, most=120):
    """A value from a file as it may stand in an error line: cut, and nothing in it that a terminal would obey."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def expect(where, key, value, fits, expected):
    if not fits:
        value = shown(repr(value))
        raise InputError(f"{where}: found {shown(key)} = {value}, expected {expected}")


def read(section, key, kind, where, default=None):
    """section[key], which has to be of a kind in KINDS; null counts as absent."""
    value = default if section.get(key) is None else section[key]
    fits = KINDS[kind][1](value) and (kind is bool or not isinstance(value, bool))
    expect(where, key, value, fits, KINDS[kind][0])
    return tuple(value) if kind is tuple else value


def find_file(folder, name):
    """The path of a checkpoint's own file, None where the folder has none of that name.

    Raises InputError for a name that leads elsewhere, for a link out of the folder (into a hub cache's own blobs is
    fine), and for what is no regular file: a FIFO would never answer, a device never end.
    """
    path, home = folder / name, folder.resolve()
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise InputError(f"{folder}: found a file named {shown(repr(name))}, expected a plain name")
    try:
        mode, target = path.stat().st_mode, path.resolve()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a file") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: found something else than a regular file, expected a file")
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home  # as the hub's client keeps them
    if target.parent not in (home, blobs.resolve()):
        raise InputError(f"{path}: found a link to {target}, expected a file inside the folder")
    return path


def read_text(path, most=JSON_BYTES):
    """A file of a checkpoint as text. Raises InputError where it is absent, too long, or not what `find_file` takes."""
    path = Path(path)
    if find_file(path.parent, path.name) is None:
        raise InputError(f"{path}: found no such file, expected text")
    if (size := path.stat().st_size) > most:
        raise InputError(f"{path}: found {size:,} bytes, expected {most:,} at most")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: found {shown(str(error))}, expected text in UTF-8") from None


def read_json(path):
    """The object in a JSON file of a checkpoint. Raises InputError that names the file."""
    path = Path(path)
    if find_file(path.parent, path.name) is None:
        raise InputError(f"{path}: found no such file, expected JSON")
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: found {shown(str(error))}, expected JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def find_folder(path_or_hub_id, hub="download"):
    """The folder of a checkpoint.

    hub: "download", a hub id is fetched through huggingface-hub and its cache, so HF_HUB_OFFLINE works; "cache", it has
      to lie in that cache already; "", only a local folder will do. What starts with a local folder is no hub id.
    """
    name = str(path_or_hub_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        kind = "a GGUF file (llama.cpp's quantised weights)" if folder.suffix == ".gguf" else "a file"
        raise InputError(f"{shown(name)}: found {kind}, expected a checkpoint's folder")
    plain = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name.partition("/")[0]).is_dir()
    if not hub or not plain:
        expected = "a checkpoint's folder" + " or a hub id (owner/name)" * (hub == "download")
        raise InputError(f"{shown(name)}: found no such folder, expected {expected}")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        patterns = [*FILES, "*.safetensors", "model.safetensors.index.json"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=hub == "cache"))
    except Exception as error:  # the client's errors have no common base
        reason = shown(str(error).strip().split("\n")[0] or type(error).__name__, 400)
        raise InputError(f"{name}: found no such folder and no such model on the hub ({reason})") from None


def copy_files(source, target):
    """Copy the files of a checkpoint that describe it, those in FILES but config.json, from folder to folder."""
    for name in FILES[1:]:
        if path := find_file(source, name):
            shutil.copyfile(path, target / name)


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
        (new / ".mode").touch()
        mode = stat.S_IMODE((new / ".mode").stat().st_mode)  # what the umask leaves; safetensors writes 0600
        (new / ".mode").unlink()
        for path in new.iterdir():
            path.chmod(mode)
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

INDEX, SHARD_BYTES = "model.safetensors.index.json", 5 * 10**9
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFile:
    """A memory-mapped safetensors file: 8 bytes of header length, a JSON header, the bytes of the tensors."""

    def __init__(self, path):
        self.path = path
        if find_file(path.parent, path.name) is None:
            raise InputError(f"{path}: found no such file, expected a whole safetensors file")
        try:
            with safe_open(path, framework="pt"):  # the library's own check of the header and of the file's length
                pass
            with open(path, "rb") as file:
                self.start = 8 + int.from_bytes(file.read(8), "little")
                self.entries = json.loads(file.read(self.start - 8))  # name -> {"dtype", "shape", "data_offsets"}
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: found {shown(str(error))}, expected a whole safetensors file") from None
        self.entries.pop("__metadata__", None)
        for name, entry in self.entries.items():
            if entry["dtype"] not in DTYPES:
                found = f"{shown(name)} in {entry['dtype']}"
                raise InputError(f"{path}: found {found}, expected one of {', '.join(DTYPES)}")

    def mapped(self, name):
        """One tensor as it is stored, its bytes still in the file."""
        entry, (first, last) = self.entries[name], (self.start + byte for byte in self.entries[name]["data_offsets"])
        stored = DTYPES[entry["dtype"]]
        if first == last:
            return torch.empty(entry["shape"], dtype=stored)
        flat = torch.frombuffer(self.bytes, dtype=stored, count=(last - first) // stored.itemsize, offset=first)
        return flat.view(entry["shape"])

    def read(self, name, device, dtype):
        """One tensor, cast and placed. Its mapped pages are given back at once, so that they never add up."""
        first, last = (self.start + byte for byte in self.entries[name]["data_offsets"])
        tensor = torch.empty(self.entries[name]["shape"], dtype=dtype, device=device).copy_(self.mapped(name))
        if hasattr(mmap, "MADV_DONTNEED"):
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self.bytes.madvise(mmap.MADV_DONTNEED, page, last - page)
        return tensor


def weight_files(folder):
    """The TensorFiles of a checkpoint, chosen as transformers does: the single file, else those of the index."""
    if single := find_file(folder, "model.safetensors"):
        return [TensorFile(single)]
    if index := find_file(folder, INDEX):
        names = read(read_json(index), "weight_map", dict, index).values()
        for name in names:
            expect(index, "weight_map", name, isinstance(name, str) and name.endswith(".safetensors"), "file names")
        expect(index, "weight_map", {}, names, "a file at least")
        for name in (names := sorted(set(names))):
            if find_file(folder, name) is None:
                raise InputError(f"{folder / name}: found no such file, expected one, as {INDEX} names it")
        return [TensorFile(folder / name) for name in names]
    found = "no such file"
    for pattern, kind in (
        ("*.bin", "weights in pickles; transformers' from_pretrained and save_pretrained make safetensors of them"),
        ("*.gguf", "llama.cpp's quantised weights; start from what they were made of"),
        ("adapter_model.safetensors", "a LoRA adapter, which goes on top of a checkpoint: --adapter"),
        ("*.safetensors", "weights under another name, and no index"),
    ):
        if others := sorted(path.name for path in folder.glob(pattern)):
            found = f"no such file but {shown(others[0])} ({kind})"
            break
    raise InputError(f"{folder / 'model.safetensors'}: found {found}, expected that file or {INDEX}")


def write_tensors(folder, tensors, dtype):
    """Write {name: tensor} in `dtype` as model.safetensors, or from SHARD_BYTES on as shards with an index."""
    shards, sizes = [{}], [0]
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and sizes[-1] + size > SHARD_BYTES:
            shards, sizes = [*shards, {}], [*sizes, 0]
        shards[-1][name] = tensor
        sizes[-1] += size
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards):
        cast = {key: tensor.to(dtype).contiguous() for key, tensor in shard.items()}
        save_file(cast, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def stored_once(files, rename):
    """{name: (TensorFile, its name there)} of all tensors in `files`, renamed; none may be there twice."""
    stored = {}
    for file in files:
        for name in file.entries:
            known = stored.setdefault(rename(name), (file, name))
            if known != (file, name):
                twice = f"{shown(name)} a second time, after {known[0].path.name}'s {shown(known[1])}"
                raise InputError(f"{file.path}: found {twice}, expected each tensor once")
    return stored


MOST_FAULTS = 2000  # in one line; the 72B has 1,412 tensors


def check_tensors(where, expected, found):
    """Raise InputError that names every missing, unexpected and mis-shaped tensor; both are {name: shape}."""
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unexpected {shown(name)}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if tuple(found[name]) != tuple(expected[name]):
            faults.append(f"{name} of shape {list(found[name])}, expected {list(expected[name])}")
    if faults:
        more = f"; and {len(faults) - MOST_FAULTS} more" * (len(faults) > MOST_FAULTS)
        named = "; ".join(sorted(faults)[:MOST_FAULTS])
        raise InputError(f"{where}: found {len(faults)} tensors that do not fit: {named}{more}")
