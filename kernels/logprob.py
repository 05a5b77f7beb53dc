"""Per-token log-probabilities straight from hidden states, without ever holding the tokens x vocabulary logits.

Axes: N tokens, D width of the hidden states, V vocabulary, C rows of one chunk.

With logits l = h W^T / T, p = softmax(l) and target y the three stages need, for every token,

    logp    = l_y - log sum_v e^{l_v}                                -logp is the cross-entropy of VM-CPT and CoT-SFT
    entropy = log sum_v e^{l_v} - sum_v p_v l_v                      a metric of RL

and the gradient, which does not depend on what comes from above except for one number per token:

    d logp / d h = (W_y - sum_v p_v W_v) / T = (1 - p_y) / T * (W_y - sum_{v != y} q_v W_v),     q_v = p_v / (1 - p_y)

So the forward pass makes that vector G while the chunk's logits are at hand, and the backward pass is g * G: two
matrix products for a frozen head, where keeping the logits costs N x V memory and making them again costs a third
product. A trainable head does need every token's row of W's gradient, g_t (1[y] - p_v) h_t: backward makes the logits
again, four products, but for the last chunk: its direction still stands in the workspace, so that a batch of one chunk
costs three, as keeping the logits does. When no gradient is wanted there is one.

The right-hand form matters in half precision. The direction (1[y] - q) is rounded before it meets W, and rounding p
next to 1 destroys 1 - p; here the target's entry is exactly 1, the largest of all, and 1 - p_y = sum_{v != y} e^{l_v}
/ sum_v e^{l_v} stays in fp32, summed without the target so that nothing cancels.

The sweep over a chunk's rows is a Triton kernel on a GPU (kernels/logprob_triton.py) and plain PyTorch elsewhere. With
TRITON_INTERPRET=1, set before Python starts, the same kernel runs interpreted on CPU tensors.
"""

import os
from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 16           # chunks are padded to a multiple of this many rows: BLAS takes another path for a few rows
CPU_CHUNK = 16 << 20, 80 << 20  # fp32 logits of a chunk on a CPU, least and most: W is read from memory once a chunk
CPU_ROWS = 8        # of logits that are swept at a time
CPU_TILE = 1 << 14  # rows of a half-precision W that are widened to fp32 at a time on a CPU


