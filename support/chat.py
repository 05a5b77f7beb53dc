"""What a checkpoint is, what it answers, and how it leaves the house: the three commands of model.py.

python model.py --describe PATH
python model.py --chat PATH [--image FILE] [--adapter FOLDER]
python model.py --export PATH --out FOLDER [--adapter FOLDER]
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from data import InputError
from support.config import refuse
from support.files import read_json, shown, write_json
from support.layouts import pictures_to_save
from support.runs import described, open_model
from support.template import find_template


def describe(qwen, path):
    """Print the architecture of a checkpoint from its config alone: sizes, parameters by part, memory."""
    folder = described(path)
    config = qwen.Config.from_json(read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        model = qwen.Qwen25VL(config)
    text, tower, vision = model.model, model.visual, config.vision
    parts = {
        "vision tower": [tower.patch_embed, tower.blocks],
        "merger": [tower.merger],
        "embedding": [text.embed_tokens],
        "text blocks": [text.layers, text.norm],
        "head": [] if config.tie_word_embeddings else [model.lm_head],
    }
    total = sum(p.numel() for p in model.parameters())
    print(f"{path}: Qwen2.5-VL, {total:,} parameters, {2 * total / 1e9:.2f} GB in bf16")
    print(f"  vision: {vision.depth} blocks, width {vision.hidden_size}, {vision.num_heads} heads, in windows of")
    print(f"          {vision.window_size} pixels but for blocks {', '.join(map(str, vision.fullatt_block_indexes))}")
    print(f"  text:   {config.num_hidden_layers} blocks, width {config.hidden_size}, {config.vocab_size:,} tokens,")
    print(f"          {config.num_attention_heads} heads on {config.num_key_value_heads} kv heads")
    for name, modules in parts.items():
        size = sum(p.numel() for module in modules for p in module.parameters())
        print(f"  {name:<14}{size:>16,}{size / total:>8.1%}" + ("" if size else "  tied to the embedding"))
    adapter = sum(p.numel() for p in qwen.lora_parameters(qwen.add_lora(model, 64, 128)))
    print(f"  LoRA training holds {(2 * total + 16 * adapter) / 1e9:.2f} GB and activations: the weights in bf16, and")
    print(f"  {adapter:,} adapter values (rank 64) in fp32, each with its gradient and two Adam moments")


def terminal(text):
    """A model's words for a terminal: line ends and tabs work, escape sequences are shown."""
    return "".join(c if c in "\n\t" else shown(c) for c in text)


@torch.no_grad()
def chat(qwen, args):
    """Answer the lines of standard input greedily, each answer streamed as it comes."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, folder = open_model(qwen, args.chat, device, dtype, args.adapter)
    device = model.head_weight.device
    processor = qwen.Processor.from_pretrained(folder, args.min_pixels, args.max_pixels)
    first = [{"type": "image", "image": qwen.open_image(args.image)}] if args.image else []
    banned, messages = torch.tensor(processor.banned_ids, device=device), []
    for line in filter(str.strip, sys.stdin):
        messages.append({"role": "user", "content": [*first, {"type": "text", "text": line.strip()}]})
        first, answer, text, cache = [], [], "", qwen.Cache()
        prompt = processor.encode(messages, add_generation_prompt=True)
        pictures = [] if prompt.grid_thw is None else [prompt.pixel_values.to(device), prompt.grid_thw]
        hidden = model(prompt.input_ids[None].to(device), None, *pictures, cache=cache)  # (1, T, D)
        while len(answer) < args.max_tokens:
            token = model.logits(hidden[:, -1:]).index_fill(-1, banned, -torch.inf).argmax(-1)  # (1, 1)
            if token.item() in processor.stop_ids:
                break
            answer.append(token.item())
            if not (longer := processor.decode(answer)).endswith("\ufffd"):  # else a character is still incomplete
                print(terminal(longer[len(text) :]), end="", flush=True)
                text = longer
            hidden = model(token, cache=cache)  # (1, 1, D)
        print(flush=True)
        messages.append({"role": "assistant", "content": processor.decode(answer)})


def export(qwen, path, out, adapter=""):
    """Write one folder that transformers and vLLM load: merged weights as the base stores them, and every other file.

    Raises InputError where `out` holds something already; it appears whole or not at all.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: found something there, expected a new folder")
    model, source = open_model(qwen, path, dtype=None, adapter=adapter)
    refuse(hasattr(model, "Decoder"), f"latent actions in {path}", "a model that transformers and vLLM can run")
    processor = qwen.Processor.from_pretrained(source)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        qwen.save_pretrained(model, aside)
        complete(processor, source, aside)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    total = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    print(f"{out}: {total:,} parameters in {str(model.head_weight.dtype).removeprefix('torch.')}")
    if layers := qwen.lora_layers(model).values():
        print(
            f"  LoRA merged into {len(layers)} layers; {rounding(layers):.2%} of it (root mean square) lost in rounding"
        )


