"""The rows of linear_logprob on a GPU: a Triton program reads a row of logits twice and leaves its gradient.

Axes: C rows of the chunk, V vocabulary. Sweep 1 keeps, over blocks of the row, the running maximum m and the sums

    s = sum_{v != y} e^{l_v - m}            t = sum_{v != y} e^{l_v - m} (l_v - m)

When a block raises the maximum from m to m', each term of s so far is too large by e^{m' - m}; hence online softmax:

    s' = e^{m - m'} s + sum_block e^{l_v - m'}      t' = e^{m - m'} (t + (m - m') s) + sum_block e^{l_v - m'} (l_v - m')

s and t are kept as one partial sum a lane and added up once, at the end: one reduction over the program a block (the
maximum) instead of three, and shorter chains of fp32 additions. The target is added last (z = s + e^{l_y - m}), so
that

    logp = l_y - m - log z      entropy = log z - (t + e^{l_y - m} (l_y - m)) / z      1 - p_y = s / z, nothing cancels

Sweep 2 turns the row into the direction 1[y] - q, q_v = e^{l_v - m} / s, in the dtype of W, written over the row's own
first half: a block of 2-byte entries lands on logits that have been read already, which the barrier between load and
store makes true of every warp of the program. The gradient is direction times W times scale = (1 - p_y) / T (see
kernels/logprob.py). For a trainable head the first pass keeps m and s, and the backward pass only sweeps a second time.

Counting, for one token of D = 3584, V = 152064 in bf16 on an H200 (790 TFLOP/s, 4.3 TB/s): two products of 2 D V =
1.09 GFLOP, 2.76 us; sweeps 4V + 4V bytes read and 2V written, 1.52 MB, 0.35 us (less where the second read hits the 50
MB L2). The products' own 4V written and 2V read, and W twice a chunk (2.18 GB, 0.44 us a token with 1152 rows) overlap
with their arithmetic. So the bound is 1.13 times the two bare products. Compiled for sm_90 by Triton 3.9 with entropy
and gradient, a block of 4096 on 16 warps takes 40 registers a thread, spills nothing and loads 16 bytes at a time: 3
programs an SM, 48 of its 64 warps, 48 KB of loads in flight where 4.3 TB/s x 0.7 us / 132 = 23 KB keep the memory
busy. 8 warps would take 102 registers and leave 16 warps an SM. These are counts, not measurements.
"""

import torch
import triton
import triton.language as tl

# (block, warps) by device name, measured by `make gpu`, which prints the line for a device that is not here
BLOCKS = {"cpu": (32768, 1)}  # the interpreter pays by the operation, not by the element
DEFAULT = (4096, 16)


def forward_rows(h, W, y, temperature, with_entropy, gradient):
    """h (C, D), W (V, D), y (C,) -> logp, entropy, scale, m, s, each (C,) fp32, and G (C, D) fp32 or None."""
    *each, direction = sweep_rows(logits_of(h, W), y, temperature, half(h), with_entropy, gradient)
    return *each, times_head(direction, W) if gradient else None


def backward_rows(h, W, y, m, s, temperature, h_g, dW, with_h):
    """dW (V, D) fp32 += d^T h_g with d = 1[y] - q (C, V) from logits made again; returns d W (C, D) fp32 if with_h."""
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
    """h W^T (C, V) fp32; fp32 sums over D in two halves (kernels/logprob_torch.py says why)."""
    if h.is_cuda and h.dtype != torch.float32:
        return torch.mm(h, W.T, out_dtype=torch.float32)
    middle = -(-h.shape[1] // 2)
    logits = torch.mm(h[:, :middle].float(), W[:, :middle].T.float())
    return logits.addmm_(h[:, middle:].float(), W[:, middle:].T.float())


def times_head(direction, W):
    """direction (C, V) W -> (C, D) fp32."""
    if direction.is_cuda and direction.dtype != torch.float32:
        return torch.mm(direction, W, out_dtype=torch.float32)
    return torch.mm(direction.float(), W.float())


def sweep_rows(logits, y, temperature, dtype, with_entropy, gradient, sums=None):
    """logits (C, V) fp32, overwritten if gradient; y (C,) -> logp, entropy, scale, m, s (C,) fp32, direction (C, V).

    With sums, the m and s that an earlier call gave, the first sweep is left out and only the direction is right.
    """
    C, V = logits.shape
    logp, entropy, scale = (torch.empty_like(y, dtype=torch.float32) for _ in range(3))
    m, s = sums or (torch.empty_like(logp), torch.empty_like(logp))
    direction = logits.view(dtype)  # (C, V) or (C, 2V): the same memory
    device = torch.cuda.get_device_name(y.device) if y.is_cuda else "cpu"
    block, warps = BLOCKS.get(device, DEFAULT)
    sweep[(C,)](
        logits,
        direction,
        y,
        logp,
        entropy,
        scale,
        m,
        s,
        V,
        direction.stride(0),
        1 / temperature,
        BLOCK=min(block, triton.next_power_of_2(V)),
        LOSS=sums is None,
        ENTROPY=with_entropy,
        GRADIENT=gradient,
        num_warps=warps,
    )
    return logp, entropy, scale, m, s, direction[:, :V]


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
    y = tl.load(targets + row)

    # -- sweep 1: maximum and sums -----------------------------------------------------------------------------------
    if LOSS:
        inside = (y >= 0) & (y < V)
        l_y = tl.load(logits + y, mask=inside, other=float("nan")) * inverse_temperature  # never read outside the row
        m = tl.full(
            (), -3.0e38, tl.float32
        )  # finite: a block of -inf logits gives e^(-inf - m) = 0, not e^(-inf + inf)
        s = tl.zeros((BLOCK,), tl.float32)
        t = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + lanes
            l = tl.load(logits + v, mask=v < V, other=float("-inf")) * inverse_temperature
            above = tl.maximum(m, tl.max(l, 0))
            e = tl.where(v == y, 0.0, tl.exp(l - above))
            shrink = tl.exp(m - above)
            if ENTROPY:
                t = shrink * (t + (m - above) * s) + e * tl.where(e > 0, l - above, 0.0)  # 0 * -inf is 0 here
            s = shrink * s + e
            m = above
        rest = tl.sum(s, 0)
        e_y = tl.exp(l_y - m)
        total = rest + e_y
        tl.store(logp + row, l_y - m - tl.log(total))
        tl.store(scale + row, rest / total * inverse_temperature)
        tl.store(peak + row, m)
        tl.store(others + row, rest)
        if ENTROPY:
            surprise = tl.sum(t, 0) + e_y * tl.where(e_y == 0, 0.0, l_y - m)
            tl.store(entropy + row, tl.log(total) - surprise / total)
    else:
        m = tl.load(peak + row)
        rest = tl.load(others + row)

    # -- sweep 2: the row becomes its direction ----------------------------------------------------------------------
    if GRADIENT:
        per_rest = 1 / tl.maximum(rest, 1.2e-38)  # p_y = 1: every other entry and the scale are 0
        for start in range(0, V, BLOCK):
            v = start + lanes
            l = tl.load(logits + v, mask=v < V, other=float("-inf")) * inverse_temperature
            d = tl.where(v == y, 1.0, -tl.exp(l - m) * per_rest)
            tl.debug_barrier()  # all warps have read this block: its first half is about to be overwritten
            tl.store(direction + v, d.to(direction.dtype.element_ty), mask=v < V)
