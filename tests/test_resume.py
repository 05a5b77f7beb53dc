"""Nothing is lost on the way: a run that was stopped, killed or damaged ends with the bits of one that was not."""

import json
import os
import resource
import shutil
import signal
import sys
import time
import types

import pytest
from helpers import picture, tiny_checkpoint
from safetensors.torch import load_file, save_file
from small import arguments, metrics, quiet, small_data, start

import evaluate
import train_cpt
import train_rl
import train_sft
import training
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


SIGNALS = [[signal.SIGTERM], [signal.SIGINT], [signal.SIGHUP], [signal.SIGXCPU], [signal.SIGTERM, signal.SIGINT]]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("numbers", SIGNALS, ids=lambda numbers: " ".join(number.name for number in numbers))
def test_a_signal_saves_and_ends_with_code_0_and_resume_gives_the_same_bits(folder, tmp_path, stopped, stage, numbers):
    """A closed terminal sends SIGHUP, a limit on CPU time SIGXCPU, an impatient user one signal after the other."""
    stopped(3, lambda: [os.kill(os.getpid(), number) for number in numbers])
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


def damage(out, *names, what="one bit"):
    """Change what a checkpoint holds."""
    for name in names:
        shard, state = out / "checkpoints" / name / "shard-00000-of-00001.safetensors", out / "checkpoints" / name
        if what == "one bit":
            raw = bytearray(shard.read_bytes())
            raw[-5] ^= 1
            shard.write_bytes(raw)
        else:
            path = state / "state.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **what}))


def begun(folder, out):
    """A copy of a run that got as far as step 5, and not to its final weights."""
    shutil.copytree(folder / "sft-whole", out)
    shutil.rmtree(out / "adapter")
    return out


@pytest.mark.parametrize(
    "change", [{"step": 2}, {"step": 999}, {"shards": []}, {"skipped": 3}, {"extra": {"cursor": 1}}]
)
def test_a_state_that_says_something_else_than_when_it_was_written_is_damaged(folder, tmp_path, change):
    """A step number that is off by a few would pass for one: other data, another learning rate, another result."""
    out = begun(folder, tmp_path / "run")
    damage(out, "step-00000005", what=change)
    words = arguments(folder / "model", folder / "data", out, steps=5, save_every=2, resume=True)
    code, errors = quiet(train_sft.main, words)
    assert code == 0 and "step-00000005: skipped, it is damaged (its state.json is not as" in errors
    assert same(out, folder / "sft-whole")


def test_where_no_checkpoint_is_whole_the_run_is_not_begun_anew_unasked(folder, tmp_path):
    """It would delete its way to the end what a disk's owner may still rescue."""
    out = begun(folder, tmp_path / "run")
    damage(out, "step-00000004", "step-00000005")
    before = checkpoint_names(out)
    with pytest.raises(InputError, match="found 2 checkpoints, none of them whole, expected one .--overwrite without"):
        train(folder, out, resume=True)
    assert checkpoint_names(out) == before and len(metrics(out)) == 5
    assert train(folder, out, overwrite=True) == 0
    assert same(out, folder / "sft-whole")


def test_a_damaged_checkpoint_does_not_count_among_those_to_keep(folder, tmp_path, stopped):
    """Of a higher number than the new ones it would have every one of them deleted as old."""
    out = begun(folder, tmp_path / "run")
    damage(out, "step-00000005")
    stopped(1, die)
    with pytest.raises(Killed):  # in step 5, begun from step 4
        train(folder, out, resume=True, keep=1)
    assert checkpoint_names(out) == ["step-00000004", "step-00000005.damaged"]
    assert train(folder, out, resume=True, keep=1) == 0
    assert checkpoint_names(out) == ["step-00000005", "step-00000005.damaged"]


def test_resume_knows_the_run_without_its_config_json(folder, tmp_path):
    out = begun(folder, tmp_path / "run")
    (out / "config.json").unlink()
    with pytest.raises(InputError, match="lr 0.001 -> 0.002"):
        train(folder, out, resume=True, lr=2e-3)
    with pytest.raises(InputError, match="holds another run"):
        train(folder, out)
    assert train(folder, out, resume=True) == 0
    assert same(out, folder / "sft-whole")


