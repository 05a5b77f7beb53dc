"""Stage 3 as a whole: gradients that do not depend on how work is split, tasks that are learned, runs that survive."""

import copy
import dataclasses
import importlib.util
import json
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_checkpoint
from small import arguments, metrics, small_data, write_lines

import train_rl
from data import InputError
from data.dataset import load_items, load_policies
from model import Processor, load_pretrained, save_pretrained
from rollout import PolicyRollout, sample
from support.groups import Responses, Sampler
from train_rl import LOSSES, Learner, credit
from training import collate, parse, token_logprobs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    tiny_checkpoint(folder / "model", width=32, layers=1, vision_width=16, vision_depth=2)
    small_data(folder / "data", items=6)
    return folder


def config(folder, **flags):
    flags = {"batch_size": 4, "group_size": 2, "policy_rollouts": 2, "max_response": 6, "check": 0, **flags}
    return parse(train_rl.Config, "", arguments(folder / "model", folder / "data", folder / "out", **flags))


# -- rewards that the tests name as test_rl:function -------------------------------------------------------------------


def vowels(prompt, response, item):
    return sum(response.count(v) for v in "aeiouAEIOU") / max(len(response), 1)


def exact(prompt, response, item):
    return float(response == item["answer"])


calls = [0]


def raises_sometimes(prompt, response, item):
    calls[0] += 1
    if calls[0] % 50 == 0:
        raise ValueError("a bug in somebody's reward")
    return vowels(prompt, response, item)


def hangs_once(prompt, response, item):
    calls[0] += 1
    while calls[0] == 5:
        try:
            sum(range(1000))
        except Exception:  # swallows everything, as some do
            pass
    return float("nan") if calls[0] == 9 else vowels(prompt, response, item)


def mostly_raises(prompt, response, item):
    calls[0] += 1
    assert calls[0] < 20 or calls[0] % 5 < 2
    return 1.0


# -- gradients ---------------------------------------------------------------------------------------------------------


class Bench:
    """A run in this thread, one of `world`, that keeps its gradients instead of making a step."""

    def __init__(self, config, rank=0, world=1, common=None):
        self.config, self.rank, self.world, self.common = config, rank, world, common
        self.device, self.fsdp, self.gradients = torch.device("cpu"), False, []

    def sum(self, x):
        if self.world == 1:
            return x
        self.common["values"][self.rank] = x
        self.common["barrier"].wait()
        values = list(self.common["values"])
        self.common["barrier"].wait()
        return [sum(parts) for parts in zip(*values)] if isinstance(x, list) else sum(values)

    def autocast(self):
        return nullcontext()

    def micro_batches(self, rows):
        size = self.config.micro_batch
        return [(rows[i : i + size], 1.0) for i in range(0, len(rows), size)]

    def reduce_gradients(self, model):
        pass

    def update(self, model, optimizer, step, steps):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        return 0.0


@pytest.fixture(scope="module")
def drawn(folder):
    """Four groups of 2 + 2 on pictures, drawn from a model a little away from the one that learns: ratios differ."""
    torch.manual_seed(0)
    model, processor = load_pretrained(folder / "model"), Processor.from_pretrained(folder / "model")
    policies = load_policies(folder / "data")
    items = load_items(folder / "data", "rl.jsonl", policies)[:4]
    sampling = dict(max_tokens=6, stop_ids=list(range(60)), banned_ids=processor.banned_ids)
    rollout = PolicyRollout(processor, policies, 2, 2, **sampling)
    groups = rollout(model.eval(), items, [[10 * i + k for k in range(4)] for i in range(4)])
    groups = [dataclasses.replace(group, rewards=torch.ones(4, 1, dtype=torch.float64)) for group in groups]
    start = copy.deepcopy(model)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model, start, groups, processor


