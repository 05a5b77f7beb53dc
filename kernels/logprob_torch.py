"""The rows of linear_logprob in plain PyTorch, for CPUs: over the vocabulary in tiles, as flash attention over keys.

Axes: n rows of a chunk, D width, V vocabulary, "tile" its columns in a tile. No chunk of logits is ever whole. A row
has online softmax's maximum m and sums (as in kernels/logprob_triton.py, in nats) and the weighted sum of the head's
rows

    a = sum_{v != y} e^{l_v - m} W_v            a' = e^{m - m'} a + sum_tile e^{l_v - m'} W_v       G = W_y - a / s

so that its gradient is ready when the last tile is. A product with few rows spends its time on reading W: here all of
the chunk's rows meet a tile of W, and the second product finds the tile where the first has left it. A half-precision
tile is widened once for both: a CPU has no product of halves with an fp32 result.
"""

import torch

TILE = 4096  # columns: a tile of logits is 32 MB for 2048 rows


def reached(s):
    """Whether each row of a single sweep is right: always, as this one's maximum rises with the logits."""
    return torch.ones_like(s, dtype=torch.bool)


def forward_rows(h, W, y, temperature, with_entropy, gradient):
    """h (n, D), W (V, D), y (n,) -> logp, entropy, scale, m, s, each (n,) fp32, and G (n, D) fp32 or None."""
    return fold(tiles(h, W, temperature), y, temperature, with_entropy, h.shape[1] if gradient else None)


def backward_rows(h, W, y, m, s, temperature, h_g, dW, with_h):
    """dW (V, D) fp32 += d^T h_g with d = 1[y] - q (n, V), a tile at a time; returns d W (n, D) fp32 if with_h."""
    per_s = -1 / s[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    G = h_g.new_zeros(h_g.shape) if with_h else None
    for v, l, W_v in tiles(h, W, temperature):
        d = l.sub_(m[:, None]).exp_().mul_(per_s)  # (n, tile), in place of the logits
        rows, columns = inside(y, v, l)
        d[rows, columns] = 1.0
        dW[v : v + len(W_v)].addmm_(d.T, h_g)
        if with_h:
            G.addmm_(d, W_v)
    return G


def fold(tiles, y, temperature, with_entropy, width):
    """One pass over tiles (first column, logits (n, tile), overwritten, W_v (tile, width)); width None: no gradient."""
    column = y.new_zeros(len(y), 1, dtype=torch.float32)
    m = column - 3e38  # finite: a tile of -inf logits adds e^(-inf - m) = 0
    s, t, l_y = column, column, column + torch.nan
    a, W_y = (None if width is None else column.new_zeros(len(y), width) for _ in range(2))
    for v, l, W_v in tiles:
        rows, columns = inside(y, v, l)
        l_y[rows, 0] = l[rows, columns]
        above = torch.maximum(m, l.amax(1, keepdim=True))
        shrink = (m - above).exp_()
        e = l.sub_(above).exp_()  # (n, tile), in place of the logits
        e[rows, columns] = 0.0  # without the target: 1 - p_y must not cancel
        if with_entropy:
            t = shrink * (t + (m - above) * s) - torch.special.entr(e).sum(1, keepdim=True)  # e log e, 0 at e = 0
        s = shrink * s + e.sum(1, keepdim=True)
        if width is not None:
            a.mul_(shrink).addmm_(e, W_v)
            W_y[rows] = W_v[columns]
        m = above
    e_y = (l_y - m).exp()
    z = s + e_y
    entropy = z.log() - (t - torch.special.entr(e_y)) / z if with_entropy else torch.zeros_like(z)
    each = (l_y - m - z.log(), entropy, s / (z * temperature), m, s)
    return *(x[:, 0] for x in each), None if width is None else W_y - a / s.clamp_min(torch.finfo(torch.float32).tiny)


def tiles(h, W, temperature):
    """(first column v, logits (n, tile) in a workspace that the next tile overwrites, W_v (tile, D)), all fp32.

    e^l magnifies what rounding did to l: a sum over D that is made in two halves is off by half as much, and the
    gradient of a confident row stays within 1e-5.
    """
    h, half = h.float(), -(-h.shape[1] // 2)
    workspace = h.new_empty(len(h) * min(TILE, len(W)))
    for v in range(0, len(W), TILE):
        W_v = W[v : v + TILE].float()
        l = workspace[: len(h) * len(W_v)].view(len(h), len(W_v))
        torch.mm(h[:, :half], W_v[:, :half].T, out=l)
        l.addmm_(h[:, half:], W_v[:, half:].T)
        yield v, l.div_(temperature) if temperature != 1 else l, W_v


def inside(y, v, l):
    """Rows whose target is one of the tile's columns, and which."""
    rows = ((y >= v) & (y < v + l.shape[1])).nonzero()[:, 0]
    return rows, y[rows] - v
