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
from data.dataset import load_items, load_policies, messages, target, unknown_keys


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


# -- items of one's own: conversations, placed pictures, no policy
# ---------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A folder written by hand: a policy of text alone, and two pictures."""
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"y")
    (tmp_path / "policies.json").write_text('[{"name": "P", "text": "be polite"}]')
    return tmp_path


def load_one(folder, item, **more):
    (folder / "rl.jsonl").write_text(json.dumps({"id": "1", "answer": "x", **item}))
    return load_items(folder, "rl.jsonl", load_policies(folder), **more)[0]


def shown(item, policy=None):
    """[(role, text)] with <a> for the picture a.png."""
    show = lambda part: part.get("text") or f"<{Path(part['image']).stem}>"
    return [(turn["role"], "".join(map(show, turn["content"]))) for turn in messages(item, policy)]


TURNS = [
    {"role": "user", "content": "see <image>"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and <image>?"},
]
BOTH = ["a.png", "b.png"]
PROMPTS = [
    ({"question": "q", "images": BOTH}, [("user", "<a><b>q")]),
    ({"question": "one <image> two <image>", "images": BOTH}, [("user", "one <a> two <b>")]),
    ({"question": "q", "system": "Be Bo."}, [("system", "Be Bo."), ("user", "q")]),
    ({"messages": TURNS, "images": BOTH}, [("user", "see <a>"), ("assistant", "yes"), ("user", "and <b>?")]),
    (
        {
            "messages": [{"role": "system", "content": "S"}, *TURNS[1:2], {"role": "user", "content": "q"}],
            "images": BOTH,
        },
        [("system", "S"), ("assistant", "yes"), ("user", "<a><b>q")],
    ),
]


@pytest.mark.parametrize("item, chat", PROMPTS)
def test_turns_and_pictures_stand_where_they_were_written(own, item, chat):
    loaded = load_one(own, item)
    assert loaded["policy"] == "" and shown(loaded) == chat
    k = next(k for k, (role, _) in enumerate(chat) if role == "user")
    assert shown(loaded, load_policies(own)["P"]) == [
        (role, f"be polite\n\n{text}" if j == k else text) for j, (role, text) in enumerate(chat)
    ]
    front = "be polite\n\n" if chat[0][0] == "system" else "be polite"
    rest = [("system", front + chat[0][1]), *chat[1:]] if chat[0][0] == "system" else [("system", front), *chat]
    assert shown(loaded, load_policies(own)["P"] | {"place": "system"}) == rest


WRONG = [
    ({"question": "one <image>", "images": BOTH}, "1 <image> in the text, 2 pictures in images"),
    ({"question": "one <image>"}, "1 <image> in the text, 0 pictures"),
    ({"messages": TURNS[:2]}, "messages ends with 'assistant', expected the user's turn"),
    ({"messages": []}, "messages is empty"),
    ({"messages": TURNS, "question": "q", "images": BOTH}, "both 'question' and 'messages' found"),
    ({"messages": [{"role": "king", "content": "x"}, *TURNS], "images": BOTH}, "a turn of 'king'"),
    ({"messages": [*TURNS[:2], {"role": "system", "content": "x"}, TURNS[2]], "images": BOTH}, "a turn of 'system'"),
    ({"messages": [{"role": "user", "content": " "}]}, "turn 0 of messages: key 'content' is empty"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "key 'content' holds list, expected str"),
    ({"question": "q", "boxed": "no"}, "key 'boxed' holds str, expected bool"),
    ({"question": "q", "system": 1}, "key 'system' holds int"),
    ({"prompt": "q"}, "key 'question' is missing.*python -m data.own reads other formats"),
    (
        {"question": "q", "images": ["data:image/png;base64," + "A" * 2_000_000]},
        "characters\\) lies outside|is missing",
    ),
    ({"question": "q", "images": ["\0"]}, "expected a file name"),
]


@pytest.mark.parametrize("item, says", WRONG)
def test_items_that_cannot_be_used_are_refused(own, item, says):
    with pytest.raises(InputError, match=f"rl.jsonl:1: .*{says}") as caught:
        load_one(own, item)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_pictures_may_lie_under_media_and_nowhere_else(own, tmp_path_factory):
    media = tmp_path_factory.mktemp("media")
    (media / "far.png").write_bytes(b"z")
    (own / "images").symlink_to(media)
    for name in ("far.png", str(media / "far.png"), "images/far.png"):
        with pytest.raises(InputError, match="outside the data folder|is missing"):
            load_one(own, {"question": "q", "images": [name]})
        assert load_one(own, {"question": "q", "images": [name]}, media=media)["images"] == [str(media / "far.png")]
    inside = str(own / "a.png")
    assert load_one(own, {"question": "q", "images": [inside]})["images"] == [inside]


def test_free_text_is_learned_as_it_is(own):
    item = load_one(own, {"question": "q", "answer": "Sorry, no.", "cot": "rule 1", "boxed": False})
    assert target(item) == "<think>rule 1</think>Sorry, no." and target(item, cot=False) == "Sorry, no."


def test_keys_that_nothing_reads_are_named(own, folder):
    items = [
        load_one(own, {"question": "q", "colour": "red", "sistem": "x"}),
        load_one(own, {"question": "q", "colour": 1}),
    ]
    assert unknown_keys(items) == {"colour": 2, "sistem": 1}
    for split in ("cpt", "sft", "rl", "test"):
        assert unknown_keys(load_items(folder, f"{split}.jsonl", load_policies(folder))) == {}


def test_a_byte_order_mark_is_no_fault_and_half_a_character_is_one(own):
    (own / "rl.jsonl").write_text('\ufeff{"id": "1", "question": "q", "answer": "x"}', encoding="utf-8")
    assert load_items(own, "rl.jsonl", {})[0]["question"] == "q"
    (own / "rl.jsonl").write_text('{"id": "1", "question": "a\\ud800b", "answer": "x"}')
    with pytest.raises(InputError, match=r"rl.jsonl:1: half of a character \(.ud800\)"):
        load_items(own, "rl.jsonl", {})
    (own / "rl.jsonl").write_text('{"id": "1", "question": "\\ud83d\\ude00", "answer": "x"}')
    assert load_items(own, "rl.jsonl", {})[0]["question"] == "😀"


def test_policies_need_a_name_and_a_text_and_no_more(own):
    assert load_policies(own)["P"]["nodes"] == []
    (own / "policies.json").write_text("[]")
    assert load_policies(own) == {}
    (own / "policies.json").write_text('[{"name": "P", "text": "x", "place": "sky"}]')
    with pytest.raises(InputError, match="place 'sky' found, expected user or system"):
        load_policies(own)
    (own / "policies.json").unlink()
    with pytest.raises(InputError, match="no such file, expected a data folder as python -m data.own makes it"):
        load_policies(own)
