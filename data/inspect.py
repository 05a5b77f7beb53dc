"""One HTML page that shows a data folder: policies as trees, queries with their way lit, balance, lengths, warnings.

    python -m data.inspect DIR [--responses runs/eval/no_policy.jsonl] [--out DIR/inspect.html]
    python -m data.inspect RUN [RUN] [--live]               a run or an evaluation instead: data/runs.py

The page is one file: no network, no framework, pictures inside it. It works for every data set in our format; where a
policy is no tree, its text and its items' profile and history are shown.
"""

import argparse
import base64
import contextlib
import io
import json
import os
from collections import Counter
from html import escape

from PIL import Image

from data import GENERATOR, InputError, check_file, command, open_text, runs, write_text
from data.dataset import IMAGE, load_items, load_policies
from data.oracle import tokens
from data.referral import mentions, referral
from data.rewards import accuracy, thoughts

SPLITS = ("cpt", "sft", "rl", "test")
NO_POLICY = {"nodes": [], "leaves": []}
STYLE = """

:root { --ink: #1d2530; --soft: #66717f; --line: #dfe4ea; --way: #c2541b; --good: #2c7a4b; --bad: #b3261e;
  --paper: #fff }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #f4f6f8; margin: 0 }
main { max-width: 1180px; margin: 0 auto; padding: 24px } h1 { font-size: 26px; margin: 0 }
h2 { margin: 36px 0 10px; font-size: 19px }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px;
  margin: 12px 0 }
.facts { display: flex; flex-wrap: wrap; gap: 22px } .facts b { display: block; font-size: 21px }
.facts span, .soft { color: var(--soft) } summary { cursor: pointer } details details { margin-left: 22px }
.tree summary { padding: 1px 0 }
.tag { font-size: 12px; border-radius: 9px; padding: 1px 8px; background: #eef1f4; color: var(--soft);
  margin-right: 5px }
.yes { color: var(--good) } .no { color: var(--bad) } .leaf { margin-left: 22px }
.way { color: var(--way); font-weight: 600 }
.crop { height: 44px; vertical-align: middle; border-radius: 4px; margin: 0 3px }
pre { white-space: pre-wrap; font-size: 13px; margin: 6px 0 }
.query { display: grid; grid-template-columns: 260px 1fr; gap: 18px }
.query img.scene { width: 260px; border-radius: 6px }
.bars { display: grid; grid-template-columns: 130px 1fr 60px; gap: 2px 10px; font-size: 13px; align-items: center }
.bar { background: #5a7fa8; height: 11px; border-radius: 3px; min-width: 1px }
.warn { border-left: 5px solid #d98a00 } .fine { border-left: 5px solid var(--good) }
svg { width: 100%; height: auto } .edge { stroke: #c9d1da; fill: none }
.lit { stroke: var(--way); stroke-width: 3; fill: none } .dot { fill: #c9d1da } .on { fill: var(--way) }
text.on { font: 700 12px system-ui, sans-serif; paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 14px }
"""


def thumbnail(path, width):
    """A picture as a data URI, no wider than `width` pixels."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((width, width))
        data = io.BytesIO()
        image.save(data, "PNG" if width < 120 else "JPEG", quality=85)
    kind = "png" if width < 120 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def with_pictures(text, images):
    """A policy's text as HTML, each <image> replaced by its picture; images: an iterator over paths."""
    head, *rest = text.split(IMAGE)
    return escape(head) + "".join(
        f'<img class="crop" alt="" src="{thumbnail(next(images), 88)}">{escape(part)}' for part in rest
    )


# -- 1. trees ----------------------------------------------------------------------------------------------------------


def children(policy, key):
    """Where a section's answers lead, answers that lead the same way together: [(child, [answers])]."""
    node = next((n for n in policy["nodes"] if n["id"] == key), None)
    grouped = {}
    for answer, child in node["branches"].items() if node else ():
        grouped.setdefault(child, []).append(answer)
    return list(grouped.items())


def foldable(policy):
    """The tree as nested <details>, three layers open."""
    images = iter(policy["images"])
    questions = {node["id"]: with_pictures(node["question"], images) for node in policy["nodes"]}  # in the text's order

    def fold(key, tag, depth):
        if key not in questions:
            return f'<div class="leaf">{tag}<b>{escape(key)}</b></div>'
        inner = "".join(fold(child, answer_tag(answers), depth + 1) for child, answers in children(policy, key))
        state = " open" if depth < 3 else ""
        return f"<details{state}><summary>{tag}<b>{escape(key)}</b> {questions[key]}</summary>{inner}</details>"

    return f'<div class="tree">{fold(policy["root"], "", 0)}</div>'


