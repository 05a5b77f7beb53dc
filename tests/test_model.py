"""The model against transformers on tiny random checkpoints, and the properties that training and sampling build on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import batch, oracle, oracle_inputs, picture, question, randomize, tiny_checkpoint, tiny_config

import model as house
from data import InputError
from model import Cache, Config, Processor, Qwen25VL, load_pretrained

torch.set_num_threads(1)

SIZES = [(140, 196), (56, 84), (448, 616), (20, 20), (10, 2000), (113, 300), (112, 112)]
CHATS = {
    "text only": [question("what is this?"), question("yes or no, and why is that so?")],
    "one picture": [question("what is this?", picture(140, 196))],
    "three pictures": [question("which?", picture(56, 84), picture(448, 616), picture(20, 20), answer="the ox")],
    "many pictures": [question("count them", *(picture(30 + 20 * i, 250 - 17 * i) for i in range(12)))],
    "very wide": [question("what is this?", picture(10, 2000)), question("and this?", picture(2000, 10))],
    "mixed batch": [
        question("hi", picture(140, 196), picture(56, 84)),
        question("no picture at all here, only a rather longer text than the others have"),
        question("one", picture(448, 616), answer="an answer"),
        [*question("first", picture(20, 20), answer="yes"), *question("then", picture(112, 112))],
    ],
}


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("untied"), tied=False, seed=1)


@pytest.fixture(scope="session", params=["tied", "untied"])
def pair(request):
    """Our model, transformers' model, and the processor of one checkpoint."""
    folder = request.getfixturevalue(request.param)
    return load_pretrained(folder), oracle(folder), Processor.from_pretrained(folder)


@pytest.fixture(scope="session")
def ours(untied):
    return load_pretrained(untied), Processor.from_pretrained(untied)


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CHATS)
@torch.no_grad()
def test_logits_and_positions_are_those_of_transformers(pair, case, side):
    model, reference, processor = pair
    inputs = batch(processor, CHATS[case], side)
    read = inputs["attention_mask"].bool()
    given = oracle_inputs(inputs)
    places = {key: given[key] for key in ("input_ids", "mm_token_type_ids", "attention_mask")}
    expected, expected_delta = reference.model.get_rope_index(**places, image_grid_thw=inputs.get("image_grid_thw"))
    position_ids, delta = model.positions(inputs["input_ids"], read, inputs.get("image_grid_thw"))
    assert torch.equal(position_ids, expected)
    assert torch.equal(delta, expected_delta[:, 0])
    error = (model.logits(model(**inputs)) - reference(**given).logits)[read].abs().max()
    assert error <= 3e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3, "rope_theta": 1e3},
        {"width": 96, "layers": 2, "vision_width": 48, "vision_depth": 5},
    ],
    ids=["one kv head", "kv heads as heads", "other sizes"],
)
@torch.no_grad()
def test_other_sizes_are_those_of_transformers(tmp_path, changes):
    folder = tiny_checkpoint(tmp_path, seed=3, **changes)
    inputs = batch(Processor.from_pretrained(folder), CHATS["mixed batch"])
    model = load_pretrained(folder)
    error = model.logits(model(**inputs)) - oracle(folder)(**oracle_inputs(inputs)).logits
    assert error[inputs["attention_mask"].bool()].abs().max() <= 3e-5


