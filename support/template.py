"""Chats as text: the chat template that a checkpoint brings, and control tokens that somebody typed.

Qwen2.5-VL's own template is written out below, so that a reader sees what a prompt is. Any other is rendered by jinja2
in a sandbox (support/sandbox.py), or refused by name where that is not installed.
"""

import re

from data import InputError
from support.files import find_file, read_json, read_text, shown

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "You are a helpful assistant."
# The hub's chat_template.json, in which numbers of the pictures are off unless asked for.
OFFICIAL = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONGEST = 1 << 16  # characters of a template; those of the Qwen family have 10,000 at most
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")  # of tokenizer_config.json, which a template may write


def official(messages, add_generation_prompt):
    """What OFFICIAL makes of a chat. messages: [{"role", "content"}], the content a string or a list of parts."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    text = ""
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said = "".join(part["text"] if part["type"] == "text" else PICTURE for part in parts)
        text += f"<|im_start|>{message['role']}\n{said}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def find_template(folder):
    """(path, text) of a checkpoint's chat template, in transformers' order; (None, OFFICIAL) where it has none."""
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        if not (path := find_file(folder, name)):
            continue
        text = read_text(path) if name.endswith(".jinja") else read_json(path).get("chat_template")
        if isinstance(text, list):  # several by name
            named = {each.get("name"): each.get("template") for each in text if isinstance(each, dict)}
            text = named.get("default", text)
        if not text:
            continue
        if not isinstance(text, str) or len(text) > LONGEST:
            found = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
            raise InputError(f"{path}: found a chat template of {found}, expected a text of {LONGEST:,} at most")
        return path, text
    return None, OFFICIAL


def read_template(folder):
    """render(messages, add_generation_prompt) -> text, by a checkpoint's chat template; parts as in `official`.

    Raises InputError for a template that is none, or needs jinja2 where that is not installed.
    """
    path, text = find_template(folder)
    if text.strip() == OFFICIAL.strip():
        return official
    try:
        from support.sandbox import Template
    except ImportError:
        expected = "Qwen2.5-VL's own, or jinja2 installed (pip install jinja2)"
        raise InputError(f"{path}: found a chat template of another kind, expected {expected}") from None
    config = find_file(folder, "tokenizer_config.json")
    config = read_json(config) if config else {}
    tokens = {name: config[name] for name in NAMED if config.get(name) is not None}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return Template(path, text, tokens).render


# -- control tokens ---------------------------------------------------------------------------------------------------

START, END = "\ufdd0", "\ufdd1"  # around a control token that was typed; no character has these codes


class ControlTokens:
    """Keeps the control tokens that a template writes apart from those in a text, which are plain text.

    `mark` them before a text goes into a template, then `encode` what it renders, as transformers does under the name
    of sanitize_control_tokens. A text that ends in the beginning of one is cut there, so that no two texts make one.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
        firsts = "".join({re.escape(name[0]) for name in names})
        self.any = re.compile(f"[{START}{END}{firsts}]")  # a text without these needs no look
        self.typed = re.compile(pattern)
        self.marked = re.compile(f"{START}({pattern}){END}|[{START}{END}]")
        self.beginnings = {name[:length] for name in names for length in range(1, len(name))}
        self.longest = max(map(len, names), default=1)
        tokenizer.encode_special_tokens = True  # as if they were none
        self.plain = {name: self._spell(name) for name in names}  # token -> its ids as plain text
        tokenizer.encode_special_tokens = False

    def _spell(self, name):
        ids = self.tokenizer.encode(name, add_special_tokens=False).ids
        if self.tokenizer.token_to_id(name) in ids:  # a vocabulary of whole words may hold it as one of them
            ids = [id for c in name for id in self.tokenizer.encode(c, add_special_tokens=False).ids]
        return ids

    def mark(self, text):
        if not self.any.search(text):
            return text
        text = self.typed.sub(rf"{START}\g<0>{END}", text.replace(START, "").replace(END, ""))
        body = text.rstrip()
        tail = body[-self.longest :]
        cut = any(tail[i:] in self.beginnings for i in range(len(tail)))
        return body + END + text[len(body) :] if cut else text

    def unmark(self, text):
        return self.marked.sub(lambda found: found[1] or "", text)

    def encode(self, text):
        """Token ids of a rendered text, in which what was marked is plain."""
        ids = []
        try:
            for i, piece in enumerate(self.marked.split(text)):  # text, marked token or None, text, ...
                if piece:
                    ids += self.plain[piece] if i % 2 else self.tokenizer.encode(piece, add_special_tokens=False).ids
        except TypeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
            raise InputError(f"found {shown(ascii(text))} in a chat, expected text that UTF-8 can hold") from None
        return ids
