"""Look at a data folder as the training scripts will: every picture opened, every prompt and response measured.

    python -m data.check DIR --model M        a table, what is at fault, and DIR/check.html

At fault is what would end a training run: a picture that cannot be read, a prompt or response over its limit, an answer
that the accuracy reward gives nothing to. Besides, the page shows the ten
longest items, and what stands nearly alike in the training files and in the test. Exit code 2 where anything is at
fault.
"""

import argparse
import os
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import GENERATOR, InputError, check_file, command, write_text
from data.dataset import IMAGE, clip, load_items, load_policies, messages, placed, target, unknown_keys
from data.rewards import accuracy

SPLITS = ("cpt", "sft", "rl", "test")


class Fault(NamedTuple):
    """What would end a run: in a file, at a line, of an item; `picture` is a path, or "" where it is none."""

    file: str
    line: int
    item: str
    picture: str
    what: str

    def __str__(self):
        picture = f", picture {self.picture}" if self.picture else ""
        return f"{self.file}:{self.line}: item {self.item}{picture}: {self.what}"


@dataclass
class Limits:
    """What a stage takes: tokens, and whether its prompts hold the policy ("kind": as VM-CPT reads each kind)."""

    prompt: int = 4096
    response: int = 2048
    policy: str = "both"  # with | without | both | kind


class Length(NamedTuple):
    """Tokens of an item: text and pictures of its prompt, its policy (0 where its prompt holds none), its response."""

    text: int
    pictures: int
    policy: int
    response: int

    @property
    def prompt(self):
        return self.text + self.pictures + self.policy


# -- 1. pictures -------------------------------------------------------------------------------------------------------


class Pictures:
    """Every picture opened once, in threads: its size or what is wrong with it, and a thumbnail to compare by."""

    def __init__(self, processor, progress=False):
        self.processor, self.progress = processor, progress
        self.sizes, self.faults, self.thumbnails = {}, {}, {}  # by path

    def look(self, paths):
        """Open those of `paths` that have not been opened yet."""
        new = [path for path in dict.fromkeys(paths) if path not in self.sizes and path not in self.faults]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for path, found in tqdm(
                zip(new, pool.map(self.open, new)), "pictures", len(new), disable=not self.progress
            ):
                if isinstance(found, str):
                    self.faults[path] = found
                else:
                    self.sizes[path], self.thumbnails[path] = found

    def open(self, path):
        """(tokens, thumbnail (16, 16, 3) uint8) of a picture, or what is wrong with it."""
        try:
            image, tokens = self.processor.look(path)
        except InputError as error:
            return str(error).removeprefix(f"{path}: ")
        return tokens, np.asarray(image.resize((16, 16), Image.Resampling.BOX))

    def tokens(self, paths):
        return sum(self.sizes.get(path, 0) for path in paths)


# -- 2. items ----------------------------------------------------------------------------------------------------------


