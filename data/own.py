"""Your own policy and your own data as a data folder that every stage can use.

    python -m data.own --policy POLICY.md --name returns --data chats.jsonl --out data_returns --model M

The policy is text or Markdown with its pictures; the data are chat logs, LLaVA or ShareGPT files, what EasyR1, verl and
TRL read, tables, or items of ours (data/formats.py tells them apart). Items with reasoning become SFT data, the rest RL
data; a share is kept for the test, where no picture and no conversation of the training files comes again. The policy's
sections become items of VM-CPT. It ends with a table of what was made, what is too long, and what was dropped and why.
data/OWN.md goes through all of it with an example.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import warnings
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import InputError, command
from data.check import Length, advice, count
from data.clevr_policy import NewFolder, write_json
from data.dataset import IMAGE, PLACES, clip, messages, target
from data.document import cpt_items, read_policy
from data.formats import FORMATS, KEYS, OnTheNetwork, Store, read_rows, recognise, renamed, source
from data.rewards import accuracy

BATCH = 256  # prompts tokenized at a time

# -- 1. items ----------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    policies: list  # names
    names: dict = field(default_factory=dict)  # --map
    format: str = ""
    boxed: bool | None = None  # None: as the format says
    every_turn: bool = False


class Converter:
    """Rows to items, one at a time; what is dropped is counted by reason, and `dropped` is called with each."""

    def __init__(self, store, roots, options, dropped):
        self.store, self.roots, self.options, self.dropped = store, roots, options, dropped
        self.reasons, self.formats, self.ignored, self.left_out = Counter(), Counter(), Counter(), Counter()
        self.firsts, self.ids, self.seen, self.number, self.example = {}, set(), set(), 0, ""

    def drop(self, error):
        """Note one row that cannot be used: its reason without the place and the particulars."""
        text = str(error)
        reason = re.sub(r"'.*?'|\".*?\"|\d+", "…", re.sub(r"^.*?(:| row )\d+: ", "", text))[:90]
        self.reasons[reason] += 1
        self.example = self.example or text
        self.firsts.setdefault(reason, re.match(r"(?:.*?(?::| row )\d+)?", text).group())
        self.dropped(text)

    def items(self, path):
        """Items of a file with the keys of their groups and the sizes of their pictures: (item, [str], [(w, h)])."""
        roots = [os.path.dirname(os.path.abspath(path)), *self.roots]
        for where, row in read_rows(path, refuse=self.drop):
            try:
                row = renamed(row, self.options.names)
                kind = self.options.format or recognise(row, where)
                self.formats[kind] += 1
                self.ignored.update(row.keys() - KEYS)
                for example in self.unrolled(row, kind, where):
                    yield self.item(example, where, roots)
            except OnTheNetwork:
                raise
            except (InputError, KeyError, TypeError, AttributeError) as error:
                known = isinstance(error, InputError)
                self.drop(error if known else InputError(f"{where}: no row of format {kind} ({type(error).__name__})"))

    def unrolled(self, row, kind, where):
        """The example of a row; with every_turn one for each answer of the assistant, all of them one conversation."""
        key = {"openai": "messages", "llava": "conversations"}.get(kind)
        if not self.options.every_turn or not key:
            return [FORMATS[kind](row, where)]
        said = lambda turn: turn.get("role", turn.get("from")) in ("assistant", "gpt")
        ends = [k for k, turn in enumerate(row[key], 1) if isinstance(turn, dict) and said(turn)]
        return [FORMATS[kind](until(row, key, end), where) for end in ends]

    def item(self, example, where, roots):
        """An item, its groups, and its pictures' sizes; raises InputError, also where the same came before."""
        if not example.policy:
            example.policy = self.options.policies[0] if len(self.options.policies) == 1 else ""
        if example.policy and example.policy not in self.options.policies:
            found = ", ".join(self.options.policies) or "none given"
            raise InputError(f"{where}: policy {clip(example.policy)} is not among --name: {found}")
        pictures = [self.store.add(source(picture, roots, where), where) for picture in example.pictures]
        digests = [digest for _, digest, _ in pictures]
        boxed = self.options.boxed if self.options.boxed is not None else bool(example.boxed)
        self.number += 1
        item = {"id": self.unused(example.id), "policy": example.policy}
        item["images"] = [name for name, _, _ in pictures]
        chat = example.turns
        if chat[0][0] == "system":
            item["system"], chat = chat[0][1], chat[1:]
        if len(chat) == 1:
            item["question"] = chat[0][1]
        else:
            item["messages"] = [{"role": who, "content": text} for who, text in chat]
        item |= {"answer": example.answer, **({"cot": example.cot} if example.cot else {})}
        item |= {} if boxed else {"boxed": False}
        if accuracy(None, target(item), item) != 1:
            inside = "has a box inside other text" if "\\boxed" in item["answer"] else "has braces that do not balance"
            raise InputError(f"{where}: the answer {inside}, so that nobody could box it (--answer text)")
        content = json.dumps([chat, digests, item["answer"], item.get("system")])
        digest = hashlib.sha1(content.encode(errors="replace")).digest()[:10]
        if digest in self.seen:
            raise InputError(f"{where}: the same prompt and answer once more")
        self.seen.add(digest)
        self.left_out.update(example.left_out)
        groups = digests
        groups += [f"conversation {example.conversation}"] if example.conversation else []
        groups += [f"row {where}"] if self.options.every_turn else []
        groups += [] if pictures else [f"text {' '.join(chat[-1][1].lower().split())}"]
        return item, groups, [size for *_, size in pictures]

    def unused(self, name):
        """The row's own id, with a mark where it came before; else a number."""
        if not name or re.fullmatch(r"row-\d+", name):
            return f"row-{self.number}"
        while name in self.ids:
            name += "+"
        self.ids.add(name)
        return name


