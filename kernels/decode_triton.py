"""One step of decoding: each row's new token attends to itself and to what its row has read, wherever that lies.

Axes: B rows, H heads, J kv heads, C channels of a head, S tokens of the arena.

The keys and values of a layer lie in one arena (S, J, C). What a row sees are ranges of it: the policy that many
prompts share, its prompt, and its own tokens, up to the new one. Rows are taken together in tiles: a program serves one
tile and one kv head, whose H / J queries of every row are the rows of its matrix products, and reads a range that
several of its rows see once for all of them. Softmax runs on over all blocks of all ranges (online softmax, as in
kernels/logprob_triton.py), and starts from the new token itself, which comes in q, k and v: so it never has nothing to
divide by, and no log-sum-exp of parts is joined afterwards. The new key and value are left in the arena.

Counting, for the 7B (H 28, J 4, C 128): a token of the arena is 2 KB a layer. 64 rows that have read 500 tokens move 66
MB, 20 us at 3.4 TB/s, by 256 programs of one row each on 132 multiprocessors. Larger tiles cost programs and save
reading: 512 rows with a policy of 4,000 read it 512 times, 4.2 GB a layer from L2, or 128 times in tiles of four.
"""

import torch
import triton
import triton.language as tl

BLOCK, WARPS, STAGES = (
    32,
    4,
    3,
)  # 32 tokens at a time, two such loads ahead: with 64, Triton 3.6 or 3.9 spills somewhere
MOST = 4  # rows of a tile
BITS = tl.constexpr(1.4426950408889634)  # log2 e


def attend_ranges(q, k, v, keys, values, tiles, ranges, own, place):
    """Attention of one new token per row -> (B, H, C); k and v are written to keys and values, at `place`.

    q (B, H, C), k and v (B, J, C), contiguous; keys and values (S, J, C), one layer of the arena; C a power of two,
    16 or more. tiles (M, N) int32: the rows of each tile, -1 for none; every row is in one. ranges (M, P, 4) int32:
    start and end of a range, and from which to before which of the tile's N rows it is seen. own and place (B,) int32:
    where a row's own tokens start and where the new one goes.
    """
    H, J, C = q.shape[1], *k.shape[1:]
    (M, N), P = tiles.shape, ranges.shape[1]
    out = torch.empty_like(q)
    queries = max(16, triton.next_power_of_2(N * H // J))  # a matrix product has 16 rows at least
    arguments = q, k, v, keys, values, out, tiles, ranges, own, place, P, C**-0.5
    decode[(M, J)](
        *arguments, GROUP=H // J, J=J, C=C, N=N, QUERIES=queries, BLOCK=BLOCK, num_warps=WARPS, num_stages=STAGES
    )
    return out


@triton.jit
def decode(
    q,
    k,
    v,
    keys,
    values,
    out,
    tiles,
    ranges,
    own,
    place,
    P,
    scale,
    GROUP: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    keys += head * C
    values += head * C
    i = tl.arange(0, QUERIES)  # the queries: those of the tile's first row, of its second, ...
    member = i // GROUP
    row = tl.load(tiles + tile * N + member, mask=member < N, other=-1)
    real = (row >= 0)[:, None]
    c = tl.arange(0, C)[None, :]
    here = (row * J + head)[:, None]
    query = here * GROUP + (i % GROUP)[:, None]

    # -- the new token: seen by its own row ----------------------------------------------------------------------------
    q_i = tl.load(q + query * C + c, mask=real, other=0.0)  # (QUERIES, C)
    k_i = tl.load(k + here * C + c, mask=real, other=0.0)
    v_i = tl.load(v + here * C + c, mask=real, other=0.0)
    to = tl.load(place + row, mask=row >= 0, other=0).to(tl.int64)[:, None] * (J * C) + c
    first = real & (i % GROUP == 0)[:, None]
    tl.store(keys + to, k_i, mask=first)
    tl.store(values + to, v_i, mask=first)
    bits = scale * BITS
    m = tl.sum(q_i.to(tl.float32) * k_i.to(tl.float32), 1) * bits
    s = tl.full((QUERIES,), 1.0, tl.float32)
    a = v_i.to(tl.float32)  # sum of weights times values

    # -- what came before it -------------------------------------------------------------------------------------------
    for n in range(P):
        it = ranges + (tile * P + n) * 4
        sees = (member >= tl.load(it + 2)) & (member < tl.load(it + 3))
        m, s, a = attend(q_i, keys, values, tl.load(it), tl.load(it + 1), sees, m, s, a, bits, J, C, BLOCK)
    for n in range(N):
        row_n = tl.load(tiles + tile * N + n)
        start = tl.load(own + row_n, mask=row_n >= 0, other=0)
        end = tl.load(place + row_n, mask=row_n >= 0, other=0)
        m, s, a = attend(q_i, keys, values, start, end, member == n, m, s, a, bits, J, C, BLOCK)
    tl.store(out + query * C + c, (a / s[:, None]).to(out.dtype.element_ty), mask=real)


@triton.jit
def attend(q_i, keys, values, start, end, sees, m, s, a, bits, J: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Online softmax goes on over tokens start..end of the arena, for the queries that see them."""
    c = tl.arange(0, C)[None, :]
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        at = token.to(tl.int64)[:, None] * (J * C) + c  # an arena may pass 2^31 numbers
        inside = (token < end)[:, None]
        k_t = tl.load(keys + at, mask=inside, other=0.0)  # (BLOCK, C)
        x = tl.dot(q_i, tl.trans(k_t), input_precision="ieee") * bits  # (QUERIES, BLOCK)
        x = tl.where(sees[:, None] & (token < end)[None, :], x, float("-inf"))
        above = tl.maximum(m, tl.max(x, 1))
        e = tl.exp2(x - above[:, None])
        shrink = tl.exp2(m - above)
        v_t = tl.load(values + at, mask=inside, other=0.0)
        a = a * shrink[:, None] + tl.dot(e.to(v_t.dtype), v_t, input_precision="ieee")
        s = s * shrink + tl.sum(e, 1)
        m = above
    return m, s, a
