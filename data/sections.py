"""Items about single sections of a policy: to learn them (VM-CPT of the kind "section"), and to ask for them.

Continual pre-training on restatements, questions about a section and simulated cases is CAP-CPT's idea (arXiv
2510.11588). Reciting a section on request tells whether a policy is stored in words, apart from whether it is followed.
"""

from data.clevr import execute, word
from data.prose import Prose
from data.rewards import shared_words


def _item(policy, number, question, answer):
    return {
        "id": f"{policy['name']}-section-{number}",
        "policy": policy["name"],
        "kind": "section",
        "images": [],
        "question": question,
        "answer": answer,
    }


def section_items(policy, style, rng, scenes=()):
    """Every section restated, every branch asked for, and a simulated case for each scene given, in the style's words.

    Returns items of the kind "section", whose answer is the whole response. Scenes whose conditions speak of places
    have no case: words do not say where things stand. A style without words for a question (None) has no such items.
    """
    out = []
    children = {node["id"]: node for node in policy["nodes"]}

    def add(question, answer):
        if question:
            out.append(_item(policy, len(out), question, answer))

    for node in policy["nodes"]:
        add(style.restate(policy, node, rng), node["section"])
        for answer, child in node["branches"].items():
            goes = f"Go on to {child}." if child in children else f"The response is {child}."
            add(style.lead(policy, node, answer, rng), goes)
    for scene in scenes:
        path, key = [], policy["root"]
        while key in children:
            program = children[key]["program"]
            if any(step["type"] == "relate" for step in program):
                break
            path.append({"node": key, "answer": word(execute(program, scene))})
            key = children[key]["branches"][path[-1]["answer"]]
        else:
            add(style.case(policy, path, scene, rng), f"<think>{style.chain(policy, path)}</think>\\boxed{{{key}}}")
    return out


def recitation_items(policies):
    """One question a section, "What does Condition 1.2 of policy L4-Beverga say?", without the policy in the prompt.

    policies: {name: policy} as load_policies gives them; a section's own "recite" is the question where it has one. The
    answer is the section in words.
    """
    asked = lambda policy, node: node.get("recite") or Prose.RESTATE[0].format(node["id"], policy["name"])
    return [
        _item(policy, f"recite-{k}", asked(policy, node), node["section"])
        for policy in policies.values()
        for k, node in enumerate([*policy["nodes"], *policy.get("sections", [])])
        if "section" in node
    ]


def recitation(response, item):
    """How well a section was recited: {"exact": word for word, "f1": token F1}; thoughts before the answer are
    dropped."""
    said = response.rpartition("</think>")[2]
    return {"exact": float(said.split() == item["answer"].split()), "f1": shared_words(said, item["answer"])}
