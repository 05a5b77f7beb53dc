"""The tiny world: its words, policies, stream and base fit the code that they are made for."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_table
from PIL import Image

from data import InputError, rewards
from data.dataset import load_items, load_policies, messages, target
from data.referral import recall, referral, visits
from model import Config, Processor, Qwen25VL, rotate
from tiny import data as tiny_data
from tiny import demo, pretrain, report, study
from tiny.pretrain import CONFIG, blocks, initialise, orthogonal, patches, predict, prepare, trunk
from tiny.stream import CROP, PICTURE, Codes, Stream, coded, matches, planted, positions, rows
from tiny.world import ID, picture, write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "tiny" / "base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small data set of two layers, a third of its sections left out of SFT, some values shown by crops."""
    out = tmp_path_factory.mktemp("tiny") / "data"
    flags = "--depth 3 --variant M --policies 2 --queries 60 --sft 6 --test 8 --leave-out 0.34 --seed 3"
    tiny_data.main(["--out", str(out), *flags.split()])
    return out


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    out = tmp_path_factory.mktemp("words")
    write_tokenizer(out)
    (out / "config.json").write_text(json.dumps(CONFIG))
    return Processor.from_pretrained(out)


@pytest.fixture(scope="module")
def table():
    return random_table()


def test_the_rates_of_the_base_s_training_can_be_kept_with_its_state(tmp_path):
    """text.pt is read with weights_only: with one NumPy scalar among its groups it could not be gone on with."""
    for shares in ([share for share, *_ in phases] for phases in (pretrain.PHASES, pretrain.TOOL_PHASES)):
        made = [pretrain.schedule(step, 400, shares) for step in range(400)]
        assert {type(number) for pair in made for number in pair} <= {int, float}
        phases, factors = zip(*made)
        assert sorted(phases) == list(phases) and set(phases) == set(range(len(shares)))
        begins = [phases.index(phase) for phase in range(len(shares))]
        assert all(factors[begin] == pytest.approx(1 / 30) for begin in begins) and max(factors) == 1
        assert factors[-1] < 0.1 and list(factors[-50:]) == sorted(factors[-50:], reverse=True)


def test_every_word_of_a_data_set_is_one_token_and_comes_back(folder, processor):
    """An unknown word would silently become <unk>; a response must survive encoding, decoding and the one parser."""
    policies = load_policies(folder)
    for item in load_items(folder, "test.jsonl", policies):
        prompt = processor.encode(messages(item, policies[item["policy"]]), add_generation_prompt=True)
        assert ID["<unk>"] not in prompt.input_ids.tolist()
        ids = processor.tokenizer.encode(target(item), add_special_tokens=False).ids
        assert ID["<unk>"] not in ids and rewards.accuracy(None, processor.decode(ids), item) == 1
        assert rewards.exact_chain(processor.decode(ids), item, policies[item["policy"]]) == 1


def test_referral_reads_a_terse_chain_section_by_section(folder):
    """No full stop parts its sentences: a section counts where a decision led to it, and not where it is only named."""
    policies = load_policies(folder)
    for item in load_items(folder, "test.jsonl", policies):
        policy, due = policies[item["policy"]], [step["node"] for step in item["path"]]
        assert visits(item["cot"], policy) == due
        assert referral(target(item), item, policy)["score"] == 1
        assert recall("", target(item), {**item, "sections": [node["id"] for node in policy["nodes"]]}) == 1


def test_sections_left_out_are_whole_branches_that_no_sft_item_meets(folder):
    hidden = json.loads((folder / "left_out.json").read_text())
    policies = load_policies(folder)
    seen = {
        (item["policy"], step["node"]) for item in load_items(folder, "sft.jsonl", policies) for step in item["path"]
    }
    for name, sections in hidden.items():
        nodes = {node["id"]: node["branches"].values() for node in policies[name]["nodes"]}
        assert sections and not {(name, section) for section in sections} & seen
        for section in sections:
            assert all(child in sections for child in nodes[section] if child in nodes)
    rl = load_items(folder, "rl.jsonl", policies)
    assert any(step["node"] in hidden[item["policy"]] for item in rl for step in item["path"])


def test_more_policies_than_names_is_one_line():
    with pytest.raises(InputError, match="1 to 16 policies"):
        tiny_data.main(["--out", "x", "--policies", "17"])


