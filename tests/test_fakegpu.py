"""The project on a pretended GPU (tests/fakegpu.py): the right device, the CPU's numbers, few waits and launches.

It runs in a process of its own (its last test): torch is told of a device, and the Triton kernels are interpreted.
"""

import os
import sys

import pytest
import torch
from again import interpreted
from helpers import picture, question, tiny_checkpoint
from small import arguments, metrics, quiet, small_data

HERE = os.environ.get("TRITON_INTERPRET") == "1"
pretend = pytest.mark.skipif(not HERE, reason="the last test runs this in a process of its own")
if HERE:
    import fakegpu
    from fakegpu import GPU, pretended

    fakegpu.triton_kernels()  # imported, they are interpreted; a CPU tensor takes the path of CPUs
    os.environ.pop("TRITON_INTERPRET")

POLICY = "Here is a policy that all of them share, a long one indeed, and this is how it goes on. " * 2
RULES = {
    "as they are": {},
    "greedy": dict(temperature=0.0),
    "truncated": dict(temperature=0.7, top_k=20, top_p=0.9, min_tokens=4),
    "few rows at a time": dict(budget=300),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("gpu"), layers=2, vision_depth=2)


def load(folder, device="cpu", dtype=torch.float32):
    from model import load_pretrained

    return load_pretrained(folder, device, dtype).eval().requires_grad_(False)


def prompts_of(folder, count=4):
    """Prompts that share 60 tokens of a policy, half of them with a picture; and the processor."""
    from model import Processor

    processor = Processor.from_pretrained(folder)
    chats = [question(f"{i} what?", *([picture(56, 56 + 28 * i, seed=i)] if i % 2 else [])) for i in range(count)]
    for (message,) in chats:
        message["content"].insert(0, {"type": "text", "text": POLICY})
    return processor, [processor.encode(chat, add_generation_prompt=True) for chat in chats]


def quickly(kernel, grid, args, how):
    """The kernels in PyTorch, a hundred times as fast as interpreted; their own tests have them as they are."""
    name = kernel.fn.__name__
    if name == "decode":
        decode(*args[:10])
    elif name.startswith("sweep"):
        sweep(*args[:9], how)
    else:
        kernel[grid](*args, **how)


def decode(q, k, v, keys, values, out, tiles, ranges, own, place):
    keys[place], values[place] = k, v
    for tile, reads in zip(tiles.tolist(), ranges.tolist()):
        for n, row in enumerate(tile):
            if row >= 0:
                seen = [(start, end) for start, end, first, last in reads if first <= n < last]
                seen.append((int(own[row]), int(place[row]) + 1))
                at = torch.cat([torch.arange(*one) for one in seen])
                scores = (
                    torch.einsum("jrc,sjc->jrs", q[row].unflatten(0, (k.shape[1], -1)), keys[at]) / q.shape[-1] ** 0.5
                )
                out[row] = torch.einsum("jrs,sjc->jrc", scores.softmax(-1), values[at]).flatten(0, 1)


def sweep(logits, direction, y, logp, entropy, scale, m, s, V, how):
    """At temperature 1, which all runs here have."""
    l = logits.clone()
    if how.get("LOSS", True):
        m[:] = l.amax(1)
        e = (l - m[:, None]).exp().scatter(1, y[:, None], 0)
        s[:] = e.sum(1)
        log_p = l.log_softmax(1)
        logp[:] = log_p.gather(1, y[:, None])[:, 0]
        entropy[:] = -(log_p.exp() * log_p).sum(1)
        scale[:] = s / (s + (l.gather(1, y[:, None])[:, 0] - m).exp())
    e = (l - m[:, None]).exp().scatter(1, y[:, None], 0)
    if "LOSS" not in how:  # sweep_once
        direction[:, :V] = e
    elif how["GRADIENT"]:
        direction[:, :V] = (-e / s[:, None]).scatter(1, y[:, None], 1)


@pretend
@pytest.mark.parametrize("rules", RULES)
def test_sampling_writes_what_the_cpu_writes(folder, rules):
    """Token for token: a shared policy, pictures, rows that end and are given on, prefixes kept for a second call."""
    from support.engine import sample

    processor, prompts = prompts_of(folder)
    cpu, kept = load(folder), {}
    how = dict(max_tokens=10, stop_ids=processor.stop_ids + list(range(40)), banned_ids=processor.banned_ids)
    how |= dict(shared=[60] * 4, **RULES[rules])
    expected = sample(cpu, prompts, 3, **how)
    with pretended(quickly):
        gpu = load(folder, GPU)
        found = [sample(gpu, prompts, 3, prefixes=kept, **how) for _ in range(2)]
    assert len(kept) == 1 and found[0] == found[1]
    assert rules == "greedy" or len({len(r.tokens) for group in expected for r in group}) > 1
    for theirs, ours in zip(expected, found[0]):
        for right, response in zip(theirs, ours):
            assert response.tokens == right.tokens
            assert max(abs(a - b) for a, b in zip(response.logprobs, right.logprobs)) < 1e-5


