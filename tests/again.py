"""What several test files do with a file: run it again under Triton's interpreter, or import it changed."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


def interpreted(file):
    """Run a test file in a process of its own, its Triton kernels interpreted; it has to pass.

    Triton 3.6's interpreter makes numbers of arrays in a way that NumPy 2.4 refuses; that of 3.9 does not.
    """
    old = lambda name, *least: tuple(map(int, version(name).split(".")[:2])) < least
    if old("triton", 3, 9) and not old("numpy", 2, 4):
        pytest.skip("this Triton's interpreter needs NumPy before 2.4")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def load(path, monkeypatch):
    """The module of a file, under a name of its own beside the real one, for as long as the test lasts."""
    spec = importlib.util.spec_from_file_location(f"tested_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def changed(path, right, wrong, folder, monkeypatch):
    """The module of a file in which `wrong` stands for `right`, that has to stand there once; written into `folder`."""
    source = path.read_text()
    assert source.count(right) == 1
    copy = folder / f"wrong_{path.name}"
    copy.write_text(source.replace(right, wrong))
    return load(copy, monkeypatch)
