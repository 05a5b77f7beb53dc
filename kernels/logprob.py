"""Per-token log-probabilities straight from hidden states, without ever holding the tokens x vocabulary logits.

Axes: model.py; L rows of h, the learned tokens of a batch, n of one chunk.

With logits l = h W^T / T, p = softmax(l) and target y the three stages need, for every token,

    logp    = l_y - log sum_v e^{l_v}                                -logp is the cross-entropy of VM-CPT and CoT-SFT
    entropy = log sum_v e^{l_v} - sum_v p_v l_v                      a metric of RL

and the gradient, which does not depend on what comes from above except for one number per token:

    d logp / d h = (W_y - sum_v p_v W_v) / T = (1 - p_y) / T * (W_y - sum_{v != y} q_v W_v),     q_v = p_v / (1 - p_y)

So the forward pass makes that vector G while the logits are at hand, and the backward pass is g * G: two matrix
products for a frozen head, where keeping the logits costs L x V memory and making them again costs a third product. A
trainable head does need every token's row of W's gradient, g_t (1[y] - p_v) h_t: backward makes the logits again, with
the softmax's sums kept, four products. When no gradient is wanted there is one.

The right-hand form matters in half precision. The direction (1[y] - q) is rounded before it meets W, and rounding p
next to 1 destroys 1 - p; here the target's entry is exactly 1, the largest of all, and 1 - p_y = sum_{v != y} e^{l_v}
/ sum_v e^{l_v} stays in fp32, summed without the target so that nothing cancels.

What is done to a chunk of rows stands in two files with the same three functions: kernels/logprob_triton.py for a GPU,
whose kernels run interpreted on CPU tensors with TRITON_INTERPRET=1, set before Python starts, and
kernels/logprob_torch.py elsewhere.
"""

import os
from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 16  # chunks are padded to a multiple of this many rows: BLAS takes another path for a few rows
CPU_CHUNK = 2048  # rows at a time on a CPU, which holds a tile of their logits


@torch.compiler.disable  # the number of kept rows is data; a graph break costs nothing here
def linear_logprob(
    h, W, y, *, temperature=1.0, ignore_index=-100, return_entropy=False, chunk=None, needs_grad=None, vocabulary=None
):
    """Log-probability of each target under softmax(h W^T / temperature), and the entropy (formulas above).

    h (L, D) hidden states, W (V, D) the head's weight (or a DTensor of FSDP2, whose gradient is summed over the ranks),
    both bf16, fp16 or fp32; under autocast both are cast to its dtype. y (L,) int64. Logits, sums and results are fp32.
    needs_grad (L,) bool: rows marked False get a zero gradient and cost one product instead of two (masked tokens, or
    an advantage of 0 without a KL term). chunk: rows worked on at a time, rounded up to a multiple of 16.
    vocabulary: how many rows of W are tokens (None: all); those after them pad it and have no probability.
    Returns logp (L,) and entropy (L,) or None, fp32, nats; the entropy carries no gradient. Rows with y == ignore_index
    give 0. Raises IndexError for any other target outside [0, V) on a CPU and under TRIMPI_DEBUG=1; else it gives NaN.
    """
    if hasattr(W, "full_tensor"):  # cast the shard first: half the traffic when the parameters are kept in fp32
        from torch.distributed.tensor import Partial

        W = W.to(h.dtype).full_tensor(grad_placements=[Partial()] * W.device_mesh.ndim)
    W = W[:vocabulary]
    device = h.device.type
    if torch.is_autocast_enabled(device):
        h, W = h.to(torch.get_autocast_dtype(device)), W.to(torch.get_autocast_dtype(device))
    check(h, W, y, temperature, ignore_index, chunk, needs_grad)

    grad = torch.is_grad_enabled() and (h.requires_grad or W.requires_grad)
    chunk = chunk or default_chunk(h, trainable=grad and W.requires_grad)
    kept = y != ignore_index
    graded, ungraded = (kept, None) if needs_grad is None or not grad else (kept & needs_grad, kept & ~needs_grad)
    settings = (float(temperature), -(-chunk // ROWS) * ROWS, return_entropy)
    with torch.autocast(device, enabled=False):  # autocast would round the logits
        if grad:
            logp, entropy = LinearLogprob.apply(h, W, y, graded, ungraded, *settings)
        else:
            logp, entropy, *_ = forward(h, W, y, graded, ungraded, False, *settings)
    return logp, entropy if return_entropy else None


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, y, graded, ungraded, temperature, chunk, with_entropy):
        ctx.frozen, ctx.temperature, ctx.chunk = not ctx.needs_input_grad[1], temperature, chunk
        logp, entropy, G, *sums = forward(h, W, y, graded, ungraded, ctx.frozen, temperature, chunk, with_entropy)
        ctx.save_for_backward(*(sums[0], G) if ctx.frozen else (h, W, y, graded, *sums))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):  # g (L,)
        with torch.autocast(g.device.type, enabled=False):
            if ctx.frozen:
                scale, G = ctx.saved_tensors
                factor = torch.where(scale != 0, g * scale, 0)[:, None]  # skipped rows give exactly 0, even under NaN
                dh, dW = torch.mul(factor, G, out=torch.empty_like(G)), None  # (L, D), fp32 only inside the product
            else:
                settings = ctx.temperature, ctx.chunk, ctx.needs_input_grad[0]
                dh, dW = backward_trainable(g, *ctx.saved_tensors, *settings)
        return dh, dW, None, None, None, None, None, None