def count(processor, texts):
    """Tokens of texts, as many ints."""
    return [len(found) for found in processor.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def holds_policy(item, policy):
    """Does the prompt hold the policy, under `policy` of Limits? For "both" the longer prompt is looked at."""
    kind = item.get("kind", "applied")
    return item["policy"] and (policy in ("with", "both") or policy == "kind" and kind in ("applied", "document"))


def measure(items, policies, processor, limits, pictures):
    """Lengths of items [Length]; the policy is counted once, again with the item where it is near the limit."""
    whole = {
        name: count(
            processor, ["".join(p.get("text", "") for p in placed(policy["text"], iter(policy["images"]))) + "\n\n"]
        )[0]
        + pictures.tokens(policy["images"])
        + 2 * len(policy["images"])
        for name, policy in policies.items()
    }
    chats, out = [], []
    for item in items:
        document = item.get("kind") == "document"
        chat = messages(item, policies[item["policy"]] if document else None)
        chats.append(processor.chat(chat, add_generation_prompt=not document))
    shown = [pictures.tokens(item["images"]) for item in items]
    texts = count(processor, chats)
    responses = [n + 1 for n in count(processor, [target(item) for item in items])]
    for item, text, seen, response in zip(items, texts, shown, responses):
        if item.get("kind") == "document":
            policy = policies[item["policy"]]
            here = pictures.tokens(policy["images"])
            out.append(Length(0, 0, text - len(policy["images"]) + here, 0))
            continue
        text -= len(item["images"])  # each has one token in the chat's text
        policy = whole[item["policy"]] if holds_policy(item, limits.policy) else 0
        if policy and abs(text + seen + policy - limits.prompt) <= 16:  # merges at the seam may tell
            chat = messages(item, policies[item["policy"]])
            seam = count(processor, [processor.chat(chat, add_generation_prompt=True)])[0]
            images = policies[item["policy"]]["images"]
            policy = seam - len(item["images"]) - len(images) - text + pictures.tokens(images)
        out.append(Length(text, seen, policy, response))
    return out


def look_over(items, policies, processor, limits, pictures=None):
    """Everything in a split that would end a run -> [Fault], in the items' order.

    items, policies: as data.dataset loads them; processor: the model's; limits: the stage's; pictures: what has been
    opened for other splits already. No torch is needed but by the processor.
    """
    pictures = pictures or Pictures(processor)
    used = {item["policy"] for item in items if item["policy"]}
    policies = {name: policy for name, policy in policies.items() if name in used}
    pictures.look([path for policy in policies.values() for path in policy["images"]])
    pictures.look([path for item in items for path in item["images"]])
    faults = []
    for policy in policies.values():
        at = Fault("policies.json", 1, policy["name"], "", "")
        faults += [
            at._replace(picture=path, what=pictures.faults[path])
            for path in policy["images"]
            if path in pictures.faults
        ]
    for item, length in zip(items, measure(items, policies, processor, limits, pictures)):
        file, _, line = item.get("_at", ":0").rpartition(":")
        at = Fault(file, int(line), item["id"], "", "")
        faults += [
            at._replace(picture=path, what=pictures.faults[path]) for path in item["images"] if path in pictures.faults
        ]
        if length.prompt > limits.prompt:
            made_of = f"{length.policy} of the policy, {length.pictures} of pictures"
            helps = "lower --max-pixels or " * (length.pictures > length.prompt / 2) + "raise --max-prompt"
            expected = f"expected at most --max-prompt {limits.prompt} ({helps})"
            faults.append(at._replace(what=f"found a prompt of {length.prompt} tokens, {made_of}, {expected}"))
        if length.response > limits.response:
            expected = f"expected at most --max-response {limits.response}"
            faults.append(at._replace(what=f"found a response of {length.response} tokens, {expected}"))
        if item.get("kind", "applied") == "applied" and accuracy("", target(item), item) != 1:
            what = f"its own answer {clip(item['answer'])} gets nothing from the accuracy reward: braces do not balance"
            faults.append(at._replace(what=what))
        if IMAGE in target(item):
            faults.append(at._replace(what=f"{IMAGE} in what is to be learned, expected text"))
    return faults


def unknown_share(items, processor):
    """Share of the tokens of a few hundred items that the tokenizer does not know; 0 where it spells everything out."""
    ids = [processor.tokenizer.token_to_id(token) for token in ("<unk>", "[UNK]")]
    texts = [item["question"].replace(IMAGE, " ") + " " + target(item) for item in items[:: max(1, len(items) // 300)]]
    found = [id for text in processor.tokenizer.encode_batch(texts, add_special_tokens=False) for id in text.ids]
    return sum(id in ids for id in found if id is not None) / max(1, len(found))


def advice(lengths, limit, processor, most):
    """Flags with which prompts of these lengths [Length] are taken: smaller pictures where these make them long, then
    --max-prompt. most: pictures of each prompt."""
    side = (processor.patch_size * processor.merge_size) ** 2
    longest = max(length.prompt for length in lengths)

    def reach(tokens):
        return max(n.prompt - n.pictures + min(n.pictures, k * tokens) for n, k in zip(lengths, most))

    fits = (1280, 1024, 768, 512, 256)  # tokens of a picture; 1,280 are a million pixels
    if longest <= limit:
        return ""
    if reach(fits[0]) == longest:
        return f"--max-prompt {longest}"
    tokens = next((tokens for tokens in fits if reach(tokens) <= limit), 512)
    return f"--max-pixels {tokens * side}" + (f" --max-prompt {reach(tokens)}" if reach(tokens) > limit else "")


# -- 3. train against test ---------------------------------------------------------------------------------------------


def alike(train, test, pictures, near=4.0, largest=24):
    """Pairs of items (train, test, why) that are nearly the same: a picture as good as equal, or without one the text.

    Pictures are compared as 16 x 16 thumbnails: `near` is the mean difference, `largest` that of any value, in levels
    of 256. Texts: seven in ten of all runs of three words are shared.
    """
    thumbs = {item["id"]: [p for p in item["images"] if p in pictures.thumbnails] for item in [*train, *test]}
    owners = lambda items: [(item, path) for item in items for path in dict.fromkeys(thumbs[item["id"]])]
    found, ours, theirs = {}, owners(train), owners(test)
    distinct = lambda pairs: list(dict.fromkeys(path for _, path in pairs))
    a, b = distinct(ours), distinct(theirs)
    by_path = defaultdict(list)
    for item, path in ours:
        by_path[path].append(item)
    if a and b:
        flat = lambda paths: (
            np.stack([pictures.thumbnails[path] for path in paths]).reshape(len(paths), -1).astype(np.float32)
        )
        A, twins = flat(a), {}
        for start in range(0, len(b), 256):
            B = flat(b[start : start + 256])
            squares = (A**2).sum(1)[:, None] + (B**2).sum(1) - 2 * A @ B.T  # (train, 256)
            for i, j in zip(*np.nonzero(squares <= A.shape[1] * 4 * near**2)):
                difference = np.abs(A[i] - B[j])
                if difference.mean() <= near and difference.max() <= largest:
                    twins.setdefault(b[start + j], []).append(a[i])
        for item, path in theirs:
            for twin in twins.get(path, ()):
                why = "the same picture" if twin == path else "nearly the same picture"
                found.setdefault((by_path[twin][0]["id"], item["id"]), (by_path[twin][0], item, why))
    return [*found.values(), *alike_texts([i for i in train if not i["images"]], [i for i in test if not i["images"]])]


def alike_texts(train, test, share=0.7):
    runs = lambda item: {
        tuple(w[k : k + 3]) for w in [re.findall(r"\w+", words_of(item))] for k in range(max(1, len(w) - 2))
    }
    index, sizes, out = defaultdict(list), [], []
    for k, item in enumerate(train):
        parts = runs(item)
        sizes.append(len(parts))
        for part in parts:
            index[part].append(k)
    for item in test:
        parts = runs(item)
        shared = Counter(k for part in parts if len(index.get(part, ())) <= 1000 for k in index[part])
        for k, n in shared.most_common(1):
            if n >= share * (len(parts) + sizes[k] - n):
                out.append((train[k], item, "the same text" if n == len(parts) == sizes[k] else "nearly the same text"))
    return out


def words_of(item):
    return " ".join([*(turn["content"] for turn in item.get("messages", [])[:-1]), item["question"]]).lower()


# -- 4. the report -----------------------------------------------------------------------------------------------------


class Report:
    """A folder looked over: faults, lengths and remarks of its splits."""

    def __init__(self, folder, processor, limits, media="", progress=False):
        self.folder, self.faults, self.remarks, self.rows, self.lengths = folder, [], [], [], []
        policies = load_policies(folder, media)
        pictures, items = Pictures(processor, progress), {}
        for split in SPLITS:
            if not os.path.exists(os.path.join(folder, f"{split}.jsonl")):
                continue
            items[split] = load_items(folder, f"{split}.jsonl", policies, media)
            here = Limits(limits.prompt, limits.response, {"cpt": "kind", "sft": "without"}.get(split, "both"))
            faults = look_over(items[split], policies, processor, here, pictures)
            lengths = measure(items[split], policies, processor, here, pictures)
            self.faults += faults
            self.lengths += [(length, split, item) for length, item in zip(lengths, items[split])]
            self.rows.append((split, items[split], lengths, len(faults)))
            for key, n in unknown_keys(items[split]).items():
                self.remarks.append(f"{split}.jsonl: {n} items have the key {clip(key)}, which nothing here reads")
            share = unknown_share(items[split], processor)
            if share > 0.01:
                self.remarks.append(f"{split}.jsonl: {100 * share:.0f} % of the tokens are unknown to this tokenizer")
            alone = sum(not item["policy"] for item in items[split])
            if policies and alone:
                self.remarks.append(f"{split}.jsonl: {alone} items have no policy")
        if not items:
            raise InputError(f"{folder}: found none of {', '.join(f'{split}.jsonl' for split in SPLITS)}")
        train = [item for split in ("sft", "rl") for item in items.get(split, [])]
        self.twins = alike(train, items.get("test", []), pictures)
        long = [(length, len(item["images"])) for length, _, item in self.lengths]
        flags = advice([length for length, _ in long], limits.prompt, processor, [n for _, n in long])
        if flags:
            self.remarks.append(f"too long prompts: train with {flags}")
        if self.twins:
            self.remarks.append(f"{len(self.twins)} pairs of training and test items are (nearly) alike")

    def table(self):
        """[[text]]: a head and a row for each split and kind."""
        head = "split kind items reasoning pictures prompt longest response longest".split()
        out = [head]
        for split, items, lengths, _ in self.rows:
            kinds = defaultdict(list)
            for item, length in zip(items, lengths):
                kinds[item.get("kind", "applied") if split == "cpt" else ""].append((item, length))
            for kind, pairs in kinds.items():
                prompts, responses = (sorted(getattr(n, key) for _, n in pairs) for key in ("prompt", "response"))
                middle = len(pairs) // 2
                counts = [len(pairs), sum("cot" in i for i, _ in pairs), sum(len(i["images"]) for i, _ in pairs)]
                figures = [prompts[middle], prompts[-1], responses[middle], responses[-1]]
                out.append([split, kind or "-", *(f"{n:,}" for n in (*counts, *figures))])
        return out

    def lines(self, most=20):
        """The report in text: the table, remarks, and the first faults."""
        widths = [max(map(len, column)) for column in zip(*self.table())]
        out = [
            "  ".join(cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))
            for row in self.table()
        ]
        out += ["", *self.remarks]
        out += [str(fault) for fault in self.faults[:most]]
        out += [f"... {len(self.faults) - most} more in the page"] if len(self.faults) > most else []
        return out

    def page(self):
        """The report as one HTML page."""
        from data.inspect import STYLE

        cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
        grid = lambda rows: (
            "<table>" + "".join(cells(row, "td" if k else "th") for k, row in enumerate(rows)) + "</table>"
        )
        longest = sorted(self.lengths, key=lambda entry: -entry[0].prompt - entry[0].response)[:10]
        rows = [["tokens", "text", "pictures", "policy", "response", "split", "item", "question"]]
        rows += [
            [n.prompt + n.response, n.text, n.pictures, n.policy, n.response, split, item["id"], item["question"][:80]]
            for n, split, item in longest
        ]
        twins = [["train", "test", "what", "question"]]
        twins += [[a["id"], b["id"], why, b["question"][:80]] for a, b, why in self.twins[:200]]
        faults = [["where", "item", "picture", "what"]]
        faults += [[f"{f.file}:{f.line}", f.item, os.path.basename(f.picture), f.what] for f in self.faults[:1000]]
        card = lambda kind, text: f'<div class="card {kind}">{escape(text)}</div>'
        title = escape(os.path.basename(os.path.abspath(self.folder)))
        body = [
            f"<h1>{title}</h1>",
            f'<div class="card">{grid(self.table())}</div>',
            *(card("warn", text) for text in self.remarks),
            f"<h2>At fault</h2>{grid(faults)}" if self.faults else card("fine", "Nothing is at fault."),
            f"<h2>The ten longest items</h2>{grid(rows)}",
            f"<h2>Alike in training and test</h2>{grid(twins)}" if self.twins else "",
        ]
        style = STYLE + "table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }"
        style += "td, th { padding: 3px 10px; text-align: left; border-bottom: 1px solid var(--line) }"
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{style}</style></head><body><main>{''.join(body)}</main></body></html>\n"
        )


def main(argv=None, load=None):
    """load: a processor from a checkpoint, as model.Processor.from_pretrained makes it."""
    parser = argparse.ArgumentParser(prog="python -m data.check", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("folder", metavar="DIR", help="a data folder")
    add("--model", required=True, metavar="M", help="checkpoint, for its tokenizer and its limits on pictures")
    add("--media", default="", metavar="DIR", help="folder that pictures may also be read from")
    add("--max-prompt", type=int, default=4096, metavar="TOKENS", help="as the training scripts take it (default 4096)")
    add("--max-response", type=int, default=2048, metavar="TOKENS", help="the same (default 2048)")
    add("--max-pixels", type=int, metavar="N", help="as the training scripts take it (default: the model's)")
    add("--out", metavar="FILE", help="the page (default DIR/check.html)")
    args = parser.parse_args(argv)
    out = args.out or os.path.join(args.folder, "check.html")
    check_file(out, GENERATOR)
    load_policies(args.folder, args.media)  # better refused now than after the model's import
    processor = load(args.model)
    processor.max_pixels = args.max_pixels or processor.max_pixels
    report = Report(args.folder, processor, Limits(args.max_prompt, args.max_response), args.media, sys.stderr.isatty())
    write_text(out, report.page())
    print("\n".join([*report.lines(), out]))
    if report.faults:
        raise InputError(
            f"{args.folder}: found {len(report.faults)} faults, expected none; the first is {report.faults[0]}"
        )


if __name__ == "__main__":

    def load_processor(path):
        from model import Processor  # the only thing that takes torch
        from support.runs import described

        return Processor.from_pretrained(described(path))

    command(lambda: main(load=load_processor))
