"""Per-token log-probabilities straight from hidden states, without ever holding the tokens x vocabulary logits.

Axes: N tokens, D width of the hidden states, V vocabulary, C rows of one chunk.

With logits l = h W^T / T, p = softmax(l) and target y the three stages need, for every token,

    logp    = l_y - log sum_v e^{l_v}                                -logp is the cross-entropy of VM-CPT and CoT-SFT
    entropy = log sum_v e^{l_v} - sum_v p_v l_v                      a metric of RL

and the gradient, which does not depend on what comes from above except for one number per token:

    d logp / d h = (W_y - sum_v p_v W_v) / T = (1 - p_y) / T * (W_y - sum_{v != y} q_v W_v),     q_v = p_v / (1 - p_y)

So the forward pass makes that vector G while the chunk's logits are at hand, and the backward pass is g * G: two matrix
products for a frozen head, where keeping the logits costs N x V memory and making them again costs a third product.
A trainable head does need every token's row of W's gradient, g_t (1[y] - p_v) h_t: backward makes the logits again, four
products. When no gradient is wanted there is one.

The right-hand form matters in half precision. The direction (1[y] - q) is rounded before it meets W, and rounding p next to 1
destroys 1 - p; here the target's entry is exactly 1, the largest of all, and 1 - p_y = sum_{v != y} e^{l_v} / sum_v e^{l_v}
stays in fp32, summed without the target so that nothing cancels.

The sweep over a chunk's rows is a Triton kernel on a GPU (kernels/logprob_triton.py) and plain PyTorch elsewhere. With
TRITON_INTERPRET=1, set before Python starts, the same kernel runs interpreted on CPU tensors.
"""

import os
from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 16           # chunks are padded to a multiple of this many rows: BLAS takes another path for a few rows
CPU_CHUNK = 16 << 20, 80 << 20  # fp32 logits of a chunk on a CPU, least and most: W is read from memory once a chunk
CPU_TILE = 1 << 14  # rows of a half-precision W that are widened to fp32 at a time on a CPU


@torch.compiler.disable  # the number of kept rows is data; a graph break costs nothing here
def linear_logprob(h, W, y, *, temperature=1.0, ignore_index=-100, return_entropy=False, chunk=None, needs_grad=None):
    """Log-probability of each target under softmax(h W^T / temperature), and the entropy (formulas at the top of the file).

    h (N, D) hidden states, W (V, D) the head's weight (or a DTensor of FSDP2, whose gradient is summed over the ranks), both
    bf16, fp16 or fp32; under autocast both are cast to its dtype. y (N,) int64. Logits, sums and results are fp32 throughout.
    needs_grad (N,) bool: rows marked False get a zero gradient and cost one product instead of two (masked tokens, or an
    advantage of 0 without a KL term). chunk: rows of logits held at a time, rounded up to a multiple of 16.
    Returns logp (N,) and entropy (N,) or None, fp32, nats; the entropy carries no gradient. Rows with y == ignore_index give 0.
    Raises IndexError for any other target outside [0, V) on a CPU and under TRIMPI_DEBUG=1; such rows are NaN on a GPU.
    """
    if hasattr(W, "full_tensor"):  # cast the shard first: half the traffic when the parameters are kept in fp32
        from torch.distributed.tensor import Partial
        W = W.to(h.dtype).full_tensor(grad_placements=[Partial()] * W.device_mesh.ndim)
    device = h.device.type
    if torch.is_autocast_enabled(device):
        h, W = h.to(torch.get_autocast_dtype(device)), W.to(torch.get_autocast_dtype(device))
    check(h, W, y, temperature, ignore_index, chunk, needs_grad)

    chunk = chunk or default_chunk(h, W)
    kept = y != ignore_index
    graded = kept if needs_grad is None else kept & needs_grad
    settings = (float(temperature), -(-chunk // ROWS) * ROWS, return_entropy)
    with torch.autocast(device, enabled=False):  # autocast would round the logits
        if torch.is_grad_enabled() and (h.requires_grad or W.requires_grad):
            logp, entropy = LinearLogprob.apply(h, W, y, kept, graded, *settings)
        else:
            logp, entropy, _, _ = forward(h, W, y, kept, None, *settings)
    return logp, entropy if return_entropy else None


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, y, kept, graded, temperature, chunk, with_entropy):
        ctx.frozen, ctx.temperature, ctx.chunk = not ctx.needs_input_grad[1], temperature, chunk
        now = graded if ctx.frozen else None  # a trainable head works in the backward pass
        logp, entropy, scale, G = forward(h, W, y, kept, now, temperature, chunk, with_entropy)
        ctx.save_for_backward(*(scale, G) if ctx.frozen else (h, W, y, graded))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):  # g (N,)
        with torch.autocast(g.device.type, enabled=False):
            if ctx.frozen:
                scale, G = ctx.saved_tensors
                factor = torch.where(scale != 0, g * scale, 0)  # whatever comes from above, skipped rows give exactly 0
                dh, dW = torch.mul(factor[:, None], G, out=torch.empty_like(G)), None  # (N, D), fp32 only inside the product
            else:
                dh, dW = backward_trainable(g, *ctx.saved_tensors, ctx.temperature, ctx.chunk, *ctx.needs_input_grad[:2])
        return dh, dW, None, None, None, None, None, None


