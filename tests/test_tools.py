"""Tool policies in the tiny world: what the text says, what the engine answers, and what the base learns are one."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from helpers import random_table

from data import InputError, gta_score, rewards
from data.dataset import load_items, load_policies, messages, target
from evaluate import evaluate, load, sections
from model import Processor
from tiny import score, tools
from tiny.demo import BASES
from tiny.pretrain import CONFIG
from tiny.stream import PICTURE, ToolStream
from tiny.tools import draw_policy, make_item, run, said, spell


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    out = tmp_path_factory.mktemp("words")
    tools.write_words(out)
    (out / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": len(tools.ALL_TOKENS)}))
    return Processor.from_pretrained(out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data of single turns, and of whole dialogues; a third of the functions is left out of SFT."""
    out, flags = tmp_path_factory.mktemp("tools"), "--policies 2 --queries 40 --sft 4 --test 12 --leave-out 0.34"
    tools.main(["--out", str(out / "turns"), "--tools", "9", *flags.split(), "--seed", "3"])
    tools.main(["--out", str(out / "dialogues"), "--tools", "6", *flags.split(), "--dialogues"])
    return out


@pytest.fixture(scope="module")
def stream():
    return ToolStream(0, random_table())


def drawn(stream, least=4, most=14):
    """A policy with a request under it: (policy, facts, goal, profile, turns)."""
    while True:
        policy = draw_policy(stream.rng, int(stream.rng.integers(least, most + 1)))
        facts, _ = stream.facts()
        goal = tools.draw_goal(stream.rng, policy, facts, str(stream.rng.choice(list(policy["tools"]))))
        if goal:
            profile = tools.draw_profile(stream.rng)
            return policy, facts, goal, profile, tools.dialogue(policy, facts, goal, profile)


# -- 1. a reader of the text alone -------------------------------------------------------------------------------------


def value(words, user):
    """What a rule's words give this user."""
    if words[0] == "account":
        at, other = words.index("then"), words.index("otherwise")
        return value(words[at + 1 : other] if user["account"] in words[1:at] else words[other + 1 :], user)
    if words[0] in ("age", "credits"):
        pairs = list(zip(words[2:-2:3], words[3:-2:3]))
        return next((v for edge, v in pairs if int(user[words[0]]) < int(edge)), words[-1])
    return words[0]


def read(item, text):
    """The call that a policy's text demands next: an engine that shares nothing with tiny.tools."""
    lines = [line.split() for line in text.partition(" : ")[2].split(" . ")]
    lines[-1] = lines[-1][:-1] if lines[-1][-1] == "." else lines[-1]
    needs = {line[0]: line[2] for line in lines if line[1] == "needs"}
    rules = {line[0]: line[1:] for line in lines if line[1] != "needs"}
    served = {rule[0]: key for key, rule in rules.items() if re.fullmatch(r"T\d+", rule[0])}
    asked, words = item["messages"][0]["content"], item["messages"][0]["content"].split()
    user = {key: words[words.index(key) + 1] for key in ("account", "age", "credits")}
    _, _, ask = asked.partition(" : ")
    verb, *rest = ask.split()
    made = []  # (function, image, result)
    for call, told in zip(item["messages"][1::2], item["messages"][2::2]):
        found = json.loads(re.search(r"<tool_call>(.*)</tool_call>", call["content"])[1])
        given = found["arguments"]
        made.append((served[found["name"].split("_")[0]], given.get("image"), told["content"].split("\n")[1]))
    made = [one for one in made if one[2] != "error"]
    images = item["facts"]["images"]
    phrase, _, place = " ".join(rest).partition(" in ")
    if " with " in f" {' '.join(rest)}":
        phrase, _, other = " ".join(rest).partition("with ")
        fit = lambda image: any(set(other.split()) <= set(map(str, thing.values())) for thing in image["objects"])
        place = [k for k, image in enumerate(images, 1) if fit(image)]
        assert len(place) == 1
        place = place[0]
    elif verb in ("describe", "read", "mark", "paint", "zoom"):
        place = rest[-1]
    do, image = verb, int(place) if place and verb != "search" else None
    undone = [k for k in range(1, len(images) + 1) if ("describe", k) not in [one[:2] for one in made]]
    if len(images) > 1 and needs["several"] == "describe" and undone:
        do, image = "describe", undone[0]
    else:
        while needs.get(do, "none") != "none" and (needs[do], image) not in [one[:2] for one in made]:
            do = needs[do]
    given = {"image": image} if image and do not in ("add", "subtract") else {}
    if do in ("locate", "count", "search") or do in tools.KINDS and needs[do] == "none":
        given["text"] = phrase.strip()
    elif do in tools.KINDS:
        given["bbox"] = json.loads([one[2] for one in made if one[:2] == ("locate", image)][-1])
    if do in ("add", "subtract"):
        shown = next(one[2] for one in made if one[:2] == ("read", image))
        given["expression"] = f"{shown} {phrase.strip()}"
    for key in {"search": ["k"], "mark": ["position"], "paint": ["tint"], "zoom": ["scale"]}.get(do, ()):
        said = value(rules[key], user)
        given[key] = int(said) if said.isdigit() else said
    return {"name": rules[do][0] + value(rules[do][1:], user), "arguments": given}


