"""A policy of one's own and data in the formats that everybody has, made into a folder that every stage reads."""

import base64
import json
import os
import re
import time
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from PIL import Image

import data.check
from data import InputError
from data.dataset import load_items, load_policies, messages, target
from data.document import sections
from data.formats import read_rows
from data.own import Groups, main
from model import Processor

POLICY = """# Returns

Be polite.

## Goods
1. Opened goods stay. ![a crushed box](box.png)
2. Sealed goods come back.

## Money
1. A refund takes 14 days.
2. Vouchers otherwise. <img src="box.png">
"""


@pytest.fixture
def shop(tmp_path):
    """A policy with a picture, and six photographs."""
    (tmp_path / "photos").mkdir()
    for k in range(6):
        Image.new("RGB", (56 + k, 56), (40 * k, 90, 10)).save(tmp_path / "photos" / f"{k}.png")
    Image.new("RGB", (56, 28), "red").save(tmp_path / "box.png")
    (tmp_path / "returns.md").write_text(POLICY)
    return tmp_path


def make(shop, *flags, name="log.jsonl", **rows):
    """The folder that data.own makes of rows (or of a file that is there), its policies and {split: items}."""
    if "rows" in rows:
        text = "".join(json.dumps(row) + "\n" for row in rows["rows"])
        (shop / name).write_text(json.dumps(rows["rows"]) if name.endswith(".json") else text)
    out = shop / "out"
    main([*f"--policy {shop}/returns.md --data {shop}/{name} --out {out} --overwrite".split(), *flags])
    policies = load_policies(out)
    splits = [path.stem for path in out.glob("*.jsonl")]
    return out, policies, {split: load_items(out, f"{split}.jsonl", policies) for split in splits}


def said(item, policy=None):
    """A prompt as text, <name> for a picture."""
    show = lambda part: part.get("text") or f"<{Path(part['image']).suffix}>"
    return [(turn["role"], "".join(map(show, turn["content"]))) for turn in messages(item, policy)]


