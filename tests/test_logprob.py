"""kernels/logprob.py against float64 on the same rounded inputs, and every trap the field has fallen into, by name.

Axes: N tokens, D width, V vocabulary. The file runs twice: as it is (PyTorch on a CPU, the compiled kernel on a GPU),
and once more from the last test with TRITON_INTERPRET=1, where the very same Triton kernel runs interpreted.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels.logprob as logprob
from kernels.logprob import linear_logprob

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Frobenius, worst row; at 1 - p = 1e-6 PyTorch's own fp32 is wrong by 17 %
GRADIENT_BOUND = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 1e-2), torch.float16: (4e-3, 1e-2)}
arithmetic_aside = pytest.mark.skipif(INTERPRETED, reason="not about the kernel: the other run has it")


def two_blocks(V):
    """Interpreted, a row is two blocks: what happens between them is seen, and the interpreter is slow."""
    if INTERPRETED:
        import kernels.logprob_triton as kernel

        kernel.BLOCKS["cpu"] = (kernel.triton.next_power_of_2(V) // 2, 1)


def case(N, D, V, dtype=torch.float32, temperature=1.0, seed=0):
    """h, W, y: every other row confident with 1 - p from 5e-4 down to 1e-6, the rest with logits spread by 3 or so."""
    two_blocks(V)
    torch.manual_seed(seed)
    W, h, y = torch.randn(V, D) * 0.5, torch.randn(N, D) * 6 / D**0.5, torch.randint(V, (N,))
    wanted = torch.logspace(math.log10(5e-4), -6, N)[::2, None]
    h[::2] = W[y[::2]]
    l, own = h[::2] @ W.T / temperature, y[::2, None]
    l -= l.gather(1, own)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 100.0)
    for _ in range(12):  # how far to go along the target's own row for that probability
        middle = (low + high) / 2
        rest = (middle * l).exp_().scatter_(1, own, 0).sum(1, keepdim=True)
        low, high = torch.where(rest > wanted, middle, low), torch.where(rest > wanted, high, middle)
    h[::2] *= high
    return h.to(DEVICE, dtype), W.to(DEVICE, dtype), y.to(DEVICE)


def reference(h, W, y, temperature=1.0, g=None):
    """Float64 on the same inputs: logp, entropy, dh, dW."""
    h, W = h.detach().double().requires_grad_(), W.detach().double().requires_grad_()
    log_p = torch.log_softmax(h @ W.T / temperature, 1)
    logp = log_p.gather(1, y[:, None])[:, 0]
    logp.backward(torch.ones_like(logp) if g is None else g.double())
    return logp.detach(), -(log_p.exp() * log_p).sum(1).detach(), h.grad, W.grad


def gradient(h, W, y, g=None, **settings):
    h, W = h.detach().requires_grad_(), W.detach().requires_grad_(W.requires_grad)
    logp, entropy = linear_logprob(h, W, y, return_entropy=True, **settings)
    logp.backward(torch.ones_like(logp) if g is None else g)
    return logp.detach(), entropy, h.grad, W.grad


def frobenius(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def worst_row(found, expected):
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


# -- 1. errors against float64 -----------------------------------------------------------------------------------------

SIZES, TEMPERATURES = [(1, 32, 1000), (7, 48, 1000), (65, 64, 4099)], [0.7, 1.0, 1.3]


@pytest.mark.parametrize(
    "size, temperature, dtype",
    [
        (SIZES[i], TEMPERATURES[j], FLOATS[k])
        for i in range(3)
        for j in range(3)
        for k in range(3)
        if not INTERPRETED or (i + j + k) % 3 == 0
    ],
)  # the interpreter is slow: each pair once
def test_errors(size, temperature, dtype):
    N, D, V = size
    h, W, y = case(N, D, V, dtype, temperature)
    g = torch.linspace(-2, 3, N, device=DEVICE) * 2**10  # a loss scale: gradients of 1e-6 are not for fp16
    expected, expected_entropy, dh, dW = reference(h, W, y, temperature, g)
    assert expected[0].exp() > 0.999  # the planted rows are there
    for trainable in False, True:
        W.requires_grad_(trainable)
        logp, entropy, found_h, found_W = gradient(h, W, y, g, temperature=temperature, chunk=16)
        error = (logp - expected).abs()
        assert error.max() <= 5e-4 and error.mean() <= 5e-5 and logp.dtype == torch.float32
        assert (entropy - expected_entropy).abs().max() <= 1e-3
        assert frobenius(found_h, dh) <= GRADIENT_BOUND[dtype][0] and worst_row(found_h, dh) <= GRADIENT_BOUND[dtype][1]
        assert found_W is None if not trainable else frobenius(found_W, dW) <= GRADIENT_BOUND[dtype][0]


@pytest.mark.parametrize("N, D, V, dtype", [(33, 128, 151936, torch.float32), (8, 32, 152064, torch.bfloat16)])
def test_errors_over_the_vocabularies_of_qwen(N, D, V, dtype):
    """151936 and 152064 are not multiples of 1024: the last block is partial."""
    h, W, y = case(N, D, V, dtype)
    expected, expected_entropy, dh, _ = reference(h, W, y)
    logp, entropy, found, _ = gradient(h, W, y)
    assert (logp - expected).abs().max() <= 5e-4 and (logp - expected).abs().mean() <= 5e-5
    assert (entropy - expected_entropy).abs().max() <= 1e-3
    assert frobenius(found, dh) <= GRADIENT_BOUND[dtype][0] and worst_row(found, dh) <= GRADIENT_BOUND[dtype][1]


# -- 2. the traps ------------------------------------------------------------------------------------------------------


def test_trap_bf16_logits():
    """Logits rounded to bf16 are off by up to 0.06 near 28; ours are off by fifty times less."""
    h, W, y = case(32, 64, 4099, torch.bfloat16)
    h = (h / (h.float() @ W.float().T).max() * 28).bfloat16()
    expected, *_ = reference(h, W, y)
    rounded = (h.float() @ W.float().T).bfloat16().float().log_softmax(1).gather(1, y[:, None])[:, 0]
    error = (linear_logprob(h, W, y)[0] - expected).abs().max()
    assert error <= (rounded - expected).abs().max() / 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_p_rounded_before_subtracting_from_1(dtype):
    """A confident row has 1 - p = 1e-5: p in half precision is 1, and the gradient would miss the target's part."""
    h, W, y = case(33, 64, 1000, dtype)
    h, y = h[::2], y[::2]
    g = torch.full_like(y, 2**10, dtype=torch.float32)
    _, _, dh, dW = reference(h, W, y, g=g)
    _, _, found_h, found_W = gradient(h, W.requires_grad_(), y, g)
    assert worst_row(found_h, dh) <= 1e-2 and frobenius(found_W, dW) <= 4e-3
    assert worst_row(gradient(h, W.detach(), y, g)[2], dh) <= 1e-2


