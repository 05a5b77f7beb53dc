"""variants/latent: its losses by hand, its codes by their distribution, and what RL moves."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize, tiny_checkpoint
from rl_bench import Bench, draw, run
from rl_bench import config as settings_of
from small import arguments, quiet, small_data, write_lines

import evaluate
import model as qwen
import train_rl
import train_sft
from data import InputError
from model import Processor, load_pretrained, save_pretrained
from rollout import Group, PolicyRollout, Responses
from support import chat, plan
from support.engine import Rules, sample
from support.runs import open_model
from train_rl import Config
from variants.latent import actions
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
            assert parts == set(latent.LEARNED[stage])
            assert (
                not (moved & base)
                or stage == 5
                and not any("visual" in name or ".norm" in name.replace("layernorm", "") for name in moved & base)
            )
        before = after
    said = json.loads((stages / "5" / "validation.jsonl").read_text().splitlines()[-1])
    assert 0 <= said["in_reach"] <= 1 <= said["words_in_reach"] <= 8


def test_a_plan_counts_the_parameters_of_the_papers_sizes():
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
        planned = plan.plan(plan.Config(model=size, latent=True))
        assert planned["trained"] == tuned and planned["peak"] < plan.plan(plan.Config(model=size))["peak"]
    with pytest.raises(InputError, match="--latent"):
        plan.plan(plan.Config(model="3B", latent=True, full=False))


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
