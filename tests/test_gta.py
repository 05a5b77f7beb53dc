"""GTAPolicy: the prose says what the engine does, gold calls follow, splits do not leak, the official folder loads."""

import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from data import InputError
from data.dataset import load_items, load_policies, messages, target
from data.gta_draw import COLORS
from data.gta_policy import (
    call_text,
    least_tokens,
    made_up_profile,
    main,
    make_dataset,
    make_items,
    override_items,
    own_dialogues,
    read_official,
    split,
    to_official,
)
from data.gta_rules import (
    NAME,
    TOOLS,
    VERSIONS,
    bare_name,
    changed_versions,
    next_step,
    open_ended,
    policy_text,
    rules,
    solver_command,
    value_beside,
    version,
)
from data.gta_score import call, exact, read_call
from data.rewards import parse

SPLITS = ("cpt.jsonl", "sft.jsonl", "rl.jsonl", "test.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("gta") / "set"
    report = make_dataset(str(out), seed=0)
    return out, report


@pytest.fixture(scope="module")
def own():
    return own_dialogues(0)


@pytest.fixture(scope="module")
def items(folder):
    policies = load_policies(folder[0])
    return {name: load_items(folder[0], name, policies) for name in SPLITS}


# -- the rules ---------------------------------------------------------------------------------------------------------


def by_hand(tool, account, age, credits):
    """The method's version rules once more, written as a chain of cases and not as rows."""
    if tool == "ImageDescription":
        if account == "A":
            return 5
        return (2 if credits > 500 else 1) if account == "D" else (4 if credits > 500 else 3)
    if tool == "OCR":
        if credits <= 250:
            return 5
        if credits <= 750:
            return 4 if account in "AB" else 3
        return 2 if age < 21 else 1
    if tool == "GoogleSearch":
        return 1 if age < 21 else 2 if credits < 500 else 3
    if tool == "TextToImage":
        return 1 if account != "D" else 2 if credits > 500 else 3
    if tool == "RegionAttributeDescription":
        return 2 if account in "AB" else 1
    if tool == "CountGivenObject":
        return 1 if credits < 250 else 2 if credits < 500 else 3 if credits < 750 else 4
    return 1 if age < 21 else 2 if age < 60 else 3


PROFILES = [
    {"account_type": a, "age": y, "credits": c}
    for a, y, c in itertools.product(
        "ABCD", (0, 12, 20, 21, 40, 59, 60, 99), (0, 249, 250, 251, 499, 500, 501, 749, 750, 751, 5000)
    )
]


def test_versions_are_the_methods_and_every_profile_has_exactly_one():
    for tool, rows in VERSIONS.items():
        for profile in PROFILES:
            assert sum(row.fits(profile) for row in rows) == 1
            assert version(tool, profile) == f"v{by_hand(tool, *profile.values())}", (tool, profile)
    assert len(TOOLS) == 14 and sum(tool not in VERSIONS for tool in TOOLS) == 7


def read_versions(text):
    """An agent that has only the policy's sentences: {tool: [(test of a profile, version)]}."""
    found = {}
    for conditions, tool, number in re.findall(r"^   - ((?:account|age|credits)[^:]*): (\w+)_(v\d)$", text, re.M):
        tests = []
        for part in conditions.split(", "):
            if match := re.fullmatch(r"account type (.*)", part):
                tests.append(lambda p, letters=match[1].split(" or "): p["account_type"] in letters)
            elif match := re.fullmatch(r"(age|credits) from (\d+) to (\d+)", part):
                tests.append(lambda p, m=match: int(m[2]) <= p[m[1]] <= int(m[3]))
            elif match := re.fullmatch(r"(age|credits) of (\d+) or (more|less)", part):
                tests.append(lambda p, m=match: (p[m[1]] >= int(m[2])) if m[3] == "more" else (p[m[1]] <= int(m[2])))
            else:
                raise AssertionError(f"the policy says {part!r}, which no reader of this test understands")
        found.setdefault(tool, []).append((tests, number))
    return found


def test_an_agent_that_reads_only_the_prose_picks_every_version_right(items):
    """And with another user's profile it does not: the profile is what decides."""
    prose = read_versions(policy_text())
    assert set(prose) == set(VERSIONS)

    def pick(tool, profile):
        return next((n for tests, n in prose.get(tool, ()) if all(test(profile) for test in tests)), None)

    assert all(pick(tool, p) == version(tool, p) for tool in VERSIONS for p in PROFILES)
    everything = items["rl.jsonl"] + items["test.jsonl"]
    names = [json.loads(item["answer"])["name"] for item in everything]
    profiles = [item["profile"] for item in everything]

    def agree(given):
        called = [f"{bare_name(n)}_{v}" if (v := pick(bare_name(n), p)) else n for n, p in zip(names, given)]
        versioned = [a == b for a, b in zip(called, names) if bare_name(a) in VERSIONS]
        return sum(versioned) / len(versioned)

    assert agree(profiles) == 1
    assert agree(profiles[7:] + profiles[:7]) < 0.55


def test_the_policy_has_24_rules_all_tools_and_3000_tokens():
    text = policy_text()
    assert len(rules()) == 24 and re.findall(r"^Rule (\d+)\.", text, re.M) == [str(n) for n in range(1, 25)]
    assert least_tokens(text) >= 3000  # pieces of Qwen's pre-tokenizer, which its merges never cross
    for number, (tool, (_, arguments, notes)) in enumerate(TOOLS.items(), 1):
        assert f"\n{number}. {tool}\n" in text
        assert all(f"- {name} (" in text for name in arguments)
        assert len(notes) == len(VERSIONS.get(tool, ()))


def test_the_engine_orders_calls_by_the_rules():
    profile = {"account_type": "C", "age": 30, "credits": 600}
    wants = [{"want": "mark", "image": "image/b.png", "object": "mug", "label": "sold"}]
    pictures, history, names, why = ["image/a.png", "image/b.png"], [], [], []
    results = iter(["one", "Error: busy", "two", "(1, 2, 30, 40), score 92", "image/made.png"])
    while step := next_step(wants, pictures, profile, history):
        names.append((step.call["name"], step.call["arguments"]["image"]))
        why.append(" ".join(step.why))
        history.append({"call": step.call, "result": next(results)})
    assert names == [
        ("ImageDescription_v4", "image/a.png"),
        ("ImageDescription_v4", "image/b.png"),
        ("ImageDescription_v4", "image/b.png"),
        ("TextToBbox", "image/b.png"),
        ("DrawBox", "image/b.png"),
    ]
    assert history[-1]["call"]["arguments"] == {"image": "image/b.png", "bbox": "(1, 2, 30, 40)", "annotation": "sold"}
    quoted = [re.findall(r"Rule (\d+)", words) for words in why]
    assert quoted == [["5", "8"], ["5", "8"], ["7"], ["23", "20", "15"], ["23", "15"]]


def test_values_are_read_in_rows_and_columns():
    rows = "(10, 10, 60, 30) Tea\n(200, 11, 240, 29) 2.50\n(10, 50, 60, 70) Rice\n(200, 51, 240, 69) 11.00"
    assert value_beside("Rice", rows) == "11.00"
    columns = "(10, 20, 30, 29) 66\n(50, 90, 70, 99) 7\n(8, 300, 32, 310) Mon\n(48, 300, 72, 310) Tue"
    assert value_beside("Mon", columns) == "66"
    with pytest.raises(ValueError, match="no number beside"):
        value_beside("Total", rows)
    assert solver_command("\\frac{x}{3} + 13 = 16") == "solve(x/3 + 13 = 16, x)"
    assert solver_command("t^{2} - 5t + 6 = 0") == "solve(t**2 - 5*t + 6 = 0, t)"


# -- our own set -------------------------------------------------------------------------------------------------------


def test_the_set_has_the_promised_size_and_reads_back(folder, items):
    out, report = folder
    assert report["dialogues"] >= 240 and report["pictures"] >= 60 and report["tools"] == 14
    assert 0.15 < report["test"] / (report["test"] + report["train"]) < 0.23
    assert report["most frequent"] < 0.25
    policies = load_policies(out)
    for item in items["test.jsonl"][:20]:
        prompt = messages(item, policies[NAME])[0]["content"]
        assert [part["image"] for part in prompt if part["type"] == "image"] == item["images"]
        assert parse(target(item)) == item["answer"]
    assert items["cpt.jsonl"][-1]["kind"] == "document" and len(items["cpt.jsonl"]) == len(items["sft.jsonl"]) + 1


def test_gold_answers_earn_everything_and_others_do_not(items):
    everything = items["rl.jsonl"] + items["test.jsonl"]
    for item in everything:
        assert read_call(item["answer"]) is not None
        assert exact(None, target(item), item) == call(None, target(item), item) == 1
    mistaken = sum(exact(None, target(other), item) for item, other in zip(everything, everything[1:]))
    assert mistaken < 0.1 * len(everything)


def test_every_tool_is_asked_for_in_training_and_in_the_test(items):
    for name in ("rl.jsonl", "test.jsonl"):
        assert {bare_name(json.loads(item["answer"])["name"]) for item in items[name]} == set(TOOLS)


def test_no_test_picture_or_dialogue_is_seen_in_training(items):
    seen = {
        (key, value)
        for name in SPLITS[:3]
        for item in items[name]
        for key, value in [("dialogue", item.get("dialogue")), *(("picture", Path(p).name) for p in item["images"])]
    }
    for item in items["test.jsonl"]:
        assert ("dialogue", item["dialogue"]) not in seen
        assert not {("picture", Path(p).name) for p in item["images"]} & seen


def test_pictures_hold_what_their_facts_say(own):
    """Ink lies inside every text box, and objects have their colour inside their box and are as many as counted."""
    dialogues, pictures = own
    for picture in pictures.values():
        for (x1, y1, x2, y2), _ in picture.texts:
            assert 0 <= x1 < x2 <= 448 and 0 <= y1 < y2 <= 336
            assert len(picture.image.crop((x1, y1, x2, y2)).getcolors(1 << 16)) > 1
        for thing in picture.objects:
            colors = {color for _, color in picture.image.crop(thing["box"]).getcolors(1 << 16)}
            assert COLORS[thing["color"]] in colors
        if picture.family == "scene":
            boxes = [thing["box"] for thing in picture.objects]
            assert not any(
                a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in itertools.combinations(boxes, 2)
            )
            assert sum(picture.facts["counts"].values()) == len(boxes)
    for dialogue in dialogues:
        for entry in dialogue.history():
            given, result = entry["call"]["arguments"], entry["result"]
            assert result  # every simulated tool has something to say, and says what is there
            if entry["call"]["name"] == "TextToBbox" and not result.startswith("Error"):
                there = [thing["box"] for thing in pictures[given["image"]].objects if thing["kind"] == given["text"]]
                told = [tuple(map(int, box.split(", "))) for box in re.findall(r"\((.*)\), score", result)]
                assert told == there[: 1 if given["top1"] else None] and there
            if entry["call"]["name"].startswith("Count") and not result.startswith("Error"):
                assert int(result) == pictures[given["image"]].facts["counts"][given["text"]]


def digest(path):
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }


