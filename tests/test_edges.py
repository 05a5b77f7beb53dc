"""Stage 3 at its edges: what ends epochs, what has no gradient, what fails, and what the log says of it."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_checkpoint
from rl_bench import READ, REWARDS, Bench, config, distance, draw, gradients, reader_folder, rl_folder, run
from small import metrics

import train_rl
from data import InputError
from rollout import Sampler, right_and_wrong
from support.batching import batches, collate, whole_batches
from train_rl import Learner, Loss, clipped
from train_sft import Replay
from training import Run
from variants import entropy, halves, icpo, noisy, opcd, which


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rl_folder(tmp_path_factory.mktemp("edges"))


@pytest.fixture(scope="module")
def drawn(folder):
    return draw(folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return reader_folder(tmp_path_factory.mktemp("edges-reader"))


# -- which queries, and which responses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items,batch,epochs,steps", [(20_000, 384, 2, 104), (451, 256, 50, 50), (16, 12, 3, 3), (4, 12, 3, 1)]
)
def test_an_epoch_is_as_many_whole_batches_as_it_has(items, batch, epochs, steps):
    """104 and 50 steps as in the paper; a batch holds no item twice unless there are fewer items than it wants."""
    run = SimpleNamespace(config=SimpleNamespace(steps=0, epochs=epochs, batch_size=batch))
    assert Run.total_steps(run, whole_batches(items, batch)) == steps
    for step in range(min(steps, 4)):
        ours = batches(items, batch, 0, step, whole=True)
        assert len(ours) == batch and len(set(ours)) == min(batch, items)
        assert sorted(ours) == sorted(sum((batches(items, batch, 0, step, r, 4, whole=True) for r in range(4)), []))
    if steps > 1:
        first = sum((batches(items, batch, 0, step, whole=True) for step in range(items // batch)), [])
        assert len(set(first)) == len(first)  # nor does an epoch


class Seeds:
    """A PolicyRollout that keeps what it is asked for."""

    G, K, sampler, processor = 2, 2, None, None

    def __init__(self):
        self.asked = []

    def scale(self, item):
        return item

    def __call__(self, model, items, seeds):
        self.asked += [(item, *row) for item, row in zip(items, seeds)]
        return []


def test_a_query_that_comes_twice_has_fresh_responses_on_any_number_of_ranks(folder):
    """Six places for four items: seeds belong to the place in the draw, not to the item."""
    settings, found = config(folder, batch_size=6), []
    for world in (1, 2, 3):
        seeds = Seeds()
        for rank in range(world):
            Sampler(settings, Bench(settings, rank, world), None, seeds, list("abcd"), [], 0).draw(3)
        found.append(sorted(seeds.asked))
        assert len({row[1:] for row in seeds.asked}) == 6 and len({row[0] for row in seeds.asked}) == 4
    assert found[0] == found[1] == found[2]
    seeds, settings = Seeds(), config(folder, batch_size=4)
    for number in range(20):
        Sampler(settings, Bench(settings), None, seeds, list("abcdef"), [], 0).draw(number)
        assert len({row[0] for row in seeds.asked[-4:]}) == 4  # where there are enough items, none comes twice


def test_dynamic_sampling_draws_a_mini_batch_at_a_time(folder):
    """As EasyR1 does: with 20 tries of a third of the batch a run ends at 15 % live groups instead of 5 %."""
    given = Bench(None), None, Seeds(), None, None
    size = lambda tries, **flags: Sampler(config(folder, batch_size=12, **flags), *given, tries).size
    assert (
        size(20, mini_batch=4) == 4 and size(20, mini_batch=0) == 12 and size(20) == 12 and size(0, mini_batch=4) == 12
    )


@pytest.mark.parametrize(
    "rewards,live",
    [
        ([[1, 1], [1, 1], [math.nan, 1]], False),
        ([[1, 1], [1, 1], [0, math.nan]], False),  # the wrong one is not learned from
        ([[math.nan, 0]] * 3, False),
        ([[1, 0], [1, 1], [1, 0]], False),  # accuracy alone counts
        ([[1, 0], [0, 1], [math.nan, 0]], True),
    ],
)
def test_a_failed_reward_makes_no_group_live(rewards, live):
    assert right_and_wrong(SimpleNamespace(rewards=torch.tensor(rewards, dtype=torch.float64))) is live


# -- what has no gradient ----------------------------------------------------------------------------------------------


def pulled(logp, logp_old, A, mask, clip):
    """A loss that pulls at every response, whatever its advantage."""
    return clipped(logp, logp_old, A, mask, clip) + 0.01 * logp.detach() * logp


@pytest.mark.parametrize("matters", [False, True])
def test_a_loss_says_whether_dead_groups_matter_to_it(folder, drawn, matters):
    """One rank or two, whole or split: what has no advantage is read where the loss says so, and nowhere else."""

    class Pulled(Learner):
        losses = {"grpo": Loss(pulled, without_advantage=matters)}

    method, dead = SimpleNamespace(Learner=Pulled), torch.zeros(16)
    found = [
        gradients(config(folder, micro_batch=size), drawn, method, world=world, A=dead)
        for size, world in ((16, 1), (3, 2))
    ]
    if matters:
        assert distance(*found) < 1e-6 and any(g.abs().sum() > 0 for g in found[0][0].values())
    else:
        assert found == [[{}], [{}]]


def test_weights_stay_where_there_is_nothing_to_learn(tmp_path):
    """Neither AdamW's momentum nor its decay moves them; a weight that nothing reached is one whose gradient is 0."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    run = object.__new__(Run)
    run.config = SimpleNamespace(max_grad_norm=1.0, lr=0.1, warmup=0, schedule="constant")
    run.fsdp, run.world, run.skipped, run.device = False, 1, 0, torch.device("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    weights = lambda: [p.detach().clone() for p in model.parameters()]

    def update(loss):
        before = weights()
        if loss is not None:
            loss.backward()
        run.reduce_gradients(model)
        norm = run.update(model, optimizer, 0, 9)
        return norm, [not torch.equal(a, b) for a, b in zip(before, weights())]

    x = torch.ones(1, 2)
    assert update(model["a"](x).sum() + model["b"](x).sum()) == (pytest.approx(math.sqrt(12)), [True] * 4)
    assert update(None) == (0.0, [False] * 4)
    assert update(0 * model["a"](x).sum()) == (0.0, [False] * 4)
    assert update(model["a"](x).sum())[1] == [True] * 4  # b's momentum goes on, as it does where another rank read b
    assert run.skipped == 0


@pytest.mark.parametrize(
    "method,flags", [(train_rl, {}), (opcd, {"top_tokens": 3}), (entropy, {}), (which, {"uncertain": 0.5})]
)
def test_micro_batches_without_rows_add_nothing(folder, drawn, monkeypatch, method, flags):
    """Under FSDP a rank with fewer of them than another, or with no group at all, reads a token of padding instead."""
    settings = config(folder, method, beta=0.1, inner_epochs=2, **flags)
    plain = gradients(settings, drawn, method, off_policy=True)
    parts = lambda self, rows, tokens: [rows[:0], *(rows[i : i + 4] for i in range(0, len(rows), 4)), rows[:0]]
    monkeypatch.setattr(Bench, "micro_batches", parts)
    assert distance(gradients(settings, drawn, method, world=5, off_policy=True), plain) < 1e-6
    batch = collate(pad_id=3)
    assert batch.input_ids.tolist() == [[3]] and len(batch.index) == 0 and int(batch.attention_mask.sum()) == 0


# -- what cannot learn is refused --------------------------------------------------------------------------------------

REFUSED = [
    (train_rl, dict(group_size=1, policy_rollouts=0), "found groups of 1 . 0 responses, expected 2 at least"),
    (train_rl, dict(frozen_sampler="base", policy_rollouts=0), "expected --policy-rollouts above 0"),
    (train_rl, dict(temperature=1e-300), "--temperature: found 1e-300, expected a finite number at least 0.01"),
    (train_rl, dict(reward="accuracy=nan"), "weight nan"),
    (train_rl, dict(reward="parse"), "'parse'"),
    (train_rl, dict(reward="load"), "'load'"),
    (opcd, dict(group_size=0), "found groups of 0 . 0 responses, expected 1 at least"),
    (halves, dict(ablate="statistics", group_size=1, policy_rollouts=1), "found halves of 1 and 1, expected 2"),
    (halves, dict(ablate="gradients", group_size=0, policy_rollouts=2), "found halves of 0 and 2, expected 1"),
    (icpo, dict(policy_rollouts=0), "expected policy-aware responses"),
    (noisy, dict(policy_rollouts=0), "expected responses to noised pictures"),
]


@pytest.mark.parametrize(
    "method,flags,line", REFUSED, ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else ""
)
def test_what_cannot_learn_is_refused(folder, method, flags, line):
    with pytest.raises(InputError, match=line):
        run(folder, "refused", method=method, steps=1, **flags)
    assert not (folder / "refused").exists()


# -- the start model ---------------------------------------------------------------------------------------------------


STARTS = {"full": {}, "lora": {"full": False, "lora_rank": 2}, "adapter": {"full": False}, "adapter, full": {}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", STARTS)
def test_the_reference_is_the_policy_at_the_first_step(folder, start, dtype):
    """To the bit, in bf16 too: what autocast makes of fp32 weights is what the reference stores."""
    flags = {**STARTS[start], "dtype": dtype, "beta": 0.1, "policy_rollouts": 2, "steps": 2, "mini_batch": 0}
    if "adapter" in start:
        if not (folder / "adapted").exists():
            run(folder, "adapted", full=False, lora_rank=2, lora_targets="q_proj,down_proj", steps=2)
        flags["init"] = folder / "adapted"
    rows = run(folder, f"start-{start}-{dtype}", **flags)
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0 and rows[0]["grad_norm"] > 0


# -- runs that are stopped ---------------------------------------------------------------------------------------------


def test_a_frozen_sampler_is_resumed_bit_for_bit(folder):
    """Its reading of a policy is kept for the whole run; read again after a resume, it has the same bits."""
    flags = dict(
        method=halves, ablate="ratio", frozen_sampler="start", group_size=3, policy_rollouts=3, steps=5, save_every=1
    )
    flags |= dict(keep=9, batch_size=3, max_response=6, lr=1e-3)
    run(folder, "frozen", **flags)
    weights = lambda name: (folder / name / "model" / "model.safetensors").read_bytes()
    for done in (1, 3):
        again = f"frozen-{done}"
        shutil.copytree(folder / "frozen", folder / again)
        shutil.rmtree(folder / again / "model")
        for step in range(done + 1, 6):
            shutil.rmtree(folder / again / "checkpoints" / f"step-{step:08d}")
        run(folder, again, resume=True, **flags)
        assert metrics(folder / again) == metrics(folder / "frozen") and weights(again) == weights("frozen")


# -- an honest log -----------------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_not_in_the_log(folder):
    """No reference, no policy-aware half, nothing learned: absent, where 0 would be a measurement. It is valid JSON."""
    (row,) = run(folder, "absent", steps=1, reward="accuracy")  # a random model: every group is dead
    absent = {"kl", "accuracy_aware", "reward_aware", "entropy", "clipped_low", "clipped_high_aware", "draws"}
    assert not absent & set(row) and row["dead_groups"] == 1 and row["grad_norm"] == 0 and row["accuracy"] == 0
    (row,) = run(folder, "present", steps=1, beta=0.1, policy_rollouts=2)
    assert absent - {"draws"} <= set(row)
    for path in folder.glob("*/*.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=lambda text: pytest.fail(f"{path}: {text}"))


def test_a_reward_that_fails_is_left_out_of_the_means(folder):
    """Of a function that is never a number nothing is told, and from its responses nothing is learned."""
    (row,) = run(folder, "nan", steps=1, reward=f"{REWARDS}:vowels,{REWARDS}:never=0.1")
    assert row["failed"] == 0.5 and "reward/never" not in row and "reward" not in row and 0 < row["reward/vowels"] < 1
    assert row["grad_norm"] == 0


def test_the_loss_is_a_mean_over_updates(folder, drawn):
    """More passes over the same responses tell the same loss while the weights stay."""

    def told(**flags):
        tallies = []

        class Told(Learner):
            def __call__(self, *args):
                tallies.append(super().__call__(*args))

        gradients(config(folder, beta=0.1, **flags), drawn, SimpleNamespace(Learner=Told))
        return tallies[0].over(Bench(None))["loss"]

    assert abs(told()) > 1e-3 and told(inner_epochs=4) == pytest.approx(told(), rel=1e-4)


def test_the_log_of_dynamic_sampling_tells_of_all_that_was_drawn(reader):
    """Kept groups are half right by nature: what the policy can do is told by all draws, and how many there were."""
    flags = {**READ, "steps": 2, "group_size": 0, "policy_rollouts": 4, "temperature": 1.5}
    rows = run(reader, "drawn", algorithm="dapo", **flags, dynamic_tries=20, mini_batch=2)
    for row in rows:
        assert row["dead_groups"] == 0 <= row["drawn_dead_groups"] < 1 and row["draws"] >= 2
        assert 0 < row["drawn_accuracy_aware"] < 1 and "drawn_accuracy" not in row


def test_the_check_before_training_asks_the_model_that_will_sample(reader, tmp_path, capsys):
    """A start that has lost all does not matter where the base writes the policy-aware half."""
    tiny_checkpoint(tmp_path / "damaged", width=64, layers=2, vision_width=16, vision_depth=2, scale=0.01, seed=5)
    flags = {**READ, "steps": 1, "check": 4, "policy_rollouts": 2, "init": tmp_path / "damaged"}
    run(reader, "asked", frozen_sampler="base", **flags)
    assert "is not above" not in capsys.readouterr().err
    told = json.loads((reader / "asked" / "validation.jsonl").read_text().splitlines()[0])
    assert told["with_policy"] == 1 and told["without_policy"] == 0
    run(reader, "asked itself", **flags)
    assert "is not above" in capsys.readouterr().err


# -- replay ------------------------------------------------------------------------------------------------------------


def test_replay_is_dealt_out_over_the_updates_of_a_step(folder):
    """Each item of the step's half once, over its three updates and two ranks; a rank may have none."""
    settings, asked = config(folder, batch_size=10, replay=folder / "data"), []

    class Examples:
        def __len__(self):
            return 7

        def encode(self, step, i):
            asked.append(i)
            return SimpleNamespace(input_ids=[0]), [0], [True]

    for rank in range(2):
        replay = object.__new__(Replay)
        replay.config, replay.run, replay.examples, replay.pad_id = settings, Bench(settings, rank, 2), Examples(), 0
        replay.run.micro_batches, replay.run.sum = lambda *_: [], lambda x: x
        for part in range(3):
            replay(None, 4, part, 3)
    assert sorted(asked) == sorted(batches(7, 5, 1, 4))