def answer_tag(answers):
    words = answers[0] if len(answers) == 1 else f"{answers[0]} … {answers[-1]}"
    return f'<span class="tag {words if words in ("yes", "no") else ""}">{escape(words)}</span>'


class Drawing:
    """A policy's tree as a small picture: drawn once, then again with one way lit for each query."""

    def __init__(self, policy):
        self.place, self.parent, self.leaves = {}, {}, 0

        def put(key, depth):
            below = [put(child, depth + 1) for child, _ in children(policy, key)]
            for child, _ in children(policy, key):
                self.parent[child] = key
            x = sum(below) / len(below) if below else self.leaves
            self.leaves += not below
            self.place[key] = (x, depth)
            return x

        put(policy["root"], 0)
        self.depth = max(depth for _, depth in self.place.values())
        self.name = f"tree-{policy['name']}"

    def point(self, key):
        x, depth = self.place[key]
        return 20 + x * 960 / max(1, self.leaves - 1), 18 + depth * 34

    def _edge(self, key, kind):
        (x, y), (u, v) = self.point(self.parent[key]), self.point(key)
        return f'<path class="{kind}" d="M{x:.0f} {y}C{x:.0f} {y + 18} {u:.0f} {v - 18} {u:.0f} {v}"/>'

    def define(self):
        """The plain tree, which the queries' drawings refer to."""
        parts = [self._edge(key, "edge") for key in self.parent]
        parts += ['<circle class="dot" r="3" cx="%.0f" cy="%d"/>' % self.point(key) for key in self.place]
        return f'<symbol id="{escape(self.name)}" viewBox="0 0 1000 {self.depth * 34 + 44}">{"".join(parts)}</symbol>'

    def lit(self, path, leaf):
        """The tree with the way to `leaf` lit."""
        height = self.depth * 34 + 44
        way = [step["node"] for step in path] + [leaf]
        if any(key not in self.place for key in way):
            return ""
        parts = [self._edge(key, "lit") for key in way[1:]]
        parts += ['<circle class="on" r="4.5" cx="%.0f" cy="%d"/>' % self.point(key) for key in way]
        for key, step in zip(way, path):
            x, y = self.point(key)
            end = ' text-anchor="end" dx="-20"' if x > 800 else ""
            parts.append(f'<text class="on" x="{x + 10:.0f}" y="{y - 3}"{end}>{escape(step["answer"])}</text>')
        x, y = self.point(leaf)
        parts.append(
            f'<text class="on" text-anchor="middle" x="{min(max(x, 30), 970):.0f}" y="{y + 17}">{escape(leaf)}</text>'
        )
        return (
            f'<svg viewBox="0 0 1000 {height}"><use href="#{escape(self.name)}" width="1000" height="{height}"/>'
            f"{''.join(parts)}</svg>"
        )


# -- 2. what stands beside the trees -----------------------------------------------------------------------------------


