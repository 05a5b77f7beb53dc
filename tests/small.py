"""A data set of a dozen items in the layout of data/clevr_policy.py, and runs of the training scripts on it."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from pathlib import Path

from data import command

ROOT = Path(__file__).resolve().parent.parent
for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background and nohup ignore them, and children would, too
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
CONSTANT = {  # every test's runs are small and quiet
    "--batch-size": "4",
    "--micro-batch": "2",
    "--lr": "1e-3",
    "--device": "cpu",
    "--max-response": "64",
}


def small_data(folder, items=12):
    """Two policies, one with a picture in it; items of every kind, on pictures of three sizes. Returns the folder."""
    from helpers import picture  # here: a reward's process imports this file, and needs no torch

    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    for i, size in enumerate([(56, 56), (84, 56), (112, 112)] * -(-items // 3)):
        picture(*size, seed=i).save(folder / "images" / f"{i}.png")
    node = {"id": "1", "program": [], "question": "red?", "branches": {"yes": "A", "no": "B"}}
    leaves = [{"id": "A", "response": "A"}, {"id": "B", "response": "B"}]
    texts = {"P1": ("red? yes: A, no: B", []), "P2": ("like <image>? yes: A, no: B", ["images/0.png"])}
    policies = [
        {
            "name": name,
            "root": "1",
            "nodes": [node],
            "leaves": leaves,
            "images": images,
            "text": f"policy {name}: {text}",
        }
        for name, (text, images) in texts.items()
    ]
    (folder / "policies.json").write_text(json.dumps(policies))
    rows = [
        {
            "id": f"i{i}",
            "policy": f"P{1 + i % 2}",
            "scene": f"{i}.png",
            "images": [f"images/{i}.png"],
            "question": f"apply P{1 + i % 2}: ",
            "answer": "AB"[i % 3 % 2],
            "cot": "it is " + "so " * (i % 4),
            "path": [{"node": "1", "answer": "yes"}],
        }
        for i in range(items)
    ]
    for name in ("sft", "rl", "test"):
        write_lines(folder / f"{name}.jsonl", rows)
    document = {"kind": "document", "images": [], "question": "", "answer": ""}
    asked = {"kind": "section", "images": [], "question": "section 1 of P1?", "answer": "red?"}
    documents = [{"id": f"d{policy}", "policy": policy, **document} for policy in texts]
    write_lines(folder / "cpt.jsonl", [*rows, *documents, {"id": "s1", "policy": "P1", **asked}])
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(model, data, out, **flags):
    """Flags of a training script: CONSTANT, then the named ones; full=True is --full, full=False --no-full."""
    values = {**CONSTANT, "--model": model, "--data": data, "--out": out}
    words = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values[flag] = value
    return [*(str(word) for pair in values.items() for word in pair), *words]


def length(prompt, response, item):
    """A reward that a random model gets in every amount."""
    return len(response) % 4 / 3


def of_one(prompt, response, item):
    """One that tells the responses to one query apart, and to no other."""
    return length(prompt, response, item) if item["id"] == "i2" else 0.0


def of_two(prompt, response, item):
    return float(len(response) % 2) if item["id"] in ("i2", "i3") else 0.0


def metrics(out):
    """The rows of metrics.jsonl without what differs from run to run."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "speed"} for row in rows]


def quiet(main, argv):
    """main(argv) with its lines kept from the terminal -> (exit code, what it printed to stderr)."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(argv)
            return 0, errors.getvalue()
        except SystemExit as end:
            return end.code or 0, errors.getvalue()


def free_port():
    """A port that nobody has, of those that the kernel gives to nobody by itself until a run listens on it."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port := random.SystemRandom().randrange(15000, 32768)))
            return port


def start(work, log, **environment):
    """work() as a command in a copy of this process, which has imported what takes seconds; it prints to `log`."""

    def child():
        os.environ.update({name: str(value) for name, value in environment.items()})
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest has others
        command(work)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def start_ranks(world, work, log):
    """work() in `world` such processes, which find one another as torchrun's do."""
    port = free_port()
    here = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(work, log, RANK=rank, LOCAL_RANK=rank, **here) for rank in range(world)]