def data_uri(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def chat(url, **more):
    parts = [{"type": "text", "text": "look "}, {"type": "image_url", "image_url": {"url": url}}]
    answer = {"role": "assistant", "content": "<think>Goods, rule 1 holds.</think>It stays."}
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": " may I?"}]}, answer], **more}


photo = lambda k: {"path": f"photos/{k}.png"}
# format: (rows, prompt of an item, its response)
FORMATS = {
    "openai": (
        [chat(f"photos/{k}.png") for k in range(6)],
        [("user", "look <.png> may I?")],
        "<think>Goods, rule 1 holds.</think>It stays.",
    ),
    "openai, several turns": (
        [
            {
                "messages": [
                    {"role": "developer", "content": "You are Bo."},
                    {"role": "user", "content": f"Hello {k}"},
                    {"role": "assistant", "content": "Yes?"},
                    {"role": "user", "content": [{"type": "image", "image": f"photos/{k}.png"}, "this?"]},
                    {"role": "assistant", "content": "No."},
                    {"role": "user", "content": "Thanks"},
                ]
            }
            for k in range(6)
        ],
        [("system", "You are Bo."), ("user", "Hello 0"), ("assistant", "Yes?"), ("user", "<.png>this?")],
        "No.",
    ),
    "openai, a tool call": (
        [
            {
                "messages": [
                    {"role": "user", "content": f"Where is parcel {k}?"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": '{"n": 1}'}}],
                    },
                ]
            }
            for k in range(6)
        ],
        [("user", "Where is parcel 0?")],
        '{"name": "find", "arguments": {"n": 1}}',
    ),
    "TRL, pictures in a column": (
        [
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": "a box"}]}],
                "images": [f"photos/{k}.png"],
            }
            for k in range(6)
        ],
        [("user", "<.png>what?")],
        "a box",
    ),
    "LLaVA": (
        [
            {
                "id": f"l{k}",
                "image": f"photos/{k}.png",
                "conversations": [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "a box"}],
            }
            for k in range(6)
        ],
        [("user", "what?\n<.png>")],
        "a box",
    ),
    "LLaVA, a path from Windows": (
        [
            {
                "image": f"photos\\{k}.png",
                "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a box"}],
            }
            for k in range(6)
        ],
        [("user", "<.png>what?")],
        "a box",
    ),
    "ShareGPT": (
        [
            {
                "system": "You are Bo.",
                "images": [f"photos/{k}.png"] * 2,
                "conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "first"}],
            }
            for k in range(6)
        ],
        [("system", "You are Bo."), ("user", "<.png> or <.png>?")],
        "first",
    ),
    "EasyR1": (
        [{"problem": "<image>how many?", "answer": "\\boxed{3}", "images": [photo(k)]} for k in range(6)],
        [("user", "<.png>how many?")],
        "\\boxed{3}",
    ),
    "verl": (
        [
            {
                "prompt": [{"role": "user", "content": f"<image>how many {k}?"}],
                "reward_model": {"style": "rule", "ground_truth": "3"},
                "images": [f"photos/{k}.png"],
                "data_source": "x",
            }
            for k in range(6)
        ],
        [("user", "<.png>how many 0?")],
        "\\boxed{3}",
    ),
    "our own": (
        [{"question": "how many?", "answer": "3", "cot": "one, two", "images": [f"photos/{k}.png"]} for k in range(6)],
        [("user", "<.png>how many?")],
        "<think>one, two</think>\\boxed{3}",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("file", ["log.jsonl", "log.json"])
def test_each_format_is_known_by_its_keys_and_loads(shop, name, file):
    rows, prompt, response = FORMATS[name]
    _, policies, items = make(shop, name=file, rows=rows)
    found = sorted(items["sft"] + items["test"], key=lambda item: int(item["id"].split("-")[-1].strip("l")))
    assert len(found) == 6 and len(items["test"]) == 1
    assert said(found[0]) == prompt and target(found[0]) == response
    aware = said(found[0], policies["returns"])
    place = next(k for k, (role, _) in enumerate(prompt) if role == "user")
    assert aware[place][1].startswith("# Returns") and aware[place][1].endswith("\n\n" + prompt[place][1])


def test_tables_and_their_columns(shop):
    lines = "".join(f'"what, {k}?";photos/{k}.png;<answer>{k}</answer>\n' for k in range(6))
    (shop / "t.csv").write_text("\ufefftext;photo;gold\n" + lines, encoding="utf-8")
    flags = "--map question=text --map images=photo --map answer=gold".split()
    _, _, items = make(shop, *flags, name="t.csv")
    assert sorted(target(item) for item in items["sft"] + items["test"]) == [f"\\boxed{{{k}}}" for k in range(6)]
    assert all(len(item["images"]) == 1 for item in items["sft"])
    with pytest.raises(InputError, match="found the keys text, photo, gold, expected messages"):
        main(f"--data {shop}/t.csv --out {shop}/o2 --policy {shop}/returns.md".split())


def test_parquet_with_pictures_as_bytes(shop):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [[{"bytes": (shop / "photos" / f"{k}.png").read_bytes(), "path": None}] for k in range(6)]
    table = {"problem": ["<image>how many?"] * 6, "answer": ["3"] * 6, "images": images}
    parquet.write_table(pyarrow.table(table), shop / "d.parquet")
    _, _, items = make(shop, name="d.parquet")
    assert said(items["rl"][0]) == [("user", "<.png>how many?")] and len(items["rl"]) == 5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rows: {"data": rows},
        lambda rows: {"version": 2, "tags": ["a"], "data": rows},
        lambda rows: {f"case {k}": row for k, row in enumerate(rows)},
    ],
    ids=["a list", "a list beside other things", "by their ids"],
)
def test_rows_may_stand_in_an_object(shop, wrap):
    (shop / "w.json").write_text(json.dumps(wrap(FORMATS["LLaVA"][0]), indent=1))
    _, _, items = make(shop, name="w.json")
    assert len(items["sft"]) == 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_of_each_kind_is_read(shop, kind):
    """Where Pillow has read nothing else before, too: a list of formats that ends at one without a reader of its own
    would lose those after it."""
    Image.new("RGB", (60, 56), "blue").save(shop / "p", kind)
    _, _, items = make(shop, rows=[chat("p")])
    assert len(items["sft"][0]["images"]) == 1


