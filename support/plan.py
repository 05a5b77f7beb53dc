"""What a run needs in memory, before it is started: `python training.py plan --model 7B --stage rl --gpus 8`.

`--model all` is a table of the four sizes in the three stages (results/plan.md is one). Weights, gradients and AdamW
follow from the number of parameters; activations are counted, not guessed: one text block and the vision tower run on
the meta device, which computes nothing, and what autograd would keep is added up.
"""

import contextlib
import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import model as qwen
from data import check_file, write_text
from support.config import CommonConfig, option, parse, redefault, refuse
from support.engine import SHARE
from support.runs import described

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3, "patch_size": 14,
          "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
          "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "hidden_act": "silu"}  # fmt: skip
SIZES = {  # Qwen2.5-VL: width, layers, heads, kv heads, MLP, vocabulary, MLP of the vision tower, tied
    "3B": (2048, 36, 16, 2, 11008, 151936, 3420, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, 3420, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, 3456, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, 3456, False),
}
PHASES = {"learning": "activations and buffers", "sampling": "keys, values and whole weights"}
GB = 1e9


@dataclass
class Config:
    """options"""

    model: str = option(
        "",
        f"checkpoint folder, hub id, or one of {', '.join(SIZES)}; all: a table of these in each stage",
        required=True,
    )
    stage: str = option("rl", "cpt, sft or rl", choices=("cpt", "sft", "rl"))
    full: bool = redefault(CommonConfig, "full", True)
    lora_rank: int = redefault(CommonConfig, "lora_rank", 8)
    gpus: int = option(1, "GPUs (ranks); full tuning on several shards weights, gradients and AdamW over them", least=1)
    memory: float = option(80.0, "memory of one GPU, GB", above=0)
    prompt: int = option(4096, "tokens of the longest prompt that is learned from, pictures included", least=1)
    response: int = option(2048, "tokens of the longest response", least=1)
    patches: int = option(1024, "patches of the pictures in a prompt (four make a token)", least=0)
    micro_batch: int = redefault(CommonConfig, "micro_batch", 1)
    gradient_checkpointing: bool = redefault(CommonConfig, "gradient_checkpointing", False)
    train_vision: bool = redefault(CommonConfig, "train_vision", True)
    dtype: str = option("bfloat16", "of matrix products", choices=("float32", "bfloat16"))
    budget: int = option(
        0, "rl: tokens of prompts and responses that sampling holds at a time, a GPU; 0: what memory allows", least=0
    )
    latent: bool = option(False, "rl: latent actions of the paper's sizes: only their policy is trained")
    reference: bool = option(True, "rl: a KL term or a frozen sampler also holds the start model")
    out: str = option("", "write the plan to this file, too")


def architecture(name):
    """The model of a size or checkpoint on the meta device: no memory; of an official one, no download either."""
    official = re.fullmatch(r"(?:Qwen/Qwen2\.5-VL-)?(\d+B)(?:-Instruct)?", name)
    if official and official[1] in SIZES and not Path(name).exists():
        name = official[1]
        width, layers, heads, groups, inner, vocabulary, vision, tied = SIZES[name]
        section = [width // heads // 8, width // heads * 3 // 16, width // heads * 3 // 16]
        raw = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "model_type": "qwen2_5_vl",
            "max_position_embeddings": 128000,
            "hidden_act": "silu",
            "vision_config": {**VISION, "intermediate_size": vision, "out_hidden_size": width},
        }
    else:
        folder = described(name)
        raw = qwen.read_json(folder / "config.json")
    with torch.device("meta"):
        return qwen.Qwen25VL(qwen.Config.from_json(raw))


class FlashAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: queries, keys, values, the output and one number per query."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y


@contextlib.contextmanager
def counting(parameters):
    """Count the bytes that autograd keeps for the backward pass, each storage once, parameters not; yields [bytes]."""
    seen, total, own = set(), [0], {p.untyped_storage()._cdata for p in parameters}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)  # so that its address is not used again
            total[0] += storage.nbytes()
        return t

    alive, original = [], F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: FlashAttention.apply(q, k, v)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield total
    finally:
        F.scaled_dot_product_attention = original


