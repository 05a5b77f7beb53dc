"""The config of a command: dataclass defaults < --config file.json < flags.

A field is an option: its name, type, default, --help line and limits stand in one place, and nowhere else. A class of
fields is a heading of --help: its docstring.
"""

import argparse
import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field

from data import InputError, open_text

MOST_RANK = 1 << 14  # of an adapter: above the width of the largest layer it is no low rank
MOST_CONFIG = 1 << 20  # characters that are read of a --config file


def option(default, help, **limits):
    """A config field: default, --help line (unit, when to change it); least, above, most, choices, like, required."""
    return field(default=default, metadata={"help": help, **limits})


def redefault(base, name, default):
    """The same option as in `base` with another default."""
    return field(default=default, metadata=base.__dataclass_fields__[name].metadata)


# -- options of all three stages ---------------------------------------------------------------------------------------


@dataclass
class Start:
    """what is read and written"""

    model: str = option(
        "", "a folder in the hub's layout, a hub id, a run's folder, or RUN/checkpoints/N", required=True
    )
    init: str = option(
        "",
        "start from the stage before: its run's folder, or RUN/checkpoints/N; an adapter is continued, or merged "
        "by --full",
    )
    adapter: str = option("", "start from this LoRA adapter on top of --model")
    data: str = option("", "folder of policies.json and the .jsonl files", required=True)
    media: str = option("", "folder that pictures of the data may be read from, too, if they lie outside --data")
    split: str = option("", "file of the items to learn from, inside --data")
    replay: str = option(
        "",
        "folder of other policies' items, learned with their policy in the prompt (its sft.jsonl), "
        "so that the model keeps following policies in its prompt",
    )
    replay_share: float = option(0.5, "share of each batch that is replayed, if --replay is given", least=0, most=0.9)
    out: str = option("", "folder of this run: config, metrics, checkpoints, final weights", required=True)
    min_pixels: int = option(0, "least area of a picture once it is resized; 0: the checkpoint's own", least=0)
    max_pixels: int = option(0, "largest area (28 x 28 pixels make a token); 0: the checkpoint's own", least=0)
    max_prompt: int = option(4096, "longest prompt, tokens with its pictures; a longer one is an error", least=1)
    max_response: int = option(2048, "longest response, tokens", least=1)
    seed: int = option(0, "of data order, masks, dropout and sampling", least=0, most=2**63 - 1)


@dataclass
class Update:
    """the update"""

    full: bool = option(True, "tune all parameters; --no-full tunes a LoRA adapter")
    train_vision: bool = option(True, "with --full, tune the vision tower and merger, too")
    lora_rank: int = option(
        8, "rank of the adapter; its alpha is twice that: B A x counts double", least=1, most=MOST_RANK
    )
    lora_targets: str = option("", "layers with an adapter: names by commas or a regex; empty: all of the text blocks")
    lr: float = option(1e-5, "peak learning rate", above=0, most=1)
    warmup: int = option(0, "steps of linear warm-up", least=0)
    schedule: str = option("constant", "learning rate after the warm-up", choices=("constant", "linear", "cosine"))
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay, on matrices only", least=0)
    beta2: float = option(0.999, "AdamW's second-moment decay", above=0, most=0.9999)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    batch_size: int = option(128, "items per update, over all ranks and micro-batches", least=1, most=1 << 20)
    micro_batch: int = option(
        4, "items per forward pass, of the longest; more of shorter ones; fewer need less memory, same results", least=1
    )
    epochs: float = option(1.0, "passes over the data", above=0, most=1e6)
    steps: int = option(0, "updates; 0: as many as --epochs needs", least=0)


@dataclass
class Machine:
    """the machine"""

    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "of matrix products; trained weights and AdamW stay float32, frozen ones take it; auto: "
        "bfloat16 on GPUs, float32 on CPUs",
        choices=("auto", "float32", "bfloat16"),
    )
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, a third more time"
    )
    compile: bool = option(False, "torch.compile all but attention, learning and sampling: half a minute at the start")
    fsdp: str = option(
        "auto",
        "shard weights, gradients and AdamW over the ranks (full only); auto: on several GPUs",
        choices=("auto", "on", "off"),
    )
    save_every: str = option(
        "15m",
        "steps (100) or minutes (15m) between checkpoints, which is what a machine that dies costs; 0: none",
        like=(r"\d{1,9}|\d{1,9}(\.\d{1,9})?m", "steps such as 100, or minutes such as 15m"),
    )
    keep: int = option(2, "newest checkpoints to keep, and the best where a run names one", least=1)
    resume: bool = option(False, "continue from the newest whole checkpoint of --out; from the start if there is none")
    overwrite: bool = option(False, "delete the run that --out holds")


VALIDATION_ITEMS = 128


@dataclass
class Watching:
    """what is watched"""

    validation: str = option("test.jsonl", "file of the validation items, inside --data")
    validate_every: int = option(
        0, "steps between validations on its first 128 items, each with a checkpoint (RL: none); 0: none", least=0
    )
    tracker: str = option("", "also log to", choices=("", "tensorboard", "wandb"))


