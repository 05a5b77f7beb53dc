"""The figures that all comparisons rest on: known responses, known scores."""

import json

import pytest
import torch
from helpers import oracle, oracle_inputs, picture, question, tiny_checkpoint
from small import small_data, write_lines

import evaluate
import model as qwen
from data import InputError
from data.dataset import load_items, load_policies, messages
from rollout import PolicyRollout
from support.stock import DEFAULTS, generate, read_generation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")
    return folder


@pytest.fixture
def says(monkeypatch):
    """Put words into the model's mouth: item after item, in the order of evaluation (by policy)."""
    prompt = qwen.Encoded(torch.zeros(50, dtype=torch.long), None, None)
    return lambda texts: monkeypatch.setattr(
        evaluate, "respond", lambda model, rollout, items, *rest: [(texts.pop(0), prompt, 7, True) for _ in items]
    )


def words(folder, *flags):
    return [
        "--model",
        f"{folder}/model",
        "--data",
        f"{folder}/data",
        "--out",
        f"{folder}/out",
        "--device",
        "cpu",
        *flags,
    ]


def test_wilson_intervals_known_from_tables():
    """Newcombe (1998), table I: 81/263 and 0/20."""
    assert evaluate.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert evaluate.wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert evaluate.wilson(20, 20)[1] == 1.0 and evaluate.wilson(0, 0) == [0.0, 1.0]


def test_accuracy_format_and_chains_of_known_responses(folder, says):
    policies = load_policies(folder / "data")
    items = [item for item in load_items(folder / "data", "test.jsonl", policies) if item["policy"] == "P1"][:4]
    exact = "<think>{cot}</think>\\boxed{{{answer}}}".format(**items[0])
    says(
        [
            exact,
            f"<think>other</think>\\boxed{{{items[1]['answer']}}}",
            f"so: \\boxed{{{items[2]['answer']}}}",
            "<think>lost",
        ]
    )
    model, processor = evaluate.load(folder / "model", device="cpu")
    row, records = evaluate.evaluate(model, processor, items, policies)
    assert (row["accuracy"], row["format"], row["exact_chain"], row["n"]) == (0.75, 0.5, 0.25, 4)
    assert [record["correct"] for record in records] == [1, 1, 1, 0] and records[3]["parsed"] is None
    assert row["interval"] == evaluate.wilson(3, 4)


def test_seen_and_unseen_paths_are_scored_apart(folder, says):
    policies = load_policies(folder / "data")
    items = load_items(folder / "data", "test.jsonl", policies)
    seen = evaluate.sections([item for item in items if item["policy"] == "P1"])
    assert seen == {("P1", "1")}
    says([f"\\boxed{{{item['answer']}}}" for item in sorted(items, key=lambda item: item["policy"])][:9] + ["no"] * 3)
    model, processor = evaluate.load(folder / "model", device="cpu")
    row, _ = evaluate.evaluate(model, processor, items, policies, seen=seen, batch=5)
    assert (row["seen"]["accuracy"], row["seen"]["n"]) == (1.0, 6) and (
        row["unseen"]["accuracy"],
        row["unseen"]["n"],
    ) == (0.5, 6)
    assert row["by_policy"]["P2"]["accuracy"] == 0.5 and row["by_depth"]["1"]["n"] == 12


def test_the_policy_stands_in_the_prompt_only_where_asked(folder, monkeypatch):
    prompts, greedy = [], PolicyRollout.greedy

    def watched(self, *args):
        answers = greedy(self, *args)
        prompts.append([self.processor.decode(prompt.input_ids) for prompt, _ in answers])
        return answers

    monkeypatch.setattr(PolicyRollout, "greedy", watched)
    for flags in ([], ["--policy-in-context"]):
        evaluate.main(words(folder, *flags, "--max-response", "2"))
    assert not any("red? yes" in text for text in prompts[0]) and all("yes: A" in text for text in prompts[1])


def test_greedy_responses_are_the_models_likeliest_words(folder):
    """Token by token against a forward pass over everything so far."""
    model, processor = evaluate.load(folder / "model", device="cpu")
    policies = load_policies(folder / "data")
    item = load_items(folder / "data", "test.jsonl", policies)[1]
    prompt = processor.encode(messages(item, policies["P2"]), add_generation_prompt=True)
    rollout = PolicyRollout(processor, policies, 1, 0, max_tokens=6)
    ((text, prompt, count, finished),) = evaluate.respond(model, rollout, [item], True)
    ids = prompt.input_ids[None]
    for _ in range(6):
        logits = model.logits(model(ids, None, prompt.pixel_values, prompt.grid_thw)[:, -1])
        logits[:, processor.banned_ids] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert text == processor.decode(ids[0, len(prompt.input_ids) :]) and (count, finished) == (6, False)