def forward(h, W, y, kept, graded, temperature, chunk, with_entropy):
    """logp (N,), entropy (N,), and where graded the gradient of logp as scale (N,) fp32 times G (N, D); zero elsewhere."""
    logp, entropy, scale = (torch.zeros_like(y, dtype=torch.float32) for _ in range(3))
    G = None if graded is None else torch.zeros_like(h, memory_format=torch.contiguous_format)
    parts = [(kept, False)] if graded is None else [(graded, True), (kept & ~graded, False)]
    todo = [(r, gradient) for mask, gradient in parts for r in chunks(mask, chunk)]
    logits = workspace(W, (r for r, _ in todo))
    for r, gradient in todo:
        logp[r], entropy[r], s, direction = sweep(h[r], W, y[r], logits[: len(r)], temperature, with_entropy, gradient)
        if gradient:
            scale[r], G[r] = s, times_head(direction, W).to(G.dtype)
    return logp, entropy, scale, G


def backward_trainable(g, h, W, y, graded, temperature, chunk, need_h, need_W):
    """dh = sum_v d_v W_v and dW_v = sum_t d_tv h_t with d = g scale (1[y] - q), from logits made again, dW summed in fp32."""
    dh = torch.zeros_like(h, memory_format=torch.contiguous_format) if need_h else None
    dW = torch.zeros_like(W, dtype=torch.float32) if need_W else None
    g = torch.where(graded, g, 0)
    unit = g.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if len(g) else 1.0  # keeps g * h inside fp16's range
    todo = chunks(graded, chunk)
    logits = workspace(W, todo)
    for r in todo:
        _, _, scale, direction = sweep(h[r], W, y[r], logits[: len(r)], temperature, False, True)
        factor = (g[r] * scale)[:, None]  # (C, 1)
        if need_h:
            dh[r] = (factor * times_head(direction, W)).to(dh.dtype)
        if need_W:
            real = torch.ones_like(r, dtype=torch.bool)
            real[1:] = r[1:] != r[:-1]  # padding repeats a row, which must count once
            add_outer(dW, direction, factor / unit * real[:, None] * h[r])
    return dh, dW.mul_(unit).to(W.dtype) if need_W else None


def sweep(h, W, y, logits, temperature, with_entropy, gradient):
    """One chunk: logits into the workspace, then per row logp, entropy, scale and the direction (1[y] - q), in the same memory."""
    fill_logits(h, W, logits)
    if h.is_cuda and find_spec("triton") or os.environ.get("TRITON_INTERPRET") == "1":
        from kernels.logprob_triton import sweep_rows
    else:
        sweep_rows = sweep_rows_torch
    half = h.dtype if h.is_cuda else torch.float32  # the interpreter truncates to bf16; a CPU has no product for it anyway
    return sweep_rows(logits, y, temperature, half, with_entropy, gradient)


def sweep_rows_torch(logits, y, temperature, dtype, with_entropy, gradient):
    """The kernel's semantics in PyTorch; in place, so that one chunk of logits is all there ever is (two with the entropy)."""
    y = y[:, None]                                              # (C, 1)
    logits.div_(temperature)                                    # (C, V)
    peak = logits.amax(1, keepdim=True)
    target = logits.gather(1, y) - peak
    e, e_y = logits.sub_(peak).exp_(), target.exp()             # in place of the logits
    surprise = torch.special.entr(e).sum(1, keepdim=True) if with_entropy else 0.0  # sum_v -e log e, 0 at e = 0
    rest = e.scatter_(1, y, 0.0).sum(1, keepdim=True)           # without the target: 1 - p_y must not cancel
    total = rest + e_y
    logp, entropy, scale = target - total.log(), total.log() + surprise / total, rest / (total * temperature)
    if gradient:
        e.div_(-rest.clamp_min(torch.finfo(torch.float32).tiny)).scatter_(1, y, 1.0)
    return logp[:, 0], entropy[:, 0], scale[:, 0], e