def forward(h, W, y, graded, ungraded, with_G, temperature, chunk, with_entropy):
    """logp (L,), entropy (L,), and for the rows that are graded: G (L, D) if wanted, scale, m and s (L,), else zeros.

    The gradient of logp is scale G; the softmax's m and its sum s without the target make q again. graded (L,) bool;
    ungraded (L,) bool or None: rows of which only logp and entropy are wanted. All others stay 0.
    """
    logp, entropy, scale, m, s = (torch.zeros_like(y, dtype=torch.float32) for _ in range(5))
    G = torch.zeros_like(h, memory_format=torch.contiguous_format) if with_G else None
    rows = rows_of(h)

    def fill(mask, results, gradient, **how):
        for r in chunks(mask, chunk):
            *found, G_r = rows.forward_rows(h[r], W, y[r], temperature, with_entropy, gradient, **how)
            for each, values in zip(results, found):
                each[r] = values
            if gradient:
                G[r] = G_r.to(G.dtype)

    if ungraded is not None:
        fill(ungraded, (logp, entropy), False)
    fill(graded, (logp, entropy, scale, m, s), with_G)
    if with_G:  # hardly ever a row: one that a single sweep could not do
        fill(graded & ~rows.reached(s), (logp, entropy, scale, m, s), True, exact=True)
    return logp, entropy, G, scale, m, s


def backward_trainable(g, h, W, y, graded, scale, m, s, temperature, chunk, with_h):
    """dh = sum_v d_v W_v and dW_v = sum_t d_tv h_t (in fp32) with d = g scale (1[y] - q), from logits made again."""
    dh = torch.zeros_like(h, memory_format=torch.contiguous_format) if with_h else None
    dW = torch.zeros_like(W, dtype=torch.float32)
    g = torch.where(graded, g, 0)
    tiny = torch.finfo(torch.float32).tiny
    unit = g.abs().max().clamp_min(tiny) if len(g) else 1.0  # keeps g * h inside fp16's range
    for r in chunks(graded, chunk):
        factor = (g[r] * scale[r])[:, None]  # (n, 1)
        real = torch.ones_like(r, dtype=torch.bool)
        real[1:] = r[1:] != r[:-1]  # padding repeats a row, which must count once
        h_g = factor / unit * real[:, None] * h[r]  # (n, D), fp32
        G = rows_of(h).backward_rows(h[r], W, y[r], m[r], s[r], temperature, h_g, dW, with_h)
        if with_h:
            dh[r] = (factor * G).to(dh.dtype)
    return dh, dW.mul_(unit).to(W.dtype)


def rows_of(h):
    """The file whose forward_rows, reached and backward_rows work on this device."""
    if h.is_cuda and find_spec("triton") or os.environ.get("TRITON_INTERPRET") == "1":
        from kernels import logprob_triton as rows
    else:
        from kernels import logprob_torch as rows
    return rows


# -- rows and chunks ------------------------------------------------------------------------------------------------


def chunks(mask, size):
    """Indices of the rows marked True, `size` at a time (one synchronisation on a GPU).

    The last index is repeated up to a multiple of ROWS: every row then goes through the same BLAS kernel, so that a
    row's result does not depend on its neighbours, bit for bit on a CPU.
    """
    rows = mask.nonzero()[:, 0]
    rows = torch.cat([rows, rows[-1:].expand(-len(rows) % ROWS)])
    return rows.split(size) if len(rows) else ()


def default_chunk(h, trainable=False):
    """Rows of a chunk: on a GPU those that fill whole waves of 128 x 256 tiles.

    A trainable head takes larger ones: each reads and writes all of dW, V x D fp32.
    """
    if not h.is_cuda:
        return CPU_CHUNK
    cores = torch.cuda.get_device_properties(h.device).multi_processor_count
    across = -(-h.shape[1] // 256)

    def filled(rows):  # share of the multiprocessors at work, over all waves
        tiles = rows // 128 * across
        return tiles / (-(-tiles // cores) * cores)

    smallest, largest = (2304, 4608) if trainable else (512, 2304)
    return max(range(smallest, largest + 1, 128), key=filled)


def check(h, W, y, temperature, ignore_index, chunk, needs_grad):
    if h.ndim != 2 or W.ndim != 2 or h.shape[1] != W.shape[1] or y.shape != h.shape[:1]:
        found = f"h {tuple(h.shape)}, W {tuple(W.shape)}, y {tuple(y.shape)}"
        raise ValueError(f"found {found}; expected (L, D), (V, D), (L,)")
    if h.dtype != W.dtype or h.dtype not in DTYPES or y.dtype != torch.int64:
        found = f"h {h.dtype}, W {W.dtype}, y {y.dtype}"
        raise TypeError(f"found {found}; expected h and W alike in bf16, fp16 or fp32, y int64")
    if needs_grad is not None and (needs_grad.dtype != torch.bool or needs_grad.shape != y.shape):
        found = f"needs_grad {needs_grad.dtype} {tuple(needs_grad.shape)}"
        raise TypeError(f"found {found}; expected bool {tuple(y.shape)}")
    if not temperature > 0 or (chunk is not None and chunk < 1):
        raise ValueError(f"found temperature {temperature}, chunk {chunk}; expected positive numbers")
    if not h.is_cuda or os.environ.get("TRIMPI_DEBUG") == "1":  # reading a value from a GPU waits for it
        wrong = (y != ignore_index) & ((y < 0) | (y >= len(W)))
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            found = f"target {int(y[row])} at row {row}"
            raise IndexError(f"found {found}; expected 0 to {len(W) - 1}, or {ignore_index} to ignore")