def activations(model, config):
    """Bytes of a micro-batch: (kept by a text block, its input's, kept by the vision tower); changes the model."""
    dtype, text = getattr(torch, config.dtype), model.config
    rows, tokens = config.micro_batch, config.prompt + config.response
    block = model.model.layers[0].to(dtype).requires_grad_(config.full)
    if not config.full:
        for leaf in qwen.TEXT_TARGETS:
            owner = block.mlp if hasattr(block.mlp, leaf) else block.self_attn
            setattr(owner, leaf, qwen.LoRALinear(getattr(owner, leaf), config.lora_rank, 1.0, 0.0, False))
    x = torch.empty(rows, tokens, text.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    turn = torch.empty(rows, 1, tokens, text.head_dim // 2, dtype=dtype, device="meta")
    with counting(block.parameters()) as kept:
        block(x, turn, turn, None, None)
    vision = [0]
    if config.full and config.train_vision and config.patches:
        tower = model.visual.to(dtype).requires_grad_(True)
        side = max(2, round((config.patches / 4) ** 0.5)) * 2
        pixels = torch.empty(rows * side * side, tower.patch_embed.proj.weight[0].numel(), device="meta")
        with counting(tower.parameters()) as vision:
            tower(pixels, torch.tensor([[1, side, side]] * rows))
    return kept[0], x.numel() * x.element_size(), vision[0]


@functools.cache
def counted(*values):
    """What a plan counts on the meta device, once for all numbers of GPUs: (config; parameters, of them in the tower,
    in a text block, in its adapter of rank 1; activations).
    """
    config = Config(*values)
    model = architecture(config.model)
    count = lambda module: sum(p.numel() for p in module.parameters())
    layer = model.model.layers[-1].named_parameters()
    adapter = sum(sum(p.shape) for name, p in layer if p.ndim == 2 and name.split(".")[-2] in qwen.TEXT_TARGETS)
    parameters = count(model), count(model.visual), count(model.model.layers[0]), adapter
    return model.config, *parameters, *activations(model, config)


def plan(config):
    """{part: bytes} a GPU, the largest phase of a step, and what a smaller setting of each lever would give."""
    same = dict(
        stage="", gpus=1, memory=1, gradient_checkpointing=False, budget=1, latent=False, reference=False, out=""
    )
    values = dataclasses.astuple(dataclasses.replace(config, **same))
    text, total, vision, layer, adapter, block, x, tower = counted(*values)
    root = total - layer * text.num_hidden_layers - (0 if config.train_vision else vision)
    width, half = (2, 2) if config.dtype == "bfloat16" else (4, 0)
    if config.latent:
        return latent_plan(config, text, total, layer, block, x, width)
    sharded = config.full and config.gpus > 1
    ranks = config.gpus if sharded else 1
    if config.full:
        tuned = total - (0 if config.train_vision else vision)
        parts = {
            "weights (fp32)": 4 * total / ranks,
            "gradients (fp32)": 4 * tuned / ranks,
            "AdamW (two fp32 moments)": 8 * tuned / ranks,
        }
        if sharded:  # the root unit stays gathered from forward to backward; two layers are in flight
            parts["gathered units and their gradients"] = 2 * width * (root + 2 * layer)
        elif half:
            parts["bf16 copies of the weights (autocast)"] = 2 * total
    else:
        tuned = config.lora_rank * text.num_hidden_layers * adapter
        parts = {
            f"frozen weights ({'bf16' if half else 'fp32'})": width * total,
            "adapter, gradient, AdamW (fp32)": 16 * tuned,
        }
    if config.stage == "rl" and config.reference:
        parts["start model"] = width * total / ranks if config.full else 0
    layers = text.num_hidden_layers
    kept = (layers * x + block if config.gradient_checkpointing else layers * block) + tower
    tokens = config.micro_batch * (config.response if config.stage == "rl" else config.prompt + config.response)
    head = tokens * text.hidden_size * 8 + (4 * text.vocab_size * text.hidden_size if config.full else 0)
    phases = {"learning": kept + 2 * x + block / 2 + head + 2 * 4 * 2048 * text.vocab_size}
    held = 0
    if config.stage == "rl":
        whole = width * total if config.full else 0  # weights, gathered or cast once
        held, phases["sampling"] = sampling(config, text, layers, width, sum(parts.values()), whole)
    peak = sum(parts.values()) + max(phases.values())
    return {"parameters": total, "trained": tuned, "parts": parts, "phases": phases, "peak": peak, "held": held}


def sampling(config, text, layers, width, parts, whole):
    """(tokens that sampling holds at a time, as engine.fitting chooses them; bytes of their keys and values, and
    `whole`, of weights that it needs beside them). parts: bytes that are taken all the time."""
    token = 2 * text.num_key_value_heads * text.head_dim * layers * width
    free = config.memory * GB - parts - whole
    held = config.budget or max(int(SHARE * free / token), config.prompt + config.response)
    return held, token * held + whole


LATENT = {"K": 128, "inverse": 4, "merge": 2, "policy": 8}  # variants/latent, the paper's sizes


def latent_sizes(text, layer):
    """Parameters of the policy and of all other latents; layer: those of a text block."""
    D, K = text.hidden_size, LATENT["K"]
    reader = lambda blocks: blocks * layer + D + K * D  # a norm and a head above its blocks
    merge, mlp = 5 * D * text.intermediate_size, D * (D // 2) * 2 + D // 2 + D
    return reader(LATENT["policy"]), reader(LATENT["inverse"]) + K * D + LATENT["merge"] * merge + 4 * mlp


def latent_plan(config, text, total, layer, block, x, width):
    """`plan` of RL with latent actions: all but the policy is frozen, and nothing is sharded."""
    refuse(config.stage != "rl" or not config.full, "--latent with another stage or --no-full", "--stage rl, --full")
    tuned, others = latent_sizes(text, layer)
    rows = (1 if text.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size  # stay fp32
    frozen = width * (total - rows + others) + 4 * rows
    parts = {"frozen weights (matrices in the compute dtype)": frozen, "policy, gradient, AdamW (fp32)": 16 * tuned}
    parts["start model"] = frozen + width * tuned if config.reference else 0
    policy = LATENT["policy"]
    kept = policy * x + block if config.gradient_checkpointing else policy * block
    head = config.micro_batch * config.response * text.hidden_size * 8
    layers = text.num_hidden_layers + policy
    whole = width * (tuned + rows)
    held, sampled = sampling(config, text, layers, width, sum(parts.values()), whole)
    phases = {"learning": kept + 2 * x + block / 2 + head + width * tuned, "sampling": sampled}
    peak = sum(parts.values()) + max(phases.values())
    sizes = {"parameters": total + tuned + others, "trained": tuned}
    return {**sizes, "parts": parts, "phases": phases, "peak": peak, "held": held}


def advice(config, result):
    """Levers that lower the peak, most useful first, as lines of text."""
    levers = []
    learning, sampling = result["phases"]["learning"], result["phases"].get("sampling", 0)
    if config.budget and sampling >= learning:
        levers.append(f"--budget {config.budget // 2}: sampling holds fewer tokens at a time")
    if not config.gradient_checkpointing:
        levers.append("--gradient-checkpointing: keeps the inputs of blocks only, a third more time")
    if config.micro_batch > 1:
        levers.append(f"--micro-batch {config.micro_batch // 2}: the same result, smaller passes")
    if config.latent and config.reference:
        levers.append("--no-reference: a loss without KL, such as dapo")
    if config.full and not config.latent:
        levers += [
            f"--gpus {2 * config.gpus}: shards weights, gradients and AdamW further",
            "--no-train-vision: no gradients there",
            "--no-full: LoRA; no gradients and moments of the weights",
        ]
    return levers + ["shorter --max-prompt or --max-response, or smaller pictures"]


def report(config):
    """The plan as lines of text."""
    result = plan(config)
    how = "latent actions" if config.latent else "full" if config.full else f"LoRA r {config.lora_rank}"
    lines = [
        f"{config.model}, {config.stage}, {how}, {config.gpus} GPUs: "
        f"{result['parameters'] / GB:.2f} B parameters, {result['trained'] / GB:.3f} B trained; GB on each GPU"
    ]
    lines += [f"  {size / GB:8.2f}  {name}" for name, size in result["parts"].items()]
    phases = PHASES | {"sampling": f"{PHASES['sampling']}; {result['held']:,} tokens at a time"}
    lines += [f"  {size / GB:8.2f}  {name}: {phases[name]}" for name, size in result["phases"].items()]
    fits = result["peak"] / GB <= config.memory
    verdict = f"{'fits' if fits else 'does not fit'} {config.memory:g} GB"
    lines.append(f"  {result['peak'] / GB:8.2f}  peak (the phases follow one another); {verdict}")
    return "\n".join(lines if fits else [*lines, "to lower it:", *(f"  {line}" for line in advice(config, result))])


def table(config):
    """The four sizes in the paper's three stages as a Markdown table, each on the fewest GPUs that do."""
    config = dataclasses.replace(config, gradient_checkpointing=True)
    lines = [
        f"GB on each GPU with --gradient-checkpointing, --micro-batch {config.micro_batch}, prompts of {config.prompt} "
        f"tokens ({config.patches} patches), responses of {config.response}, {config.dtype}; GPUs: the fewest, in "
        f"powers of two, of {config.memory:g} GB; none: LoRA replicates the frozen weights, and sampling holds "
        "whole ones. Computed, not measured.\n",
        "| model | stage | GPUs | weights, gradients, AdamW | learning | sampling | peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        for stage, full in (("cpt", True), ("sft", False), ("rl", True), ("rl", False)):
            for gpus in (1, 2, 4, 8, 16, 32, 64, 128):
                here = dataclasses.replace(config, model=size, stage=stage, full=full, gpus=gpus)
                result = plan(here)
                if result["peak"] / GB <= config.memory or not full:
                    break
            gb = lambda size: f"{size / GB:.1f}"
            count = gpus if result["peak"] / GB <= config.memory else "none"
            phases = [gb(result["phases"][name]) if name in result["phases"] else "" for name in PHASES]
            how = "full" if full else f"LoRA r {config.lora_rank}"
            cells = [size, f"{stage}, {how}", count, gb(sum(result["parts"].values())), *phases, gb(result["peak"])]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv=None):
    config = parse(Config, __doc__, argv)
    if config.out:
        check_file(config.out, "GB on each GPU")
    text = table(config) if config.model == "all" else report(config)
    print(text)
    if config.out:
        write_text(config.out, text + "\n")
