"""The folder that a command writes to: whose it is, one process at a time that writes it, what it was made from.

A run makes, cuts and deletes only what OWN names. A folder is free where nothing stands in it but what a kill left
there, and a run's where its config.json or a checkpoint says so. Every other one is somebody else's, whatever the
flags.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from data import InputError, refuse_strangers

LOGS = ("metrics.jsonl", "samples.jsonl", "validation.jsonl")
# deleted in this order: what says whose the folder is goes last
OWN = (*LOGS, "tensorboard", "checkpoints", "model", "adapter", "config.json")
START = ".start."  # and the run's id: what it starts from, where that is another run's checkpoint
LEFTOVERS = (".lock", f"{START}*", ".model.*", ".adapter.*", "*.tmp")
SAMPLE = 1 << 16  # bytes; longer files than 4,096 of them are read in so many places


def keep_apart(out, inputs):
    """Raise InputError where `out` is no folder, or is or contains one that is read. inputs: {flag: path or ""}."""
    if os.path.lexists(out) and not os.path.isdir(out):
        raise InputError(f"--out {out}: found a file, expected a folder")
    place = os.path.realpath(out)
    for flag, path in inputs.items():
        read = os.path.realpath(path) if path and os.path.exists(path) else ""
        if read and os.path.commonpath([place, read]) == place:
            how = "is" if read == place else "contains"
            raise InputError(f"--out {out}: found that it {how} {flag} {path}, expected a folder of its own")


def refuse_foreign(out, is_ours):
    """Raise InputError where a folder is not `is_ours` and holds anything."""
    if not is_ours:
        refuse_strangers(out, (*LEFTOVERS, "judge.cache"))  # which is kept, as it has cost money


def lock(folder, wait=0.0):
    """The open file that keeps other processes out of `folder` until it is closed or its process dies.

    wait: seconds to wait for another process. Raises InputError where that one goes on for longer. A file system
    without locks (Lustre, NFS) gets a warning: then it is up to the user.
    """
    path, end = Path(folder) / ".lock", time.monotonic() + wait
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
                file.close()  # whoever held it has just removed it
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    reason = f"the folder cannot be locked ({error.strerror}), let no other process write it"
                    print(f"warning: {folder}: {reason}", file=sys.stderr, flush=True)
                    return file
                file.close()
                if time.monotonic() >= end:
                    said = "another process is writing it, expected another folder"
                    raise InputError(f"--out {folder}: {said}") from None
                time.sleep(0.05)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}, expected a folder that can be written") from None


def unlock(folder, file):
    (Path(folder) / ".lock").unlink(missing_ok=True)
    file.close()


def matching(folder, patterns):
    return [path.name for pattern in patterns for path in Path(folder).glob(pattern)]


def delete(folder, names):
    for path in (Path(folder) / name for name in names):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def need_room(folder, size, what):
    """Raise InputError where the disk has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        found = f"found {free / 2**30:.2f} GB of free disk, expected {size / 2**30:.2f} GB"
        raise InputError(f"{folder}: {found} for {what}")


def digest(files):
    """What tells whether files are the same: a hash of their bytes; of a file above 256 MB of 4,096 places in it.

    files: {name: path}.
    """
    whole = hashlib.sha256()
    for name, path in sorted(files.items()):
        size = os.path.getsize(path)
        whole.update(f"{name} {size} ".encode(errors="surrogateescape"))
        step = max(SAMPLE, size // 4096)
        with open(path, "rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                whole.update(file.read(SAMPLE))
    return whole.hexdigest()[:32]