@torch.no_grad()
def test_vision_tower_is_that_of_transformers_at_every_odd_size(pair):
    """Compared before the text model, where a wrong window or eps would fade."""
    model, reference, processor = pair
    pixel_values, grid_thw = processor.images([picture(w, h) for w, h in SIZES])
    expected = reference.model.visual(pixel_values, grid_thw).pooler_output
    assert (model.visual(pixel_values, grid_thw) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_greedy_tokens_are_those_of_generate(pair):
    """Twelve tokens with the cache, after pictures and left padding."""
    model, reference, processor = pair
    inputs = batch(processor, CHATS["mixed batch"], "left")
    n = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = reference.generate(**oracle_inputs(inputs), **options)[:, n:]
    stops, mask = torch.tensor(processor.stop_ids), inputs["attention_mask"]
    cache, tokens = Cache(), []
    hidden = model(**inputs, cache=cache)
    for _ in range(12):
        scores = model.logits(hidden[:, -1]).index_fill(-1, stops, -torch.inf)
        tokens.append(scores.argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
        hidden = model(tokens[-1], mask, cache=cache)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


@torch.no_grad()
def test_bf16_is_as_exact_as_the_reference_in_bf16(untied, ours):
    model, processor = ours
    inputs = batch(processor, CHATS["mixed batch"])
    read = inputs["attention_mask"].bool()
    exact = model.logits(model(**inputs))[read]
    half = load_pretrained(untied, dtype=torch.bfloat16)
    error = (half.logits(half(**inputs))[read].float() - exact).abs().mean()
    theirs = (oracle(untied, torch.bfloat16)(**oracle_inputs(inputs)).logits[read].float() - exact).abs().mean()
    assert error <= 1.5 * theirs


def test_gradient_of_every_parameter_is_that_of_transformers_with_and_without_checkpointing(untied):
    model, reference, processor = load_pretrained(untied), oracle(untied), Processor.from_pretrained(untied)
    inputs = batch(processor, CHATS["mixed batch"])
    read = inputs["attention_mask"].bool()
    direction = torch.randn(*read.shape, 288, generator=torch.Generator().manual_seed(0))
    (reference(**oracle_inputs(inputs)).logits * direction)[read].sum().backward()
    expected = {house.hub_name(name): p.grad for name, p in reference.named_parameters()}
    for checkpointing in (False, True):
        model.enable_gradient_checkpointing(checkpointing)
        model.zero_grad()
        (model.logits(model(**inputs)) * direction)[read].sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


SIZES_OF_OFFICIAL_MODELS = {  # width, inner, layers, heads, kv heads, vocabulary, tied, vision inner -> parameters
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420, 3_754_622_976),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420, 8_292_166_656),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456, 33_452_718_336),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456, 73_410_777_344),
}


def official_config(size):
    width, inner, layers, heads, shared, vocabulary, tied, vision_inner, _ = SIZES_OF_OFFICIAL_MODELS[size]
    raw = tiny_config(tied, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers)
    raw |= {"num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": vocabulary}
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    tower = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": vision_inner}
    raw["vision_config"] |= {**tower, "out_hidden_size": width, "fullatt_block_indexes": [7, 15, 23, 31]}
    return raw


@pytest.mark.parametrize("size", SIZES_OF_OFFICIAL_MODELS)
def test_parameter_counts_of_the_official_sizes_from_the_config_alone(size):
    with torch.device("meta"):
        model = Qwen25VL(Config.from_json(official_config(size)))
    assert sum(p.numel() for p in model.parameters()) == SIZES_OF_OFFICIAL_MODELS[size][-1]
    assert len(list(model.parameters())) == (824 if size == "3B" else len(model.state_dict()))


# -- what is next to what does not matter ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_in_a_padded_batch_is_the_row_alone(ours, side):
    model, processor = ours
    together = batch(processor, CHATS["mixed batch"], side)
    hidden = model(**together)
    for row, chat in enumerate(CHATS["mixed batch"]):
        alone = model(**batch(processor, [chat]))
        assert (hidden[row][together["attention_mask"][row].bool()] - alone[0]).abs().max() <= 5e-6


@torch.no_grad()
def test_a_picture_does_not_see_the_other_pictures(ours):
    """Windows and frames of equal size share a batch in attention; each picture must still come out as if alone."""
    model, processor = ours
    pictures = [picture(w, h, seed) for seed in (0, 1) for w, h in SIZES]
    together = model.visual(*processor.images(pictures))
    alone = torch.cat([model.visual(*processor.images([each])) for each in pictures])
    assert (together - alone).abs().max() <= 2e-6


