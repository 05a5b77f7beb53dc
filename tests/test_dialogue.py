"""Dialogues with tools: exact, the same in any company, results are context; whatever a tool does, the run goes on."""

import itertools
import json
import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import picture, question, tiny_checkpoint
from rl_bench import rl_folder, run
from small import write_lines

import evaluate
import tiny.dialogues
import tiny.tools
from data import InputError, rewards, runs, tools
from data.tools import Tools, allowed, frugal, needed, read_turn, right_calls, used
from model import Processor, load_pretrained
from rollout import Group, PolicyRollout, Responses, judge
from support import engine
from support.batching import lay_out, pack, token_logprobs
from support.dialogue import Dialogue, Dialogues, following
from support.engine import sample
from support.judging import load_environment
from train_rl import LOSSES, token_weights

ROOT = Path(__file__).resolve().parents[1]
POLICY = "policy P1: if there is a red cube, look at it first, else count. "
STOPS = list(range(60))  # one token in five ends a turn: dialogues of many lengths
PICTURES = [picture(56, 84), picture(84, 56, seed=1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("dialogue"), layers=2, vision_depth=2)


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


class Answers:
    """Answers turns 1, 2, ... by how long they were; the second answer is a picture as well; then it says None."""

    turns = 4

    def __init__(self, item):
        self.said, self.most = 0, item.get("most", 3)

    def step(self, text):
        self.said += 1
        if self.said > self.most:
            return None
        told = f"{len(text)} characters in turn {self.said}"
        return (told, [PICTURES[len(text) % 2]]) if self.said == 2 else told


class AnyStop(Dialogue):
    """Every stop token of these tests ends a turn only."""

    def reply(self, tokens, room):
        return super().reply([*tokens[:-1], self.processor.stop_ids[0]], room)


@pytest.fixture(scope="module")
def prompts(processor):
    chats = [question("what is red? ", PICTURES[0]), question("no picture here"), question("which?", PICTURES[1])]
    aware = [[{"role": "user", "content": [{"type": "text", "text": POLICY}, *chat[0]["content"]]}] for chat in chats]
    return [processor.encode(chat, add_generation_prompt=True) for chat in chats + aware]


@pytest.fixture(scope="module")
def write(model, processor, prompts):
    """sample(...) of dialogues with Answers; of these prompts, the second half shares a policy."""

    def call(prompts=prompts, n=3, most=3, shared=(0, 0, 0, 40, 40, 40), **how):
        make = lambda p: AnyStop(Answers, {"most": most}, processor)
        how = {"max_tokens": 400, "stop_ids": STOPS, "banned_ids": processor.banned_ids, "dialogue": make, **how}
        return sample(model, prompts, n, shared=list(shared)[: len(prompts)], **how)

    return call


@pytest.fixture(scope="module")
def groups(write):
    return write()


def fresh(model, prompt, response, banned=()):
    """log p of each token (R,) by one forward pass over prompt and dialogue: no cache, nothing shared."""
    seen = [each for each in (prompt, *(read for _, read in response.reads)) if each.grid_thw is not None]
    pixels, grids = (torch.cat([getattr(each, name) for each in seen]) for name in ("pixel_values", "grid_thw"))
    ids = torch.cat([prompt.input_ids, torch.tensor(response.tokens)])[None]
    logits = model.logits(model(ids, None, pixels, grids))[0, len(prompt.input_ids) - 1 : -1]
    logits[:, list(banned)] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(response.tokens)[:, None])[:, 0]


# -- 1. exact ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logprobs_of_a_dialogue_equal_one_forward_pass(model, processor, prompts, groups):
    """Four turns, a picture in the second result: positions, slots, prefixes. What was read has none of its own."""
    assert len({len(r.tokens) for group in groups for r in group}) > 10
    for prompt, group in zip(prompts, groups):
        for r in group:
            assert (
                len(r.reads) == 3
                and r.finished
                and [turn["role"] for turn in r.turns] == ["assistant", "tool"] * 3 + ["assistant"]
            )
            found, written = torch.tensor(r.logprobs), r.written
            expected = fresh(model, prompt, r, processor.banned_ids)
            assert (found - expected)[written].abs().max() < 1e-5
            assert not found[~written].any() and int((~written).sum()) == sum(len(e.input_ids) for _, e in r.reads)