def until(row, key, end):
    """The row of a conversation up to turn `end`, with the pictures of these turns only."""
    marks = lambda turns: sum(str(turn.get("value", turn.get("content"))).count(IMAGE) for turn in turns)
    kept, images = row[key][:end], row.get("images")
    row = {**row, key: kept}
    if isinstance(images, list) and marks(row[key]) and marks(row[key]) < len(images):
        row["images"] = images[: marks(kept)]
    return row


class Groups:
    """Which examples belong together (union-find): those that share a picture, a conversation or a text."""

    def __init__(self):
        self.parent, self.number, self.sizes = array("q"), {}, []

    def add(self, keys):
        """The number of a new example with these keys."""
        mine = len(self.parent)
        self.parent.append(mine)
        for key in keys:
            key = hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()
            self.parent[self.root(mine)] = self.root(self.number.setdefault(key, mine))
        return mine

    def root(self, i):
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def test_side(self, share, seed):
        """Examples for the test: whole groups, drawn by the seed, as near to the share from below as they fit (one at
        least, where there are two groups)."""
        members = defaultdict(list)
        for i in range(len(self.parent)):
            members[self.root(i)].append(i)
        count = len(self.parent)
        groups, wanted = list(members.values()), min(max(1, round(share * count)), count - 1) if share else 0
        chosen = []
        for k in np.random.default_rng(seed).permutation(len(groups)).tolist():
            if len(chosen) + len(groups[k]) <= wanted:
                chosen += groups[k]
        if share and not chosen and len(groups) > 1:
            chosen = min(groups, key=len)
        return set(chosen)


# -- 2. how long things are --------------------------------------------------------------------------------------------