def test_same_seed_same_bytes_other_seed_other_users(folder, tmp_path):
    make_dataset(str(tmp_path / "again"), seed=0)
    assert digest(folder[0]) == digest(tmp_path / "again")
    assert [made_up_profile(0, k) for k in "123"] != [made_up_profile(1, k) for k in "123"]


def test_calls_with_loose_braces_survive_the_box():
    for command in ("plain", "f(x) = {", "}{", "\\frac{a}{b}", "say \\boxed{3}"):
        gold = {"name": "Plot", "arguments": {"command": command, "more": ["}", {"a": "{"}]}}
        text = call_text(gold)
        assert json.loads(text) == gold
        assert parse("\\boxed{%s}" % text) == text


# -- override ----------------------------------------------------------------------------------------------------------


def test_override_changes_every_version_and_shows_obedience_to_the_old_rules(folder):
    out, report = folder
    policies = load_policies(out / "override")
    assert list(policies) == [NAME] and policies[NAME]["text"].startswith("Updated policy")
    prose = read_versions(policies[NAME]["text"])
    items = load_items(out / "override", "test.jsonl", policies)
    assert len(items) == report["override"] > 40
    for item in items:
        new, old = json.loads(item["answer"]), json.loads(item["old_answer"])
        tool = bare_name(new["name"])
        assert new["arguments"] == old["arguments"] and new["name"] != old["name"]
        assert new["name"] == f"{tool}_{next(n for tests, n in prose[tool] if all(t(item['profile']) for t in tests))}"
        for entry in item["history"]:  # earlier calls obey the new rules, too
            assert entry["call"]["name"] in item["question"]


