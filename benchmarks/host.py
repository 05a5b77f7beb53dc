"""How long is the host busy with one step of decoding? While it is, a GPU that is faster has nothing to do.

    python -m benchmarks.host [--layers 28] [--rows 8] [--out benchmarks/results/host.md]

Runs on a CPU, one thread, fp32: tensors are tiny, so that what is left is the work of Python and PyTorch. The decode
kernel is not started, and a norm is one call, as on CUDA. Best of the steps, in time of this thread.

    slots     keys and values as on a CPU, which was the GPU's way once: parts of attention, joined
    arena     the GPU's way: ranges of one arena, one kernel a layer (support/cache.py)
    replayed  the same as a CUDA graph, which --compile asks for: what is inside costs one launch

Launches and waits are those of the pretended GPU (tests/fakegpu.py), whose test holds them.
"""

import argparse
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from data import command
from model import Config, Encoded, Qwen25VL
from support import cache, engine
from tiny.report import provenance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # helpers' tiny model, the pretended GPU
TOKENS = 24  # of a response: each is a step
PLAIN = 8  # steps that are not counted


def random_model(layers):
    from helpers import randomize, tiny_config

    return randomize(Qwen25VL(Config.from_json(tiny_config(layers=layers)))).eval().requires_grad_(False)


def steps(model, rows, measure):
    """[what measure() grew by in each step] of `rows` rows that read a policy, one of four prompts, their own."""
    words, found, step = torch.randint(10, 250, (5, 40)), [], engine.Decoder.step
    prompts = [Encoded(torch.cat([words[0], own]), None, None) for own in words[1:]]

    def measured(*args):
        before = measure()
        step(*args)
        found.append([after - b for after, b in zip(measure(), before)])

    with mock.patch.object(engine.Decoder, "step", measured):
        engine.sample(model, prompts, rows // 4, max_tokens=TOKENS, shared=[40] * 4, banned_ids=[280, 281])
    return found[PLAIN:-1]  # the last step ends all rows, and reads nothing


class Graph:
    """torch.cuda.CUDAGraph on a CPU: what it holds costs the host nothing."""

    def replay(self):
        pass


def on_cpu(name):
    """What lets the GPU's cache run here."""
    stack, there = ExitStack(), SimpleNamespace(multi_processor_count=132)
    patches = [
        (torch.cuda, "get_device_properties", lambda *_: there),
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", lambda *_, **__: nullcontext()),
        (F, "rms_norm", lambda x, shape, weight, eps: x * weight),  # one kernel on CUDA, seven on a CPU
        (engine, "decoding_cache", cache.Slots if name == "slots" else cache.Arena),
    ]
    if name == "slots":
        patches[-1] = (engine, "decoding_cache", lambda model, rows, capacity, room: cache.Slots(model, rows, capacity))
    else:
        from kernels import decode_triton

        patches.append((decode_triton, "attend_ranges", lambda q, *_: torch.zeros_like(q)))
    for patch in patches:
        stack.enter_context(mock.patch.object(*patch))
    return stack


def counted(layers, rows, name):
    """Launches and waits of a step on the pretended GPU."""
    import fakegpu

    with fakegpu.pretended(lambda kernel, grid, args, how: args[5].zero_()), on_cpu(name) as stack:
        if name == "replayed":
            stack.enter_context(mock.patch.object(torch.cuda, "CUDAGraph", fakegpu.Graph))
            stack.enter_context(mock.patch.object(torch.cuda, "graph", fakegpu.Graph.record))
        model = fakegpu.to_gpu(random_model(layers))
        model.compiled = name == "replayed"
        return steps(model, rows, lambda: (fakegpu.launches.total(), fakegpu.waits.total()))[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="of the text model (default: %(default)s, the 7B's)")
    parser.add_argument("--rows", type=int, default=8, help="written at a time (default: %(default)s)")
    parser.add_argument("--out", help="write the table to this file, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = [f"| {args.layers} layers, {args.rows} rows | host ms a step | launches | waits |", "|---" * 4 + "|"]
    model = random_model(args.layers)
    for name in "slots", "arena", "replayed":
        model.compiled = name == "replayed"
        with on_cpu(name):
            seconds = min(s for _ in range(3) for (s,) in steps(model, args.rows, lambda: (time.thread_time(),)))
        launches, waits = counted(args.layers, args.rows, name)
        lines.append(f"| {name} | {1e3 * seconds:.1f} | {launches} | {waits} |")
    print(*lines, sep="\n")
    if args.out:
        made = provenance()
        lines += [
            "",
            f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}: `python -m benchmarks.host`.",
        ]
        Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    command(main)
