"""Other people's data as items of ours: chat logs, LLaVA and ShareGPT, what EasyR1, verl and TRL read, and tables.

    for where, row in read_rows("log.jsonl"): ...          any of JSONL, JSON, CSV, TSV, parquet, a row at a time
    FORMATS[recognise(row)](row, where)                    -> Example

| format | known by | what it holds |
| --- | --- | --- |
| openai | `messages` | OpenAI chats: content text, or parts of text and image_url; TRL's image parts with `images` |
| llava | `conversations` | {"from": "human", "value"} and so on, `image` or `images`, <image> marks in the text |
| verl | `prompt` or `problem` | text or messages; `answer`, `solution` or `reward_model.ground_truth`; `images` |
| own | `question` and `answer` | our own items, and any table with these columns |

A reader looks at one row and knows nothing of the others; what it cannot use it refuses with an InputError of one line.
"""

import base64
import binascii
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from PIL import Image

from data import InputError
from data.dataset import IMAGE, clip, parse_json

CHUNK = 1 << 20  # characters of a JSON file read at a time
SUFFIX = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}

OPENED = [kind for kind in SUFFIX if kind != "MPO"]  # which has no reader of its own: a JPEG turns out to be one

# -- 1. rows of a file -------------------------------------------------------------------------------------------------