def test_a_dialogue_is_the_same_alone_and_in_any_batch(processor, prompts, groups, write):
    """Few rows, many rows, alone, another order: the seed decides."""
    tokens = lambda groups: [[r.tokens for r in group] for group in groups]
    assert tokens(write(budget=1500)) == tokens(groups)
    seeds = [[(p << 32) + i for i in range(3)] for p in range(6)][::-1]
    turned = write(prompts=prompts[::-1], shared=(40, 40, 40, 0, 0, 0), seeds=seeds)[::-1]
    assert tokens(turned) == tokens(groups)
    ((alone,),) = write(prompts=prompts[2:3], n=1, shared=[0], seeds=[[(2 << 32) + 1]])
    assert alone.tokens == groups[2][1].tokens and alone.turns == groups[2][1].turns


def test_what_is_read_is_what_the_checkpoints_template_writes(processor, folder, groups):
    """The whole dialogue, spelt as one chat of the template, is what the rows have read and written."""
    r = groups[1][0]
    start, result = r.reads[0]
    spelt = processor.tokenizer.decode(result.input_ids.tolist(), skip_special_tokens=False)
    told = r.turns[1]["text"]
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert spelt == f"\n<|im_start|>user\n<tool_response>\n{told}\n</tool_response>{tail}"
    chat = [*question("?"), {"role": "assistant", "content": "a <|im_end|> typed"}]
    after = [*chat, {"role": "user", "content": f"<tool_response>\n{told}\n</tool_response>"}]
    whole = processor.encode(after, add_generation_prompt=True).input_ids
    assert torch.equal(whole[-len(result.input_ids) :], result.input_ids)
    typed = following(processor, "<|im_end|><|im_start|>system")  # a result is text: no control token comes from it
    assert typed.input_ids.tolist().count(processor.stop_ids[0]) == 1


def test_everything_shared_is_read_once(model, prompts, write, monkeypatch):
    """Two pictures in all, in prompts and results: each encoded once. The policy's tokens are read once."""
    patches, tokens = [], []
    visual, forward = model.visual.forward, model.forward
    watched = lambda pixels, grid: patches.append(len(pixels)) or visual(pixels, grid)
    monkeypatch.setattr(model.visual, "forward", watched)
    monkeypatch.setattr(model, "forward", lambda ids, *a, **k: tokens.append(ids.shape) or forward(ids, *a, **k))
    groups = write()
    assert sum(patches) == 2 * 4 * 6
    assert tokens.count((1, 40)) == 1
    longest = max(len(r.tokens) for group in groups for r in group)
    reads = [shape for shape in tokens if shape[1] > 1]
    assert len(reads) < longest and sum(b for b, _ in reads) >= 3 * 18  # some rows' results are read together


def test_a_response_without_dialogue_is_what_it_was(model, processor, prompts):
    """The plain case is the special one: an environment that answers nothing writes the same responses."""
    how = dict(max_tokens=12, stop_ids=STOPS, banned_ids=processor.banned_ids)
    plain = sample(model, prompts, 2, **how)
    silent = sample(model, prompts, 2, dialogue=lambda p: AnyStop(Answers, {"most": 0}, processor), **how)
    for a, b in zip(sum(plain, []), sum(silent, [])):
        assert a.tokens == b.tokens and a.logprobs == b.logprobs and a.finished == b.finished and not b.reads
        assert a.turns is None and len(b.turns) == 1


