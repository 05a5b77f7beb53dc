"""Data folders: what is right loads, and each of the ways to be wrong is refused in one line that says where."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import InputError
from data.clevr_policy import main
from data.dataset import load_items, load_policies, messages, target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "m"
    main(
        (
            f"--out {out} --depth 2 --variant M --policies 2 --queries 8 --seed 3 --size 96x64 --scenes 200"
            " --cpt applied,document,section,response"
        ).split()
    )
    return out


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "d"))


def edit(path, change, line=None):
    """Rewrite a JSON file, or one line (from 1) of a JSONL file, as `change` makes it."""
    if line is None:
        value = json.loads(path.read_text())
        path.write_text(json.dumps(change(value) or value))
        return
    lines = path.read_text().splitlines()
    entry = json.loads(lines[line - 1])
    new = change(entry) or entry
    lines[line - 1] = new if isinstance(new, str) else json.dumps(new)
    path.write_text("\n".join(lines) + "\n")


def test_a_written_folder_loads_as_it_was_meant(folder):
    policies = load_policies(folder)
    sizes = {name: len(load_items(folder, f"{name}.jsonl", policies)) for name in ("sft", "rl", "test")}
    assert sizes == {"sft": 2, "rl": 16, "test": 2}
    sft, rl, test = ([i for i in load_items(folder, f"{name}.jsonl", policies)] for name in ("sft", "rl", "test"))
    assert {i["scene"] for i in sft} <= {i["scene"] for i in rl} and not {i["scene"] for i in rl} & {
        i["scene"] for i in test
    }
    assert {i.get("kind") for i in load_items(folder, "cpt.jsonl", policies)} == {
        "applied",
        "document",
        "section",
        "response",
    }
    for item in rl:
        assert item["cot"].endswith(f"so the response is {item['answer']}.") and item["policy"] in item["question"]
        assert target(item) == f"<think>{item['cot']}</think>\\boxed{{{item['answer']}}}"
        assert target(item, cot=False) == f"\\boxed{{{item['answer']}}}"


def test_the_policy_stands_in_front_with_its_pictures_in_place(folder):
    policies = load_policies(folder)
    item = load_items(folder, "rl.jsonl", policies)[0]
    policy = policies[item["policy"]]
    (alone,), (aware,) = messages(item), messages(item, policy)
    assert [part["type"] for part in alone["content"]] == ["image", "text"]
    assert aware["content"][-2:] == alone["content"]
    front = aware["content"][:-3]
    assert "".join(part.get("text", "<image>") for part in front) == policy["text"]
    assert [part["image"] for part in front if part["type"] == "image"] == policy["images"]
    document = next(i for i in load_items(folder, "cpt.jsonl", policies) if i.get("kind") == "document")
    assert (
        messages(document, policies[document["policy"]])[0]["content"][0]["text"].startswith("Policy")
        and target(document) == ""
    )


def cycle(policies):
    root = next(n for n in policies[0]["nodes"] if n["id"] == policies[0]["root"])
    child = next(n for n in policies[0]["nodes"] if n["id"] == root["branches"]["yes"])
    child["branches"]["no"] = root["id"]


def drop(key):
    return lambda entry: {k: v for k, v in entry.items() if k != key}


def change(**values):
    return lambda entry: entry | values


POLICIES = [
    (
        "dangling branch",
        lambda p: p[0]["nodes"][0]["branches"].update(yes="Condition 9"),
        "Condition 1.*yes.*Condition 9",
    ),
    ("cycle", cycle, "Condition 1.*leads back to itself"),
    ("two policies of one name", lambda p: p.append(p[0]), "stands there twice"),
    ("unknown root", lambda p: p[0].update(root="Condition 7"), "root 'Condition 7'"),
    ("section twice", lambda p: p[0]["nodes"].append(p[0]["nodes"][0]), "node 'Condition 1' stands there twice"),
    (
        "two ways to a section",
        lambda p: p[0]["nodes"][0]["branches"].update(yes="Condition 1.1", no="Condition 1.1"),
        "Condition 1.2.*no branch",
    ),
    ("picture mark without a picture", lambda p: p[0].update(images=[]), "<image> in the text, 0 pictures"),
    ("picture outside", lambda p: p[0].update(images=["../../secret.png"] * 2), "outside the data folder"),
    ("key missing", lambda p: [p[0], drop("text")(p[1])], "key 'text' is missing"),
    ("not a list", lambda p: {"policies": p}, "expected a list of policies"),
]


@pytest.mark.parametrize("what, damage, says", POLICIES, ids=[p[0] for p in POLICIES])
def test_bad_policies_are_refused(copy, what, damage, says):
    edit(copy / "policies.json", lambda p: damage(p) or p)
    with pytest.raises(InputError, match=f"policies.json.*{says}") as caught:
        load_policies(copy)
    assert "\n" not in str(caught.value)


ITEMS = [
    ("not JSON", lambda i: "{oops", "not JSON"),
    ("NaN", lambda i: json.dumps(i)[:-1] + ', "weight": NaN}', "not JSON"),
    ("not an object", lambda i: "[1, 2]", "list found, expected an object"),
    ("no question", drop("question"), "key 'question' is missing"),
    ("answer of the wrong kind", change(answer=3), "key 'answer' holds int, expected str"),
    ("empty answer", change(answer=" "), "key 'answer' is empty"),
    ("unknown policy", change(policy="L9-Nobody"), "policy 'L9-Nobody' is not in policies.json"),
    ("missing picture", change(images=["images/train/none.png"]), "'images/train/none.png' is missing"),
    ("absolute picture", change(images=["/etc/hostname"]), "'/etc/hostname' lies outside"),
    ("zip slip", change(images=["images/../../../x.png"]), "outside the data folder"),
    ("pictures no list", change(images="a.png"), "key 'images' holds str, expected list"),
    ("unknown kind", change(kind="poem"), "kind 'poem' found"),
    ("path to nowhere", change(path=[{"node": "Condition 5", "answer": "yes"}]), "path names 'Condition 5'"),
    ("path with a wrong answer", change(path=[{"node": "Condition 1", "answer": "maybe"}]), "path answers 'maybe'"),
]


@pytest.mark.parametrize("what, damage, says", ITEMS, ids=[i[0] for i in ITEMS])
def test_bad_items_are_refused_with_file_and_line(copy, what, damage, says):
    edit(copy / "rl.jsonl", damage, line=3)
    with pytest.raises(InputError, match=f"rl.jsonl:3: .*{says}") as caught:
        load_items(copy, "rl.jsonl", load_policies(copy))
    assert "\n" not in str(caught.value)


def test_more_bad_files(copy):
    policies = load_policies(copy)
    lines = (copy / "rl.jsonl").read_text().splitlines()
    (copy / "rl.jsonl").write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(InputError, match=f"rl.jsonl:{len(lines) + 1}: id .* found again, first in line 1"):
        load_items(copy, "rl.jsonl", policies)
    (copy / "rl.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="rl.jsonl: no items"):
        load_items(copy, "rl.jsonl", policies)
    (copy / "rl.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="rl.jsonl: not UTF-8"):
        load_items(copy, "rl.jsonl", policies)
    with pytest.raises(InputError, match="nothing.jsonl: no such file"):
        load_items(copy, "nothing.jsonl", policies)


def test_a_link_out_of_the_folder_is_refused(copy, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    (copy / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    edit(copy / "rl.jsonl", change(images=["images/link.png"]), line=1)
    with pytest.raises(InputError, match="outside the data folder"):
        load_items(copy, "rl.jsonl", load_policies(copy))


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--depth 0", "--depth 0 found"),
        ("--queries 0", "--queries 0"),
        ("--queries 4 --sft 5", "--sft 5"),
        ("--size 10x10", "--size"),
        ("--size big", "--size 'big'"),
        ("--objects 5-20", "--objects"),
        ("--cpt poems", "--cpt 'poems'"),
        ("--clevr-root /nowhere", "/nowhere.*no such file"),
        ("--policies -1", "--policies -1"),
    ],
)
def test_bad_flags_leave_nothing_behind(tmp_path, flags, says):
    with pytest.raises(InputError, match=says):
        main(["--out", str(tmp_path / "d"), *flags.split()])
    assert os.listdir(tmp_path) == []


def test_a_folder_in_use_is_not_overwritten(folder, copy):
    flags = "--depth 2 --policies 1 --queries 2 --size 96x64 --scenes 200".split()
    before = (copy / "rl.jsonl").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        main(["--out", str(copy), *flags])
    assert (copy / "rl.jsonl").read_bytes() == before
    main(["--out", str(copy), *flags, "--overwrite"])
    assert len(load_items(copy, "rl.jsonl", load_policies(copy))) == 2


def test_the_command_ends_in_one_line_and_exit_code_2(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "data.clevr_policy", "--out", str(tmp_path / "d"), "--depth", "-3"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 2 and run.stderr.startswith("error: --depth -3") and run.stderr.count("\n") == 1
