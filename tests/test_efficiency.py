"""FLOPs agree with PyTorch's own count, savings with what is saved, and a kept policy answers as a policy read anew."""

import json

import pytest
import torch
from helpers import tiny_checkpoint
from small import small_data
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.efficiency import (
    Cache,
    Lengths,
    grids_of,
    kept_policy,
    main,
    price,
    query_flops,
    read,
    read_run,
    text_flops,
    training_flops,
    vision_flops,
)
from data import InputError
from data.dataset import load_items, load_policies, messages
from evaluate import load


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("efficiency")
    folder = tiny_checkpoint(root / "model", vision_width=64)
    data = small_data(root / "data")
    policies = load_policies(data)
    return (folder, data, policies, load_items(data, "test.jsonl", policies), *load(str(folder), device="cpu"))


def test_flops_agree_with_pytorchs_count(world):
    """To the last product: PyTorch counts what causality masks, too, so that half is added to ours."""
    *_, policies, items, model, processor = world
    encoded = processor.encode(messages(items[1], policies["P2"]), add_generation_prompt=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        read(model, encoded, Cache())
    config, T = model.config, len(encoded.input_ids)
    masked = 4 * config.num_attention_heads * config.head_dim * T * (T - 1) / 2 * config.num_hidden_layers
    assert text_flops(config, T) + masked + vision_flops(config, grids_of(encoded)) == counter.get_total_flops()


def test_reading_in_parts_costs_the_same(world):
    config = world[-2].config
    assert text_flops(config, 30, 0, 1) == pytest.approx(text_flops(config, 20, 0, 0) + text_flops(config, 10, 20, 1))


def test_a_kept_policy_gives_the_same_hidden_states(world):
    """Also where the policy has a picture of its own."""
    *_, policies, items, model, processor = world
    for item in items[:4]:
        encoded = processor.encode(messages(item, policies[item["policy"]]), add_generation_prompt=True)
        fresh, length, pictures = kept_policy(model, processor, policies[item["policy"]], encoded)
        assert pictures == len(policies[item["policy"]]["images"]) and length > 20
        whole, rest = Cache(), fresh()
        assert read(model, encoded, whole) == read(model, encoded, rest, length, pictures)
        assert whole.length == rest.length == len(encoded.input_ids)
        for (k, v), (k2, v2) in zip(whole.held.values(), rest.held.values()):
            torch.testing.assert_close(k, k2, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(v, v2, atol=1e-4, rtol=1e-4)
        assert fresh().length == length  # a query leaves nothing behind


def test_costs_grow_with_what_is_done(world):
    folder, data, policies, items, model, processor = world
    lengths, config = Lengths(processor, data, "test.jsonl"), model.config
    assert lengths.policy > 0 and len(lengths.policy_grids) == sum(item["policy"] == "P2" for item in items)
    without, kept, anew = (query_flops(config, lengths, 20, *way) for way in ((False,), (True, True), (True, False)))
    assert without < kept < anew
    cost = lambda stage, **more: training_flops(config, {"stage": stage, **more}, lengths, 10, 8, 20)
    assert cost("sft", full=False) == pytest.approx(cost("sft") * 2 / 3) and cost("sft") < cost("cpt")
    assert cost("sft", gradient_checkpointing=True) == pytest.approx(cost("sft") * 4 / 3)
    plain, aware = (cost("rl", group_size=4, policy_rollouts=k) for k in (0, 4))
    assert cost("sft") * 4 < plain < aware / 2  # the aware half also reads the policy


def test_runs_are_priced_from_their_own_records(world, tmp_path):
    folder, data, *_, model, processor = world
    run = tmp_path / "rl"
    run.mkdir()
    config = {
        "stage": "rl",
        "data": str(data),
        "split": "rl.jsonl",
        "batch_size": 6,
        "group_size": 3,
        "policy_rollouts": 3,
        "full": True,
    }
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": k, "length": 10 + k / 2}) + "\n" for k in range(5)))
    (stage,) = price(model.config, processor, [str(run)], str(data))
    assert stage["items"] == 30 and stage["response_tokens"] == 11
    assert read_run(str(run))[1] == 5
    for name, text in (("config.json", "{}"), ("metrics.jsonl", "")):
        kept = (run / name).read_text()
        (run / name).write_text(text)
        with pytest.raises(InputError, match="found no run"):
            read_run(str(run))
        (run / name).write_text(kept)
    with pytest.raises(InputError, match="expected a run"):
        read_run(str(tmp_path / "gone"))


def test_the_command_reports_what_is_saved(world, tmp_path, capsys):
    folder, data, *_ = world
    out = tmp_path / "efficiency.json"
    main(
        [
            "--model",
            str(folder),
            "--data",
            str(data),
            "--queries",
            "3",
            "--new-tokens",
            "3",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
    )
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    ways = result["ways"]
    assert ways["without P"]["prompt_tokens"] < ways["with P"]["prompt_tokens"]
    assert all(row["first_token_ms"] > 0 and row["tokens_per_second"] > 0 for row in ways.values())
    saved = ways["with P"]["flops_per_query"] - ways["without P"]["flops_per_query"]
    assert result["paid_after_queries"]["with P"] == pytest.approx(result["training_flops"] / saved)
    assert result["paid_after_queries"]["with P, kept"] > result["paid_after_queries"]["with P"]
    assert "paid after" in printed and f"{result['saved']['prompt_tokens']:.1%}" in printed
    with pytest.raises(InputError, match="--new-tokens 1"):
        main(["--model", str(folder), "--data", str(data), "--new-tokens", "1"])