CHANGES = {  # since the run was started: (what, how)
    "the data": lambda f: (f / "data" / "sft.jsonl").write_text(
        (f / "data" / "sft.jsonl").read_text().replace('"answer": "A"', '"answer": "B"', 1)
    ),
    "the data (a picture)": lambda f: picture(56, 56, seed=99).save(f / "data" / "images" / "3.png"),
    "the data (a policy)": lambda f: (f / "data" / "policies.json").write_text(
        (f / "data" / "policies.json").read_text().replace("red?", "blue?")
    ),
    "the weights it starts from": lambda f: tiny_checkpoint(f / "model", seed=1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_refuses_other_data_and_weights_under_the_same_names(folder, tmp_path, stopped, what):
    """An adapter trained on one base and finished on another is neither's."""
    for name in ("model", "data"):
        shutil.copytree(folder / name, tmp_path / name)
    stopped(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(tmp_path, tmp_path / "run") == 0
    CHANGES[what](tmp_path)
    with pytest.raises(InputError, match=f"found that {what.partition(' (')[0]} changed since the run was started"):
        train(tmp_path, tmp_path / "run", resume=True)
    for name in ("model", "data"):
        shutil.rmtree(tmp_path / name)
        shutil.copytree(folder / name, tmp_path / name)
    assert train(tmp_path, tmp_path / "run", resume=True) == 0
    assert same(tmp_path / "run", folder / "sft-whole")


def test_checkpoints_of_another_run_are_not_taken_for_this_one_s(folder, tmp_path):
    """The folder's config.json is that of a new run, its checkpoints were copied there, or are an old run's."""
    out = begun(folder, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "run": "0123abcd"}))
    with pytest.raises(InputError, match="found a checkpoint of another run"):
        train(folder, out, resume=True)


# -- data that would end the run


def spoilt(folder, to):
    """Four of a dozen items that each would end a run after hours, the last one among them."""
    shutil.copytree(folder / "data", to)
    rows = [json.loads(line) for line in (to / "sft.jsonl").read_text().splitlines()]
    rows[3]["cot"] = "so " * 500
    rows[5]["answer"] = "a } b"
    os.truncate(to / "images" / "8.png", 60)
    picture(201, 1).save(to / "images" / "11.png")
    (to / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to


def test_every_item_that_would_end_the_run_is_named_before_step_0(folder, tmp_path, capsys):
    data = spoilt(folder, tmp_path / "data")
    with pytest.raises(InputError, match=r"sft.jsonl:4: item i3: found a response of \d+ tokens.*3 of 3 more"):
        train_sft.main(arguments(folder / "model", data, tmp_path / "run", steps=5))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "sft.jsonl:6: item i5: its own answer 'a } b' gets nothing" in said[0]
    assert "sft.jsonl:9: item i8, picture " in said[1] and "8.png: found" in said[1]
    assert "sft.jsonl:12: item i11, picture " in said[2] and not (tmp_path / "run").exists()


def test_data_that_was_looked_at_is_not_looked_at_again(folder, tmp_path, stopped, monkeypatch):
    """The start of a run that a machine ends every hour must not cost half of it."""
    looked, look_over = [], training.check.look_over
    monkeypatch.setattr(training.check, "look_over", lambda *args: looked.append(args) or look_over(*args))
    stopped(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(folder, tmp_path / "run") == 0 and len(looked) == 1
    assert train(folder, tmp_path / "run", resume=True) == 0 and len(looked) == 1


# -- saved in time


def test_a_checkpoint_is_due_by_the_clock_and_goes_when_the_final_weights_are_there(folder, tmp_path, stopped):
    """A machine that dies costs --save-every; a finished run needs no disk for what guarded it."""
    stopped(3, die)
    with pytest.raises(Killed):
        train(folder, tmp_path / "run", save_every="0.0001m")
    assert checkpoint_names(tmp_path / "run") == ["step-00000001", "step-00000002"]
    assert train(folder, tmp_path / "run", save_every=0, resume=True) == 0
    assert same(tmp_path / "run", folder / "sft-whole") and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_save_every_quarter_of_an_hour(stage):
    module = {"cpt": train_cpt, "sft": train_sft}[stage]
    assert module.Config().save_every == "15m"


@pytest.mark.parametrize("stage, last", [("cpt", 3), ("sft", 7), ("rl", 10)])
def test_a_kill_costs_a_quarter_of_an_hour_and_the_step_under_way(folder, tmp_path, stage, last):
    """By the defaults, in a real process, with a clock on which each step takes four minutes; SIGKILL comes in step
    `last`, before its checkpoint, so that what the step did is lost with those since the newest one."""
    main = {"cpt": train_cpt, "sft": train_sft, "rl": train_rl}[stage].main
    rl = {"group_size": 1, "policy_rollouts": 1, "check": 0, "reward": "format", "max_response": 4, "lr": "1e-4"}
    own = rl if stage == "rl" else {}
    words = lambda **more: arguments(
        folder / "model", folder / "data", tmp_path / "run", **{"steps": 12, **own, **more}
    )

    def work():
        clock, report = [0.0], training.Run.report

        def reported(self, step, *rest, **more):
            clock[0] += 240
            if step == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return report(self, step, *rest, **more)

        training.Run.report = reported
        training.time = types.SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
        main(words())

    process = start(work, tmp_path / "log")
    process.join()
    saved = max([0, *(int(path.name[5:]) for path in tmp_path.glob("run/checkpoints/step-*"))])
    assert process.exitcode == -signal.SIGKILL and 240 * (last - saved) <= 15 * 60
    code, errors = quiet(main, words(resume=True))
    assert code == 0 and f"resumed after step {saved}" in errors


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_in_the_export_costs_no_step(folder, tmp_path, monkeypatch, stage):
    """A full disk, or the model's folder gone: the checkpoint before it has everything."""

    def full(*_):
        raise OSError(28, "No space left on device")

    name = "save_pretrained" if stage == "cpt" else "save_adapter"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(training.qwen, name, full)
        train(folder, tmp_path / "run", stage, save_every=0)
    assert checkpoint_names(tmp_path / "run") == ["step-00000005"]
    code, errors = again(folder, tmp_path / "run", stage, save_every=0)
    assert code == 0 and "resumed after step 5" in errors and same(tmp_path / "run", folder / f"{stage}-whole")


def again(folder, out, stage="sft", **flags):
    main, own = STAGES[stage]
    flags = {"steps": 5, "save_every": 2, "resume": True, **own, **flags}
    return quiet(main, arguments(folder / "model", folder / "data", out, **flags))


def test_what_breaks_in_a_step_is_named_and_the_steps_before_it_are_saved(folder, tmp_path, monkeypatch, capsys):
    """A picture that is damaged while the run goes on."""
    encode = train_sft.Examples.encode

    def broken(self, step, i):
        if step == 3:
            raise InputError(f"item {self.items[i]['id']}: found a picture of no bytes, expected a readable one")
        return encode(self, step, i)

    monkeypatch.setattr(train_sft.Examples, "encode", broken)
    words = arguments(folder / "model", folder / "data", tmp_path / "run", steps=5)
    with pytest.raises(InputError, match=r"item i\d+: found a picture"):
        train_sft.main(words)
    assert "sft: step 3 failed in 'read', saved, --resume continues" in capsys.readouterr().err
    assert checkpoint_names(tmp_path / "run") == ["step-00000003"]
    monkeypatch.setattr(train_sft.Examples, "encode", encode)
    assert again(folder, tmp_path / "run", save_every=0)[0] == 0
    assert same(tmp_path / "run", folder / "sft-whole")


def test_half_an_update_is_never_saved(folder, tmp_path, stopped):
    """After the weights have moved and before the step is done they belong to no step."""

    def fails():
        raise RuntimeError("out of memory")

    stopped(4, fails)
    with pytest.raises(RuntimeError):
        train(folder, tmp_path / "run")
    assert checkpoint_names(tmp_path / "run") == ["step-00000002"]


# -- what is printed


def test_a_closed_stdout_ends_no_training(folder, tmp_path):
    """`train_sft.py ... | head -1`, with the pipe's reader gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    words = arguments(folder / "model", folder / "data", tmp_path / "run", steps=5, save_every=2)

    def work():
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", closefd=False)
        sys.stdout.reconfigure(line_buffering=True)
        train_sft.main(words)

    process = start(work, tmp_path / "log")
    process.join(300)
    os.close(writer)
    assert process.exitcode == 0 and same(tmp_path / "run", folder / "sft-whole")


# -- numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_where_they_come_in(folder, tmp_path, value):
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, path)
    with pytest.raises(InputError, match="found NaN or infinity in model.norm.weight, expected numbers"):
        quiet(train_sft.main, arguments(tmp_path / "model", folder / "data", tmp_path / "run", steps=1))
    assert not (tmp_path / "run").exists()
    words = ["--model", f"{tmp_path}/model", "--data", f"{folder}/data", "--out", f"{tmp_path}/eval", "--device", "cpu"]
    with pytest.raises(InputError, match="found NaN or infinity in model.norm.weight, expected numbers"):
        quiet(evaluate.main, words)


def test_weights_that_became_no_numbers_are_not_saved_and_end_the_run(folder, tmp_path, monkeypatch):
    """An exit code 0 with a model of NaN is the worst a run can do."""
    update = Run.update

    def poisons(self, model, *rest):
        norm = update(self, model, *rest)
        next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
        return norm

    monkeypatch.setattr(Run, "update", poisons)
    with pytest.raises(InputError, match="found NaN or infinity in param.*lora_A, expected numbers"):
        train(folder, tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_is_no_number_leaves_json_that_every_reader_takes(folder, tmp_path, monkeypatch):
    original = Run.report
    monkeypatch.setattr(
        Run, "report", lambda self, step, metrics, *rest: original(self, step, {**metrics, "loss": float("nan")}, *rest)
    )
    train(folder, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and len(lines.splitlines()) == 5 and '"loss"' not in lines


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
    monkeypatch.setattr(
        Run, "checkpoint", lambda self, step, *rest, **_: original(self, step, *rest, score=scores[step])
    )
    assert train(folder, tmp_path / "run", save_every=1, keep=2) == 0
    assert checkpoint_names(tmp_path / "run") == ["best", "step-00000002", "step-00000004", "step-00000005"]
    assert os.readlink(tmp_path / "run" / "checkpoints" / "best") == "step-00000002"


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