def test_the_stream_speaks_as_the_processor_does(folder, processor):
    """The base is trained on packed rows and used through chats: the tokens must be the same, picture by picture."""
    policies = load_policies(folder)
    item = load_items(folder, "test.jsonl", policies)[0]
    policy = policies[item["policy"]]
    text = re.split(r"(<image>)", policy["text"])
    start = ("<|im_start|>", "system", "You are a helpful assistant.", "<|im_end|>", "<|im_start|>", "user")
    mine = [ID[token] for token in start]
    for part in text:
        mine += CROP if part == "<image>" else [ID[word] for word in part.split()]
    end = ("apply", policy["name"], ":", "<|im_end|>", "<|im_start|>", "assistant")
    mine += [*PICTURE, *[ID[token] for token in end]]
    assert processor.encode(messages(item, policy), add_generation_prompt=True).input_ids.tolist() == mine


def test_positions_of_the_stream_are_those_of_the_model():
    model = Qwen25VL(Config.from_json(CONFIG))
    ids = [ID["user"], *CROP, ID["then"], *PICTURE, ID["apply"], ID[":"]]
    expected, _ = model.positions(torch.tensor([ids]), None, torch.tensor([[1, 4, 4], [1, 8, 8]]))
    found, after = positions(ids, [-1, 5], 0)
    assert (torch.from_numpy(found) == expected[:, 0]).all() and after == expected.max() + 1


def test_a_packed_query_sees_its_own_policy_and_itself_only(table):
    """A leak between neighbours would teach the model to read answers off them."""
    torch.manual_seed(0)
    model = Qwen25VL(Config.from_json(CONFIG))
    initialise(model)
    stream = Stream(0, table)
    full = np.random.default_rng(0).standard_normal((300, 64, 128)).astype(np.float32)
    batch = rows(stream, [(1, "apply", {"depth": 2, "blind": 0, "document": 0})], 1, 256)
    ids, group, query, place, target, weight, shown = batch
    with torch.no_grad():
        together = predict(model, batch, full, None)[0]
        alone = []
        for n, (g, q) in enumerate(dict.fromkeys((g, q) for g, q in zip(group[0], query[0]) if q > 0)):
            own = (group[0] == g) & ((query[0] == 0) | (query[0] == q))
            picture = model.visual.merger(torch.from_numpy(full[shown[n]]))
            hidden = model(
                torch.from_numpy(ids[:, own]), position_ids=torch.from_numpy(place[:, :, own]), image_embeds=picture
            )
            alone.append(model.logits(hidden[0, weight[0, own] > 0]))
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_leaves_of_a_grown_tree_hold_the_scenes_that_its_conditions_say(table):
    """Checked against the attributes one object at a time, without the vectorised filter."""
    from tiny.stream import INDEX, TABLE_COLUMN

    nodes, leaves = planted(np.random.default_rng(1), 3, Codes(coded(matches(table))))
    assert sorted(s for _, scenes in leaves for s in scenes) == list(range(len(table)))
    for path, scenes in leaves:
        for s in scenes[:3]:
            for node, answer in path:
                spoken = nodes[node][0]
                assert any(all(thing[TABLE_COLUMN[v]] == INDEX[v] for v in spoken) for thing in table[s]) == answer


def attention_of(model, layer, ids):
    """Shares of attention (H, T, T) of one layer."""
    seen, attention = [], model.model.layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    with torch.no_grad():
        model(ids)
        x, cos, sin = seen[0]
        q, k = (rotate(p(x).view(1, -1, 4, 32).transpose(1, 2), cos, sin) for p in (attention.q_proj, attention.k_proj))
    hook.remove()
    return (q @ k.mT / 32**0.5 + torch.full((ids.shape[1],) * 2, -1e9).triu(1)).softmax(-1)[0]


def test_prepared_heads_find_what_followed_a_name_before(table):
    """The circuit that saves the base most of its training: from a second mention to the word after the first one."""
    prefix, _, _, (query,) = Stream(4, table).pairs()
    ids = torch.tensor([[*prefix, *query.ids]])

    def found(model):
        share = attention_of(model, 1, ids)
        mentions = range(len(prefix), ids.shape[1], 2)
        return np.mean(
            [share[1, t, [j + 1 for j in range(t) if ids[0, j] == ids[0, t]]].sum().item() for t in mentions]
        )

    torch.manual_seed(0)
    model = Qwen25VL(Config.from_json(CONFIG))
    initialise(model)
    before = found(model)
    prepare(model)
    assert attention_of(model, 0, ids)[0].diagonal(-1).min() > 0.9  # the token before
    assert found(model) > 3 * before


