"""Which sections are in the weights? A section as the chain of thought has it, against itself with one word altered.

The share of alterations that are less likely than the truth, given the query alone and the chain up to the section:
about a half for a section that the model does not know, 1 for one that it has internalised. Answers may be right by
other ways; this says where the knowledge is. After KR-Test (arXiv 2601.03505).
"""

import re
from collections import defaultdict

import numpy as np

from data.clevr import ATTRIBUTES
from data.dataset import target
from data.referral import REACH

KNOWN = 0.9  # share of alterations from which a section counts as internalised


def stretches(item, policy):
    """{section: (start, end)} in the item's response: from the section's name to where the next one begins."""
    text, nodes = target(item), {node["id"]: node for node in policy["nodes"]}
    starts, at = [], 0
    for step in item["path"]:
        node = nodes[step["node"]]
        name, quote = rf"{re.escape(node['id'])}(?![0-9]|\.[0-9])", re.escape(node.get("quote", node["question"]))
        found = re.search(rf"{name}(?:(?!{name}).){{0,{REACH}}}?{quote}", text[at:])  # no mention nearer
        if not found:
            return {}  # a chain in words of its own
        starts.append(at + found.start())
        at += found.end()
    ends = [*starts[1:], text.rindex("</think>")]
    return {step["node"]: span for step, span in zip(item["path"], zip(starts, ends))}


def alterations(text, policy, own, rng, each=2):
    """The text of section `own` with one word altered: a value, or a name, to another of its kind."""
    kinds = [*ATTRIBUTES.values(), [node["id"] for node in policy["nodes"]], [leaf["id"] for leaf in policy["leaves"]]]
    found = []
    for kind in map(list, kinds):
        words = "|".join(map(re.escape, sorted(kind, key=len, reverse=True)))
        for match in re.finditer(rf"(?<![\w.])(?:{words})(?![0-9]|\.[0-9])", text[len(own) :]):
            others = [word for word in kind if word not in (match.group(), own)]
            start, end = len(own) + match.start(), len(own) + match.end()
            for k in rng.permutation(len(others))[:each].tolist():
                found.append(text[:start] + others[k] + text[end:])
    return found


def contrast(items, policies, likelihoods, per_section=4, seed=0):
    """{(policy, section): {"likelier": share of alterations less likely than the truth, "margin": nats, mean, "n"}}.

    items: with chains of thought and paths; likelihoods(item, texts) -> log p of each text as the start of a response;
    per_section: items that a section is tried on, at most.
    """
    margins, tried, rng = defaultdict(list), defaultdict(int), np.random.default_rng(seed)
    for item in items:
        if not (item.get("cot") and item.get("path")):
            continue
        policy, text = policies[item["policy"]], target(item)
        for section, (start, end) in stretches(item, policy).items():
            key = item["policy"], section
            altered = alterations(text[start:end], policy, section, rng)
            if tried[key] < per_section and altered:
                tried[key] += 1
                truth, *others = likelihoods(item, [text[:start] + part for part in (text[start:end], *altered)])
                margins[key] += [truth - other for other in others]
    share = lambda values: float(np.mean(np.array(values) > 0))
    return {
        key: {"likelier": share(values), "margin": float(np.mean(values)), "n": len(values)}
        for key, values in sorted(margins.items())
    }


def table(found, records, items, seen):
    """Rows of `contrast`'s findings, each with what else is known of its section: did SFT show it, are paths through it
    right? records: of evaluate.py, one per item; seen: {(policy, section)} of the training items, or None."""
    right = defaultdict(list)
    correct = {record["id"]: record["correct"] for record in records}
    for item in items:
        for step in item.get("path", []):
            right[item["policy"], step["node"]].append(correct[item["id"]])
    return [
        {
            "policy": key[0],
            "section": key[1],
            "stored": row["likelier"] >= KNOWN,
            **row,
            "shown": None if seen is None else key in seen,
            "accuracy": float(np.mean(right[key])),
        }
        for key, row in found.items()
    ]
