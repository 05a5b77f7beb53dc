"""Nothing is lost on the way: a run that was stopped, killed or damaged ends with the bits of one that was not."""

import json
import os
import resource
import shutil
import signal

import pytest
from helpers import tiny_checkpoint
from small import arguments, metrics, quiet, small_data

import train_cpt
import train_sft
from data import InputError
from support import checkpoint
from training import Run

STAGES = {"cpt": (train_cpt.main, {"kinds": "applied,document"}), "sft": (train_sft.main, {})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")
    for stage in STAGES:
        assert train(folder, folder / f"{stage}-whole", stage) == 0
    return folder


def train(folder, out, stage="sft", **flags):
    main, own = STAGES[stage]
    return quiet(
        main, arguments(folder / "model", folder / "data", out, **{"steps": 5, "save_every": 2, **own, **flags})
    )[0]


def final(out):
    (path,) = [*out.glob("model/*.safetensors"), *out.glob("adapter/*.safetensors")]
    return path.read_bytes()


def same(a, b):
    return metrics(a) == metrics(b) and final(a) == final(b)


@pytest.fixture
def stopped(monkeypatch):
    """Make the run meet a signal, or die, in its n-th step."""

    def at(n, how):
        original, seen = Run.report, []

        def report(self, *args, **kwargs):
            original(self, *args, **kwargs)
            seen.append(1)
            if len(seen) == n:
                how()

        monkeypatch.setattr(Run, "report", report)

    yield at


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it and clean up. tests/fault.py sends the real one."""


def die():
    raise Killed


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_code_0_and_resume_gives_the_same_bits(folder, tmp_path, stopped, stage, number):
    stopped(3, lambda: os.kill(os.getpid(), number))
    assert train(folder, tmp_path / "run", stage, save_every=0) == 0
    assert checkpoint_names(tmp_path / "run") == ["step-00000003"] and not (tmp_path / "run" / "model").exists()
    assert train(folder, tmp_path / "run", stage, save_every=0, resume=True) == 0
    assert same(tmp_path / "run", folder / f"{stage}-whole")


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_kill_at_any_step_costs_no_bit(folder, tmp_path, stopped, step):
    stopped(step, die)
    with pytest.raises(Killed):
        train(folder, tmp_path / "run")
    assert train(folder, tmp_path / "run", resume=True) == 0
    assert same(tmp_path / "run", folder / "sft-whole")


def checkpoint_names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_a_kill_during_a_save_leaves_the_checkpoint_before(folder, tmp_path, monkeypatch):
    """The shard of step 4 is written, its state is not: it has no name yet, and the run goes on from step 2."""
    original = checkpoint.Checkpoints._publish
    monkeypatch.setattr(
        checkpoint.Checkpoints,
        "_publish",
        lambda self, a, f, state: die() if state["step"] == 4 else original(self, a, f, state),
    )
    with pytest.raises(Killed):
        train(folder, tmp_path / "run")
    assert checkpoint_names(tmp_path / "run") == ["step-00000002", "step-00000004.tmp"]
    monkeypatch.setattr(checkpoint.Checkpoints, "_publish", original)
    assert train(folder, tmp_path / "run", resume=True) == 0
    assert same(tmp_path / "run", folder / "sft-whole")
    assert checkpoint_names(tmp_path / "run") == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("damage", ["cut short", "one bit", "no state", "half a state", "no shard"])
def test_a_damaged_checkpoint_is_skipped_with_a_line(folder, tmp_path, damage):
    """The one before it is as good: only time is lost."""
    out = tmp_path / "run"
    shutil.copytree(folder / "sft-whole", out)
    shutil.rmtree(out / "adapter")
    newest = out / "checkpoints" / "step-00000005"
    shard, state = newest / "shard-00000-of-00001.safetensors", newest / "state.json"
    if damage == "cut short":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "one bit":
        raw = bytearray(shard.read_bytes())
        raw[-5] ^= 1
        shard.write_bytes(raw)
    elif damage == "half a state":
        state.write_text(state.read_text()[:50])
    else:
        (state if damage == "no state" else shard).unlink()
    main, own = STAGES["sft"]
    code, errors = quiet(
        main, arguments(folder / "model", folder / "data", out, steps=5, save_every=2, resume=True, **own)
    )
    assert code == 0 and "step-00000005: skipped, it is damaged" in errors and "resumed after step 4" in errors
    assert same(out, folder / "sft-whole")
    assert checkpoint_names(out) == ["step-00000004", "step-00000005", "step-00000005.damaged"]


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(folder, tmp_path, stopped):
    """From step 3 on no file may grow past 20 KB, as on a disk that fills while the shard is written."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    stopped(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1])))
    try:
        with pytest.raises(InputError, match="step-00000004: .*the checkpoint is not there, older ones are"):
            train(folder, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint_names(tmp_path / "run") == ["step-00000002"]
    assert train(folder, tmp_path / "run", resume=True) == 0
    assert same(tmp_path / "run", folder / "sft-whole")


def test_too_little_room_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="GB of free disk, expected .* for 3 checkpoints .* and the final weights"):
        train(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_newest_and_the_best_are_kept(folder, tmp_path, monkeypatch):
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.2, 5: 0.3}
    original = Run.checkpoint
    monkeypatch.setattr(Run, "checkpoint", lambda self, step, *rest: original(self, step, *rest, score=scores[step]))
    assert train(folder, tmp_path / "run", save_every=1, keep=2) == 0
    assert checkpoint_names(tmp_path / "run") == ["step-00000002", "step-00000004", "step-00000005"]


def test_resume_refuses_another_config_but_takes_another_path_to_the_same_goal(folder, tmp_path, stopped):
    stopped(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(folder, tmp_path / "run", "cpt") == 0
    with pytest.raises(InputError, match="lr 0.001 -> 0.002"):
        train(folder, tmp_path / "run", "cpt", resume=True, lr=2e-3)
    assert train(folder, tmp_path / "run", "cpt", resume=True, micro_batch=1, save_every=1) == 0
    for a, b in zip(metrics(tmp_path / "run"), metrics(folder / "cpt-whole")):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_checkpoint_says_what_wrote_it(folder):
    state = json.loads((folder / "sft-whole" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["step"] == 4 and state["stage"] == "sft" and state["config"]["lr"] == 1e-3 and state["torch"]
    assert state["version"] == "" or len(state["version"]) == 40
