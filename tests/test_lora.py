"""LoRA against PEFT in both directions, and what training relies on: exact merging, adapters off, what is frozen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import batch, oracle, oracle_inputs, picture, question, tiny_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from data import InputError
from model import (
    Processor,
    adapter_off,
    add_lora,
    load_adapter,
    load_pretrained,
    lora_layers,
    lora_parameters,
    merge_lora,
    save_adapter,
    set_trainable,
    unmerge_lora,
)

ALL = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
VISION = r".*visual\.blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.up_proj)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("lora"), tied=False)


@pytest.fixture(scope="module")
def inputs(folder):
    chats = [question("what?", picture(140, 196)), question("and a longer text without a picture")]
    return batch(Processor.from_pretrained(folder), chats)


@pytest.fixture
def model(folder):
    return load_pretrained(folder)


def stir(parameters, seed=0):
    """Random values where LoRA starts from zero: an adapter must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.normal_(0, 0.2, generator=generator)


@torch.no_grad()
def logits(model, inputs):
    return model.logits(model(**inputs))[inputs["attention_mask"].bool()]


@torch.no_grad()
def their_logits(model, inputs):
    return model(**oracle_inputs(inputs)).logits[inputs["attention_mask"].bool()]


def close(a, b):
    return (a - b).abs().max() <= 1e-4


