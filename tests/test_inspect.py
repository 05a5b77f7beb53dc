"""The inspection page: one file, nothing from the network, the facts in it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from data import InputError
from data.clevr import sample_scene
from data.clevr_policy import make_dataset
from data.dataset import load_items, load_policies, target
from data.inspect import histogram, main, page, warnings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("inspect") / "d"
    draw = lambda split, start, n: [
        sample_scene(np.random.default_rng([5, k]), index=k, split=split, size=(96, 64))
        for k in range(start, start + n)
    ]
    make_dataset(
        out,
        {"train": draw("train", 0, 80), "test": draw("val", 80, 20)},
        depth=3,
        variant="M",
        policies=2,
        queries=16,
        sft=4,
        test=4,
        seed=0,
        size=(96, 64),
    )
    return out


class Tags(HTMLParser):
    """Checks that tags close in order; collects what the page refers to."""

    VOID = {"meta", "img", "path", "circle", "use"}

    def __init__(self):
        super().__init__()
        self.open, self.targets = [], []

    def handle_starttag(self, tag, attributes):
        self.targets += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(folder):
    tags = Tags()
    html = page(folder)
    tags.feed(html)
    assert tags.open == [] and all(t.startswith(("data:image/", "#tree-")) for t in tags.targets)
    assert "<script" not in html and "http" not in re.sub(r"data:image/[^\"]*", "", html)
    for name, policy in load_policies(folder).items():
        assert name in html and all(node["id"] in html for node in policy["nodes"])


def test_every_query_shown_has_its_way_lit(folder):
    html = page(folder, limit=5)
    cards = html.split('<div class="card query">')[1:]
    assert len(cards) == 5
    for card in cards:
        assert card.count('class="lit"') == 3 and card.count('<circle class="on"') == 4


def test_responses_of_a_run_stand_beside_the_gold_chain(folder, tmp_path):
    items = load_items(folder, "test.jsonl", load_policies(folder))
    lines = [
        json.dumps({"id": item["id"], "response": target(item) if k else "<b>no</b>"}) for k, item in enumerate(items)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    main([str(folder), "--responses", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "p.html")])
    html = (tmp_path / "p.html").read_text()
    assert html.count(">right</span>") == len(items) - 1 and html.count(">wrong</span>") == 1
    assert "&lt;b&gt;no" in html and "<b>no" not in html  # what a model writes is text, never markup


def test_leaks_and_gaps_are_warned_of(folder):
    policies = load_policies(folder)
    items = {split: load_items(folder, f"{split}.jsonl", policies) for split in ("cpt", "sft", "rl", "test")}
    assert warnings(policies, items) == []
    leaky = items | {"test": items["test"] + [items["rl"][0]]}
    assert "1 test scenes stand in training files" in warnings(policies, leaky)[0]
    only = items | {"rl": [i for i in items["rl"] if i["answer"] != "Case 1"], "sft": []}
    assert any("1 of 8 responses have no training query: Case 1" in w for w in warnings(policies, only))
    invented = [items["sft"][0] | {"cot": "Condition 4.4 asks: why?"}]
    assert any("cites Condition 4.4" in w for w in warnings(policies, items | {"sft": invented}))


def test_bad_responses_are_refused(folder, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match="r.jsonl:1: no response"):
        main([str(folder), "--responses", str(tmp_path / "r.jsonl")])


def test_histograms_count_everything():
    assert sum(histogram([3, 4, 5, 90]).values()) == 4 and histogram([7]) == {"7": 1}
