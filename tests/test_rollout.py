"""Sampling: the right distribution, the same response in any company, everything shared read once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import oracle, oracle_inputs, picture, question, tiny_checkpoint
from torch._dynamo.testing import CompileCounter

from data import InputError
from model import Processor, add_lora, load_pretrained, lora_layers
from rollout import PolicyRollout
from support import cache, prepacked
from support.batching import collate, pack, token_logprobs
from support.engine import common_length, sample
from training import compile_blocks
from variants.noisy import NoisyRollout

POLICY = "policy P1: if there is a red cube, answer A1, else go on to section 2. section 2: if blue, A2, else A3. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("rollout"), layers=2, vision_depth=2)


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(processor):
    """Text and pictures, one and two of them, of several sizes, with and without a policy in front."""
    chats = [
        question("what is red? ", picture(56, 84)),
        question("no picture here"),
        question("which?", picture(112, 84)),
        question("a ", picture(84, 56), picture(56, 56)),
        question("and this one, in more words than the others have? ", picture(56, 84)),
    ]
    aware = [[{"role": "user", "content": [{"type": "text", "text": POLICY}, *chat[0]["content"]]}] for chat in chats]
    return [processor.encode(chat, add_generation_prompt=True) for chat in chats + aware]


def fresh(model, prompt, tokens, banned=(), temperature=1.0):
    """log p of each token by one forward pass over prompt and response: no cache, no sharing."""
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens)])[None]
    with torch.no_grad():
        logits = model.logits(model(ids, None, prompt.pixel_values, prompt.grid_thw))[0, len(prompt.input_ids) - 1 : -1]
    logits[:, list(banned)] = -torch.inf
    return (logits / temperature).log_softmax(-1)


def test_compiled_layers_are_compiled_once_and_write_the_same(folder, processor, prompts):
    """One graph a part serves all layers, and every step of sampling: prompts that grow, rows that end, two caches."""
    counter = CompileCounter()
    torch._dynamo.reset()
    models = [load_pretrained(folder).eval() for _ in range(2)]
    compile_blocks(models[1], counter)
    drawn = [sample(model, prompts, 3, max_tokens=12, stop_ids=processor.stop_ids, budget=400) for model in models]
    assert drawn[0] == drawn[1] and len({len(r.tokens) for rs in drawn[0] for r in rs}) > 1
    assert counter.frame_count <= 8, "a layer, a step or a size of picture has a graph of its own"


def test_the_compiled_vision_tower_serves_every_size_of_picture(folder, processor):
    """With gradients and without: one graph before attention and one after it, whatever the number of patches."""
    counter = CompileCounter()
    torch._dynamo.reset()
    plain, compiled = (load_pretrained(folder) for _ in range(2))
    compile_blocks(compiled, counter)
    for graphs, grad in (2, False), (4, True):
        with torch.set_grad_enabled(grad):
            for size in (56, 84), (112, 84), (140, 56), (28, 28), (280, 308):
                read = processor.images([picture(*size)])
                assert torch.equal(compiled.visual(*read), plain.visual(*read))
        assert counter.frame_count == graphs


@pytest.mark.parametrize("adapter", [None, "beside", "merged", "off"])
def test_prepacked_weights_write_the_same(folder, processor, prompts, adapter, monkeypatch):
    """A wide model on a CPU is sampled from copies in another order, with the adapter in them where it is in force."""
    model = load_pretrained(folder)
    if adapter:
        add_lora(model, 4, 8)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
            layer.become(adapter)
    write = lambda: [
        r for group in sample(model, prompts, 3, max_tokens=12, stop_ids=processor.stop_ids) for r in group
    ]
    plain, known = write(), {name: set(vars(module)) for name, module in model.named_modules()}
    products, linear = [], prepacked.product
    monkeypatch.setattr(prepacked, "NARROWEST", 1)
    monkeypatch.setattr(prepacked, "product", lambda *args: products.append(args) or linear(*args))
    blocked = write()
    assert len(products) == 1 + 7 * model.config.num_hidden_layers
    assert [r.tokens for r in blocked] == [r.tokens for r in plain]
    for a, b in zip(blocked, plain):
        assert np.abs(np.subtract(a.logprobs, b.logprobs)).max() <= 1e-5
    with pytest.raises(ZeroDivisionError), prepacked.prepacked(model):
        1 / 0
    assert {name: set(vars(module)) for name, module in model.named_modules()} == known, (
        "the model's own products are back"
    )


def test_greedy_tokens_equal_transformers_generate(model, processor, prompts, folder):
    theirs = oracle(folder)
    ours = sample(model, prompts, 1, max_tokens=12, temperature=0, stop_ids=processor.stop_ids)
    for prompt, (response,) in zip(prompts, ours):
        inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones_like(prompt.input_ids)[None]}
        if prompt.grid_thw is not None:
            inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw}
        rules = dict(max_new_tokens=12, do_sample=False, eos_token_id=processor.stop_ids)
        expected = theirs.generate(**oracle_inputs(inputs), **rules)
        assert response.tokens == expected[0, len(prompt.input_ids) :].tolist()


def test_sampled_logprobs_equal_a_fresh_forward_pass(model, processor, prompts):
    """Positions after pictures and padding, shared prefixes, slots: a mistake in any of them shows here."""
    rules = dict(max_tokens=10, temperature=0.7, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids)
    groups = sample(model, prompts, 3, **rules)
    for prompt, group in zip(prompts, groups):
        assert len({tuple(r.tokens) for r in group}) == 3
        for response in group:
            expected = fresh(model, prompt, response.tokens, processor.banned_ids, 0.7)
            expected = expected.gather(1, torch.tensor(response.tokens)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(response.logprobs).float(), expected, atol=1e-5)
            assert not set(response.tokens) & set(processor.banned_ids)


def test_a_response_is_the_same_alone_and_in_any_batch(model, processor, prompts):
    """Few slots, many slots, alone: the seed decides."""
    rules = dict(max_tokens=9, stop_ids=processor.stop_ids + list(range(60)))  # one word in five stops: lengths differ
    together = sample(model, prompts, 4, **rules)
    squeezed = sample(model, prompts, 4, budget=250, **rules)
    assert [[r.tokens for r in g] for g in together] == [[r.tokens for r in g] for g in squeezed]
    assert len({len(r.tokens) for g in together for r in g}) > 3
    for p in (0, 3, 7):
        (alone,) = sample(model, [prompts[p]], 1, seeds=[[(p << 32) + 2]], **rules)
        assert alone[0].tokens == together[p][2].tokens
        assert np.allclose(alone[0].logprobs, together[p][2].logprobs, atol=1e-5)


def test_20000_words_follow_the_distribution(model, processor, prompts):
    """Chi-square against the exact probabilities, words that are rarer than 1 in 2,000 taken together."""
    n = 20_000
    (group,) = sample(model, prompts[:1], n, max_tokens=1, budget=10**7, banned_ids=processor.banned_ids)
    p = fresh(model, prompts[0], [0], processor.banned_ids)[0].double().exp().numpy()
    found = np.bincount([r.tokens[0] for r in group], minlength=len(p))
    assert not found[p == 0].any()
    p, found = p[p > 0], found[p > 0]
    rare = p < 5e-4
    p, found = np.append(p[~rare], p[rare].sum() + 1e-9), np.append(found[~rare], found[rare].sum())
    chi2 = ((found - n * p) ** 2 / (n * p)).sum()
    degrees = len(p) - 1
    assert abs(chi2 - degrees) < 4 * np.sqrt(2 * degrees)  # four standard deviations of the chi-square distribution


@pytest.mark.parametrize("rule", [{"top_k": 3}, {"top_p": 0.2}, {"top_k": 40, "top_p": 0.5}])
def test_truncation_keeps_the_likeliest_words_and_says_so(model, prompts, rule):
    """The log-probabilities are those of the truncated distribution: they sum to one over the kept words."""
    (group,) = sample(model, prompts[:1], 400, max_tokens=1, **rule)
    logp = fresh(model, prompts[0], [0])[0]
    order = logp.argsort(descending=True)[: rule.get("top_k", len(logp))]
    share = logp[order].softmax(0).cumsum(0)
    kept = order[: int((share < rule.get("top_p", 2)).sum()) + 1]
    found = {r.tokens[0]: r.logprobs[0] for r in group}
    assert set(found) <= set(kept.tolist())
    expected = dict(zip(kept.tolist(), logp[kept].log_softmax(0).tolist()))
    assert all(abs(expected[word] - value) < 1e-5 for word, value in found.items())


def test_stops_lengths_and_bans(model, processor, prompts):
    stops = list(range(0, 288, 2))
    for group in sample(model, prompts[:2], 20, max_tokens=6, min_tokens=3, stop_ids=stops, banned_ids=[1, 3]):
        for r in group:
            assert len(r.tokens) >= 4 or not r.finished  # three words, then a stop token
            assert not set(r.tokens[:3]) & set(stops) and not set(r.tokens) & {1, 3}
            assert r.finished == (r.tokens[-1] in stops) and (r.finished or len(r.tokens) == 6)
    with pytest.raises(InputError, match="one seed per response"):
        sample(model, prompts[:1], 2, max_tokens=3, seeds=[[1]])


def test_everything_shared_is_read_once(model, processor, prompts, monkeypatch):
    """Equal pictures are encoded once, the policy's tokens once for all prompts, and a later call reads neither."""
    patches, tokens = [], []
    visual, forward = model.visual.forward, model.forward
    watched = lambda pixels, grid: patches.append(len(pixels)) or visual(pixels, grid)
    monkeypatch.setattr(model.visual, "forward", watched)
    monkeypatch.setattr(model, "forward", lambda ids, *a, **k: tokens.append(ids.numel()) or forward(ids, *a, **k))
    held = {}
    alone = processor.encode([{"role": "user", "content": POLICY}])
    shared = [0] * 5 + [common_length(prompt, alone) for prompt in prompts[5:]]
    sample(model, prompts, 8, max_tokens=1, shared=shared, prefixes=held)
    distinct = {
        bytes(x.numpy().tobytes())
        for p in prompts
        if p.grid_thw is not None
        for x in p.pixel_values.split(p.grid_thw.prod(1).tolist())
    }
    assert sum(patches) == sum(len(x) // 1176 // 4 for x in distinct)
    keys = [p.input_ids for p in prompts[5:]]
    (policy,) = {len(prefix) // 8 for prefix in held}
    assert policy == max(shared) > len(POLICY) // 2 and all(torch.equal(k[:policy], keys[0][:policy]) for k in keys)
    assert tokens.count(policy) == 1 and sum(tokens) == policy + 5 * (
        max(len(p.input_ids) for p in prompts[:5]) + max(len(p.input_ids) - policy for p in prompts[5:])
    )  # padded
    tokens.clear()
    sample(model, prompts[5:6], 1, max_tokens=1, shared=shared[5:6], prefixes=held)
    assert sum(tokens) == len(keys[0]) - policy


def test_held_prefixes_know_their_pictures(model, processor):
    """The second call shows another picture at the same place: what was held of the first must not answer for it."""
    held, rules = {}, dict(max_tokens=1, temperature=0)
    for seed in (1, 2):
        chats = [question(f"{i} what?", picture(84, 84, seed)) for i in range(2)]
        ask = [processor.encode(chat, add_generation_prompt=True) for chat in chats]
        length = common_length(*ask)
        (first,), _ = sample(model, ask, 1, shared=[length] * 2, prefixes=held, **rules)
        assert abs(first.logprobs[0] - float(fresh(model, ask[0], first.tokens)[0, first.tokens[0]])) < 1e-5
    assert len(held) == 2


def test_a_prompt_shares_what_it_begins_with_but_keeps_its_last_token(model, processor):
    """Two policies that begin alike are two prefixes; equal prompts still have a token to start from."""
    texts = [f"policy P{k}: if red, A1. apply it: {i}" for k in (1, 2) for i in range(2)]
    chats = [
        [{"role": "user", "content": text}] for text in [*texts, "policy P1: if red, A1. ", "policy P2: if red, A1. "]
    ]
    *prompts, one, other = [processor.encode(chat, add_generation_prompt=True) for chat in chats]
    shared = [common_length(prompt, policy) for prompt, policy in zip(prompts, (one, one, other, other))]
    held, rules = {}, dict(max_tokens=3, temperature=0.0)
    drawn = sample(model, prompts, 1, shared=shared, prefixes=held, **rules)
    assert len(held) == 2 and {len(name) // 8 for name in held} == set(shared) and len(set(shared)) == 1
    assert [r.tokens for (r,) in drawn] == [r.tokens for (r,) in sample(model, prompts, 1, **rules)]
    whole = [len(prompts[0].input_ids)] * 2
    again = sample(model, [prompts[0]] * 2, 1, shared=whole, **rules)
    assert [r.tokens for (r,) in again] == [drawn[0][0].tokens] * 2


@pytest.mark.parametrize("causal", [False, True])
def test_both_forms_of_partial_attention_agree(causal, monkeypatch):
    monkeypatch.setattr(cache, "SCORES", 200)  # several pieces
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    bias = None if causal else cache.padding_bias([9, 4], 9, q)
    for ours, theirs in zip(cache.attend_part(q, k, v, bias, causal), cache.attend_plainly(q, k, v, bias, causal)):
        assert torch.allclose(ours, theirs, atol=1e-5)
    parts = [cache.attend_plainly(q, k[:, :, at], v[:, :, at]) for at in (slice(0, 5), slice(5, 9))]
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(cache.join(*map(torch.stack, zip(*parts))), whole, atol=1e-5)


def test_packed_responses_are_learned_exactly_as_alone(model, processor, prompts):
    """Shared-prefix training: log-probabilities and gradients equal those of separate rows."""
    drawn = sample(model, prompts, 3, max_tokens=7, stop_ids=list(range(50)), banned_ids=processor.banned_ids)
    groups = [[r.tokens for r in g] for g in drawn]
    packed = pack(model, prompts, groups, processor.pad_id)
    each = [prompt for prompt, group in zip(prompts, groups) for _ in group]
    alone = collate(each, [tokens for group in groups for tokens in group], pad_id=processor.pad_id)
    gradients = []
    for batch in (packed, alone):
        logp, _ = token_logprobs(model, batch)
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((logp.detach(), found))
        model.zero_grad()
    (ours, ours_grad), (theirs, theirs_grad) = gradients
    assert packed.input_ids.numel() < alone.input_ids.numel() / 2
    assert torch.allclose(ours, theirs, atol=1e-5)
    for name, expected in theirs_grad.items():
        assert torch.allclose(ours_grad[name], expected, rtol=1e-3, atol=1e-4), name


def test_policy_rollout_is_one_group_learned_without_the_policy(model, processor):
    """The aware half is drawn given (P, x); the loss reads all of it given x alone."""
    item = {"id": "i", "policy": "P1", "question": "apply P1: ", "images": [], "answer": "A1"}
    policies = {"P1": {"text": POLICY, "images": []}}
    rollout = PolicyRollout(processor, policies, 2, 3, max_tokens=5, banned_ids=processor.banned_ids)
    (group,) = rollout(model, [item], [[1, 2, 3, 4, 5]])
    assert group.aware == [False] * 2 + [True] * 3 and len(group.responses) == 5
    assert POLICY in processor.decode(group.policy_prompt.input_ids)
    assert POLICY not in processor.decode(group.prompt.input_ids)
    for response, aware in zip(group.responses, group.aware):
        x = group.policy_prompt if aware else group.prompt
        expected = fresh(model, x, response.tokens, processor.banned_ids)[0, response.tokens[0]]
        assert abs(response.logprobs[0] - float(expected)) < 1e-5
        logp, _ = token_logprobs(model, pack(model, [group.prompt], [[response.tokens]], processor.pad_id))
        given_x = fresh(model, group.prompt, response.tokens).gather(1, torch.tensor(response.tokens)[:, None])[:, 0]
        assert torch.allclose(logp.detach(), given_x, atol=1e-5)
    alone = PolicyRollout(processor, policies, 2, 0, max_tokens=5, banned_ids=processor.banned_ids)
    (plain,) = alone(model, [item], [[1, 2]])
    assert [r.tokens for r in plain.responses] == [r.tokens for r in group.responses[:2]]
    assert plain.policy_prompt is None


def test_a_frozen_sampler_reads_each_policy_once_a_run(folder, model, processor, monkeypatch):
    frozen = load_pretrained(folder).eval()
    tokens, forward = [], frozen.forward
    monkeypatch.setattr(frozen, "forward", lambda ids, *a, **k: tokens.append(ids.numel()) or forward(ids, *a, **k))
    item = {"policy": "P1", "images": [], "answer": "A1"}
    items = [{**item, "id": f"i{i}", "question": f"{i} apply P1: "} for i in range(3)]
    rollout = PolicyRollout(processor, {"P1": {"text": POLICY, "images": []}}, 1, 1, sampler=frozen, max_tokens=1)
    rollout(model, items, [[1, 2]] * 3)
    first = sum(tokens)
    rollout(model, items, [[1, 2]] * 3)
    assert sum(tokens) - first < len(processor.tokenizer.encode(POLICY).ids)


def test_noise_replaces_the_policy(processor, model):
    """NoisyRollout: the other half reads the same tokens, its pictures with noise of the deviation asked for."""
    item = {
        "id": "i",
        "policy": "P1",
        "question": "what? ",
        "images": [processor.images([picture(56, 56)])],
        "answer": "A",
    }
    policies, options = {"P1": {"text": POLICY, "images": []}}, SimpleNamespace(noise=0.5)
    (group,) = NoisyRollout(processor, policies, 1, 1, options=options, max_tokens=2)(model, [item], [[1, 2]])
    assert torch.equal(group.prompt.input_ids, group.policy_prompt.input_ids)
    assert 0.4 < (group.prompt.pixel_values - group.policy_prompt.pixel_values).std() < 0.6
    with pytest.raises(InputError, match="item i: found no picture"):
        NoisyRollout(processor, policies, 1, 1, options=options, max_tokens=2)(
            model, [{**item, "images": []}], [[1, 2]]
        )


def test_too_long_a_prompt_is_named_not_cut(processor, model):
    item = {"id": "item-7", "policy": "P1", "question": "apply P1: ", "images": [], "answer": "A1"}
    message = r"item-7: found a prompt of \d+ tokens, 0 of them of pictures, expected at most --max-prompt 9"
    with pytest.raises(InputError, match=message):
        PolicyRollout(processor, {}, 1, 0, max_prompt=9, max_tokens=2)(model, [item], [[1]])
