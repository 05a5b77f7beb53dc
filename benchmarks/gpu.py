"""The first thing to run on a CUDA machine: is all of it right there, and how near to the limits? In eight minutes.

    python -m benchmarks.gpu [--only PART ...] [--peers FOLDER] [--out FOLDER] [--tiny]

Nothing is installed: it runs with the python at hand, and with what lies as wheels in --peers (liger-kernel,
cut-cross-entropy), if anything does. Parts run one after the other in a process that is killed, and started again for
the rest, when one takes longer than its limit; gpu.json and gpu.md in --out are written anew after every row. At the
end the rows of benchmarks/README.md and the kernel's BLOCKS are written, to be looked at and committed. Weights are
random and made on the GPU, inputs of the loss are planted (benchmarks/logprob.py). --tiny runs the same parts on a CPU
at toy sizes, in a minute, into a temporary folder: its numbers mean nothing, but each line of this file has been run.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

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
    tokens=24,
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
    tokens=4,
    learn=(2, 24),
    repeats=3,
)
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


def parity(size):
    """A tiny model in fp32, here and on the CPU: greedy and drawn tokens, two SFT and two RL steps."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import question, tiny_checkpoint
    from small import arguments, metrics, quiet, small_data

    import train_rl
    import train_sft
    from support.engine import sample

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tiny_checkpoint(folder / "model", layers=2)
        small_data(folder / "data")
        processor = qwen.Processor.from_pretrained(folder / "model")
        prompts = [processor.encode(question(f"{i} what?"), add_generation_prompt=True) for i in range(4)]
        models = [qwen.load_pretrained(folder / "model", device).eval() for device in ("cpu", size.device)]
        for name, how in ("greedy", dict(temperature=0)), ("drawn", {}), ("replayed", {}):
            models[1].compiled = name == "replayed"  # a step of decoding as a CUDA graph
            ours, here = (sample(m, prompts, 2, max_tokens=16, shared=[5] * 4, **how) for m in models)
            pairs = [(a, b) for x, y in zip(ours, here) for a, b in zip(x, y)]
            off = max(abs(u - v) for a, b in pairs for u, v in zip(a.logprobs, b.logprobs))
            same = sum(a.tokens == b.tokens for a, b in pairs)
            yield {"": f"{name} responses", "equal": f"{same} of {len(pairs)}", "largest difference": off}
        for stage, script, more in ("SFT", train_sft, {}), ("RL", train_rl, dict(max_response=8)):
            rows = []
            for name, device in ("cpu", "cpu"), ("here", size.device):
                out = folder / f"{stage}-{name}"
                flags = dict(steps=2, dtype="float32", device=device, **more)
                code, errors = quiet(script.main, arguments(folder / "model", folder / "data", out, **flags))
                assert code == 0, errors
                rows.append(metrics(out))
            numbers = [(a[key], b[key]) for a, b in zip(*rows) for key in a if isinstance(a[key], float)]
            off = max(abs(a - b) / max(abs(a), 1e-3) for a, b in numbers)
            yield {"": f"two {stage} steps, {len(numbers)} metrics", "largest difference": off}