@torch.no_grad()
def test_two_frames_of_one_grid_do_not_see_each_other(ours):
    """Attention stays within a frame also where a grid has several (t > 1), as in the reference."""
    model, processor = ours
    pixel_values, grid_thw = processor.images([picture(140, 196, 0), picture(140, 196, 1)])
    film = torch.tensor([[2, *grid_thw[0, 1:].tolist()]])
    assert torch.allclose(model.visual(pixel_values, film), model.visual(pixel_values, grid_thw), atol=1e-6)


@torch.no_grad()
def test_packed_rows_with_a_mask_of_pairs_are_the_rows_alone(ours):
    model, processor = ours
    first, second = (processor.encode(question(text)).input_ids for text in ("one thing", "quite another thing"))
    ids, n = torch.cat([first, second])[None], len(first)
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask[n:, :n] = False
    places = torch.cat([torch.arange(n), torch.arange(len(second))]).expand(3, 1, -1)
    packed = model(ids, mask[None], position_ids=places)[0]
    assert (packed[:n] - model(first[None])[0]).abs().max() <= 2e-6
    assert (packed[n:] - model(second[None])[0]).abs().max() <= 2e-6


@torch.no_grad()
def test_pictures_encoded_once_give_what_pixels_give(ours):
    model, processor = ours
    inputs = batch(processor, CHATS["mixed batch"])
    features = model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    pixel_values = inputs.pop("pixel_values")
    assert torch.equal(model(**inputs, image_embeds=features), model(**inputs, pixel_values=pixel_values))


def test_no_mask_is_made_where_causality_says_it_all(ours):
    """Right padding needs none, as nothing before it looks that far; left padding does."""
    model, processor = ours
    assert model.visible(None, 5, 0) is None
    mask = batch(processor, CHATS["mixed batch"], "right")["attention_mask"]
    assert model.visible(mask, mask.shape[1], 0) is None
    assert model.visible(torch.ones(2, 9), 4, 5) is None
    assert model.visible(mask.flip(1), mask.shape[1], 0) is not None
    assert model.visible(mask, 1, mask.shape[1] - 1) is not None


def test_every_token_sees_something_and_left_padding_only_itself(ours):
    """A softmax over nothing is not a number, or whatever a kernel makes of it."""
    model, processor = ours
    read = batch(processor, CHATS["mixed batch"], "left")["attention_mask"].bool()  # (B, S)
    T = read.shape[1]
    seen = model.visible(read, T, 0)[:, 0]  # (B, T, S)
    assert torch.equal(seen[~read], torch.eye(T, dtype=torch.bool).expand_as(seen)[~read])
    assert model.visible(read, 3, T - 3).any(-1).all() and seen.any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_turns_by_exact_angles_whatever_the_activations_are(ours, dtype):
    """Beyond 256 not every position has a bf16 of its own: there a prompt's words would change places."""
    model, _ = ours
    positions = torch.tensor([0, 1, 257, 4001, 30_001])
    cos, sin = model.model.rope(positions.expand(3, 1, -1), dtype)  # (1, 1, 5, K/2)
    half = cos.shape[-1]
    angles = positions[:, None] / model.config.rope_theta ** (torch.arange(half).double() / half)
    assert cos.dtype == sin.dtype == dtype
    for found, exact in ((cos, angles.cos()), (sin, angles.sin())):
        assert (found[0, 0] - exact).abs().max() <= torch.finfo(
            dtype
        ).eps + 2e-3  # an fp32 angle of 30001 is off by 1e-3


# -- cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_reading_in_pieces_with_a_cache_is_reading_at_once(ours, side):
    """A prefill with pictures and padding, then three tokens, one, and four; positions go on by themselves."""
    model, processor = ours
    inputs = batch(processor, CHATS["mixed batch"], side)
    more = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    pictures = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    full = model(ids, mask, **pictures)
    cache, start = Cache(), inputs["input_ids"].shape[1]
    pieces = [model(**inputs, cache=cache)]
    for n in (3, 1, 4):
        pieces.append(model(ids[:, start : start + n], mask[:, : start + n], cache=cache))
        start += n
        assert cache.length == start
    assert (torch.cat(pieces, dim=1) - full)[mask.bool()].abs().max() <= 4e-6