def test_trap_a_sure_row_keeps_its_tiny_gradient_in_fp32():
    """1 - p_y as a difference in fp32 has lost half of its digits at 1e-4; the sum without the target keeps them."""
    h, W, y = case(33, 64, 1000)
    _, _, dh, _ = reference(h[::2], W, y[::2])
    assert worst_row(gradient(h[::2], W, y[::2])[2], dh) <= 2e-5


@pytest.mark.parametrize("V", [1000, 1023, 1025])
def test_trap_phantom_columns(V):
    """The block's columns beyond V count as logit 0 somewhere: with all logits at -100 they take all probability."""
    logits = torch.full((4, V), -100.0, device=DEVICE)
    logp, entropy, scale, direction = sweep(logits, torch.arange(4, device=DEVICE))
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(V)))
    torch.testing.assert_close(entropy, torch.full_like(logp, math.log(V)))
    torch.testing.assert_close(direction.sum(1), torch.zeros_like(logp), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [-1e4, -300.0, 300.0])
def test_trap_maximum_started_at_0(shift):
    """A constant added to every logit changes nothing, also when every logit is very negative."""
    torch.manual_seed(1)
    logits, y = 3 * torch.randn(16, 1000, device=DEVICE), torch.arange(16, device=DEVICE)
    logits = (logits + shift) - shift  # what survives fp32 at that height
    for found, expected in zip(sweep(logits + shift, y), sweep(logits, y)):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_trap_minus_inf_logits():
    """Forbidden tokens (logit -inf) have p = 0 and add nothing to the entropy, also a whole block of them at first."""
    torch.manual_seed(2)
    logits, y = torch.randn(16, 1000, device=DEVICE), torch.full((16,), 990, device=DEVICE)
    logits[:, :900] = -torch.inf
    logp, entropy, scale, direction = sweep(logits, y)
    torch.testing.assert_close(sweep(logits[:, 900:].contiguous(), y - 900)[:3], (logp, entropy, scale))
    assert (direction[:, :900] == 0).all()
    logp, entropy, _, _ = sweep(logits, torch.zeros_like(y))
    assert (logp == -torch.inf).all() and entropy.isfinite().all()


