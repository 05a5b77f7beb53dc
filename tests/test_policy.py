"""ClevrPolicy: trees, wording, queries. What a reader of the text alone concludes is what the data say, always."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clevr_root import ROOT, needs_clevr
from PIL import Image

from data import InputError
from data.clevr import INVALID, SceneTable, execute, sample_scene, word
from data.clevr_policy import (
    build_policy,
    choose,
    croppable,
    draw_crops,
    make_dataset,
    make_items,
    picture_name,
    read_clevr,
    route,
)
from data.dataset import load_items, load_policies, target
from data.oracle import Agent, ask, check, shown
from data.override import override
from data.prose import Prose
from data.referral import branching_error, judge_line, mentions, referral
from data.sections import recitation, recitation_items, section_items

REPOSITORY = Path(__file__).parents[1]
KINDS = [
    (depth, variant, conditions) for conditions in ("existence", "full") for depth in (2, 4, 6) for variant in "TM"
]


@pytest.fixture(scope="module")
def table():
    return SceneTable([sample_scene(np.random.default_rng(k), index=k) for k in range(1200)])


def draw(table, depth, variant, conditions, seed=0, count=60):
    rng = np.random.default_rng(seed)
    policy = build_policy(rng, depth, variant, table, conditions=conditions)
    answers, leaf = route(policy, table)
    rows = choose(leaf, len(policy["leaves"]), count, rng)
    return policy, make_items(policy, Prose(), table, rows, answers, rng, "train"), leaf


@pytest.mark.parametrize("depth, variant, conditions", KINDS)
def test_a_reader_of_the_text_always_agrees_and_needs_the_right_scene(table, depth, variant, conditions):
    """Three ways to the same answers: array programs, the plain interpreter, parsed sentences with object places."""
    policy, items, leaf = draw(table, depth, variant, conditions)
    scenes = {scene["image_filename"]: scene for scene in table.scenes}
    right, mistaken = check({policy["name"]: policy}, items, scenes, np.random.default_rng(1))
    assert right == 1.0 and mistaken < 0.15 + 2 / len(policy["leaves"])
    nodes = {node["id"]: node for node in policy["nodes"]}
    for item in items:
        for step in item["path"]:
            assert word(execute(nodes[step["node"]]["program"], scenes[item["scene"]])) == step["answer"]


@pytest.mark.parametrize("depth, variant, conditions", KINDS)
def test_trees_are_as_the_paper_has_them(table, depth, variant, conditions):
    policy, items, leaf = draw(table, depth, variant, conditions)
    responses = [end["response"] for end in policy["leaves"]]
    assert len(set(responses)) == len(responses)
    if conditions == "existence":
        assert len(responses) == {2: 4, 4: 16, 6: 60}[depth] or depth == 6 and 45 <= len(responses) <= 60
    assert (leaf >= 0).all(), "no node is ill-posed on any scene"
    assert np.bincount(leaf, minlength=len(responses)).min() > 0, "every response is reached"
    assert policy["text"].count("<image>") == len(policy["crops"]) and (len(policy["crops"]) > 0) == (variant == "M")
    nodes = {node["id"]: node for node in policy["nodes"]}

    def below(key, asked):
        if key in nodes:
            program = json.dumps(nodes[key]["program"])
            assert program not in asked, "no two nodes on a path ask the same"
            for child in nodes[key]["branches"].values():
                below(child, asked | {program})

    below(policy["root"], frozenset())


def test_behind_a_yes_the_attribute_is_not_asked_again_and_behind_a_no_all_is_open(table):
    policy, *_ = draw(table, 6, "T", "existence", seed=2)
    nodes = {node["id"]: node for node in policy["nodes"]}
    for node in policy["nodes"]:
        now = dict([*node["held"].items(), node["asked"]])
        for answer, child in node["branches"].items():
            if child in nodes:
                assert nodes[child]["held"] == (now if answer == "yes" else {})
                assert answer == "no" or nodes[child]["asked"][0] not in now


def test_answers_are_even_as_far_as_the_scenes_allow(table):
    policy, items, leaf = draw(table, 4, "T", "existence", count=160)
    counts = np.bincount([int(item["answer"].split()[1]) - 1 for item in items], minlength=16)
    assert counts.min() >= 9 and counts.max() <= 12  # 160 queries over 16 responses, nearly ten each
    assert len({item["scene"] for item in items}) == 160
    few = choose(np.array([0] * 5 + [1] * 100 + [-1] * 50), 2, 40, np.random.default_rng(0))
    assert sorted(np.bincount([0 if k < 5 else 1 for k in few])) == [5, 35] and max(few) < 105


def test_queries_name_their_policy_in_many_ways(table):
    policy, items, _ = draw(table, 2, "T", "existence", count=100)
    assert all(policy["name"] in item["question"] and "\\boxed{}" in item["question"] for item in items)
    assert len({item["question"] for item in items}) >= 10


# -- pictures in policies ----------------------------------------------------------------------------------------------


def test_crops_show_their_value_and_nothing_else(table):
    policy, *_ = draw(table, 4, "M", "existence", seed=5)
    assert len(draw_crops(policy, table, (160, 120), Prose(), np.random.default_rng(0))) == len(policy["crops"]) >= 5
    from data.clevr import render

    for scene in table.scenes[:40]:
        _, index = render(scene, (160, 120))
        for k, box in enumerate(croppable(scene, (160, 120))):
            if box:
                left, top, right, bottom = box
                inside = set(np.unique(index[top:bottom, left:right]).tolist()) - {-1}
                assert inside == {k}
                assert (index[top:bottom, left:right] == k).sum() == (index == k).sum()


@pytest.mark.parametrize("conditions", ["existence", "full"])
def test_a_value_shown_by_a_picture_is_not_written_in_its_section(table, conditions):
    policy, *_ = draw(table, 4, "M", conditions, seed=6)
    for node in policy["nodes"]:
        if node["crop"]:
            before, _, after = node["question"].partition("<image>")
            assert f"of the same {node['asked'][0]} as the object in " in before
            value = node["asked"][1]
            rest = node["question"] if conditions == "existence" else before.split(" of the same ")[0]
            assert value not in rest.split() and value in node["quote"]


# -- real pictures -----------------------------------------------------------------------------------------------------


@needs_clevr
@pytest.mark.parametrize("depth, variant, conditions", KINDS)
def test_policies_over_blender_scenes_agree_too(depth, variant, conditions):
    splits = read_clevr(ROOT)
    table = SceneTable(splits["train"] + splits["test"])
    policy, items, leaf = draw(table, depth, variant, conditions, count=40)
    agent = Agent(policy["text"], shown(policy))
    for scene, k in zip(table.scenes, leaf):
        response, way = agent.answer(scene)
        assert response == policy["leaves"][k]["response"]


@needs_clevr
def test_a_folder_of_real_pictures_becomes_a_data_set(tmp_path):
    report = make_dataset(
        tmp_path / "d", read_clevr(ROOT), depth=2, variant="M", policies=2, queries=16, sft=4, test=10, seed=0
    )
    policies = load_policies(tmp_path / "d")
    items = load_items(tmp_path / "d", "rl.jsonl", policies)
    assert len(items) == 32 and len(report) == 2
    written = Path(items[0]["images"][0]).read_bytes()
    assert written in [Path(scene["file"]).read_bytes() for scene in read_clevr(ROOT)["train"]]
    with pytest.raises(InputError, match="21 train queries asked for, the folder's scenes supply 20"):
        make_dataset(
            tmp_path / "e", read_clevr(ROOT), depth=2, variant="T", policies=1, queries=21, sft=1, test=1, seed=0
        )
    assert sorted(os.listdir(tmp_path)) == ["d"]


def test_a_folder_with_holes_is_refused(tmp_path):
    (tmp_path / "scenes").mkdir()
    with pytest.raises(InputError, match="CLEVR_train_scenes.json: no such file"):
        read_clevr(tmp_path)
    (tmp_path / "scenes" / "CLEVR_train_scenes.json").write_text('{"scenes": [{"objects": []}]}')
    with pytest.raises(InputError, match="scene 0 lacks the key 'image_filename'"):
        read_clevr(tmp_path)
    scene = {"objects": [], "relationships": {}, "image_filename": "../x.png"}
    (tmp_path / "scenes" / "CLEVR_train_scenes.json").write_text(json.dumps({"scenes": [scene]}))
    with pytest.raises(InputError, match="picture '../x.png' is missing"):
        read_clevr(tmp_path)


# -- the same seed, the same bytes -------------------------------------------------------------------------------------


def digest(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_writes_the_same_bytes_on_one_and_two_processes(tmp_path):
    for name, processes, salt in (("a", "1", "1"), ("b", "2", "77")):
        command = [
            sys.executable,
            "-m",
            "data.clevr_policy",
            "--out",
            str(tmp_path / name),
            "--depth",
            "3",
            "--variant",
            "M",
            "--conditions",
            "full",
            "--policies",
            "2",
            "--queries",
            "6",
            "--size",
            "96x64",
            "--scenes",
            "400",
            "--processes",
            processes,
            "--cpt",
            "applied,document,section,response",
        ]
        subprocess.run(
            command, check=True, cwd=REPOSITORY, env={**os.environ, "PYTHONHASHSEED": salt}, capture_output=True
        )
    assert digest(tmp_path / "a") == digest(tmp_path / "b") and len(digest(tmp_path / "a")) > 15


def test_another_seed_draws_other_policies(table):
    assert draw(table, 4, "T", "existence", seed=1)[0]["text"] != draw(table, 4, "T", "existence", seed=2)[0]["text"]


# -- beyond accuracy ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small data folder: (folder, policies, test items)."""
    folder = tmp_path_factory.mktemp("world") / "d"
    rng = [np.random.default_rng([9, k]) for k in range(140)]
    scenes = {
        "train": [sample_scene(r, index=k, size=(96, 64)) for k, r in enumerate(rng[:100])],
        "test": [sample_scene(r, index=k, split="val", size=(96, 64)) for k, r in enumerate(rng[100:])],
    }
    make_dataset(folder, scenes, depth=3, variant="T", policies=2, queries=10, sft=4, test=20, seed=0, size=(96, 64))
    policies = load_policies(folder)
    return folder, policies, load_items(folder, "test.jsonl", policies)