def read_rows(path, refuse=None, expected="a .jsonl, .json, .csv, .tsv or .parquet file"):
    """The rows of a file, one at a time, each with where it stands: ("FILE:12", {column: value}), ...

    refuse: called with an InputError for a row that cannot be read, in place of raising it (a torn last line of a log).
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, expected {expected}")
    readers = {".parquet": _parquet, ".csv": _table, ".tsv": _table, ".json": _json}
    read = readers.get(os.path.splitext(path)[1].lower(), _jsonl)
    try:
        for where, row in read(path):
            try:
                if isinstance(row, InputError):
                    raise row
                row = row if read in (_parquet, _table) else parse_json(row, where)
                if not isinstance(row, dict):
                    hint = " (a list of rows belongs in a .json file)" if isinstance(row, list) else ""
                    raise InputError(f"{where}: {type(row).__name__} found, expected an object{hint}")
            except InputError as error:
                if refuse is None:
                    raise
                refuse(error)
            else:
                yield where, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}), expected {expected}") from None


def _jsonl(path):
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line


def _json(path):
    """The objects of a JSON list, each as text, without ever holding the whole file."""
    scan, text, number, end = json.JSONDecoder(), "", 0, False
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(CHUNK).lstrip()
        if text[:1] == "{" and _is_json(text.split("\n", 1)[0]) and "\n{" in text:  # JSON lines under the name .json
            yield from _jsonl(path)
            return
        if text[:1] == "{":  # one object, which may hold the list: {"data": [...]}
            rows = _rows_in(parse_json(text + file.read(), path))
            yield from ((f"{path}: row {k}", json.dumps(row)) for k, row in enumerate(rows, 1))
            return
        if text[:1] != "[":
            raise InputError(f"{path}: not JSON, found {clip(text[:20])}, expected a list of objects")
        text, more = text[1:], CHUNK
        while True:
            text = text.lstrip(" \t\r\n,")
            try:
                if text[:1] == "]":
                    if rest := (text[1:] + file.read()).strip():
                        raise InputError(f"{path}: not JSON, found {clip(rest[:20])} after the list")
                    return
                _, length = scan.raw_decode(text)
                if length == len(text) and not end:
                    raise ValueError  # a number may go on in the next piece
            except InputError:
                raise
            except (ValueError, RecursionError):
                piece = file.read(more)
                if not piece:
                    raise InputError(f"{path}: not JSON after row {number} (the list is not closed)") from None
                text, more, end = text + piece, 2 * more, len(piece) < more
                continue
            number, more = number + 1, CHUNK
            yield f"{path}: row {number}", text[:length]
            text = text[length:]


def _rows_in(whole):
    """The rows that an object holds: in its one list of objects, or as its values by their ids; or it is one itself."""
    lists = [rows for rows in whole.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if whole.keys() & KEYS:
        return [whole]
    if len(lists) == 1:
        return lists[0]
    return [*whole.values()] if whole and all(isinstance(row, dict) for row in whole.values()) else [whole]


def _is_json(line):
    try:
        json.loads(line)
        return True
    except ValueError:
        return False


def _table(path):
    csv.field_size_limit(1 << 27)
    with open(path, encoding="utf-8-sig", newline="") as file:
        head = next(filter(str.strip, file), "")
        marks = "\t" if path.lower().endswith(".tsv") else max(",;\t", key=head.count)
        file.seek(0)
        rows = csv.DictReader(file, delimiter=marks, strict=True)
        try:
            while rows.fieldnames is not None and not any(map(str.strip, rows.fieldnames)):  # blank lines
                rows.fieldnames = next(rows.reader, None)
            names = [name.strip() for name in rows.fieldnames or []]
            rows.fieldnames = [name.lower() if name.lower() in KEYS else name for name in names]
            if twice := {name for name in rows.fieldnames if name and rows.fieldnames.count(name) > 1}:
                raise InputError(f"{path}: found two columns named {clip(min(twice))}, expected each name once")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None in row:
                    columns = f"{len(rows.fieldnames)} columns expected, {len(row[None])} more found"
                    yield where, InputError(f"{where}: {columns}")
                    continue
                yield where, {key: value for key, value in row.items() if value not in (None, "")}
        except csv.Error as error:
            raise InputError(f"{path}:{rows.line_num}: {error}, expected a table") from None


def _parquet(path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: parquet needs pyarrow, found none (pip install pyarrow), or give JSONL") from None
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: unreadable parquet ({error})") from None


# -- 2. an example -----------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """A row as an item, before its pictures are in the data folder."""

    turns: list  # [(role, text with <image> marks)], the last one the user's
    pictures: list  # paths, data URIs or bytes, in the order of the marks
    answer: str
    cot: str = ""
    boxed: bool | None = None  # None: as the converter's options say
    policy: str = ""
    conversation: str = ""  # examples of one conversation stand on one side of the split
    id: str = ""
    left_out: list = field(default_factory=list)  # what was not taken over, to be counted


def split_thoughts(text):
    """(thoughts, answer) of a response: what stands in <think></think>, and what follows it."""
    head, closed, answer = text.rpartition("</think>")
    return (head.partition("<think>")[2].strip() or head.strip(), answer.strip()) if closed else ("", text.strip())


def unboxed(text):
    """The inside of an answer that is one \\boxed{...} or <answer>...</answer> and nothing else, and whether it was."""
    text = re.sub(r"^\s*<answer>(.*)</answer>\s*$", r"\1", text, flags=re.DOTALL)
    found = re.fullmatch(r"\s*\$*\\boxed\{(.*)\}\$*\s*", text, re.DOTALL)
    return (found.group(1).strip(), True) if found else (text.strip(), False)


def recognise(row, where):
    """The name of the format that a row has, by its keys; raises InputError for one that is none of them."""
    if isinstance(row.get("conversations"), list):
        return "llava"
    if isinstance(row.get("question"), str) and "answer" in row or {"id", "messages", "answer"} <= row.keys():
        return "own"
    if isinstance(row.get("messages"), list):
        return "openai"
    if first(row, QUESTIONS) is not None:
        return "verl"
    kinds = {"conversations": "a list", "messages": "a list", "question": "text"}
    for key in (key for key in kinds if row.get(key) not in (None, "")):
        raise InputError(f"{where}: {key} holds {type(row[key]).__name__}, expected {kinds[key]}")
    found = ", ".join(map(str, row))[:200] or "nothing"
    raise InputError(
        f"{where}: found the keys {found}, expected messages, conversations, prompt, problem or question (--map)"
    )


QUESTIONS = ("problem", "prompt", "question", "query", "instruction", "input")
ANSWERS = ("reward_model.ground_truth", "ground_truth", "answer", "solution", "completion", "response", "output")
THOUGHTS = ("cot", "reasoning", "reasoning_content", "rationale", "thinking", "extra_info.reasoning")
GROUPS = ("conversation_id", "conversation", "dialog_id", "thread_id", "ticket", "session_id")
KEYS = {"messages", "conversations", "image", "images", "image_path", "img", "system", "policy", "id", "boxed"}
KEYS |= {key.split(".")[0] for key in (*QUESTIONS, *ANSWERS, *THOUGHTS, *GROUPS)}  # what is read of a row


def get(row, path):
    """row["a"]["b"] of the path "a.b"; None where something is missing."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def first(row, paths):
    for path in paths:
        if (value := get(row, path) if "." in path else row.get(path)) not in (None, "", []):
            return value


