"""kernels/decode_triton.py against attention in float64: compiled on a GPU, interpreted elsewhere."""

import os

import pytest
import torch
from again import interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="the last test runs this interpreted")
S, J, GROUP, C = 700, 2, 7, 16
POLICIES = [(3, 133), (140, 141)]  # ranges of the arena
PROMPTS = [(150, 214), (214, 279), (280, 280), (300, 363)]
ROWS = [  # policy, prompt, own tokens so far
    (0, 0, 0), (0, 0, 1), (0, 0, 63), (0, 1, 64), (0, 1, 65), (1, 2, 10), (None, 3, 7), (None, None, 0),
]  # fmt: skip


def arena(dtype):
    """A layer's keys and values with NaN wherever no row may look, the step's q, k, v, and what each row sees."""
    torch.manual_seed(0)
    keys, values = (torch.full((S, J, C), torch.nan) for _ in range(2))
    written = torch.tensor([n for *_, n in ROWS])
    place = 400 + (written + 1).cumsum(0) - 1  # a row's own tokens, its new one, and at once the next row's
    own = place - written
    seen = []
    for r, (policy, prompt, _) in enumerate(ROWS):
        ranges = [
            *([POLICIES[policy]] if policy is not None else []),
            *([PROMPTS[prompt]] if prompt is not None else []),
        ]
        seen.append([*ranges, (int(own[r]), int(place[r]))])
        for start, end in seen[-1]:
            keys[start:end], values[start:end] = torch.randn(2, end - start, J, C)
    q, k, v = (torch.randn(len(ROWS), heads, C) * 2 for heads in (J * GROUP, J, J))
    return (*(x.to(DEVICE, dtype) for x in (q, k, v, keys, values)), own.int(), place.int(), seen)


def tiled(order, seen, N):
    """Rows in this order, N to a tile; equal ranges of neighbours are one."""
    tiles, ranges = torch.full((-(-len(order) // N), N), -1, dtype=torch.int32), []
    for tile, start in zip(tiles, range(0, len(order), N)):
        members = order[start : start + N]
        tile[: len(members)] = torch.tensor(members)
        found = {}
        for n, row in enumerate(members):
            for one in seen[row][:-1]:
                found[one] = (min(found.get(one, (n,))[0], n), n + 1)
        ranges.append([[*one, *rows] for one, rows in found.items()])
    most = max(1, max(map(len, ranges)))
    return tiles, torch.tensor([r + [[0, 0, 0, 0]] * (most - len(r)) for r in ranges], dtype=torch.int32)


def plain(q, k, v, keys, values, seen):
    """softmax(q k / sqrt(C)) v of each row over its ranges and its new token, in float64."""
    out = []
    for r, ranges in enumerate(seen):
        at = torch.cat([torch.arange(*one) for one in ranges]).to(q.device)
        k_r, v_r = (torch.cat([x[at], new[r : r + 1]]).double() for x, new in ((keys, k), (values, v)))  # (S, J, C)
        q_r = q[r].double().view(J, GROUP, C)
        weights = (torch.einsum("jgc,sjc->jgs", q_r, k_r) / C**0.5).softmax(-1)
        out.append(torch.einsum("jgs,sjc->jgc", weights, v_r).reshape(J * GROUP, C))
    return torch.stack(out)


@needs_kernel
@pytest.mark.parametrize("N", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_tiling_is_plain_attention_over_the_ranges(N, dtype):
    """Ranges of 0, 1, 63, 64, 65 and 130 tokens, shared or not, NaN beside them; interpreted bf16 would be wrong."""
    from kernels.decode_triton import attend_ranges

    q, k, v, keys, values, own, place, seen = arena(dtype)
    expected = plain(q, k, v, keys, values, seen)
    tiles, ranges = tiled(range(len(ROWS)), seen, N)
    where = [x.to(DEVICE) for x in (tiles, ranges, own, place)]
    before = keys.clone()
    found = attend_ranges(q, k, v, keys, values, *where)
    bound = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=bound)
    assert torch.equal(keys[place], k) and torch.equal(values[place], v), "the next step reads them here"
    untouched = torch.ones(S, dtype=torch.bool).index_fill(0, place.long(), False)
    assert torch.equal(keys[untouched].nan_to_num(), before[untouched].nan_to_num())


@needs_kernel
def test_large_scores_and_row_order():
    """Scores of some hundreds, where a softmax without a maximum overflows; rows stand in their tiles in any order."""
    from kernels.decode_triton import attend_ranges

    q, k, v, keys, values, own, place, seen = arena(torch.float32)
    q *= 100
    order = [4, 7, 0, 3, 6, 1, 5, 2]
    found = attend_ranges(q, k, v, keys, values, *(x.to(DEVICE) for x in (*tiled(order, seen, 2), own, place)))
    torch.testing.assert_close(found.double(), plain(q, k, v, keys, values, seen), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="interpreted, where no compiled kernel was tested")
def test_this_file_again_with_the_kernel_interpreted():
    interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="interpreted code is not compiled")
@pytest.mark.parametrize("name", ["one sweep, 1024 x 4", "decode, 7B, tiles of 1", "decode, 7B, tiles of 4"])
def test_kernels_compile_for_hopper_without_spills(name):
    """No GPU is needed to compile for one. benchmarks/results/registers.md has all kernels on three architectures."""
    registers = pytest.importorskip("benchmarks.registers")
    kernel, *how = registers.cases()[name]
    used, spilt, shared = registers.usage(registers.compile_for(90, kernel, *how))
    assert used < 255 and not spilt
    assert registers.programs(used, shared, how[-1]["num_warps"], 90) >= 2
