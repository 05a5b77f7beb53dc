"""Commands of the demo and the study end with it: nothing trains on after its user has given up."""

import contextlib
import os
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
from small import start

from tiny import processes
from tiny.report import lines_of


def commands(folder):
    """As the demo has them: two commands in threads, another waiting for its turn."""
    said = folder / "log"
    with processes.ended_together(), ThreadPoolExecutor(2) as pool:
        words = [["sh", "-c", f"echo $$ > {folder}/{n}.pid; exec sleep 100"] for n in range(3)]
        for work in [pool.submit(processes.run, each, said) for each in words]:
            work.result()


def column(folder, n):
    processes.end_with_parent()
    (folder / f"{n}.pid").write_text(f"{os.getpid()}\n")
    time.sleep(100)


def pool(folder):
    """As the study has them: two processes of a pool, with more to do."""
    with processes.ended_together(), ProcessPoolExecutor(2, get_context("fork")) as workers:
        list(workers.map(column, [folder] * 4, range(4)))


def pids(folder):
    with contextlib.suppress(ValueError, FileNotFoundError):  # begun, and not written yet
        return [int((folder / f"{n}.pid").read_text()) for n in range(2)]
    return []


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    return False


def wait(until, seconds=120):
    end = time.time() + seconds
    while not until() and time.time() < end:
        time.sleep(0.02)
    return until()


@pytest.mark.parametrize("work", [commands, pool])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_all_that_was_started_and_starts_nothing_more(tmp_path, work, number):
    process = start(lambda: work(tmp_path), tmp_path / "log")
    assert wait(lambda: len(pids(tmp_path)) == 2)
    children = pids(tmp_path)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number)
    assert wait(lambda: not any(map(alive, children))) and not (tmp_path / "2.pid").exists()


def test_a_signal_ends_a_command_that_is_just_being_started(tmp_path, monkeypatch):
    """On a busy machine its first words come before the thread that started it knows of it."""
    Popen = subprocess.Popen

    def interrupted(*args, **options):
        command = Popen(*args, **options)
        processes.STOPPED.set()
        return command

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    assert processes.run(["sleep", "100"], tmp_path / "log") == -signal.SIGKILL
    processes.STOPPED.clear()


def test_a_command_s_exit_code_and_words_come_back(tmp_path):
    assert processes.run(["sh", "-c", "echo out; echo err >&2; exit 3"], tmp_path / "log") == 3
    assert (tmp_path / "log").read_text() == "out\nerr\n"


def test_rows_that_a_kill_tore_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n[1]\n\xff\n{"a": 2}\n{"a"')
    assert lines_of(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]