def test_changed_rules_give_no_profile_its_old_version():
    for seed in range(20):
        changed = changed_versions(random.Random(seed))
        assert all(version(tool, p, changed) != version(tool, p) for tool in VERSIONS for p in PROFILES)


# -- the official folder -----------------------------------------------------------------------------------------------


def write_official(folder, dialogues):
    for entry in dialogues.values():
        for file in entry["files"]:
            path = folder / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 24), (len(file["path"]) * 7 % 256, 90, 30)).save(path)
    (folder / "dataset.json").write_text(json.dumps(dialogues))
    (folder / "toolmeta.json").write_text("{}")
    return folder


def asked(text):
    return {"role": "user", "content": text}


def tooled(name, arguments, thought="I look closer.", **more):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}, **more}],
        "thought": thought,
    }


def told(name, content, kind="text"):
    return {"role": "tool", "name": name, "content": {"type": kind, "content": content}}


def pictured(*names):
    return [{"type": "image", "path": f"image/{name}", "url": None} for name in names]


OFFICIAL = {
    "0": {"tools": [{"name": "OCR", "description": "d", "inputs": [], "outputs": []}], "files": pictured("image_1.jpg"),
          "dialogs": [asked("What do I owe?"), tooled("OCR", {"image": "image/image_1.jpg"}),
                      told("OCR", "(1, 2, 3, 4) 12.50"),
                      tooled("Calculator", {"expression": "round(12.50 * 2, 2)"}), told("Calculator", "25.0"),
                      {"role": "assistant", "content": "25"}],
          "gt_answer": {"whitelist": [["25"]], "blacklist": None}},
    "1": {"tools": [], "files": pictured("image_2.jpg", "image_3.jpg"),
          "dialogs": [asked("Compare them."), tooled("ImageDescription", {"image": "image/image_2.jpg"}),
                      told("ImageDescription", "a cat"),
                      tooled("ImageDescription", {"image": "image/image_3.jpg"}),
                      told("ImageDescription", "broken pipe", "error"),
                      tooled("ImageDescription", {"image": "image/image_3.jpg"}), told("ImageDescription", "a dog"),
                      {"role": "assistant", "content": "A cat and a dog."},
                      asked("And how do I keep them apart?"),
                      tooled("GoogleSearch", {"query": "tips cat and dog", "k": 10}), told("GoogleSearch", "a gate"),
                      {"role": "assistant", "content": "With a gate."}],
          "gt_answer": {"whitelist": [], "blacklist": None}},
    "2": {"tools": [], "files": pictured("image_3.jpg"), "gt_answer": {},
          "dialogs": [asked("Frame the dog in the style of Klee."),
                      {"role": "assistant", "thought": "both", "tool_calls": [
                          *tooled("TextToBbox", {"image": "image/image_3.jpg", "text": "dog"})["tool_calls"],
                          *tooled("ImageStylization",
                                  {"image": "image/image_3.jpg", "instruction": "Klee"})["tool_calls"]]},
                      told("TextToBbox", "(1, 2, 3, 4), score 80"),
                      told("ImageStylization", "image/made.png", "image")]},
    "3": {"tools": [], "files": pictured("image_4.jpg"), "gt_answer": {},
          "dialogs": [asked("Solve it."), tooled("MathOCR", {"image": "image/image_4.jpg"}, None),
                      told("MathOCR", "x = {")]},
}  # fmt: skip


