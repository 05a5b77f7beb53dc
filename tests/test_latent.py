"""variants/latent: its losses by hand, its codes by their distribution, and what RL moves."""

import io
import json
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import picture, question, randomize, tiny_checkpoint
from rl_bench import Bench, draw, run
from rl_bench import config as settings_of
from small import ROOT, arguments, quiet, small_data, write_lines

import evaluate
import model as qwen
import train_rl
import train_sft
from data import InputError
from data.clevr import ATTRIBUTES
from model import Processor, load_pretrained, save_pretrained
from rollout import Group, PolicyRollout, Responses
from support import chat, plan
from support.batching import collate
from support.engine import Rules, sample
from support.runs import open_model
from train_rl import Config
from variants import opcd
from variants.latent import actions, captions, study
from variants.latent import train as latent

SIZES = dict(K=8, inverse=1, merge=2, policy=2)


def random_latents(folder):
    """So large that every code leads to another word."""
    model = actions.attach(load_pretrained(folder / "plain"), **SIZES)
    randomize(model.latents, 1, 0.1)
    randomize(model.latents.codebook, 2, 3.0)
    randomize(model.latents.merge, 3, 0.5)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with random latents, stored as one folder, and six items with pictures."""
    folder = tmp_path_factory.mktemp("latent")
    tiny_checkpoint(folder / "plain", width=32, layers=1, vision_width=16, vision_depth=2)
    model = random_latents(folder)
    save_pretrained(model, folder / "model")
    small_data(folder / "data", items=6)
    return folder


@pytest.fixture(scope="module")
def drawn(folder):
    return draw(folder, actions.load_pretrained)


# -- codes -------------------------------------------------------------------------------------------------------------


def test_a_folder_with_latents_is_read_as_it_was_written(folder):
    """Their sizes are told by the tensors alone; a plain folder stays a plain model."""
    model, _ = open_model(qwen, folder / "model")
    assert isinstance(model, actions.LatentVLM) and len(model.latents.policy.layers) == 2
    again = random_latents(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not isinstance(open_model(qwen, folder / "plain")[0], actions.LatentVLM)


def test_log_probabilities_of_codes_are_those_of_a_fresh_pass(drawn):
    """What the sampler noted through caches, shared prefixes and slots is what RL's loss reads in one pass."""
    _, model, groups, processor = drawn
    data = Responses(groups, range(4), 1, torch.device("cpu"))
    assert all(len(r.actions) == len(r.tokens) and max(r.actions) < 8 for r in data.list)
    data.A = torch.ones(16)
    plain = (~data.aware).nonzero()[:, 0].tolist()
    logp, entropy, _ = data.take(plain).read(model, 1.0, processor.pad_id)
    assert (logp - data.logp_sampler[plain]).abs().max() < 1e-5
    assert (entropy[data.mask[plain].bool()] <= math.log(8) + 1e-6).all()
    aware = data.aware.nonzero()[:, 0].tolist()
    logp, _, _ = data.take(aware).read(model, 1.0, processor.pad_id, with_policy=True)
    assert (logp - data.logp_sampler[aware]).abs().max() < 1e-5


def test_codes_are_drawn_by_the_policy_and_words_follow_from_them(folder):
    """Chi-square of 2,000 first codes at temperature 0.7; every word is the best one given its code, never a banned."""
    model, processor = actions.load_pretrained(folder / "model").eval(), Processor.from_pretrained(folder / "model")
    prompt = processor.encode([{"role": "user", "content": "go"}], add_generation_prompt=True)
    banned = processor.banned_ids + list(range(0, 288, 2))
    how = dict(max_tokens=2, temperature=0.7, banned_ids=banned, min_tokens=2, stop_ids=[1, 3])
    responses = sample(model, [prompt], 2000, **how)[0]
    hidden = model(prompt.input_ids[None])[:, -1]  # (1,2D)
    p = (model.code_logits(hidden)[0] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor([r.actions[0] for r in responses]), minlength=8)
    assert ((counts - 2000 * p) ** 2 / (2000 * p)).sum() < 24.3  # 0.1 % point of 7 degrees of freedom
    words = model.words_of(hidden.chunk(2, -1)[1].expand(8, -1), torch.arange(8))
    words[:, banned + [1, 3]] = -torch.inf
    assert {(r.actions[0], r.tokens[0]) for r in responses} <= set(enumerate(words.argmax(-1).tolist()))
    best = sample(model, [prompt], 1, **{**how, "temperature": 0.0})[0][0]
    assert best.actions[0] == int(p.argmax())