def renamed(row, names):
    """A row with columns under other names: {"question": "problem"} puts row["problem"] under "question"."""
    new = {ours: get(row, theirs) for ours, theirs in names.items()}
    return {**{key: value for key, value in row.items() if key not in names.values()}, **new} if names else row


# -- 3. the formats ----------------------------------------------------------------------------------------------------

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}
SPEAKERS |= {"bing": "assistant", "ai": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant"}
SPEAKERS |= {"system": "system", "developer": "system"}
SPEAKERS |= {"tool": "tool", "function": "tool", "observation": "tool", "function_call": "assistant"}


def openai(row, where):
    chat, pictures = chat_turns(row["messages"], where)
    return conversation(system(row, where) + chat, fill(pictures, column(row, where), where), row, where)


def llava(row, where):
    chat = []
    for k, turn in enumerate(row["conversations"]):
        said = turn if isinstance(turn, dict) else {}
        speaker, text = said.get("from", said.get("role")), said.get("value", said.get("content"))
        if not isinstance(text, str):
            raise InputError(f"{where}: turn {k} of conversations holds {clip(turn)}, expected from and value")
        chat.append((role(speaker, where), text))
    return conversation(system(row, where) + chat, column(row, where), row, where)


def verl(row, where):
    asked, answer, pictures = first(row, QUESTIONS), first(row, ANSWERS), []
    if isinstance(asked, list):
        chat, pictures = chat_turns(asked, where)
    elif isinstance(asked, str):
        extra = row.get("input") if asked == row.get("instruction") else None  # Alpaca's
        chat = [("user", f"{asked}\n{extra}" if isinstance(extra, str) and extra.strip() else asked)]
    else:
        raise InputError(f"{where}: the prompt is {type(asked).__name__}, expected text or a list of messages")
    chat = system(row, where) + chat
    if isinstance(answer, list):  # TRL's completion
        said, _ = chat_turns(answer, where)
        answer = said[-1][1] if said else ""
    if answer is None:
        raise InputError(f"{where}: no answer, found the keys {clip(', '.join(row))} (--map answer=COLUMN)")
    if isinstance(answer, dict):
        answer = json.dumps(answer, ensure_ascii=False)
    example = conversation([*chat, ("assistant", str(answer))], fill(pictures, column(row, where), where), row, where)
    example.boxed = None if isinstance(first(row, ("completion", "output")), (str, list)) else True
    return example


def own(row, where):
    for key in ("question",) if "messages" not in row else ():
        if not isinstance(row[key], str):
            raise InputError(f"{where}: key {key!r} holds {type(row[key]).__name__}, expected text")
    if row["answer"] in (None, "", [], {}):
        raise InputError(f"{where}: the answer is empty")
    answer = row["answer"] if isinstance(row["answer"], str) else json.dumps(row["answer"], ensure_ascii=False)
    chat = chat_turns(row["messages"], where)[0] if "messages" in row else [("user", row["question"])]
    chat = system(row, where) + chat
    example = conversation([*chat, ("assistant", answer)], column(row, where), row, where)
    example.boxed = row["boxed"] if isinstance(row.get("boxed"), bool) else True
    example.id = row["id"] if isinstance(row.get("id"), str) else ""
    return example


FORMATS = {"openai": openai, "llava": llava, "verl": verl, "own": own}


def system(row, where):
    """The turn of a row's own system prompt, if it has any."""
    text = row.get("system") or ""
    if not isinstance(text, str):
        raise InputError(f"{where}: key 'system' holds {type(text).__name__}, expected text")
    return [("system", text)] if text.strip() else []


def role(speaker, where):
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise InputError(f"{where}: a turn of {clip(speaker)}, expected one of {', '.join(SPEAKERS)}")
    return SPEAKERS[speaker.lower()]


def chat_turns(messages, where):
    """OpenAI messages as ([(role, text)], [picture or None]); None: the picture stands in a column of its own."""
    chat, pictures = [], []
    for k, message in enumerate(messages):
        here = f"{where}: message {k}"
        if not isinstance(message, dict):
            raise InputError(f"{here} is {type(message).__name__}, expected role and content")
        who, content, text = role(message.get("role"), here), message.get("content"), ""
        if not isinstance(content, (str, dict, list, tuple, type(None))):
            raise InputError(f"{here} holds {type(content).__name__}, expected text or a list of parts")
        for part in [content] if isinstance(content, (str, dict)) else content or []:
            part = {"type": "text", "text": part} if isinstance(part, str) else part
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
                text += part["text"]
            elif kind in ("image_url", "image", "input_image"):
                picture = part.get("image_url", part.get("image", part.get("path")))
                pictures.append(picture.get("url", picture) if isinstance(picture, dict) else picture)
                text += IMAGE
            elif kind != "refusal":
                raise InputError(f"{here} has a part {clip(kind)}, expected text and image_url")
        calls, old = message.get("tool_calls") or [], message.get("function_call")
        for call in [*calls, *([{"function": old}] if old else [])]:
            text += tool_call(call, here)
        if thoughts := message.get("reasoning_content") or message.get("reasoning"):
            if not isinstance(thoughts, str):
                raise InputError(f"{here} has reasoning of {type(thoughts).__name__}, expected text")
            text = f"<think>{thoughts}</think>{text}"
        chat.append((who, text))
    return chat, pictures


def tool_call(call, where):
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a tool call without function.name")
    arguments = function.get("arguments") or {}
    arguments = parse_json(arguments, where) if isinstance(arguments, str) else arguments
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def fill(pictures, column, where):
    """Pictures of parts, those without a source of their own taken from the row's column in their order."""
    if not pictures:
        return column
    rest = iter(column)
    found = [next(rest, None) if picture is None else picture for picture in pictures]
    if None in found or next(rest, None) is not None:
        raise InputError(f"{where}: {len(pictures)} pictures in the messages, {len(column)} in the column images")
    return found


def column(row, where):
    """What `images` or `image` holds, as a list of sources."""
    value = next(
        (row[key] for key in ("images", "image", "image_path", "img") if row.get(key) not in (None, "", [])), []
    )
    if isinstance(value, str) and not value.startswith("data:"):  # a table's cell
        if value.lstrip().startswith("["):
            value = parse_json(value if '"' in value else value.replace("'", '"'), where)  # or as Python prints a list
        else:
            value = value.split(";")
        value = [name.strip() if isinstance(name, str) else name for name in value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def conversation(chat, pictures, row, where):
    """Turns whose last is the assistant's, as an Example: earlier ones are context, the last is learned."""
    chat = [
        ("user", f"<tool_response>\n{text}\n</tool_response>") if who == "tool" else (who, text) for who, text in chat
    ]
    if chat and chat[0][0] == "system" and not chat[0][1].strip():
        chat = chat[1:]
    said = len(chat)
    while chat and chat[-1][0] != "assistant":
        chat = chat[:-1]
    left_out = ["turns after the last answer"] * (said - len(chat))
    if len(chat) < 2 or chat[-2][0] != "user":
        raise InputError(f"{where}: no answer of the assistant to a user's turn")
    if any(who == "system" for who, _ in chat[1:]):
        raise InputError(f"{where}: a system prompt after the first turn")
    empty = [k for k, (_, text) in enumerate(chat) if not text.strip()]
    if empty:
        raise InputError(f"{where}: turn {empty[0]} is empty")
    cot, answer = split_thoughts(chat[-1][1])
    cot = str(first(row, THOUGHTS) or cot).strip()
    if "<think>" in answer:
        raise InputError(f"{where}: a <think> without its </think>")
    if IMAGE in chat[-1][1]:
        raise InputError(f"{where}: {IMAGE} in what is to be learned, expected text")
    answer, boxed = unboxed(answer)
    if not answer:
        raise InputError(f"{where}: the answer is empty")
    kept = [(who, split_thoughts(text)[1] if who == "assistant" else text) for who, text in chat[:-1]]
    left_out += ["reasoning of earlier turns"] * sum(
        a != b.strip() for (_, a), (who, b) in zip(kept, chat) if who == "assistant"
    )
    marks = sum(text.count(IMAGE) for _, text in kept)
    if marks not in (0, len(pictures)):
        raise InputError(f"{where}: {marks} {IMAGE} in the text, {len(pictures)} pictures")
    policy, group = row.get("policy"), first(row, GROUPS)
    if not isinstance(policy, (str, type(None))):
        raise InputError(f"{where}: key 'policy' holds {type(policy).__name__}, expected a name")
    return Example(
        turns=kept,
        pictures=pictures,
        answer=answer,
        cot=cot,
        boxed=boxed or None,
        policy=policy or "",
        conversation=str(group) if isinstance(group, (str, int)) else "",
        left_out=left_out,
    )


# -- 4. pictures -------------------------------------------------------------------------------------------------------


def source(picture, roots, where):
    """What a row calls a picture, as a path that exists or as bytes.

    picture: a path, file:// or data: URI, bytes, or {"bytes", "path"}; roots: folders that relative paths start from.
    Raises InputError for what lies on the network or nowhere.
    """
    if isinstance(picture, dict):
        held = picture.get("bytes")
        held = f"data:;base64,{held}" if isinstance(held, str) else held  # as JSON has it
        picture = held or picture.get("path") or picture.get("url")
    if isinstance(picture, (bytes, bytearray)):
        return bytes(picture)
    if not isinstance(picture, str) or not picture.strip() or "\0" in picture:
        raise InputError(f"{where}: picture {clip(picture)}, expected a path, a data URI or bytes")
    if picture.startswith("data:"):
        head, comma, body = picture.partition(",")
        try:
            if not comma or not head.endswith(";base64"):
                raise ValueError("no ;base64,")
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{where}: picture {clip(picture)} is no data URI of base64 ({error})") from None
    if re.match(r"(?i)(https?|ftp|s3|gs)://", picture):
        raise OnTheNetwork(
            f"{where}: picture {clip(picture)} lies on the network, expected a file (nothing is downloaded here)"
        )
    if picture.lower().startswith("file://"):
        picture = unquote(urlsplit(picture).path)
    for root in roots:
        for name in dict.fromkeys((picture, picture.replace("\\", "/"))):  # a log from Windows
            path = os.path.join(root, name)
            if len(name) < 4096 and os.path.isfile(path):
                return path
    if len(picture) > 200 and re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", picture):  # base64 without a data URI's head
        with contextlib.suppress(ValueError):
            return base64.b64decode(picture)
    raise InputError(f"{where}: picture {clip(picture)} is missing from {' and '.join(roots)}")


class OnTheNetwork(InputError):
    """Ends the command, where other faults cost a row: a log that was meant to be downloaded first is no small loss."""


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
            with Image.open(io.BytesIO(content), formats=OPENED) as image:
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