def gradients(folder, drawn, algorithm, world=1, **flags):
    """Summed over the ranks, of one update of four groups."""
    model, start, groups, processor = drawn
    settings = config(folder, algorithm=algorithm, **flags)
    common = {"values": [None] * world, "barrier": threading.Barrier(world)}
    A, benches = torch.linspace(-1.5, 2.0, 16), [Bench(settings, rank, world, common) for rank in range(world)]
    A[4:8] = 0.0  # a dead group
    A *= algorithm != "opcd"

    def work(bench):
        mine = list(range(4))[bench.rank :: world]
        data = Responses([groups[g] for g in mine], mine, 1, bench.device)
        own = copy.deepcopy(model).train()
        learner = Learner(settings, bench, own, lambda: nullcontext(start), None, None, processor.pad_id)
        if settings.inner_epochs * (settings.mini_batch or 4) == 4:  # one update is on-policy: give it an older policy
            learner.logprobs = lambda data, which: data.sampled
        learner(data, A.view(4, 4)[mine].flatten(), torch.ones(4 * len(mine), dtype=torch.bool), 0, 1)

    threads = [threading.Thread(target=work, args=(bench,)) for bench in benches[1:]]
    for thread in threads:
        thread.start()
    work(benches[0])
    for thread in threads:
        thread.join()
    return [
        {n: sum(given[n] for given in update if n in given) for n in set().union(*update)}
        for update in zip(*(bench.gradients for bench in benches))
    ]


