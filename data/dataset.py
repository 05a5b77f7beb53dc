"""Data sets as they lie on disk: policies.json and JSONL items, checked line by line, and as chat messages.

    policies = load_policies(folder)                      {name: policy}
    items = load_items(folder, "rl.jsonl", policies)      [item, ...]
    messages(item)                                        the prompt without its policy
    messages(item, policies.get(item["policy"]))          the prompt with its policy in it
    target(item)                                          the response to learn

What a folder holds is in data/OWN.md. An item's `kind` says how it is learned in VM-CPT: "applied" with the policy in
front (the paper's form), "document" is the policy alone, "section" and "response" ask without the policy. Other stages
have no kinds. Pictures are read from the data folder, or from `media`, another folder that the user names.
"""

import json
import math
import os
from collections import Counter

from data import InputError

IMAGE = "<image>"
KINDS = ("applied", "document", "section", "response")
ROLES = ("system", "user", "assistant")
PLACES = ("user", "system")  # where a policy stands: first in the first user turn, or first in the system prompt
# What an item may hold; the second line is for the tools of ClevrPolicy and GTAPolicy. Other keys are for rewards of
# the user's own, and are named by data.check, as a misspelt one has no effect.
KEYS = {"id", "policy", "images", "question", "answer", "cot", "kind", "system", "messages", "boxed", "_at"}
KEYS |= {"scene", "path", "old_answer", "profile", "history", "mode", "rules", "function", "goal", "facts", "calls"}


def clip(text, most=80):
    """A text for an error line: escaped, and cut where it is long."""
    text = repr(text)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def picture_path(folder, name, where, media=""):
    """The absolute path of a data set's picture.

    Raises InputError (saying `where`) unless it is a file in the folder, or in `media` where one is given.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{where}: picture {clip(name)} found, expected a file name")
    roots, inside = [os.path.realpath(root) for root in (folder, media) if root], False
    for root in roots:
        path = os.path.realpath(os.path.join(root, name))
        within = [r for r in roots if os.path.commonpath([r, path]) == r]
        if within and os.path.isfile(path):
            return path
        inside = inside or bool(within)
    if not inside:
        allowed = "a path inside it (or --media, the folder that pictures may also be read from)"
        raise InputError(f"{where}: picture {clip(name)} lies outside the data folder, expected {allowed}")
    raise InputError(
        f"{where}: picture {clip(name)} is missing from {' and '.join(map(str, filter(None, (folder, media))))}"
    )


def need(entry, key, kind, where, default=None):
    """entry[key] of a kind, or an InputError that says what stands there instead; an absent key has the default."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {type(entry).__name__} found, expected an object")
    if key not in entry and default is not None:
        return default
    if key not in entry:
        hint = (
            "; python -m data.own reads other formats" if {"conversations", "problem", "prompt"} & entry.keys() else ""
        )
        found = ", ".join(sorted(map(str, entry)))[:200]
        raise InputError(f"{where}: key {key!r} is missing, found {found or 'nothing'}{hint}")
    if not isinstance(entry[key], kind):
        name = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise InputError(f"{where}: key {key!r} holds {type(entry[key]).__name__}, expected {name}")
    return entry[key]


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


def finite(text):
    """A number with a point or an exponent; 1e999 would be infinity."""
    return value if math.isfinite(value := float(text)) else no_constant(text)


def parse_json(text, where):
    """The value of a JSON text; raises InputError for what is none, NaN and Infinity, and halves of characters."""
    try:
        value = json.loads(text, parse_constant=no_constant, parse_float=finite)
        if "\\ud" in text.lower():  # an escape may spell half of a character, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: half of a character (\\u{ord(error.object[error.start]):x}), expected whole ones"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None