@torch.no_grad()
def test_a_picture_can_come_after_the_cache_was_filled(ours):
    """The second turn of a chat: positions go on after the first turn's picture."""
    model, processor = ours
    inputs = batch(processor, [CHATS["mixed batch"][3]])
    ids, grids, pixels = inputs["input_ids"], inputs["image_grid_thw"], inputs["pixel_values"]
    n = int((ids[0] == processor.vision_end_id).nonzero()[0]) + 5  # in the text after the first picture
    first, second = grids.prod(1)
    cache = Cache()
    head = model(ids[:, :n], None, pixels[:first], grids[:1], cache=cache)
    tail = model(ids[:, n:], None, pixels[-second:], grids[1:], cache=cache)
    assert (torch.cat([head, tail], dim=1) - model(**inputs)).abs().max() <= 4e-6


# -- training ---------------------------------------------------------------------------------------------------------


def test_frozen_or_trained_vision_by_a_flag(untied):
    model, processor = load_pretrained(untied), Processor.from_pretrained(untied)
    for vision, text in ((False, True), (True, False), (True, True)):
        house.set_trainable(model, vision, text)
        model.zero_grad(set_to_none=True)
        model(**batch(processor, CHATS["one picture"])).sum().backward()
        for name, p in model.named_parameters():
            wanted = (vision if name.startswith("visual.") else text) and name != "lm_head.weight"
            assert (p.grad is not None) == wanted, name


def test_layouts_kept_from_sampling_serve_training(untied):
    """Tensors made in inference mode cannot be saved for a backward pass; the cached window layout must be none."""
    house.arrange.cache_clear()
    model, processor = load_pretrained(untied), Processor.from_pretrained(untied)
    inputs = batch(processor, CHATS["one picture"])
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).sum().backward()


def test_blocks_compile_without_a_graph_break(ours):
    model, _ = ours
    x, (cos, sin) = torch.randn(2, 7, 64), model.model.rope(torch.arange(7).expand(3, 2, -1), torch.float)
    block = torch.compile(model.model.layers[0], fullgraph=True, backend="eager")
    assert torch.allclose(block(x, cos, sin, None, None), model.model.layers[0](x, cos, sin, None, None), atol=1e-6)
    windows = house.arrange(((1, 10, 14), (1, 4, 4)), model.config.vision, torch.device("cpu"))[0]
    x = torch.randn(156, 32)
    block = torch.compile(model.visual.blocks[0], fullgraph=True, backend="eager")
    expected = model.visual.blocks[0](x, windows.cos, windows.sin, windows.runs)
    assert torch.allclose(block(x, windows.cos, windows.sin, windows.runs), expected, atol=1e-6)