def test_results_keep_the_rows_of_other_names(folder, says):
    for name, right in (("first", 12), ("second", 6), ("first", 0)):
        says(["\\boxed{A}"] * 12 if right else ["no"] * 12)
        evaluate.main(words(folder, "--name", name, "--max-response", "8"))
    rows = json.loads((folder / "out" / "results.json").read_text())["rows"][-2:]
    assert [(row["name"], row["accuracy"] > 0) for row in rows] == [("second", True), ("first", False)]
    lines = (folder / "out" / "first.jsonl").read_text().splitlines()
    assert len(lines) == 12 and json.loads(lines[0])["response"] == "no"


def test_override_items_say_whom_the_model_follows(folder, says):
    policies = load_policies(folder / "data")
    rows = [
        {"id": f"o{i}", "policy": "P1", "images": [], "question": "?", "answer": "A", "old_answer": "B"}
        for i in range(4)
    ]
    write_lines(folder / "data" / "override.jsonl", rows)
    says(["\\boxed{A}", "\\boxed{B}", "\\boxed{B}", "\\boxed{C}"])
    model, processor = evaluate.load(folder / "model", device="cpu")
    row, _ = evaluate.evaluate(
        model, processor, load_items(folder / "data", "override.jsonl", policies), policies, policy_in_context=True
    )
    assert (row["accuracy"], row["follows_old"]) == (0.25, 0.5)


def test_tool_calls_are_scored_by_tool_and_arguments(folder, says):
    policies = load_policies(folder / "data")
    gold = {"name": "OCR_v4", "arguments": {"image": "image/a.jpg"}}
    rows = [
        {"id": f"c{i}", "policy": "P1", "images": [], "question": "?", "answer": json.dumps(gold)} for i in range(2)
    ]
    write_lines(folder / "data" / "calls.jsonl", rows)
    says([f"\\boxed{{{json.dumps(gold)}}}", f"\\boxed{{{json.dumps({**gold, 'name': 'OCR_v1'})}}}"])
    model, processor = evaluate.load(folder / "model", device="cpu")
    row, _ = evaluate.evaluate(model, processor, load_items(folder / "data", "calls.jsonl", policies), policies)
    assert (row["accuracy"], row["tool"], row["arguments"], row["call"]) == (0.5, 0.5, 1.0, 0.75)


def test_a_section_that_is_recited_word_for_word_is_right(folder, says):
    policies = {
        "P1": {"name": "P1", "nodes": [{"id": "1", "section": "red? yes: A"}], "leaves": [], "images": [], "text": ""}
    }
    items = evaluate.recitation_items(policies)
    says(["red? yes: A"])
    model, processor = evaluate.load(folder / "model", device="cpu")
    row, _ = evaluate.evaluate(model, processor, items, policies)
    assert row["accuracy"] == row["f1"] == 1.0


def test_a_prompt_over_the_limit_is_an_error(folder):
    with pytest.raises(
        InputError,
        match=r"item i0: found a prompt of \d+ tokens, 4 of them of pictures .*, expected at most --max-prompt 20",
    ):
        evaluate.main(words(folder, "--max-prompt", "20"))


# -- generation_config.json -------------------------------------------------------------------------------------------


def test_stock_generation_is_what_transformers_generates(folder, tmp_path):
    """With the hub's penalty: tokens of the prompt, pictures included, and of the answer count."""
    model, processor = evaluate.load(folder / "model")
    chat = question("what is this?", picture(56, 84))
    prompt = processor.encode(chat, add_generation_prompt=True)
    inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones_like(prompt.input_ids)[None]}
    inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw}
    plain = generate(qwen, model, processor, prompt, {"do_sample": False, "repetition_penalty": 1.0}, 20)
    for penalty in (1.05, 2.0):
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"repetition_penalty": penalty, "do_sample": False})
        )
        rules = dict(
            max_new_tokens=20, do_sample=False, repetition_penalty=penalty, suppress_tokens=processor.banned_ids
        )
        expected = oracle(folder / "model").generate(**oracle_inputs(inputs), **rules, eos_token_id=processor.stop_ids)
        tokens, finished = generate(qwen, model, processor, prompt, read_generation(tmp_path), 20)
        theirs = expected[0, len(prompt.input_ids) :].tolist()
        assert tokens == [id for id in theirs if id not in processor.stop_ids] and finished == (len(tokens) < 20)
    assert tokens != plain[0]


def test_what_stock_generation_does_not_know_is_refused(tmp_path):
    hub = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6, "eos_token_id": [1, 2], "num_beams": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(hub))
    assert read_generation(tmp_path) == {**DEFAULTS, "do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
    for key, value in (("num_beams", 4), ("no_repeat_ngram_size", 3), ("temperature", float("nan")), ("top_k", -1)):
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(InputError, match=f"generation_config.json: found {key} = "):
            read_generation(tmp_path)
