"""Reward functions of a user, good and bad, as the tests of RL name them: FILE.py:function."""

calls = [0]


def vowels(prompt, response, item):
    return sum(response.count(v) for v in "aeiouAEIOU") / max(len(response), 1)


def exact(prompt, response, item):
    return float(response == item["answer"])


def raises_sometimes(prompt, response, item):
    calls[0] += 1
    if calls[0] % 50 == 0:
        raise ValueError("a bug in somebody's reward")
    return vowels(prompt, response, item)


def hangs_at_times(prompt, response, item):
    code = sum(map(ord, response))
    while code % 29 == 5:
        try:
            sum(range(1000))
        except BaseException:  # swallows everything, as some do
            pass
    return float("nan") if code % 29 == 6 else vowels(prompt, response, item)


def mostly_raises(prompt, response, item):
    calls[0] += 1
    assert calls[0] < 20 or calls[0] % 5 < 2
    return 1.0


def never(prompt, response, item):
    return float("nan")
