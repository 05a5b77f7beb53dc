"""Stage 3 as a whole: gradients that do not depend on how work is split, tasks that are learned, runs that survive."""

import copy
import dataclasses
import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from rl_bench import READ, REWARDS, Bench, config, distance, draw, gradients, reader_folder, rl_folder, run
from small import write_lines

import rollout
import train_rl
from data import InputError
from data.dataset import load_items, load_policies
from rollout import PolicyRollout, Responses, Sampler
from support import batching, pictures
from support.engine import sample
from train_rl import LOSSES
from training import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rl_folder(tmp_path_factory.mktemp("rl"))


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(folder):
    return draw(folder)


@pytest.mark.parametrize("algorithm", LOSSES)
def test_gradient_does_not_depend_on_how_the_work_is_split(folder, drawn, algorithm, monkeypatch):
    """Micro-batches of 1, 2, 4 and all, one rank and two, packed after the prompt or not: one number per loss."""
    found = lambda world=1, **flags: gradients(
        config(folder, algorithm=algorithm, **flags), drawn, world=world, off_policy=True
    )
    flags = dict(beta=0.05, inner_epochs=2)
    whole = found(micro_batch=16, **flags)
    assert len(whole) == 2 and all(g.abs().sum() > 0 for n, g in whole[0].items() if "layers.0.mlp" in n)
    splits = [{"micro_batch": 1}, {"micro_batch": 3}, {"micro_batch": 4, "world": 2}]
    for split in splits if algorithm in ("grpo", "dapo") else splits[1:]:
        for packed in (True, False) if algorithm == "grpo" else (False,):
            monkeypatch.setattr(batching, "packing_pays", lambda *_, packed=packed: packed)
            assert distance(found(**flags, **split), whole) < 1e-6, (split, packed)
    if algorithm in ("dapo", "bnpo"):  # with mini-batches the two denominators differ, and each is still global
        mini = found(micro_batch=16, mini_batch=2)
        assert distance(found(micro_batch=2, mini_batch=2, world=2), mini) < 1e-6


def logprobs(model, prompt, tokens):
    """log p (R,) of a response by one forward pass over prompt and response: no cache, no packing."""
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens)])[None]
    hidden = model(ids, None, prompt.pixel_values, prompt.grid_thw)[0, len(prompt.input_ids) - 1 : -1]
    return model.logits(hidden).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def test_kl_term_is_k3_to_the_start_model(folder, drawn):
    """With no advantages, the gradient is that of beta times the mean of k3, for every response given x alone."""
    model, start, groups, processor = drawn
    (found,) = gradients(config(folder, algorithm="grpo", beta=0.7, micro_batch=4), drawn, A=torch.zeros(16))
    learner = copy.deepcopy(model)
    for group in groups:
        for response in group.responses:
            with torch.no_grad():
                reference = logprobs(start, group.prompt, response.tokens)
            d = reference - logprobs(learner, group.prompt, response.tokens)
            (0.7 / 16 * (d.exp() - d - 1).mean()).backward()
    expected = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
    assert distance([found], [expected]) < 1e-4


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", LOSSES)
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
    return reader_folder(tmp_path_factory.mktemp("reader"))


def test_policy_rollout_learns_what_stands_only_in_the_policy(reader):
    """The policy-aware half finds the answer and the group's mean carries it over; the metrics show both halves."""
    rows = run(reader, "poro", policy_rollouts=4, validate_every=15, **READ)
    assert rows[0]["accuracy"] == 0 and rows[0]["accuracy_aware"] > 0.5 and rows[0]["dead_groups"] < 1
    assert rows[-1]["accuracy"] > 0.6
    assert json.loads((reader / "poro" / "validation.jsonl").read_text().splitlines()[-1])["accuracy"] == 1


def test_grpo_at_equal_cost_stays_at_chance(reader):
    rows = run(reader, "grpo", **{**READ, "group_size": 8})
    assert rows[-1]["accuracy"] == 0 and all(row["dead_groups"] == 1 for row in rows)