# -- the three matrix products, fp32 results from bf16, fp16 or fp32 factors -----------------------------------------------

def fill_logits(h, W, out):
    """out (C, V) fp32 = h W^T; a CPU has no product of halves with an fp32 result, so it widens W tile by tile."""
    if h.is_cuda and h.dtype != torch.float32:
        torch.mm(h, W.T, out_dtype=torch.float32, out=out)
        return
    h = h.float()
    for tile in tiles(W):
        torch.mm(h, W[tile].T.float(), out=out[:, tile])


def times_head(direction, W):
    """direction (C, V) W -> (C, D) fp32."""
    if direction.is_cuda and direction.dtype != torch.float32:
        return torch.mm(direction, W, out_dtype=torch.float32)
    return sum(torch.mm(direction[:, tile].float(), W[tile].float()) for tile in tiles(W))


def add_outer(dW, direction, h):
    """dW (V, D) fp32 += direction^T h."""
    if direction.is_cuda and direction.dtype != torch.float32:
        torch.addmm(dW, direction.T, h.to(direction.dtype), out_dtype=torch.float32, out=dW)
    else:
        dW.addmm_(direction.float().T, h)


def tiles(W):
    return [slice(0, len(W))] if W.dtype == torch.float32 else [slice(v, v + CPU_TILE) for v in range(0, len(W), CPU_TILE)]


# -- rows and chunks ----------------------------------------------------------------------------------------------------------

def chunks(mask, size):
    """Indices of the rows marked True, `size` at a time (one synchronisation on a GPU).

    The last index is repeated up to a multiple of ROWS: every row then goes through the same BLAS kernel, so that a row's
    result does not depend on its neighbours, bit for bit on a CPU.
    """
    rows = mask.nonzero()[:, 0]
    rows = torch.cat([rows, rows[-1:].expand(-len(rows) % ROWS)])
    return rows.split(size) if len(rows) else ()


def workspace(W, chunks):
    """Memory for the logits of the largest chunk, (C, V) fp32."""
    return W.new_empty((max((len(r) for r in chunks), default=0), len(W)), dtype=torch.float32)


def default_chunk(h, W):
    """Rows of a chunk: a third of them within CPU_CHUNK, or on a GPU those that fill whole waves of 128 x 256 tiles of G."""
    if not h.is_cuda:
        least, most = (logits // max(1, len(W)) for logits in CPU_CHUNK)
        return max(ROWS, least, min(len(h) // 3, most)) // ROWS * ROWS
    cores = torch.cuda.get_device_properties(h.device).multi_processor_count
    across = -(-h.shape[1] // 256)

    def filled(rows):  # share of the multiprocessors at work, over all waves
        tiles = rows // 128 * across
        return tiles / (-(-tiles // cores) * cores)
    return max(range(512, 2304 + 1, 128), key=filled)


def check(h, W, y, temperature, ignore_index, chunk, needs_grad):
    if h.ndim != 2 or W.ndim != 2 or h.shape[1] != W.shape[1] or y.shape != h.shape[:1]:
        raise ValueError(f"found h {tuple(h.shape)}, W {tuple(W.shape)}, y {tuple(y.shape)}; expected (N, D), (V, D), (N,)")
    if h.dtype != W.dtype or h.dtype not in DTYPES or y.dtype != torch.int64:
        raise TypeError(f"found h {h.dtype}, W {W.dtype}, y {y.dtype}; expected h and W alike in bf16, fp16 or fp32, y int64")
    if needs_grad is not None and (needs_grad.dtype != torch.bool or needs_grad.shape != y.shape):
        raise TypeError(f"found needs_grad {needs_grad.dtype} {tuple(needs_grad.shape)}; expected bool {tuple(y.shape)}")
    if not temperature > 0 or (chunk is not None and chunk < 1):
        raise ValueError(f"found temperature {temperature}, chunk {chunk}; expected positive numbers")
    if not h.is_cuda or os.environ.get("TRIMPI_DEBUG") == "1":  # reading a value from a GPU waits for it
        wrong = (y != ignore_index) & ((y < 0) | (y >= len(W)))
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise IndexError(f"found target {int(y[row])} at row {row}; expected 0 to {len(W) - 1}, or {ignore_index} to ignore")