ASKED = {"question": "q", "answer": "a"}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ODD = {  # a file as people have it: (name, text, [(system prompt, question, answer)] or the reason)
    "blank lines before a table": ("t.csv", "\n ,\nquestion,answer\nq,a\n", [("", "q", "a")]),
    "capitals and spaces": ("t.csv", " Question , ANSWER \nq,a\n", [("", "q", "a")]),
    "a column twice": ("t.csv", "question,question,answer\nq,r,a\n", "two columns named 'question'"),
    "a row that is too long": ("t.csv", "question,answer\nq,a\nr,b,c\n", [("", "q", "a")]),
    "a list as Python prints it": ("t.csv", "question,answer,images\nq,a,\"['box.png']\"\n", [("", "<.png>q", "a")]),
    "something after the list": ("t.json", json.dumps([ASKED]) + "{}", "found '{}' after the list"),
    "a list in JSON lines": ("t.jsonl", json.dumps([ASKED]), "belongs in a .json file"),
    "infinity": ("t.jsonl", '{"question": "q", "answer": 1e999}', "1e999 is not JSON"),
    "a chat that is a text": ("t.jsonl", json.dumps({"messages": "hello"}), "messages holds str, expected a list"),
    "a number for a text": (
        "t.jsonl",
        json.dumps({"messages": [{"role": "user", "content": 5}]}),
        "message 0 holds int",
    ),
    "an empty system prompt": (
        "t.jsonl",
        json.dumps({"messages": [{"role": "system", "content": None}, *TURNS]}),
        [("", "q", "a")],
    ),
    "a system prompt in a column": ("t.jsonl", json.dumps({"messages": TURNS, "system": "s"}), [("s", "q", "a")]),
    "two system prompts": (
        "t.jsonl",
        json.dumps({"messages": [{"role": "system", "content": "s"}, *TURNS], "system": "t"}),
        "a system prompt after the first turn",
    ),
    "a system prompt that is none": (
        "t.jsonl",
        json.dumps({**ASKED, "system": 5}),
        "'system' holds int, expected text",
    ),
    "a policy that is none": ("t.jsonl", json.dumps({**ASKED, "policy": 5}), "'policy' holds int, expected a name"),
    "thoughts without end": ("t.jsonl", json.dumps({**ASKED, "answer": "<think>x"}), "a <think> without its </think>"),
    "thoughts that are no text": (
        "t.jsonl",
        json.dumps({"messages": [TURNS[0], {**TURNS[1], "reasoning": {"a": 1}}]}),
        "message 1 has reasoning of dict",
    ),
    "a solution with its box": (
        "t.jsonl",
        json.dumps({"problem": "q", "solution": r"so \boxed{4}"}),
        "a box inside other",
    ),
    "a call as it once was": (
        "t.jsonl",
        json.dumps({"messages": [TURNS[0], {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]}),
        [("", "q", '{"name": "f", "arguments": {}}')],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_or_their_fault_is_named(shop, name):
    file, text, expected = ODD[name]
    (shop / file).write_text(text)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=re.escape(expected)):
            make(shop, name=file)
        return
    _, _, items = make(shop, name=file)
    found = [(item.get("system", ""), said(item)[-1][1], item["answer"]) for item in items["sft"]]
    assert found == expected and (shop / "out" / "dropped.txt").exists() == (name == "a row that is too long")


def test_pictures_by_path_uri_and_bytes_are_one_file(shop):
    path = shop / "photos" / "3.png"
    urls = ["photos/3.png", str(path), f"file://{path}", data_uri(path), data_uri(path).partition(",")[2]]
    rows = [chat(url) | {"ticket": k} for k, url in enumerate(urls)]
    for k, row in enumerate(rows):
        row["messages"][-1]["content"] = f"answer {k}"
    out, _, items = make(shop, "--test", "0", rows=rows)
    assert len({image for item in items["sft"] for image in item["images"]}) == 1
    assert len(list((out / "images").iterdir())) == 2  # and the policy's


def test_pictures_stay_under_media(shop):
    rows = [chat(f"{k}.png") for k in range(6)]
    flags = f"--policy {shop}/returns.md --data {shop}/log.jsonl --out {shop}/out --media {shop}/photos".split()
    (shop / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(flags)
    policies = load_policies(shop / "out")
    with pytest.raises(InputError, match="'0.png' is missing|'1.png' is missing"):
        load_items(shop / "out", "sft.jsonl", policies)
    items = load_items(shop / "out", "sft.jsonl", policies, shop / "photos")
    assert all(Path(item["images"][0]).parent == shop / "photos" for item in items)


# -- the policy


def test_a_policy_is_split_at_headings_and_numbered_rules(shop):
    out, policies, items = make(shop, rows=FORMATS["openai"][0])
    policy = policies["returns"]
    names = ["Returns", "Goods, rule 1", "Goods, rule 2", "Money, rule 1", "Money, rule 2"]
    assert [part["id"] for part in policy["sections"]] == names
    assert policy["sections"][1]["section"] == "1. Opened goods stay. [a crushed box]"
    assert policy["text"].count("<image>") == len(policy["images"]) == 2
    assert "".join(p.get("text", "<image>") for p in messages(items["sft"][0], policy)[0]["content"]).startswith(
        policy["text"]
    )


@pytest.mark.parametrize(
    "text, names",
    [
        ("1. a\n2. b\n   more\n3. c", ["rule 1", "rule 2", "rule 3"]),
        ("Rule 1: a\nRule 2: b", ["rule 1", "rule 2"]),
        ("# A\n\n## B\ntext\n## B\nagain", ["B", "B (2)"]),
        ("first\n\nsecond", ["paragraph 1", "paragraph 2"]),
        ("one line", []),
        ("- a\n- b\n  - within b\n- c", ["point 1", "point 2", "point 3"]),
        ("1. a\n   1. within a\n   2. too\n2. b", ["rule 1", "rule 2"]),
        ("  1. a\n  2. b\n1. c", ["rule 1", "rule 2", "rule 1 (2)"]),
        ("1) a\n2) b", ["rule 1", "rule 2"]),
        ("§1 a\n\n§ 2 b", ["rule 1", "rule 2"]),
        ("# A\n~~~\n# no heading\n```\n1. no rule\n~~~\n# B\nb", ["A", "B"]),
        ("# A\n```\n# no heading\n1. no rule\n```\n", ["A"]),
        ("In 2024 we began.\n\n2024 was a year\n", ["paragraph 1", "paragraph 2"]),
    ],
)
def test_sections(text, names):
    assert [part["id"] for part in sections(text)] == names


@pytest.mark.parametrize(
    "written",
    ["![x](<a (1) box.png>)", "![x](a%20(1)%20box.png)", "![](b(1).png 'title')", "<IMG width=5 SRC = b(1).png>"],
)
def test_a_picture_of_the_policy_is_found_however_it_is_written(shop, written):
    for name in ("a (1) box.png", "b(1).png"):
        (shop / name).write_bytes((shop / "box.png").read_bytes())
    (shop / "returns.md").write_text(f"# A\nsee {written} here")
    _, policies, _ = make(shop, rows=[ASKED])
    assert policies["returns"]["text"] == "# A\nsee <image> here" and len(policies["returns"]["images"]) == 1


def test_cpt_items_of_every_kind_come_from_the_policy(shop):
    """Applied, document, sections, and the response form where a chain names sections."""
    _, policies, items = make(shop, rows=FORMATS["openai"][0])
    kinds = {
        kind: [i for i in items["cpt"] if i["kind"] == kind] for kind in ("applied", "document", "response", "section")
    }
    assert [len(kinds[kind]) for kind in ("applied", "document", "response")] == [5, 1, 5]
    assert target(kinds["response"][0]) == "<think>1. Opened goods stay. [a crushed box]</think>"
    asked = {item["question"]: item["answer"] for item in kinds["section"]}
    assert asked["What does Goods, rule 2 of policy returns say?"] == "2. Sealed goods come back."
    assert asked["<image>\nWhere does policy returns show this?"] in ("Goods, rule 1", "Money, rule 2")
    assert said(kinds["document"][0], policies["returns"])[0][1].startswith("# Returns")


def test_the_policy_may_stand_in_the_system_prompt(shop):
    rows = FORMATS["openai, several turns"][0]
    _, policies, items = make(shop, "--place", "system", rows=rows)
    (role, text), *rest = said(items["sft"][0], policies["returns"])
    assert role == "system" and text.startswith("# Returns") and text.endswith("\n\nYou are Bo.")
    assert rest == said(items["sft"][0])[1:]
    _, policies, items = make(shop, "--place", "system", rows=FORMATS["openai"][0])
    assert [role for role, _ in said(items["sft"][0], policies["returns"])] == ["system", "user"]
    assert [role for role, _ in said(items["sft"][0])] == ["user"]


def test_data_without_a_policy_is_for_replay(shop):
    (shop / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORMATS["LLaVA"][0]))
    main(f"--data {shop}/log.jsonl --out {shop}/out".split())
    assert load_policies(shop / "out") == {} and not (shop / "out" / "cpt.jsonl").exists()
    assert {item["policy"] for item in load_items(shop / "out", "sft.jsonl", {})} == {""}


# -- the split


def test_no_picture_and_no_conversation_stands_on_both_sides(shop):
    """Else the test would ask what was learned by heart."""
    rows = [chat(f"photos/{k % 6}.png") | {"ticket": k} for k in range(60)]
    rows += [{"question": f"q {k}", "answer": "a", "ticket": 100 + k % 5, "cot": "c"} for k in range(30)]
    rows += [{"question": f"Same  {k % 4} words", "answer": str(k), "cot": "c"} for k in range(20)]
    for k, row in enumerate(rows[:60]):
        row["messages"][1]["content"] += str(k)
    for seed in range(5):
        out, _, items = make(shop, "--test", "0.3", "--seed", str(seed), rows=rows)
        sides = [items["sft"] + items.get("rl", []), items["test"]]
        pictures = [{image for item in side for image in item["images"]} for side in sides]
        texts = [{item["question"] for item in side if not item["images"]} for side in sides]
        assert not pictures[0] & pictures[1] and not {t for t in texts[0] if "Same" in t} & texts[1]
        number = lambda side: {int(t.split()[1]) % 5 for t in side if t.startswith("q")}
        assert not number(texts[0]) & number(texts[1])
        assert 0 < len(items["test"]) <= 33


def test_every_turn_is_an_item_and_all_stay_on_one_side(shop):
    turns = [{"from": who, "value": f"{who} {k}"} for k in range(3) for who in ("human", "gpt")]
    rows = [
        {"image": f"photos/{k}.png", "conversations": [{**t, "value": f"{t['value']} {k}"} for t in turns]}
        for k in range(6)
    ]
    _, _, items = make(shop, "--every-turn", "--test", "0.2", rows=rows)
    assert len(items["sft"]) == 15 and len(items["test"]) == 3
    assert len({item["images"][0] for item in items["test"]}) == 1


def test_reasoning_goes_to_sft_and_the_rest_to_rl(shop):
    rows = [chat(f"photos/{k}.png") for k in range(6)]
    for k in range(3):
        rows[k]["messages"][1]["content"] = f"plain {k}"
    _, _, items = make(shop, "--test", "0", rows=rows)
    assert [bool(item.get("cot")) for item in items["sft"]] == [True] * 3
    assert [bool(item.get("cot")) for item in items["rl"]] == [False] * 3


# -- what is dropped, and what is refused


def test_nothing_is_dropped_silently(shop, capsys):
    good = [chat(f"photos/{k}.png") for k in range(4)]
    bad = [
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "king", "content": "hello"}]},
        chat("photos/none.png"),
        chat("returns.md"),
        chat("data:image/png;base64,!!!"),
        {
            "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}],
            "image": "box.png",
        },
        {"question": "a?", "answer": "b } c"},
        {"messages": [1, 2]},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
        {"foo": 1},
        good[0],
    ]
    lines = [json.dumps(row) for row in good + bad] + ['{"torn', '["list"]', '{"question": "\\ud800", "answer": "x"}']
    (shop / "log.jsonl").write_text("\n".join(lines))
    out, _, items = make(shop)
    assert len(items["sft"]) + len(items["test"]) == 4
    dropped = (out / "dropped.txt").read_text().splitlines()
    assert [int(line.split("log.jsonl:")[1].split(":")[0]) for line in dropped] == list(range(5, 20))
    told = capsys.readouterr().out
    assert "dropped 15 in all" in told and "the same prompt and answer once more" in told


