"""A policy from a document, text or Markdown: its sections, its pictures, and items of VM-CPT about them.

policy, sizes = read_policy("POLICY.md", "returns", "user", [], store)      an entry of policies.json
for item in cpt_items(policy, sft_items, rng): ...                          of every kind that there is
"""

import os
import re
from collections import Counter
from urllib.parse import unquote

from data import InputError
from data.dataset import IMAGE, clip
from data.formats import source
from data.prose import Prose

HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
NUMBERED = re.compile(  # "1. ", "2) ", "1.1 ", "**3.** ", "Rule 4: ", "§ 5 "
    r" {0,3}(?:\*\*)?(?:(?:rule|section|article|case|step|§)\s*(\d+(?:\.\d+)*)[.):]?|(\d+(?:\.\d+)+)[.)]?|(\d+)[.)])"
    r"(?:\*\*)?:?[ \t]+\S",
    re.I,
)
FENCE = re.compile(r" {0,3}(```|~~~)")  # around code
POINT = re.compile(r"^(?=[-*+•–] +\S)", re.M)
PICTURE = re.compile(
    r"!\[(?P<alt>[^\]]*)\]\(\s*(?:<(?P<spaced>[^<>\n]+)>|(?P<path>(?:[^()\s<>]|\([^()\s]*\))+))"  # ![alt](path
    r"(?:\s+[\"'][^)]*)?\s*\)"  # "title")
    r"|!\[(?P<words>[^\]]*)\]\[(?P<key>[^\]]*)\]"  # ![alt][key], with [key]: path elsewhere
    r"|<img\b[^>]*?\bsrc\s*=\s*(?:[\"'](?P<src>[^\"']+)[\"']|(?P<bare>[^\s\"'>]+))[^>]*>"
    r"|<image>",
    re.I,
)


