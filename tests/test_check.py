"""A data folder looked over before training: what would end a run is found, all of it, with its place."""

import io
import json
import re

import pytest
from helpers import picture, tiny_checkpoint
from small import small_data, write_lines

import data.check
from data import InputError
from data.check import Limits, Pictures, Report, alike, look_over, measure
from data.dataset import load_items, load_policies, messages, target
from model import Processor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(model):
    return Processor.from_pretrained(model)


@pytest.fixture
def folder(tmp_path):
    return small_data(tmp_path / "d")


def main(argv):
    data.check.main(argv, Processor.from_pretrained)


def rows(folder, split="sft"):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def found(folder, processor, split="sft", limits=Limits()):
    policies = load_policies(folder)
    return look_over(load_items(folder, f"{split}.jsonl", policies), policies, processor, limits)


def test_sound_data_have_no_faults(folder, processor):
    for split, policy in {"cpt": "kind", "sft": "without", "rl": "both", "test": "both"}.items():
        assert found(folder, processor, split, Limits(policy=policy)) == []


def png(size):
    data = io.BytesIO()
    picture(*size).save(data, "PNG")
    return data.getvalue()


def test_every_fault_is_found_with_its_place(folder, processor):
    """The last item's too: a run must not end in its fourth step."""
    items = rows(folder)
    (folder / "images" / "cut.png").write_bytes(png((84, 84))[:300])
    (folder / "images" / "thin.png").write_bytes(png((1, 201)))
    (folder / "images" / "none.png").write_bytes(b"")
    for k, name in enumerate(("cut", "thin", "none")):
        items[k]["images"] = [f"images/{name}.png"]
    items[3]["answer"] = "a } b"
    items[6]["question"] = "long " * 100
    items[-1]["cot"] = "so " * 100
    items[-1]["images"] = ["images/cut.png"]
    write_lines(folder / "sft.jsonl", items)
    faults = found(folder, processor, limits=Limits(prompt=250, response=100))
    says = [
        (1, r"OSError|truncated"),
        (2, "aspect ratio"),
        (3, "readable picture"),
        (4, "gets nothing from the accuracy reward"),
        (7, r"found a prompt of \d+ tokens.*expected at most --max-prompt 250"),
        (12, "OSError|truncated"),
        (12, r"found a response of \d+ tokens, expected at most --max-response 100"),
    ]
    assert [fault.line for fault in faults] == [line for line, _ in says]
    for fault, (line, text) in zip(faults, says):
        assert re.search(text, fault.what) and fault.file == "sft.jsonl" and fault.item == f"i{line - 1}"
        assert ("images" in fault.picture) == (line in (1, 2, 3) or "OSError" in fault.what)
    assert str(faults[0]).startswith("sft.jsonl:1: item i0, picture ")


def test_a_policy_is_looked_at_too(folder, processor):
    """Its pictures stand in every prompt: one that is cut would end the run at its first item."""
    (folder / "images" / "0.png").write_bytes(png((84, 84))[:300])
    (fault,) = [fault for fault in found(folder, processor, "rl") if fault.file == "policies.json"]
    assert fault.item == "P2" and fault.picture.endswith("0.png") and "expected a readable picture" in fault.what


def test_lengths_are_those_of_the_processor(folder, processor):
    """With and without the policy, for every kind, and near the limit to the token."""
    policies = load_policies(folder)
    for split, how in (("cpt", "kind"), ("sft", "without"), ("rl", "with")):
        items = load_items(folder, f"{split}.jsonl", policies)
        for limit in (4096, 60):
            pictures = Pictures(processor)
            look_over(items, policies, processor, Limits(limit, 99, how), pictures)
            for item, length in zip(items, measure(items, policies, processor, Limits(limit, 99, how), pictures)):
                document = item.get("kind") == "document"
                given = how == "with" or how == "kind" and item.get("kind", "applied") in ("applied", "document")
                chat = messages(item, policies[item["policy"]] if given else None)
                tokens = len(processor.encode(chat, add_generation_prompt=not document).input_ids)
                assert abs(length.prompt - tokens) <= (1 if limit == 4096 else 0), item["id"]
                if not document:
                    assert length.response == len(processor.tokenizer.encode(target(item)).ids) + 1