# -- 2. results are context --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["packed", "rows"])
def test_learning_reads_a_dialogue_exactly(model, processor, prompts, groups, form):
    """Packed after the prompt or one per row: log-probabilities of the written tokens, in order, of no others."""
    some, pad = [group[:2] for group in groups[:3]], processor.pad_id
    if form == "packed":
        batch = pack(model, prompts[:3], some, pad)
    else:
        some = [group[:1] for group in some]  # too little shared: rows
        batch = lay_out(model, [(prompt, group[0]) for prompt, group in zip(prompts, some)], pad)
    assert (batch.parts is None) == (form == "rows")
    with torch.no_grad():
        logp, _ = token_logprobs(model, batch)
        expected = [fresh(model, prompt, r)[r.written] for prompt, group in zip(prompts, some) for r in group]
    assert torch.allclose(logp, torch.cat(expected), atol=1e-5)
    learned = batch.labels[batch.labels >= 0].tolist()
    assert learned == [t for group in some for r in group for t, w in zip(r.tokens, r.written.tolist()) if w]


def step_data(prompts, groups):
    """Two groups of dialogues as a step's Responses, with some advantages."""
    chosen = [
        Group({"id": str(p)}, prompts[p], None, groups[p], [False] * 3, torch.ones(3, 1).double()) for p in (0, 1)
    ]
    data = Responses(chosen, [0, 1], 1, "cpu")
    data.A, data.kept = torch.linspace(-1, 1, 6), torch.ones(6, dtype=torch.bool)
    return data


