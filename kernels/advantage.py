"""Group-relative advantages: how much better each response is than its siblings to the same prompt.

Axes: P prompts, G responses of a group. With the mean over the group, over its valid rewards only,

    grpo      A = (r - mean) / (std + eps)            std of the group, ddof 1
    dr_grpo   A =  r - mean                           no division: hard and easy prompts keep their own scale
    batch     A = (r - mean) / (std of the batch + eps)

PolicyRollout's policy-aware responses are members of the group like any other: G counts them in.

Rewards are measured from the smallest of their group, in float64, with the variance from a second pass over the deviations:
neither a large common offset nor the usual sum of squares minus squared sum can cancel what is left, and equal rewards give
exactly 0. The arrays are tiny (one number a response); the GPU form is one small program per group, without a synchronisation.
"""

import torch

MODES = ("grpo", "dr_grpo", "batch")


def group_advantage(rewards, group_ids=None, mode="grpo", eps=1e-4, *, return_nan=False):
    """Advantage of each reward within its group (formulas at the top of the file).

    rewards (P, G), or (N,) with group_ids (N,) int64 (any integers, in any order, groups of any size). eps is added to the
    deviation: 1e-4 in TRL, 1e-6 in verl. A group of one and a group of equal rewards give 0. A NaN reward gives 0 and is left
    out of the statistics; return_nan=True also returns how many there were (0-d int64 tensor).
    Returns fp32 of the shape of rewards. Raises ValueError on an unknown mode or shapes that do not fit.
    """
    if mode not in MODES or not eps >= 0:
        raise ValueError(f"found mode {mode!r}, eps {eps}; expected one of {', '.join(MODES)} and eps >= 0")
    if (rewards.ndim != 2 or group_ids is not None) and (group_ids is None or group_ids.shape != rewards.shape):
        raise ValueError(f"found rewards {tuple(rewards.shape)}, group_ids {None if group_ids is None else tuple(group_ids.shape)}"
                         "; expected (P, G) without ids, or (N,) and (N,)")
    r = rewards.detach().double().flatten()  # (N,)
    if group_ids is None:
        P, G = rewards.shape
        group = torch.arange(P, device=r.device).repeat_interleave(G)
    else:
        group = group_ids.unique(return_inverse=True)[1]
        P = int(group.max()) + 1 if len(group) else 0
    advantage = advantage_torch(r, group, P, mode, eps).float().view(rewards.shape)
    return (advantage, r.isnan().sum()) if return_nan else advantage


def advantage_torch(r, group, P, mode, eps):
    """r (N,) float64, group (N,) indices below P -> (N,) float64."""
    deviation_of = group if mode == "grpo" else torch.zeros_like(group)  # whose deviation divides: the group's or everyone's
    above_mean = centred(r, group, P)
    if mode == "dr_grpo":
        return above_mean
    spread = centred(r, deviation_of, P)
    valid = (~r.isnan()).double()
    variance = r.new_zeros(P).index_add(0, deviation_of, spread**2)                          # (P,)
    variance /= (r.new_zeros(P).index_add(0, deviation_of, valid) - 1).clamp_min(1)          # ddof 1
    return torch.where(above_mean == 0, 0, above_mean / (variance.sqrt()[deviation_of] + eps))  # 0 / 0 is 0


def centred(r, group, P):
    """r less its group's mean, 0 where r is NaN."""
    valid = ~r.isnan()
    low = r.new_full((P,), torch.inf).scatter_reduce(0, group, r.where(valid, torch.inf), "amin")
    r = torch.where(valid, r - low[group], 0)
    count = r.new_zeros(P).index_add(0, group, valid.double()).clamp_min(1)                  # (P,)
    return torch.where(valid, r - (r.new_zeros(P).index_add(0, group, r) / count)[group], 0)