def test_gold_chains_refer_perfectly_and_changed_ones_do_not(world):
    _, policies, items = world
    for item in items:
        policy = policies[item["policy"]]
        gold = referral(target(item), item, policy)
        assert gold == {"visited": 3, "quoted": 1.0, "unknown": 0, "path": 1.0, "answer": 1.0, "score": 1.0}
        last = item["path"][-1]["node"]
        invented = referral(target(item).replace(f"{last} asks", "Condition 1.9.9 asks"), item, policy)
        assert invented["unknown"] == 1 and invented["path"] == 0 and invented["score"] == pytest.approx(2 / 4)
        other = next(n for n in policy["nodes"] if n["id"] == last)["quote"]
        misquoted = referral(target(item).replace(other, "Is it raining?"), item, policy)
        assert misquoted["quoted"] == pytest.approx(2 / 3) and misquoted["path"] == 1.0
    free = "<think>I follow Condition 1 and then Condition 1.2 of the policy.</think>\\boxed{Case 1}"
    assert referral(free, items[0], policies[items[0]["policy"]])["visited"] == 2


def test_section_names_are_read_whole():
    policy = {"nodes": [{"id": "Condition 1"}, {"id": "Condition 1.2"}]}
    assert mentions("Condition 1.2. Condition 1, Condition 1.2.1", policy) == [
        "Condition 1.2",
        "Condition 1",
        "Condition 1.2.1",
    ]
    assert mentions("N14 small cube then N3 else A2 , N140", {"nodes": [{"id": "N14"}, {"id": "N3"}]}) == [
        "N14",
        "N3",
        "N140",
    ]


