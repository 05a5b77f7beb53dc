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
import io
import json
import os
import re
import shutil
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
from data.formats import (
    ANSWERS,
    FORMATS,
    GROUPS,
    QUESTIONS,
    THOUGHTS,
    OnTheNetwork,
    read_rows,
    recognise,
    renamed,
    source,
)
from data.prose import Prose
from data.rewards import accuracy

SUFFIX = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
READ = {key.split(".")[0] for key in (*QUESTIONS, *ANSWERS, *THOUGHTS, *GROUPS)}
READ |= {"messages", "conversations", "image", "images", "image_path", "img", "system", "policy", "id", "boxed"}
BATCH = 256  # prompts tokenized at a time

# -- 1. the policy -----------------------------------------------------------------------------------------------------

HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
NUMBERED = re.compile(  # "1. ", "2) ", "1.1 ", "**3.** ", "Rule 4: ", "§ 5 "
    r" {0,3}(?:\*\*)?(?:(?:rule|section|article|case|step|§)\s*(\d+(?:\.\d+)*)[.):]?|(\d+(?:\.\d+)+)[.)]?|(\d+)[.)])"
    r"(?:\*\*)?:?[ \t]+\S",
    re.I,
)
PICTURE = re.compile(
    r"!\[(?P<alt>[^\]]*)\]\(\s*<?(?P<path>[^)\s>]+)>?(?:\s+[\"'][^)]*)?\)"  # ![alt](path "title")
    r"|!\[(?P<words>[^\]]*)\]\[(?P<key>[^\]]*)\]"  # ![alt][key], with [key]: path elsewhere
    r"|<img\b[^>]*?\bsrc=[\"'](?P<src>[^\"']+)[\"'][^>]*>"
    r"|<image>",
    re.I,
)


def sections(text):
    """The sections of a policy: [{"id", "section"}], its headings and numbered rules, each with the text up to the
    next.

    A heading without text of its own is no section. Numbers that begin anew under another heading are named with it. A
    text without headings and numbers is split at its empty lines.
    """
    parts, heading, fenced = [["", "", []]], "", False  # [heading, number, lines]
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        head, number = (None, None) if fenced else (HEADING.match(line), NUMBERED.match(line))
        if head:
            heading = head.group(2).strip("*_ ")
            parts.append([heading, "", [line]])
        elif number:
            parts.append([heading, next(filter(None, number.groups())), [line]])
        else:
            parts[-1][2].append(line)
    found = [
        (head, number, "\n".join(lines).strip())
        for head, number, lines in parts
        if number or head and "".join(lines[1:]).strip()
    ]
    if not found:
        blocks = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
        found = [("", str(k), block) for k, block in enumerate(blocks, 1)] if len(blocks) > 1 else []
        return [{"id": f"paragraph {number}", "section": block} for _, number, block in found]
    often, used, out = Counter(number for _, number, _ in found if number), Counter(), []
    for head, number, body in found:
        name = head if not number else f"rule {number}" if often[number] == 1 else f"{head}, rule {number}"
        used[name] += 1
        out.append({"id": name if used[name] == 1 else f"{name} ({used[name]})", "section": body})
    return out