def test_patches_are_the_processors_and_labels_name_the_object_under_them(processor):
    """Vision is trained on its own short cut; used, the pictures come through the processor."""
    from PIL import Image

    scene, image, index = picture(1, 0)
    pixels, _ = processor.images([Image.fromarray(image)])
    assert torch.allclose(patches(image[None])[0], pixels.view(64, 3, 2, 196)[:, :, 0].reshape(64, 588), atol=1e-5)
    model = Qwen25VL(Config.from_json(CONFIG))
    with torch.no_grad():
        merged = model.visual.merger(trunk(model.visual, patches(image[None])))
        assert torch.allclose(merged, model.visual(pixels, torch.tensor([[1, 8, 8]])), atol=1e-4)
    things = np.full((1, 112, 112), -1, np.int8)
    things[0, 14:28, 84:98] = 2  # patch row 1, column 6: merge block (0, 3), its third patch
    assert np.flatnonzero(blocks(things, 14, 30, 8)[0] == 2).tolist() == [4 * 3 + 2]


def test_vision_stopped_between_two_saves_ends_where_it_would_have(tmp_path, monkeypatch):
    """The batches are numbered and both optimisers are kept: the last step is the same, bit for bit."""
    scenes = [picture(1, i) for i in range(12)]
    image, index = (np.stack([scene[part] for scene in scenes]) for part in (1, 2))
    table = np.zeros((12, 3, 4), np.int8)
    spot = np.full((12, 3, 2), 56, np.uint8)
    monkeypatch.setattr(pretrain, "HELD", 4)
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)

    def train(folder, steps, stop=99):
        folder.mkdir(exist_ok=True)
        label, calls = pretrain.blocks, iter(range(stop))
        with monkeypatch.context() as patch:
            patch.setattr(
                pretrain, "blocks", lambda *arguments: label(*arguments) if next(calls, None) is not None else 1 / 0
            )
            torch.manual_seed(0)
            model = Qwen25VL(Config.from_json(CONFIG))
            pretrain.train_vision(model, (image, index, table, spot), folder, steps, batch=4)
        return model.state_dict()

    whole = train(tmp_path / "whole", 5)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "stopped", 5, stop=3)
    resumed = train(tmp_path / "stopped", 5)
    assert all(torch.equal(resumed[name], p) for name, p in whole.items())


def test_muon_moves_every_direction_alike():
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 128, 384, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6 and values.max() < 1.3


def fake_results():
    row = {"accuracy": 0.5, "n": 4, "interval": [0.2, 0.8], "exact_chain": 0.25}
    row |= {"seen": {"accuracy": 0.5}, "unseen": {"accuracy": None}}
    drawn = {
        "seed": 0,
        "depth": 3,
        "policy": "P1<script>",
        "text": "policy P1 <x>",
        "left_out": ["<script>"],
        "seconds": 1,
    }
    return {**drawn, **report.provenance(), "rows": [{"name": name, **row} for name in demo.ROWS]}


