"""Group-relative advantages: how much better each response is than its siblings to the same prompt.

Axes: Q queries, G responses to each, B responses in all. With the mean over the group, over its valid rewards only,

    grpo      A = (r - mean) / (std + eps)            std of the group, ddof 1
    dr_grpo   A =  r - mean                           no division: hard and easy prompts keep their own scale
    batch     A = (r - mean) / (std of the batch + eps)

PolicyRollout's policy-aware responses are members of the group like any other: G counts them in.

Rewards are measured from the smallest of their group, in float64, with the variance from a second pass over the
deviations: neither a large common offset nor the usual sum of squares minus squared sum can cancel what is left, and
equal rewards give exactly 0. On a GPU the statistics are a Triton kernel, one program per group
(kernels/advantage_triton.py).
"""

import os

import torch

MODES = ("grpo", "dr_grpo", "batch")


def group_advantage(rewards, group_ids=None, mode="grpo", eps=1e-4, *, return_nan=False):
    """Advantage of each reward within its group (formulas at the top of the file).

    rewards (Q, G), or (B,) with group_ids (B,) int64 (any integers, in any order, groups of any size). eps is added to
    the deviation: 1e-4 in TRL, 1e-6 in verl. A group of one and a group of equal rewards give 0. A NaN reward gives 0
    and is left out of the statistics; return_nan=True also returns how many there were (0-d int64 tensor).
    Returns fp32 of the shape of rewards. Raises ValueError on an unknown mode or shapes that do not fit.
    """
    if mode not in MODES or not eps >= 0:
        raise ValueError(f"found mode {mode!r}, eps {eps}; expected one of {', '.join(MODES)} and eps >= 0")
    if rewards.ndim != (2 if group_ids is None else 1) or group_ids is not None and group_ids.shape != rewards.shape:
        ids = None if group_ids is None else tuple(group_ids.shape)
        found = f"rewards {tuple(rewards.shape)}, group_ids {ids}"
        raise ValueError(f"found {found}; expected (Q, G) without ids, or (B,) and (B,)")
    r = rewards.detach().double().flatten()  # (B,)
    if group_ids is None:
        Q, G = rewards.shape
        group = torch.arange(Q, device=r.device).repeat_interleave(G)
    else:
        group = group_ids.unique(return_inverse=True)[1]
        Q = int(group.max()) + 1 if len(group) else 0
    if r.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from kernels.advantage_triton import deviations
    else:
        deviations = deviations_torch
    above_mean, spread = deviations(r, group, Q)  # (B,) and (Q,), of the group
    if mode == "grpo":
        above_mean = above_mean / (spread[group] + eps)
    elif mode == "batch":
        above_mean = above_mean / (deviations(r, torch.zeros_like(group), 1)[1] + eps)
    advantage = torch.where(r.isnan() | (spread[group] == 0), 0, above_mean)  # also where eps = 0 makes it 0 / 0
    advantage = advantage.float().view(rewards.shape)
    return (advantage, r.isnan().sum()) if return_nan else advantage


def deviations_torch(r, group, Q):
    """r (B,) float64, group (B,) below Q -> over valid r, r - mean of its group (B,), deviation of a group (Q,)."""
    valid = ~r.isnan()
    low = r.new_full((Q,), torch.inf).scatter_reduce(0, group, r.where(valid, torch.inf), "amin")
    n = r.new_zeros(Q).index_add(0, group, valid.double())
    r = torch.where(valid, r - low[group], 0)
    mean = r.new_zeros(Q).index_add(0, group, r) / n.clamp_min(1)
    r = torch.where(valid, r - mean[group], 0)
    return r, (r.new_zeros(Q).index_add(0, group, r * r) / (n - 1).clamp_min(1)).sqrt()