# -- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"], r"model\.layers\.[02]\..*up_proj", VISION], ids=str)
def test_peft_reads_our_adapters(folder, model, inputs, tmp_path, targets, rslora):
    add_lora(model, 4, 6, targets, rslora=rslora)
    stir(lora_parameters(model))
    save_adapter(model, tmp_path)
    plain = oracle(folder)
    before = their_logits(plain, inputs)
    theirs = PeftModel.from_pretrained(plain, tmp_path)
    assert sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name) == sum(
        p.numel() for p in lora_parameters(model)
    )
    expected = their_logits(theirs, inputs)
    assert not close(expected, before)
    assert close(logits(model, inputs), expected)
    assert close(logits(model, inputs), their_logits(theirs.merge_and_unload(), inputs))


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("targets", [ALL, VISION, ["q_proj", "v_proj"]], ids=str)
def test_we_read_peft_s_adapters(folder, model, inputs, tmp_path, targets, rslora):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM")
    theirs = get_peft_model(oracle(folder), config)
    stir(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    assert close(logits(model, inputs), their_logits(theirs, inputs))
    merge_lora(model)
    assert close(logits(model, inputs), their_logits(theirs, inputs))


def test_hub_names_in_an_adapter_are_read_too(folder, model, inputs, tmp_path):
    """PEFT writes these over older versions of transformers, and would load them as a silent no-op over newer ones."""
    add_lora(model, 4, 8)
    stir(lora_parameters(model))
    save_adapter(model, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    save_file({n.replace("language_model.", ""): t for n, t in held.items()}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(load_adapter(load_pretrained(folder), tmp_path), inputs), logits(model, inputs))


def test_the_files_are_what_peft_documents(model, tmp_path):
    save_adapter(add_lora(model, 4, 8, dropout=0.1), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 4, "lora_alpha": 8}
    assert {**expected, "lora_dropout": 0.1}.items() <= config.items()
    assert config["target_modules"] == r".*language_model.*\.(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)"
    held = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.2.self_attn.k_proj"
    assert held[f"{prefix}.lora_A.weight"].shape == (4, 64) and held[f"{prefix}.lora_B.weight"].shape == (32, 4)
    assert len(held) == 2 * 7 * 3


def test_an_adapter_survives_saving_and_loading_over_the_old_one(folder, model, inputs, tmp_path):
    """Into a model without LoRA, and into one that has other values, or another scale, in the same places."""
    stir(lora_parameters(add_lora(model, 4, 8, rslora=True)))
    save_adapter(model, tmp_path)
    expected = logits(model, inputs)
    assert torch.equal(logits(load_adapter(load_pretrained(folder), tmp_path), inputs), expected)
    other_scale = add_lora(load_pretrained(folder), 4, 2)
    assert torch.equal(logits(load_adapter(other_scale, tmp_path), inputs), expected)
    stir(lora_parameters(model), seed=1)
    merge_lora(model)
    assert torch.equal(logits(load_adapter(model, tmp_path), inputs), expected)


# -- what it does to the model ----------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_only_it_is_trained(folder, model, inputs):
    add_lora(model, 4, 8)
    assert torch.equal(logits(model, inputs), logits(load_pretrained(folder), inputs))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{side}" for name in lora_layers(model) for side in "AB"}
    set_trainable(model, vision=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("visual.")}


def test_a_starts_as_peft_s_does(folder):
    """Kaiming-uniform with a = sqrt(5), so U(-1/sqrt(in), 1/sqrt(in)); B is zero."""
    torch.manual_seed(0)
    layer = add_lora(load_pretrained(folder), 32, 8).model.layers[0].mlp.down_proj
    bound = 128**-0.5
    assert 0.98 * bound < layer.lora_A.abs().max() <= bound
    assert abs(layer.lora_A.std() - bound / 3**0.5) < 0.02 * bound
    assert not layer.lora_B.any()


def test_gradients_of_the_adapter_are_peft_s(folder, model, inputs, tmp_path):
    stir(lora_parameters(add_lora(model, 4, 8)))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(oracle(folder), tmp_path, is_trainable=True)
    read = inputs["attention_mask"].bool()
    model.enable_gradient_checkpointing()
    model.logits(model(**inputs))[read].square().mean().backward()
    theirs(**oracle_inputs(inputs)).logits[read].square().mean().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(expected) == len(lora_parameters(model))
    for name, p in model.named_parameters():
        if p.requires_grad:
            grad = expected[f"base_model.model.{name.replace('model.', 'model.language_model.', 1)}.default.weight"]
            assert (p.grad - grad).norm() <= 1e-4 * grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_keeps_the_function_and_unmerging_restores_the_bits(folder, inputs, dtype):
    """In bf16 subtracting the product again would leave other weights; RL merges and unmerges at every step."""
    model = load_pretrained(folder, dtype=dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    stir(lora_parameters(add_lora(model, 4, 8)))
    apart = logits(model, inputs)
    for _ in range(3):
        merge_lora(model)
        error = (logits(model, inputs) - apart).float().abs()
        assert error.max() <= 1e-4 if dtype == torch.float32 else error.mean() <= 0.03
        unmerge_lora(model)
    assert torch.equal(logits(model, inputs), apart)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize("merged", [False, True])
def test_adapter_off_is_the_model_without_it_even_after_an_error(folder, model, inputs, merged):
    reference = logits(model, inputs)
    stir(lora_parameters(add_lora(model, 4, 8)))
    if merged:
        merge_lora(model)
    adapted = logits(model, inputs)
    with pytest.raises(ZeroDivisionError), adapter_off(model):
        assert torch.equal(logits(model, inputs), reference)
        1 / 0
    assert torch.equal(logits(model, inputs), adapted)
    assert not close(adapted, reference)


def test_dropout_acts_in_training_only(model, inputs):
    stir(lora_parameters(add_lora(model, 4, 8, dropout=0.5)))
    model.eval()
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


def test_adapters_of_a_bf16_model_are_fp32_and_learn_small_steps(folder, inputs):
    """A step of 1e-4 of a value is lost in bf16's eight bits."""
    model = add_lora(load_pretrained(folder, dtype=torch.bfloat16), 4, 8)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model))
    model(**inputs).float().square().sum().backward()
    assert all(layer.lora_B.grad.any() for layer in lora_layers(model).values())


# -- what does not fit is said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [(0, 8), (4, 0), (4, 8, ["lm"]), (4, 8, r".*\.z_proj"), (4, 8, None, 1.0), (4, float("inf")), (4, 8, "(")],
    ids=str,
)
def test_settings_that_make_no_adapter_are_refused(model, given):
    with pytest.raises(InputError, match="LoRA: found"):
        add_lora(model, *given)


@pytest.mark.parametrize(
    "targets",
    [
        r".*(lm_head|q_proj)",
        ["q_proj", "lm_head"],
        r".*(embed_tokens|q_proj)",
        ["q_proj", "embed_tokens"],
        r".*visual.*proj",  # the patches' convolution
        ["q_proj", "input_layernorm"],
        ".*",
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_target_that_would_not_be_trained_is_refused_before_it(model, tmp_path, targets, tied):
    """The head and the embedding are multiplied without their modules: an adapter there would never be read."""
    if tied:
        model = load_pretrained(tiny_checkpoint(tmp_path, tied=True))
    with pytest.raises(InputError, match="LoRA: found the targets .*(lm_head|embed_tokens|patch_embed|layernorm)"):
        add_lora(model, 4, 8, targets)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_peft_s_own_defaults_are_no_options(folder, tmp_path):
    """Every key that PEFT writes for a plain adapter is understood, so that nothing is refused in passing."""
    theirs = get_peft_model(oracle(folder), LoraConfig(target_modules=ALL))
    theirs.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())) > 30
    load_adapter(load_pretrained(folder), tmp_path)


