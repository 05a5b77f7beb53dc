"""Bad input of every kind over the commands of training and evaluation: one clear line, exit code 2, nothing half-written.

The table is the documentation: a row is what is wrong, the command that meets it, and what its line says. BAD_INPUT.md shows
it: python tests/test_bad_input.py writes that file anew.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
from helpers import tiny_checkpoint
from safetensors.torch import load_file, save_file
from small import ROOT, arguments, quiet, small_data

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
import train_cpt
import train_rl
import train_sft
import training
from data import InputError

MAIN = {
    "cpt": train_cpt.main,
    "sft": train_sft.main,
    "rl": train_rl.main,
    "evaluate": evaluate.main,
    "plan": training.main,
}
DATA = {
    name: getattr(data, name).main
    for name in "clevr_policy gta_policy benchmarks cot inspect oracle override own check shop".split()
}
PAGE = ROOT / "tests" / "BAD_INPUT.md"
COMMANDS = {
    "cpt": "train_cpt.py",
    "sft": "train_sft.py",
    "rl": "train_rl.py",
    "evaluate": "evaluate.py",
    "plan": "training.py plan",
    **{name: f"-m data.{name}" for name in DATA},
}


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit(path, **changes):
    """Change keys of a JSON object; None removes one."""
    value = json.loads(path.read_text())
    for key, new in changes.items():
        value.pop(key, None) if new is None else value.update({key: new})
    path.write_text(json.dumps(value))


def policies(f, change):
    path = f / "data" / "policies.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def tensors(path, change):
    """Add, drop or change tensors of a safetensors file that is sound otherwise."""
    value = load_file(path)
    change(value)
    save_file(value, path)


def another_run(f):
    (f / "out").mkdir()
    (f / "out" / "config.json").write_text('{"stage": "sft", "base": "m"}')


def weights(f):
    return f / "model" / "model.safetensors"


nothing = lambda f: None
# what is wrong: (command, how the input is made so, flags, what the line says)
TABLE = {
    # flags and config files
    "unknown flag": ("sft", nothing, ["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    "abbreviated flag": ("sft", nothing, ["--epoch", "1"], "unrecognized arguments: --epoch"),
    "flag without value": ("sft", nothing, ["--lr"], "--lr: expected one argument"),
    "no number": ("cpt", nothing, ["--lr", "fast"], "--lr: found 'fast', expected a float"),
    "no whole number": ("rl", nothing, ["--steps", "1.5"], "--steps: found '1.5', expected an int"),
    "negative learning rate": ("cpt", nothing, ["--lr=-1e-5"], "--lr: found -1e-05, expected a finite number above 0"),
    "zero learning rate": ("rl", nothing, ["--lr", "0"], "--lr: found 0.0"),
    "infinite learning rate": ("sft", nothing, ["--lr", "inf"], "--lr: found inf, expected a finite number"),
    "learning rate NaN": ("sft", nothing, ["--lr", "nan"], "--lr: found nan, expected a finite number"),
    "negative weight decay": ("sft", nothing, ["--weight-decay", "-1"], "--weight-decay: found -1.0"),
    "negative steps": ("sft", nothing, ["--steps", "-1"], "--steps: found -1, expected a finite number at least 0"),
    "no items an update": ("sft", nothing, ["--batch-size", "0"], "--batch-size: found 0"),
    "no items a forward pass": ("sft", nothing, ["--micro-batch", "0"], "--micro-batch: found 0"),
    "rank 0 adapter": ("sft", nothing, ["--lora-rank", "0"], "--lora-rank: found 0"),
    "targets that match nothing": ("sft", nothing, ["--lora-targets", "z_proj"], "z_proj"),
    "share above 1": ("cpt", nothing, ["--mask-visual", "1.5"], "--mask-visual: found 1.5"),
    "unknown schedule": ("sft", nothing, ["--schedule", "wavy"], "--schedule: found 'wavy', expected one of constant"),
    "unknown device": ("sft", nothing, ["--device", "tpu"], "--device: found 'tpu', expected one of auto"),
    "unknown kind": ("cpt", nothing, ["--kinds", "applied,poem"], "--kinds: found 'poem', expected some of applied"),
    "kind that the data lacks": ("cpt", nothing, ["--kinds", "response"], "no items of the kinds response"),
    "no model": ("sft", nothing, ["--model", ""], "--model is missing"),
    "no data": ("evaluate", nothing, ["--data", ""], "--data is missing"),
    "no config file": ("sft", nothing, ["--config", "nowhere.json"], "--config nowhere.json: .*expected a JSON file"),
    "config file of another kind": (
        "sft",
        lambda f: (f / "c.json").write_text("lr: 1"),
        ["--config", "F/c.json"],
        "expected a JSON file",
    ),
    "unknown key in the config file": (
        "sft",
        lambda f: (f / "c.json").write_text('{"lrr": 1}'),
        ["--config", "F/c.json"],
        "found lrr",
    ),
    "config file with a list": (
        "sft",
        lambda f: (f / "c.json").write_text("[1]"),
        ["--config", "F/c.json"],
        "found list, expected one object",
    ),
    "text for a number in the config file": (
        "sft",
        lambda f: (f / "c.json").write_text('{"warmup": "many"}'),
        ["--config", "F/c.json"],
        "--warmup: found 'many'",
    ),
    "text for a bool in the config file": (
        "sft",
        lambda f: (f / "c.json").write_text('{"full": "yes"}'),
        ["--config", "F/c.json"],
        "--full: found 'yes'",
    ),
    # RL
    "negative policy rollouts": ("rl", nothing, ["--policy-rollouts", "-1"], "--policy-rollouts: found -1"),
    "a group of one": ("rl", nothing, ["--group-size", "1", "--policy-rollouts", "0"], "1 \\+ 0 responses"),
    "unknown algorithm": ("rl", nothing, ["--algorithm", "magic"], "--algorithm: found 'magic'"),
    "zero temperature": ("rl", nothing, ["--temperature", "0"], "--temperature: found 0.0"),
    "unknown reward": ("rl", nothing, ["--reward", "fame"], "fame"),
    "reward of a module that is not there": ("rl", nothing, ["--reward", "nowhere:f"], "nowhere"),
    # folders
    "no such model": ("sft", nothing, ["--model", "F/nowhere"], "nowhere: found no such folder"),
    "no such data": ("cpt", nothing, ["--data", "F/nowhere"], "policies.json: no such file"),
    "no such split": ("sft", nothing, ["--split", "extra.jsonl"], "extra.jsonl: no such file"),
    "output is a file": (
        "sft",
        lambda f: (f / "out").write_text(""),
        [],
        "--out .*out: found a file, expected a folder",
    ),
    "output holds another run": (
        "rl",
        another_run,
        [],
        "holds another run, expected a new folder, --resume or --overwrite",
    ),
    "resume of another stage": ("cpt", another_run, ["--resume"], "was started as sft"),
    "init from a run that has not ended": (
        "cpt",
        lambda f: (
            shutil.copytree(f / "data", f / "half"),
            (f / "half" / "config.json").write_text('{"stage": "cpt", "base": "m"}'),
        ),
        ["--init", "F/half"],
        "a run that has not ended",
    ),
    "adapter that is not there": ("evaluate", nothing, ["--adapter", "F/nowhere"], "nowhere: found no such folder"),
    "results of another kind": (
        "evaluate",
        lambda f: ((f / "out").mkdir(), (f / "out" / "results.json").write_text("[]")),
        [],
        "results.json: found no rows",
    ),
    "nothing to recite": ("evaluate", nothing, ["--recite"], "no policy with sections"),
    # checkpoints
    "no config.json": ("sft", lambda f: (f / "model" / "config.json").unlink(), [], "config.json: found no such file"),
    "config.json cut short": ("sft", lambda f: replace(f / "model" / "config.json", "}", ""), [], "config.json"),
    "config.json without a key": (
        "sft",
        lambda f: edit(f / "model" / "config.json", hidden_size=None),
        [],
        "hidden_size",
    ),
    "config.json with text for a number": (
        "sft",
        lambda f: edit(f / "model" / "config.json", num_hidden_layers="three"),
        [],
        "num_hidden_layers",
    ),
    "no weights": ("sft", lambda f: weights(f).unlink(), [], "model.safetensors"),
    "weights cut short": ("cpt", lambda f: os.truncate(weights(f), 5000), [], "model.safetensors: found"),
    "weights of no bytes": ("cpt", lambda f: weights(f).write_bytes(b""), [], "model.safetensors"),
    "missing tensor": (
        "rl",
        lambda f: tensors(weights(f), lambda t: t.pop("model.norm.weight")),
        [],
        "missing model.norm.weight",
    ),
    "unexpected tensor": (
        "cpt",
        lambda f: tensors(weights(f), lambda t: t.update(extra=t["model.norm.weight"].clone())),
        [],
        "unexpected extra",
    ),
    "mis-shaped tensors": ("sft", lambda f: edit(f / "model" / "config.json", intermediate_size=96), [], "up_proj"),
    "no tokenizer": ("sft", lambda f: (f / "model" / "tokenizer.json").unlink(), [], "tokenizer.json"),
    "tokenizer without vision tokens": (
        "evaluate",
        lambda f: replace(f / "model" / "tokenizer.json", "<|image_pad|>", "<|imago_pad|>"),
        [],
        "image_pad",
    ),
    "no preprocessor": (
        "evaluate",
        lambda f: (f / "model" / "preprocessor_config.json").unlink(),
        [],
        "processor_config.json",
    ),
    # data
    "line that is not JSON": (
        "sft",
        lambda f: replace(f / "data" / "sft.jsonl", "{", "["),
        [],
        "sft.jsonl:1: not JSON",
    ),
    "line without a key": (
        "cpt",
        lambda f: replace(f / "data" / "cpt.jsonl", '"question"', '"query"'),
        [],
        "cpt.jsonl:1: key 'question' is missing",
    ),
    "key of another type": (
        "rl",
        lambda f: replace(f / "data" / "rl.jsonl", '"answer": "A"', '"answer": 1'),
        [],
        "rl.jsonl:1: key 'answer' holds int",
    ),
    "id used twice": (
        "sft",
        lambda f: replace(f / "data" / "sft.jsonl", '"id": "i1"', '"id": "i0"'),
        [],
        "sft.jsonl:2: id 'i0' found again",
    ),
    "empty file of items": (
        "evaluate",
        lambda f: (f / "data" / "test.jsonl").write_text(""),
        [],
        "test.jsonl: no items",
    ),
    "picture that is not there": (
        "sft",
        lambda f: (f / "data" / "images" / "2.png").unlink(),
        [],
        "sft.jsonl:3: picture 'images/2.png' is missing",
    ),
    "picture outside the folder": (
        "sft",
        lambda f: replace(f / "data" / "sft.jsonl", "images/1.png", "../model/config.json"),
        [],
        "lies outside the data folder",
    ),
    "picture of no bytes": (
        "cpt",
        lambda f: [path.write_bytes(b"") for path in (f / "data" / "images").iterdir()],
        [],
        ".png: found",
    ),
    "picture cut short": (
        "evaluate",
        lambda f: [os.truncate(path, 90) for path in (f / "data" / "images").iterdir()],
        [],
        ".png: found",
    ),
    "picture far too large": (
        "sft",
        lambda f: [bomb(path) for path in (f / "data" / "images").iterdir()],
        [],
        ".png: found",
    ),
    "query of an unknown policy": (
        "sft",
        lambda f: replace(f / "data" / "sft.jsonl", '"policy": "P1"', '"policy": "P9"'),
        [],
        "sft.jsonl:1: policy 'P9' is not in",
    ),
    "policies.json that is no list": (
        "sft",
        lambda f: (f / "data" / "policies.json").write_text("{}"),
        [],
        "policies.json: expected a list",
    ),
    "two policies of one name": (
        "cpt",
        lambda f: policies(f, lambda p: p[1].update(name="P1")),
        [],
        "'P1' stands there twice",
    ),
    "dangling branch": (
        "cpt",
        lambda f: policies(f, lambda p: p[0]["nodes"][0]["branches"].update(yes="Z")),
        [],
        "leads to 'Z'",
    ),
    "cycle": (
        "cpt",
        lambda f: policies(f, lambda p: p[0]["nodes"][0]["branches"].update(yes="1")),
        [],
        "leads back to itself",
    ),
    "fewer pictures than marks": (
        "rl",
        lambda f: policies(f, lambda p: p[1].update(images=[])),
        [],
        "1 <image> in the text, 0 pictures",
    ),
    "prompt over the limit": (
        "sft",
        nothing,
        ["--max-prompt", "30"],
        r"item i\d+: found a prompt of \d+ tokens, expected at most --max-prompt 30",
    ),
    "response over the limit": (
        "cpt",
        nothing,
        ["--max-response", "3"],
        r"item \w+: found a response of \d+ tokens, expected at most --max-response 3",
    ),
    "prompt over the limit in RL": ("rl", nothing, ["--max-prompt", "30"], r"30"),
    # the plan
    "plan of an unknown stage": ("plan", nothing, ["--stage", "later"], "--stage: found 'later'"),
    "plan for no GPUs": ("plan", nothing, ["--gpus", "0"], "--gpus: found 0"),
    "plan of no model": ("plan", nothing, ["--model", "F/nowhere"], "nowhere"),
    # making and showing data
    "a folder that holds something": (
        "clevr_policy",
        nothing,
        ["--out", "F/data"],
        "data: exists already, expected a new or empty folder",
    ),
    "a policy of no layers": (
        "clevr_policy",
        nothing,
        ["--out", "F/out", "--depth", "0"],
        "--depth 0 found, expected at least 1",
    ),
    "pictures of no size": (
        "clevr_policy",
        nothing,
        ["--out", "F/out", "--size", "480"],
        "--size '480' found, expected two whole numbers",
    ),
    "no official CLEVR": (
        "clevr_policy",
        nothing,
        ["--out", "F/out", "--clevr-root", "F/no"],
        "CLEVR_train_scenes.json: no such file",
    ),
    "no official GTA": ("gta_policy", nothing, ["--out", "F/out", "--gta-root", "F/no"], "dataset.json: no such file"),
    "no official benchmark": (
        "benchmarks",
        nothing,
        ["mmlu-pro", "F/no.jsonl", "--out", "F/out"],
        "no.jsonl: no such file",
    ),
    "chains by no model": (
        "cot",
        nothing,
        ["--data", "F/data", "--out", "F/out.jsonl", "--mode", "forward"],
        "--mode forward found without --model",
    ),
    "chains of no attempts": (
        "cot",
        nothing,
        ["--data", "F/data", "--out", "F/out.jsonl", "--attempts", "0"],
        "--attempts 0",
    ),
    "a log that is not there": ("own", nothing, ["--data", "F/no.jsonl", "--out", "F/new"], "no.jsonl: no such file"),
    "a log of another kind": (
        "own",
        nothing,
        ["--data", "F/model/config.json", "--out", "F/new"],
        "found 1 rows dropped",
    ),
    "an own folder that holds something": (
        "own",
        nothing,
        ["--data", "F/data/rl.jsonl", "--out", "F/data"],
        "data: exists already, expected a new or empty folder",
    ),
    "an own policy that is not there": (
        "own",
        nothing,
        ["--policy", "F/no.md", "--data", "F/data/rl.jsonl", "--out", "F/new"],
        "no.md: no such file, expected text or Markdown",
    ),
    "a look at no data": ("check", nothing, ["F/nowhere", "--model", "F/model"], "policies.json: no such file"),
    "a judge without a server": ("rl", nothing, ["--reward", "judge"], "--reward judge: found no --judge-url"),
    "a judge without a name": (
        "rl",
        nothing,
        ["--reward", "judge", "--judge-url", "http://127.0.0.1:9/v1"],
        "--judge-model is missing",
    ),
    "a judge at no address": (
        "rl",
        nothing,
        ["--reward", "judge", "--judge-url", "localhost", "--judge-model", "m"],
        "--judge-url 'localhost': expected http://HOST:PORT/v1",
    ),
    "a judge for evaluation without a server": ("evaluate", nothing, ["--reward", "judge"], "found no --judge-url"),
    "a reward that is no number's name": ("rl", nothing, ["--reward", "accuracy=nan"], "weight nan"),
    "a shop of one query": ("shop", nothing, ["--out", "F/new", "--queries", "1"], "--queries 1 found"),
    "a page of no run": ("inspect", nothing, ["F/data", "F/data"], "no metrics.jsonl and no results.json"),
    "a page of no data": ("inspect", nothing, ["F/nowhere"], "policies.json: no such file"),
    "a check of no data": ("oracle", nothing, ["F/nowhere"], "policies.json: no such file"),
    "an override of no data": (
        "override",
        nothing,
        ["--data", "F/nowhere", "--out", "F/out"],
        "policies.json: no such file",
    ),
}


def bomb(path):
    """A PNG header that promises 60,000 x 60,000 pixels."""
    from zlib import crc32

    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc32(kind + body))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"x")
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")
    return folder


def words(command, f, flags):
    if command in DATA:
        return flags
    if command == "plan":
        return ["plan", "--model", f"{f}/model", *flags]
    if command == "evaluate":
        return ["--model", f"{f}/model", "--data", f"{f}/data", "--out", f"{f}/out", "--device", "cpu", *flags]
    given = [flag for flag in flags if flag in ("--batch-size", "--micro-batch", "--lr")]
    return (
        arguments(f / "model", f / "data", f / "out", steps=1) + flags
        if not given
        else [*arguments(f / "model", f / "data", f / "out"), *flags]
    )


def tree(folder):
    return sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_one_line_and_leaves_nothing_behind(sound, tmp_path, name):
    command, spoil, flags, line = TABLE[name]
    f = tmp_path / "case"
    shutil.copytree(sound, f)
    spoil(f)
    before = tree(f)
    with pytest.raises(InputError, match=line) as error:
        quiet({**MAIN, **DATA}[command], words(command, f, [flag.replace("F/", f"{f}/") for flag in flags]))
    assert len(str(error.value)) < 1000
    assert tree(f) == before


def page():
    """The table in Markdown."""
    lines = [
        f"# {len(TABLE)} bad inputs",
        "",
        "Each ends in one line, `error: ...`, and exit code 2, and leaves nothing half-written; a test of",
        "`tests/test_bad_input.py` each. F is the folder of the case, ... any text.",
        "",
        "| what is wrong | command | flags | what the line says |",
        "| --- | --- | --- | --- |",
    ]
    for name, (command, _, flags, line) in TABLE.items():
        said = re.sub(
            r"\\(.)\+?",
            r"\1",
            line.replace(r"i\d+", "i1").replace(r"\d+", "31").replace(r"\w+", "i1").replace(".*", " ... "),
        )
        lines.append(
            f"| {name} | `{COMMANDS[command]}` | {f'`{chr(32).join(flags)}`' if flags else ''} | {said.replace('|', chr(92) + '|')} |"
        )
    return "\n".join([*lines, ""])


def test_there_are_at_least_sixty_and_the_page_shows_them():
    assert len(TABLE) >= 60
    assert PAGE.read_text() == page(), "python tests/test_bad_input.py writes it anew"


@pytest.mark.parametrize("script, flags", [("train_sft.py", ["--lr", "-1"]), ("evaluate.py", ["--model", "nowhere"])])
def test_the_line_reaches_the_terminal_and_the_exit_code_is_2(sound, tmp_path, script, flags):
    argv = ["--model", f"{sound}/model", "--data", f"{sound}/data", "--out", f"{tmp_path}/out", *flags]
    done = subprocess.run([sys.executable, script, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_batch_that_the_ranks_do_not_divide_is_refused(sound, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="--batch-size 4: found 3 ranks, expected a divisor of it"):
        train_sft.main(arguments(sound / "model", sound / "data", tmp_path / "out", steps=1))


if __name__ == "__main__":
    PAGE.write_text(page())