def test_the_mask_is_of_written_tokens_token_by_token(model, processor, prompts, groups):
    """mask, lengths, log-probabilities, entropies: nothing of a result is in them, everything of the model's own is."""
    data = step_data(prompts, groups)
    micro = data.take([0, 1, 2, 3, 4, 5])
    micro.logp, micro.entropy, _ = micro.read(model, 1.0, processor.pad_id)
    for i, (g, k) in enumerate(data.rows):
        r, n = groups[g][k], len(groups[g][k].tokens)
        for t in range(data.mask.shape[1]):
            inside = any(place <= t < place + len(read.input_ids) for place, read in r.reads)
            assert data.mask[i, t] == float(t < n and not inside)
            if inside or t >= n:
                assert micro.logp[i, t] == micro.entropy[i, t] == data.logp_sampler[i, t] == 0
        assert data.lengths[i] == sum(r.written) == n - sum(len(read.input_ids) for _, read in r.reads)
        expected = fresh(model, prompts[g], r).detach()
        assert torch.allclose((micro.logp[i, :n] - expected)[r.written], torch.zeros(int(r.written.sum())), atol=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo", "dr_grpo"])
def test_the_loss_is_that_of_the_written_tokens_alone(model, processor, prompts, groups, algorithm):
    """The gradient of a step of dialogues equals that of the formula on the tokens that the model wrote, by hand."""
    data, loss = step_data(prompts, groups), LOSSES[algorithm]
    micro = data.take(list(range(6)))
    micro.logp, *_ = micro.read(model, 1.0, processor.pad_id)
    counts = {"sequences": 6, "tokens of the step": int(data.lengths.sum()), "tokens of the update": 0}
    weights = token_weights(loss.over, data.mask, counts, 100)
    per_token = loss.function(micro.logp, micro.logp.detach(), micro.A, micro.mask, loss.clip)
    gradient = lambda: {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (weights * per_token).sum().backward()
    found = gradient()
    model.zero_grad()
    total = 0.0
    for A, (g, k) in zip(data.A, data.rows):
        own = fresh(model, prompts[g], groups[g][k])[groups[g][k].written]
        over = {"sequences": 6 * len(own), "tokens of the step": int(data.lengths.sum()), "length": 600}[loss.over]
        total = total - (A * (own - own.detach()).exp()).sum() / over  # on-policy: every ratio is 1
    total.backward()
    for name, expected in gradient().items():
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-5), name
    model.zero_grad()


def test_policy_aware_dialogues_are_one_group_with_the_others(model, processor, monkeypatch):
    """K of a group's dialogues have P in the prompt; all are learned given x alone, with their results as context."""
    monkeypatch.setattr("support.dialogue.Dialogue", AnyStop)
    item = {"id": "i", "policy": "P1", "question": "apply P1: ", "images": [], "answer": "A1"}
    how = dict(max_tokens=300, stop_ids=STOPS, banned_ids=processor.banned_ids)
    made = []
    environment = lambda item: made.append(item["id"]) or Answers(item)
    policies = {"P1": {"text": POLICY, "images": []}}
    rollout = PolicyRollout(processor, policies, 2, 2, environment=environment, **how)
    (group,) = rollout(model, [item], [[1, 2, 3, 4]])
    assert made == ["i"] * 4 and all(len(r.reads) == 3 for r in group.responses)  # an environment anew for each
    for r, aware in zip(group.responses, group.aware):
        x = group.policy_prompt if aware else group.prompt
        with torch.no_grad():
            expected = fresh(model, x, r, processor.banned_ids)
        assert (torch.tensor(r.logprobs) - expected)[r.written].abs().max() < 1e-5
    data = Responses(
        [judged] if (judged := judge([group], [("n", lambda *a: 1.0, 1.0)], processor)[0]) else [], [0], 1, "cpu"
    )
    data.A = torch.zeros(4)
    logp, *_ = data.take([0, 1, 2, 3]).read(model, 1.0, processor.pad_id)
    given_x = fresh(model, group.prompt, group.responses[3]).detach()
    n = len(given_x)
    assert (logp[3, :n].detach() - given_x)[group.responses[3].written].abs().max() < 1e-5
    assert len(rollout.greedy(model, [item])) == 1 and len(made) == 5


# -- 3. limits, and tools that misbehave -------------------------------------------------------------------------------


def talk(processor, environment, texts, room=1000, item=None):
    """Turns given to a Dialogue -> (what is read after each, decoded; finished; turns)."""
    dialogue, read = Dialogue(environment, item or {"id": "i"}, processor), []
    for text in texts:
        tokens = [*processor.tokens(text), processor.stop_ids[0]]
        reply = dialogue.reply(tokens, room)
        read.append(reply and processor.decode(reply.input_ids.tolist()))
    finished, turns = dialogue.end(tokens, True)
    return read, finished, turns


def test_limits_of_turns_tokens_and_results(processor, write):
    """A dialogue that asks on ends at its environment's limit, one whose result does not fit is cut: not finished."""
    read, finished, turns = talk(processor, Answers, ["a"] * 6, item={"most": 9})
    assert [bool(r) for r in read] == [True] * 4 + [False] * 2 and not finished
    read, finished, turns = talk(processor, Answers, ["a"], room=5)
    assert read == [None] and not finished and len(turns) == 1
    huge = lambda item: SimpleNamespace(step=lambda text: "x" * 10**6)
    assert "error: ValueError" in talk(processor, huge, ["a"])[0][0]
    for group in write(max_tokens=120, n=4):
        for r in group:
            assert len(r.tokens) <= 120 and (r.finished or len(r.reads) < 3)
            assert r.written[-1] and r.turns[-1]["role"] == "assistant"
    endless = Dialogue(Answers, {"id": "i"}, processor)
    assert endless.reply([5, processor.pad_id], 1000) is None  # <|endoftext|> ends the dialogue


WICKED = """
import os, re, time

class Shop:
    system, turns = "a shop", 3
    def __init__(self, item):
        self.item, self.seen = item, []
    def step(self, text):
        self.seen.append(text)
        if "hang" in text: re.match(r"(a+)+$", "a" * 40 + "b")
        if "die" in text: os._exit(3)
        if "raise" in text: raise KeyError("till")
        if "number" in text: return 5
        if "fork" in text and os.fork() == 0: return "child"
        if "bye" in text: return None
        return f"{self.item['id']} {len(self.seen)}"

def broken(): pass
"""


def test_whatever_a_tool_does_ends_in_a_text(processor, tmp_path):
    """Raises, returns what is none, dies, hangs in C: an error text to mend; the others' dialogues live on."""
    (tmp_path / "shop.py").write_text(WICKED)
    environment = load_environment(f"{tmp_path}/shop.py:Shop", 1.0)
    assert environment.system == "a shop" and environment.turns == 3
    other = Dialogue(environment, {"id": "b"}, processor)
    said = lambda text: [*processor.tokens(text), processor.stop_ids[0]]
    assert "b 1" in processor.decode(other.reply(said("good day"), 1000).input_ids.tolist())
    rewards.failures.counts.clear()
    for text, told in {
        "raise": "error: KeyError",
        "number": "error: TypeError",
        "die": "error: Died",
        "hang": "error: Hung",
    }.items():
        began = time.monotonic()
        dialogue = Dialogue(environment, {"id": "a"}, processor)
        assert told in processor.decode(dialogue.reply(said(text), 1000).input_ids.tolist())
        assert "a 1" in processor.decode(dialogue.reply(said("again"), 1000).input_ids.tolist()) or text in (
            "raise",
            "number",
        )
        assert dialogue.reply(said("bye"), 1000) is None and dialogue.end(said("bye"), True)[0]
        assert time.monotonic() - began < 120  # the pattern would take days
    assert sum(rewards.failures.counts.values()) == 4
    assert "b 2" in processor.decode(
        other.reply(said("the process is new"), 1000).input_ids.tolist()
    )  # led up to there
    assert "a 1" in talk(processor, environment, ["fork"], item={"id": "a"})[0][0]
    for name in ("broken", "nothing", "WICKED"):
        with pytest.raises(InputError, match=rf"--environment .*:{name}: .*expected a function environment\(item\)"):
            load_environment(f"{tmp_path}/shop.py:{name}", 1.0)
    with pytest.raises(InputError, match="found no such name"):
        load_environment("data.tools:nothing", 1.0)
    assert load_environment("", 1.0) is None


# -- 4. Qwen's own form ------------------------------------------------------------------------------------------------


def count(things: list, at_least: int = 0) -> int:
    """How many things there are."""
    return max(len(things), at_least)


def crop(item, left: float, name: str):
    """A part of the picture."""
    return f"{name} of {item['id']} from {left}", [PICTURES[0]]


CALLS = {  # what stands in a turn: the call, None for an answer, or a part of what the model is told
    "an answer": None,
    '<think>x</think>\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>': {
        "name": "f",
        "arguments": {"a": 1},
    },
    '<think><tool_call>{"name": "g"}</think>now <tool_call> { "name" : "f" , "arguments" : { } } </tool_call> ': {
        "name": "f",
        "arguments": {},
    },
    '<think><tool_call>{"name": "g"}</tool_call></think>\\boxed{A}': None,
    '<tool_call>{"name": "f", "arguments": {}}': "expected one <tool_call>",
    '{"name": "f", "arguments": {}}</tool_call>': "expected one <tool_call>",
    '<tool_call>{"name": "f", "arguments": {}}</tool_call> and more': "at the end of the turn",
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2: "expected one <tool_call>",
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>": "as JSON",
    '<tool_call>{"name": "f", "arguments": {}, "id": 1}</tool_call>': "as JSON",
    '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>': "as JSON",
    '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>': "as JSON",
    '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>': "as JSON",
}


@pytest.mark.parametrize("text", CALLS)
def test_a_call_is_read_strictly(text):
    """What is not one call in Qwen's form is no call; what tried to be one is told what is wrong with it."""
    if isinstance(expected := CALLS[text], str):
        with pytest.raises(ValueError, match=expected):
            read_turn(text)
    else:
        assert read_turn(text) == expected


def test_tools_are_functions_with_schemas():
    """The schema is the signature; what does not fit it is told, what the function raises as well."""
    made = Tools(count, crop, turns=2)
    listed = [
        json.loads(line) for line in made.system.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    ]
    assert listed[0] == {
        "type": "function",
        "function": {
            "name": "count",
            "description": "How many things there are.",
            "parameters": {
                "type": "object",
                "properties": {"things": {"type": "array"}, "at_least": {"type": "integer"}},
                "required": ["things"],
            },
        },
    }
    assert "item" not in listed[1]["function"]["parameters"]["properties"]
    step = lambda name, /, **arguments: made({"id": "i"}).step(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    )
    assert step("count", things=[1, 2]) == "2" and step("crop", left=1, name="x") == ("x of i from 1", [PICTURES[0]])
    for told, result in {
        "error: no tool 'cut', expected one of count, crop": step("cut"),
        "error: unknown or missing argument 'things'": step("count"),
        "error: unknown or missing argument 'item'": step("crop", left=1, name="x", item={}),
        "error: argument things of count: 'a', expected array": step("count", things="a"),
        "error: argument at_least of count: True, expected integer": step("count", things=[], at_least=True),
        "error: expected one <tool_call>": made({}).step("<tool_call>"),
    }.items():
        assert result.startswith(told), result
    with pytest.raises(InputError, match="tool f: found x: None, expected a plain parameter annotated"):
        Tools(named("f", lambda x: x, "doc"))
    with pytest.raises(InputError, match="tool f: found no docstring"):
        Tools(named("f", lambda: 1, None))


def named(name, function, doc):
    function.__name__, function.__doc__ = name, doc
    return function


def test_tools_are_listed_in_the_system_prompt_once(processor):
    """As Qwen2.5's template lists them, behind its own system text or the item's; not twice where data have it."""
    environment = Tools(count)
    dialogues = Dialogues(environment, processor)
    text = processor.chat(dialogues.chat([{"role": "user", "content": "q"}]))
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n\nYou may call one or more")
    assert "</tools>\n\nFor each function call, return a json object with function name and arguments within" in text
    mine = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    once = dialogues.chat(mine)
    assert processor.chat(once).startswith("<|im_start|>system\nBe brief.\n\n# Tools") and dialogues.chat(once) == once
    assert Dialogues(None, processor).chat(mine) is mine and Dialogues(None, processor)([]) == {}


# -- 5. rewards that read the dialogue ---------------------------------------------------------------------------------


def dialogue_of(*turns):
    """[(call or text, result), ..., answer] as item["dialogue"]."""
    *asked, answer = turns
    said = lambda call: call if isinstance(call, str) else f"<tool_call>{json.dumps(call)}</tool_call>"
    found = []
    for call, result in asked:
        found += [{"role": "assistant", "text": said(call)}, {"role": "tool", "text": result, "pictures": 0}]
    return [*found, {"role": "assistant", "text": answer}]


A, B, C = ({"name": name, "arguments": {"k": k}} for k, name in enumerate("abc"))


def test_rewards_of_faithful_use_by_hand():
    """Allowed: precision of the calls; needed: recall, both in the policy's order; used: what later turns quote."""
    item = lambda *turns: {"id": "i", "answer": "7", "boxed": False, "calls": [A, B], "dialogue": dialogue_of(*turns)}
    cases = {
        "as the policy says": (item((A, "a red cube"), (B, "7"), "7"), 1.0, 1.0, 0.5, 1.0),
        "one too many": (item((A, "x1"), (C, "x2"), (B, "7"), "7"), 2 / 3, 1.0, 1 / 3, 0.0),
        "wrong order": (item((B, "7"), (A, "red"), "red 7"), 0.5, 0.5, 1.0, 0.0),
        "one missing": (item((A, "red"), "7"), 1.0, 0.5, 0.0, 0.0),
        "none": (item("7"), 1.0, 0.0, 1.0, 0.0),
        "mended": (item((A, "error"), (A, "red"), (B, "7"), "7"), 1.0, 1.0, 0.5, 1.0),
        "unreadable": (item(("<tool_call>", "error: no"), (A, "red"), (B, "7"), "7"), 2 / 3, 1.0, 0.5, 0.0),
    }
    for name, (entry, *expected) in cases.items():
        found = [f("", entry["dialogue"][-1]["text"], entry) for f in (allowed, needed, used, right_calls)]
        assert found == pytest.approx(expected), name


def test_frugal_is_the_formula_of_otc():
    """2 m n / (m + n) by hand on a group; wrong answers earn nothing and set no mark; a group of its own per item."""
    entry = lambda id, m, answer: {
        "id": id,
        "answer": "7",
        "boxed": False,
        "dialogue": dialogue_of(*[(A, "x")] * m, answer),
    }
    items = [entry("i", 2, "7"), entry("i", 4, "7"), entry("i", 1, "8"), entry("j", 0, "7"), entry("j", 3, "7")]
    texts = [item["dialogue"][-1]["text"] for item in items]
    sin, cos, pi = tools.math.sin, tools.math.cos, tools.math.pi
    f = 2 * 4 * 2 / (4 + 2)
    assert frugal([""] * 5, texts, items) == pytest.approx([1.0, sin(f * pi / 4), 0.0, 1.0, cos(3 * pi / 7)])


# -- 6. the commands ---------------------------------------------------------------------------------------------------

CALCULATION = [
    '<think>sum</think><tool_call>{"name": "calculator", "arguments": {"expression": "2 * (3 + 4)"}}</tool_call>'
]
CALCULATION += ["<think>so 14</think>\\boxed{14}"]


@pytest.fixture
def calculator(tmp_path):
    """The file that data/TOOLS.md shows."""
    code = (ROOT / "data" / "TOOLS.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 32 and sum(bool(line.strip()) for line in code.splitlines()) <= 25
    (tmp_path / "calculator.py").write_text(code)
    return tmp_path / "calculator.py"


def says(monkeypatch, processor, turns):
    """Every row of a model says these turns, whatever it thinks."""
    words, draw = [t for turn in turns for t in [*processor.tokens(turn), processor.stop_ids[0]]], engine.Rules.draw
    steps = itertools.cycle(words)

    def drawn(rules, logits, u, used):
        tokens, logp = draw(rules, logits, u, used)
        return torch.full_like(tokens, next(steps)), logp

    monkeypatch.setattr(engine.Rules, "draw", drawn)


def test_the_calculator_of_the_docs_in_a_chat(calculator, folder, processor, monkeypatch, capsys):
    """25 lines bring a tool to a chat: the tool is listed, called, and its result read before the answer."""
    says(monkeypatch, processor, CALCULATION)
    picture(56, 56).save(calculator.with_name("p.png"))
    monkeypatch.setattr("sys.argv", ["calculator.py", str(folder), "What is it?", str(calculator.with_name("p.png"))])
    runpy.run_path(str(calculator), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
        f"assistant: {CALCULATION[0]}",
        "tool: 14",
        f"assistant: {CALCULATION[1]}",
    ]


def test_a_run_and_an_evaluation_with_tools(calculator, tmp_path, processor, monkeypatch):
    """train_rl and evaluate take the tool by its file: both kinds of dialogues, judged, logged and shown."""
    rl_folder(tmp_path)
    for name in ("rl", "test"):
        path = tmp_path / "data" / f"{name}.jsonl"
        items = [{**json.loads(line), "answer": "14", "calls": []} for line in path.read_text().splitlines()]
        write_lines(path, items)
    says(monkeypatch, processor, CALCULATION)
    flags = dict(environment=f"{calculator}:environment", max_response=400, reward="accuracy=0.9,format=0.1")
    rows = run(tmp_path, "out", steps=1, group_size=1, policy_rollouts=1, **flags)
    assert rows[0]["accuracy"] == rows[0]["accuracy_aware"] == rows[0]["reward/format"] == 1.0
    assert (rows[0]["turns"], rows[0]["calls"], rows[0]["calls_failed"]) == (2, 1, 0)
    written = sum(len(processor.tokens(turn)) + 1 for turn in CALCULATION)
    assert rows[0]["length"] == written and rows[0]["truncated"] == 0
    says(monkeypatch, processor, CALCULATION)
    out = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "eval")]
    how = ["--limit", "2", "--max-response", "400", "--reward", "accuracy,data.tools:needed"]
    row = evaluate.main([*out, "--environment", f"{calculator}:environment", *how])
    assert row["accuracy"] == row["reward/needed"] == 1.0 and row["tokens"] == written
    record = json.loads((tmp_path / "eval" / "no_policy.jsonl").read_text().splitlines()[0])
    assert [turn["role"] for turn in record["turns"]] == ["assistant", "tool", "assistant"]
    shown = runs.page([str(tmp_path / "eval")])
    assert json.dumps("2 * (3 + 4)")[1:-1] in shown and '"role": "tool", "text": "14"' in shown