def test_trap_uninitialised_memory():
    """Outputs and workspace poisoned with NaN: ignored rows are exactly 0 in everything, others untouched by them."""
    h, W, y = case(21, 48, 1000)
    y[::3] = -100
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills every new empty tensor with NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        logp, entropy, dh, dW = gradient(h, W.requires_grad_(), y)
        frozen = gradient(h, W.detach(), y)[2]
        nothing = gradient(h, W.detach(), torch.full_like(y, -100))
    finally:
        torch.use_deterministic_algorithms(False)
    for t in logp, entropy, dh, frozen, *nothing[:3]:
        assert t.isfinite().all() and (t[::3] == 0).all()
    assert dW.isfinite().all() and not any(t.any() for t in nothing[:3])  # everything masked
    kept = y != -100
    torch.testing.assert_close(logp[kept], linear_logprob(h[kept], W, y[kept])[0], atol=0, rtol=0)


@pytest.mark.parametrize("wrong", [-1, 1000, -100, 2**40])
def test_trap_targets_out_of_bounds(wrong, monkeypatch):
    """Such a target is named where that costs nothing, and is NaN on a GPU, in its own row only."""
    h, W, y = case(5, 16, 1000)
    expected = linear_logprob(h, W, y)[0]
    y[2] = wrong
    monkeypatch.setenv("TRIMPI_DEBUG", "1")
    with pytest.raises(IndexError, match=rf"found target {wrong} at row 2; expected 0 to 999, or -7"):
        linear_logprob(h, W, y, ignore_index=-7)
    if TRITON:
        monkeypatch.setattr(logprob, "check", lambda *_: None)
        logp, entropy, dh, _ = gradient(h, W, y, ignore_index=-7)
        assert logp[2].isnan() and entropy[2].isnan() and dh[2].isnan().all()
        others = torch.tensor([0, 1, 3, 4], device=DEVICE)
        assert torch.equal(logp[others], expected[others]) and dh[others].isfinite().all()


