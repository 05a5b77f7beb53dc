"""kernels/advantage.py against the formulas written out in float64, and the cases in which formulas break.

The file runs twice, like test_logprob.py: as it is, and from its last test with the Triton kernel interpreted.
"""

import os

import pytest
import torch
from again import interpreted

from kernels.advantage import group_advantage

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NAN = float("nan")


def rewards(*values):
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_three_modes_are_their_formulas(eps):
    torch.manual_seed(0)
    r = torch.randint(0, 3, (6, 40)).double() / 2  # longer than a block of the kernel
    r[2:4] += 0.25
    mean = r.mean(1, keepdim=True)
    expected = {
        "grpo": (r - mean) / (r.std(1, keepdim=True) + eps),
        "dr_grpo": r - mean,
        "batch": (r - mean) / (r.std() + eps),
    }
    for mode, right in expected.items():
        found = group_advantage(r.float().to(DEVICE), mode=mode, eps=eps)
        assert found.dtype == torch.float32 and found.shape == (6, 40)
        torch.testing.assert_close(found, right.float().to(DEVICE), atol=1e-6, rtol=1e-6)


def test_ids_give_what_the_table_gives_in_any_order():
    """Ids are names, not positions: any integers, shuffled, groups of any size."""
    torch.manual_seed(1)
    r, ids = torch.rand(5, 8, device=DEVICE), torch.tensor([7, -3, 2**40, 0, 5], device=DEVICE).repeat_interleave(8)
    order = torch.randperm(40, device=DEVICE)
    for mode in "grpo", "dr_grpo", "batch":
        flat = group_advantage(r.flatten()[order], ids[order], mode=mode)
        torch.testing.assert_close(flat, group_advantage(r, mode=mode).flatten()[order], atol=1e-6, rtol=1e-6)
    uneven = group_advantage(rewards(1.0, 0.0, 5.0, 0.0), torch.tensor([1, 1, 9, 1], device=DEVICE), mode="dr_grpo")
    torch.testing.assert_close(uneven, rewards(2 / 3, -1 / 3, 0.0, -1 / 3))


@pytest.mark.parametrize("mode", ["grpo", "dr_grpo", "batch"])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_nothing_to_compare_gives_exactly_nothing(mode, eps):
    """A lone member and equal rewards (the mean of six 0.1 is not 0.1) give 0, not 0/0 and not 1e-17 / eps."""
    r = torch.tensor([0.1] * 6 + [3.0], dtype=torch.float64, device=DEVICE)
    ids = torch.tensor([0] * 6 + [1], device=DEVICE)
    assert not group_advantage(r, ids, mode=mode, eps=eps).any()
    assert not group_advantage(r[:6][None], mode=mode, eps=eps).any()


@pytest.mark.parametrize("mode", ["grpo", "dr_grpo", "batch"])
def test_a_large_common_offset_changes_nothing(mode):
    """E[r^2] - E[r]^2 in fp32 would be negative at 1e6; every reward here is exact in fp32."""
    r = rewards([1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(group_advantage(r + 4e6, mode=mode), group_advantage(r, mode=mode), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(group_advantage(r - 4e6, mode=mode), group_advantage(r, mode=mode), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["grpo", "dr_grpo", "batch"])
def test_nan_rewards_are_left_out_and_counted(mode):
    """A judge that failed on one response says nothing about its siblings."""
    with_nan, without = rewards(1.0, NAN, 0.0, 0.0, NAN, NAN, NAN, 2.0), rewards(1.0, 0.0, 0.0, 2.0)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2], device=DEVICE)  # all of group 1, all but one of group 2
    valid = ~with_nan.isnan()
    found, count = group_advantage(with_nan, ids, mode=mode, return_nan=True)
    torch.testing.assert_close(found[valid], group_advantage(without, ids[valid], mode=mode), atol=1e-6, rtol=1e-6)
    assert count == 4 and not found[~valid].any()


def test_policy_aware_responses_count_as_members():
    """PolicyRollout: with G + K in the group, one policy-aware success makes the failures' advantage negative."""
    without_policy = rewards([0.0, 0.0, 0.0, 0.0])
    assert not group_advantage(without_policy).any()
    both = group_advantage(torch.cat([without_policy, rewards([1.0, 0.0, 0.0, 0.0])], 1))
    assert (both[0, :4] < 0).all() and both[0, 4] > 0 and abs(both.sum()) < 1e-5


def test_inputs_stay_and_carry_no_gradient():
    r = rewards([1.0, 0.0, NAN]).requires_grad_()
    before = r.detach().clone()
    assert not group_advantage(r).requires_grad
    torch.testing.assert_close(r.detach(), before, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64, torch.bool])
def test_any_number_is_a_reward(dtype):
    torch.testing.assert_close(
        group_advantage(rewards([1.0, 0.0, 1.0]).to(dtype)), group_advantage(rewards([1.0, 0.0, 1.0]))
    )


def test_empty_batches():
    assert group_advantage(torch.zeros(0, 4, device=DEVICE)).shape == (0, 4)
    assert group_advantage(torch.zeros(3, 0, device=DEVICE)).shape == (3, 0)
    assert group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rewards=torch.zeros(4)), r"rewards \(4,\), group_ids None"),
        (dict(rewards=torch.zeros(4), group_ids=torch.zeros(3, dtype=torch.int64)), r"group_ids \(3,\)"),
        (
            dict(rewards=torch.zeros(2, 2), group_ids=torch.zeros(2, 2, dtype=torch.int64)),
            r"expected \(Q, G\) without ids",
        ),
        (dict(rewards=torch.zeros(2, 2), mode="gae"), "'gae'.*grpo, dr_grpo, batch"),
        (dict(rewards=torch.zeros(2, 2), eps=-1.0), "eps -1.0"),
    ],
)
def test_says_what_it_found_and_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantage(**arguments)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="interpreted where no compiled kernel was tested")
def test_this_file_again_with_the_kernel_interpreted():
    interpreted(__file__)
