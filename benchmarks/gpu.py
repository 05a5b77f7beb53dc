"""The first thing to run on a CUDA machine: is all of it right there, and how near to the limits? In eight minutes.

    python -m benchmarks.gpu [--only PART ...] [--peers FOLDER] [--out FOLDER] [--tiny]

Nothing is installed: it runs with the python at hand, and with what lies as wheels in --peers (liger-kernel,
cut-cross-entropy), if anything does. Parts run one after the other in a process that is killed, and started again for
the rest, when one takes longer than its limit; gpu.json and gpu.md in --out are written anew after every row. At the
end the rows of benchmarks/README.md and the kernel's BLOCKS are written, to be looked at and committed: in place, or
into --out where it is given, as on a machine from which one folder comes back. Weights are random and made on the GPU,
inputs of the loss are planted (benchmarks/logprob.py). --tiny runs the same parts on a CPU at toy sizes, in a minute,
into a temporary folder: its numbers mean nothing, but each line of this file has been run.
"""

import argparse
import atexit
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import model as qwen
from benchmarks.logprob import RIVALS, machine, planted, step
from data import check_file, command, write_text

ROOT = Path(__file__).resolve().parent.parent
FULL = SimpleNamespace(
    device="cuda",
    seconds=0.3,  # that a timing may take
    copy=4 << 30,  # bytes
    square=8192,
    rows=(128, 512, 1152, 2304),
    head=(3584, 152064),
    blocks=((512, 2), (1024, 4), (2048, 8), (4096, 16), (8192, 16)),
    loss=[(N, D, V) for D, V in ((3584, 152064), (2048, 151936)) for N in (8192, 2048, 32768)] + [(8192, 4096, 151936)],
    lengths=(1000, 1001, 4000),
    heads=(28, 4, 128),
    model="7B",
    decode=[(rows, prefix) for prefix in (0, 4000) for rows in (64, 256, 512)],
    prompt=500,
    tokens=36,
    learn=(4, 1000),
    repeats=50,
)
TINY = SimpleNamespace(
    device="cpu",
    seconds=0.01,
    copy=1 << 20,
    square=64,
    rows=(16,),
    head=(32, 1000),
    blocks=((512, 1),),
    loss=[(32, 16, 500)],
    lengths=(20, 21),
    heads=(4, 2, 16),
    model="tiny",
    decode=[(4, 0), (8, 20)],
    prompt=12,
    tokens=10,
    learn=(2, 24),
    repeats=3,
)
WARM = 6  # steps of decoding that are not timed: a few plain ones, and the one that records a graph
MINUTES = 8  # for all parts; what comes after is not begun
PEAK = 989e12  # dense bf16 operations a second that an H100 or H200 is sold with, for the MFU


def milliseconds(function, size):
    """Best of the runs that fit in size.seconds, after one that compiles."""
    wait = torch.cuda.synchronize if size.device == "cuda" else lambda: None
    function()
    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < size.seconds:
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def attempt(row, measure):
    """The row with what measure() finds, or why it found nothing: what one case lacks must not cost the others."""
    try:
        return {**row, **measure()}
    except Exception as error:  # a peer that is not there, or memory that is not
        return {**row, "not run": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}


def peak_gb(size):
    return torch.cuda.max_memory_allocated() / 1e9 if size.device == "cuda" else 0.0


def half(size):
    return torch.bfloat16 if size.device == "cuda" else torch.float32


# -- the parts: each yields its rows -----------------------------------------------------------------------------------


def ceilings(size):
    """What this card does at best: a copy, a product."""
    x = torch.empty(size.copy, dtype=torch.uint8, device=size.device)
    ms = milliseconds(lambda: x.clone(), size)
    yield {"": "copy", "TB/s": 2 * size.copy / ms / 1e9}
    a = torch.randn(size.square, size.square, device=size.device, dtype=half(size))
    yield {"": f"product {size.square}^3", "TFLOP/s": 2 * size.square**3 / milliseconds(lambda: a @ a, size) / 1e9}


