"""The rows of linear_logprob on a GPU: a Triton program reads a row of logits and leaves its gradient in their place.

Axes: n rows of a chunk, D width, V vocabulary. Distances between logits are measured in bits, as 2^x is one
instruction: with a maximum m, x_v = (l_v - m) log2(e) / T and the sums

    s = sum_{v != y} 2^{x_v}            t = sum_{v != y} 2^{x_v} x_v

the target is added last (z = s + 2^{x_y}), so that nothing cancels:

    logp = (x_y - log2 z) ln 2      entropy = (log2 z - (t + 2^{x_y} x_y) / z) ln 2      1 - p_y = s / z

`sweep` reads the row once for the sums and once more for the direction 1[y] - q, q_v = 2^{x_v} / s. When a block raises
the maximum by g bits, each term so far is too large by 2^g; hence online softmax:

    s' = 2^{-g} s + 2^{x_v}      t' = 2^{-g} (t - g s) + 2^{x_v} x_v

Every lane keeps an m, s and t of its own, and they meet at the end: no reduction over the program, and so no barrier,
stands in the loop, and the chains of fp32 additions are short.

`sweep_once` reads the row a single time. It fixes m beforehand, as the larger of the target's logit and the maximum of
the first block, and writes e_v = 2^{x_v} at once, 0 for the target; what that lacks of a direction is done to the
product, G = W_y - (e W) / s. bf16 has the exponents of fp32, so m may miss the row's maximum by REACH bits; of a row
in which it misses by more, s tells, and kernels/logprob.py has `sweep` make it again. fp16 has no such exponents and
always takes `sweep`.

Either result is written in the dtype of W over the row's own first half: a block of 2-byte entries lands on logits that
have been read already, which the barrier between load and store makes true of every warp of the program. For a
trainable head the forward pass keeps m and s, and the backward pass is the second half of `sweep`.

Counting, for one token of D = 3584, V = 152064 in bf16 on an H200 (790 TFLOP/s, 4.3 TB/s): two products of 2 D V = 1.09
GFLOP, 2.76 us; `sweep` moves 4V + 4V + 2V bytes, 0.35 us, `sweep_once` 4V + 2V, 0.21 us. The products' own 4V written
and 2V read, and W twice a chunk, overlap with their arithmetic. So the bounds are 1.13 and 1.08 times the two bare
products; nothing here was timed. Registers and programs a multiprocessor: benchmarks/results/registers.md.
"""

import torch
import triton
import triton.language as tl

# (block, warps) by device name, measured by benchmarks/gpu.py, which prints the line for a device that is not here
BLOCKS = {"cpu": (32768, 1)}  # the interpreter pays by the operation, not by the element
DEFAULT = (1024, 4)
REACH = 100  # bits: 2^100 entries of W and 2^100 bits of entropy are below fp32's 2^128
BITS = tl.constexpr(1.4426950408889634)  # log2 e


def forward_rows(h, W, y, temperature, with_entropy, gradient, exact=False):
    """h (n, D), W (V, D), y (n,) -> logp, entropy, scale, m, s, each (n,) fp32, and G (n, D) fp32 or None.

    Rows whose s is not `reached` are wrong, unless `exact` asks for two sweeps.
    """
    logits = logits_of(h, W)
    if not gradient or exact or half(h) == torch.float16:
        *each, direction = sweep_rows(logits, y, temperature, half(h), with_entropy, gradient)
        return *each, times_head(direction, W) if gradient else None
    *each, s, powers = sweep_rows_once(logits, y, temperature, half(h), with_entropy)
    W_y = W[y.clamp(0, len(W) - 1)]  # (n, D); a target out of bounds has scale NaN
    return *each, s, W_y - times_head(powers, W) / s[:, None].clamp_min(torch.finfo(torch.float32).tiny)


def reached(s):
    """Whether each row of a single sweep is right: s (n,) -> bool (n,); False also where s is inf or NaN."""
    return s < 2.0**REACH


