"""Rewards and environments of the user's, each in a process of its own: what one does wrong costs a response at most.

A function that raises, exits, hangs (in C code, too), forks or changes its item is told so in the log; the process of
one that hangs or dies is ended, and the next response starts another. It finds modules as the user's own script would:
from its file's folder and the current one, where `import evaluate` is not our evaluate.py. The functions of
data/rewards.py run in this process. No part of the method.
"""

import base64
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from itertools import count
from multiprocessing import Pipe
from pathlib import Path

from PIL import Image

from data import InputError, rewards
from data.tools import TURNS
from support.config import option

ROOT = Path(__file__).resolve().parents[1]
MAX_FAILED = 0.5  # share of a step's rewards that may raise, hang or be NaN before the run stops
IMPORT_SECONDS = 300  # for the user's module to be imported


@dataclass
class Judging:
    """judging"""

    reward: str = option(
        "accuracy=0.9,format=0.1",
        "with weights: names of data.rewards, FILE.py:function or module:function; a function of one's own is "
        "reward(prompt: str, response: str, item: dict) -> float",
    )
    reward_seconds: float = option(5.0, "seconds after which a reward function, or a tool, is given up", above=0)
    environment: str = option(
        "", "what makes each response a dialogue (data/TOOLS.md): FILE.py:name or module:name; empty: one turn"
    )
    overlong: int = option(0, "tokens before --max-response over which the reward falls by 1; 0: none", least=0)


def load_rewards(text, seconds, judge=None):
    """[(name, function, weight)] of --reward "accuracy=0.9,mine.py:polite=0.1".

    A name is one of data.rewards, `judge` (the data.judge.Judge given), data.MODULE:FUNCTION of ours, or
    FILE.py:FUNCTION or MODULE:FUNCTION of the user's, which becomes a Remote with `seconds` for each response. Raises
    InputError for what is not there or takes something else than (prompt, response, item), and for weights that are no
    finite numbers.
    """
    rewards.failures.counts.clear()
    found = []
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        module, _, function = name.rpartition(":")
        ours = module.startswith("data.") and (ROOT / f"{module.replace('.', '/')}.py").exists()
        try:
            if not math.isfinite(value := float(weight or 1)):
                raise ValueError(f"weight {weight}")
            if name == "judge" and judge is None:
                raise ValueError("no --judge-url found")
            known = judge if name == "judge" else rewards.named(name) if ours or not module else None
        except (AttributeError, TypeError, ValueError) as error:
            names = ", ".join([*rewards.REWARDS, *rewards.ELSEWHERE, "judge"])
            expected = f"expected name=weight of data.rewards ({names}), or FILE.py:function=weight"
            raise InputError(f"--reward {part!r}: {type(error).__name__}: {error}; {expected}") from None
        found.append((function, known or Remote(module, function, seconds), value))
    names = [name for name, *_ in found]
    if len(set(names)) < len(names):
        raise InputError(f"--reward {text!r}: found a name twice, expected each once")
    return found


def complaint():
    """The rewards of this rank that failed so far, by function and kind; "" without any."""
    return ", ".join(f"{n} x {kind} in {name}" for (name, kind), n in sorted(rewards.failures.counts.items()))


def load_environment(text, seconds):
    """The environment that "FILE.py:name" or "module:name" names; None for "". seconds: for a step of a user's own."""
    if not text:
        return None
    module, _, name = text.rpartition(":")
    ours = (ROOT / f"{module.replace('.', '/')}.py").exists() and module.startswith(("data.", "tiny."))
    if ours and hasattr(found := importlib.import_module(module), name):
        return getattr(found, name)
    if not module or ours:
        raise InputError(f"--environment {text!r}: found no such name, expected FILE.py:name or module:name")
    return RemoteEnvironment(module, name, seconds)