def read_policy(path, name, place, extra, store, shown):
    """A policy of policies.json from a file of text or Markdown; its pictures go into the store.

    extra: picture files of the bare <image> marks, in their order; shown: {name: [(width, height)]}, to be added to.
    The sections' texts have a picture's alternative text in its place, as they are recited in words, and `shown` says
    which pictures stand in them.
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
    root, extra, images, alts = os.path.dirname(os.path.abspath(path)), list(extra), [], []

    def mark(found):
        file = found["path"] or found["src"]
        if found["key"] is not None:
            file = keys.get((found["key"] or found["words"]).lower())
            if file is None:
                raise InputError(f"--policy {path}: picture {clip(found.group())} names no file")
        if file is None and not extra:
            raise InputError(
                f"--policy {path}: {IMAGE} without a file, expected --policy-image FILE for each, or ![](FILE)"
            )
        picture, _, size = store.add(source(file or extra.pop(0), [root], f"--policy {path}"), f"--policy {path}")
        images.append(picture), shown.setdefault(name, []).append(size)
        alts.append((found["alt"] or found["words"] or "").strip() or "a picture")
        return IMAGE

    text = PICTURE.sub(mark, text)
    if extra:
        raise InputError(f"--policy-image {extra[0]}: found no {IMAGE} for it in {path}")
    parts, rest = sections(text), iter(range(len(images)))
    where = [text.find(part["section"]) for part in parts]
    for part, start in zip(parts, where):
        first = text.count(IMAGE, 0, start)
        part["shown"] = [images[first + k] for k in range(part["section"].count(IMAGE))]
        rest = iter(alts[first:])
        part["section"] = re.sub(IMAGE, lambda _: f"[{next(rest)}]", part["section"])
    entry = {"name": name, "text": text, "images": images, "sections": parts}
    return entry if place == "user" else {**entry, "place": place}


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


# -- 2. pictures -------------------------------------------------------------------------------------------------------


class Store:
    """The pictures of a data folder, named by their content: one that comes twice is one file, on one side of the
    split.

    A file is linked (copied where that cannot be); under `media` it stays where it is, and its path there is its name.
    """

    def __init__(self, folder, media=""):
        self.folder, self.media, self.known = folder, media, {}
        os.makedirs(os.path.join(folder, "images"))

    def add(self, picture, where):
        """(name, digest, (width, height)) of a path or of bytes; raises InputError for what is no picture."""
        if picture in self.known:
            return self.known[picture]
        try:
            if isinstance(picture, bytes):
                content = picture
            else:
                with open(picture, "rb") as file:
                    content = file.read()
            with Image.open(io.BytesIO(content), formats=list(SUFFIX)) as image:
                kind, size = image.format, image.size
        except Exception as error:  # Pillow's readers raise anything on damaged files
            found = f"picture {clip(picture)} found {type(error).__name__}"
            raise InputError(f"{where}: {found}, expected PNG, JPEG, WebP, GIF, BMP or TIFF") from None
        digest = hashlib.sha1(content).hexdigest()[:20]
        name = f"images/{digest}.{SUFFIX[kind]}"
        inside = self.media and isinstance(picture, str) and os.path.realpath(picture)
        if inside and os.path.commonpath([inside, os.path.realpath(self.media)]) == os.path.realpath(self.media):
            name = os.path.relpath(inside, os.path.realpath(self.media))
        else:
            self.put(picture, os.path.join(self.folder, name))
        if isinstance(picture, str):
            if len(self.known) > 4096:  # neighbours share pictures; memory is not to grow with the data
                self.known.clear()
            self.known[picture] = name, digest, size
        return name, digest, size

    def put(self, picture, path):
        try:
            if isinstance(picture, bytes) or os.path.islink(picture):
                raise OSError
            os.link(picture, path)
        except FileExistsError:  # the same content came before
            return
        except OSError:  # bytes, a link, another disk, or one without links
            if os.path.exists(path):
                return
            with open(path, "wb") as file:
                if isinstance(picture, bytes):
                    file.write(picture)
                else:
                    with open(picture, "rb") as original:
                        shutil.copyfileobj(original, file)


# -- 3. items ----------------------------------------------------------------------------------------------------------


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
        self.firsts, self.ids, self.seen, self.number = {}, set(), set(), 0

    def drop(self, error):
        """Note one row that cannot be used: its reason without the place and the particulars."""
        text = str(error)
        reason = re.sub(r"'.*?'|\".*?\"|\d+", "…", re.sub(r"^.*?(:| row )\d+: ", "", text))[:90]
        self.reasons[reason] += 1
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
                self.ignored.update(row.keys() - READ)
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
            raise InputError(
                f"{where}: the answer's braces do not balance, so that nobody could box it (--answer text)"
            )
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
        groups, wanted = list(members.values()), max(1, round(share * len(self.parent))) if share else 0
        chosen = []
        for k in np.random.default_rng(seed).permutation(len(groups)).tolist():
            if len(chosen) + len(groups[k]) <= wanted:
                chosen += groups[k]
        if share and not chosen and len(groups) > 1:
            chosen = min(groups, key=len)
        return set(chosen)


# -- 4. how long things are --------------------------------------------------------------------------------------------


class Lengths:
    """Tokens of prompts and responses by a model's processor, counted as items pass by; nothing without one."""

    def __init__(self, processor, policies, shown):
        self.processor, self.waiting, self.pool, self.under_way = processor, [], ThreadPoolExecutor(1), None
        self.texts, self.responses, self.pictures, self.count = (array("q") for _ in range(4))  # an entry per item
        self.owners, self.policies = [], {}
        if processor:
            for policy in policies:
                sizes, words = shown.get(policy["name"], []), policy["text"].replace(IMAGE, "") + "\n\n"
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


# -- 5. the folder -----------------------------------------------------------------------------------------------------


class Kept:
    """Items that lie in a file, read one at a time: a list in len() and in iteration, not in memory."""

    def __init__(self, numbers, read):
        self.numbers, self.read = numbers, read

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        return map(self.read, self.numbers)


