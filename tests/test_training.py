"""What the three stages share: config, batches, the optimiser's step, the run's folder."""

import json
import math
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_checkpoint
from small import ROOT, arguments, metrics, quiet, small_data, start

import model as qwen
import train_cpt
import train_sft
from data import InputError
from rollout import Responses
from support.batching import Ahead, batches, collate, lay_out, padded_tokens, read_together, rng, share, token_logprobs
from support.checkpoint import cut_logs
from support.config import CommonConfig, parse
from support.folder import LOGS
from training import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """A run on the tiny model, its folder new."""
    words = arguments(folder / "model", folder / "data", tmp_path / "run", steps=10)
    with Run(parse(CommonConfig, "", words), stage="test") as run:
        yield run


# -- config


def test_flags_win_over_the_config_file_and_that_over_the_defaults(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"lr": 3e-4, "steps": 7, "full": False, "model": "m", "data": "d"}))
    config = parse(CommonConfig, "", ["--config", str(path), "--out", "o", "--steps", "9"])
    assert (config.lr, config.steps, config.full, config.batch_size) == (3e-4, 9, False, 128)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse(train_cpt.Config, train_cpt.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert "--mask-visual" in text and "default: 1e-05" in text and "VM-CPT" in text
    assert all(field.metadata["help"] for field in train_cpt.Config.__dataclass_fields__.values())


def test_an_integer_in_json_is_a_float_and_a_float_is_no_integer(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"lr": 1, "model": "m", "data": "d", "out": "o"}')
    assert parse(CommonConfig, "", ["--config", str(path)]).lr == 1.0
    path.write_text('{"steps": 2.5, "model": "m", "data": "d", "out": "o"}')
    with pytest.raises(InputError, match="--steps: found 2.5, expected an int"):
        parse(CommonConfig, "", ["--config", str(path)])


# -- batches


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_holds_every_item_once_on_any_number_of_ranks(world):
    """No item is dropped where 10 do not divide into 4, and none repeated: the next epoch fills the batch."""
    stream = [[i for rank in range(world) for i in batches(10, 4, 0, step, rank, world)] for step in range(5)]
    flat = [i for step in range(5) for i in batches(10, 4, 0, step)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert [sorted(batch) for batch in stream] == [sorted(batches(10, 4, 0, step)) for step in range(5)]


def test_the_last_batch_is_short_rather_than_dropped():
    assert [len(batches(10, 4, 0, step, limit=10)) for step in range(4)] == [4, 4, 2, 0]


def test_shares_are_equal_in_number_nearly_in_size_and_hold_everything():
    sizes = [int(x) for x in rng(0).integers(1, 1000, 64)]
    parts = [share(list(range(64)), sizes, rank, 4) for rank in range(4)]
    assert sorted(sum(parts, [])) == list(range(64))
    assert {len(part) for part in parts} == {16}
    loads = [sum(sizes[i] for i in part) for part in parts]
    assert max(loads) < 1.03 * min(loads)


def test_micro_batches_hold_what_fits_and_no_less():
    """In order, each row once; none above the tokens of --micro-batch longest rows, none that had room for the next.

    Where weights are sharded every rank reads as often as the busiest.
    """
    random = rng(5)
    for _ in range(200):
        lengths, size = random.integers(1, 50, random.integers(0, 20)).tolist(), int(random.integers(1, 5))
        padded, most = lambda part: len(part) * max(part), size * max(lengths, default=0)
        run = SimpleNamespace(config=SimpleNamespace(micro_batch=size), fsdp=False)
        parts = Run.micro_batches(run, lengths, padded)
        assert sum(parts, []) == lengths and all(parts)
        assert all(padded(part) <= most for part in parts)
        assert all(padded([*part, after[0]]) > most for part, after in zip(parts, parts[1:]))
        run.fsdp, run.max = True, lambda own: own + 2
        assert Run.micro_batches(run, lengths, padded) == [*parts, [], []]


@pytest.mark.parametrize("responses", [1, 6])
def test_tokens_of_a_micro_batch_are_those_that_the_model_reads(folder, responses):
    """Padding included, packed (six after one prompt) or not: what is counted is what takes memory."""
    model = qwen.load_pretrained(folder / "model")
    words = lambda n: torch.arange(n) + 10
    prompts = [qwen.Encoded(words(n), None, None) for n in (40, 55)]
    pairs = [(prompt, words(3 + i)) for prompt in prompts for i in range(responses)]
    batch = lay_out(model, pairs, 0)
    assert (batch.parts is None) == (responses == 1)
    assert padded_tokens(model, pairs) == batch.input_ids.numel()


def test_responses_are_read_with_others_of_their_length_or_of_their_prompt(folder):
    """Rows of all lengths in one pass are mostly padding; where a prompt is long, its responses share it instead."""
    model, random = qwen.load_pretrained(folder / "model"), rng(1)
    run = SimpleNamespace(config=SimpleNamespace(micro_batch=2), fsdp=False)
    run.micro_batches = lambda rows, tokens: Run.micro_batches(run, rows, tokens)
    words = lambda n: torch.arange(n) % 90 + 10
    for prompt, responses in ((6, 8), (200, 8)):
        prompts = [qwen.Encoded(words(prompt), None, None) for _ in range(4)]
        lengths = random.integers(2, 60, 4 * responses).tolist()
        pairs = {3 * n: (prompts[n // responses], words(length)) for n, length in enumerate(lengths)}
        parts = read_together(run, model, pairs)
        order = sum(parts, [])
        if prompt > 100:
            assert order == [*pairs]
        else:
            assert order == sorted(pairs, key=lambda n: len(pairs[n][1]))
            padded = sum(len(part) * max(len(pairs[n][1]) for n in part) for part in parts)
            assert padded < 1.25 * sum(lengths) and len(parts) < len(pairs) / 2


def test_what_is_also_read_behind_its_policy_is_split_by_that_length(folder):
    """A teacher's prompt is the policy's tokens longer: passes sized without it would hold many times --micro-batch."""
    model, data, most = qwen.load_pretrained(folder / "model"), object.__new__(Responses), 2
    run = SimpleNamespace(config=SimpleNamespace(micro_batch=most), fsdp=False)
    run.micro_batches = lambda rows, tokens: Run.micro_batches(run, rows, tokens)
    words = lambda n: torch.arange(n) % 90 + 10
    data.list = [words(length) for length in (60, 3, 4, 5, 6, 7, 8, 9)]
    data.groups = [
        SimpleNamespace(prompt=qwen.Encoded(words(5), None, None), policy_prompt=qwen.Encoded(words(500), None, None))
        for _ in data.list
    ]
    data.rows = [(g, 0) for g in range(len(data.list))]
    for with_policy, rows in ((False, 7), (True, most)):
        parts = data.micro_batches(run, model, torch.ones(8), with_policy)
        assert sorted(sum(parts, [])) == list(range(8)) and max(map(len, parts)) == rows


def test_reading_ahead_gives_what_reading_in_line_gives():
    keys = lambda step: [(step, i) for i in range(3)]
    line, threads = Ahead(keys, lambda a, b: 10 * a + b, 0), Ahead(keys, lambda a, b: 10 * a + b, 2)
    assert (
        [line(step) for step in (2, 3, 4)]
        == [threads(step) for step in (2, 3, 4)]
        == [[20, 21, 22], [30, 31, 32], [40, 41, 42]]
    )


def test_reading_ahead_passes_an_input_error_on():
    ahead = Ahead(lambda step: [(step,)], lambda step: (_ for _ in ()).throw(InputError("bad picture")), 1)
    with pytest.raises(InputError, match="bad picture"):
        ahead(0)


def text(*ids):
    return qwen.Encoded(torch.tensor(ids), None, None)


def test_labels_are_the_next_tokens_of_the_response_only():
    batch = collate([text(5, 6, 7), text(8)], [[1, 2], torch.tensor([3])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2], [8, 3, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 1, 2, -100], [3, -100, -100, -100, -100]]
    assert batch.index.tolist() == [2, 3, 5]


def test_log_probabilities_are_those_of_the_whole_distribution(folder):
    """Against log_softmax of every logit, row by row without padding."""
    model = qwen.load_pretrained(folder / "model")
    rows = [([5, 6, 7], [1, 2]), ([8], [3]), ([9, 10], [4, 5, 6])]
    logp, entropy = token_logprobs(
        model, collate([text(*p) for p, _ in rows], [r for _, r in rows], pad_id=0), temperature=0.7, entropy=True
    )
    expected, entropies = [], []
    for prompt, response in rows:
        full = (model.logits(model(torch.tensor([prompt + response])))[0] / 0.7).log_softmax(-1)
        expected += [full[len(prompt) + i - 1, token] for i, token in enumerate(response)]
        entropies += [
            -(full[len(prompt) + i - 1].exp() * full[len(prompt) + i - 1]).sum() for i in range(len(response))
        ]
    assert torch.allclose(logp, torch.stack(expected), atol=1e-5)
    assert torch.allclose(entropy, torch.stack(entropies), atol=1e-4)


# -- the step


def test_learning_rates_warm_up_and_fall(run):
    for schedule, half, last in (("constant", 1, 1), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.024)):
        run.config.schedule, run.config.warmup = schedule, 0
        assert run.learning_rate(5, 10) / 1e-3 == pytest.approx(half)
        assert run.learning_rate(9, 10) / 1e-3 == pytest.approx(last, abs=1e-3)
    run.config.schedule, run.config.warmup = "constant", 3
    assert [round(run.learning_rate(step, 10) / 1e-3, 2) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_gradients_are_clipped_to_their_norm(run):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    for p in model.parameters():
        p.grad = torch.full_like(p, 10.0)
    run.config.lr, run.config.max_grad_norm = 1.0, 0.5
    assert run.update(model, optimizer, 0, 1) == pytest.approx(10 * math.sqrt(6))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm() == pytest.approx(0.5, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_costs_its_step_and_too_many_the_run(run, value):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    before = model.weight.detach().clone()

    def poisoned(step):
        model.weight.grad, model.bias.grad = torch.full((2, 2), value), torch.ones(2)
        run.update(model, optimizer, step, 100)

    poisoned(0)
    assert torch.equal(model.weight, before) and run.skipped == 1 and not optimizer.state
    with pytest.raises(InputError, match="2 of 2 updates were skipped"):
        poisoned(1)


@pytest.mark.parametrize("full", [True, False])
def test_sampling_in_bfloat16_leaves_the_weights_as_they_were(run, full):
    """Full: float32 weights are cast for the phase; LoRA: the frozen ones are bfloat16, the adapter is not cast."""
    run.dtype, run.config.full = torch.bfloat16, full
    model, _ = run.load()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with run.gathered(model) as half:
        assert half.head_weight.dtype == torch.bfloat16 and not half.training
        half(torch.tensor([[1, 2, 3]]))
    assert model.training
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) and torch.equal(p, before[name])


def test_bfloat16_products_train_float32_weights(folder, tmp_path):
    words = arguments(folder / "model", folder / "data", tmp_path / "half", steps=2, full=True, dtype="bfloat16")
    quiet(train_sft.main, words)
    quiet(train_sft.main, arguments(folder / "model", folder / "data", tmp_path / "whole", steps=2, full=True))
    half, whole = metrics(tmp_path / "half"), metrics(tmp_path / "whole")
    assert half[1]["loss"] == pytest.approx(whole[1]["loss"], rel=0.02) and half[1]["loss"] != whole[1]["loss"]


def test_weight_decay_spares_norms_and_biases(run):
    model, _ = run.load()
    matrices, others = run.optimizer(model).param_groups
    assert (
        matrices["weight_decay"] == 0.01 and others["weight_decay"] == 0 and {p.ndim for p in others["params"]} == {1}
    )


def test_gradient_checkpointing_changes_memory_not_gradients(folder, tmp_path):
    for name, flag in (("kept", False), ("again", True)):
        quiet(
            train_cpt.main,
            arguments(folder / "model", folder / "data", tmp_path / name, steps=2, gradient_checkpointing=flag),
        )
    for a, b in zip(metrics(tmp_path / "kept"), metrics(tmp_path / "again")):
        assert b == pytest.approx(a, rel=1e-6)


# -- the folder


def test_two_processes_cannot_write_one_run(run):
    with pytest.raises(InputError, match="another process is writing"):
        with Run(run.config, stage="test"):
            pass


@pytest.mark.parametrize(
    "torn", ['{"st', "[1]\n", "7\n", '{"step": "x"}\n', "\udcff\n", "[" * 100_000 + "\n", '{"step": NaN}\n']
)
def test_logs_are_cut_where_a_run_goes_on_and_what_is_no_row_is_dropped(tmp_path, torn):
    """And a file of the user's beside them stays as it is."""
    text = f'{{"step": 0}}\n{torn}\n{{"step": 1}}\n{{"step": 2}}\n{torn}'
    for name in ("metrics.jsonl", "notes.jsonl"):
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    cut_logs(tmp_path, LOGS, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
    assert (tmp_path / "notes.jsonl").read_bytes() == text.encode(errors="surrogateescape")


def test_a_second_interrupt_ends_the_process_at_once(folder, tmp_path):
    """The first one waits for the end of the step; a user who sends another does not want to wait."""
    code = "import sys, time, train_sft, training\n"
    code += "training.Run.report = lambda *a, **k: (print('step', flush=True), time.sleep(60))\n"
    code += "heard = training.Run._on_signal\n"
    code += "training.Run._on_signal = lambda *a: (heard(*a), print('heard', flush=True))\n"
    words = arguments(folder / "model", folder / "data", tmp_path / "run", steps=3)
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}train_sft.main(sys.argv[1:])", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "step\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "heard\n"  # two signals at once would be one, on a machine too busy to see both
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == -signal.SIGINT


def test_a_sharded_model_starts_from_an_adapter_and_is_never_whole(tmp_path):
    """--init of a LoRA run with --full under FSDP: each rank adds its rows of B A to those of W, as merging does."""
    import torch.distributed as dist

    from support.sharding import shard

    base = tiny_checkpoint(tmp_path / "model", layers=1, vision_depth=2)
    tuned = qwen.add_lora(qwen.load_pretrained(base), 4, 8.0)
    for layer in qwen.lora_layers(tuned).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    qwen.save_adapter(tuned, tmp_path / "adapter")
    qwen.merge_lora(tuned)
    expected = {name: p.detach() for name, p in tuned.named_parameters() if ".lora_" not in name}

    def work():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = qwen.load_pretrained(base, "meta")
        shard(model, torch.device("cpu"), torch.float32, 0, 1, tmp_path / "adapter")
        found = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
        for name, right in expected.items():
            torch.testing.assert_close(found[name], right, atol=1e-6, rtol=1e-6)

    process = start(work, tmp_path / "log")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