class RemoteEnvironment:
    """An environment in another process. It keeps its dialogues; a new process gets their turns once more."""

    def __init__(self, module, name, seconds):
        self.remote, self.numbers = Remote(module, name, seconds, "environment"), count()
        self.system, self.turns = self.remote.told["system"], self.remote.told["turns"] or TURNS

    def __call__(self, item):
        return RemoteDialogue(self.remote, next(self.numbers), item)


class RemoteDialogue:
    def __init__(self, remote, number, item):
        self.remote, self.number, self.item, self.texts = remote, number, item, []

    def step(self, text):
        result = self.remote(self.number, self.item, self.texts, text)
        self.texts.append(text)  # one that failed is not given to the next process again
        if not isinstance(result, dict):
            return result
        pictures = [Image.frombytes("RGB", tuple(size), base64.b64decode(rgb)) for size, rgb in result["pictures"]]
        return result["text"], pictures


class RewardFailed(Exception):
    """kind: name of the exception, or Hung or Died; trace: the traceback there, lines."""

    def __init__(self, kind, trace):
        super().__init__(kind)
        self.kind, self.trace = kind, trace


class Remote:
    """A reward function, or an environment's dialogues, in another process: call it as if it were here.

    told: what its process says of it: is it @batch, or what an environment has set. Raises RewardFailed.
    """

    def __init__(self, module, name, seconds, kind="reward"):
        self.module, self.__name__, self.seconds, self.kind, self.number = module, name, seconds, kind, 0
        self.start()

    def start(self):
        """Start the process and wait until it has imported the function."""
        here = [os.path.dirname(os.path.abspath(self.module))] if self.module.endswith(".py") else []
        first = [path for path in [*here, os.getcwd()] if Path(path).resolve() != ROOT]
        theirs = [path for path in map(os.path.abspath, sys.path) if not Path(path).resolve().is_relative_to(ROOT)]
        ours = [path for path in map(os.path.abspath, sys.path) if path not in theirs]
        self.connection, other = Pipe()
        worker = [sys.executable, Path(__file__).with_name("reward_worker.py"), str(other.fileno())]
        worker += [json.dumps([*first, *theirs, *ours, str(ROOT)]), self.module, self.__name__, self.kind]
        self.process = subprocess.Popen(
            worker, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()], start_new_session=True
        )
        other.close()
        self.end = weakref.finalize(self, end, self.process, self.connection)  # also when this process exits
        try:
            self.told = self.answer(0, IMPORT_SECONDS)
            self.batch = self.told is True
        except RewardFailed as error:
            place = f"--{self.kind} {self.module}:{self.__name__}: {''.join(error.trace).strip().splitlines()[-1]}"
            form = {"reward": "reward(prompt, response, item) -> float", "environment": "environment(item) -> dialogue"}
            expected = f"a function {form[self.kind]} of FILE.py:function or module:function"
            raise InputError(f"{place}; expected {expected}") from None

    def __call__(self, *inputs):
        if not self.end.alive:
            self.start()
        self.number += 1
        try:
            self.connection.send_bytes(json.dumps([self.number, inputs]).encode())
        except OSError:
            pass  # it has died since: there will be no answer
        return self.answer(self.number, self.seconds * (len(inputs[0]) if self.batch else 1))

    def answer(self, number, seconds):
        """The answer to request `number`; without one, the process and all that it has started are ended."""
        until = time.monotonic() + seconds
        try:
            while (left := until - time.monotonic()) > 0:
                if self.connection.poll(min(left, 0.2)):
                    told, kind, *answer = json.loads(self.connection.recv_bytes())
                    if told == number and kind == "error":
                        raise RewardFailed(answer[0], answer[1].splitlines(keepends=True))
                    if told == number:
                        return answer[0]
                elif self.process.poll() is not None:
                    raise EOFError
            failed = RewardFailed("Hung", [f"no answer in {seconds:g} s: its process was ended"])
        except (EOFError, OSError):
            failed = RewardFailed("Died", [f"its process ended (code {self.process.wait()})"])
        self.end()
        raise failed


def end(process, connection):
    connection.close()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own: what it has started ends with it
    except ProcessLookupError:
        pass
    process.wait()
