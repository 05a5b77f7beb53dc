"""Chains of thought: what is kept, what the generator is told, and the command from a tiny checkpoint to a file."""

import pytest
from test_inspect import folder  # noqa: F401  the same small data folder

import data.cot as cot
from data import InputError
from data.dataset import load_items, load_policies, messages, target


def test_forward_keeps_only_what_is_right_and_well_formed(folder):  # noqa: F811
    item = load_items(folder, "sft.jsonl", load_policies(folder))[0]
    wrong, right = "<think>so</think>\\boxed{Case 99}", f"<think>thus</think>\\boxed{{{item['answer']}}}"
    assert cot.keep(item, [wrong], "forward") is None
    assert cot.keep(item, [wrong, right, target(item)], "forward") == "thus"
    assert cot.keep(item, [f"\\boxed{{{item['answer']}}}"], "forward") is None  # no thoughts, nothing to learn
    assert cot.keep(item, ["It must be so. \\boxed{Case 99}"], "reverse") == "It must be so."
    assert cot.keep(item, ["", "\\boxed{x}"], "reverse") is None


def test_the_answer_is_told_in_reverse_and_the_policy_always(folder):  # noqa: F811
    policies = load_policies(folder)
    item = load_items(folder, "sft.jsonl", policies)[0]
    for mode in ("forward", "reverse"):
        prompt = messages(cot.asked(item, mode), policies[item["policy"]])
        text = "".join(part.get("text", "") for part in prompt[0]["content"])
        assert text.startswith(f"Policy {item['policy']}")
        assert (f"The right response is known: {item['answer']}." in text) == (mode == "reverse")


def test_gold_chains_become_a_file_that_loads(folder, tmp_path, capsys):  # noqa: F811
    out = folder / "gold.jsonl"
    cot.main(["--data", str(folder), "--out", str(out)])
    items = load_items(folder, "gold.jsonl", load_policies(folder))
    assert [i["cot"] for i in items] == [i["cot"] for i in load_items(folder, "sft.jsonl", load_policies(folder))]
    assert "kept 8 of 8 (gold); sections quoted rightly 100.0 %" in capsys.readouterr().out
    out.unlink()


def test_a_model_writes_chains_in_reverse(folder, tmp_path, capsys):  # noqa: F811
    """A tiny random model: what it writes is no sense, but it is sampled, kept and written in the right places."""
    from helpers import tiny_checkpoint

    made = tiny_checkpoint(tmp_path / "m")
    out = folder / "reverse.jsonl"
    flags = [
        "--model",
        str(tmp_path / "m"),
        "--data",
        str(folder),
        "--mode",
        "reverse",
        "--max-response",
        "6",
        "--out",
        str(out),
    ]
    cot.main(flags)
    first = out.read_bytes()
    cot.main(flags)
    assert out.read_bytes() == first and made is not False  # the same seed, the same chains
    assert "gold chains of the same items: sections quoted rightly 100.0 %" in capsys.readouterr().out
    out.unlink()


def test_sampling_needs_a_model(folder, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="--mode forward found without --model"):
        cot.main(["--data", str(folder), "--mode", "forward", "--out", str(tmp_path / "x.jsonl")])
