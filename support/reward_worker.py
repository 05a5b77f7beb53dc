"""The other side of judging.py: one reward function or environment of the user's in a process of its own.

    python reward_worker.py CONNECTION PATH MODULE FUNCTION KIND

Standard library alone. CONNECTION: number of the open socket; PATH: sys.path as JSON; MODULE: a name or a file; KIND:
reward or environment. Sends [0, "ready", what it is] or [0, "error", kind, traceback], then answers [number, inputs]
with [number, "value", x] or [number, "error", kind, traceback].
"""

import base64
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from multiprocessing.connection import Connection

INPUTS = {"reward": ("", "", {}), "environment": ({},)}


def find(module, name, kind):
    """The function `name` of a module or file."""
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location("rewards_of_the_user", module)
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found  # dataclasses look their module up
        spec.loader.exec_module(found)
    else:
        found = importlib.import_module(module)
    function = getattr(found, name)
    if not callable(function) or inspect.isclass(function) and kind == "reward":
        raise TypeError(f"{name} is no function")
    inspect.signature(function).bind(*INPUTS[kind])  # TypeError where it takes something else
    return function


def plain(value):
    """A number as JSON has it; text stays text, which the other side refuses."""
    return value if value is None or isinstance(value, str) else float(value)


class Dialogues:
    """An environment's dialogues by number: one that is not here, as the process is new, is led up to its last turn."""

    MOST = 4096  # that are held: of those cut at a limit nobody tells that they are over

    def __init__(self, environment):
        self.environment, self.held = environment, {}
        self.told = {"system": str(getattr(environment, "system", "")), "turns": getattr(environment, "turns", 0)}

    def __call__(self, number, item, before, text):
        if (dialogue := self.held.pop(number, None)) is None:
            dialogue = self.environment(item)
            for turn in before:
                dialogue.step(turn)
        result = dialogue.step(text)
        if result is not None:
            self.held[number] = dialogue
            if len(self.held) > self.MOST:
                del self.held[next(iter(self.held))]
        if result is None or isinstance(result, str):
            return result
        if not isinstance(result, tuple):
            raise TypeError(f"the result is {result!r:.40}, expected text, (text, [PIL.Image]) or None")
        pictures = [picture.convert("RGB") for picture in result[1]]
        pictures = [(picture.size, base64.b64encode(picture.tobytes()).decode()) for picture in pictures]
        return {"text": str(result[0]), "pictures": pictures}


def main():
    number, path, module, name, kind = sys.argv[1:]
    connection, me = Connection(int(number)), os.getpid()
    send = lambda *answer: connection.send_bytes(json.dumps(answer).encode())
    os.dup2(2, 1)  # what the function prints is no answer
    sys.path[:], sys.argv[1:] = json.loads(path), []
    try:
        function = find(module, name, kind)
        function = Dialogues(function) if kind == "environment" else function
    except BaseException as error:
        return send(0, "error", type(error).__name__, traceback.format_exc())
    batch = bool(getattr(function, "batch", False))
    send(0, "ready", getattr(function, "told", batch))
    while True:
        try:
            number, inputs = json.loads(connection.recv_bytes())
        except EOFError:  # the run has ended
            os._exit(0)
        try:
            found = function(*inputs)
            found = found if kind == "environment" else list(map(plain, found)) if batch else plain(found)
            answer = number, "value", found
        except BaseException as error:
            answer = number, "error", type(error).__name__, traceback.format_exc()
        if os.getpid() != me:  # the function has forked, and this is the child
            os._exit(0)
        send(*answer)


if __name__ == "__main__":
    main()
