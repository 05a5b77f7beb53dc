"""One's own data in the three stages: validation loss, the best checkpoint, conversations, no policy, judges, media."""

import json
import shutil
import sys
import types

import pytest
import torch
from helpers import tiny_checkpoint
from small import arguments, metrics, small_data, write_lines

import evaluate
import train_cpt
import train_rl
import train_sft
from data import InputError
from data.runs import read_run
from model import Processor, load_pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path):
    return small_data(tmp_path / "data")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", [train_cpt, train_sft])
def test_validation_loss_is_reported_and_its_best_checkpoint_stays(model, folder, stage, monkeypatch):
    """The second of three is the best; it stays, though only the newest would be kept."""
    losses = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(train_sft, "held_out_loss", lambda *_: next(losses))
    out = folder.parent / "run"
    stage.main(arguments(model, folder, out, full=True, steps=6, validate_every=2, keep=1))
    found = {row["step"] + 1: row["validation_loss"] for row in metrics(out) if "validation_loss" in row}
    best = min(found, key=found.get)
    assert found == {2: 3.0, 4: 1.0, 6: 2.0}
    assert (out / "checkpoints" / "best").resolve().name == f"step-0000000{best}"
    assert {path.name for path in (out / "checkpoints").glob("step-*")} == {f"step-0000000{best}", "step-00000006"}
    assert [step for step, _ in read_run(out)["series"]["validation_loss"]] == [1, 3, 5]


