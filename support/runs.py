"""What --model, --chat, --export and their like may name: a checkpoint, a run's folder, or a checkpoint of a run.

    RUN/model                 full weights: a checkpoint like any other
    RUN/adapter               LoRA in PEFT's format, on the base that RUN/config.json records
    RUN/checkpoints/step-N    what a run has learned so far (support/checkpoint.py), on what it started from

A checkpoint of a run is as good as a run that ended there. What starts from one copies it first (`own_start`): the
other run may delete its checkpoints, and RUN/checkpoints/best moves. Refused is where nothing could hold such a copy.

A hub id is for --model alone: the hub is never asked for a path that is mistyped, or a base that a run records.
"""

from pathlib import Path

import torch

from data import InputError
from support.checkpoint import checksum, shard_name
from support.files import TensorFile, find_folder, read, read_json, weight_files
from support.folder import START, need_room


def locate(path, hub="download"):
    """A --model or --init value as (base: folder or hub id, adapter folder | None). hub: see `find_folder`."""
    folder = Path(path).expanduser()
    if is_step(folder):
        found = "a checkpoint of a run, expected a model or a run that has ended, which stays as it is"
        raise InputError(f"{folder}: found {found} (python model.py --export {folder} --out FOLDER makes one)")
    if (folder / "model").is_dir():
        return str(folder / "model"), None
    if (folder / "adapter").is_dir():
        return recorded_base(folder), str(folder / "adapter")
    if "base" in run_config(folder):
        raise InputError(f"{path}: found a run that has not ended, expected its model/ or adapter/ (see --resume)")
    return str(path if hub == "download" else find_folder(path, hub)), None


def is_step(path):
    """Is this a checkpoint of a run?"""
    return (Path(path).expanduser() / "state.json").is_file()


def described(path):
    """The folder with the config, tokenizer and template of what `path` names, whatever holds its weights."""
    step = Path(path).expanduser()
    return find_folder(recorded_base(step.resolve().parent.parent) if is_step(step) else locate(path)[0])


def own_start(qwen, step, folder, dtype, full):
    """Copy what a run had learned at a checkpoint to `folder`, once -> (base, adapter folder | None), as `locate` does.

    full: does whoever starts from it tune all weights, which it holds in `dtype`?
    """
    if (folder / "model").is_dir():
        return str(folder / "model"), None
    if (folder / "adapter").is_dir():
        return recorded_base(folder.parent), str(folder / "adapter")
    step = Path(step).expanduser()
    state = read_json(step / "state.json")
    whole = read(state, "config", dict, step / "state.json").get("full", True)
    if whole and not full:
        made = f"python model.py --export {step} --out BASE, then --model BASE"
        raise InputError(f"{step}: found whole weights, expected for an adapter a base that stays where it is: {made}")
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in step.glob("shard-*"))  # with AdamW's moments, so it is enough
    need_room(folder, size, "a copy of the checkpoint that it starts from")
    model = load_step(qwen, step, "cpu", torch.float32)
    if whole:
        qwen.save_pretrained(model, folder / "model", dtype)
        return str(folder / "model"), None
    qwen.save_adapter(model, folder / "adapter")
    return recorded_base(step.resolve().parent.parent), str(folder / "adapter")


def load_weights(qwen, base, device, dtype):
    """The model of a folder or hub id, with the latent actions that its files hold, if any."""
    if any(".latents." in name for file in weight_files(find_folder(base)) for name in file.entries):
        import variants.latent.actions as qwen
    return qwen.load_pretrained(base, device, dtype)


def run_config(folder):
    """The config.json of a run's folder; {} where there is none or it is a model's own."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.exists() else {}
    return config if "stage" in config else {}


def recorded_base(folder):
    """The base that a run's config.json records: a folder, or a hub id whose files are here already."""
    base = run_config(folder).get("base")
    try:
        find_folder(str(base), hub="cache")
    except InputError:
        found = f"the base {base!r} in its config.json, which is not here"
        raise InputError(
            f"{folder}: found {found}, expected a folder, or a hub id that was downloaded before"
        ) from None
    return str(base)


def open_model(qwen, path, device="cpu", dtype=torch.float32, adapter=""):
    """(model, folder of its other files): adapters merged, no gradients, in `dtype` (None: as the base is stored).

    qwen: the module model.py. adapter: LoRA on top, in the place of the run's own.
    """
    if is_step(path):
        model = load_step(qwen, Path(path).expanduser(), device, dtype)
    else:
        base, own = locate(path)
        model = load_weights(qwen, base, device, dtype or stored_dtype(find_folder(base)))
        adapter = adapter or own
    if adapter:
        qwen.load_adapter(model, adapter)
    qwen.merge_lora(model)
    return model.requires_grad_(False).eval(), model.source


def stored_dtype(folder):
    """The type in which a checkpoint holds its embedding."""
    from support.files import DTYPES

    for file in weight_files(folder):
        for name, entry in file.entries.items():
            if name.endswith("embed_tokens.weight"):
                return DTYPES[entry["dtype"]]
    raise InputError(f"{folder}: found no embedding, expected model.embed_tokens.weight")


def load_step(qwen, folder, device, dtype):
    """The model of RUN/checkpoints/step-N, LoRA beside its weights where the run trains one."""
    state, run = read_json(folder / "state.json"), folder.resolve().parent.parent
    config = read(state, "config", dict, folder / "state.json")
    own = run / f"{START}{state.get('run')}"  # where it started from a checkpoint itself
    base = str(own / "model") if (own / "model").is_dir() else recorded_base(run)
    adapter = str(own / "adapter") if (own / "adapter").is_dir() else config.get("adapter")
    if not own.is_dir() and not adapter and config.get("init"):
        adapter = locate(config["init"], hub="")[1]
    model = load_weights(qwen, base, device, dtype or stored_dtype(find_folder(base)))
    if adapter:
        qwen.load_adapter(model, adapter)
        if config["full"]:
            qwen.merge_lora(model)
    elif not config["full"]:
        targets = config["lora_targets"].split(",") if "," in config["lora_targets"] else config["lora_targets"]
        alpha = config.get("lora_alpha", 2 * config["lora_rank"])  # once an option
        qwen.add_lora(model, config["lora_rank"], alpha, targets or None)

    sums = state.get("shards") or [None]
    paths = [folder / shard_name(rank, len(sums)) for rank in range(len(sums))]
    files = [TensorFile(path) for path in paths]
    if damaged := [path.name for path, crc in zip(paths, sums) if checksum(path) != crc]:
        raise InputError(
            f"{folder}: found {damaged[0]} with another checksum than when it was written, expected it whole"
        )
    learned = {name for name in files[0].entries if name.startswith("param.")}
    for name, p in model.named_parameters():
        if (key := f"param.{name}") in learned:
            p.data.copy_(torch.cat([file.mapped(key) for file in files]))  # a rank's rows each
            learned.remove(key)
    if learned:
        raise InputError(
            f"{folder}: found {sorted(learned)[0]}, expected weights of the model that its run started from"
        )
    return model