def test_pictures_are_opened_once(folder, processor, monkeypatch):
    opened, whole = [], Processor.look
    monkeypatch.setattr(Processor, "look", lambda self, path: opened.append(path) or whole(self, path))
    Report(folder, processor, Limits())
    assert len(opened) == len(set(opened)) == 12


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda image: image, "the same picture"),
        (lambda image: image.resize((200, 200)), "nearly the same picture"),
        (lambda image: image.rotate(180), None),
    ],
)
def test_a_test_picture_that_was_trained_on_is_found(folder, processor, change, why):
    """Also saved anew at another size; another picture of the same kind is none."""
    change(picture(112, 112, seed=2)).save(folder / "images" / "new.jpg", quality=80)
    policies = load_policies(folder)
    train = load_items(folder, "sft.jsonl", policies)
    (test,) = [
        dict(
            train[2],
            id="new",
            images=[train[2]["images"][0] if why == "the same picture" else f"{folder}/images/new.jpg"],
        )
    ]
    pictures = Pictures(processor)
    pictures.look([path for item in [*train, test] for path in item["images"]])
    assert [(a["id"], b["id"], what) for a, b, what in alike(train, [test], pictures)] == (
        [("i2", "new", why)] if why else []
    )


def test_a_test_question_that_was_trained_on_is_found(processor):
    text = "I bought a lamp on Monday and the box was open when it came, may I send it back to the shop?"
    item = lambda id, question: {"id": id, "question": question, "images": []}
    train = [item("a", text), item("b", "Where is my parcel, please?")]
    test = [
        item("c", text.upper()),
        item("d", text.replace("Monday", "Friday")),
        item("e", "Something else altogether."),
    ]
    pairs = alike(train, test, Pictures(processor))
    assert [(a["id"], b["id"]) for a, b, _ in pairs] == [("a", "c"), ("a", "d")]
    assert [why for *_, why in pairs] == ["the same text", "nearly the same text"]


def test_the_command_writes_a_page_and_ends_in_one_line(folder, model, capsys):
    main([str(folder), "--model", str(model)])
    page = (folder / "check.html").read_text()
    assert "Nothing is at fault" in page and "The ten longest items" in page and "<script" not in page
    assert "cpt    applied" in capsys.readouterr().out
    items = rows(folder)
    items[0] |= {"cot": "<b>" + "so " * 3000, "colour": "red"}
    write_lines(folder / "sft.jsonl", items)
    with pytest.raises(
        InputError, match="found 1 faults, expected none; the first is sft.jsonl:1: item i0: found a resp"
    ):
        main([str(folder), "--model", str(model)])
    assert "1 items have the key 'colour'" in capsys.readouterr().out


def test_photographs_ask_for_smaller_pictures(folder, model, processor, capsys):
    """12 megapixels are 15,000 tokens: the two flags that help are named, and with them nothing is at fault."""
    picture(4000, 3000).save(folder / "images" / "0.png")
    policies = json.loads((folder / "policies.json").read_text())
    policies[0]["text"] += " and so on" * 500
    (folder / "policies.json").write_text(json.dumps(policies))
    with pytest.raises(InputError, match=r"found a prompt of \d{5} tokens, \d+ of the policy, \d{5} of pictures"):
        main([str(folder), "--model", str(model)])
    flags = re.search(r"train with (--max-pixels \d+ --max-prompt \d+)", capsys.readouterr().out).group(1)
    main([str(folder), "--model", str(model), *flags.split()])


def test_torch_is_not_needed_to_import_it():
    import subprocess
    import sys

    code = "import sys, data.check, data.own, data.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
