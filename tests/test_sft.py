"""Stage 2: only the response is learned, and it is learned."""

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint
from PIL import Image
from small import arguments, metrics, quiet, small_data, write_lines

import evaluate
import train_sft
from data import clevr
from data.dataset import load_items, load_policies
from model import Processor, load_pretrained
from support.batching import collate, mixture, token_logprobs
from support.config import parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")
    return folder


def examples(folder, *flags):
    config = parse(
        train_sft.Config, "", ["--model", f"{folder}/model", "--data", f"{folder}/data", "--out", "x", *flags]
    )
    return train_sft.Examples(
        config.data, config.split, Processor.from_pretrained(config.model), config, config.policy_in_prompt
    )


def test_loss_is_cross_entropy_of_the_response_alone(folder):
    """By hand in float64: the prompt ends where the assistant's turn begins, and <|im_end|> belongs to the response."""
    model, rows = load_pretrained(folder / "model"), examples(folder)
    prompt, response, _ = rows.encode(0, 3)
    text = rows.processor.tokenizer.decode(response, skip_special_tokens=False)
    assert text == "<think>it is so so so </think>\\boxed{A}<|im_end|>"
    batch = collate([prompt], [response], pad_id=rows.processor.pad_id)
    logp, _ = token_logprobs(model, batch)
    logits = model.double().logits(model(batch.input_ids, None, batch.pixel_values.double(), batch.image_grid_thw))[0]
    n = len(prompt.input_ids)
    expected = logits.log_softmax(-1)[n - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
    assert len(logp) == len(response)
    assert torch.allclose(logp.double(), expected, atol=1e-5)


def test_the_policy_is_in_the_prompt_only_where_asked(folder):
    plain, aware = examples(folder), examples(folder, "--policy-in-prompt")
    assert "policy P1" not in plain.processor.decode(plain.encode(0, 0)[0].input_ids)
    assert "policy P1: red? yes: A, no: B" in aware.processor.decode(aware.encode(0, 0)[0].input_ids)
    assert plain.encode(0, 0)[1] == aware.encode(0, 0)[1]
    assert len(aware.encode(0, 1)[0].grid_thw) == 2  # P2 has a picture of its own


def test_answer_only_leaves_the_chain_of_thought_out(folder):
    rows = examples(folder, "--answer-only")
    assert rows.processor.decode(rows.encode(0, 3)[1]) == "\\boxed{A}"


def test_micro_batches_change_nothing_but_memory(folder):
    """A mean per micro-batch would weigh a token by its neighbours; the denominator here is the global batch's."""
    runs = []
    for size in (1, 2, 12):
        out = folder / f"micro-{size}"
        quiet(
            train_sft.main, arguments(folder / "model", folder / "data", out, steps=2, batch_size=12, micro_batch=size)
        )
        runs.append(metrics(out))
    for run in runs[1:]:
        for a, b in zip(runs[0], run):
            assert b == pytest.approx(a, rel=1e-6)


def test_replay_fills_its_share_of_every_batch():
    """Own items go through their epochs as without it; the stream of replayed ones has an order of its own."""
    config = parse(
        train_sft.Config,
        "",
        "--model m --data d --out o --replay r --replay-share .25 --batch-size 8 --epochs 1".split(),
    )
    chosen = [mixture(step, 12, 5, config) for step in range(2)]
    assert [sum(replayed for replayed, _ in batch) for batch in chosen] == [2, 2]
    assert sorted(i for batch in chosen for replayed, i in batch if not replayed) == list(range(12))


def test_an_adapter_is_continued_or_merged_by_the_next_stage(folder):
    """--init of a LoRA run: continued with --no-full; with --full merged first, so the first loss is the same."""
    first = folder / "first"
    quiet(train_sft.main, arguments(folder / "model", folder / "data", first, steps=3))
    for full in (False, True):
        out = folder / f"second-{full}"
        quiet(train_sft.main, arguments("unused", folder / "data", out, init=first, steps=3, full=full, seed=1))
        assert (out / ("model" if full else "adapter")).is_dir()
    adapter, merged = metrics(folder / "second-False"), metrics(folder / "second-True")
    fresh = folder / "fresh"
    quiet(train_sft.main, arguments(folder / "model", folder / "data", fresh, steps=3, seed=1))
    assert merged[0]["loss"] == pytest.approx(adapter[0]["loss"], rel=1e-5)
    assert merged[0]["loss"] < metrics(fresh)[0]["loss"] - 1e-4
    assert merged[2]["loss"] < merged[0]["loss"] - 0.1  # and the weights under the adapter do move


def test_sft_overfits_eight_real_examples_to_exact_greedy_answers(tmp_path):
    """Pictures of the renderer, a chain of thought and an answer each; greedy decoding gives every one back."""
    tiny_checkpoint(tmp_path / "model", width=96, scale=0.05)
    folder = small_data(tmp_path / "data", items=3)
    rows = []
    for i in range(8):
        scene = clevr.sample_scene(np.random.default_rng(i), objects=(1, 3), size=(112, 112))
        Image.fromarray(clevr.render(scene, (112, 112))[0]).save(folder / "images" / f"scene{i}.png")
        seen = " ".join(thing["color"] for thing in scene["objects"])
        rows.append(
            {
                "id": f"e{i}",
                "policy": "P1",
                "images": [f"images/scene{i}.png"],
                "question": "apply P1",
                "cot": seen,
                "answer": scene["objects"][0]["shape"],
            }
        )
    write_lines(folder / "sft.jsonl", rows)
    flags = dict(full=True, steps=120, lr=3e-3, warmup=10, schedule="linear", batch_size=8, micro_batch=8)
    quiet(train_sft.main, arguments(tmp_path / "model", folder, tmp_path / "run", **flags))
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < 0.02 < 3 < losses[0]
    model, processor = evaluate.load(tmp_path / "run")
    policies = load_policies(folder)
    row, records = evaluate.evaluate(
        model, processor, load_items(folder, "sft.jsonl", policies), policies, max_response=64
    )
    assert [record["response"] for record in records] == [
        f"<think>{r['cot']}</think>\\boxed{{{r['answer']}}}" for r in rows
    ]
    assert row["accuracy"] == row["format"] == row["exact_chain"] == row["finished"] == 1.0