class Lengths:
    """Tokens of prompts and responses by a model's processor, counted as items pass by; nothing without one."""

    def __init__(self, processor, policies):
        """policies: as read_policy gives them, with the sizes of their pictures."""
        self.processor, self.waiting, self.pool, self.under_way = processor, [], ThreadPoolExecutor(1), None
        self.texts, self.responses, self.pictures, self.count = (array("q") for _ in range(4))  # an entry per item
        self.owners, self.policies = [], {}
        if processor:
            for policy, sizes in policies:
                words = policy["text"].replace(IMAGE, "") + "\n\n"
                pictures = self.of_pictures(sizes) + 2 * len(sizes)  # each stands between two marks
                self.policies[policy["name"]] = count(self.processor, [words])[0] + pictures

    def of_pictures(self, sizes):
        """Tokens of pictures of these (width, height); those of a shape that no model reads are left to data.check."""
        total = 0
        for size in sizes:
            with contextlib.suppress(InputError):
                total += self.processor.picture_tokens(*size)
        return total

    def add(self, item, sizes):
        if self.processor:
            chat = self.processor.chat(messages({**item, "question": asked(item)}), add_generation_prompt=True)
            self.waiting.append((chat, target(item)))
            self.pictures.append(self.of_pictures(sizes))
            self.count.append(len(sizes))
            self.owners.append(item["policy"])
            if len(self.waiting) == BATCH:
                self.flush()

    def flush(self, wait=False):
        """Count what waits in a thread beside the reading of rows; with wait, until all is counted."""
        if self.under_way:
            prompts, responses = self.under_way.result()
            self.texts.extend(n - pictures for n, pictures in zip(prompts, self.count[len(self.texts) :]))
            self.responses.extend(n + 1 for n in responses)
            self.under_way = None
        if self.waiting:
            texts, self.waiting = [list(part) for part in zip(*self.waiting)], []
            self.under_way = self.pool.submit(lambda: [count(self.processor, part) for part in texts])
        if wait and self.under_way:
            self.flush(wait)

    def length(self, k, policy=True):
        """The Length of item k, its policy in the prompt or not."""
        return Length(self.texts[k], self.pictures[k], policy * self.policies.get(self.owners[k], 0), self.responses[k])

    def row(self, chosen):
        """Of the items `chosen`: median and longest prompt, the longest with its policy, the longest response."""
        plain = sorted(self.length(k, False).prompt for k in chosen)
        aware = max(self.length(k).prompt for k in chosen)
        return [f"{n:,}" for n in (plain[len(plain) // 2], plain[-1], aware, max(self.responses[k] for k in chosen))]

    def complaints(self, limits):
        """Lines about what is longer than the training scripts take, and the flags that help."""
        lengths = [self.length(k) for k in range(len(self.texts))]
        over = [length for length in lengths if length.prompt > limits[0]]
        if over:
            most = max(over, key=lambda length: length.prompt)
            made_of = f"{most.policy:,} of the policy, {most.pictures:,} of pictures, {most.text:,} of text"
            found = (
                f"{len(over):,} prompts over --max-prompt {limits[0]}, the longest {most.prompt:,} tokens ({made_of})"
            )
            yield f"too long: {found}; train with {advice(lengths, limits[0], self.processor, self.count)}"
        long = [n for n in self.responses if n > limits[1]]
        if long:
            found = f"{len(long):,} responses over --max-response {limits[1]}"
            yield f"too long: {found}; train with --max-response {max(long)}"


def asked(item):
    return item["messages"][-1]["content"] if "messages" in item else item["question"]


# -- 3. the folder -----------------------------------------------------------------------------------------------------


class Draft:
    """Items on their way, in one file: where each begins, and of each what the split and the report have to know."""

    def __init__(self, path):
        self.file = open(path, "w+b")
        self.starts, self.reasoned, self.pictures, self.owners = array("q"), array("b"), array("q"), []

    def __len__(self):
        return len(self.starts)

    def add(self, item):
        self.starts.append(self.file.tell())
        self.file.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
        self.reasoned.append("cot" in item)
        self.pictures.append(len(item["images"]))
        self.owners.append(item["policy"])

    def line(self, k):
        self.file.seek(self.starts[k])
        return self.file.readline()

    def split(self, test):
        """{"sft", "rl", "test": numbers of items}: SFT has those with reasoning, RL the rest; where there are none of
        either kind, it has them all."""
        train = [k for k in range(len(self)) if k not in test]
        with_cot, rest = [k for k in train if self.reasoned[k]], [k for k in train if not self.reasoned[k]]
        return {"sft": with_cot or train, "rl": rest or train, "test": sorted(test)}

    def write(self, path, chosen):
        with open(path, "wb") as file:
            file.writelines(map(self.line, chosen))

    def counts(self, chosen):
        """How many of the items, with reasoning, and pictures."""
        return len(chosen), sum(self.reasoned[k] for k in chosen), sum(self.pictures[k] for k in chosen)


class Chosen:
    """Some items of a Draft, read one at a time: a list in len() and in iteration, not in memory."""

    def __init__(self, draft, numbers):
        self.draft, self.numbers = draft, numbers

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        return (json.loads(self.draft.line(k)) for k in self.numbers)


def convert(
    out,
    files,
    policies=(),
    *,
    media="",
    options=None,
    test=0.1,
    seed=0,
    processor=None,
    limits=(4096, 2048),
    overwrite=False,
    progress=False,
):
    """Write a data folder -> the closing report, a list of lines.

    files: paths of data; policies: [(file, name, place, [files of its bare <image> marks])]; media: where pictures
    stay; test: share of items kept for the test; processor: a model's, to count tokens; limits: of a prompt and of a
    response, in tokens. Raises InputError; then nothing is left.
    """
    options = options or Options([name for _, name, _, _ in policies])
    with NewFolder(out, overwrite) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of photographs; nothing is decoded here
        at = lambda name: os.path.join(folder, name)
        store = Store(folder, media)
        read = [read_policy(*policy, store) for policy in policies]
        written = [policy for policy, _ in read]
        write_json(at("policies.json"), written)

        draft, groups, lengths = Draft(at("draft")), Groups(), Lengths(processor, read)
        with open(at("dropped.txt"), "w", encoding="utf-8") as log:
            converter = Converter(store, [media] if media else [], options, lambda line: log.write(clean(line) + "\n"))
            for path in files:
                rows = converter.items(path)
                for item, keys, sizes in tqdm(rows, os.path.basename(path), disable=not progress):
                    draft.add(item)
                    groups.add(keys)
                    lengths.add(item, sizes)
        if not len(draft):
            dropped = sum(converter.reasons.values())
            found = f"{dropped} rows dropped, the first at {converter.example}" if dropped else "no rows"
            raise InputError(f"{', '.join(map(str, files))}: found {found}, expected at least one item")
        lengths.flush(wait=True)

        splits, kinds = draft.split(groups.test_side(test, seed)), Counter()
        for name, chosen in splits.items():
            if chosen:
                draft.write(at(f"{name}.jsonl"), chosen)
        rng = np.random.default_rng(seed)
        with open(at("cpt.jsonl"), "w", encoding="utf-8") as file:
            for policy in written:
                mine = Chosen(draft, [k for k in splits["sft"] if draft.owners[k] == policy["name"]])
                for item in cpt_items(policy, mine, rng):
                    kinds[item["kind"]] += 1
                    file.write(json.dumps(item, ensure_ascii=False) + "\n")
        draft.file.close()
        empty = [name for name in ("cpt.jsonl", "dropped.txt") if not os.path.getsize(at(name))]
        for name in ("draft", *empty):
            os.unlink(at(name))
    return report(out, written, draft, splits, kinds, converter, lengths, limits)


def clean(text):
    """A text from outside for the terminal: control characters escaped."""
    return "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in text)


def report(out, policies, draft, splits, kinds, converter, lengths, limits):
    """What was made, as lines of a table, and what the training scripts will say to it."""
    lines = []
    for policy in policies:
        tokens = f", {lengths.policies[policy['name']]:,} tokens" if lengths.processor else ""
        size = (
            f"{len(policy['text']):,} characters, {len(policy['sections'])} sections, {len(policy['images'])} pictures"
        )
        lines.append(f"policy {clean(policy['name'])}: {size}{tokens}")
    formats = ", ".join(f"{count:,} rows of format {name}" for name, count in converter.formats.items())
    lines += [f"data: {formats}", ""]
    row = "{:<6}{:<10}{:>8}{:>11}{:>10}{:>9}{:>9}{:>13}{:>10}".format
    lines.append(row("split", "kind", "items", "reasoning", "pictures", "prompt", "longest", "with policy", "response"))
    lines += [row("cpt", kind, f"{count:,}", *[""] * 6).rstrip() for kind, count in kinds.items()]
    for name, chosen in splits.items():
        if chosen:
            figures = lengths.row(chosen) if lengths.processor else [""] * 4
            lines.append(row(name, "", *(f"{count:,}" for count in draft.counts(chosen)), *figures).rstrip())
    if not lengths.processor:
        lines.append("(tokens: with --model M)")
    lines.append("")
    lines += [*lengths.complaints(limits)]
    for reason, times in converter.reasons.most_common(12):
        lines.append(f"dropped {times:,}: {clean(reason)} (first: {clean(converter.firsts[reason])})")
    if converter.reasons:
        lines.append(f"dropped {sum(converter.reasons.values()):,} in all, each with its place in {out}/dropped.txt")
    lines += [f"left out {times:,}: {what}" for what, times in converter.left_out.items()]
    if converter.ignored:
        lines.append("columns that nothing here reads: " + clean(", ".join(map(str, converter.ignored)))[:300])
    if not draft.counts(splits["sft"])[1]:
        lines.append("no reasoning found: sft.jsonl has answers alone; python -m data.cot --mode reverse writes chains")
    if splits["sft"] == splits["rl"]:
        lines.append("sft.jsonl and rl.jsonl have the same items")
    if not splits["test"]:
        lines.append("no test items: --test is 0, or all items share a picture or a conversation")
    return lines


# -- 4. the command ----------------------------------------------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m data.own", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--policy",
        action="append",
        default=[],
        metavar="FILE",
        help="the policy, text or Markdown; none: data for replay",
    )
    add(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="its name (default: the file's); both may come again",
    )
    add(
        "--policy-image",
        action="append",
        default=[],
        metavar="FILE",
        help="picture of the next bare <image> in the policy",
    )
    add(
        "--place",
        choices=PLACES,
        default="user",
        help="where the policy stands: first user turn or system prompt (user)",
    )
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="chats, tables or items: JSONL, JSON, CSV, TSV, parquet",
    )
    add("--out", required=True, metavar="DIR", help="the data folder to write")
    add("--format", choices=tuple(FORMATS), default="", help="of the files (default: by the keys of each row)")
    add(
        "--map",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="a column's name, as question=problem or answer=a.b",
    )
    add(
        "--answer",
        choices=("auto", "boxed", "text"),
        default="auto",
        help="in \\boxed{} or as free text (auto: chats are text)",
    )
    add("--every-turn", action="store_true", help="an item for each answer of a conversation (default: for the last)")
    add("--media", default="", metavar="DIR", help="pictures stay in this folder; later commands need the same flag")
    add("--test", type=float, default=0.1, metavar="SHARE", help="share of items kept for the test (default 0.1)")
    add("--seed", type=int, default=0, help="of the split (default 0)")
    add("--model", default="", metavar="M", help="count tokens with the tokenizer of this checkpoint")
    add(
        "--max-prompt",
        type=int,
        default=4096,
        metavar="TOKENS",
        help="limit that prompts are held against (default 4096)",
    )
    add("--max-response", type=int, default=2048, metavar="TOKENS", help="the same of responses (default 2048)")
    add("--overwrite", action="store_true", help="replace --out")
    return parser


def main(argv=None, load=None):
    """load: a processor from a checkpoint, as model.Processor.from_pretrained makes it."""
    args = arguments().parse_args(argv)
    names = args.name or [os.path.splitext(os.path.basename(path))[0] for path in args.policy]
    if len(names) != len(args.policy) or len(set(names)) != len(names) or not all(names):
        raise InputError(f"--name {names}: found {len(args.policy)} policies, expected another name for each")
    if not 0 <= args.test < 1 or min(args.max_prompt, args.max_response) < 1:
        raise InputError(f"--test {args.test} found, expected a share from 0 to below 1, and limits of at least 1")
    pairs = [text.partition("=") for text in args.map]
    if any(not ours or not theirs for ours, _, theirs in pairs):
        raise InputError(f"--map {args.map}: expected OURS=THEIRS, such as question=problem")
    if args.media and not os.path.isdir(args.media):
        raise InputError(f"--media {args.media}: no such folder")
    extra = args.policy_image
    policies = [
        (path, name, args.place, extra if not k else []) for k, (path, name) in enumerate(zip(args.policy, names))
    ]
    options = Options(
        names,
        {ours: theirs for ours, _, theirs in pairs},
        args.format,
        {"boxed": True, "text": False}.get(args.answer),
        args.every_turn,
    )
    lines = convert(
        args.out,
        args.data,
        policies,
        media=args.media,
        options=options,
        test=args.test,
        seed=args.seed,
        processor=load(args.model) if args.model else None,
        limits=(args.max_prompt, args.max_response),
        overwrite=args.overwrite,
        progress=sys.stderr.isatty(),
    )
    print("\n".join([f"{args.out}:", *lines]))


if __name__ == "__main__":

    def load_processor(path):
        from model import Processor  # the only thing that takes torch, and only with --model
        from support.runs import described

        return Processor.from_pretrained(described(path))

    command(lambda: main(load=load_processor))