def kernels(size):
    """The kernels' own tests, compiled; and the same bits from every one of many sweeps, as a race would not give."""
    from kernels import logprob_triton

    files = [f"tests/test_{name}.py" for name in ("logprob", "advantage", "decode")]
    files = files if size.device == "cuda" else files[1:2]
    leave = "not interpreted and not wrong_versions and not fsdp and not compile"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", leave]
    done = subprocess.run(run, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    failed = " ".join(line.split("::")[-1] for line in done.stdout.splitlines() if line.startswith("FAILED"))
    yield {"": "tests", "found": f"exit code {done.returncode} {failed}"}
    if size.device == "cuda":
        D, V = size.head
        logits, y = 3 * torch.randn(1152, V, device="cuda"), torch.randint(V, (1152,), device="cuda")
        for name, sweep in (
            ("one sweep", lambda x: logprob_triton.sweep_rows_once(x, y, 1.0, torch.bfloat16, True)),
            ("two sweeps", lambda x: logprob_triton.sweep_rows(x, y, 1.0, torch.bfloat16, True, True)),
        ):
            first = sweep(logits.clone())
            equal = [all(map(torch.equal, first, sweep(logits.clone()))) for _ in range(size.repeats)]
            yield {"": name, "found": f"{sum(equal)} of {size.repeats} bit-equal"}


def products(size):
    """Both products of the loss by rows of a chunk, and the sweeps by block; the line for BLOCKS."""
    D, V = size.head
    W = torch.randn(V, D, device=size.device, dtype=half(size))
    wide = dict(out_dtype=torch.float32) if size.device == "cuda" else {}
    for rows in size.rows:
        h = torch.randn(rows, D, device=size.device, dtype=half(size))
        d = (h @ W.T).softmax(1)
        cases = {"h W', fp32": lambda: torch.mm(h, W.T, **wide), "h W', bf16": lambda: h @ W.T}
        cases |= {"d W, fp32": lambda: torch.mm(d, W, **wide), "d W, bf16": lambda: d @ W}
        yield {"": f"{rows} rows", **{name: milliseconds(case, size) for name, case in cases.items()}}
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
        times = {name: milliseconds(case, size) for name, case in cases.items()}
        found[block, warps] = times["one sweep"]
        yield {"": f"block {block} x {warps} warps", **times}
    yield {"": "best for one sweep", "card": card, "block": min(found, key=found.get)}


def bare_products(h, W, size):
    """Milliseconds of h W^T into fp32, chunk by chunk, and of that with the product of a direction and W."""
    from kernels.logprob import default_chunk

    chunk, wide = default_chunk(h), dict(out_dtype=torch.float32) if size.device == "cuda" else {}
    direction = torch.softmax(h[:chunk] @ W.T, 1)  # as the real one: how long a product takes depends on the data

    def products(both):
        for rows in h.split(chunk):
            torch.mm(rows, W.T, **wide)
            if both:
                torch.mm(direction[: len(rows)], W, **wide)

    return [milliseconds(lambda: products(both), size) for both in (False, True)]


def loss(size):
    """linear_logprob, frozen and trainable head, beside the bare products and the peers; ratios to the products."""
    for N, D, V in size.loss:
        h, W, y = planted(N, D, V, half(size), size.device)
        forward, whole = bare_products(h, W, size)
        shape = f"{N} x {D} x {V}"
        yield {"": shape, "loss": "bare products", "forward ms": forward, "ms": whole}
        h.requires_grad_()
        for name, trainable in [(name, False) for name in RIVALS] + [("ours", True), ("Liger scaled CE", True)]:
            row = {"": shape, "loss": f"{name}, trainable head" if trainable else name}
            W.requires_grad_(trainable)
            try:
                row["forward ms"] = milliseconds(lambda: step(RIVALS[name], h, W, y, False), size)
                row["ms"] = milliseconds(lambda: step(RIVALS[name], h, W, y, True), size)
                row["of the products"] = row["ms"] / whole
                if size.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    step(RIVALS[name], h, W, y, True)
                    row["peak GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
            except Exception as error:  # a peer that is not there, or does not take this: its row says why
                row["not run"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
                h.grad = W.grad = None
            yield row


def attention(size):
    """First and second call at new lengths, with cuDNN's plans and without."""
    H, J, C = size.heads
    for cudnn in (True, False) if size.device == "cuda" else (False,):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
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

                first, second = call(), call()
                row = {"": f"{name}, {T} tokens, cuDNN {'on' if cudnn else 'off'}", "first ms": first}
                yield {**row, "second ms": second}
    torch.backends.cuda.enable_cudnn_sdp(False)


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
    from support.engine import sample

    model = random_model(size).eval()
    config = model.config
    V, generator = config.vocab_size, torch.Generator().manual_seed(0)
    words = lambda n: torch.randint(10, min(V, 100_000) - 30, (n,), generator=generator)
    weights = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("visual"))
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * half(size).itemsize
    waited, tolist = [0.0], torch.Tensor.tolist

    def timed(self):
        start = time.perf_counter()
        values = tolist(self)
        waited[0] += time.perf_counter() - start
        return values

    cases = [(*case, False) for case in size.decode] + [(*size.decode[0], True)]
    for rows, prefix, model.compiled in cases:
        policy = words(prefix)
        prompts = [qwen.Encoded(torch.cat([policy, words(size.prompt)]), None, None) for _ in range(rows // 4)]
        held = {}

        def write(tokens):
            how = dict(shared=[prefix] * len(prompts), prefixes=held, budget=10**8)
            start = time.perf_counter()
            sample(model, prompts, 4, max_tokens=tokens, min_tokens=tokens, stop_ids=[2], **how)
            return time.perf_counter() - start

        write(2)  # compiles, and reads the policy
        if size.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        short = write(2)
        torch.Tensor.tolist, waited[0] = timed, 0.0
        try:
            seconds = (write(size.tokens) - short) / (size.tokens - 2)
        finally:
            torch.Tensor.tolist = tolist
        moved = weights + per_token * (rows * size.tokens / 2 + rows // 4 * size.prompt + prefix)
        yield {
            "": f"{rows} rows, policy of {prefix}{', replayed' * model.compiled}",
            "ms a step": 1e3 * seconds,
            "tokens/s": rows / seconds,
            "GB moved": moved / 1e9,
            "TB/s": moved / seconds / 1e12,
            "host ms a step": 1e3 * (seconds - waited[0] / size.tokens),
            "peak GB": peak_gb(size),
        }
    yield generate(model, size, torch.stack([words(size.prompt) for _ in range(size.decode[0][0] // 4)]))


def generate(model, size, ids):
    """The row of transformers' generate on a model of the same sizes: four responses to each prompt, ids (P, T)."""
    row = {"": f"{4 * len(ids)} rows, transformers' generate"}
    try:
        from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

        with torch.device(size.device):
            theirs = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig.from_dict(model.config.raw))
        theirs, ids = theirs.to(half(size)).eval(), ids.to(size.device)
        how = dict(do_sample=True, top_k=0, num_return_sequences=4, eos_token_id=2, pad_token_id=2)

        def write(tokens):
            start = time.perf_counter()
            theirs.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, **how
            )
            return time.perf_counter() - start

        write(2)
        short = write(2)
        seconds = (write(size.tokens) - short) / (size.tokens - 2)
        return {**row, "ms a step": 1e3 * seconds, "tokens/s": 4 * len(ids) / seconds, "peak GB": peak_gb(size)}
    except Exception as error:  # not installed, or it does not take this config
        return {**row, "not run": f"{type(error).__name__}: {str(error)[:100]}"}


def learn(size):
    """A learn step of LoRA at rank 8: tokens a second and the MFU, rows one by one and packed, then compiled."""
    from support.batching import collate, pack, token_logprobs
    from training import compile_blocks

    model = random_model(size)
    parameters = sum(p.numel() for p in model.parameters())
    qwen.add_lora(model, 8, 16.0)
    rows, T = size.learn
    words = lambda n: torch.randint(10, min(model.config.vocab_size, 100_000) - 30, (n,))
    prompts = [qwen.Encoded(words(T // 2), None, None) for _ in range(rows)]
    answers = [[words(T // 8) for _ in range(4)] for _ in range(rows)]
    whole = [(prompt, torch.cat(group)) for prompt, group in zip(prompts, answers)]
    batches = {"one by one": collate(*zip(*whole), pad_id=0), "packed": pack(model, prompts, answers, 0)}
    for name, batch, compiled in [(n, b, False) for n, b in batches.items()] + [
        ("compiled", batches["one by one"], True)
    ]:
        if compiled:
            compile_blocks(model, "inductor" if size.device == "cuda" else "eager")
        batch = batch.to(size.device)

        def update():
            with torch.autocast(size.device, half(size), enabled=size.device == "cuda"):
                logp, _ = token_logprobs(model, batch)
            logp.sum().backward()

        ms, tokens = milliseconds(update, size), int((batch.attention_mask > 0).sum())
        mfu = 4 * parameters * tokens / ms * 1e3 / PEAK  # frozen weights need no gradient of their own
        yield {"": name, "ms": ms, "tokens/s": 1e3 * tokens / ms, "MFU": mfu, "peak GB": peak_gb(size)}


def fsdp(size):
    """FSDP2 with one rank: the losses of two steps beside those without it, and a run that is resumed."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import tiny_checkpoint
    from small import arguments, metrics, quiet, small_data

    import train_sft

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tiny_checkpoint(folder / "model", layers=2)
        small_data(folder / "data")
        losses = []
        for how in "off", "on":
            out = folder / how
            flags = dict(dtype="float32", device=size.device, full=True, fsdp=how, save_every=1)
            for more in dict(steps=2), dict(steps=2, resume=True):
                code, errors = quiet(train_sft.main, arguments(folder / "model", folder / "data", out, **flags, **more))
                assert code == 0, errors
            losses.append([row["loss"] for row in metrics(out)])
        off = max(abs(a - b) for a, b in zip(*losses))
        yield {"": "two SFT steps", "largest difference": off, "files": len(list((folder / "on" / "model").iterdir()))}


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
                lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
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
        results.write(running=[part, time.time()])
        results.all["rows"].pop(part, None)
        try:
            for row in PARTS[part][0](size):
                results.add(part, row)
                print(part, row, flush=True)
        except Exception as error:
            results.add(part, {"": f"failed: {type(error).__name__}: {str(error)[:300]}"})
            print(part, results.all["rows"][part][-1], flush=True)
        if size.device == "cuda":
            torch.cuda.empty_cache()
    results.write(running=None)


def supervise(start, parts, limits, out):
    """start(parts) -> a process that runs them; past a part's limit it is ended, and started anew for the rest."""
    parts = list(parts)
    while parts:
        process, part = start(parts), parts[0]
        while process.poll() is None:
            time.sleep(0.2)
            part, since = Results(out).all.get("running") or (part, time.time())
            if time.time() - since > limits[part]:
                process.kill()
                process.wait()
        results = Results(out)
        if not results.all.get("running"):
            return
        part, since = results.all["running"]
        took = f"stopped after {limits[part]} s" if time.time() - since > limits[part] else "the process died"
        results.add(part, {"": took})
        parts = parts[parts.index(part) + 1 :]
        results.write(running=None)


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
    sys.path += sorted(map(str, Path(args.peers).glob("*.whl"))) if args.peers else []
    args.out = args.out or (tempfile.mkdtemp() if args.tiny else str(ROOT / "benchmarks" / "results"))
    check_file(Path(args.out) / "gpu.json", '"rows"')
    check_file(Path(args.out) / "gpu.md", "benchmarks.gpu")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    size = TINY if args.tiny else FULL
    if not args.here:
        Results(args.out).write(machine=machine())
    if args.here or args.tiny:
        run(args.only, size, args.out)
    else:
        again = [sys.executable, "-m", "benchmarks.gpu", "--here", "--out", args.out]
        again += ["--peers", args.peers] if args.peers else []
        start = lambda parts: subprocess.Popen([*again, "--only", *parts], cwd=ROOT)
        supervise(start, args.only, {part: limit for part, (_, limit) in PARTS.items()}, args.out)
    if not args.here:
        publish(Results(args.out).all, size, Path(args.out) if args.tiny else ROOT)
        print(f"{args.out}/gpu.md", flush=True)


if __name__ == "__main__":
    command(main)