@pytest.mark.parametrize("algorithm, K", [("grpo", 0), ("dapo", 2), ("gspo", 2)])
def test_rl_moves_the_policy_alone_bit_for_bit(drawn, folder, algorithm, K):
    """With every weight trainable, all others' gradients are exactly 0: u reads h detached, the head reads u alone."""
    model, start, groups, processor = drawn
    settings = settings_of(folder, algorithm=algorithm, policy_rollouts=K, micro_batch=16)
    bench, data = Bench(settings), Responses(groups, range(4), 1, torch.device("cpu"))
    data.A, data.kept = torch.linspace(-1.5, 2.0, 16), torch.ones(16, dtype=torch.bool)
    model.train().requires_grad_(True)
    rewards = [("r", None, 1.0)]
    train_rl.Learner(settings, bench, model, lambda: nullcontext(start), None, rewards, None, processor.pad_id)(
        data, 0, 1
    )
    moved = {name for name, g in bench.gradients[0].items() if g.any()}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("model.latents.policy.")}


def test_rl_of_a_folder_with_latents_climbs_and_leaves_the_rest(folder):
    """train_rl.py itself, told nothing but the folder: it rewards codes, and writes all weights back."""
    rows = run(
        folder, "rl", algorithm="dapo", steps=8, lr=1e-2, reward=f"{__file__.replace('test_latent', 'small')}:length"
    )
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.1
    assert rows[0]["rollout_train_difference"] < 1e-5
    before, after = (actions.load_pretrained(folder / name).state_dict() for name in ("model", "rl/model"))
    changed = {name.split(".policy.")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.latents"}


@pytest.mark.parametrize(
    "flags, found",
    [
        (dict(full=False), "--no-full"),
        (dict(frozen_sampler="base", policy_rollouts=2), "--frozen-sampler base"),
        (dict(replay="data"), "--replay"),
    ],
)
def test_what_does_not_go_with_codes_is_refused_in_one_line(folder, flags, found):
    flags = {name: folder / value if name == "replay" else value for name, value in flags.items()}
    with pytest.raises(InputError, match=found) as error:
        run(folder, f"refused{len(found)}", **flags)
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_other_stages_and_exports_refuse_latents(folder, tmp_path):
    """Their words have no likelihood, no server runs them, and nothing shards them."""
    model, processor = actions.load_pretrained(folder / "model"), Processor.from_pretrained(folder / "model")
    sharded = dict(stage="rl", adapter="", fsdp=True)
    for work in (
        lambda: train_sft.main(arguments(folder / "model", folder / "data", tmp_path / "sft", full=True)),
        lambda: chat.export(qwen, folder / "model", tmp_path / "served"),
        lambda: latent.main(["--stage", "2", *arguments(folder / "plain", folder / "data", tmp_path / "l2")]),
        lambda: latent.main(["--stage", "7", *arguments(folder / "plain", folder / "data", tmp_path / "l7")]),
        lambda: evaluate.likelihoods(
            model, PolicyRollout(processor, {}, 1, 0), {"question": "go", "images": []}, ["a"]
        ),
        lambda: model.prepare(SimpleNamespace(config=Config(model="m", data="d", out="o"), **sharded)),
    ):
        with pytest.raises(InputError, match="expected") as error:
            work()
        assert "\n" not in str(error.value)


def test_distances_between_distributions_are_over_codes(folder):
    """variants/opcd.py asks for hidden states and a head: [u; h] and [W; 0] are the policy's; the rest stays."""
    rows = run(folder, "opcd", method=opcd, steps=2, top_tokens=4, algorithm="opcd", group_size=2)
    assert all(row["grad_norm"] > 0 for row in rows)
    before, after = (actions.load_pretrained(folder / name).state_dict() for name in ("model", "opcd/model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("model.latents.policy.") for name in moved)


def test_a_chat_answers_with_the_best_word_of_the_best_code(folder, monkeypatch, capsys):
    """--chat knows only `logits`; it says what greedy sampling says."""
    model, processor = actions.load_pretrained(folder / "model").eval(), Processor.from_pretrained(folder / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    limits = dict(adapter="", image=None, min_pixels=0, max_pixels=0, max_tokens=5)
    chat.chat(qwen, SimpleNamespace(chat=str(folder / "model"), **limits))
    prompt = processor.encode([{"role": "user", "content": "go"}], add_generation_prompt=True)
    rules = dict(max_tokens=5, temperature=0.0, banned_ids=processor.banned_ids, stop_ids=processor.stop_ids)
    ((response,),) = sample(model, [prompt], 1, **rules)
    said = chat.terminal(processor.decode(response.tokens)).rstrip("\ufffd")  # half a character is not printed
    assert said and capsys.readouterr().out.strip() == said.strip()


# -- losses, by hand in float64 ----------------------------------------------------------------------------------------


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_straight_through_gumbel_is_hard_forward_and_soft_backward():
    logits, noise = double([1.0, 0.0, -1.0]).requires_grad_(), double([0.0, 2.0, 0.5])
    hard = actions.gumbel(logits, noise, tau=2.0)
    e = [math.exp(x / 2) for x in (1.0, 2.0, -0.5)]
    p = [x / sum(e) for x in e]
    assert hard.tolist() == [[0.0, 1.0, 0.0]]
    hard[0, 0].backward()  # d p_0 / d l_j = p_0 (1[j = 0] - p_j) / tau
    expected = [p[0] * ((j == 0) - p[j]) / 2 for j in range(3)]
    assert torch.allclose(logits.grad[0], double(*expected))


def test_gumbel_noise_has_its_distribution():
    """The mean of -log(-log u) is Euler's constant, its variance pi^2 / 6; argmax then draws from the softmax."""
    noise = actions.gumbel_noise(torch.zeros(40000, 3), torch.Generator().manual_seed(0))
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi**2 / 6) < 0.05


def test_inverse_and_cloning_losses_are_cross_entropies():
    """(1) over words, (8) over codes; on values worked out by hand."""
    W, h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0, -1.0], [0.5, 0.5]])
    for loss in (actions.inverse_loss, actions.clone):
        found = loss(h, W, torch.tensor([0, 2]))
        first = -2 + math.log(math.exp(2) + math.exp(-1) + math.exp(1))
        second = -1 + math.log(2 * math.exp(0.5) + math.exp(1))
        assert torch.allclose(found, torch.tensor([first, second]), atol=1e-6)