def test_branching_error_is_nothing_for_gold_and_counts_what_is_missing(world):
    _, policies, items = world
    gold = [target(item) for item in items]
    assert branching_error(gold, items, policies) == {"branching_error": 0, "relative": 0, "unknown": 0}
    silent = branching_error(["\\boxed{Case 1}"] * len(items), items, policies)
    assert silent["relative"] == 1.0 and silent["unknown"] == 0.0
    lost = branching_error([g + " Condition 9" for g in gold], items, policies)
    assert lost["branching_error"] == 0 and lost["unknown"] == pytest.approx(len(items) / (len(items) * 6))


def test_a_judge_gets_the_policy_and_the_reasoning(world):
    _, policies, items = world
    line = json.loads(judge_line(target(items[0]), items[0], policies[items[0]["policy"]]))
    assert line["reasoning"] == items[0]["cot"] and line["policy"].startswith("Policy L3") and "0 to 10" in line["task"]


def test_override_keeps_names_and_scenes_and_tells_old_from_new(world, tmp_path):
    folder, old, items = world
    count, differ = override(folder, tmp_path / "o", seed=4)
    new = load_policies(tmp_path / "o")
    changed = load_items(tmp_path / "o", "test.jsonl", new)
    assert list(new) == list(old) and count == len(changed) == len(items) and differ > count / 2
    assert {(i["policy"], i["scene"], i["old_answer"]) for i in changed} == {
        (i["policy"], i["scene"], i["answer"]) for i in items
    }
    for name, policy in new.items():
        assert policy["text"].startswith("This is the updated policy") and policy["text"] != old[name]["text"]
    scenes = {scene["image_filename"]: scene for scene in read_clevr(folder)["test"]}
    assert check(new, changed, scenes)[0] == 1.0


