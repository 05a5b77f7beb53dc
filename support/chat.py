"""What a checkpoint is and what it answers: the two commands of model.py.

python model.py --describe PATH
python model.py --chat PATH [--image FILE] [--adapter FOLDER]
"""

import argparse
import sys

import torch

from model import (
    Cache,
    Config,
    Processor,
    Qwen25VL,
    add_lora,
    load_adapter,
    load_pretrained,
    lora_parameters,
    merge_lora,
    open_image,
)
from support.files import find_folder, read_json


def describe(path):
    """Print the architecture of a checkpoint from its config alone: sizes, parameters by part, memory."""
    folder = find_folder(path)
    config = Config.from_json(read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        model = Qwen25VL(config)
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
    adapter = sum(p.numel() for p in lora_parameters(add_lora(model, 64, 128)))
    print(f"  LoRA training holds {(2 * total + 16 * adapter) / 1e9:.2f} GB and activations: the weights in bf16, and")
    print(f"  {adapter:,} adapter values (rank 64) in fp32, each with its gradient and two Adam moments")


@torch.no_grad()
def chat(path, image, adapter, max_tokens):
    """Answer the lines of standard input greedily, each answer streamed as it comes."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, processor = load_pretrained(path, device, dtype), Processor.from_pretrained(path)
    device = model.head_weight.device
    if adapter:
        merge_lora(load_adapter(model, adapter))
    shown = [{"type": "image", "image": open_image(image)}] if image else []  # with the first question
    messages = []
    for line in filter(str.strip, sys.stdin):
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": line.strip()}]})
        shown, answer, text, cache = [], [], "", Cache()
        prompt = processor.encode(messages, add_generation_prompt=True)
        pictures = [] if prompt.grid_thw is None else [prompt.pixel_values.to(device), prompt.grid_thw]
        hidden = model(prompt.input_ids[None].to(device), None, *pictures, cache=cache)  # (1, T, D)
        while len(answer) < max_tokens:
            token = model.logits(hidden[:, -1:]).argmax(-1)  # (1, 1)
            if token.item() in processor.stop_ids:
                break
            answer.append(token.item())
            if not (longer := processor.decode(answer)).endswith("\ufffd"):  # else a character is still incomplete
                print(longer[len(text) :], end="", flush=True)
                text = longer
            hidden = model(token, cache=cache)  # (1, 1, D)
        print(flush=True)
        messages.append({"role": "assistant", "content": processor.decode(answer)})


def main():
    parser = argparse.ArgumentParser(description="Look at a Qwen2.5-VL checkpoint, or talk to it.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--describe", metavar="PATH", help="print sizes, parameters and memory (folder or hub id)")
    what.add_argument("--chat", metavar="PATH", help="answer the lines of standard input (folder or hub id)")
    parser.add_argument("--image", metavar="FILE", help="with --chat: shown with the first question (default: none)")
    parser.add_argument("--adapter", metavar="FOLDER", help="with --chat: LoRA in PEFT's format (default: none)")
    parser.add_argument("--max-tokens", type=int, default=512, help="with --chat: longest answer (default: 512)")
    args = parser.parse_args()
    if args.describe:
        describe(args.describe)
    else:
        chat(args.chat, args.image, args.adapter, args.max_tokens)