def test_balance_is_zero_where_codes_are_even_and_log_k_where_one_is_used():
    assert abs(float(actions.balance(double([3.0, 0.0], [0.0, 3.0])))) < 1e-12
    assert abs(float(actions.balance(double([50.0, 0.0], [50.0, 0.0]))) - math.log(2)) < 1e-9
    p = (1 / (1 + math.exp(-1)) + 0.5) / 2
    by_hand = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert abs(float(actions.balance(double([1.0, 0.0], [0.0, 0.0]))) - by_hand) < 1e-12


def test_text_is_read_through_the_projector_and_pictures_are_not():
    """(2)"""
    h, project = double([[1.0, 2.0]], [[3.0, 4.0]]), lambda x: (-x, x)
    assert actions.embed(h, torch.tensor([True, False]), project).tolist() == [[[1.0, 2.0]], [[-3.0, -4.0]]]
    assert actions.embed(h, torch.tensor([True, True]), None) is h


def test_projection_losses_are_gaussian_likelihoods():
    """(3) to (7): sum_i (e_i - mu_i)^2 exp(-s_i) + s_i."""
    pair, text = double([1.0, -2.0]), double([0.5, 0.25])
    project = lambda x: (2 * x, torch.full_like(x, 0.5))  # mu, s
    back = lambda x: (x + 1, torch.full_like(x, -0.5))
    third = ((1 - 1.0) ** 2 + (-2 - 0.5) ** 2) * math.exp(-0.5) + 1
    fourth = ((0.5 - 2) ** 2 + (0.25 + 1) ** 2) * math.exp(0.5) - 1
    seventh = ((0.5 - 2) ** 2 + (0.25 - 1.5) ** 2) * math.exp(0.5) - 1
    assert float(actions.text_to_pair(pair, text, project)) == pytest.approx(third)
    assert float(actions.pair_to_text(pair, text, back)) == pytest.approx(fourth)
    assert float(actions.projection(pair, text, project, back)) == pytest.approx(third + fourth)
    assert float(actions.cycle(text, project, back)) == pytest.approx(seventh)
    pairs, alone = actions.joint_projection(pair, text, text, project, back)
    assert [float(pairs), float(alone)] == pytest.approx([third + fourth, seventh])


