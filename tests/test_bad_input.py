"""Bad input of every kind over all commands: one clear line, exit code 2, nothing left behind, no hang.

The rows stand in BAD_INPUT.md, which is their documentation and this test's data: how an input is made from a sound
one (EDITS), the command that meets it, and what its line says. A sound folder F holds model, adapter, data, a finished
run and an empty config file.
"""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import zlib

import pytest
from helpers import tiny_checkpoint
from safetensors.torch import load_file, save_file
from small import ROOT, arguments, quiet, small_data, start

import benchmarks.clevr
import benchmarks.efficiency
import benchmarks.gpu
import benchmarks.rollout
import benchmarks.train
import data.benchmarks
import data.check
import data.clevr_policy
import data.cot
import data.gta_policy
import data.inspect
import data.oracle
import data.override
import data.own
import data.shop
import evaluate
import model as qwen
import tiny.data
import tiny.demo
import tiny.dialogues
import tiny.pretrain
import tiny.score
import tiny.study
import train_cpt
import train_rl
import train_sft
import training
from data import InputError
from support.config import parse
from variants import gdpo, halves, icpo, noisy, opcd, tis
from variants.latent import captions
from variants.latent import study as latent_study

PAGE = ROOT / "tests" / "BAD_INPUT.md"
TRAINS = {"cpt": train_cpt, "sft": train_sft, "rl": train_rl}
TRAINS |= {"gdpo": gdpo, "halves": halves, "icpo": icpo, "noisy": noisy, "opcd": opcd, "tis": tis}
OTHERS = {f"data.{name}": getattr(data, name) for name in "benchmarks clevr_policy cot gta_policy inspect".split()}
OTHERS |= {f"data.{name}": getattr(data, name) for name in "oracle override own check shop".split()}
OTHERS |= {f"tiny.{name}": getattr(tiny, name) for name in "data demo dialogues pretrain score study".split()}
OTHERS |= {f"benchmarks.{name}": getattr(benchmarks, name) for name in "clevr efficiency gpu rollout train".split()}
OTHERS |= {"latent.captions": captions, "latent.study": latent_study}
CONFIGS = [ROOT / f"{name}.py" for name in ("train_cpt", "train_sft", "train_rl", "evaluate", "support/plan")]
CONFIGS += [path for path in sorted(ROOT.glob("variants/*.py")) if "\nclass Config(" in path.read_text()]
SECONDS, GIGABYTES = 20, 1  # a row may take so much, beside what the tests hold already


# -- how an input is made ----------------------------------------------------------------------------------------------


