"""Mean and deviation of every group of rewards as a Triton kernel: one program per group, two passes over its members.

The variance is the mean of squared deviations from a mean that is known by then; the shortcut E[r^2] - E[r]^2
subtracts two large numbers. One small launch takes the place of a dozen: the arrays hold one number a response, time
is launches only.
"""

import torch
import triton
import triton.language as tl


def deviations(r, group, Q):
    """r (B,) float64, group (B,) below Q -> over valid r, r - mean of its group (B,), deviation of a group (Q,)."""
    members = group.argsort(stable=True)  # group p's are members[starts[p] : starts[p + 1]]
    starts = torch.searchsorted(group[members], torch.arange(Q + 1, device=r.device))
    above_mean, spread = torch.empty_like(r), r.new_empty(Q)
    if Q:
        group_statistics[(Q,)](r, members, starts, above_mean, spread, BLOCK=32, num_warps=1)
    return above_mean, spread


@triton.jit
def group_statistics(rewards, members, starts, above_mean, spread, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    first, last = tl.load(starts + group), tl.load(starts + group + 1)
    lanes = tl.arange(0, BLOCK)

    low = tl.full((), float("inf"), tl.float64)  # rewards are measured from here: a common offset cannot cancel digits
    for start in range(first, last, BLOCK):
        inside = start + lanes < last
        r = tl.load(rewards + tl.load(members + start + lanes, mask=inside, other=0), mask=inside, other=float("nan"))
        low = tl.minimum(low, tl.min(tl.where(r == r, r, float("inf")), 0))

    n = tl.zeros((), tl.float64)
    total = tl.zeros((), tl.float64)
    for start in range(first, last, BLOCK):
        inside = start + lanes < last
        member = tl.load(members + start + lanes, mask=inside, other=0)
        r = tl.load(rewards + member, mask=inside, other=float("nan")) - low
        real = r == r  # NaN is not equal to itself
        n += tl.sum(real.to(tl.float64), 0)
        total += tl.sum(tl.where(real, r, 0.0), 0)
    mean = total / tl.maximum(n, 1)

    squares = tl.zeros((), tl.float64)
    for start in range(first, last, BLOCK):
        inside = start + lanes < last
        member = tl.load(members + start + lanes, mask=inside, other=0)
        r = tl.load(rewards + member, mask=inside, other=float("nan")) - low
        real = r == r
        squares += tl.sum(tl.where(real, (r - mean) * (r - mean), 0.0), 0)
        tl.store(above_mean + member, tl.where(real, r - mean, 0.0), mask=inside)
    tl.store(spread + group, tl.sqrt(squares / tl.maximum(n - 1, 1)))