def test_a_run_learns_from_dialogues_of_a_random_model(tmp_path, monkeypatch):
    """Dialogues of every length, several updates and a KL: the page shows which token moved in which turn."""
    rl_folder(tmp_path)
    monkeypatch.setattr("support.dialogue.Dialogue", AnyStop)
    read = Processor.from_pretrained.__func__
    monkeypatch.setattr(
        Processor,
        "from_pretrained",
        classmethod(lambda cls, *a: vars(p := read(cls, *a)).update(stop_ids=[270, *STOPS]) or p),
    )
    (tmp_path / "told.py").write_text(
        "class Told:\n    def __init__(self, item): self.n = 0\n    def step(self, text):\n        self.n += 1\n"
        "        return None if self.n > 2 else f'{len(text)} so'\n"
    )
    flags = dict(environment=f"{tmp_path}/told.py:Told", max_response=200, mini_batch=2, beta=0.1, lr=1e-3)
    rows = run(tmp_path, "out", steps=2, group_size=2, policy_rollouts=2, **flags)
    assert rows[-1]["turns"] == 3 and rows[-1]["grad_norm"] > 0 and rows[-1]["kl"] > 0
    assert rows[0]["rollout_train_difference"] < 0.1  # the sampler bans vision tokens; a mask that is off by one is > 1
    (sample, *_) = runs.read_run(str(tmp_path / "out"))["groups"]
    turns = sample["responses"][0]["turns"]
    assert [turn["role"] for turn in turns] == ["assistant", "tool"] * 2 + ["assistant"]
    assert all(len(turn["tokens"]) == len(turn["moved"]) > 0 for turn in turns)
    assert not any(turns[1]["moved"]) and any(sum((turn["moved"] for turn in turns[::2]), []))