def test_trap_entropy_whose_gradient_is_silently_dropped():
    """The entropy is a metric here: asking for its gradient is an error, not a silent zero."""
    h, W, y = case(5, 16, 100)
    _, entropy = linear_logprob(h.requires_grad_(), W, y, return_entropy=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        entropy.sum().backward()
    assert linear_logprob(h, W, y)[1] is None


@arithmetic_aside
def test_trap_uniform_random_logits_flatter():
    """The benchmark plants peaked logits: kernels that skip tiny gradients skip nearly all of a flat softmax."""
    from benchmarks.logprob import planted

    h, W, y = planted(64, 32, 5000, torch.float32, "cpu")
    p = (h @ W.T).softmax(1).gather(1, y[:, None])
    assert 0.4 < (p > 0.9).float().mean() < 0.6 and (p < 0.5).float().mean() > 0.3


def test_trap_bf16_in_the_interpreter():
    """Interpreted bf16 arithmetic and tl.dot are wrong: the kernel computes in fp32, and only its last store rounds."""
    source = open(os.path.join(os.path.dirname(logprob.__file__), "logprob_triton.py")).read()
    assert "tl.dot" not in source
    torch.manual_seed(3)
    logits, y = 3 * torch.randn(16, 1000, device=DEVICE), torch.arange(16, device=DEVICE)
    exact, half = sweep(logits, y), sweep(logits, y, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(exact[:3], half[:3]))
    torch.testing.assert_close(half[3].float(), exact[3], atol=1e-30, rtol=2**-7)  # one step: the interpreter truncates


def sweep(logits, y, dtype=torch.float32):
    """What is done to given logits (C, V), left as they are: logp, entropy, scale, direction."""
    two_blocks(logits.shape[1])
    if TRITON:
        from kernels.logprob_triton import sweep_rows

        logp, entropy, scale, _, _, direction = sweep_rows(logits.clone(), y, 1.0, dtype, True, True)
    else:
        from kernels.logprob_torch import fold

        one = torch.eye(logits.shape[1])  # as the head's weight: the gradient is the direction itself
        tiles = [(v, logits[:, v : v + 300].clone(), one[v : v + 300]) for v in range(0, len(one), 300)]
        logp, entropy, scale, _, _, direction = fold(tiles, y, 1.0, True, len(one))
    return logp, entropy, scale, direction


def hard(name, logits, y):
    """Logits (6, 1711) that some form of the softmax has trouble with."""
    v = torch.arange(1711, device=DEVICE)
    if name == "confident":
        return logits + torch.tensor([15.0, 20, 25, 30, 40, 50], device=DEVICE)[:, None] * (v == y[:, None])
    if name == "a third forbidden":
        return logits.masked_fill((v % 3 == 0) & (v != y[:, None]), -torch.inf)
    height = {
        "very negative": -150,
        "very positive": 200,
        "rising": v / 30,
        "40 nats above the first block": 40 * (v > 1100),
    }
    return logits + height.get(name, 0)


HARD = (
    "plain",
    "confident",
    "a third forbidden",
    "very negative",
    "very positive",
    "rising",
    "40 nats above the first block",
)


@pytest.mark.skipif(not TRITON, reason="about the kernels")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", HARD)
def test_one_sweep_and_two_against_float64(name, temperature):
    """The single sweep's maximum is fixed beforehand: 2^(l - m) may be as large as 2^100 and nothing is lost."""
    from kernels.logprob_triton import reached, sweep_rows, sweep_rows_once

    two_blocks(1711)
    torch.manual_seed(4)
    logits, y = 3 * torch.randn(6, 1711, device=DEVICE), torch.arange(6, device=DEVICE) * 150
    logits = hard(name, logits, y)
    log_p = (logits.double() / temperature).log_softmax(1)
    p, expected = log_p.exp(), log_p.gather(1, y[:, None])[:, 0]
    q = p.scatter(1, y[:, None], 0)
    rest = q.sum(1, keepdim=True)  # 1 - p_y
    right = expected, -(p * log_p.nan_to_num(neginf=0)).sum(1), rest[:, 0] / temperature, q / rest
    two = sweep_rows(logits.clone(), y, temperature, torch.float32, True, True)
    one = sweep_rows_once(logits.clone(), y, temperature, torch.float32, True)
    assert reached(one[4]).all()
    for logp, entropy, scale, q in (
        (*two[:3], -two[5].scatter(1, y[:, None], 0)),
        (*one[:3], one[5] / one[4][:, None]),
    ):
        torch.testing.assert_close(logp.double(), right[0], atol=2e-5, rtol=2e-6)
        torch.testing.assert_close(entropy.double(), right[1], atol=2e-5, rtol=2e-6)
        torch.testing.assert_close(scale.double(), right[2], atol=1e-37, rtol=1e-5)
        assert frobenius(q.double(), right[3]) <= 2e-6


@pytest.mark.skipif(not TRITON, reason="about the kernels")
@pytest.mark.parametrize("height", [75.0, 200.0])
def test_a_row_that_a_single_sweep_misses_is_made_again(height):
    """Target and first block lie 108 and 289 bits below the maximum: s is too large for the product with W, or inf."""
    from kernels.logprob_triton import reached, sweep_rows_once

    h, W, y = case(8, 16, 1000)
    y[:4], h[:4] = 3, 0.0
    h[:, 0], h[:4, 0], W[:, 0], W[600, 0] = 0.0, 1.0, 0.0, height
    once = sweep_rows_once(h @ W.T, y, 1.0, torch.float32, True)
    assert reached(once[4]).tolist() == 4 * [False] + 4 * [True]
    expected, expected_entropy, dh, _ = reference(h, W, y)
    logp, entropy, found, _ = gradient(h, W, y)
    assert (logp - expected).abs().max() <= 5e-4 and (entropy - expected_entropy).abs().max() <= 1e-3
    assert worst_row(found[:4], dh[:4]) <= 1e-5


# -- 3. what must not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_and_row_order_and_run_do_not_matter(dtype):
    """Bit-equal on a CPU for any chunk, any order of the rows, with neighbours or alone."""
    N = 20 if INTERPRETED else 70
    h, W, y = case(N, 48, 1000, dtype)
    # cuBLAS takes other kernels for other numbers of rows: fp32 sums in another order, then bf16 steps in the gradient
    exactly = dict(atol=0, rtol=0) if DEVICE == "cpu" else dict(atol=2e-5, rtol=2**-7)
    logp, entropy, dh, _ = gradient(h, W, y)
    order = torch.randperm(N, device=DEVICE)
    for chunk in (1, 33) if INTERPRETED else (1, 16, 33, 70, 1000):
        torch.testing.assert_close(gradient(h, W, y, chunk=chunk)[:3], (logp, entropy, dh), **exactly)
    shuffled = gradient(h[order], W, y[order], chunk=32)[:3]
    torch.testing.assert_close(shuffled, (logp[order], entropy[order], dh[order]), **exactly)
    torch.testing.assert_close(linear_logprob(h[5:6], W, y[5:6])[0], logp[5:6], **exactly)
    W.requires_grad_()
    assert all(torch.equal(a, b) for a, b in zip(gradient(h, W, y, chunk=32), gradient(h, W, y, chunk=32)))


def test_layout_does_not_matter():
    h, W, y = case(16, 32, 1000)
    wide = [torch.stack([t, t], 2).flatten(1)[:, ::2] for t in (h, W)] + [torch.stack([y, y], 1)[:, 0]]
    assert not any(t.is_contiguous() for t in wide)
    for found, expected in zip(gradient(*wide)[:3], gradient(h, W, y)[:3]):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_backward_twice_gives_twice_the_gradient():
    """Nothing saved is overwritten on the way back."""
    h, W, y = case(16, 32, 1000)
    for trainable in False, True:
        h.requires_grad_().grad = None
        W.requires_grad_(trainable)
        logp = linear_logprob(h, W, y)[0]
        logp.sum().backward(retain_graph=True)
        once = h.grad.clone()
        logp.sum().backward()
        assert torch.equal(h.grad, 2 * once)


@pytest.mark.parametrize("trainable", [False, True])
def test_rows_without_gradient_are_skipped(trainable):
    """needs_grad=False: the same log-prob and exactly no gradient, whatever comes from above; others are unchanged."""
    h, W, y = case(16, 32, 1000)
    W.requires_grad_(trainable)
    wanted = torch.arange(16, device=DEVICE) % 3 == 0
    g = torch.where(wanted, 1.5, 0.0)
    expected = gradient(h, W, y, g)
    for above in g, torch.where(wanted, 1.5, math.nan):
        for found, right in zip(gradient(h, W, y, above, needs_grad=wanted), expected):
            assert right is None or torch.equal(found[0:1], right[0:1]) and torch.isfinite(found).all()
            assert right is None or torch.allclose(found, right, atol=1e-6)
    assert not gradient(h, W, y, g, needs_grad=torch.zeros_like(wanted))[2].any()


@pytest.mark.parametrize("trainable, expected", [(False, 3), (True, 6)])
def test_logits_are_made_once_and_for_a_trainable_head_twice(trainable, expected, monkeypatch):
    """Of 48 rows, 16 at a time: every pass over a chunk's logits costs a product with all of W."""
    name = "logits_of" if TRITON else "tiles"
    rows, made = logprob.rows_of(torch.zeros(1, device=DEVICE)), []
    make = getattr(rows, name)
    monkeypatch.setattr(rows, name, lambda *arguments: made.append(name) or make(*arguments))
    h, W, y = case(48, 32, 1000)
    whole = gradient(h, W.requires_grad_(trainable), y, chunk=16)
    assert len(made) == expected
    single = gradient(h, W, y, chunk=48)
    assert len(made) == expected * 4 // 3
    torch.testing.assert_close(whole[2], single[2])
    assert not trainable or frobenius(whole[3], single[3]) < 1e-6


@pytest.mark.skipif(TRITON, reason="the kernel's blocks are two in every test")
@pytest.mark.parametrize("tile", [16, 300, 999])
def test_tiles_do_not_matter(tile, monkeypatch):
    """The online softmax gives the same with a target in any tile and a maximum that rises in each of many."""
    from kernels import logprob_torch

    h, W, y = case(33, 48, 1000)
    y[1::2] = torch.linspace(0, 999, 16).long()
    W.requires_grad_()
    whole = gradient(h, W, y, temperature=0.7)
    monkeypatch.setattr(logprob_torch, "TILE", tile)
    for found, expected in zip(gradient(h, W, y, temperature=0.7), whole):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


def test_no_rows():
    h, W, y = case(4, 16, 100)
    logp, entropy, dh, dW = gradient(h[:0], W.requires_grad_(), y[:0])
    assert logp.shape == entropy.shape == (0,) and dh.shape == (0, 16) and not dW.any()


@arithmetic_aside
def test_never_holds_the_logits():
    """No tensor in forward or backward is larger than the head's weight or one chunk of logits."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    h, W, y = case(160, 8, 1000)
    for trainable in False, True:
        with Watch():
            gradient(h, W.requires_grad_(trainable), y, chunk=32)
        assert largest <= 32 * 1000


# -- 4. company --------------------------------------------------------------------------------------------------------


def test_autocast_casts_the_inputs_and_keeps_fp32_logits():
    h, W, y = case(16, 32, 1000)
    expected = gradient(h.bfloat16(), W.bfloat16().requires_grad_(), y)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradient(h, W.requires_grad_(), y)
    assert torch.equal(found[0], expected[0]) and found[2].dtype == found[3].dtype == torch.float32
    assert torch.equal(found[2], expected[2].float()) and torch.equal(found[3], expected[3].float())


@arithmetic_aside
def test_gradient_checkpointing_around_it():
    h, W, y = case(16, 32, 1000)
    W.requires_grad_()
    expected = gradient(h, W, y)
    h, W = h.detach().requires_grad_(), W.detach().requires_grad_()
    logp = checkpoint(lambda h: linear_logprob(h.sin().asin(), W, y)[0], h * 0 + h, use_reentrant=False)
    plain = linear_logprob(h.sin().asin(), W, y)[0]
    found, right = (torch.autograd.grad(t.sum(), (h, W)) for t in (logp, plain))
    assert torch.equal(logp, plain) and all(torch.equal(a, b) for a, b in zip(found, right)) and len(expected) == 4


@arithmetic_aside
def test_compile_around_it():
    h, W, y = case(16, 32, 1000)

    def loss(h, W):
        logp, entropy = linear_logprob(torch.tanh(h), W, y, return_entropy=True)
        return (logp * 0.5).sum(), entropy.mean()

    h, W = h.requires_grad_(), W.requires_grad_()
    found, expected = torch.compile(loss, backend="aot_eager")(h, W), loss(h, W)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found[0], (h, W)), torch.autograd.grad(expected[0], (h, W)))


@arithmetic_aside
def test_weight_sharded_by_fsdp2(tmp_path):
    """Two ranks hold half of W each, and half of the tokens: their shards' gradients are those of the whole batch."""
    script = tmp_path / "ranks.py"
    script.write_text(FSDP)
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(tmp_path / "meet")], env=clean_environment())
        for rank in range(2)
    ]
    assert [p.wait(120) for p in processes] == [0, 0]