def distance(a, b):
    """Relative, over all parameters and updates."""
    pairs = [(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in y]
    size = lambda tensors: sum(x.double().square().sum() for x in tensors).sqrt()
    return size(p - q for p, q in pairs) / size(q for _, q in pairs)


@pytest.mark.parametrize("algorithm", LOSSES)
def test_gradient_does_not_depend_on_how_the_work_is_split(folder, drawn, algorithm):
    """Micro-batches of 1, 2, 4 and all, one rank and two, packed behind the prompt or not: one number per loss."""
    flags = dict(beta=0.05, inner_epochs=2)
    if algorithm == "opcd":  # a sharper teacher: what is left between nearly equal log-probabilities would be rounding
        model, start, groups, processor = drawn
        start = copy.deepcopy(start)
        start.head_weight.data *= 20
        drawn = model, start, groups, processor
    whole = gradients(folder, drawn, algorithm, micro_batch=16, **flags)
    assert len(whole) == 2 and all(g.abs().sum() > 0 for n, g in whole[0].items() if "layers.0.mlp" in n)
    splits = [{"micro_batch": 1}, {"micro_batch": 3, "shared_prefix": "on"}, {"micro_batch": 4, "world": 2}]
    for split in splits if algorithm in ("grpo", "dapo") else splits[1:]:
        assert distance(gradients(folder, drawn, algorithm, **flags, **split), whole) < 1e-6, split
    if algorithm in ("dapo", "bnpo"):  # with mini-batches the two denominators differ, and each is still global
        mini = gradients(folder, drawn, algorithm, micro_batch=16, mini_batch=2)
        assert distance(gradients(folder, drawn, algorithm, micro_batch=2, mini_batch=2, world=2), mini) < 1e-6


def test_opcd_term_is_the_difference_of_two_forward_passes(folder, drawn):
    """Its gradient is that of -(log teacher(o|P,x) - log pi(o|x)) log pi(o|x); with one prompt for both it vanishes."""
    model, start, groups, processor = drawn
    found = gradients(folder, (start, start, groups, processor), "opcd", micro_batch=4)[0]
    learner, weights = copy.deepcopy(start), 1 / 16

    def logp(model, prompt, tokens):
        ids = torch.cat([prompt.input_ids, torch.tensor(tokens)])[None]
        hidden = model(ids, None, prompt.pixel_values, prompt.grid_thw)[0, len(prompt.input_ids) - 1 : -1]
        return model.logits(hidden).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    for group in groups:
        for response in group.responses:
            own = logp(learner, group.prompt, response.tokens)
            with torch.no_grad():
                gap = logp(start, group.policy_prompt, response.tokens) - own
            (-weights * (gap * own).mean()).backward()
    expected = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
    assert distance([found], [expected]) < 1e-4
    same = [dataclasses.replace(g, policy_prompt=g.prompt) for g in groups]
    nothing = gradients(folder, (start, start, same, processor), "opcd", micro_batch=4)[0]
    assert max(g.abs().max() for g in nothing.values()) < 1e-3 * max(g.abs().max() for g in found.values())


# -- learning ----------------------------------------------------------------------------------------------------------


def run(folder, name, data="data", model="model", **flags):
    flags = {
        "steps": 20,
        "batch_size": 4,
        "group_size": 8,
        "policy_rollouts": 0,
        "micro_batch": 64,
        "max_response": 3,
        "lr": 1e-2,
        "reward": "test_rl:vowels",
        "beta": 0.0,
        "check": 0,
        "dynamic_tries": 0,
        "samples_every": 0,
        **flags,
    }
    train_rl.main(arguments(folder / model, folder / data, folder / name, **flags))
    return metrics(folder / name)


@pytest.mark.parametrize("algorithm", [name for name in LOSSES if name != "opcd"])
def test_every_loss_climbs(folder, algorithm):
    """The share of vowels, .06 by chance, in twenty steps; a turned sign would lead to none."""
    rows = run(folder, algorithm, algorithm=algorithm, clip_low=0.2, clip_high=0.3)
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert first < 0.2 and last > 0.6
    assert all(row["grad_norm"] > 0 for row in rows[:3]) and rows[0]["length_max"] == 3 and rows[0]["failed"] == 0


def test_grpo_climbs_from_chance_to_above_nine_tenths(folder):
    rows = run(folder, "climb", algorithm="grpo", steps=45)
    first, last = (sum(row["reward"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert first < 0.2 and last > 0.9


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A model that reads: behind a policy of four letters it says them, without one it says letters at random.

    Four of sixteen letters: GRPO would have to guess one in 65,536.
    """
    folder, letters = tmp_path_factory.mktemp("reader"), "BCDFGHJKLMNPQRST"
    tiny_checkpoint(folder / "start", width=64, layers=2, vision_width=16, vision_depth=2, scale=0.05)
    torch.manual_seed(0)
    model, processor = load_pretrained(folder / "start"), Processor.from_pretrained(folder / "start")
    spell = lambda row: " ".join(letters[i] for i in row)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    item = lambda answer: {"id": "i", "policy": "P", "question": "go", "images": [], "answer": answer}
    rollout = PolicyRollout(processor, {}, 1, 0)
    for step in range(240):
        rows = torch.randint(16, (24, 4)).tolist()
        policies = [{"text": spell(row), "images": []} if b % 4 else None for b, row in enumerate(rows)]
        prompts = [rollout.encode(item(""), policy) for policy in policies]
        answers = [processor.tokenizer.encode(spell(row).replace(" ", "")).ids[:4] for row in rows]
        logp, _ = token_logprobs(model, collate(prompts, answers, pad_id=processor.pad_id))
        (-logp.mean()).backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, 2 - 2 * step / 240)
        optimizer.step()
        optimizer.zero_grad()
    save_pretrained(model, folder / "model")
    (folder / "data").mkdir()
    policy = {"name": "P", "root": "", "nodes": [], "leaves": [], "text": "R K T B", "images": []}
    (folder / "data" / "policies.json").write_text(json.dumps([policy]))
    items = [{"id": f"i{i}", "policy": "P", "images": [], "question": "go", "answer": "RKTB"} for i in range(4)]
    for name in ("rl", "test"):
        write_lines(folder / "data" / f"{name}.jsonl", items)
    return folder


READ = dict(steps=15, group_size=4, max_response=4, lr=2e-3, reward="test_rl:exact")


def test_policy_rollout_learns_what_stands_only_in_the_policy(reader):
    """The policy-aware half finds the answer and the group's mean carries it over; the metrics show both halves."""
    rows = run(reader, "poro", policy_rollouts=4, validate_every=15, validate_items=4, **READ)
    assert rows[0]["accuracy"] == 0 and rows[0]["accuracy_aware"] > 0.5 and rows[0]["dead_groups"] < 1
    assert rows[-1]["accuracy"] > 0.6
    assert json.loads((reader / "poro" / "validation.jsonl").read_text().splitlines()[-1])["accuracy"] == 1


def test_grpo_at_equal_cost_stays_at_chance(reader):
    rows = run(reader, "grpo", **{**READ, "group_size": 8})
    assert rows[-1]["accuracy"] == 0 and all(row["dead_groups"] == 1 for row in rows)


def test_opcd_learns_it_without_a_reward(reader):
    rows = run(reader, "opcd", algorithm="opcd", opcd_words=300, **{**READ, "group_size": 8, "steps": 25})
    assert rows[0]["accuracy"] == 0 and rows[-1]["accuracy"] > 0.6


@pytest.mark.parametrize(
    "flags",
    [
        {"frozen_sampler": "start"},
        {"frozen_sampler": "base"},
        {"aware_loss": "truncated", "importance_cap": 2.0},
        {"aware_loss": "shaped", "aware_right_only": True, "aware_bonus": 0.5},
        {"standard_only": True},
        {"separate_halves": True},
        {"opcd_weight": 0.3, "beta": 0.01, "kl": "k2"},
        {"full": False, "beta": 0.01, "lora_rank": 2},
    ],
)
def test_options_of_the_policy_aware_half_run_and_say_what_they_do(reader, flags):
    rows = run(
        reader, "-".join(map(str, [*flags, *flags.values()])), policy_rollouts=4, **{**READ, "steps": 3, **flags}
    )
    silent = "standard_only" in flags or "separate_halves" in flags  # the standard half has nothing right to learn from
    assert all(row["grad_norm"] >= 0 for row in rows) and rows[0]["accuracy_aware"] > 0.5
    if "standard_only" in flags:
        assert rows[0]["grad_norm"] > 0  # its half is below the common mean
    elif not silent:
        assert rows[0]["grad_norm"] > 0
    if "beta" in flags:
        assert abs(rows[0]["kl"]) < 1e-6 < rows[-1]["kl"]


def test_replay_joins_each_step(reader):
    """GRPO has no gradient here, so what moves the model is the supervised loss on the replayed items."""
    item = {"id": "r", "policy": "P", "images": [], "question": "go", "answer": "RKTB", "kind": "response", "path": []}
    write_lines(reader / "data" / "sft.jsonl", [item])
    rows = run(reader, "replay", replay=str(reader / "data"), **{**READ, "steps": 2, "max_response": 8})
    assert all(row["dead_groups"] == 1 and row["grad_norm"] > 0 for row in rows)


def test_dynamic_sampling_ends_the_run_when_nothing_is_left_to_learn(reader, capsys):
    with pytest.raises(FileNotFoundError):  # no step, no metrics
        run(reader, "dynamic", algorithm="dapo", **{**READ, "dynamic_tries": 2})
    assert "ends at step 0" in capsys.readouterr().out and (reader / "dynamic" / "model").is_dir()
    rows = run(reader, "dynamic2", algorithm="dapo", policy_rollouts=4, **{**READ, "dynamic_tries": 3, "steps": 2})
    assert len(rows) == 2 and all(row["dead_groups"] == 0 for row in rows)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_warns_where_the_policy_in_the_prompt_does_not_help(folder, capsys):
    run(folder, "warned", steps=1, policy_rollouts=2, check=2)
    assert "is not above" in capsys.readouterr().err
    assert json.loads((folder / "warned" / "validation.jsonl").read_text().splitlines()[0])["with_policy"] == 0


def test_metrics_and_samples_tell_what_happened(folder):
    rewards = {"reward": "test_rl:vowels=2,format=0.5", "overlong": 2}
    (row, *_) = run(folder, "told", steps=1, policy_rollouts=2, samples_every=1, **rewards)
    for name in (
        "loss grad_norm reward reward/vowels reward/format accuracy accuracy_aware dead_groups entropy kl "
        "length length_max clipped_low clipped_high truncated rollout_train_difference failed"
    ).split():
        assert isinstance(row[name], (int, float)), name
    speed = json.loads((folder / "told" / "metrics.jsonl").read_text().splitlines()[0])["speed"]
    assert {"sample", "judge", "learn", "memory_gb"} <= set(speed)
    assert {"sample_tokens_per_second", "learn_tokens_per_second"} <= set(speed)
    assert abs(row["loss"]) < 0.1 and row["rollout_train_difference"] < 0.1  # banned words hold .02 of a random model
    (group,) = [json.loads(line) for line in (folder / "told" / "samples.jsonl").read_text().splitlines()]
    assert len(group["responses"]) == 10 and [r["aware"] for r in group["responses"]] == [False] * 8 + [True] * 2


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
@pytest.mark.parametrize("aware", [False, True])
def test_trainer_and_sampler_differ_by_the_mass_of_banned_words_alone(drawn, aware, shared_prefix):
    """log pi of the sampler is log pi of the trainer - log(1 - pi(banned)), behind the prompt of each half."""
    _, start, groups, processor = drawn
    data = Responses(groups, [0, 1, 2, 3], 1, torch.device("cpu"))
    rows = [n for n, was in enumerate(data.aware.tolist()) if was == aware]
    with torch.no_grad():
        logp, _, hidden = data.read(start, rows, 1.0, shared_prefix, processor.pad_id, policy=aware)
        left = (1 - start.logits(hidden).softmax(-1)[:, processor.banned_ids].sum(-1)).log()
    assert torch.allclose((logp - data.spread(rows, left)) * data.mask[rows], data.sampled[rows], atol=1e-5)
    assert (logp - data.sampled[rows]).abs().max() > 1e-3


def judged(groups, accuracies):
    """The groups with these accuracies, [[float] of each group]."""
    told = [torch.tensor(row, dtype=torch.float64)[:, None] for row in accuracies]
    return [dataclasses.replace(group, rewards=rewards) for group, rewards in zip(groups, told)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_dynamic_sampling_fills_a_step_alike_on_any_number_of_ranks(folder, drawn, world):
    """Groups that are all right or all wrong are dropped, wherever they come up; a NaN counts as wrong."""
    settings, groups = config(folder, algorithm="dapo"), drawn[2]
    mixed, right, wrong = [1.0, 0, 0, 1], [1.0] * 4, [0.0, 0, float("nan"), 0]
    drawn_batches = {5: [wrong, mixed, right, right], 6: [mixed, mixed, wrong, right], 7: [mixed, wrong, mixed, mixed]}
    common, found = {"values": [None] * world, "barrier": threading.Barrier(world)}, {}

    def work(rank):
        bench = Bench(settings, rank, world, common)
        rollout = SimpleNamespace(sampler=None, prefixes={"held": 1})
        sampler = Sampler(settings, bench, None, rollout, [], [None], tries=9)
        sampler.draw = lambda number: judged(groups, drawn_batches[number])[rank::world]
        data, cursor = sampler(5)
        assert cursor == 8 and not rollout.prefixes and (sampler.failed, sampler.judged) == (3, 48)
        A = credit(settings, bench, data, [(None, None, 1.0)], 0.0)[1]  # a rank may have no live group
        found[rank] = list(zip(data.places.tolist(), (group.item["id"] for group in data.groups))), len(A)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = sorted(place for row, _ in found.values() for place in row)
    names = [group.item["id"] for group in groups]
    assert places == [(0, names[1]), (1, names[0]), (2, names[1]), (3, names[0])]
    assert all(n == 4 * len(row) for row, n in found.values()) and (world < 4 or not found[3][0])


@pytest.mark.parametrize("reward", ["raises_sometimes", "hangs_once"])
def test_a_bad_reward_costs_its_response_only(folder, reward):
    calls[0] = 0
    rows = run(folder, reward, steps=3, reward=f"test_rl:{reward}", reward_seconds=0.2)
    assert 0 < sum(row["failed"] for row in rows) < 0.1 and len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)


def test_rewards_that_mostly_fail_stop_the_run_with_a_checkpoint(folder):
    calls[0] = 0
    with pytest.raises(InputError, match=r"of 32 rewards raised, hung or were no number, expected at most"):
        run(folder, "failing", steps=9, reward="test_rl:mostly_raises")
    assert list((folder / "failing" / "checkpoints").glob("step-*"))


def test_resuming_is_bit_equal(folder):
    """Seeds come from (seed, draw, item), the cursor of dynamic sampling from the checkpoint."""
    flags = dict(policy_rollouts=2, steps=4, algorithm="dapo", dynamic_tries=3, save_every=2, keep=9)
    through = run(folder, "through", **flags)
    run(folder, "broken", **flags)
    for path in (folder / "broken" / "checkpoints").glob("step-*4"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    again = run(folder, "broken", resume=True, **flags)
    strip = lambda rows: [{k: v for k, v in row.items() if k != "speed"} for row in rows]
    assert strip(again) == strip(through)


def test_k_zero_is_plain_grpo_bit_for_bit(folder, drawn):
    """The standard half is drawn from the same seeds with K and without, and learned alike when its advantages are."""
    model, _, groups, processor = drawn
    policies = load_policies(folder / "data")
    items = [group.item for group in groups]
    seeds = [[10 * i + k for k in range(4)] for i in range(4)]
    sampling = dict(max_tokens=6, stop_ids=list(range(60)), banned_ids=processor.banned_ids)
    plain = PolicyRollout(processor, policies, 2, 0, **sampling)(model, items, seeds)
    alone = sample(model, [g.prompt for g in groups], 2, seeds=[s[:2] for s in seeds], **sampling)
    assert [g.responses for g in plain] == alone and not any(any(g.aware) for g in plain)


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"group_size": 1, "policy_rollouts": 0}, "group of 2"),
        ({"policy_rollouts": -1}, "at least 0"),
        ({"reward": "nowhere:f"}, "No module"),
        ({"reward": "wrong"}, "no attribute"),
        ({"algorithm": "ppo"}, "expected one of"),
        ({"max_prompt": 5}, "expected at most --max-prompt 5"),
        ({"tracker": "wandb"}, "wandb"),
    ],
)
def test_bad_input_is_one_line(folder, flags, message):
    with pytest.raises(InputError, match=message):
        run(folder, "bad", overwrite=True, **flags)


def test_a_fork_of_twelve_lines(folder, tmp_path, monkeypatch):
    """tests/fork/topr.diff adds an objective to train_rl.py: it applies, runs and climbs. The README shows it."""
    patch = ROOT / "tests" / "fork" / "topr.diff"
    changed = [line for line in patch.read_text().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= 12
    (tmp_path / "train_rl.py").write_text((ROOT / "train_rl.py").read_text())
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("forked_train_rl", tmp_path / "train_rl.py")
    forked = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "forked_train_rl", forked)  # dataclasses look their module up
    spec.loader.exec_module(forked)
    monkeypatch.setitem(globals(), "train_rl", forked)
    rows = run(folder, "fork", algorithm="topr")
    assert rows[-1]["reward"] > 0.3 and "topr" not in LOSSES
