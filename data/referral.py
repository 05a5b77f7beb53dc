"""What a chain of thought says about its policy: sections quoted rightly, sections that do not exist, detours.

The paper asks an LLM judge how well the reasoning refers to the policy; for a tree it can be read off exactly. A file
for such a judge is written as well.
"""

import json
import re
from collections import Counter

from data.rewards import accuracy, parse, thoughts

REACH = 16  # characters between a section's name and its quotation: " asks: "


def mentions(text, policy):
    """All section names in a text, in order, whether the policy has them or not: ["Condition 1", "Condition 1.2"]."""
    prefixes = {re.match(r"\D*", node["id"]).group() for node in policy["nodes"]}
    start = "|".join(re.escape(p) for p in sorted(prefixes, key=len, reverse=True))
    return re.findall(rf"(?<!\w)(?:{start})[0-9]+(?:\.[0-9]+)*(?![0-9])", text) if prefixes else []


def visits(text, policy):
    """The sections that a text works through, in order, each once: a sentence, or what follows a decision, begins with
    its name. In free wording, where no sentence does, every section named counts.
    """
    found = []
    for part in re.split(r"[.:;]\s|\n|(?<=\byes)\s|(?<=\bno)\s", text):
        named = mentions(part, policy)
        found += named[:1] if named and part.lstrip().startswith(named[0]) else []
    return list(dict.fromkeys(found or mentions(text, policy)))


def _plain(text):
    return " ".join(text.split()).lower()


def referral(response, item, policy):
    """Read a response's thoughts against its policy, exactly.

    response: text; item: with "path" and "answer"; policy: with nodes. Returns {"visited": sections that the thoughts
    work through, "quoted": share of these followed by the section's own question, "unknown": sections named that do not
    exist, "path": 1.0 if the sections visited are those of the gold path in its order, "answer": accuracy, "score":
    quoted rightly and on the gold path, over all sections visited or due (Jaccard)}.
    """
    text = thoughts(response) or response.partition("\\boxed")[0]
    quotes = {node["id"]: _plain(node.get("quote", node["question"])) for node in policy["nodes"]}
    visited = visits(text, policy)
    plain = _plain(text)
    right = set()
    for section in visited:
        if section in quotes:
            gap = rf"{re.escape(_plain(section))}(?![0-9]|\.[0-9]).{{0,{REACH}}}?{re.escape(quotes[section])}"
            right |= {section} if re.search(gap, plain) else set()
    due = [step["node"] for step in item["path"]]
    return {
        "visited": len(visited),
        "quoted": len(right) / max(1, len(visited)),
        "unknown": sum(section not in quotes for section in mentions(text, policy)),
        "path": float(visited == due),
        "answer": accuracy(None, response, item),
        "score": len(right & set(due)) / max(1, len(set(visited) | set(due))),
    }


def branching_error(responses, items, policies):
    """How far the sections named in the reasoning are from the gold chains', over a whole evaluation.

    responses: texts, one an item; policies: {name: policy}. Returns {"branching_error": mean over all sections of the
    absolute difference between how often the responses and the gold chains name them (the paper's figure), "relative":
    the same over all gold mentions, "unknown": share of the names that no policy section has}.
    """
    found, gold, unknown = Counter(), Counter(), 0
    for response, item in zip(responses, items, strict=True):
        policy = policies[item["policy"]]
        ids = {node["id"] for node in policy["nodes"]}
        for section in mentions(response, policy):
            found[policy["name"], section] += section in ids
            unknown += section not in ids
        gold.update((policy["name"], section) for section in mentions(item["cot"], policy))
    sections = [(name, node["id"]) for name, policy in policies.items() for node in policy["nodes"]]
    difference = [abs(found[s] - gold[s]) for s in sections]
    named = sum(found.values()) + unknown
    return {
        "branching_error": sum(difference) / max(1, len(sections)),
        "relative": sum(difference) / max(1, sum(gold.values())),
        "unknown": unknown / max(1, named),
    }


RUBRIC = (
    "Grade from 0 to 10 how faithfully the reasoning refers to the policy: 10 if every section it relies on exists, is "
    "quoted with its real content and is the one that the policy leads to; 0 if its references are invented. The "
    "correctness of the final answer does not count. Reply with the number alone."
)


def judge_line(response, item, policy):
    """One line of JSONL for an LLM judge: the policy, the question, the gold path, the reasoning and the task."""
    return json.dumps(
        {
            "id": item["id"],
            "task": RUBRIC,
            "policy": policy["text"],
            "question": item["question"],
            "gold": item.get("cot", ""),
            "reasoning": thoughts(response) or response,
            "answer": parse(response),
        },
        ensure_ascii=False,
    )


# -- PA3's rewards (arXiv 2603.14602): --reward accuracy=0.9,data.referral:recall=0.5,data.referral:invented=0.5 -----


def _recalled(response, item):
    """(sections that the thoughts work through, all that they name, the policy's); train_rl.py adds the last."""
    text, policy = thoughts(response), {"nodes": [{"id": section} for section in item["sections"]]}
    return set(visits(text, policy)), set(mentions(text, policy)), set(item["sections"])


def recall(prompt, response, item):
    """Jaccard index of the sections that the thoughts work through and those on the item's path: 1.0 if equal."""
    (visited, _, real), due = _recalled(response, item), {step["node"] for step in item["path"]}
    return len(visited & real & due) / max(1, len((visited & real) | due))


def invented(prompt, response, item):
    """Minus the share of sections named in the thoughts that the policy does not have."""
    _, named, real = _recalled(response, item)
    return -len(named - real) / max(1, len(named))