def trainer(folder):
    """A tiny model and data in a folder -> train(script, name, **flags), which gives the metrics of two steps."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import tiny_checkpoint
    from small import arguments, metrics, quiet, small_data

    tiny_checkpoint(folder / "model", layers=2)
    small_data(folder / "data")

    def train(script, name, **flags):
        argv = arguments(folder / "model", folder / "data", folder / name, steps=2, dtype="float32", **flags)
        code, errors = quiet(script.main, argv)
        assert code == 0, errors
        return metrics(folder / name)

    return train


def difference(ours, theirs):
    """How many numbers two runs told, and the largest relative difference."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs) for key in a if isinstance(a[key], float)]
    return {"numbers": len(pairs), "largest difference": max(abs(a - b) / max(abs(a), 1e-3) for a, b in pairs)}


def parity(size):
    """A tiny model in fp32, here and on the CPU: greedy and drawn tokens, two SFT and two RL steps."""
    import train_rl
    import train_sft
    from support.engine import sample

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train = trainer(folder)
        from helpers import question

        processor = qwen.Processor.from_pretrained(folder / "model")
        prompts = [processor.encode(question(f"{i} what?"), add_generation_prompt=True) for i in range(4)]
        models = [qwen.load_pretrained(folder / "model", device).eval() for device in ("cpu", size.device)]

        def compare(how):
            ours, here = (sample(m, prompts, 2, max_tokens=16, shared=[5] * 4, **how) for m in models)
            pairs = [(a, b) for x, y in zip(ours, here) for a, b in zip(x, y)]
            off = max(abs(u - v) for a, b in pairs for u, v in zip(a.logprobs, b.logprobs))
            return {
                "equal": f"{sum(a.tokens == b.tokens for a, b in pairs)} of {len(pairs)}",
                "largest difference": off,
            }

        for name, how in ("greedy", dict(temperature=0)), ("drawn", {}), ("replayed", {}):
            models[1].compiled = name == "replayed"  # a step of decoding as a CUDA graph
            yield attempt({"": f"{name} responses"}, lambda: compare(how))
        for stage, script, more in ("SFT", train_sft, {}), ("RL", train_rl, dict(max_response=8)):
            run = lambda device: train(script, f"{stage}-{device}", device=device, overwrite=True, **more)
            yield attempt({"": f"two {stage} steps"}, lambda: difference(run("cpu"), run(size.device)))


