"""Processes of the demo and the study: they end with the command that started them, whatever ends it."""

import contextlib
import ctypes
import multiprocessing
import signal
import subprocess
import sys
import threading

COMMANDS = set()  # that are under way
STOPPED = threading.Event()
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent():
    """Called in a new process: the system kills it when its parent dies, even of a SIGKILL (on Linux)."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(words, log, **options):
    """A command's exit code; what it prints is added to a file. After a signal no other one is begun."""
    if STOPPED.is_set():
        return 1
    options |= {"stderr": subprocess.STDOUT, "start_new_session": True, "preexec_fn": end_with_parent}
    with open(log, "a") as file, subprocess.Popen(words, stdout=file, **options) as command:
        COMMANDS.add(command)
        if STOPPED.is_set():  # the signal came while it was being started
            command.kill()
        try:
            return command.wait()
        finally:
            COMMANDS.discard(command)


@contextlib.contextmanager
def ended_together():
    """Within, a signal that ends this process ends at once what it has started: nobody is left to wait for it."""

    def stop(number, frame):
        STOPPED.set()
        for child in [*COMMANDS, *multiprocessing.active_children()]:
            child.kill()
        sys.exit(128 + number)

    STOPPED.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, stop) for s in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