@torch.compiler.disable  # the number of kept rows is data; a graph break costs nothing here
def linear_logprob(h, W, y, *, temperature=1.0, ignore_index=-100, return_entropy=False, chunk=None, needs_grad=None):
    """Log-probability of each target under softmax(h W^T / temperature), and the entropy (formulas above).

    h (N, D) hidden states, W (V, D) the head's weight (or a DTensor of FSDP2, whose gradient is summed over the ranks),
    both bf16, fp16 or fp32; under autocast both are cast to its dtype. y (N,) int64. Logits, sums and results are fp32.
    needs_grad (N,) bool: rows marked False get a zero gradient and cost one product instead of two (masked tokens, or
    an advantage of 0 without a KL term). chunk: rows of logits held at a time, rounded up to a multiple of 16.
    Returns logp (N,) and entropy (N,) or None, fp32, nats; the entropy carries no gradient. Rows with y == ignore_index
    give 0. Raises IndexError for any other target outside [0, V) on a CPU and under TRIMPI_DEBUG=1; else it gives NaN.
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
            logp, entropy, *_ = forward(h, W, y, kept, kept, None, *settings)
    return logp, entropy if return_entropy else None


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, y, kept, graded, temperature, chunk, with_entropy):
        head = "trainable" if ctx.needs_input_grad[1] else "frozen"
        ctx.frozen, ctx.temperature, ctx.chunk = head == "frozen", temperature, chunk
        logp, entropy, scale, G, ctx.last = forward(h, W, y, kept, graded, head, temperature, chunk, with_entropy)
        ctx.save_for_backward(*(scale, G) if ctx.frozen else (h, W, y, graded))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):  # g (N,)
        with torch.autocast(g.device.type, enabled=False):
            if ctx.frozen:
                scale, G = ctx.saved_tensors
                factor = torch.where(scale != 0, g * scale, 0)[:, None]  # skipped rows give exactly 0, even under NaN
                dh, dW = torch.mul(factor, G, out=torch.empty_like(G)), None  # (N, D), fp32 only inside the product
            else:
                last, ctx.last = ctx.last, None  # backward overwrites it; a second one makes all logits again
                settings = last, ctx.temperature, ctx.chunk, ctx.needs_input_grad[0]
                dh, dW = backward_trainable(g, *ctx.saved_tensors, *settings)
        return dh, dW, None, None, None, None, None, None


def forward(h, W, y, kept, graded, head, temperature, chunk, with_entropy):
    """logp (N,), entropy (N,) and, for the rows that are graded, what backward needs; head None: no gradient is wanted.

    A frozen head's gradient of logp is scale (N,) fp32 times G (N, D), both zero in other rows; for a trainable one
    `last` is the workspace, scale and direction of the last chunk, or None.
    """
    logp, entropy, scale = (torch.zeros_like(y, dtype=torch.float32) for _ in range(3))
    G = torch.zeros_like(h, memory_format=torch.contiguous_format) if head == "frozen" else None
    todo = [(r, mask is graded) for mask in (kept & ~graded, graded) for r in chunks(mask, chunk)]
    logits, last = workspace(W, (r for r, _ in todo)), None
    for i, (r, gradient) in enumerate(todo):
        gradient &= head == "frozen" or head == "trainable" and i == len(todo) - 1
        logp[r], entropy[r], s, direction = sweep(h[r], W, y[r], logits[: len(r)], temperature, with_entropy, gradient)
        if gradient and head == "frozen":
            scale[r], G[r] = s, times_head(direction, W).to(G.dtype)
        elif gradient:
            last = logits, s, direction
    return logp, entropy, scale, G, last


def backward_trainable(g, h, W, y, graded, last, temperature, chunk, need_h):
    """dh = sum_v d_v W_v and dW_v = sum_t d_tv h_t (in fp32) with d = g scale (1[y] - q), from logits made again."""
    dh = torch.zeros_like(h, memory_format=torch.contiguous_format) if need_h else None
    dW = torch.zeros_like(W, dtype=torch.float32)
    g = torch.where(graded, g, 0)
    tiny = torch.finfo(torch.float32).tiny
    unit = g.abs().max().clamp_min(tiny) if len(g) else 1.0  # keeps g * h inside fp16's range
    todo = chunks(graded, chunk)
    logits, *ready = last or [workspace(W, todo)]
    for r in reversed(todo):  # the last chunk first: its direction may be there
        scale, direction = ready or sweep(h[r], W, y[r], logits[: len(r)], temperature, False, True)[2:]
        ready = None
        factor = (g[r] * scale)[:, None]  # (C, 1)
        if need_h:
            dh[r] = (factor * times_head(direction, W)).to(dh.dtype)
        real = torch.ones_like(r, dtype=torch.bool)
        real[1:] = r[1:] != r[:-1]  # padding repeats a row, which must count once
        add_outer(dW, direction, factor / unit * real[:, None] * h[r])
    return dh, dW.mul_(unit).to(W.dtype)


def sweep(h, W, y, logits, temperature, with_entropy, gradient):
    """One chunk: logits into the workspace, then per row logp, entropy, scale and, over the logits, (1[y] - q)."""
    fill_logits(h, W, logits)
    if h.is_cuda and find_spec("triton") or os.environ.get("TRITON_INTERPRET") == "1":
        from kernels.logprob_triton import sweep_rows
    else:
        sweep_rows = sweep_rows_torch
    half = h.dtype if h.is_cuda else torch.float32  # the interpreter truncates to bf16; a CPU has no product for it
    return sweep_rows(logits, y, temperature, half, with_entropy, gradient)


def sweep_rows_torch(logits, y, temperature, dtype, with_entropy, gradient):
    """The kernel's semantics in PyTorch, a few rows at a time: what one pass leaves in the processor's cache the next
    finds there."""
    few = zip(logits.split(CPU_ROWS), y.split(CPU_ROWS))
    parts = [sweep_few(*rows, temperature, with_entropy, gradient) for rows in few]
    return *(torch.cat(each) for each in zip(*parts)), logits


def sweep_few(logits, y, temperature, with_entropy, gradient):
    """In place, so that one chunk of logits is all there ever is."""
    y = y[:, None]                                              # (C, 1)
    if temperature != 1:
        logits.div_(temperature)                                # (C, V)
    peak = logits.amax(1, keepdim=True)
    target = logits.gather(1, y) - peak
    e, e_y = logits.sub_(peak).exp_(), target.exp()             # in place of the logits
    surprise = torch.special.entr(e).sum(1, keepdim=True) if with_entropy else 0.0  # sum_v -e log e, 0 at e = 0
    rest = e.scatter_(1, y, 0.0).sum(1, keepdim=True)           # without the target: 1 - p_y must not cancel
    total = rest + e_y
    logp, entropy, scale = target - total.log(), total.log() + surprise / total, rest / (total * temperature)
    if gradient:
        e.div_(-rest.clamp_min(torch.finfo(torch.float32).tiny)).scatter_(1, y, 1.0)
    return logp[:, 0], entropy[:, 0], scale[:, 0]


# -- the three matrix products, fp32 results from bf16, fp16 or fp32 factors ----------------------------------------

def fill_logits(h, W, out):
    """out (C, V) fp32 = h W^T; a CPU has no product of halves with an fp32 result, so it widens W tile by tile.

    In fp32 e^l magnifies what rounding did to l: a sum over D that is made in two halves is off by half as much, and
    the gradient of a confident row stays within 1e-5.
    """
    if h.is_cuda and h.dtype != torch.float32:
        torch.mm(h, W.T, out_dtype=torch.float32, out=out)
        return
    h, half = h.float(), -(-h.shape[1] // 2)
    for tile in tiles(W):
        torch.mm(h[:, :half], W[tile, :half].T.float(), out=out[:, tile])
        out[:, tile].addmm_(h[:, half:], W[tile, half:].T.float())


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
    step = len(W) if W.dtype == torch.float32 else CPU_TILE
    return [slice(v, v + step) for v in range(0, len(W), step)]


# -- rows and chunks ------------------------------------------------------------------------------------------------

def chunks(mask, size):
    """Indices of the rows marked True, `size` at a time (one synchronisation on a GPU).

    The last index is repeated up to a multiple of ROWS: every row then goes through the same BLAS kernel, so that a
    row's result does not depend on its neighbours, bit for bit on a CPU.
    """
    rows = mask.nonzero()[:, 0]
    rows = torch.cat([rows, rows[-1:].expand(-len(rows) % ROWS)])
    return rows.split(size) if len(rows) else ()


def workspace(W, chunks):
    """Memory for the logits of the largest chunk, (C, V) fp32."""
    return W.new_empty((max((len(r) for r in chunks), default=0), len(W)), dtype=torch.float32)


def default_chunk(h, W):
    """Rows of a chunk: a third of all within CPU_CHUNK, or on a GPU those that fill whole waves of 128 x 256 tiles."""
    if not h.is_cuda:
        least, most = (logits // max(1, len(W)) for logits in CPU_CHUNK)
        pieces = -(-len(h) // max(ROWS, least, min(-(-len(h) // 3), most)))
        return max(ROWS, -(-len(h) // max(1, pieces)))  # of one size: a small last chunk reads all of W as well
    cores = torch.cuda.get_device_properties(h.device).multi_processor_count
    across = -(-h.shape[1] // 256)

    def filled(rows):  # share of the multiprocessors at work, over all waves
        tiles = rows // 128 * across
        return tiles / (-(-tiles // cores) * cores)
    return max(range(512, 2304 + 1, 128), key=filled)


def check(h, W, y, temperature, ignore_index, chunk, needs_grad):
    if h.ndim != 2 or W.ndim != 2 or h.shape[1] != W.shape[1] or y.shape != h.shape[:1]:
        found = f"h {tuple(h.shape)}, W {tuple(W.shape)}, y {tuple(y.shape)}"
        raise ValueError(f"found {found}; expected (N, D), (V, D), (N,)")
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