def split(count, test, reasoned):
    """{"sft", "rl", "test": numbers of items}: SFT has those with reasoning, RL the rest; where there are none of
    either, it has them all."""
    train = [k for k in range(count) if k not in test]
    with_cot, rest = [k for k in train if reasoned[k]], [k for k in train if not reasoned[k]]
    return {"sft": with_cot or train, "rl": rest or train, "test": sorted(test)}


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

    policies: [(file, name, place, [files of its bare <image> marks])]; files: paths of data; media: where pictures
    stay; test: share of items kept for the test; limits: longest prompt and response in tokens. Two passes: rows to
    items in one draft file, of which only offsets are kept in memory, then each item into its split. Raises InputError;
    then nothing is left.
    """
    options = options or Options([name for _, name, _, _ in policies])
    with NewFolder(out, overwrite) as draft, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of photographs; nothing is decoded here
        store = Store(draft, media)
        shown = {}  # sizes of the policies' pictures
        written = [read_policy(*policy, store, shown) for policy in policies]
        write_json(os.path.join(draft, "policies.json"), written)
        lengths, groups, starts, reasoned = Lengths(processor, written, shown), Groups(), array("q"), array("b")
        owners, pictures = [], array("q")
        with open(os.path.join(draft, "dropped.txt"), "w", encoding="utf-8") as log:
            converter = Converter(store, [media] if media else [], options, lambda line: log.write(clean(line) + "\n"))
            with open(os.path.join(draft, "all"), "wb") as file:
                for path in files:
                    for item, keys, sizes in tqdm(
                        converter.items(path), desc=os.path.basename(path), disable=not progress
                    ):
                        starts.append(file.tell())
                        line = json.dumps(item, ensure_ascii=False) + "\n"
                        file.write(line.encode())
                        groups.add(keys)
                        reasoned.append("cot" in item)
                        owners.append(item["policy"])
                        pictures.append(len(item["images"]))
                        lengths.add(item, sizes)
        if not starts:
            why = converter.reasons.most_common(1)
            found = f"{why[0][1]} rows dropped, {why[0][0]}" if why else "no rows"
            raise InputError(f"{', '.join(map(str, files))}: found {found}, expected at least one item")
        lengths.flush(wait=True)
        splits = split(len(starts), groups.test_side(test, seed), reasoned)
        rng = np.random.default_rng(seed)
        with open(os.path.join(draft, "all"), "rb") as file:

            def read(k):
                file.seek(starts[k])
                return json.loads(file.readline())

            for name, chosen in splits.items():
                if chosen:
                    with open(os.path.join(draft, f"{name}.jsonl"), "wb") as side:
                        for k in chosen:
                            file.seek(starts[k])
                            side.write(file.readline())
            kinds = Counter()
            if written:
                with open(os.path.join(draft, "cpt.jsonl"), "w", encoding="utf-8") as side:
                    for policy in written:
                        mine = Kept([k for k in splits["sft"] if owners[k] == policy["name"]], read)
                        for item in cpt_items(policy, mine, rng):
                            kinds[item["kind"]] += 1
                            side.write(json.dumps(item, ensure_ascii=False) + "\n")
        os.unlink(os.path.join(draft, "all"))
        if not converter.reasons:
            os.unlink(os.path.join(draft, "dropped.txt"))
    counts = {
        name: (len(chosen), sum(reasoned[k] for k in chosen), sum(pictures[k] for k in chosen))
        for name, chosen in splits.items()
    }
    return report(out, written, splits, counts, kinds, converter, lengths, limits, test)


def clean(text):
    """A text from outside for the terminal: control characters escaped."""
    return "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in text)


def report(out, policies, splits, counts, kinds, converter, lengths, limits, test):
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
            lines.append(row(name, "", *(f"{count:,}" for count in counts[name]), *figures).rstrip())
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
    if not counts["sft"][1]:
        lines.append("no reasoning found: sft.jsonl has answers alone; python -m data.cot --mode reverse writes chains")
    if splits["sft"] == splits["rl"]:
        lines.append("sft.jsonl and rl.jsonl have the same items")
    if not splits["test"]:
        lines.append(
            "no test items: all items share a picture or a conversation" if test else "no test items (--test 0)"
        )
    return lines


# -- 6. the command ----------------------------------------------------------------------------------------------------


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
        progress=True,
    )
    print("\n".join([f"{args.out}:", *lines]))


if __name__ == "__main__":

    def load_processor(path):
        from model import Processor  # the only thing that takes torch, and only with --model

        return Processor.from_pretrained(path)

    command(lambda: main(load=load_processor))