def bars(counts):
    """Horizontal bars of {label: count}."""
    top = max(counts.values(), default=1) or 1
    rows = (
        f'<span>{escape(str(label))}</span><div class="bar" style="width:{100 * n / top:.1f}%"></div><span>{n}</span>'
        for label, n in counts.items()
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def histogram(values, bins=8):
    """Counts of numbers in `bins` equal ranges: {"10-19": 3, ...}."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // bins))
    edges = range(low, high + 1, width)
    return {f"{a}-{a + width - 1}" if width > 1 else str(a): sum(a <= v < a + width for v in values) for a in edges}


def warnings(policies, items):
    """What a person should know before training on this folder; items: {split: [item]}."""
    out = []
    scenes = {split: {i["scene"] for i in part if "scene" in i} for split, part in items.items()}
    shared = scenes["test"] & (scenes["rl"] | scenes["sft"] | scenes["cpt"])
    if shared:
        out.append(f"{len(shared)} test scenes stand in training files, too: {sorted(shared)[0]}")
    if scenes["sft"] - scenes["rl"]:
        out.append(f"{len(scenes['sft'] - scenes['rl'])} scenes of sft.jsonl are not in rl.jsonl")
    for name, policy in policies.items():
        answers = Counter(i["answer"] for i in items["rl"] if i["policy"] == name)
        total = sum(answers.values())
        if not policy["nodes"]:
            continue
        silent = [leaf["response"] for leaf in policy["leaves"] if not answers[leaf["response"]]]
        if silent:
            out.append(
                f"{name}: {len(silent)} of {len(policy['leaves'])} responses have no training query: {silent[0]}"
            )
        share = max(answers.values(), default=0) / max(1, total)
        if share > 3 / len(policy["leaves"]) and total >= len(policy["leaves"]):
            out.append(
                f"{name}: {answers.most_common(1)[0][0]} is the answer to {100 * share:.0f} % of its training queries"
            )
        if not any(i["policy"] == name for i in items["test"]):
            out.append(f"{name}: no test items")
    for split, part in items.items():
        for item in part:
            wrong = [
                s
                for s in mentions(item.get("cot", ""), policies.get(item["policy"], NO_POLICY))
                if s not in {n["id"] for n in policies.get(item["policy"], NO_POLICY)["nodes"]}
            ]
            if wrong:
                out.append(f"{split}: {item['id']} cites {wrong[0]}, which its policy does not have")
    return out


def query(item, policy, drawing, response=None):
    """One query as a card: its picture, what is asked, the right way, and a run's response beside it if any."""
    pictures = "".join(f'<img class="scene" alt="" src="{thumbnail(path, 520)}">' for path in item["images"][:4])
    head = f'<b>{escape(item["policy"])}</b> <span class="soft">{escape(item["id"])}</span>'
    parts = [head, f"<pre>{escape(item['question'])}</pre>"]
    for key in ("profile", "history", "system", "messages"):
        if item.get(key):
            inside = f"<pre>{escape(json.dumps(item[key], indent=1, ensure_ascii=False))}</pre>"
            parts.append(f'<details><summary class="soft">{key}</summary>{inside}</details>')
    leaf = next((end["id"] for end in policy["leaves"] if end["response"] == item["answer"]), None)
    if drawing and leaf:
        parts.append(drawing.lit(item["path"], leaf))
    gold = f'<span class="tag">gold</span> <span class="way">{escape(item["answer"])}</span>'
    gold = f"<div>{gold}<pre>{escape(item.get('cot', ''))}</pre></div>"
    if response is None:
        parts.append(gold)
    else:
        kind, word = ("yes", "right") if accuracy(None, response, item) == 1 else ("no", "wrong")
        said = f'<span class="tag">response</span> <span class="{kind}">{word}</span>'
        if policy["nodes"]:
            read = referral(response, item, policy)
            said += (
                f' <span class="soft">sections quoted {100 * read["quoted"]:.0f} %, unknown {read["unknown"]}</span>'
            )
        answer = response.rpartition("</think>")[2]
        parts.append(
            f'<div class="sides">{gold}<div>{said}<pre>{escape(thoughts(response))}\n{escape(answer)}</pre></div></div>'
        )
    return f'<div class="card query"><div>{pictures}</div><div>{"".join(parts)}</div></div>'


def page(folder, responses=None, limit=24, media=""):
    """The whole page as HTML.

    folder: a data folder; responses: {item id: text} of a run, beside the gold chains; limit: queries shown, taken
    evenly over the policies; media: where pictures may also lie. Raises InputError as the loaders do.
    """
    policies = load_policies(folder, media)
    present = [split for split in SPLITS if os.path.exists(os.path.join(folder, f"{split}.jsonl"))]
    items = {
        split: load_items(folder, f"{split}.jsonl", policies, media) if split in present else [] for split in SPLITS
    }
    lengths = [tokens(policy["text"]) for policy in policies.values()]
    facts = [
        ("policies", len(policies)),
        *((f"{split} items", len(items[split])) for split in present),
        ("tokens a policy", f"{min(lengths, default=0)}-{max(lengths, default=0)}"),
        ("pictures in policies", sum(len(policy["images"]) for policy in policies.values())),
    ]
    out = [
        '<div class="card facts">'
        + "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts)
        + "</div>"
    ]
    found = warnings(policies, items)
    out += [f'<div class="card warn">{escape(text)}</div>' for text in found[:40]]
    out += [] if found else ['<div class="card fine">No warnings.</div>']

    out.append("<h2>Policies</h2>")
    drawings = {name: Drawing(policy) for name, policy in policies.items() if policy["nodes"]}
    out.append(f'<svg style="display:none">{"".join(drawing.define() for drawing in drawings.values())}</svg>')
    for k, (name, policy) in enumerate(policies.items()):
        answers = Counter(i["answer"] for i in items["rl"] if i["policy"] == name)
        balance = {leaf["response"]: answers[leaf["response"]] for leaf in policy["leaves"]}
        tree = foldable(policy) if policy["nodes"] else ""
        text = f"<pre>{with_pictures(policy['text'], iter(policy['images']))}</pre>"
        size = f"{len(policy['nodes'])} sections, {len(policy['leaves'])} responses, {tokens(policy['text'])} tokens"
        out.append(
            f'<details class="card"{" open" if k == 0 else ""}><summary><b>{escape(name)}</b> <span class="soft">{size}'
            f"</span></summary>{tree}<details><summary>The text as the model reads it</summary>{text}</details>"
            + (
                f"<details><summary>Answers of its training queries</summary>{bars(balance)}</details>"
                if balance
                else ""
            )
            + "</details>"
        )

    shown = [i for i in items["test"] or items["rl"] if responses is None or i["id"] in responses]
    by_policy = {name: iter([i for i in shown if i["policy"] == name]) for name in (*policies, "")}
    chosen = []
    while len(chosen) < min(limit, len(shown)):
        chosen += [i for i in (next(rest, None) for rest in by_policy.values()) if i]
    out.append(f"<h2>Queries</h2><p class='soft'>{min(limit, len(shown))} of {len(shown)}; the right way is lit.</p>")
    out += [
        query(i, policies.get(i["policy"], NO_POLICY), drawings.get(i["policy"]), responses and responses[i["id"]])
        for i in chosen[:limit]
    ]

    out.append('<h2>Lengths</h2><div class="sides">')
    for title, values in (
        ("tokens of the questions", [tokens(i["question"]) for i in items["rl"] or shown]),
        ("tokens of the chains", [tokens(i["cot"]) for i in items["sft"] or shown if i.get("cot")]),
    ):
        if values:
            out.append(f'<div class="card"><b>{title}</b>{bars(histogram(values))}</div>')
    title = escape(os.path.basename(os.path.abspath(folder)))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}<title>{title}</title>'
        f"<style>{STYLE}</style>"
        "</head><body><main>"
        f"<h1>{title}</h1>{''.join(out)}</div></main></body></html>\n"
    )