def rounding(layers):
    """What storing merged weights in their type costs: rms of the rounding errors / rms of what the adapters add."""
    lost = added = 0.0
    for layer in layers:
        update = layer.scale * layer.lora_B @ layer.lora_A  # (out, in)
        exact = layer.original.float() + update
        lost += (layer.weight.float() - exact).square().sum().item()
        added += update.square().sum().item()
    return (lost / added) ** 0.5 if added else 0.0


def complete(processor, source, folder):
    """Add to a saved model the files that its source lacked, and both forms of those that changed their names.

    So every version of transformers since 4.49 finds the same tokens, pixels and template.
    """
    write_json(folder / "preprocessor_config.json", pictures_to_save(processor))
    # its newer form may hold the same under `image_processor`, but versions before 4.56 fail on that key
    write_json(folder / "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
    _, template = find_template(source)
    write_json(folder / "chat_template.json", {"chat_template": template})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if not (folder / "tokenizer.json").exists():
        processor.tokenizer.save(str(folder / "tokenizer.json"))
    stops, pad = processor.stop_ids, processor.pad_id
    for name, value in (
        ("generation_config.json", {"eos_token_id": stops, "pad_token_id": pad, "do_sample": False}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ),
    ):
        if not (folder / name).exists():
            write_json(folder / name, value)


def main(qwen):
    """The command line. qwen: the module model.py, which is the program itself."""
    parser = argparse.ArgumentParser(description="Look at a Qwen2.5-VL checkpoint, talk to it, or export it.")
    what = parser.add_mutually_exclusive_group(required=True)
    path = "folder of a checkpoint or run, RUN/checkpoints/step-N, or hub id"
    what.add_argument("--describe", metavar="PATH", help=f"print sizes, parameters and memory ({path})")
    what.add_argument("--chat", metavar="PATH", help="answer the lines of standard input")
    what.add_argument("--export", metavar="PATH", help="write it as transformers and vLLM load it, adapters merged")
    parser.add_argument("--out", metavar="FOLDER", default="", help="with --export: a new folder")
    parser.add_argument("--image", metavar="FILE", help="with --chat: shown with the first question (default: none)")
    parser.add_argument(
        "--adapter", metavar="FOLDER", default="", help="LoRA in PEFT's format (default: the run's own)"
    )
    parser.add_argument("--min-pixels", type=int, default=0, help="with --chat: least area of a picture (default: own)")
    parser.add_argument(
        "--max-pixels", type=int, default=0, help="with --chat: largest area of a picture (default: own)"
    )
    parser.add_argument("--max-tokens", type=int, default=512, help="with --chat: longest answer (default: 512)")
    args = parser.parse_args()
    if args.describe:
        describe(qwen, args.describe)
    elif args.chat:
        chat(qwen, args)
    elif not args.out:
        raise InputError("--export: found no --out, expected the folder to write")
    else:
        export(qwen, args.export, args.out, args.adapter)