def bomb(path):
    """A PNG header that promises 60,000 x 60,000 pixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"x"))


def put(path, keys, text):
    """Set what a JSON file holds at a dotted path of keys and positions; nothing as the value removes it."""
    value = whole = json.loads(path.read_text())
    *way, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    for key in way:
        value = value[key]
    if text:
        value[last] = json.loads(text)
    else:
        del value[last]
    path.write_text(json.dumps(whole))


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def tensors(path, change, name):
    """Drop, add or spoil a tensor of a safetensors file that is sound otherwise."""
    value = load_file(path)
    if change == "drop":
        del value[name]
    elif change == "add":
        value[name] = next(iter(value.values())).clone()
    else:
        value[name].view(-1)[3] = float(change)
    save_file(value, path)


escaped = lambda text: text.encode().decode("unicode_escape").encode("utf-8", "surrogateescape")
EDITS = {  # verb: what it does to a path, its further words
    "rm": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "write": lambda path, text="", times="1": path.write_bytes(escaped(text) * int(times)),
    "append": lambda path, text: path.write_bytes(path.read_bytes() + escaped(text)),
    "replace": replace,
    "put": put,
    "cut": lambda path, size: os.truncate(path, int(size)),
    "mkdir": lambda path: path.mkdir(parents=True),
    "copy": lambda path, to: shutil.copytree(path, path.parent / to),
    "link": lambda path, to: path.symlink_to(to),
    "fifo": lambda path: os.mkfifo(path),
    "bomb": bomb,
    "drop": lambda path, name: tensors(path, "drop", name),
    "add": lambda path, name: tensors(path, "add", name),
    "spoil": lambda path, name, value: tensors(path, value, name),
}


def make(folder, text):
    """Carry out `verb path words; verb path words`, paths in `folder`, where * stands for every file."""
    for step in text.split("; ") if text else []:
        verb, path, *words = shlex.split(step)
        for target in sorted(folder.glob(path)) if "*" in path else [folder / path]:
            EDITS[verb](target, *words)


# -- the rows ----------------------------------------------------------------------------------------------------------


def rows():
    """{name: (how the input is made, command, what its line says)}"""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0] not in ("what is wrong", "---"):
            name, made, command, said = cells
            assert name not in found, f"{name!r} stands there twice"
            found[name] = made.strip("`"), command.strip("`"), said
    return found


ROWS = rows()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    tiny_checkpoint(folder / "model", layers=1)
    small_data(folder / "data")
    quiet(train_sft.main, arguments(folder / "model", folder / "data", folder / "run", steps=1))
    shutil.copytree(folder / "run" / "adapter", folder / "adapter")
    (folder / "c.json").write_text("{}")
    return folder


def call(folder, command):
    """(main, argv) of `command flags`, with what every training run needs before the flags."""
    name, *flags = shlex.split(command.replace("F/", f"{folder}/"))
    paths = ["--model", f"{folder}/model", "--data", f"{folder}/data", "--out", f"{folder}/out"]
    if name == "plan":
        return training.main, ["plan", "--model", f"{folder}/model", *flags]
    if name == "evaluate":
        return evaluate.main, [*paths, "--device", "cpu", *flags]
    if name in TRAINS:
        needed = ["--ablate", "ratio"] if name == "halves" else []
        steps = arguments(folder / "model", folder / "data", folder / "out", steps=1)
        return TRAINS[name].main, [*steps, *needed, *flags]
    return OTHERS[name].main, flags


def tree(folder):
    return sorted((str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*"))


@contextlib.contextmanager
def limits():
    """Time and memory of a row; without them a hostile one would take the machine with it."""

    def ring(*_):
        raise TimeoutError(f"took more than {SECONDS} s")  # neither an InputError nor anything that we catch

    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (held + GIGABYTES * 2**30, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(main, argv):
    """(exit code, line) of a command in this process, as data.command would give them."""
    output = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
        try:
            main(argv)
            return 0, output.getvalue()
        except TimeoutError:
            raise
        except (InputError, OSError) as error:
            return 2, str(error)
        except SystemExit as end:  # argparse, in the commands that have few flags
            return end.code or 0, output.getvalue().strip().split("\n")[-1]


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_one_line_and_leaves_nothing_behind(sound, tmp_path, name):
    made, command, said = ROWS[name]
    folder = tmp_path / "case"
    shutil.copytree(sound, folder)
    make(folder, made)
    before = tree(folder)
    with limits():
        code, line = outcome(*call(folder, command))
    assert code == 2 and re.search(".*".join(map(re.escape, said.split(" ... "))), line), line
    assert len(line) <= 1200 and "\n" not in line and line.isprintable()
    assert tree(folder) == before


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_number_of_any_command_is_nan_or_infinite(path):
    """Of the flags and of --config alike, which share the check; a NaN would spread through weights and logs."""
    config = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)).Config
    numbers = [f.name.replace("_", "-") for f in dataclasses.fields(config) if "float" in str(f.type)]
    assert numbers or path.stem == "evaluate"
    for name, value in itertools.product(numbers, ("nan", "inf", "-inf", "1e999", "-nan")):
        with pytest.raises(InputError, match=f"--{name}: found -?(nan|inf), expected a finite number"):
            parse(config, "", [f"--{name}={value}"])


def test_there_are_two_hundred_and_the_heading_says_so():
    assert len(ROWS) >= 200
    assert PAGE.read_text().startswith(f"# {len(ROWS)} bad inputs\n")


def test_the_line_reaches_the_terminal_and_the_exit_code_is_2(sound, tmp_path):
    main, argv = call(sound, f"sft --lr -1 --out {tmp_path}/out")
    process = start(lambda: main(argv), tmp_path / "log")
    process.join(300)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and said.startswith("error: --lr: found -1.0") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_batch_that_the_ranks_do_not_divide_is_refused(sound, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="--batch-size 4: found 3 ranks, expected a divisor of it"):
        train_sft.main(arguments(sound / "model", sound / "data", tmp_path / "out", steps=1))


# -- what the line looks like ------------------------------------------------------------------------------------------


def test_an_error_line_is_one_line_that_a_terminal_does_not_obey():
    """Names of files, items and tensors come from strangers: no colour, no cursor, no title, no text turned round."""
    line = str(InputError("item \x1b]0;owned\x07 \x1b[2J\u202eabc\r\nerror: all is well\x9b1m \ud800"))
    assert line == r"item \x1b]0;owned\x07 \x1b[2J\u202eabc error: all is well\x9b1m \ud800"


@pytest.mark.parametrize(
    "text", ["x" * 40_000_000, "\x1b" * 1_000_000, "a " * 1_000_000], ids=["long", "wild", "words"]
)
def test_an_error_line_is_cut_and_keeps_what_was_expected(text):
    line = str(InputError(f"sft.jsonl:3: found {text}, expected a file name"))
    assert len(line) <= 1000 and line.startswith("sft.jsonl:3: found") and line.endswith(", expected a file name")


def test_the_library_s_own_errors_are_escaped_too(capsys):
    def main():
        raise FileNotFoundError(2, "No such file", "a\x1b[2Jb")

    with pytest.raises(SystemExit):
        data.command(main)
    assert "\x1b" not in capsys.readouterr().err


def test_model_s_commands_say_it_in_one_line(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        qwen.load_pretrained(tmp_path / "nowhere")