def test_a_second_adapter_goes_onto_the_merged_first_one_only(model, inputs):
    """The next stage's LoRA on the last one's result; over an unmerged one it would lose it silently."""
    stir(lora_parameters(add_lora(model, 4, 8)))
    adapted = logits(model, inputs)
    with pytest.raises(InputError, match="expected it merged before another one"):
        add_lora(model, 2, 4)
    merge_lora(model)
    assert close(logits(add_lora(model, 2, 4), inputs), adapted)


def tensors(change):
    def damage(folder):
        held = load_file(folder / "adapter_model.safetensors")
        change(held)
        save_file(held, folder / "adapter_model.safetensors")

    return damage


def config(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


HEAD, EMBEDDING = "base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"
A = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"
BAD = {
    "no folder": (lambda folder: shutil.rmtree(folder), "found no such folder"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: found no such file"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: found"),
    "cut short": (cut, "adapter_model.safetensors: found .* whole safetensors file"),
    "half a pair": (tensors(lambda held: held.pop(A)), "missing model.layers.0.mlp.up_proj.lora_A"),
    "another shape": (tensors(lambda held: held.update({A: torch.zeros(4, 9)})), r"shape \[4, 9\], expected \[4, 64\]"),
    "another rank": (config(r=3), r"shape \[4, 64\], expected \[3, 64\]"),
    "another layer": (tensors(lambda held: held.update({A.replace("up", "zip"): held.pop(A)})), "unexpected .*zip"),
    "a full weight": (tensors(lambda held: held.update({A.replace("lora_A.", ""): torch.zeros(2)})), "unexpected"),
    "another method": (config(peft_type="IA3"), "peft_type = 'IA3', expected 'LORA'"),
    "dora": (config(use_dora=True), "use_dora = True"),
    "trained biases": (config(bias="all"), "bias = 'all', expected 'none'"),
    "changed weights": (config(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "no alpha": (config(lora_alpha=None), "lora_alpha = None, expected a positive number"),
    "infinite alpha": (config(lora_alpha=float("inf")), "lora_alpha = inf, expected a positive number"),
    "text for a flag": (config(use_rslora="no"), "use_rslora = 'no', expected true or false"),
    "a probability of 1": (config(lora_dropout=1.0), "lora_dropout = 1.0, expected a probability"),
    "a tensor twice": (
        tensors(lambda held: held.update({A.replace("language_model.", ""): held[A] + 0})),
        "second time",
    ),
    "the head": (tensors(lambda held: held.update({HEAD: torch.zeros(4, 64)})), "unexpected lm_head.lora_A"),
    "the embedding": (tensors(lambda held: held.update({EMBEDDING: torch.zeros(4, 288)})), "unexpected .*embed_tokens"),
    **{
        f"{key} = {value}": (config(**{key: value}), f"{key} = .*, expected")
        for key, value in {
            "alora_invocation_tokens": [1, 2],
            "use_qalora": True,
            "use_bdlora": {"nblocks": 2},
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 2},
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": [1],
            "layer_replication": [[0, 2]],
            "target_parameters": ["mlp.weight"],
            "arrow_config": {"top_k": 2},
            "kasa_config": {"beta": 1},
            "velora_config": {"rank": 1},
            "monteclora_config": {"buffer_size": 1},
            "megatron_config": {"hidden_size": 1},
            "loftq_config": {"loftq_bits": 4},
            "eva_config": {"rho": 2.0},
            "corda_config": {"corda_method": "ipm"},
            "lora_ga_config": {"scale": "stable"},
            "ensure_weight_tying": True,
            "fan_in_fan_out": True,
            "lora_bias": True,
            "an_option_of_tomorrow": 0.5,
        }.items()
    },
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_adapter_is_named_with_its_fault_and_the_model_stays_as_it_was(model, tmp_path, fault):
    damage, message = BAD[fault]
    folder = Path(tmp_path) / "adapter"
    save_adapter(add_lora(load_pretrained(model.source), 4, 8), folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value) and not lora_layers(model)