def test_the_best_word_given_a_code_is_emitted_but_never_a_banned_one():
    """(9): argmax, whatever the temperature; a stop word not before min_tokens."""
    rules = Rules(5.0, 0, 1.0, 2, torch.tensor([2]), torch.tensor([3]))
    model = SimpleNamespace(words_of=lambda h, codes: double([1.0, 2.0, 8.0, 9.0]).expand(2, 4).clone())
    hidden, codes = torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
    assert actions.emit(model, hidden, codes, rules, torch.tensor([1, 2])).tolist() == [1, 2]


def test_diversity_is_one_over_the_mean_cosine_of_word_counts():
    """(10): of [a b], [a b], [b b] the pairs have 1, 1/sqrt 2 and 1/sqrt 2."""
    mean = (1 + 2 / math.sqrt(2)) / 3
    assert actions.diversity([["a", "b"], ["b", "a"], ["b", "b"]]) == pytest.approx(1 / mean)


def test_merge_and_projector_are_their_formulas():
    merge, project = actions.Merge(2, 3).double(), actions.Projector(2).double()
    x, c = double([1.0, -1.0]), double([0.5, 2.0])
    both = torch.cat([x, c], 1)
    gate, up = both @ merge.w1.weight.T, both @ merge.w2.weight.T
    assert torch.allclose(merge(x, c), x + (gate * torch.sigmoid(gate) * up) @ merge.w3.weight.T)
    mu, s = project(x)
    inner = torch.tanh(x @ project.spread[0].weight.T + project.spread[0].bias)
    assert torch.allclose(s, torch.tanh(inner @ project.spread[2].weight.T + project.spread[2].bias))
    assert (s.abs() < 1).all() and mu.shape == x.shape


# -- stages ------------------------------------------------------------------------------------------------------------


def caption_folder(folder):
    """Six pairs and six texts."""
    small_data(folder, items=6)
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    plain = [{**{k: row[k] for k in ("id", "question", "answer", "images")}, "boxed": False} for row in rows]
    write_lines(folder / "pairs.jsonl", plain)
    write_lines(folder / "text.jsonl", [{**row, "images": []} for row in plain])
    return folder


@pytest.fixture(scope="module")
def stages(folder, tmp_path_factory):
    """The five stages on a random model, two steps each -> their folder."""
    out, data = tmp_path_factory.mktemp("stages"), caption_folder(folder / "captions")
    for stage in latent.STAGES:
        flags = {"init": out / str(stage - 1)} if stage > 1 else dict(codes=8, inverse_blocks=1, policy_blocks=2)
        flags |= {"split": "sft.jsonl", "gate": "rl.jsonl"} if stage == 5 else {}
        code, errors = quiet(
            latent.main,
            [
                "--stage",
                str(stage),
                *arguments(folder / "plain", data, out / str(stage), steps=2, micro_batch=4, **flags),
            ],
        )
        assert code == 0, errors
    return out


def test_each_stage_trains_its_own_modules_and_nothing_else(folder, stages):
    before = actions.attach(load_pretrained(folder / "plain"), K=8, inverse=1, policy=2).state_dict()
    base = {name for name in before if "latents" not in name}
    for stage in latent.STAGES:
        after = actions.load_pretrained(stages / str(stage) / "model").state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        if stage > 1:
            parts = {name.split(".")[2] for name in moved - base}
            assert parts == set(latent.STAGES[stage][0])
            assert (
                not (moved & base)
                or stage == 5
                and not any("visual" in name or ".norm" in name.replace("layernorm", "") for name in moved & base)
            )
        before = after
    said = json.loads((stages / "5" / "validation.jsonl").read_text().splitlines()[-1])
    assert 0 <= said["in_reach"] <= 1 <= said["words_in_reach"] <= 8


def test_a_plan_counts_the_parameters_of_the_papers_sizes(folder):
    """308 + 225 + 617 M at 3B, 932 + 679 + 1,900 M at 7B, as the modules themselves have them; LoRA has no plan."""
    for size, millions in (("3B", [308, 225, 617]), ("7B", [932, 679, 1864])):
        model = plan.architecture(size)
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        with torch.device("meta"):
            latents = actions.attach(model, **plan.LATENT).latents
        count = lambda module: sum(p.numel() for p in module.parameters())
        assert [count(getattr(latents, name)) / 1e6 for name in ("inverse", "merge", "policy")] == pytest.approx(
            millions, rel=2e-3
        )
        tuned, others = plan.latent_sizes(model.config, layer)
        assert (tuned, tuned + others) == (count(latents.policy), count(latents))
    planned = plan.plan(plan.Config(model=str(folder / "plain"), latent=True))
    assert planned["trained"] == planned["parts"]["policy, gradient, AdamW (fp32)"] / 16
    with pytest.raises(InputError, match="--latent"):
        plan.plan(plan.Config(model=str(folder / "plain"), latent=True, full=False))