def test_two_runs_give_the_same_bits(untied):
    processor = Processor.from_pretrained(untied)
    inputs = batch(processor, CHATS["mixed batch"])
    gradients = []
    for _ in range(2):
        model = load_pretrained(untied)
        model(**inputs).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_autocast_trains_fp32_weights_in_bf16(untied):
    model, processor = load_pretrained(untied), Processor.from_pretrained(untied)
    inputs = batch(processor, CHATS["mixed batch"])
    exact = model(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(**inputs)
    rough.float().square().mean().backward()
    assert (rough - exact)[inputs["attention_mask"].bool()].abs().mean() < 0.05
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_fresh_weights_are_finite_and_a_fresh_model_trains():
    """`Qwen25VL(config)` with no checkpoint is what the tiny base starts from."""
    torch.manual_seed(0)
    model = Qwen25VL(Config.from_json(tiny_config()))
    ids = torch.arange(20)[None]
    loss = torch.nn.functional.cross_entropy(model.logits(model(ids))[0, :-1], ids[0, 1:])
    loss.backward()
    assert loss < 8 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# -- what does not fit is said ----------------------------------------------------------------------------------------


def test_pictures_and_image_tokens_that_do_not_match_are_refused(ours):
    model, processor = ours
    inputs = batch(processor, CHATS["one picture"])
    ids, pixels, grids = inputs["input_ids"], inputs["pixel_values"], inputs["image_grid_thw"]
    with pytest.raises(InputError, match="found 35 image tokens in input_ids, expected 0"):
        model(ids)
    with pytest.raises(InputError, match="found 0 image tokens in input_ids, expected 35"):
        model(ids[ids != processor.image_pad_id][None], None, pixels, grids)
    with pytest.raises(InputError, match="found 139 patches in pixel_values, expected 140"):
        model(ids, None, pixels[1:], grids)


def test_every_norm_has_the_eps_of_transformers(pair):
    """A wrong eps moves the logits of a random model less than rounding does, so it is compared as a number."""
    model, reference, _ = pair
    eps = sorted(module.eps for module in model.modules() if hasattr(module, "eps"))
    assert eps == sorted(m.variance_epsilon for m in reference.modules() if hasattr(m, "variance_epsilon")) and eps


@pytest.mark.parametrize("layout", ["hybrid", "nested"])
def test_all_three_layouts_of_config_json_say_the_same(layout):
    flat = tiny_config(tied=True, rope_theta=5e5, rms_norm_eps=1e-3)  # not what they would be by default
    top = {"vision_config": flat["vision_config"], "image_token_id": flat["image_token_id"]}
    text = {key: value for key, value in flat.items() if key not in top}
    if layout == "nested":
        rope = {"rope_theta": text.pop("rope_theta"), "mrope_section": text.pop("rope_scaling")["mrope_section"]}
        text["rope_parameters"] = {"rope_type": "default", **rope}
        top["vision_config"] = {**top["vision_config"], "in_channels": 3}
        del top["vision_config"]["in_chans"]
    found, expected = Config.from_json({**top, "text_config": text}), Config.from_json(flat)
    assert {**vars(found), "raw": None} == {**vars(expected), "raw": None}


def test_config_written_by_transformers_is_read(untied, tmp_path):
    oracle(untied).config.save_pretrained(tmp_path)
    found = Config.from_json(json.loads((tmp_path / "config.json").read_text()))
    expected = Config.from_json(json.loads((untied / "config.json").read_text()))
    assert {**vars(found), "raw": None} == {**vars(expected), "raw": None}


# -- commands ---------------------------------------------------------------------------------------------------------


def command(*args, stdin=""):
    program = [sys.executable, str(Path(house.__file__)), *map(str, args)]
    return subprocess.run(program, input=stdin, capture_output=True, text=True, timeout=120)


def test_describe_says_what_a_checkpoint_is(tied):
    said = command("--describe", tied).stdout
    parameters = sum(p.numel() for p in load_pretrained(tied).parameters())
    assert f"{parameters:,} parameters" in said and "tied to the embedding" in said


def test_chat_streams_the_greedy_answer(ours, untied, tmp_path):
    model, processor = ours
    picture(60, 60).save(tmp_path / "picture.png")
    said = command("--chat", untied, "--image", tmp_path / "picture.png", "--max-tokens", 6, stdin="what is this?\n")
    prompt = processor.encode(question("what is this?", picture(60, 60)), add_generation_prompt=True)
    ids, n = prompt.input_ids, len(prompt.input_ids)
    with torch.no_grad():
        for _ in range(6):
            hidden = model(ids[None], None, prompt.pixel_values, prompt.grid_thw)
            scores = model.logits(hidden[0, -1:]).index_fill(-1, torch.tensor(processor.banned_ids), -torch.inf)
            ids = torch.cat([ids, scores.argmax(-1)])
    answer = ids[n:].tolist()
    answer = answer[: min([answer.index(stop) for stop in processor.stop_ids if stop in answer], default=6)]
    assert said.returncode == 0 and said.stdout.rstrip("\n") == processor.decode(answer).rstrip("\ufffd")


def test_randomize_leaves_no_parameter_as_it_was():
    """The oracle checks only see parameters that matter: none may be zero or one by chance of its default."""
    model = randomize(Qwen25VL(Config.from_json(tiny_config(tied=False))))
    assert all(p.std() > 0.01 for p in model.parameters())