def test_sections_can_be_asked_for(world):
    _, policies, _ = world
    asked = recitation_items(policies)
    assert len(asked) == sum(len(policy["nodes"]) for policy in policies.values())
    assert recitation("<think>so</think> " + asked[0]["answer"], asked[0]) == {"exact": 1.0, "f1": 1.0}
    other = recitation(asked[1]["answer"], asked[0])
    assert other["exact"] == 0.0 and 0 < other["f1"] < 1 and recitation("", asked[0]) == {"exact": 0.0, "f1": 0.0}


def test_simulated_cases_end_where_the_scene_leads(world):
    folder, policies, _ = world
    scenes = read_clevr(folder)["train"][:8]
    for policy in policies.values():
        agent = Agent(policy["text"])
        cases = [
            i for i in section_items(policy, Prose(), np.random.default_rng(0), scenes) if "\\boxed" in i["answer"]
        ]
        assert len(cases) == 8
        for scene, case in zip(scenes, cases):
            assert case["answer"].endswith("\\boxed{%s}" % agent.answer(scene)[0])


def test_pictures_of_a_written_folder_are_their_scenes(world):
    folder, _, items = world
    from data.clevr import render

    scenes = {scene["image_filename"]: scene for scene in read_clevr(folder)["test"]}
    for item in items[:3]:
        scene = scenes[item["scene"]]
        assert picture_name(scene) in item["images"][0]
        assert (np.asarray(Image.open(item["images"][0])) == render(scene, (96, 64))[0]).all()


def test_ill_posed_sentences_are_noticed_by_the_agent(table):
    scene = next(s for s in table.scenes if sum(o["color"] == "red" for o in s["objects"]) > 1)
    with pytest.raises(InputError, match="expected one"):
        ask("What is the shape of the red object?", scene, None)
    program = [
        {"type": "scene", "inputs": [], "side_inputs": []},
        {"type": "filter_color", "inputs": [0], "side_inputs": ["red"]},
        {"type": "unique", "inputs": [1], "side_inputs": []},
    ]
    assert execute(program, scene) == INVALID
