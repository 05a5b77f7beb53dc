"""The contrast test of sections: what is altered, what is compared, and that it finds what a model knows."""

import json

import numpy as np
import pytest
from helpers import tiny_checkpoint
from small import quiet

import evaluate
from data.clevr_policy import make_dataset, sample_scenes
from data.contrast import alterations, contrast, stretches, table
from data.dataset import load_items, load_policies, target
from rollout import PolicyRollout
from support.batching import collate, token_logprobs
from tiny.world import Terse

POLICY = {
    "name": "P1",
    "nodes": [
        {"id": name, "question": asked} for name, asked in (("N1", "small cube"), ("N12", "red"), ("N3", "metal"))
    ],
    "leaves": [{"id": "A1"}, {"id": "A2"}, {"id": "A12"}],
}
ITEM = {
    "id": "i",
    "policy": "P1",
    "answer": "A12",
    "path": [{"node": "N1", "answer": "no"}, {"node": "N12", "answer": "yes"}],
    "cot": "N1 small cube then N3 else N12 no N12 red then A12 else A2 yes",
}


def test_a_section_s_stretch_ends_where_the_next_one_begins():
    """N12 is named at the end of N1 before it begins itself; N1 is no N12."""
    text = target(ITEM)
    parts = {section: text[start:end] for section, (start, end) in stretches(ITEM, POLICY).items()}
    assert parts == {"N1": "N1 small cube then N3 else N12 no ", "N12": "N12 red then A12 else A2 yes"}
    assert stretches({**ITEM, "cot": "in words of its own"}, POLICY) == {}


def test_one_word_is_altered_to_another_of_its_kind():
    text = "N1 small cube then N3 else N12 no "
    found = alterations(text, POLICY, "N1", np.random.default_rng(0))
    changed = [[(a, b) for a, b in zip(text.split(), other.split(), strict=True) if a != b] for other in found]
    assert all(len(pair) == 1 for pair in changed)
    pairs = {pair for (pair,) in changed}
    assert ("small", "large") in pairs and {b for a, b in pairs if a == "cube"} == {"sphere", "cylinder"}
    assert {(a, b) for a, b in pairs if a.startswith("N")} == {("N3", "N12"), ("N12", "N3")}  # never its own name
    assert len(found) == 5 and not any(a in ("no", "then", "N1") for a, _ in pairs)


@pytest.mark.parametrize("style", [None, Terse()], ids=["prose", "terse"])
def test_policies_of_both_styles_have_sections_to_alter(tmp_path, style):
    """Every section on an item's path is found in its chain, and has words whose alteration reads alike."""
    scenes = sample_scenes(0, {"train": 150, "test": 60}, size=(64, 64), objects=(1, 3))
    size = {"queries": 4, "sft": 4, "test": 8, "size": (64, 64)}
    size |= {"style": style} if style else {}
    make_dataset(tmp_path / "data", scenes, depth=3, variant="T", policies=1, seed=0, **size)
    policies = load_policies(tmp_path / "data")
    items = load_items(tmp_path / "data", "test.jsonl", policies)
    known = {node["id"] for policy in policies.values() for node in policy["nodes"]}
    for item in items:
        policy, text = policies[item["policy"]], target(item)
        found = stretches(item, policy)
        assert list(found) == [step["node"] for step in item["path"]]
        for section, (start, end) in found.items():
            altered = alterations(text[start:end], policy, section, np.random.default_rng(0))
            assert len(altered) >= 3 and text[start:end] not in altered and section in known


def test_what_is_known_is_likelier_and_what_is_not_is_even():
    """A model that knows N1 alone: its truth is likelier always, of N12 half of the time."""
    truth, coin = target(ITEM), iter([1.0, -1.0] * 50)

    def likelihoods(item, texts):
        knows = texts[0].count("N12") == 1  # the text ends with N1's stretch
        assert truth.startswith(texts[0]) and not any(truth.startswith(text) for text in texts[1:])
        return [0.0] + [-2.0 if knows else next(coin) for _ in texts[1:]]

    found = contrast([{**ITEM, "id": str(k)} for k in range(9)], {"P1": POLICY}, likelihoods, per_section=2)
    assert found["P1", "N1"] == {"likelier": 1.0, "margin": 2.0, "n": 10}  # of two items
    assert found["P1", "N12"]["likelier"] == 0.5
    records = [{"id": str(k), "correct": float(k < 3)} for k in range(4)]
    rows = table(found, records, [{**ITEM, "id": str(k)} for k in range(4)], {("P1", "N1")})
    assert [(row["section"], row["stored"], row["shown"], row["accuracy"]) for row in rows] == [
        ("N1", True, True, 0.75),
        ("N12", False, False, 0.75),
    ]


def test_likelihoods_are_those_of_each_text_alone(tmp_path):
    """Read after one prompt, or one by one: the sum over a text's tokens, given the query without its policy."""
    tiny_checkpoint(tmp_path, width=32, layers=2, vision_width=16, vision_depth=2)
    model, processor = evaluate.load(tmp_path)
    rollout = PolicyRollout(processor, {}, 1, 0)
    item = {"id": "i", "policy": "P", "images": [], "question": "apply P :", "answer": "A"}
    texts = ["<think>red", "<think>blue cube", "<think>red then A1 else A2"]
    found = evaluate.likelihoods(model, rollout, item, texts)
    for text, value in zip(texts, found):
        tokens = processor.tokenizer.encode(text, add_special_tokens=False).ids
        batch = collate([rollout.prompt(item)], [tokens], pad_id=processor.pad_id)
        assert value == pytest.approx(float(token_logprobs(model, batch)[0].sum()), abs=1e-3)


def test_evaluate_writes_a_table_of_sections(tmp_path):
    from tiny.demo import BASE

    scenes = sample_scenes(0, {"train": 150, "test": 60}, size=(112, 112), objects=(1, 3))
    size = {"queries": 4, "sft": 4, "test": 8, "size": (112, 112)}
    make_dataset(tmp_path / "data", scenes, depth=2, variant="T", policies=1, seed=0, style=Terse(), **size)
    paths = ["--model", str(BASE), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    seen = ["--seen", str(tmp_path / "data" / "sft.jsonl")]
    assert quiet(evaluate.main, [*paths, *seen, "--contrast", "2", "--max-response", "4", "--device", "cpu"])[0] == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]
    likelier = [part["likelier"] for part in row["sections"]]
    assert len(likelier) == 3 and max(likelier) < 0.9  # the base does not know a policy that it has not read