def test_what_is_left_out_of_a_conversation_is_counted(shop, capsys):
    say = lambda who, text: {"role": who, "content": text}
    chats = [
        [say("user", f"q {k}"), say("assistant", "<think>a</think>b"), say("user", "c"), say("assistant", "d")]
        for k in range(4)
    ]
    chats[0].append(say("user", "thanks"))
    _, _, items = make(shop, rows=[{"messages": chat, "colour": 1} for chat in chats])
    told = capsys.readouterr().out
    assert "left out 1: turns after the last answer" in told and "left out 4: reasoning of earlier turns" in told
    assert "columns that nothing here reads: colour" in told
    assert items["sft"][0]["messages"][1]["content"] == "b"


def test_photographs_are_told_the_two_flags_that_they_need(shop, capsys):
    """12 megapixels and a policy of 20,000 characters; the flags hold for what data.check counts exactly."""
    folder = tiny_checkpoint(shop / "model")
    Image.new("RGB", (4000, 3000)).save(shop / "photos" / "0.png")
    (shop / "returns.md").write_text(POLICY + "3. And so on. \n" * 1400)
    log = "".join(json.dumps(chat(f"photos/{k}.png")) + "\n" for k in range(6))
    (shop / "log.jsonl").write_text(log)
    words = f"--policy {shop}/returns.md --data {shop}/log.jsonl --out {shop}/out --model {folder} --max-response 20000"
    main(words.split(), Processor.from_pretrained)
    told = capsys.readouterr().out
    assert "too long: 6 prompts over --max-prompt 4096" in told
    flags = re.search(r"train with (--max-pixels \d+ --max-prompt \d+)", told).group(1).split()
    data.check.main(
        [f"{shop}/out", "--model", str(folder), "--max-response", "30000", *flags], Processor.from_pretrained
    )