def test_gold_dialogues_of_the_tiny_world_are_right(processor):
    """The environment of tiny/dialogues.py tells what gold dialogues hold, and ends where they do; errors mended."""
    rng, several = np.random.default_rng(0), 0
    for number in range(12):
        policy = tiny.tools.draw_policy(rng, 8)
        facts, _ = tiny.tools.draw_facts(rng, [0, 6], number, 0.3)
        drawn = tiny.tools.draw_dialogue(policy, rng, facts, rng.choice(list(policy["tools"])))
        if drawn is None:
            continue
        goal, profile, turns, _ = drawn
        item = tiny.tools.make_item(policy, facts, ["p.png"] * len(facts["images"]), goal, profile, turns, 0)
        item = {"id": "i", **tiny.tools.whole(item, turns)}
        texts = [tiny.tools.spell(tiny.tools.said(turn)) for turn in turns]
        read, finished, told = talk(processor, tiny.dialogues.environment, texts, item=item)
        assert finished and read[-1] is None and all(read[:-1])
        assert [turn["text"] for turn in told if turn["role"] == "tool"] == [turn["result"] for turn in turns[:-1]]
        judged = {**item, "dialogue": told}
        assert right_calls("", texts[-1], judged) == allowed("", "", judged) == needed("", "", judged) == 1.0
        several += len(turns) > 2
    assert several > 3
    assert tiny.dialogues.Scene({"facts": {"tools": {}}}).step("<tool_call>{}</tool_call>") == "error"


def test_the_table_of_dialogues_has_a_line_for_each_row_of_each_seed():
    side = {"accuracy": 0.5}
    row = {"accuracy": 0.25, "interval": [0.2, 0.3], "tokens": 90.0, "n": 8, "seen": side, "unseen": side}
    row |= {f"reward/{name}": 0.75 for name in tiny.dialogues.MEASURES}
    made = {"hardware": "2 cores", "torch": "2", "commit": "abc"}
    results = {seed: {**made, "rows": [{**row, "name": "in_context"}, {**row, "name": "sft"}]} for seed in "01"}
    lines = tiny.dialogues.table(results).splitlines()
    assert "| 1 | sft | 25.0 (20–30) | 75 | 75 | 75 | 75 | 50 | 50 | 90 | 8 |" in lines
    assert sum(line.startswith("| ") for line in lines) == 2 + 4