def test_every_step_of_an_official_dialogue_is_one_item(tmp_path):
    """Several pictures, several turns, a failed call, two calls in one message: 2 + 4 + 2 + 1 items."""
    dialogues = read_official(str(write_official(tmp_path, OFFICIAL)), seed=0)
    made = {d.key: make_items(d) for d in dialogues}
    assert {key: len(part) for key, part in made.items()} == {"0": 2, "1": 4, "2": 2, "3": 1}
    sums = made["0"][1]
    assert sums["history"][0]["result"] == "(1, 2, 3, 4) 12.50" and "Result 1: (1, 2, 3, 4) 12.50" in sums["question"]
    assert sums["answer"] == '{"name": "Calculator", "arguments": {"expression": "round(12.50 * 2, 2)"}}'
    broken, retried, search = made["1"][1:]
    assert broken["failed"] and "failed" not in retried
    assert retried["history"][-1]["result"] == "Error: broken pipe" and retried["answer"] == broken["answer"]
    assert "User: And how do I keep them apart?" in search["question"] and "User: And" not in retried["question"]
    assert json.loads(search["answer"])["arguments"]["k"] == 4
    assert made["2"][1]["history"][0]["call"]["name"] == "TextToBbox" and made["2"][1]["question"].count("Call 1") == 1
    for part in made.values():
        for item in part:
            name, profile = json.loads(item["answer"])["name"], item["profile"]
            assert name == (f"{bare_name(name)}_{v}" if (v := version(bare_name(name), profile)) else bare_name(name))
            assert exact(None, target(item), item) == 1