class Told:
    """Reads two results, the first with a picture, the second longer for some rows than for others."""

    def __init__(self, reads):
        self.reads = list(reads)

    def reply(self, tokens, room):
        return self.reads.pop(0) if self.reads else None

    def end(self, tokens, finished):
        return finished, []


@pretend
def test_dialogues_are_what_the_cpu_writes(folder):
    """Results are read into the arena, where other rows' tokens lie beside them."""
    from support.dialogue import following
    from support.engine import sample

    processor, prompts = prompts_of(folder)
    reads = [
        [following(processor, "no", [picture(56, 56)]), following(processor, "so " * (1 + 9 * p))] for p in range(4)
    ]
    how = dict(max_tokens=400, stop_ids=list(range(60)), banned_ids=processor.banned_ids, shared=[60] * 4)
    write = lambda model: sample(model, prompts, 3, dialogue=lambda p: Told(reads[p]), **how)
    expected = write(load(folder))
    with pretended(quickly):
        found = write(load(folder, GPU))
    for right, response in zip(sum(expected, []), sum(found, [])):
        assert response.tokens == right.tokens and len(right.reads) == 2 and right.finished
        assert max(abs(a - b) for a, b in zip(response.logprobs, right.logprobs)) < 1e-5


@pretend
@pytest.mark.parametrize("rules", RULES)
def test_replayed_steps_write_what_the_cpu_writes(folder, rules):
    """A graph knows its tensors only: what it reads has to be where it was, and no number may come from the host.

    The arena is too small for the prompts and grows, rows end and are given on, and given up.
    """
    from support.engine import sample

    processor, prompts = prompts_of(folder, 6)
    cpu = load(folder)
    how = dict(max_tokens=24, stop_ids=processor.stop_ids + list(range(20)), banned_ids=processor.banned_ids)
    how |= dict(shared=[60] * 6, **{"budget": 500, **RULES[rules]})
    expected = sample(cpu, prompts, 3, **how)
    with pretended(quickly):
        gpu = load(folder, GPU)
        gpu.compiled = True
        found = sample(gpu, prompts, 3, **how)
        assert fakegpu.Graph.replays > 5
    assert [[r.tokens for r in group] for group in found] == [[r.tokens for r in group] for group in expected]


RUNS = {  # (script, flags)
    "cpt": ("train_cpt", {}),
    "sft": ("train_sft", {}),
    "sft, LoRA, bf16": ("train_sft", dict(full=False, dtype="bfloat16")),
    "sft, replay": ("train_sft", dict(replay="DATA", policy_in_prompt=False)),
    "rl": ("train_rl", dict(group_size=2, policy_rollouts=1)),
    "rl, LoRA": ("train_rl", dict(full=False, group_size=2, policy_rollouts=1)),
}