def test_the_papers_depths_build_and_learn_on_small_widths(tmp_path):
    """36 blocks of the base, 4 + 2 + 8 of latents, K = 128, on width 32: one step of RL's loss moves the policy."""
    tiny_checkpoint(tmp_path / "deep", width=32, layers=36, vision_width=16, vision_depth=2)
    model = actions.attach(load_pretrained(tmp_path / "deep"))
    processor = Processor.from_pretrained(tmp_path / "deep")
    model.learn("policy")
    prompt = processor.encode([{"role": "user", "content": "go"}], add_generation_prompt=True)
    (responses,) = sample(model, [prompt], 2, max_tokens=3)
    group = Group({}, prompt, None, responses, [False] * 2, torch.zeros(2, 1, dtype=torch.float64))
    data = Responses([group], [0], 1, torch.device("cpu"))
    data.A = torch.tensor([1.0, -1.0])
    micro = data.take([0, 1])
    logp, _, _ = micro.read(model, 1.0, processor.pad_id)
    assert logp.shape == (2, 3) and (logp - data.logp_sampler).abs().max() < 1e-5
    (-(logp * micro.A).mean()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(name.startswith("model.latents.policy.") for name in moved)


def test_a_code_sees_one_token_of_the_future(folder):
    """a_t is read from place t + 1: the next token moves it, the one after does not."""
    model, processor = actions.load_pretrained(folder / "model"), Processor.from_pretrained(folder / "model")
    prompt = processor.encode([{"role": "user", "content": "go"}], add_generation_prompt=True)

    def codes(*tokens):
        batch = collate([prompt], [list(tokens)], pad_id=processor.pad_id)
        return latent.code_logits(model, latent.look(model, batch, False))  # (3,K)

    plain, next_one, later = codes(10, 11, 12), codes(20, 11, 12), codes(10, 11, 22)
    assert not torch.allclose(plain[0], next_one[0]) and torch.equal(plain[:2], later[:2])
    assert not torch.allclose(plain[2], later[2])


def test_a_pair_without_its_picture_learns_the_same_tokens(folder):
    """(3) and (4) hold states with and without the picture against each other, token by token."""
    processor = Processor.from_pretrained(folder / "model")
    ask = lambda text, *images: processor.encode(question(text, *images), add_generation_prompt=True)
    prompts = [ask("one", picture(56, 56)), ask("two"), ask("three words", picture(84, 56))]
    batch = collate(prompts, [[10, 11], [12], [13, 14, 15]], pad_id=processor.pad_id)
    rows, tokens = latent.paired(batch, processor.image_pad_id)
    blind = latent.without_pictures(batch, rows, processor)
    assert rows.tolist() == [True, False, True] and tokens.tolist() == [True, True, False, True, True, True]
    learned = lambda b: b.labels.flatten()[b.index].tolist()
    assert learned(blind) == [10, 11, 13, 14, 15] and blind.pixel_values is None
    assert torch.equal(blind.input_ids[0, : len(ask("one").input_ids)], ask("one").input_ids)


def test_a_stage_goes_on_where_it_stopped_bit_for_bit(folder, stages, tmp_path):
    """What a stage does not train is drawn by the seed again, and an epoch's kept batches come in the same order."""
    for name in ("whole", "resumed"):
        flags = dict(steps=3, micro_batch=4, codes=8, inverse_blocks=1, policy_blocks=2, keep_states=True)
        words = arguments(folder / "plain", folder / "captions", tmp_path / name, save_every=2, **flags)
        code, errors = quiet(latent.main, ["--stage", "1", *words])
        assert code == 0, errors
    for name in ("model", "checkpoints/step-00000003"):  # as if it had been killed in its last step
        shutil.rmtree(tmp_path / "resumed" / name)
    code, errors = quiet(latent.main, ["--stage", "1", *words, "--resume"])
    assert code == 0 and "resumed after step 2" in errors
    whole, resumed = (actions.load_pretrained(tmp_path / name / "model") for name in ("whole", "resumed"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


# -- the study ---------------------------------------------------------------------------------------------------------


def test_reach_asks_whether_any_code_leads_to_the_word():
    """Of two codes whose best words are 1 and 2, and 1 and 1: word 2 is in reach of the first place alone."""
    best = [torch.tensor([1, 1]), torch.tensor([2, 1])]
    model = SimpleNamespace(
        words_of=lambda h, code: F.one_hot(best[code], 4).float(),
        latents=SimpleNamespace(codebook=torch.nn.Embedding(2, 1)),
    )
    within, words = latent.reach(model, torch.zeros(2, 1), torch.tensor([2, 2]))
    assert within.tolist() == [True, False] and words.tolist() == [2, 1]


def test_the_judge_counts_sentences_in_the_personas_style():
    things = [
        {"size": "small", "color": "red", "material": "metal", "shape": "cube"},
        {"size": "large", "color": "blue", "material": "rubber", "shape": "sphere"},
    ]
    item = {"style": ["shape", "color"], "things": things}
    assert captions.judge("", "sphere blue . cube red .", item) == 1.0
    assert captions.judge("", "sphere blue . red cube .", item) == 0.5  # true, but not as the persona says it
    assert captions.truth("sphere blue . red cube .", item) == 1.0
    assert captions.judge("", "cube red .", item) == pytest.approx(2 / 3)
    assert captions.judge("", "", item) == captions.truth("", item) == 0.0
    assert captions.truth("red sphere . metal .", item) == 0.5  # of no one object; of the first


def test_pairs_lack_what_text_has(tmp_path):
    """The coverage gap: two kinds at most in one order with pictures; the styles of eight personas are outside."""
    captions.write(tmp_path / "c", 0, {"scenes": 3, "test_scenes": 4, "text": 200, "sft": 8, "rl": 8})
    read = lambda name: [json.loads(line) for line in (tmp_path / "c" / name).read_text().splitlines()]
    kinds = {word: kind for kind, values in ATTRIBUTES.items() for word in values}
    styles = lambda rows: {tuple(kinds[w] for w in captions.said(row["answer"])[0].split()) for row in rows}
    pairs, text = styles(read("pairs.jsonl")), styles(read("text.jsonl"))
    assert pairs <= set(captions.PAIRS) and len(text - pairs) > 30 and not any(r["images"] for r in read("text.jsonl"))
    people = json.loads((tmp_path / "c" / "personas.json").read_text())
    assert sum(tuple(style) in captions.PAIRS for style in people.values()) == 4 and len(people) == 12
    assert {r["persona"] for r in read("held_out.jsonl")} == set(list(people)[-4:])
    assert not {r["persona"] for r in read("held_out.jsonl")} & {
        r["persona"] for r in read("rl.jsonl") + read("sft.jsonl")
    }
    for row in read("rl.jsonl"):
        assert captions.judge("", row["answer"], row) == captions.truth(row["answer"], row) == 1.0


def test_the_readme_shows_the_whole_seam():
    """At most twenty lines of the core, each as it stands there; no other line of the core knows of actions."""
    text = Path(latent.__file__).with_name("README.md").read_text()
    shown = re.split(r"^(?=\w)", text.partition("```diff\n")[2].partition("```")[0], flags=re.M)[1:]
    files = {part.split()[0]: [line[1:] for line in part.splitlines()[1:]] for part in shown}
    assert sum(map(len, files.values())) <= 20
    core = [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]
    for path in core:
        lines, name = path.read_text().splitlines(), str(path.relative_to(ROOT))
        assert set(files.get(name, [])) <= set(lines), name
        hooks = [line for line in lines if re.search(r'latents|"Decoder"|"prepare"|\.actions|= load_weights\(', line)]
        assert set(hooks) <= set(files.get(name, [])) or name in ("support/plan.py",), name
    assert "latent" not in (ROOT / "model.py").read_text()


def test_committed_tables_are_those_of_the_committed_seeds():
    """Nothing in them is written by hand; what a seed lacks is called not run."""
    seeds = json.loads((ROOT / "results" / "latent.json").read_text())["seeds"]
    documents = [(ROOT / name).read_text() for name in ("results/latent.md", "variants/latent/README.md")]
    for name, table in study.tables(seeds).items():
        assert all(f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->" in text for text in documents), name
    assert "not run" in study.tables([{"rows": {}}])["arms"]