@pytest.mark.parametrize(
    "flags",
    [
        {"frozen_sampler": "start"},
        {"frozen_sampler": "base"},
        {"beta": 0.01},
        {"full": False, "beta": 0.01, "lora_rank": 2},
    ],
)
def test_options_of_the_policy_aware_half_run_and_say_what_they_do(reader, flags):
    rows = run(
        reader, "-".join(map(str, [*flags, *flags.values()])), policy_rollouts=4, **{**READ, "steps": 3, **flags}
    )
    assert all(row["grad_norm"] > 0 for row in rows) and rows[0]["accuracy_aware"] > 0.5
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
    rewards = {"reward": f"{REWARDS}:vowels=2,format=0.5", "overlong": 2}
    (row, *_) = run(folder, "told", steps=1, policy_rollouts=2, **rewards)
    for name in (
        "loss grad_norm reward reward/vowels reward/format accuracy accuracy_aware dead_groups entropy "
        "length length_max clipped_low clipped_high clipped_low_aware clipped_high_aware truncated "
        "rollout_train_difference failed"
    ).split():
        assert isinstance(row[name], (int, float)), name
    speed = json.loads((folder / "told" / "metrics.jsonl").read_text().splitlines()[0])["speed"]
    assert {"sample", "judge", "learn", "memory_gb"} <= set(speed)
    assert {"sample_tokens_per_second", "learn_tokens_per_second"} <= set(speed)
    assert abs(row["loss"]) < 0.1 and row["rollout_train_difference"] < 0.1  # banned words hold .02 of a random model
    (group,) = [json.loads(line) for line in (folder / "told" / "samples.jsonl").read_text().splitlines()]
    assert len(group["responses"]) == 10 and [r["aware"] for r in group["responses"]] == [False] * 8 + [True] * 2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("aware", [False, True])
def test_trainer_and_sampler_differ_by_the_mass_of_banned_tokens_alone(drawn, aware, packed, monkeypatch):
    """logp_sampler is log pi of the trainer - log(1 - pi(banned)), given the prompt of each half."""
    _, start, groups, processor = drawn
    monkeypatch.setattr(batching, "packing_pays", lambda *_: packed)
    data = Responses(groups, [0, 1, 2, 3], 1, torch.device("cpu"))
    data.A = torch.zeros(16)
    micro = data.take([n for n, was in enumerate(data.aware.tolist()) if was == aware])
    with torch.no_grad():
        logp, _, hidden = micro.read(start, 1.0, processor.pad_id, with_policy=aware)
        left = (1 - start.logits(hidden).softmax(-1)[:, processor.banned_ids].sum(-1)).log()
    assert torch.allclose((logp - micro.spread(left)) * micro.mask, micro.logp_sampler, atol=1e-5)
    assert (logp - micro.logp_sampler).abs().max() > 1e-3


def test_rows_that_pad_the_embedding_have_no_probability_in_rl(folder, drawn):
    """The sampler never draws them, so the loss gives them nothing either: logp is that of the rows that are tokens.

    Nothing reaches their weights, in the head as the head.
    """
    _, start, groups, processor = drawn
    assert start.vocabulary == start.config.vocab_size > processor.vocabulary
    data, model = Responses(groups, [0, 1, 2, 3], 1, torch.device("cpu")), copy.deepcopy(start)
    data.A = torch.zeros(16)
    with Run(config(folder), stage="rl") as run:
        assert run.load()[0].vocabulary == processor.vocabulary
    model.vocabulary, micro = processor.vocabulary, data.take([0, 1])
    logp, _, hidden = micro.read(model, 1.0, processor.pad_id)
    exact = model.logits(hidden)[:, : processor.vocabulary].double().log_softmax(-1)
    tokens = torch.tensor([t for response in data.list[:2] for t in response.tokens])
    assert torch.allclose(micro.spread(exact.gather(1, tokens[:, None])[:, 0]).float(), logp, atol=1e-5)
    (gradient,) = torch.autograd.grad(logp.sum(), [model.head_weight])
    assert not gradient[processor.vocabulary :].any() and gradient[: processor.vocabulary].abs().sum() > 0