def test_one_item_is_learned_from_and_not_kept_for_the_test():
    """A test alone, with nothing to learn, helps nobody; of any share of more items, one at least is left to learn."""
    for n, share, expected in ((1, 0.1, 0), (1, 0.99, 0), (2, 0.1, 1), (2, 0.99, 1), (10, 0.99, 9), (10, 0, 0)):
        groups = Groups()
        for i in range(n):
            groups.add([str(i)])
        assert len(groups.test_side(share, 0)) == expected


REFUSED = [
    ("http picture", [chat("https://a.b/c.png")], "", "log.jsonl:1: picture 'https://a.b/c.png' lies on the network"),
    ("nothing left", [{"foo": 1}], "", "found 1 rows dropped, the first at .*log.jsonl:1: found the keys foo"),
    ("no data", [], "", "found no rows"),
    ("no file", [chat("box.png")], "--data F/no.jsonl", "no.jsonl: no such file"),
    ("no policy", [chat("box.png")], "--policy F/no.md", "no.md: no such file"),
    ("mark without a picture", [chat("box.png")], "--policy F/mark.md", "<image> without a file"),
    ("picture of the policy missing", [chat("box.png")], "--policy F/lost.md", "picture 'lost.png' is missing"),
    ("picture on the network", [chat("box.png")], "--policy F/net.md", "lies on the network"),
    ("empty policy", [chat("box.png")], "--policy F/empty.md", "the file is empty"),
    ("share", [chat("box.png")], "--test 1", "--test 1.0 found"),
    ("map", [chat("box.png")], "--map question", "--map .* expected OURS=THEIRS"),
    ("two names", [chat("box.png")], "--name a --name b", "found 1 policies"),
    ("media", [chat("box.png")], "--media F/nowhere", "no such folder"),
]