def _read(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        made = "a data folder as python -m data.own makes it of a policy and a log"
        raise InputError(f"{path}: no such file, expected {made} (or data.clevr_policy, data.gta_policy)") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None


# -- 1. policies -------------------------------------------------------------------------------------------------------


def load_policies(folder, media=""):
    """Read and check policies.json: {name: policy}, picture paths absolute.

    A policy needs a `name` and a `text`; `images` are those of the <image> marks in the text, `place` is where the
    policy stands in a prompt (PLACES), `sections` its parts [{"id", "section"}] to be recited. One made by
    data.clevr_policy is a tree besides, of `nodes`, `leaves` and `root`. media: where pictures may also lie. Raises
    InputError for a number of <image> marks that differs from the number of pictures, and for a tree that is none: a
    dangling branch, a cycle, a section that two branches lead to or none, ids or names used twice.
    """
    path = os.path.join(folder, "policies.json")
    entries = parse_json(_read(path), path)
    if not isinstance(entries, list):
        expected = 'expected a list of policies, [{"name": ..., "text": ...}]; [] where no item has one'
        raise InputError(f"{path}: {expected}, found {type(entries).__name__}")
    policies = {}
    for k, entry in enumerate(entries):
        where = f"{path}: policy {k}"
        name = need(entry, "name", str, where)
        where = f"{path}: policy {clip(name)}"
        if name in policies or not name:
            raise InputError(
                f"{where} stands there twice, expected one policy of each name" if name else f"{where}: no name"
            )
        text, images = need(entry, "text", str, where), need(entry, "images", list, where, [])
        if text.count(IMAGE) != len(images):
            raise InputError(f"{where}: {text.count(IMAGE)} {IMAGE} in the text, {len(images)} pictures in images")
        if entry.get("place", "user") not in PLACES:
            raise InputError(f"{where}: place {clip(entry['place'])} found, expected {' or '.join(PLACES)}")
        entry = {"nodes": [], "leaves": [], **entry}
        _check_tree(entry, where)
        for part in need(entry, "sections", list, where, []):
            need(part, "id", str, f"{where}: a section"), need(part, "section", str, f"{where}: a section")
        policies[name] = {**entry, "images": [picture_path(folder, image, where, media) for image in images]}
    return policies


def _check_tree(policy, where):
    """Raise InputError unless the nodes form one tree under the root and every branch ends at a leaf."""
    nodes, ends = {}, set()
    for node in need(policy, "nodes", list, where):
        key = need(node, "id", str, f"{where}: a node")
        if key in nodes:
            raise InputError(f"{where}: node {key!r} stands there twice, expected one of each id")
        need(node, "question", str, f"{where}: node {key!r}")
        need(node, "program", list, f"{where}: node {key!r}")
        nodes[key] = need(node, "branches", dict, f"{where}: node {key!r}")
    for leaf in need(policy, "leaves", list, where):
        key = need(leaf, "id", str, f"{where}: a leaf")
        need(leaf, "response", str, f"{where}: leaf {key!r}")
        if key in nodes or key in ends:
            raise InputError(f"{where}: leaf {key!r} has an id used twice, expected one of each id")
        ends.add(key)
    if not nodes:  # a policy that is no tree, such as calling rules, has text only
        return
    root = need(policy, "root", str, where)
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


# -- 2. items ----------------------------------------------------------------------------------------------------------


def load_items(folder, split_file, policies, media=""):
    """Read and check a JSONL split: a list of items, picture paths absolute.

    split_file: "cpt.jsonl", "sft.jsonl", "rl.jsonl" or "test.jsonl"; policies: what load_policies returned; media:
    where pictures may also lie. An item without a policy has "" there; that of a conversation, `messages`, has its last
    user turn as `question`; `_at` is the file and line that it stands in. Raises InputError naming file, line and key.
    """
    path = os.path.join(folder, split_file)
    items, seen = [], {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        item = check_item(parse_json(line, where), policies, where)
        if item["id"] in seen:
            raise InputError(f"{where}: id {clip(item['id'])} found again, first in line {seen[item['id']]}")
        seen[item["id"]] = number
        item["images"] = [picture_path(folder, image, where, media) for image in item["images"]]
        items.append({**item, "_at": f"{split_file}:{number}"})
    if not items:
        raise InputError(f"{path}: no items, expected at least one line")
    return items


def check_item(item, policies, where):
    """An item as load_items gives it, but for its pictures, which stay as they are; raises InputError."""
    need(item, "id", str, where)
    policy = need(item, "policy", (str, type(None)), where, "") or ""
    if policy and policy not in policies:
        found = ", ".join(policies)[:200] or "none"
        raise InputError(f"{where}: policy {clip(policy)} is not in policies.json, found there: {found}")
    kind = item.get("kind", "applied")
    if kind not in KINDS:
        raise InputError(f"{where}: kind {clip(kind)} found, expected one of {', '.join(KINDS)}")
    item = {**item, "policy": policy, "images": need(item, "images", list, where, [])}
    for key, type_ in {"cot": str, "system": str, "boxed": bool}.items():
        need(item, key, type_, where, type_())
    if "messages" in item:
        item["question"] = _check_turns(item, where)
    for key in ("question", "answer"):
        if not need(item, key, str, where).strip() and kind != "document":
            raise InputError(f"{where}: key {key!r} is empty")
    marks = sum(text.count(IMAGE) for _, text in turns(item))
    if marks not in (0, len(item["images"])):
        raise InputError(f"{where}: {marks} {IMAGE} in the text, {len(item['images'])} pictures in images")
    nodes = policies[policy]["nodes"] if policy else []
    branches = {node["id"]: node["branches"] for node in nodes}
    for step in item.get("path", []):
        node = need(step, "node", str, f"{where}: key 'path'")
        if node not in branches:
            raise InputError(f"{where}: path names {clip(node)}, no section of {clip(policy)}")
        if need(step, "answer", str, f"{where}: key 'path'") not in branches[node]:
            raise InputError(f"{where}: path answers {clip(step['answer'])} at {node!r}, which has no such branch")
    return item


def _check_turns(item, where):
    """The last turn's text of an item's `messages`, [{"role", "content": text}]."""
    roles = []
    for k, turn in enumerate(need(item, "messages", list, where)):
        here = f"{where}: turn {k} of messages"
        roles.append(need(turn, "role", str, here))
        if not need(turn, "content", str, here).strip():
            raise InputError(f"{here}: key 'content' is empty")
    if not roles or roles[-1] != "user":
        ends = f"ends with {clip(roles[-1])}" if roles else "is empty"
        raise InputError(f"{where}: messages {ends}, expected the user's turn (what is learned is the key 'answer')")
    if wrong := [role for k, role in enumerate(roles) if role not in ROLES[bool(k or "system" in item) :]]:
        raise InputError(
            f"{where}: messages hold a turn of {clip(wrong[0])}, expected one system prompt, then user, assistant"
        )
    text = item["messages"][-1]["content"]
    if item.get("question", text) != text:
        raise InputError(f"{where}: both 'question' and 'messages' found, expected one of them")
    return text


def unknown_keys(items):
    """How often each key stands in the items that nothing here reads: {key: count}."""
    return dict(Counter(key for item in items for key in item if key not in KEYS).most_common())


# -- 3. as a chat ------------------------------------------------------------------------------------------------------


def turns(item):
    """An item's prompt as [(role, text with <image> marks)], its system prompt first."""
    system = [("system", item["system"])] if item.get("system") else []
    earlier = [(turn["role"], turn["content"]) for turn in item.get("messages", [])[:-1]]
    return [*system, *earlier, ("user", item["question"])]


def placed(text, pictures):
    """A text as parts of a chat message, each <image> replaced by the next of `pictures`, an iterator."""
    head, *rest = text.split(IMAGE)
    parts = [{"type": "text", "text": head}]
    for piece in rest:
        parts += [{"type": "image", "image": next(pictures)}, {"type": "text", "text": piece}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def messages(item, policy=None):
    """An item's prompt as chat messages, [{"role", "content"}]; with a policy, its text and pictures in it.

    item: as load_items gives it; policy: as load_policies gives it, or None for the prompt that a model with the
    policy internalised answers. Content parts are {"type": "text", "text"} and {"type": "image", "image": path}. The
    policy comes first in the first user turn, or where its `place` is "system" first in the system prompt. Pictures
    stand where the text has an <image>; where it has none, before the text of the first user turn.
    """
    pictures, said = iter(item["images"]), turns(item)
    chat = [{"role": role, "content": placed(text, pictures)} for role, text in said]
    first = next(turn for turn in chat if turn["role"] == "user")
    first["content"] = [*({"type": "image", "image": image} for image in pictures), *first["content"]]
    if policy is None:
        return chat
    front, place = placed(policy["text"], iter(policy["images"])), policy.get("place", "user")
    if item.get("kind") == "document":
        return [{"role": place, "content": front}]
    if place == "system" and chat[0]["role"] != "system":
        return [{"role": "system", "content": front}, *chat]
    into = chat[0] if place == "system" else first
    into["content"] = [*front, {"type": "text", "text": "\n\n"}, *into["content"]]
    return chat


def target(item, cot=True):
    """The response to learn: the thoughts in <think></think>, then the answer in \\boxed{}; without cot the answer
    alone.

    A document has no response (""), and an item with `cot` absent has the answer alone. Where `boxed` is False the
    answer is free text and stands there as it is.
    """
    if item.get("kind") == "document":
        return ""
    if item.get("kind") in ("section", "response"):
        return item["answer"]
    answer = item["answer"] if item.get("boxed") is False else "\\boxed{%s}" % item["answer"]
    return f"<think>{item['cot']}</think>{answer}" if cot and item.get("cot") else answer