def test_pictures_are_read_a_draw_ahead_and_change_nothing(folder, drawn, monkeypatch):
    """In threads while the draw before is being written, each once; groups keep the items, not their patches."""
    model, _, _, processor = drawn
    policies, opened = load_policies(folder / "data"), []
    items = load_items(folder / "data", "rl.jsonl", policies)[:4]
    monkeypatch.setattr(rollout, "judge", lambda groups, *_: groups)
    monkeypatch.setattr(rollout.qwen, "open_image", lambda path: opened.append(path) or pictures.open_image(path))
    found, counts = [], []
    for workers in 0, 2:
        bench, kinds = Bench(config(folder, batch_size=2)), dict(max_tokens=4, stop_ids=list(range(60)))
        bench.workers = workers
        sampler = Sampler(bench.config, bench, model, PolicyRollout(processor, policies, 1, 1, **kinds), items, [], 0)
        found.append([[(group.item, group.responses) for group in sampler.draw(number)] for number in range(2)])
        ahead = [future.result() for future in sampler.scaled.futures.get(2, [])]  # of a third draw
        counts.append(len(opened) - sum(len(item["images"]) for item in ahead))
    assert found[0] == found[1] and isinstance(found[0][0][0][0]["images"][0], str)
    assert len(ahead) == 2 and counts[1] == 2 * counts[0]


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
        rollout = SimpleNamespace(sampler=None, prefixes={"held": 1}, scale=None)
        sampler = Sampler(settings, bench, None, rollout, [], [None], tries=9)
        sampler.draw = lambda number: judged(groups, drawn_batches[number])[rank::world]
        data, cursor = sampler(5)
        assert (
            cursor == 8
            and not rollout.prefixes
            and sampler.drawn
            == {
                "failed": 3 / 48,  # and NaN is no wrong answer
                "drawn_accuracy": 12 / 24,
                "drawn_accuracy_aware": 12 / 21,
                "drawn_dead_groups": 6 / 12,
                "draws": 3,
            }
        )
        learner = train_rl.Learner(settings, bench, None, None, None, [(None, None, 1.0)], None, 0)
        A = learner.credit(data, 0.0)[1]  # a rank may have no live group
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


@pytest.mark.parametrize("reward", ["raises_sometimes", "hangs_at_times"])
def test_a_bad_reward_costs_its_response_only(folder, reward):
    rows = run(folder, reward, steps=3, reward=f"{REWARDS}:{reward}", reward_seconds=1)
    assert 0 < sum(row["failed"] for row in rows) < 0.3 and len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)


def test_rewards_that_mostly_fail_stop_the_run_with_a_checkpoint(folder):
    with pytest.raises(
        InputError, match=r"of the rewards that failed \(\d+ x AssertionError in mostly_raises\), expected at most"
    ):
        run(folder, "failing", steps=9, reward=f"{REWARDS}:mostly_raises")
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
    shutil.rmtree(folder / "broken" / "model")  # a kill came before the end
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
        ({"group_size": 1, "policy_rollouts": 0}, "groups of 1 . 0 responses, expected 2"),
        ({"policy_rollouts": -1}, "at least 0"),
        ({"reward": "nowhere:f"}, "No module"),
        ({"reward": "wrong"}, "no reward"),
        ({"algorithm": "ppo"}, "expected one of"),
        ({"max_prompt": 5}, "expected at most --max-prompt 5"),
        ({"tracker": "wandb"}, "wandb"),
    ],
)
def test_bad_input_is_one_line(folder, flags, message):
    with pytest.raises(InputError, match=message):
        run(folder, "bad", overwrite=True, **flags)