@pytest.fixture
def on_gpu(monkeypatch):
    """Training scripts compute on the pretended GPU; files are written from the CPU, as safetensors does it."""
    import model
    import support.checkpoint
    import support.files
    import training

    init, save = training.Run.__init__, model.save_file

    def with_gpu(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.device = GPU

    def save_held(tensors, *args, **kwargs):
        save({name: fakegpu.held(t).clone() for name, t in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(training.Run, "__init__", with_gpu)
    for module in model, support.checkpoint, support.files:
        monkeypatch.setattr(module, "save_file", save_held)


@pretend
@pytest.mark.parametrize("run", RUNS)
def test_training_learns_what_the_cpu_learns(tmp_path, request, run):
    """Two updates: loss, gradient norm and all other metrics; the loss's kernels are the project's own, interpreted."""
    import importlib

    script, flags = RUNS[run]
    main = importlib.import_module(script).main
    tiny_checkpoint(tmp_path / "model", layers=2, vision_depth=2)
    small_data(tmp_path / "data", items=6)
    flags = {name: str(tmp_path / "data") if value == "DATA" else value for name, value in flags.items()}
    flags |= dict(steps=2, batch_size=2, max_response=8) if script == "train_rl" else dict(steps=2, batch_size=4)
    code, errors = quiet(main, arguments(tmp_path / "model", tmp_path / "data", tmp_path / "cpu", **flags))
    assert code == 0, errors
    request.getfixturevalue("on_gpu")
    with pretended(quickly):
        code, errors = quiet(main, arguments(tmp_path / "model", tmp_path / "data", tmp_path / "gpu", **flags))
    assert code == 0, errors
    for found, expected in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        assert found == pytest.approx(expected, rel=0.05 if "bf16" in run else 1e-3, abs=1e-4, nan_ok=True)


@pretend
def test_evaluation_and_chat_answer_what_the_cpu_answers(tmp_path, monkeypatch, capsys):
    import io
    from types import SimpleNamespace

    import evaluate
    import model as qwen
    from data.dataset import load_items, load_policies
    from support import chat

    folder, data = tiny_checkpoint(tmp_path / "model", layers=2, vision_depth=2), small_data(tmp_path / "data", items=4)
    policies = load_policies(data)
    items = load_items(data, "test.jsonl", policies)
    flags = dict(chat=folder, image=str(data / items[0]["images"][0]), adapter="", max_tokens=4)
    flags |= dict(min_pixels=0, max_pixels=0)
    answers = []
    for device in "cpu", GPU:
        with pretended(quickly):
            model = load(folder, device)
            _, records = evaluate.evaluate(
                model, qwen.Processor.from_pretrained(folder), items, policies, policy_in_context=True, max_response=6
            )
            monkeypatch.setattr(chat, "open_model", lambda *_: (model, folder))
            monkeypatch.setattr(sys, "stdin", io.StringIO("what is this?\nand that?\n"))
            chat.chat(qwen, SimpleNamespace(**flags))
            answers.append(([r["response"] for r in records], capsys.readouterr().out))
    assert answers[0] == answers[1]


@pretend
def test_a_step_of_decoding_launches_little_and_waits_once(tmp_path, monkeypatch):
    """The GPU is kept busy by a host that asks for few things; counted as the difference of 3 layers and 2.

    Of a replayed step it asks the same for any number of layers.
    """
    from support import engine

    def counts(layers, compiled=False):
        folder = tiny_checkpoint(tmp_path / f"{layers} {compiled}", layers=layers)
        processor, prompts = prompts_of(folder)
        steps, step = [], engine.Decoder.step

        def counted(*args):
            before = fakegpu.launches.total(), fakegpu.waits.total()
            step(*args)
            steps.append((fakegpu.launches.total() - before[0], fakegpu.waits.total() - before[1]))

        monkeypatch.setattr(engine.Decoder, "step", counted)
        with pretended(lambda kernel, grid, args, how: args[5].zero_()):  # the output: anything that is a number
            gpu = load(folder, GPU, torch.bfloat16)
            gpu.compiled = compiled
            engine.sample(gpu, prompts, 3, max_tokens=8, shared=[60] * 4, banned_ids=processor.banned_ids)
        monkeypatch.setattr(engine.Decoder, "step", step)
        return steps[4]

    (launches, waits), (fewer, _) = counts(3), counts(2)
    replayed = counts(3, compiled=True)
    assert replayed == counts(2, compiled=True) and replayed[0] <= 44 and replayed[1] <= 1
    print(
        f"launches a layer {launches - fewer}, besides {3 * fewer - 2 * launches}, waits {waits}, replayed {replayed}"
    )
    assert launches - fewer <= 28 and 3 * fewer - 2 * launches <= 55  # what they are: one more is seen
    assert waits <= 1, fakegpu.waits


@pretend
def test_the_benchmark_of_decoding_runs_on_a_gpu(monkeypatch):
    """Its first run is on a GPU lent for minutes: the arena has what its rows need, and the graph is replayed."""
    from types import SimpleNamespace

    from benchmarks import gpu
    from support.cache import Arena

    arenas, made, random_model = [], Arena.__init__, gpu.random_model

    def told(self, model, rows, capacity, room):
        made(self, model, rows, capacity, room)
        arenas.append((rows, rows * capacity, len(self.keys[0])))

    monkeypatch.setattr(Arena, "__init__", told)
    monkeypatch.setattr(gpu, "random_model", lambda size: fakegpu.to_gpu(random_model(gpu.TINY)))
    monkeypatch.setattr(gpu, "generate", lambda *_: {})
    with pretended(lambda kernel, grid, args, how: args[5].zero_()):
        rows = list(gpu.decode(SimpleNamespace(**{**vars(gpu.TINY), "device": GPU})))
        assert fakegpu.Graph.replays > 0
    assert not [row for row in rows if "not run" in row] and len(rows) == len(gpu.TINY.decode) + 2
    whole = [(n, prefix + n // 4 * gpu.TINY.prompt + n * gpu.TINY.tokens) for n, prefix in gpu.TINY.decode]
    assert {(n, S) for n, own, S in arenas} == set(whole) and all(own < S for n, own, S in arenas)


@pytest.mark.skipif(HERE, reason="this is the process of its own")
def test_this_file_in_a_process_of_its_own():
    interpreted(__file__)