FSDP = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from kernels.logprob import linear_logprob
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
h, W, y = torch.randn(20, 16), torch.randn(101, 16), torch.randint(101, (20,))
head = torch.nn.Linear(16, 101, bias=False)
head.weight.data.copy_(W)
fully_shard(head, mesh=mesh)
W.requires_grad_()
whole = linear_logprob(h, W, y)[0]
whole.sum().backward()
mine = slice(rank * 10, rank * 10 + 10)
x = h[mine].clone().requires_grad_()
logp = linear_logprob(x, head.weight, y[mine])[0]
logp.sum().backward()
assert torch.equal(logp, whole[mine]), (logp, whole[mine])
torch.testing.assert_close(head.weight.grad.full_tensor(), W.grad)
assert x.grad.abs().sum() > 0
dist.destroy_process_group()
"""


def clean_environment(**more):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


@arithmetic_aside
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(y=torch.zeros(3, dtype=torch.int64)), r"y \(3,\); expected \(L, D\), \(V, D\), \(L,\)"),
        (dict(W=torch.zeros(9, 4)), r"W \(9, 4\)"),
        (dict(h=torch.zeros(2, 2, 8)), r"h \(2, 2, 8\)"),
        (dict(h=torch.zeros(2, 8, dtype=torch.bfloat16)), r"h torch.bfloat16, W torch.float32"),
        (dict(y=torch.zeros(2)), r"y torch.float32"),
        (dict(needs_grad=torch.zeros(2)), r"needs_grad torch.float32"),
        (dict(temperature=0), r"temperature 0"),
        (dict(chunk=0), r"chunk 0"),
    ],
)
def test_says_what_it_found_and_expected(change, message):
    arguments = {"h": torch.zeros(2, 8), "W": torch.zeros(9, 8), "y": torch.zeros(2, dtype=torch.int64), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        linear_logprob(**arguments)


# -- 5. the Triton kernel without a GPU --------------------------------------------------------------------------------


@pytest.mark.skipif(TRITON, reason="interpreted where no compiled kernel was tested")
def test_this_file_again_with_the_kernel_interpreted():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean_environment(TRITON_INTERPRET="1"),
    )
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.skipif(TRITON, reason="interpreted where no compiled kernel was tested")
def test_wrong_versions_of_the_kernel_are_noticed():
    """Seven that cost little; `python tests/wrong_kernels.py` has them all and writes the table."""
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "wrong_kernels.py"), "--fast"]
    run = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean_environment())
    assert run.returncode == 0 and run.stdout.count("| test_trap") >= 7, run.stdout[-3000:]


@pytest.mark.skipif(INTERPRETED, reason="interpreted code is not compiled")
def test_kernel_compiles_for_hopper_with_wide_loads():
    """No GPU is needed to compile for one: types hold, and a vocabulary that 16 divides is read 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from kernels.logprob_triton import DEFAULT
    from kernels.logprob_triton import sweep as kernel

    types = dict(
        logits="*fp32",
        direction="*bf16",
        targets="*i64",
        logp="*fp32",
        entropy="*fp32",
        scale="*fp32",
        peak="*fp32",
        others="*fp32",
        V="i32",
        stride="i32",
        inverse_temperature="fp32",
        BLOCK="constexpr",
        LOSS="constexpr",
        ENTROPY="constexpr",
        GRADIENT="constexpr",
    )
    source = triton.compiler.ASTSource(
        kernel,
        types,
        dict(BLOCK=DEFAULT[0], LOSS=True, ENTROPY=True, GRADIENT=True),
        {(i,): [["tt.divisibility", 16]] for i in range(10)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=DEFAULT[1]))
    assert "ld.global.v4" in compiled.asm["ptx"] and compiled.metadata.shared <= 1024
