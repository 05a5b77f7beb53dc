"""Data sets as they lie on disk: policies.json and JSONL items, checked line by line, and as chat messages.

    policies = load_policies(folder)                      {name: policy}
    items = load_items(folder, "rl.jsonl", policies)      [item, ...]
    messages(item)                                        the prompt without its policy
    messages(item, policies[item["policy"]])              the prompt with its policy in front
    target(item)                                          the response to learn

An item's `kind` says how it is learned in VM-CPT: "applied" with the policy in front (the paper's form), "document" is
the policy alone, "section" and "response" ask without the policy. Other stages have no kinds.
"""

import json
import os

from data import InputError

IMAGE = "<image>"
KINDS = ("applied", "document", "section", "response")


def picture_path(folder, name, where):
    """The absolute path of a data set's picture; raises InputError (saying `where`) unless it is a file in the folder."""
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: picture {name!r} found, expected a file name")
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or os.path.commonpath([root, path]) != root:
        raise InputError(f"{where}: picture {name!r} lies outside the data folder, expected a path inside it")
    if not os.path.isfile(path):
        raise InputError(f"{where}: picture {name!r} is missing from {folder}")
    return path


def _need(entry, key, kind, where):
    """entry[key], or an InputError that says what stands there instead."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {type(entry).__name__} found, expected an object")
    if key not in entry:
        raise InputError(f"{where}: key {key!r} is missing, found {', '.join(sorted(map(str, entry)))[:200]}")
    if not isinstance(entry[key], kind):
        name = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise InputError(f"{where}: key {key!r} holds {type(entry[key]).__name__}, expected {name}")
    return entry[key]


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def _parse(text, where):
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None


def _read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a data folder made by python -m data.clevr_policy") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None


def load_policies(folder):
    """Read and check policies.json: {name: policy}, picture paths absolute.

    Raises InputError for anything that is not a tree: a dangling branch, a cycle, a section that two branches lead to
    or none, ids or names used twice, a number of <image> marks that differs from the number of pictures.
    """
    path = os.path.join(folder, "policies.json")
    entries = _parse(_read(path), path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of policies, found {type(entries).__name__} with nothing to use")
    policies = {}
    for k, entry in enumerate(entries):
        where = f"{path}: policy {k}"
        name = _need(entry, "name", str, where)
        where = f"{path}: policy {name!r}"
        if name in policies:
            raise InputError(f"{where} stands there twice, expected one policy of each name")
        text, images = _need(entry, "text", str, where), _need(entry, "images", list, where)
        if text.count(IMAGE) != len(images):
            raise InputError(f"{where}: {text.count(IMAGE)} {IMAGE} in the text, {len(images)} pictures in images")
        _check_tree(entry, where)
        policies[name] = {**entry, "images": [picture_path(folder, image, where) for image in images]}
    return policies


def _check_tree(policy, where):
    """Raise InputError unless the nodes form one tree under the root and every branch ends at a leaf."""
    nodes, ends = {}, set()
    for node in _need(policy, "nodes", list, where):
        key = _need(node, "id", str, f"{where}: a node")
        if key in nodes:
            raise InputError(f"{where}: node {key!r} stands there twice, expected one of each id")
        _need(node, "question", str, f"{where}: node {key!r}")
        _need(node, "program", list, f"{where}: node {key!r}")
        nodes[key] = _need(node, "branches", dict, f"{where}: node {key!r}")
    for leaf in _need(policy, "leaves", list, where):
        key = _need(leaf, "id", str, f"{where}: a leaf")
        _need(leaf, "response", str, f"{where}: leaf {key!r}")
        if key in nodes or key in ends:
            raise InputError(f"{where}: leaf {key!r} has an id used twice, expected one of each id")
        ends.add(key)
    if not nodes:  # a policy that is no tree, such as calling rules, has text only
        return
    root = _need(policy, "root", str, where)
    if root not in nodes:
        raise InputError(f"{where}: root {root!r} is none of its nodes")
    state, stack = {}, [(root, None)]
    while stack:  # depth first; "open" marks the way down to here
        key, parent = stack.pop()
        if parent == "leave":
            state[key] = "done"
            continue
        if state.get(key) == "open":
            raise InputError(f"{where}: node {key!r} leads back to itself, expected a tree")
        if state.get(key) == "done":
            raise InputError(f"{where}: node {key!r} is reached from two nodes, expected a tree")
        state[key] = "open"
        stack.append((key, "leave"))
        if not nodes[key]:
            raise InputError(f"{where}: node {key!r} has no branches")
        for answer, child in sorted(nodes[key].items()):
            if not isinstance(child, str) or child not in nodes and child not in ends:
                raise InputError(
                    f"{where}: node {key!r}, branch {answer!r} leads to {child!r}, no node or leaf of this policy"
                )
        for child in sorted({c for c in nodes[key].values() if c in nodes}):
            stack.append((child, key))
    lost = sorted(set(nodes) - set(state))
    if lost:
        raise InputError(f"{where}: node {lost[0]!r} is reached by no branch")


def load_items(folder, split_file, policies):
    """Read and check a JSONL split: a list of items, picture paths absolute.

    split_file: "cpt.jsonl", "sft.jsonl", "rl.jsonl" or "test.jsonl"; policies: what load_policies returned. Raises
    InputError naming file, line and key.
    """
    path = os.path.join(folder, split_file)
    items, seen = [], {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        item = _parse(line, where)
        key = _need(item, "id", str, where)
        if key in seen:
            raise InputError(f"{where}: id {key!r} found again, first in line {seen[key]}")
        seen[key] = number
        policy = _need(item, "policy", str, where)
        if policy not in policies:
            raise InputError(
                f"{where}: policy {policy!r} is not in policies.json, found there: {', '.join(policies)[:200]}"
            )
        kind = item.get("kind", "applied")
        if kind not in KINDS:
            raise InputError(f"{where}: kind {kind!r} found, expected one of {', '.join(KINDS)}")
        for text in ("question", "answer"):
            _need(item, text, str, where)
        if "cot" in item:
            _need(item, "cot", str, where)
        if kind != "document" and not item["question"].strip():
            raise InputError(f"{where}: key 'question' is empty")
        if kind != "document" and not item["answer"].strip():
            raise InputError(f"{where}: key 'answer' is empty")
        ids = {node["id"]: node["branches"] for node in policies[policy]["nodes"]}
        for step in item.get("path", []):
            node = _need(step, "node", str, f"{where}: key 'path'")
            if node not in ids:
                raise InputError(f"{where}: path names {node!r}, no section of {policy!r}")
            if _need(step, "answer", str, f"{where}: key 'path'") not in ids[node]:
                raise InputError(f"{where}: path answers {step['answer']!r} at {node!r}, which has no such branch")
        images = [picture_path(folder, image, where) for image in _need(item, "images", list, where)]
        items.append({**item, "images": images})
    if not items:
        raise InputError(f"{path}: no items, expected at least one line")
    return items


def messages(item, policy=None):
    """An item's prompt as chat messages, [{"role", "content"}]; with a policy, its text and pictures come first.

    item: as load_items gives it; policy: as load_policies gives it, or None for the prompt that a model with the
    policy internalised answers. Content parts are {"type": "text", "text"} and {"type": "image", "image": path}.
    """
    parts = []
    if policy is not None:
        pieces = policy["text"].split(IMAGE)
        for k, piece in enumerate(pieces):
            if piece:
                parts.append({"type": "text", "text": piece})
            if k < len(policy["images"]):
                parts.append({"type": "image", "image": policy["images"][k]})
        if item.get("kind") == "document":
            return [{"role": "user", "content": parts}]
        parts.append({"type": "text", "text": "\n\n"})
    parts += [{"type": "image", "image": image} for image in item["images"]]
    parts.append({"type": "text", "text": item["question"]})
    return [{"role": "user", "content": parts}]


def target(item, cot=True):
    """The response to learn: the thoughts in <think></think>, then the answer in \\boxed{}; without cot the answer alone.

    A document has no response (""), and an item with `cot` absent has the answer alone.
    """
    if item.get("kind") == "document":
        return ""
    if item.get("kind") in ("section", "response"):
        return item["answer"]
    answer = "\\boxed{%s}" % item["answer"]
    return f"<think>{item['cot']}</think>{answer}" if cot and item.get("cot") else answer