@pytest.fixture
def page(tmp_path):
    """A report about one picture, on which every stage said something nasty."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "data").mkdir()
    Image.new("RGB", (112, 112), "gray").save(tmp_path / "data" / "p.png")
    item = {"id": "a", "answer": "A1", "cot": "N1", "images": ["p.png"]}
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps(item) + "\n")
    for name in demo.ROWS:
        (tmp_path / "eval" / f"{name}.jsonl").write_text(
            json.dumps({"id": "a", "correct": 0, "seen": False, "response": "<script>"}) + "\n"
        )
    report.write_report(tmp_path, fake_results())
    return tmp_path / "report.html"


def test_the_report_asks_no_network_and_escapes_what_models_say(page):
    text = page.read_text()
    assert not re.search(r"https?://|<script|@import|url\(", text) and "&lt;script&gt;" in text
    assert all(report.TITLES[name] in text for name in demo.ROWS)


@pytest.mark.parametrize("width", (1280, 400))
def test_a_browser_opens_the_report_silently_and_nothing_sticks_out(page, width):
    """No error in its console, and no part wider than the window (what is scrolled inside its own box aside)."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no Chromium on this machine")
    measure = (
        "Math.max(...[...document.querySelectorAll('body *:not(.wide *)')].map(e => e.getBoundingClientRect().right))"
    )
    probe = page.with_name("probe.html")  # the page itself has no script
    probe.write_text(
        page.read_text()
        .replace("<html", f'<html style="width: {width}px"')
        .replace("</body>", f"<script>document.title = 'wide ' + {measure}</script></body>")
    )
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom".split()
    call = [browser, *flags, "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900"]
    shown = lambda file: subprocess.run([*call, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown(page).stderr
    assert width / 2 < float(re.search(r"<title>wide ([\d.]+)", shown(probe).stdout)[1]) <= width


def test_the_report_and_the_readme_say_which_loss_the_rows_have(page):
    """Rows called GRPO have DAPO's loss here, and the paper's figures have the paper's: a table must not hide it."""
    assert "DAPO's" in report.LOSS and report.LOSS.replace("'", "&#x27;") in page.read_text()
    assert report.LOSS in report.demo_table(fake_results())


def test_the_paper_s_figures_stand_beside_its_own_experiments():
    """65.85 is the paper's TriMPI, and its CPT has the policy in front: rows in response form have no figure there."""
    assert report.PAPER["trimpi_paper"] == 65.85 and not {"trimpi", "cpt_response_sft"} & set(report.PAPER)
    assert set(report.PAPER) <= set(report.TITLES)


def test_one_name_is_one_experiment_in_demo_and_study():
    """Where both have a row of that name, stages and flags are the same, but for the number of RL steps."""

    def flags(run):  # the last one given counts
        pairs = " ".join(map(str, run[2])).split("--")[1:]
        return {key: value for key, _, value in (pair.strip().partition(" ") for pair in pairs) if key != "steps"}

    for name, run in demo.RUNS.items():
        assert run[:2] == study.RUNS[name][:2] and flags(run) == flags(study.RUNS[name])
    assert set(demo.ROWS) | set(study.RUNS) <= set(report.TITLES)


def test_the_readme_s_table_is_the_one_that_the_results_give(tmp_path):
    """`python -m tiny.demo --tables` and `python -m tiny.study --tables` would change nothing: no figure by hand."""
    for folder, places in (
        ("", {"demo": report.demo_table(json.loads((ROOT / "results/demo/results.json").read_text()))}),
        ("results", study.tables((kept := json.loads((ROOT / "results/study.json").read_text()))["rows"], kept)),
    ):
        text = (ROOT / folder / "README.md").read_text()
        (tmp_path / "README.md").write_text(text)
        report.fill(tmp_path / "README.md", places)
        assert (tmp_path / "README.md").read_text() == text


def test_a_table_without_its_place_is_one_line(tmp_path):
    """Written elsewhere it would stand twice, and the old one would stay."""
    (tmp_path / "x.md").write_text("<!-- a -->\n<!-- /a -->\n")
    with pytest.raises(InputError, match="no place for table 'b'"):
        report.fill(tmp_path / "x.md", {"b": "| 1 |"})
    report.fill(tmp_path / "x.md", {"a": "| 1 |"})
    report.fill(tmp_path / "x.md", {"a": "| 2 |"})
    assert (tmp_path / "x.md").read_text() == "<!-- a -->\n\n| 2 |\n\n<!-- /a -->\n"


def test_the_demo_refuses_a_folder_that_holds_another_run(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(InputError, match="found x, which we did not write"):
        demo.main(["--out", str(tmp_path), "--model", str(BASE)])


@pytest.mark.skipif(not (BASE / "model.safetensors").exists(), reason="no base yet")
def test_the_base_follows_policies_it_never_read_and_is_small(tmp_path):
    """Through evaluate.py's own loop: right with the policy in the prompt, near nothing without it."""
    from evaluate import evaluate, load

    assert (BASE / "model.safetensors").stat().st_size <= 8 * 2**20
    flags = "--depth 2 --policies 4 --queries 8 --test 12 --seed 77"
    tiny_data.main(["--out", str(tmp_path / "d"), *flags.split()])
    policies = load_policies(tmp_path / "d")
    items = load_items(tmp_path / "d", "test.jsonl", policies)
    model, processor = load(str(BASE))
    given, _ = evaluate(model, processor, items, policies, policy_in_context=True, max_response=120)
    without, _ = evaluate(model, processor, items, policies, max_response=120)
    assert given["accuracy"] >= 0.9 and without["accuracy"] <= 0.1