def test_official_dialogues_that_share_a_picture_stay_on_one_side(tmp_path):
    dialogues = read_official(str(write_official(tmp_path, OFFICIAL)), seed=0)
    for seed in range(10):
        for half in split(dialogues, seed):
            assert len({d.key for d in half} & {"1", "2"}) in (0, 2)


def test_the_official_folder_becomes_a_data_folder(tmp_path):
    root, out = write_official(tmp_path / "gta_dataset", OFFICIAL), tmp_path / "out"
    main(["--out", str(out), "--gta-root", str(root), "--seed", "2"])
    policies = load_policies(out)
    halves = [load_items(out, name, policies) for name in ("rl.jsonl", "test.jsonl")]
    assert sum(map(len, halves)) == 9


def test_our_set_reads_back_from_the_official_layout_item_for_item(folder, items, own):
    """Our folder is itself in the official layout: the official loader derives the very same items from it."""
    dialogues = read_official(str(folder[0]), seed=0)
    again = {item["id"]: item for d in dialogues for item in make_items(d)}
    for item in items["rl.jsonl"] + items["test.jsonl"]:
        plain = {**item, "images": [f"image/{Path(p).name}" for p in item["images"]]}
        del plain["_at"]  # the line that it stands in
        assert again.pop(item["id"]) == plain
    assert not again
    assert all(
        open_ended(d.turns[1][1]["arguments"]["query"]) == d.wants[-1]["open"]
        for d in own[0]
        if d.wants[-1]["want"] == "search" and len(d.wants) == 1
    )


BAD = {
    "not JSON": (lambda d: "{", "not JSON"),
    "a list": (lambda d: json.dumps([]), "list found"),
    "no dialogs": (lambda d: json.dumps({"0": {"files": []}}), "dialogue '0'.*'dialogs'"),
    "a missing picture": (lambda d: json.dumps({"0": {**d["0"], "files": pictured("gone.jpg")}}), "gone.jpg.*missing"),
    "a picture outside": (lambda d: json.dumps({"0": {**d["0"], "files": pictured("../../etc/passwd")}}), "outside"),
    "an absolute picture": (lambda d: json.dumps({"0": {**d["0"], "files": [{"path": "/etc/passwd"}]}}), "outside"),
    "an unknown tool": (
        lambda d: json.dumps({"0": {**d["0"], "dialogs": [asked("a"), tooled("Shell", {})]}}),
        "message 1.*'Shell'.*expected a tool",
    ),
    "arguments of a wrong kind": (
        lambda d: json.dumps({"0": {**d["0"], "dialogs": [asked("a"), tooled("OCR", 3)]}}),
        "'OCR' with int",
    ),
    "a result without a call": (
        lambda d: json.dumps({"0": {**d["0"], "dialogs": [asked("a"), told("OCR", "b")]}}),
        "result of 'OCR'",
    ),
    "an unknown role": (
        lambda d: json.dumps({"0": {**d["0"], "dialogs": [{"role": "judge", "content": ""}]}}),
        "role 'judge'",
    ),
    "a call first": (
        lambda d: json.dumps({"0": {**d["0"], "dialogs": [tooled("MathOCR", {})]}}),
        "begins with the user",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_official_folder_is_refused_and_leaves_nothing(case, tmp_path):
    change, words = BAD[case]
    root = write_official(tmp_path / "gta_dataset", OFFICIAL)
    (root / "dataset.json").write_text(change(OFFICIAL))
    with pytest.raises(InputError, match=words):
        main(["--out", str(tmp_path / "out"), "--gta-root", str(root)])
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gta_dataset"]


def test_a_missing_folder_and_a_taken_place_are_refused(tmp_path):
    with pytest.raises(InputError, match="dataset.json: no such file"):
        main(["--out", str(tmp_path / "out"), "--gta-root", str(tmp_path)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists already"):
        main(["--out", str(tmp_path / "full")])
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_override_items_leave_the_rest_of_a_dialogue_alone(own):
    dialogues, _ = own
    changed = changed_versions(random.Random(5))
    for item in override_items(dialogues[:40], changed):
        assert "cot" not in item and item["id"].endswith("-override")
    dataset, meta = to_official(dialogues[:3])
    assert list(dataset) == ["0", "1", "2"] and set(meta) == set(TOOLS)
