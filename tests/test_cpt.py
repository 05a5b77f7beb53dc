"""Stage 1: every text token of policy, query and response is learned; pictures are seen, and not predicted."""

import pytest
import torch
from helpers import picture, tiny_checkpoint
from small import arguments, metrics, quiet, small_data

import train_cpt
from data import InputError
from model import Processor, load_pretrained
from support.batching import collate, token_logprobs
from support.config import parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpt")
    tiny_checkpoint(folder / "model")
    small_data(folder / "data")
    return folder


def sequences(folder, *flags):
    config = parse(
        train_cpt.Config, "", ["--model", f"{folder}/model", "--data", f"{folder}/data", "--out", "x", *flags]
    )
    return train_cpt.Sequences(config.data, config.split, Processor.from_pretrained(config.model), config)


def batch_of(rows, i, step=0):
    return collate(*zip(rows.encode(step, i)), pad_id=rows.processor.pad_id)


def test_loss_equals_cross_entropy_by_hand_in_float64(folder):
    """Over P_T, Q, C and A with two pictures in between: L = -1/sum m sum m log p(x_t | x_<t)."""
    model, rows = load_pretrained(folder / "model"), sequences(folder)
    batch = batch_of(rows, 1)  # of P2, whose policy holds a picture
    assert len(batch.image_grid_thw) == 2
    loss = -token_logprobs(model, batch)[0].sum() / len(batch.index)
    model.double()
    logits = model.logits(model(batch.input_ids, None, batch.pixel_values.double(), batch.image_grid_thw))[0]  # (T,V)
    x = batch.input_ids[0]
    m = ~torch.isin(x, torch.tensor(rows.processor.banned_ids))
    by_hand = -(logits.log_softmax(-1)[:-1].gather(1, x[1:, None])[:, 0] * m[1:]).sum() / m[1:].sum()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-5)


def test_picture_tokens_are_no_targets_and_get_exactly_no_gradient(folder):
    """The hidden state before a picture token would learn to predict it: with the mask its gradient is exactly zero."""
    model, rows = load_pretrained(folder / "model"), sequences(folder)
    batch = batch_of(rows, 1)
    kept = {}
    model.model.norm.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), kept.update(h=output))[0]
    )
    token_logprobs(model, batch)[0].sum().backward()
    visual = torch.isin(batch.input_ids[0, 1:], torch.tensor(rows.processor.banned_ids))
    gradient = kept["h"].grad[0, :-1].abs().sum(-1)  # (T-1,) of the state that predicts x_t+1
    assert visual.sum() > 8 and (gradient[visual] == 0).all() and (gradient[~visual] > 0).all()


def test_other_pictures_change_the_text_loss(folder):
    model, rows = load_pretrained(folder / "model"), sequences(folder)
    batch = batch_of(rows, 1)
    first = token_logprobs(model, batch)[0].sum()
    batch.pixel_values = rows.processor.images([picture(56, 56, seed=70), picture(84, 56, seed=71)])[0]
    assert (token_logprobs(model, batch)[0].sum() - first).abs() > 1e-3


def test_the_policy_stands_in_front_and_is_learned(folder):
    rows = sequences(folder)
    prompt, response, m = rows.encode(0, 0)
    words = rows.processor.tokenizer.decode(
        torch.cat([prompt.input_ids, torch.tensor(response)])[m].tolist(), skip_special_tokens=False
    )
    assert "policy P1: red? yes: A, no: B\n\napply P1: <|im_end|>" in words and words.endswith("\\boxed{A}<|im_end|>")
    assert "<|image_pad|>" not in words and "<|vision_start|>" not in words


@pytest.mark.parametrize(
    "kinds, count, front",
    [("applied", 12, True), ("document", 2, True), ("section", 1, False), ("applied,document,section", 15, None)],
)
def test_kinds_choose_the_items_and_whether_the_policy_is_in_front(folder, kinds, count, front):
    rows = sequences(folder, "--kinds", kinds)
    assert len(rows) == count
    if front is not None:
        assert all(("yes: A" in rows.processor.decode(rows.encode(0, i)[0].input_ids)) == front for i in range(count))


def test_a_document_is_the_policy_alone(folder):
    prompt, response, m = sequences(folder, "--kinds", "document").encode(0, 0)
    text = Processor.from_pretrained(folder / "model").decode(prompt.input_ids)
    assert response == [] and text.rstrip().endswith("policy P1: red? yes: A, no: B") and m.all()


def test_unmasking_grows_with_its_share_and_is_drawn_anew(folder):
    """--mask-visual 1 masks all picture tokens, 0 none; in between another part of them each update."""
    visual = lambda rows, step: sum(
        (~torch.isin(x, rows.visual) & ~m | torch.isin(x, rows.visual) & m).sum().item()
        for x, m in [(torch.cat([p.input_ids, torch.tensor(r)]), m) for p, r, m in [rows.encode(step, 2)]]
    )
    counts = [visual(sequences(folder, "--mask-visual", share), 0) for share in ("1", "0.5", "0")]
    assert counts[0] == 0 < counts[1] < counts[2] == 18  # 112 x 112: 16 tokens and two marks
    half = sequences(folder, "--mask-visual", "0.5")
    assert not torch.equal(half.encode(0, 2)[2], half.encode(1, 2)[2]) and torch.equal(
        half.encode(1, 2)[2], half.encode(1, 2)[2]
    )


def test_a_prompt_over_the_limit_is_named_and_never_cut(folder):
    with pytest.raises(InputError, match=r"item i1: found a prompt of \d+ tokens, 10 of them .*--max-prompt 40"):
        sequences(folder, "--max-prompt", "40").encode(0, 1)


def test_the_policy_is_learned(folder, tmp_path):
    """A dozen updates on documents alone: the policy's own words become likely, and the sign of the loss is right."""
    flags = dict(kinds="document", steps=12, batch_size=2, lr=5e-3)
    quiet(train_cpt.main, arguments(folder / "model", folder / "data", tmp_path / "run", **flags))
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]