@dataclass
class Judge:
    """the judge"""

    judge_url: str = option("", "OpenAI-compatible server, up to /v1, that the reward named judge asks")
    judge_model: str = option("", "the model that it is asked for")
    judge_rubric: str = option("", "text with {policy}, {query}, {reference}, {response}; empty: data/judge.py's own")


@dataclass
class CommonConfig(Start, Update, Watching, Machine):
    """common to all stages"""


# -- reading them ------------------------------------------------------------------------------------------------------


def parse(config_class, doc, argv=None):
    """-> config_class from its defaults, the JSON of --config FILE and the flags of `argv` (default: the command line).

    Field `batch_size` is the flag --batch-size, a bool --full or --no-full. Raises InputError for what is unknown,
    missing, of another type or out of its limits.
    """
    kinds = {name: _kind(hint) for name, hint in typing.get_type_hints(config_class).items()}
    options = {f.name: f for f in dataclasses.fields(config_class)}
    example = re.search(r"^ *((?:python|torchrun) .*?)(?:   .*)?$", doc, re.MULTILINE)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=doc,
        epilog=example and f"example:\n  {example[1]}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: _refuse(f"{message} (--help lists the flags)")
    parser.add_argument("--config", metavar="FILE", help="JSON of option names and values; flags win over it")
    for heading, names in _headings(config_class).items():
        group = parser.add_argument_group(heading)
        for name in names:
            metavar = {int: "N", float: "X", str: "TEXT"}.get(kinds[name])
            extra = {"action": argparse.BooleanOptionalAction} if kinds[name] is bool else {"metavar": metavar}
            text = _help(options[name])
            group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **extra)
    flags = vars(parser.parse_args(argv))
    values = {**_read_config(flags.pop("config"), options), **flags}
    config = config_class(**{key: _convert(key, v, kinds[key], options[key].metadata) for key, v in values.items()})
    for name, f in options.items():
        if f.metadata.get("required") and not getattr(config, name):
            raise InputError(f"--{name.replace('_', '-')} is missing: {f.metadata['help']}")
    return config


def _headings(config_class):
    """{heading: option names}: each option under the docstring of the class that introduced it."""
    parents = [cls for cls in config_class.__mro__ if dataclasses.is_dataclass(cls)]
    owner = {name: cls.__doc__ for cls in parents for name in cls.__annotations__}  # the last one introduced it
    return {
        cls.__doc__: [name for name in cls.__annotations__ if owner[name] == cls.__doc__]
        for cls in parents
        if cls.__doc__ in owner.values()
    }


def _help(f):
    """An option's line: what it does, its choices, its default."""
    text = f.metadata["help"]
    if "choices" in f.metadata:
        text += f"; one of: {', '.join(choice or '(empty)' for choice in f.metadata['choices'])}"
    if not f.metadata.get("required"):
        text += f" (default: {'none' if f.default is None else f.default if f.default != '' else 'empty'})"
    return text.replace("%", "%%")


def refuse(bad, found, expected):
    """Raise an InputError where `bad` holds: what was found, what was expected."""
    if bad:
        raise InputError(f"found {found}, expected {expected}")


def _refuse(message):
    raise InputError(message)


def _kind(hint):
    """The plain type of an annotation: int of int | None."""
    return next((a for a in typing.get_args(hint) if a is not types.NoneType), hint)


def _read_config(path, options):
    if path is None:
        return {}
    try:
        with open_text(path) as file:
            values = json.loads(file.read(MOST_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--config {path}: {error}, expected a JSON file") from None
    if not isinstance(values, dict) or set(values) - set(options):
        unknown = ", ".join(sorted(set(values) - set(options))) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"--config {path}: found {unknown}, expected one object of known options (--help lists them)")
    return values


def _convert(name, value, kind, limits):
    """One option's value in its type and within its limits; text comes from flags, JSON values from --config."""
    flag = "--" + name.replace("_", "-")
    try:
        good = isinstance(value, (str, kind)) or (kind is float and type(value) is int)
        good = good and "\0" not in str(value)  # no path has one
        if not good or (kind is not bool and isinstance(value, bool)) or (kind is bool and isinstance(value, str)):
            raise ValueError
        value = kind(value)
    except ValueError:
        article = "an" if kind is int else "a"
        raise InputError(f"{flag}: found {value!r}, expected {article} {kind.__name__}") from None
    if "like" in limits and not re.fullmatch(limits["like"][0], value):
        raise InputError(f"{flag}: found {value!r}, expected {limits['like'][1]}")
    if "choices" in limits and value not in limits["choices"]:
        raise InputError(f"{flag}: found {value!r}, expected one of {', '.join(limits['choices'])}")
    least, above = limits.get("least", -math.inf), limits.get("above", -math.inf)
    most = limits.get("most", 2**31 - 1 if kind is int else math.inf)
    if kind in (int, float) and not (math.isfinite(value) and least <= value <= most and above < value):
        words = {"least": "at least", "above": "above", "most": "at most"}
        bounds = [f"{word} {limits[key]}" for key, word in words.items() if key in limits]
        bounds += [f"at most {most}"] * (kind is int and "most" not in limits and value > most)
        raise InputError(f"{flag}: found {value}, expected a finite number {' and '.join(bounds)}")
    return value