def sections(text):
    """The sections of a policy: [{"id", "section"}], its headings and numbered rules, each with the text up to the
    next.

    A heading without text of its own is no section. Numbers that begin anew under another heading are named with it. A
    text without headings and numbers is split at its bullet points, or at its empty lines.
    """
    parts, heading, fence, depth = [["", "", []]], "", "", 0  # [heading, number, lines]
    for line in text.split("\n"):
        if (mark := FENCE.match(line)) and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        head, number = (None, None) if fence else (HEADING.match(line), NUMBERED.match(line))
        indent = len(line) - len(line.lstrip())
        if head:
            heading = head.group(2).strip("*_ ")
            parts.append([heading, "", [line]])
        elif number and not (parts[-1][1] and indent > depth):  # what is numbered within a rule is part of it
            depth = indent
            parts.append([heading, next(filter(None, number.groups())), [line]])
        else:
            parts[-1][2].append(line)
    found = [
        (head, number, "\n".join(lines).strip())
        for head, number, lines in parts
        if number or head and "".join(lines[1:]).strip()
    ]
    if not found:
        points = [block.strip() for block in POINT.split(text) if POINT.match(block)]
        name, blocks = "point", points
        if len(points) < 2:
            name, blocks = "paragraph", [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
        blocks = blocks if len(blocks) > 1 else []
        return [{"id": f"{name} {k}", "section": block} for k, block in enumerate(blocks, 1)]
    often, used, out = Counter(number for _, number, _ in found if number), Counter(), []
    for head, number, body in found:
        under = f"{head}, " if head and often[number] > 1 else ""
        name = f"{under}rule {number}" if number else head
        used[name] += 1
        out.append({"id": name if used[name] == 1 else f"{name} ({used[name]})", "section": body})
    return out


def read_policy(path, name, place, extra, store):
    """(policy for policies.json, sizes of its pictures) from a file of text or Markdown; pictures go into the store.

    place: where it stands in a prompt (data.dataset.PLACES); extra: picture files of the bare <image> marks, in order.
    In the sections' texts a picture's alternative text has its place, as they are recited in words; `shown` says which
    pictures stand there.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read().strip()
    except FileNotFoundError:
        raise InputError(f"--policy {path}: no such file, expected text or Markdown") from None
    except UnicodeDecodeError:
        raise InputError(f"--policy {path}: not UTF-8, expected text or Markdown") from None
    if not text:
        raise InputError(f"--policy {path}: the file is empty, expected text or Markdown")
    keys = {key.lower(): target for key, target in re.findall(r"^ {0,3}\[([^\]]+)\]:\s*<?([^\s>]+)>?", text, re.M)}
    root, extra, images, sizes, alts = os.path.dirname(os.path.abspath(path)), list(extra), [], [], []

    def mark(found):
        file = found["path"] or found["spaced"] or found["src"] or found["bare"]
        if found["key"] is not None:
            file = keys.get((found["key"] or found["words"]).lower())
            if file is None:
                raise InputError(f"--policy {path}: picture {clip(found.group())} names no file")
        if file is None and not extra:
            raise InputError(
                f"--policy {path}: {IMAGE} without a file, expected --policy-image FILE for each, or ![](FILE)"
            )
        elif file and not os.path.exists(os.path.join(root, file)):
            file = file if file.startswith("data:") else unquote(file)  # my%20box.png
        picture, _, size = store.add(source(file or extra.pop(0), [root], f"--policy {path}"), f"--policy {path}")
        images.append(picture), sizes.append(size)
        alts.append((found["alt"] or found["words"] or "").strip() or "a picture")
        return IMAGE

    text = PICTURE.sub(mark, text)
    if extra:
        raise InputError(f"--policy-image {extra[0]}: found no {IMAGE} for it in {path}")
    parts = sections(text)
    where = [text.find(part["section"]) for part in parts]
    for part, start in zip(parts, where):
        first = text.count(IMAGE, 0, start)
        part["shown"] = [images[first + k] for k in range(part["section"].count(IMAGE))]
        rest = iter(alts[first:])
        part["section"] = re.sub(IMAGE, lambda _: f"[{next(rest)}]", part["section"])
    entry = {"name": name, "text": text, "images": images, "sections": parts}
    return (entry if place == "user" else {**entry, "place": place}), sizes


def named(text, policy):
    """The sections of a policy that a chain of thought names, in the policy's order."""
    here = lambda part: re.search(rf"(?<!\w){re.escape(part['id'])}(?!\w|\.\d)", text, re.I)
    return [part for part in policy["sections"] if here(part)]


def cpt_items(policy, items, rng):
    """VM-CPT items of one policy around its SFT items, as data.clevr_policy makes them of a tree: every kind
    there is."""
    blank = {"policy": policy["name"], "images": [], "question": "", "answer": ""}
    for item in items:
        yield {**item, "id": f"{item['id']}-applied", "kind": "applied"}
        parts = named(item.get("cot", ""), policy)
        if parts:
            said = [parts[k]["section"] for k in rng.permutation(len(parts)).tolist()]
            answer = f"<think>{' '.join(said)}</think>"
            yield {**item, "id": f"{item['id']}-response", "kind": "response", "answer": answer, "cot": ""}
    for k in range(max(1, len(items) // 10)):
        yield {**blank, "id": f"{policy['name']}-document-{k}", "kind": "document"}
    for k, part in enumerate(policy["sections"]):
        start = " ".join(re.sub(r"^\W*(\d+(\.\d+)*[.):]?\s+)?", "", part["section"]).split()[:8])
        asked = [(wording.format(part["id"], policy["name"]), part["section"], []) for wording in Prose.RESTATE]
        asked.append((f"Which part of policy {policy['name']} has the words “{start} ...”?", part["id"], []))
        for image in part["shown"]:
            asked.append((f"{IMAGE}\nWhere does policy {policy['name']} show this?", part["id"], [image]))
        for j, (question, answer, images) in enumerate(asked):
            asks = {"question": question, "answer": answer, "images": images}
            yield {**blank, **asks, "id": f"{policy['name']}-section-{k}-{j}", "kind": "section"}
