"""What a command may write and delete: its own, in a folder of its own; and whose a folder is."""

import contextlib
import errno
import io
import json
import os
import shutil
import stat
import threading

import pytest
from helpers import tiny_checkpoint
from small import arguments, quiet, small_data

import evaluate
import model as qwen
import train_cpt
import train_sft
from data import InputError, claim, inspect
from support import folder as house
from support.chat import export
from support.folder import digest, keep_apart, lock, unlock


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")
    assert train(folder, folder / "whole") == 0
    return folder


def train(folder, out, main=train_sft.main, data=None, model=None, **flags):
    words = arguments(model or folder / "model", data or folder / "data", out, **{"steps": 2, **flags})
    return quiet(main, words)[0]


def contents(folder):
    """{path: bytes} of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def users(folder):
    """A folder of a user's notes, one of them named as a run's log is, and an older model of a run without its run."""
    (folder / "model").mkdir(parents=True)
    for name in ("notes.jsonl", "metrics.jsonl", "results.json", "model/model.safetensors"):
        (folder / name).write_text('{"rows": []}\n')


PLACES = {  # --out: how it comes about
    "the data": lambda f: f / "data",
    "a link to the data": lambda f: (f / "link").symlink_to(f / "data") or f / "link",
    "the model": lambda f: f / "model",
    "what holds both": lambda f: f,
    "another data folder": lambda f: shutil.copytree(f / "data", f / "other"),
    "another model": lambda f: shutil.copytree(f / "model", f / "other"),
    "notes": lambda f: users(f / "other") or f / "other",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=["new", "overwrite", "resume"])
def test_a_run_touches_no_folder_but_its_own(folder, tmp_path, place, flags):
    """Whatever the flags: --overwrite is for what a run wrote."""
    for name in ("data", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    out = PLACES[place](tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="--out .*expected a (folder of its own|new or empty folder)"):
        train(tmp_path, out, **flags)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["test", "no_policy", "metrics"])
def test_an_evaluation_touches_no_folder_but_its_own(folder, tmp_path, place, name):
    for part in ("data", "model"):
        shutil.copytree(folder / part, tmp_path / part)
    out = PLACES[place](tmp_path)
    before = contents(tmp_path)
    words = ["--model", f"{tmp_path}/model", "--data", f"{tmp_path}/data", "--out", f"{out}", "--name", name]
    with pytest.raises(
        InputError, match="expected (a folder of its own|a new or empty folder|another --name or --out)"
    ):
        quiet(evaluate.main, [*words, "--device", "cpu"])
    assert contents(tmp_path) == before


def test_a_folder_of_ours_from_before_the_mark_is_taken_as_its_line_says(tmp_path):
    """Not by itself, as it may be a user's: neither its runs go on nor does --overwrite delete them."""
    own, out = ("data", "*.log"), tmp_path / "a b"
    (out / "data").mkdir(parents=True)
    for fresh in (False, True):
        with pytest.raises(InputError, match="which we did not write .if tiny.demo did, .*, expected a new") as refused:
            claim(out, "tiny.demo", own, fresh)
    os.system(str(refused.value).split("folders: ")[1].split("), expected")[0])
    assert claim(out, "tiny.demo", own) and (out / "data").exists()
    assert not claim(out, "tiny.demo", own, fresh=True) and not (out / "data").exists()
    (out / "notes").touch()
    for command in ("tiny.demo", "tiny.score"):
        with pytest.raises(InputError, match="found notes, which we did not write, expected"):
            claim(out, command, own, fresh=True)


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folder / "whole", out)
    (out / "notes.jsonl").write_text("{}\n")
    (out / "eval").mkdir()
    (out / "eval" / "test.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="holds another run, expected a new folder, --resume or --overwrite"):
        train(folder, out)
    assert train(folder, out, main=train_cpt.main, full=True, overwrite=True) == 0
    assert (out / "model").is_dir() and not (out / "adapter").exists()
    assert (out / "notes.jsonl").read_text() == (out / "eval" / "test.jsonl").read_text() == "{}\n"


def test_a_run_goes_on_beside_the_user_s_files_and_leaves_them_as_they_are(folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folder / "whole", out)
    shutil.rmtree(out / "adapter")
    (out / "notes.jsonl").write_text('{"no": "step"}\n{"torn')
    assert train(folder, out, resume=True) == 0
    assert (out / "notes.jsonl").read_text() == '{"no": "step"}\n{"torn' and (out / "adapter").is_dir()


def test_a_finished_run_is_not_trained_again(folder, tmp_path):
    before = contents(folder / "whole")
    words = arguments(folder / "model", folder / "data", folder / "whole", steps=2, resume=True)
    assert quiet(train_sft.main, words) == (0, f"sft: {folder}/whole holds the finished run, nothing is left to do\n")
    assert contents(folder / "whole") == before


def test_every_file_has_the_mode_that_the_umask_leaves(folder, tmp_path):
    """safetensors and temporary files are made for the user alone; a group that shares a disk would be locked out."""
    mask = os.umask(0o027)
    try:
        train(folder, tmp_path / "full", full=True, save_every=1)
        train(folder, tmp_path / "lora", validate_every=1)
        words = ["--model", f"{tmp_path}/lora", "--data", f"{folder}/data", "--out", f"{tmp_path}/eval"]
        quiet(evaluate.main, [*words, "--device", "cpu", "--limit", "1", "--max-response", "2"])
        quiet(inspect.main, [f"{tmp_path}/full"])
        with contextlib.redirect_stdout(io.StringIO()):
            export(qwen, f"{tmp_path}/lora", f"{tmp_path}/export")
    finally:
        os.umask(mask)
    found = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert {
        path: mode for path, mode in found.items() if mode != (0o750 if (tmp_path / path).is_dir() else 0o640)
    } == {}
    assert {"model.safetensors", "adapter_model.safetensors", "results.json", "inspect.html", "state.json"} <= {
        path.name for path in found
    }


# -- the lock


def test_one_process_at_a_time(tmp_path):
    first = lock(tmp_path)
    with pytest.raises(InputError, match="another process is writing it"):
        lock(tmp_path)
    threading.Timer(0.2, lambda: unlock(tmp_path, first)).start()
    unlock(tmp_path, lock(tmp_path, wait=10))
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
    """Between the open and the lock of one process another ends: the first would hold a file that nobody else sees."""
    holder, real = lock(tmp_path), house.fcntl.flock

    def late(file, how):
        if not holder.closed:
            unlock(tmp_path, holder)
        real(file, how)

    monkeypatch.setattr(house.fcntl, "flock", late)
    mine = lock(tmp_path)
    assert os.path.samestat(os.fstat(mine.fileno()), (tmp_path / ".lock").stat())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_warning(folder, tmp_path, monkeypatch, number):
    """Lustre and some NFS: a run that cannot be locked is still a run."""

    def refuses(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(house.fcntl, "flock", refuses)
    code, errors = quiet(train_sft.main, arguments(folder / "model", folder / "data", tmp_path / "run", steps=1))
    assert code == 0 and "cannot be locked" in errors


def test_evaluations_that_end_together_keep_all_their_rows(tmp_path):
    """Each in a thread with a lock of its own, as two processes have: flock knows open files, not processes."""
    names = [f"row {i}" for i in range(24)]
    threads = [
        threading.Thread(target=evaluate.save, args=(tmp_path, {"name": name}, [{"id": name}])) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["name"] for row in evaluate.earlier_rows(tmp_path)) == sorted(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(f"{n}.jsonl" for n in names), "results.json"])


# -- what a run is made from


def test_a_digest_sees_every_change_of_a_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(100_000))
    seen = {digest({"x": path}), digest({"y": path})}
    for change in (lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: raw[:70_000] + b"1" + raw[70_001:]):
        path.write_bytes(change(bytes(100_000)))
        seen.add(digest({"x": path}))
    assert len(seen) == 5


def test_folders_beside_and_below_what_is_read_are_fine(tmp_path):
    (tmp_path / "data").mkdir()
    keep_apart(tmp_path / "data" / "run", {"--data": tmp_path / "data"})
    keep_apart(tmp_path / "data2", {"--data": tmp_path / "data", "--model": "owner/name", "--init": ""})


def test_rows_are_json_whatever_they_hold(tmp_path):
    evaluate.save(tmp_path, {"name": "x", "accuracy": float("nan")}, [{"loss": [float("inf"), {"a": -float("inf")}]}])
    refuse = lambda name: pytest.fail(f"{name} is not JSON")
    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["rows"][0]["accuracy"] is None
    assert json.loads((tmp_path / "x.jsonl").read_text(), parse_constant=refuse) == {"loss": [None, {"a": None}]}