def backward_rows(h, W, y, m, s, temperature, h_g, dW, with_h):
    """dW (V, D) fp32 += d^T h_g with d = 1[y] - q (n, V) from logits made again; returns d W (n, D) fp32 if with_h."""
    direction = sweep_rows(logits_of(h, W), y, temperature, half(h), False, True, (m, s))[-1]
    if direction.is_cuda and direction.dtype != torch.float32:
        torch.addmm(dW, direction.T, h_g.to(direction.dtype), out_dtype=torch.float32, out=dW)
    else:
        dW.addmm_(direction.float().T, h_g)
    return times_head(direction, W) if with_h else None


def half(h):
    """The direction's dtype: that of the product with W. Interpreted, a store truncates to bf16, and fp32 it is."""
    return h.dtype if h.is_cuda else torch.float32


def logits_of(h, W):
    """h W^T (n, V) fp32; fp32 sums over D in two halves (kernels/logprob_torch.py says why)."""
    if h.is_cuda and h.dtype != torch.float32:
        return torch.mm(h, W.T, out_dtype=torch.float32)
    middle = -(-h.shape[1] // 2)
    logits = torch.mm(h[:, :middle].float(), W[:, :middle].T.float())
    return logits.addmm_(h[:, middle:].float(), W[:, middle:].T.float())


def times_head(direction, W):
    """direction (n, V) W -> (n, D) fp32."""
    if direction.is_cuda and direction.dtype != torch.float32:
        return torch.mm(direction, W, out_dtype=torch.float32)
    return torch.mm(direction.float(), W.float())


def sweep_rows(logits, y, temperature, dtype, with_entropy, gradient, sums=None):
    """logits (n, V) fp32, overwritten if gradient; y (n,) -> logp, entropy, scale, m, s (n,) fp32, direction (n, V).

    With sums, the m and s that an earlier call gave, the first sweep is left out and only the direction is right.
    """
    outputs = [torch.empty_like(y, dtype=torch.float32) for _ in range(3 if sums else 5)] + list(sums or ())
    how = dict(LOSS=sums is None, ENTROPY=with_entropy, GRADIENT=gradient)
    return *outputs, launch(sweep, logits, y, outputs, temperature, dtype, how)


def sweep_rows_once(logits, y, temperature, dtype, with_entropy):
    """logits (n, V) fp32, overwritten; y (n,) -> logp, entropy, scale, m, s (n,) fp32, e (n, V)."""
    outputs = [torch.empty_like(y, dtype=torch.float32) for _ in range(5)]
    return *outputs, launch(sweep_once, logits, y, outputs, temperature, dtype, dict(ENTROPY=with_entropy))


def launch(kernel, logits, y, outputs, temperature, dtype, how):
    """One program per row of logits (n, V); returns their memory seen as `dtype`, (n, V)."""
    n, V = logits.shape
    direction = logits.view(dtype)  # (n, V) or (n, 2V)
    block, warps = BLOCKS.get(torch.cuda.get_device_name(y.device) if y.is_cuda else "cpu", DEFAULT)
    how |= dict(BLOCK=min(block, triton.next_power_of_2(V)), num_warps=warps)
    kernel[(n,)](logits, direction, y, *outputs, V, direction.stride(0), 1 / temperature, **how)
    return direction[:, :V]


@triton.jit
def sweep(
    logits,
    direction,
    targets,
    logp,
    entropy,
    scale,
    peak,
    others,
    V,
    stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
    LOSS: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows x V passes 2^31
    logits += row * V
    direction += row * stride
    lanes = tl.arange(0, BLOCK)
    bits = inverse_temperature * BITS
    y, l_y = target_of(logits, targets + row, V)

    # -- sweep 1: maximum and sums, a lane each ----------------------------------------------------------------------
    if LOSS:
        m = tl.full((BLOCK,), -1.0e30, tl.float32)  # finite: a lane of -inf logits has e^(-inf - m) = 0
        s = tl.zeros((BLOCK,), tl.float32)
        t = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + lanes
            l = tl.load(logits + v, mask=v < V, other=float("-inf"))
            above = tl.maximum(m, l)
            x = (l - above) * bits
            e = tl.where(v == y, 0.0, tl.exp2(x))
            gap = (m - above) * bits
            shrink = tl.exp2(gap)
            if ENTROPY:
                t = shrink * (t + gap * s) + e * tl.where(e > 0, x, 0.0)  # 0 * -inf is 0 here
            s = shrink * s + e
            m = above
        top = tl.max(m, 0)
        gap = (m - top) * bits
        if ENTROPY:
            t = tl.exp2(gap) * (t + gap * s)
        s = tl.exp2(gap) * s
        rest = store_sums(
            row, logp, entropy, scale, peak, others, (l_y - top) * bits, top, s, t, inverse_temperature, ENTROPY
        )
    else:
        top = tl.load(peak + row)
        rest = tl.load(others + row)

    # -- sweep 2: the row becomes its direction ----------------------------------------------------------------------
    if GRADIENT:
        per_rest = 1 / tl.maximum(rest, 1.2e-38)  # p_y = 1: every other entry and the scale are 0
        for start in range(0, V, BLOCK):
            v = start + lanes
            l = tl.load(logits + v, mask=v < V, other=float("-inf"))
            d = tl.where(v == y, 1.0, -tl.exp2((l - top) * bits) * per_rest)
            tl.debug_barrier()  # all warps have read this block: its first half is about to be overwritten
            tl.store(direction + v, d.to(direction.dtype.element_ty), mask=v < V)


@triton.jit
def sweep_once(
    logits,
    direction,
    targets,
    logp,
    entropy,
    scale,
    peak,
    others,
    V,
    stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    direction += row * stride
    lanes = tl.arange(0, BLOCK)
    bits = inverse_temperature * BITS
    y, l_y = target_of(logits, targets + row, V)

    first = tl.max(tl.load(logits + lanes, mask=lanes < V, other=float("-inf")), 0)
    m = tl.maximum(tl.maximum(first, tl.where(y >= 0, l_y, first)), -1.0e30)
    s = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + lanes
        x = (tl.load(logits + v, mask=v < V, other=float("-inf")) - m) * bits
        e = tl.where(v == y, 0.0, tl.exp2(x))
        s += e
        if ENTROPY:
            t += e * tl.where(e > 0, x, 0.0)
        tl.debug_barrier()  # as in `sweep`
        tl.store(direction + v, e.to(direction.dtype.element_ty), mask=v < V)
    store_sums(row, logp, entropy, scale, peak, others, (l_y - m) * bits, m, s, t, inverse_temperature, ENTROPY)


@triton.jit
def target_of(logits, target, V):
    """A row's target, in 32 bits to be compared in one instruction, and its logit; -1 and NaN where out of bounds."""
    y = tl.load(target)
    inside = (y >= 0) & (y < V)
    y = tl.where(inside, y, -1).to(tl.int32)
    return y, tl.load(logits + y, mask=inside, other=float("nan"))  # never read outside the row


@triton.jit
def store_sums(row, logp, entropy, scale, peak, others, x_y, m, s, t, inverse_temperature, ENTROPY: tl.constexpr):
    """What the sums of one row, by lane, amount to with the target added last; returns s of the row."""
    rest = tl.sum(s, 0)
    e_y = tl.exp2(x_y)
    total = rest + e_y
    bits = tl.log2(total)
    tl.store(logp + row, (x_y - bits) / BITS)
    tl.store(scale + row, rest / total * inverse_temperature)
    tl.store(peak + row, m)
    tl.store(others + row, rest)
    if ENTROPY:
        surprise = tl.sum(t, 0) + e_y * tl.where(e_y == 0, 0.0, x_y)
        tl.store(entropy + row, (bits - surprise / total) / BITS)
    return rest