@pytest.mark.parametrize("what, rows, flags, line", REFUSED, ids=[row[0] for row in REFUSED])
def test_bad_input_is_one_line_and_leaves_nothing_behind(shop, what, rows, flags, line):
    texts = {"mark": "see <image>", "lost": "![](lost.png)", "net": "![](https://a.b/c.png)", "empty": " \n"}
    for name, text in texts.items():
        (shop / f"{name}.md").write_text(text)
    (shop / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = flags.replace("F/", f"{shop}/").split()
    base = [] if "--policy" in words else ["--policy", f"{shop}/returns.md"]
    base += [] if "--data" in words else ["--data", f"{shop}/log.jsonl"]
    before = sorted(os.listdir(shop))
    with pytest.raises(InputError, match=line) as error:
        main([*base, "--out", f"{shop}/out", *words])
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert sorted(os.listdir(shop)) == before


def test_a_large_json_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    """Whatever the pieces, also where one ends inside a string, a number or an escape."""
    rows = [{"a": "x" * (7 * k % 50), "n": [1.5, -20, k], "s": '"]},{\\" ü'} for k in range(40)]
    (tmp_path / "l.json").write_text(json.dumps(rows, indent=1))
    for size in (1, 2, 3, 17, 100, 10**6):
        monkeypatch.setattr("data.formats.CHUNK", size)
        assert [row for _, row in read_rows(tmp_path / "l.json")] == rows
    (tmp_path / "l.json").write_text(json.dumps(rows)[:-30])
    with pytest.raises(InputError, match="not JSON after row 39"):
        list(read_rows(tmp_path / "l.json"))


def test_two_thousand_items_a_second(shop):
    """50,000 items are a log of ordinary size. Held against the reading of its JSON, which takes 10 microseconds an
    item where we convert 8,000 a second: both are slower on a machine with other work."""
    rows = [chat(f"photos/{k % 6}.png") for k in range(3000)]
    for k, row in enumerate(rows):
        row["messages"][1]["content"] += str(k)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (shop / "log.jsonl").write_text(text)

    def seconds(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    words = f"--policy {shop}/returns.md --data {shop}/log.jsonl --out {shop}/out --overwrite".split()
    reading = lambda: [json.loads(line) for line in text.splitlines()]
    ours, unit = (min(seconds(work) for _ in range(3)) for work in (lambda: main(words), reading))
    assert ours / unit < 40, (ours, unit)