def kernels(size):
    """The same bits from every one of many sweeps, as a race would not give; then the kernels' own tests, compiled."""
    if size.device == "cuda":
        from kernels import logprob_triton

        V = size.head[1]
        logits, y = 3 * torch.randn(1152, V, device="cuda"), torch.randint(V, (1152,), device="cuda")
        for name, sweep in (
            ("one sweep", lambda x: logprob_triton.sweep_rows_once(x, y, 1.0, torch.bfloat16, True)),
            ("two sweeps", lambda x: logprob_triton.sweep_rows(x, y, 1.0, torch.bfloat16, True, True)),
        ):
            first = sweep(logits.clone())
            equal = [all(map(torch.equal, first, sweep(logits.clone()))) for _ in range(size.repeats)]
            yield {"": name, "found": f"{sum(equal)} of {size.repeats} bit-equal"}
    leave = "not interpreted and not wrong_versions and not fsdp and not compile"
    for name in ("decode", "advantage", "logprob") if size.device == "cuda" else ("advantage",):
        run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/test_{name}.py", "-k", leave]
        done = subprocess.run(run, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = done.stdout.strip().splitlines() or [""]
        failed = " ".join(line.split("::")[-1] for line in lines if line.startswith(("FAILED", "ERROR")))
        yield {"": f"tests of {name}", "found": f"exit code {done.returncode}, {lines[-1].strip('= ')} {failed}"[:500]}


def products(size):
    """Both products of the loss by rows of a chunk, and the sweeps by block; the best is BLOCKS' from then on."""
    D, V = size.head
    W = torch.randn(V, D, device=size.device, dtype=half(size))
    wide = dict(out_dtype=torch.float32) if size.device == "cuda" else {}
    for rows in size.rows:
        h = torch.randn(rows, D, device=size.device, dtype=half(size))
        d = (h @ W.T).softmax(1)
        cases = {"h W', fp32": lambda: torch.mm(h, W.T, **wide), "h W', bf16": lambda: h @ W.T}
        cases |= {"d W, fp32": lambda: torch.mm(d, W, **wide), "d W, bf16": lambda: d @ W}
        yield attempt({"": f"{rows} rows"}, lambda: {name: milliseconds(case, size) for name, case in cases.items()})
    if size.device != "cuda":
        return
    from kernels import logprob_triton

    card = torch.cuda.get_device_name()
    logits, y = 3 * torch.randn(1152, V, device="cuda"), torch.randint(V, (1152,), device="cuda")
    found = {}
    for block, warps in size.blocks:
        logprob_triton.BLOCKS[card] = (block, warps)
        cases = {
            "one sweep": lambda: logprob_triton.sweep_rows_once(logits, y, 1.0, torch.bfloat16, True),
            "two sweeps": lambda: logprob_triton.sweep_rows(logits, y, 1.0, torch.bfloat16, True, True),
            "sums alone": lambda: logprob_triton.sweep_rows(logits, y, 1.0, torch.bfloat16, True, False),
        }
        times = lambda: {name: milliseconds(case, size) for name, case in cases.items()}
        row = attempt({"": f"block {block} x {warps} warps"}, times)
        found[block, warps] = row.get("one sweep", float("inf"))
        yield row
    logprob_triton.BLOCKS[card] = min(found, key=found.get)
    yield {"": "best for one sweep", "card": card, "block": logprob_triton.BLOCKS[card]}


def bare_products(h, W, size):
    """{"forward ms": of h W^T into fp32, chunk by chunk, "ms": of that with the product of a direction and W}."""
    from kernels.logprob import default_chunk

    chunk, wide = default_chunk(h), dict(out_dtype=torch.float32) if size.device == "cuda" else {}
    direction = torch.softmax(h[:chunk] @ W.T, 1)  # as the real one: how long a product takes depends on the data

    def products(both):
        for rows in h.split(chunk):
            torch.mm(rows, W.T, **wide)
            if both:
                torch.mm(direction[: len(rows)], W, **wide)

    return {name: milliseconds(lambda: products(both), size) for name, both in (("forward ms", False), ("ms", True))}


def loss(size):
    """linear_logprob, frozen and trainable head, beside the bare products and the peers; ratios to the products."""
    for N, D, V in size.loss:
        h, W, y = planted(N, D, V, half(size), size.device)
        shape = f"{N} x {D} x {V}"
        bare = attempt({"": shape, "loss": "bare products"}, lambda: bare_products(h, W, size))
        yield bare
        h.requires_grad_()
        for name, trainable in [(name, False) for name in RIVALS] + [("ours", True), ("Liger scaled CE", True)]:
            W.requires_grad_(trainable)

            def measure():
                row = {"forward ms": milliseconds(lambda: step(RIVALS[name], h, W, y, False), size)}
                row["ms"] = milliseconds(lambda: step(RIVALS[name], h, W, y, True), size)
                row["of the products"] = row["ms"] / bare.get("ms", float("nan"))
                if size.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    step(RIVALS[name], h, W, y, True)
                    row["peak GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
                return row

            yield attempt({"": shape, "loss": f"{name}{', trainable head' * trainable}"}, measure)
            h.grad = W.grad = None


def attention(size):
    """First and second call at new lengths, with cuDNN's plans and without, and which kernel torch chooses."""
    (H, J, C), attend, chosen = size.heads, F.scaled_dot_product_attention, []

    def told(*args, **kwargs):
        chosen.append(SDPBackend(torch._fused_sdp_choice(*args, **kwargs)).name)
        return attend(*args, **kwargs)

    for cudnn in (True, False) if size.device == "cuda" else (False,):
        for T in size.lengths:
            q, k, v = (torch.randn(2, n, T, C, device=size.device, dtype=half(size)) for n in (H, J, J))
            mask = torch.ones(T, T, dtype=torch.bool, device=size.device).tril()[None, None]
            for name, given in ("causal", None), ("mask", mask):

                def call():
                    start = time.perf_counter()
                    qwen.attend(q, k, v, given)
                    if size.device == "cuda":
                        torch.cuda.synchronize()
                    return 1e3 * (time.perf_counter() - start)

                def measure():
                    torch.backends.cuda.enable_cudnn_sdp(cudnn)
                    try:
                        row = {"first ms": call(), "second ms": call()}
                        with mock.patch.object(F, "scaled_dot_product_attention", told):
                            call()
                        return {**row, "kernel": chosen[-1]}
                    finally:
                        torch.backends.cuda.enable_cudnn_sdp(False)

                yield attempt({"": f"{name}, {T} tokens, cuDNN {'on' if cudnn else 'off'}"}, measure)


def random_model(size):
    """The size's model with random weights, made where it is needed."""
    if size.model == "tiny":
        sys.path.insert(0, str(ROOT / "tests"))
        from helpers import tiny_config

        with torch.device("meta"):
            model = qwen.Qwen25VL(qwen.Config.from_json(tiny_config(tied=False)))
    else:
        from support.plan import architecture

        model = architecture(size.model)
    model = model.to(half(size)).to_empty(device=size.device).requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(float("norm" in name or "ln_q" in name))
    return model


def decode(size):
    """Steps of decoding: milliseconds beside what reading weights, keys and values takes, and the host's share."""
    from support.engine import Decoder, sample

    model = random_model(size).eval()
    config = model.config
    V, generator = config.vocab_size, torch.Generator().manual_seed(0)
    words = lambda n: torch.randint(10, min(V, 100_000) - 30, (n,), generator=generator)
    weights = sum(p.nbytes for p in model.model.layers.parameters()) + model.head_weight.nbytes
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * half(size).itemsize
    waited, stamps, tolist, step = [0.0], [], torch.Tensor.tolist, Decoder.step  # stamps: after each step

    def timed(self):
        start = time.perf_counter()
        values = tolist(self)
        waited[0] += time.perf_counter() - start
        return values

    def stamped(self, *args):
        step(self, *args)
        stamps.append((time.perf_counter(), waited[0]))

    cases = [(*case, False) for case in size.decode] + [(*size.decode[0], True)]
    for rows, prefix, model.compiled in cases:
        policy = words(prefix)
        prompts = [qwen.Encoded(torch.cat([policy, words(size.prompt)]), None, None) for _ in range(rows // 4)]
        held, budget = {}, prefix + rows // 4 * size.prompt + rows * size.tokens  # all rows at once

        def write(tokens):
            how = dict(shared=[prefix] * len(prompts), prefixes=held, budget=budget)
            sample(model, prompts, 4, max_tokens=tokens, min_tokens=tokens, stop_ids=[2], **how)

        def measure():
            write(2)  # compiles, and reads the policy
            if size.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            stamps.clear()
            with mock.patch.object(torch.Tensor, "tolist", timed), mock.patch.object(Decoder, "step", stamped):
                write(size.tokens)
            (began, idle), *between, (ended, idled) = stamps[WARM:-1]  # the last one ends responses
            seconds, idle = (ended - began) / (len(between) + 1), (idled - idle) / (len(between) + 1)
            moved = weights + per_token * (rows * size.tokens / 2 + rows // 4 * size.prompt + prefix)
            return {
                "ms a step": 1e3 * seconds,
                "tokens/s": rows / seconds,
                "GB moved": moved / 1e9,
                "TB/s": moved / seconds / 1e12,
                "host ms a step": 1e3 * (seconds - idle),
                "peak GB": peak_gb(size),
            }

        yield attempt({"": f"{rows} rows, policy of {prefix}{', replayed' * model.compiled}"}, measure)
    ids = torch.stack([words(size.prompt) for _ in range(size.decode[0][0] // 4)])
    yield attempt({"": f"{4 * len(ids)} rows, transformers' generate"}, lambda: generate(model.config.raw, size, ids))


def generate(raw, size, ids):
    """What transformers' generate takes, on a model of the same config.json: four responses to each of ids (P, T)."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    with torch.device(size.device):
        theirs = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig.from_dict(raw), dtype=half(size)).eval()
        ids = ids.to(size.device)
    how = dict(do_sample=True, top_k=0, num_return_sequences=4, eos_token_id=2, pad_token_id=2)

    def write(tokens):
        start = time.perf_counter()
        theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, **how
        ).tolist()
        return time.perf_counter() - start

    write(2)
    short = write(2)
    seconds = (write(size.tokens) - short) / (size.tokens - 2)
    return {"ms a step": 1e3 * seconds, "tokens/s": 4 * len(ids) / seconds, "peak GB": peak_gb(size)}


def learn(size):
    """A learn step of LoRA at rank 8: tokens a second and the MFU, rows one by one and packed, then compiled."""
    from support.batching import collate, pack, token_logprobs
    from training import compile_blocks

    model = random_model(size)
    blocks, head = sum(p.numel() for p in model.model.layers.parameters()), model.head_weight.numel()
    qwen.add_lora(model, 8, 16.0)
    rows, T = size.learn
    words = lambda n: torch.randint(10, min(model.config.vocab_size, 100_000) - 30, (n,))
    prompts = [qwen.Encoded(words(T // 2), None, None) for _ in range(rows)]
    answers = [[words(T // 8) for _ in range(4)] for _ in range(rows)]
    whole = [(prompt, torch.cat(group)) for prompt, group in zip(prompts, answers)]
    batches = {"one by one": collate(*zip(*whole), pad_id=0), "packed": pack(model, prompts, answers, 0)}
    for name in *batches, "compiled":
        batch = batches.get(name, batches["one by one"]).to(size.device)

        def update():
            with torch.autocast(size.device, half(size), enabled=size.device == "cuda"):
                logp, _ = token_logprobs(model, batch)
            logp.sum().backward()

        def measure():
            if name == "compiled":
                compile_blocks(model, "inductor" if size.device == "cuda" else "eager")
            if size.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ms, tokens = milliseconds(update, size), int(batch.attention_mask.sum())
            # two products each, forward and for the gradient of what came in: frozen weights need none of their own
            flops = 4 * (blocks * tokens + head * len(batch.index))
            return {"ms": ms, "tokens/s": 1e3 * tokens / ms, "MFU": flops / ms * 1e3 / PEAK, "peak GB": peak_gb(size)}

        yield attempt({"": name}, measure)


def fsdp(size):
    """FSDP2 with one rank beside none of it: two SFT and two RL steps; and a run that has lost the second one."""
    import train_rl
    import train_sft

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train = trainer(folder)
        for stage, script, more in ("SFT", train_sft, {}), ("RL", train_rl, dict(max_response=8)):
            flags = dict(device=size.device, full=True, save_every=1, **more)
            run = lambda how, **again: train(script, f"{stage}-{how}", fsdp=how, **flags, **again)
            yield attempt({"": f"two {stage} steps"}, lambda: difference(run("off"), run("on")))

            def resumed():
                out = folder / f"{stage}-on"
                before = qwen.load_pretrained(out / "model").state_dict()
                for lost in out / "model", out / "checkpoints" / "step-00000002":
                    shutil.rmtree(lost)
                rows = run("on", resume=True)
                after = qwen.load_pretrained(out / "model").state_dict()
                return {
                    "numbers": len(rows),
                    "largest difference": max(float((before[name] - after[name]).abs().max()) for name in before),
                }

            yield attempt({"": f"the second {stage} step after --resume, weights"}, resumed)


PARTS = {  # seconds that each may take, imports included
    "ceilings": (ceilings, 20),
    "parity": (parity, 60),
    "kernels": (kernels, 90),
    "products": (products, 40),
    "loss": (loss, 110),
    "attention": (attention, 30),
    "decode": (decode, 100),
    "learn": (learn, 70),
    "fsdp": (fsdp, 40),
}


# -- results, and the process that makes them --------------------------------------------------------------------------


class Results:
    """{"machine", "rows": {part: [row]}, "running": [part, since when]} as gpu.json, the same as tables in gpu.md."""

    def __init__(self, out):
        self.path = Path(out) / "gpu.json"
        self.all = json.loads(self.path.read_text()) if self.path.exists() else {"rows": {}}

    def write(self, **changes):
        self.all |= changes
        for path, text in (
            (self.path, json.dumps(self.all, indent=1) + "\n"),
            (self.path.with_suffix(".md"), self.text()),
        ):
            write_text(path, text)

    def add(self, part, row):
        self.all["rows"].setdefault(part, []).append(row)
        self.write()

    def text(self):
        machine = ", ".join(f"{key} {value}" for key, value in self.all.get("machine", {}).items())
        lines = ["# On a GPU", "", f"`python -m benchmarks.gpu`: {machine}"]
        for part, rows in self.all["rows"].items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"## {part}", "", f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]
            for row in rows:
                cells = [row.get(column, "") for column in columns]
                cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "/") for cell in cells]
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


README, KERNEL = Path("benchmarks", "README.md"), Path("kernels", "logprob_triton.py")
HEADLINES = [  # part, the row's name, column, what it is, goal
    ("parity", "greedy responses", "equal", "greedy responses that are the CPU's", "all"),
    ("parity", "replayed responses", "equal", "the same, drawn from a CUDA graph", "all"),
    ("kernels", "one sweep", "found", "sweeps of the loss, from the same bits", "all"),
    (
        "loss",
        "{N} x {D} x {V}",
        "of the products",
        "fused loss, frozen head: time over that of two bare products",
        "1.20",
    ),
    ("decode", "{rows} rows, policy of {prefix}", "ms a step", "ms a step of decoding", "2x the limit, 10.4"),
    ("decode", "{rows} rows, policy of {prefix}, replayed", "ms a step", "the same, replayed", "2x the limit, 10.4"),
    ("decode", "{rows} rows, transformers' generate", "ms a step", "the same, transformers' generate", ""),
    ("learn", "packed", "MFU", "MFU of a LoRA step, packed rows", "0.40"),
]


def publish(results, size, root):
    """Write the headlines into benchmarks/README.md and the best block into the kernel's BLOCKS, in the tree `root`."""
    (N, D, V), (rows, prefix), lines = (
        size.loss[0],
        size.decode[0],
        ["| on a GPU | measured | goal |", "|---" * 3 + "|"],
    )
    for part, name, column, what, goal in HEADLINES:
        name = name.format(N=N, D=D, V=V, rows=rows, prefix=prefix)
        found = [r for r in results.get("rows", {}).get(part, []) if r[""] == name and r.get("loss", "ours") == "ours"]
        value = found[-1].get(column, found[-1].get("not run", "")) if found else "**not run**"
        lines.append(f"| {what} ({name}) | {f'{value:.3g}' if isinstance(value, float) else value} | {goal} |")
    made = ", ".join(f"{key} {value}" for key, value in results.get("machine", {}).items())
    text = (ROOT / README).read_text()
    new = "\n".join(["<!-- gpu -->", *lines, "", f"`make gpu`: {made}.", "<!-- end of gpu -->"])
    for name in (README, KERNEL):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    write_text(root / README, re.sub(r"<!-- gpu -->.*<!-- end of gpu -->", lambda _: new, text, flags=re.S))
    for row in results.get("rows", {}).get("products", []):
        if "card" in row:
            source, entry = (ROOT / KERNEL).read_text(), f'"{row["card"]}": ({", ".join(map(str, row["block"]))})'
            others = re.sub(rf'(^BLOCKS = {{.*?)"{re.escape(row["card"])}": \([^)]*\),? ?', r"\1", source, flags=re.M)
            write_text(root / KERNEL, re.sub(r"^BLOCKS = {", lambda _: f"BLOCKS = {{{entry}, ", others, flags=re.M))


def run(parts, size, out):
    """The parts in this process; a part that fails leaves a row that says why."""
    results = Results(out)
    for part in parts:
        results.all["rows"].pop(part, None)
        results.write(running=[part, time.time()])
        try:
            for row in PARTS[part][0](size):
                results.add(part, row)
                print(part, row, flush=True)
        except Exception as error:
            results.add(part, {"": f"failed: {type(error).__name__}: {' '.join(str(error).split())[-300:]}"})
            print(part, results.all["rows"][part][-1], flush=True)
        gc.collect()
        if size.device == "cuda":  # where a fault has broken the context this raises: another process does the rest
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
    results.write(running=None)


def begin(words):
    """A process at the head of a group: what it has started ends with it."""
    return subprocess.Popen(words, cwd=ROOT, preexec_fn=os.setpgrp)


def supervise(start, parts, limits, out, seconds=60 * MINUTES):
    """start(parts) -> a process that runs them, see `begin`; past a part's limit it is ended, and started anew for the
    rest, as long as there are seconds left.
    """
    parts, end = list(parts), time.time() + seconds
    while parts and time.time() < end:
        process, part, since = start(parts), parts[0], time.time()
        try:
            while process.poll() is None and time.time() < min(since + limits[part], end):
                time.sleep(0.2)
                part, since = Results(out).all.get("running") or (part, since)
        finally:
            late = process.poll() is None
            if late:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            return
        results = Results(out)
        results.add(part, {"": f"stopped after {time.time() - since:.0f} s" if late else "the process died"})
        results.write(running=None)
        parts = parts[parts.index(part) + 1 :]
    results = Results(out)
    for part in parts:
        results.all["rows"][part] = []
        results.add(part, {"": f"not begun: {seconds} s were over"})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--peers", help="folder of wheels of the peers (default: what is installed)")
    parser.add_argument(
        "--out", help="where gpu.json and gpu.md go (default: benchmarks/results; --tiny: a new folder)"
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process that is watched
    args = parser.parse_args(argv)
    root = ROOT if args.out is None and not args.tiny else Path(args.out or tempfile.mkdtemp())
    args.out = args.out or str(root if args.tiny else ROOT / "benchmarks" / "results")
    check_file(Path(args.out) / "gpu.json", '"rows"')
    check_file(Path(args.out) / "gpu.md", "benchmarks.gpu")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    size = TINY if args.tiny else FULL
    if not args.here:
        if args.peers:
            folder = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, folder)
            for wheel in Path(args.peers).glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(folder)
            sys.path.append(folder)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        Results(args.out).write(machine=machine(), running=None)
    if args.here or args.tiny:
        run(args.only, size, args.out)
    else:
        again = [sys.executable, "-m", "benchmarks.gpu", "--here", "--out", args.out]
        start = lambda parts: begin([*again, "--only", *parts])
        supervise(start, args.only, {part: limit for part, (_, limit) in PARTS.items()}, args.out)
    if not args.here:
        publish(Results(args.out).all, size, root)
        print(f"{args.out}/gpu.md", flush=True)


if __name__ == "__main__":
    command(main)