def test_a_reader_of_the_policys_text_alone_makes_the_same_calls(folders):
    """The text is all that the model gets: what it says, and nothing else, must give the answer."""
    for name in ("turns", "turns/override", "dialogues"):
        policies = load_policies(folders / name)
        items = load_items(folders / name, "test.jsonl", policies, folders / "turns")
        if name == "dialogues":
            items = [
                item for item in load_items(folders / name, "sft.jsonl", policies) if "tool_call" in item["answer"]
            ]
            items = [item for item in items if item["messages"][-1]["content"].split("\n")[1:2] != ["error"]]
        assert len(items) > 12
        for item in items:
            call = read(item, policies[item["policy"]]["text"])
            assert gta_score.read_call(item["answer"]) == call, item


def test_the_score_of_real_calls_reads_these_and_no_others(folders):
    """data.gta_score judges the tiny world's calls as it judges GTAPolicy's: version and arguments count."""
    items = load_items(folders / "turns", "test.jsonl", load_policies(folders / "turns"))
    for item in items:
        text = target(item)
        assert gta_score.exact(None, text, item) == 1 and rewards.format(None, text, item) == 1
        name = gta_score.read_call(item["answer"])["name"]
        wrong = name[:-1] + str(int(name[-1]) % 5 + 1)
        assert gta_score.tool(None, text.replace(f'"{name}"', f'"{wrong}"'), item) == 0
        shown = re.sub(r'("image": )\d', r"\g<1>9", text)
        assert "image" not in item["answer"] or gta_score.arguments(None, shown, item) < 1
        assert gta_score.exact(None, text.replace("</tool_call>", ""), item) == 0
    answered = [item for item in load_items(folders / "dialogues", "sft.jsonl", load_policies(folders / "dialogues"))]
    final = [item for item in answered if "tool_call" not in item["answer"]]
    assert final and all(gta_score.exact(None, target(item), item) == 1 for item in final)
    assert gta_score.exact(None, "<think> done </think> other", final[0]) == 0


# -- 2. words, turns and the stream ------------------------------------------------------------------------------------


def test_every_text_is_words_of_the_vocabulary_and_comes_back(folders, processor):
    for name, splits in (("turns", ("cpt", "rl", "test")), ("dialogues", ("sft", "test"))):
        policies = load_policies(folders / name)
        for item in [item for split in splits for item in load_items(folders / name, f"{split}.jsonl", policies)]:
            prompt = processor.encode(messages(item, policies[item["policy"]]), add_generation_prompt=True)
            ids = processor.tokenizer.encode(target(item), add_special_tokens=False).ids
            assert not {tools.IDS["<unk>"]} & {*prompt.input_ids.tolist(), *ids}
            assert processor.decode(ids).split() == target(item).replace(">", "> ").replace("<", " <").split()