def read_responses(path):
    """{item id: response} of an evaluation's JSONL; raises InputError naming file and line."""
    out = {}
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    out[record["id"]] = str(record["response"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise InputError(
                        f"{path}:{number}: no response of an evaluation, expected id and response"
                    ) from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected the JSONL that evaluate.py writes") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}), expected the JSONL that evaluate.py writes") from None
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.inspect", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("folder", nargs="+", metavar="DIR", help="a data folder; or a run or an evaluation, or two of them")
    add(
        "--responses",
        metavar="FILE",
        help="a run's responses, as evaluate.py writes them (JSONL), beside the gold chains",
    )
    add("--out", metavar="FILE", help="the page (default DIR/inspect.html)")
    add("--limit", type=int, default=24, metavar="N", help="queries of a data folder shown (default 24)")
    add("--media", default="", metavar="DIR", help="folder that pictures may also be read from")
    add("--live", action="store_true", help="serve a run's page on this machine while it runs; no file is written")
    add("--port", type=int, default=0, metavar="N", help="of --live (default: a free one)")
    args = parser.parse_args(argv)
    out = args.out or os.path.join(args.folder[0], "inspect.html")
    if not args.live:
        check_file(out, GENERATOR)
    if runs.is_run(args.folder[0]) or len(args.folder) > 1 or args.live:
        if len(args.folder) > 2 or args.responses:
            raise InputError(
                f"{len(args.folder)} folders found, expected one or two runs, and --responses with data only"
            )
        html = runs.page(args.folder)
        if args.live:
            with runs.serve(args.folder, args.port) as server:
                print(f"http://{runs.LOOPBACK}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    server.serve_forever()
            return
    else:
        responses = read_responses(args.responses) if args.responses else None
        html = page(args.folder[0], responses, args.limit, args.media)
    write_text(out, html)
    print(f"{out}: {len(html) / 1e6:.1f} MB")


if __name__ == "__main__":
    command(main)