@pytest.mark.parametrize("stage", [train_cpt, train_sft, train_rl])
def test_wandb_goes_on_with_the_same_run_after_a_resume(model, folder, stage, monkeypatch):
    """Its id is the run's own, which stands in the run's folder; a run that is started anew is another one."""
    inits, logged = [], []
    wandb = types.SimpleNamespace(
        init=lambda **named: inits.append(named), log=lambda metrics, step: logged.append((step, metrics))
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    rl = {"group_size": 2, "policy_rollouts": 0, "reward": "small:length", "check": 0, "max_response": 8}
    flags = {"steps": 2, "save_every": 1, "tracker": "wandb", **(rl if stage is train_rl else {})}
    words = lambda **more: arguments(model, folder, folder.parent / "run", **flags, **more)
    stage.main(words())
    for path in [
        folder.parent / "run" / "checkpoints" / "step-00000002",
        *folder.parent.glob("run/model"),
        *folder.parent.glob("run/adapter"),
    ]:
        shutil.rmtree(path)  # a kill came after the first step
    stage.main(words(resume=True))
    stage.main(words(overwrite=True))
    ids = [named["id"] for named in inits]
    assert ids[0] == ids[1] != ids[2] and all(named["resume"] == "allow" for named in inits)
    assert ids[2] == json.loads((folder.parent / "run" / "config.json").read_text())["run"]
    assert [step for step, _ in logged] == [0, 1, 1, 0, 1]


def test_validation_loss_is_the_mean_over_all_learned_tokens(model, folder):
    out = folder.parent / "run"
    flags = {"full": True, "steps": 1, "validate_every": 1, "lr": "1e-30", "micro_batch": 5}
    train_sft.main(arguments(model, folder, out, **flags))
    config = train_sft.Config(data=str(folder), max_prompt=4096, max_response=64)
    examples = train_sft.Examples(folder, "test.jsonl", Processor.from_pretrained(model), config)
    qwen, losses = load_pretrained(model), []
    for i in range(len(examples)):
        prompt, response, _ = examples.encode(0, i)
        ids = torch.cat([prompt.input_ids, torch.tensor(response)])[None]
        with torch.no_grad():
            logits = qwen.logits(qwen(ids, None, prompt.pixel_values, prompt.grid_thw))[0, -len(response) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none").tolist()
    assert metrics(out)[0]["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_conversations_and_items_without_a_policy_go_through_every_stage(model, folder):
    """Free text, several turns, a system prompt, placed pictures; half of the items belong to no policy."""
    turns = [
        {"role": "user", "content": "see <image>"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and?"},
    ]
    for split in ("cpt", "sft", "rl", "test"):
        items = [item for item in rows(folder / f"{split}.jsonl") if item.get("kind", "applied") == "applied"]
        for k, item in enumerate(items):
            del item["path"]
            if k % 2:
                item |= {"messages": turns, "system": "Be Bo.", "boxed": False}
                del item["question"], item["policy"]
        write_lines(folder / f"{split}.jsonl", items)
    out = folder.parent
    train_cpt.main(arguments(model, folder, out / "cpt", steps=1))
    train_sft.main(arguments(model, folder, out / "sft", init=out / "cpt", steps=1, policy_in_prompt=True))
    sizes = {"group_size": 2, "policy_rollouts": 2, "max_response": 8, "check": 4}
    train_rl.main(arguments(model, folder, out / "rl", steps=1, **sizes))
    row = evaluate.main(
        f"--model {out}/rl --data {folder} --out {out}/eval --policy-in-context --device cpu --max-response 8".split()
    )
    assert row["n"] == 12 and set(row["by_policy"]) == {"", "P1"}


def test_samples_say_how_far_each_token_moved(model, folder):
    """Upwards where the advantage is above 0: the sum over a response has its sign, as one small step follows it."""
    out = folder.parent / "rl"
    sizes = {"group_size": 4, "policy_rollouts": 2, "max_response": 6, "check": 0, "batch_size": 1}
    reward = "small:length"  # a random model gets it in every amount
    train_rl.main(arguments(model, folder, out, steps=1, lr="1e-5", beta=0, reward=reward, **sizes))
    (sample,) = rows(out / "samples.jsonl")
    assert sample["question"].startswith("apply P") and len(sample["responses"]) == 6
    learned = [r for r in sample["responses"] if r["advantage"]]
    assert learned and all(len(r["moved"]) == len(r["tokens"]) for r in learned)
    best = max(learned, key=lambda r: r["advantage"])
    assert sum(best["moved"]) > 0 and {r["finished"] for r in sample["responses"]} <= {True, False}


def test_a_judge_is_a_reward_like_any_other(model, folder, monkeypatch):
    """Asked once a step for all groups; evaluation takes it, too; the flags that it needs are asked for."""
    asked = []
    monkeypatch.setattr("data.judge.Judge.post", lambda self, text: asked.append(text) or '{"score": 0.5}')
    flags = {"reward": "judge=0.9,format=0.1", "judge_url": "http://127.0.0.1:9/v1", "judge_model": "m"}
    sizes = {"group_size": 2, "policy_rollouts": 1, "max_response": 6, "check": 0}
    for split in ("rl", "test"):
        write_lines(folder / f"{split}.jsonl", [{**row, "boxed": False} for row in rows(folder / f"{split}.jsonl")])
    train_rl.main(arguments(model, folder, folder.parent / "rl", steps=1, **flags, **sizes))
    assert metrics(folder.parent / "rl")[0]["reward/judge"] > 0 and "policy P" in asked[0]
    words = f"--model {model} --data {folder} --out {folder.parent}/eval --device cpu --max-response 6 --reward judge"
    with pytest.raises(InputError, match="--reward judge: found no --judge-url"):
        evaluate.main(words.split())
    row = evaluate.main([*words.split(), "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m"])
    assert 0 < row["reward/judge"] <= 0.5 and row["accuracy"] == 0  # blank responses get 0, unasked


def test_pictures_may_stay_outside_the_data_folder(model, folder):
    shutil.move(folder / "images", folder.parent / "photos")
    for split in ("sft", "test"):
        items = [
            {**row, "images": [name.removeprefix("images/") for name in row["images"]]}
            for row in rows(folder / f"{split}.jsonl")
        ]
        write_lines(folder / f"{split}.jsonl", items)
    policies = json.loads((folder / "policies.json").read_text())
    policies[1]["images"] = ["0.png"]
    (folder / "policies.json").write_text(json.dumps(policies))
    with pytest.raises(InputError, match="0.png' is missing"):
        train_sft.main(arguments(model, folder, folder.parent / "no", steps=1))
    train_sft.main(arguments(model, folder, folder.parent / "sft", steps=1, media=folder.parent / "photos"))
