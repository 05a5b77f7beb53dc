"""The other side of judging.py: one reward function of the user's in a process of its own. Standard library alone.

    python reward_worker.py CONNECTION PATH MODULE FUNCTION

CONNECTION: number of the open socket; PATH: sys.path as JSON; MODULE: a name or a file. Sends [0, "ready", is it
@batch?] or [0, "error", kind, traceback], then answers [number, inputs] with [number, "value", x] or [number, "error",
kind, traceback].
"""

import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from multiprocessing.connection import Connection


def find(module, name):
    """The function `name` of a module or file."""
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location("rewards_of_the_user", module)
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found  # dataclasses look their module up
        spec.loader.exec_module(found)
    else:
        found = importlib.import_module(module)
    function = getattr(found, name)
    if not callable(function) or inspect.isclass(function):
        raise TypeError(f"{name} is no function")
    inspect.signature(function).bind("", "", {})  # TypeError where it takes something else
    return function


def plain(value):
    """A number as JSON has it; text stays text, which the other side refuses."""
    return value if value is None or isinstance(value, str) else float(value)


def main():
    number, path, module, name = sys.argv[1:]
    connection, me = Connection(int(number)), os.getpid()
    send = lambda *answer: connection.send_bytes(json.dumps(answer).encode())
    os.dup2(2, 1)  # what the function prints is no answer
    sys.path[:], sys.argv[1:] = json.loads(path), []
    try:
        function = find(module, name)
    except BaseException as error:
        return send(0, "error", type(error).__name__, traceback.format_exc())
    batch = bool(getattr(function, "batch", False))
    send(0, "ready", batch)
    while True:
        try:
            number, inputs = json.loads(connection.recv_bytes())
        except EOFError:  # the run has ended
            os._exit(0)
        try:
            found = function(*inputs)
            answer = number, "value", list(map(plain, found)) if batch else plain(found)
        except BaseException as error:
            answer = number, "error", type(error).__name__, traceback.format_exc()
        if os.getpid() != me:  # the function has forked, and this is the child
            os._exit(0)
        send(*answer)


if __name__ == "__main__":
    main()