def test_the_words_of_the_old_base_keep_their_ids():
    assert all(tools.IDS[word] == k for k, word in enumerate(tools.TOKENS))
    assert len(set(tools.ALL_TOKENS)) == len(tools.ALL_TOKENS)


def test_an_item_has_the_history_that_a_dialogue_would_have(stream):
    """So that a model that was taught single turns can live a whole dialogue, each turn after its own words."""
    for _ in range(40):
        policy, facts, goal, profile, turns = drawn(stream)
        names, first = ["a.png"] * len(facts["images"]), None
        first = make_item(policy, facts, names, goal, profile, turns, 0)
        chat, calls = list(first["messages"]), []
        for k, turn in enumerate(turns):
            item = make_item(policy, facts, names, goal, profile, turns, k)
            assert item["messages"] == chat
            chat.append({"role": "assistant", "content": spell(said(turn))})
            if "call" in turn:
                call = gta_score.read_call(item["answer"])
                chat.append({"role": "user", "content": f"<tool_response>\n{run(item, call, calls)}\n</tool_response>"})
                calls.append(call)
        assert item["answer"] == turns[-1]["result"] and len(calls) == len(turns) - 1


def test_the_stream_teaches_what_a_chat_asks(stream, processor):
    """Tokens of a dialogue packed for training are those of the item's chat; results of tools carry no weight."""
    for _ in range(30):
        policy, facts, goal, profile, turns = drawn(stream)
        words, weight = tools.lesson(policy, facts, goal, profile, turns)
        names = ["x"] * len(facts["images"])
        item = {"id": "x", **make_item(policy, facts, names, goal, profile, turns, len(turns) - 1)}
        text = "<|im_end|>\n<|im_start|>".join(f"{turn['role']}\n{turn['content']}" for turn in item["messages"][:])
        text = text.partition("\n")[2] + "<|im_end|>\n<|im_start|>assistant\n" + target(item) + "<|im_end|>"
        text = text.replace("<image>", "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>")
        ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
        mine = [t for w in words for t in (PICTURE if w == tools.IMAGE else [tools.IDS[w]])]
        assert mine == ids
        learnt = spell([word for word, w in zip(words, weight) if w])
        assert "tool_response" not in learnt and learnt.count("<think>") == len(turns)


def test_tools_answer_what_the_pictures_show_and_refuse_the_rest(stream):
    policy, facts, goal, profile, turns = drawn(stream, 14, 14)
    item = {"facts": {**facts, "fails": [1], "tools": {tool["tool"]: f for f, tool in policy["tools"].items()}}}
    call = lambda f, **given: {"name": f"{policy['tools'][f]['tool']}_v1", "arguments": given}
    thing = facts["images"][0]["objects"][0]
    assert json.loads(run(item, call("locate", image=1, text=thing["color"])))
    assert run(item, call("color", image=1, bbox=thing["box"])) == thing["color"]
    assert run(item, call("read", image=1)) == f"[{facts['images'][0]['number']}]"
    assert run(item, call("add", expression="[3] + 4")) == "[7]"
    assert run(item, call("read", image=1), [{}]) == "error"  # the second call fails by itself
    bad = [call("read", image=9), call("read"), call("read", image="1"), call("add", expression="3 ** 4")]
    bad += [{"name": "T999_v1", "arguments": {}}, {"name": policy["tools"]["read"]["tool"], "arguments": {"image": 1}}]
    bad += [call("color", image=1, bbox=[0, 0, 1, 1]), call("locate", image=1, text="none"), call("read", image=0)]
    bad += [call("read", image=1, k=3), call("search", text="cube"), call("count", image=1), call("mark", image=1)]
    for wrong in bad:
        with pytest.raises(ValueError, match="error"):
            run(item, wrong)


# -- 3. what a guesser gets, and what SFT shows ------------------------------------------------------------------------


def test_who_has_not_read_the_policy_can_only_guess(stream):
    """Names and versions are drawn evenly, so that no answer is likelier than others before the policy is read."""
    versions, names, within = Counter(), Counter(), []
    for _ in range(150):
        policy = draw_policy(stream.rng, 8)
        for tool in policy["tools"].values():
            found = [tools.decide(tool["rule"], tools.draw_profile(stream.rng))[1] for _ in range(8)]
            versions.update(found)
            names[tool["tool"]] += 1
            within.append(max(Counter(found).values()) / 8)
    assert max(versions.values()) / versions.total() < 0.25
    assert max(names.values()) / names.total() < 0.04
    assert np.mean(within) < 0.75  # who knows one version of each tool, but not its rule


def test_sft_shows_nothing_of_the_rules_left_out_not_even_in_its_history(folders):
    for name in ("turns", "dialogues"):
        hidden, policies = json.loads((folders / name / "left_out.json").read_text()), load_policies(folders / name)
        sft = load_items(folders / name, "sft.jsonl", policies)
        for item in sft:
            text = json.dumps([item["messages"], item["cot"]])
            for key in hidden[item["policy"]]:
                told = next(part["section"] for part in policies[item["policy"]]["sections"] if part["id"] == key)
                assert told.removesuffix(" .") not in text
        test = load_items(folders / name, "test.jsonl", policies)
        asked = [sections([item]) <= sections(sft) for item in test]
        assert any(asked) and not all(asked)


def test_a_turns_rules_are_those_that_nothing_before_it_told(folders):
    policies = load_policies(folders / "turns")
    for item in load_items(folders / "turns", "test.jsonl", policies):
        parts = {part["id"]: part["section"].removesuffix(" .") for part in policies[item["policy"]]["sections"]}
        before = " ".join(turn["content"] for turn in item["messages"])
        assert item["rules"] and all(
            f"{parts[key]} " in item["cot"] and parts[key] not in before for key in item["rules"]
        )


def test_the_same_seed_writes_the_same_bytes_and_bad_sizes_end_in_a_line(tmp_path):
    flags = "--tools 5 --queries 6 --sft 2 --test 3 --seed 4".split()
    for name in "ab":
        tools.main(["--out", str(tmp_path / name), *flags])
    for path in (tmp_path / "a").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    with pytest.raises(InputError, match="expected 3 to 14 tools"):
        tools.main(["--out", str(tmp_path / "c"), "--tools", "20"])


# -- 4. the base -------------------------------------------------------------------------------------------------------

BASE = BASES["tools"]


def test_the_bases_card_tells_its_own_scores():
    """No figure by hand: the table is what tiny.score wrote, and it reaches what the project aims at."""
    kept = json.loads((BASE / "scores.json").read_text())
    assert (BASE / "scores.md").read_text() == score.markdown(kept["rows"], kept["about"])
    found = {row["name"]: row for row in kept["rows"]}
    assert all(found[f"{count} tools"]["accuracy"] >= aim for count, aim in score.TOOLS.items() if aim)
    assert found["8 tools, without the policy"]["accuracy"] < 0.02
    before = {row["name"]: row for row in json.loads((BASES["clevr"] / "scores.json").read_text())["rows"]}
    assert all(found[name]["accuracy"] > before[name]["accuracy"] - 0.02 for name in score.AIMS)


def test_the_base_is_small_and_follows_policies_that_it_never_read(folders):
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8e6
    model, processor = load(BASE)
    assert model.config.vocab_size == len(tools.ALL_TOKENS)
    policies = load_policies(folders / "turns")
    items = load_items(folders / "turns", "test.jsonl", policies)
    aware, _ = evaluate(model, processor, items, policies, policy_in_context=True, max_response=200)
    alone, _ = evaluate(model, processor, items, policies, max_response=200)
    assert aware["accuracy"] > 0.75 and alone["accuracy"] == 0
