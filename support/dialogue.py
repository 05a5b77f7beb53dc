"""A response as a dialogue with an environment (data/tools.py): where a turn ends, its result is read, as context.

A tool that hangs, dies or raises ends in a text that tells the model so: the environment of a user's file runs in a
process of its own, like a reward (support/judging.py). No part of the method.
"""

from data import InputError, rewards
from data.tools import TURNS
from model import Encoded, parts
from support.judging import RewardFailed
from support.template import SYSTEM

LONGEST = 100_000  # characters of a result


class Dialogues:
    """What makes responses dialogues with an environment; without one (None), responses of one turn."""

    def __init__(self, environment, processor):
        self.environment, self.processor = environment, processor

    def __call__(self, items):
        """What `sample` is told for prompts of these items: a dialogue anew for each response."""
        make = lambda p: Dialogue(self.environment, items[p].get("given", items[p]), self.processor)
        return {"dialogue": make} if self.environment else {}

    def chat(self, messages):
        """A prompt's messages, whose system prompt ends in the environment's `system`, unless it says that already."""
        system = getattr(self.environment, "system", "")
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        if not system or any(system.strip() in part.get("text", "") for part in parts(messages[0])):
            return messages
        return [{**messages[0], "content": [*parts(messages[0]), {"type": "text", "text": system}]}, *messages[1:]]


class Dialogue:
    """What the engine asks where a turn of one response ends; `turns` becomes the response's record."""

    def __init__(self, environment, item, processor):
        self.environment, self.item, self.processor = environment, item, processor
        self.dialogue, self.turns, self.answered = environment(item), [], True

    def reply(self, tokens, room):
        """What the row reads after a turn (tokens), Encoded, at most `room` tokens; None: the response ends."""
        text = self.processor.decode(tokens)
        self.turns.append({"role": "assistant", "text": text})
        if tokens[-1] != self.processor.stop_ids[0]:  # <|endoftext|> ends more than a turn
            return None
        result, pictures = self.step(text)
        if result is None:
            return None
        self.answered = False  # unless a later turn does
        if len(self.turns) // 2 >= getattr(self.environment, "turns", TURNS):
            return None
        read = following(self.processor, result, pictures)
        if len(read.input_ids) > room:
            return None
        self.turns.append({"role": "tool", "text": result, "pictures": len(pictures)})
        self.answered = True
        return read

    def step(self, text):
        """(result, pictures) of the environment; an error text in place of what is none."""
        try:
            result = self.dialogue.step(text)
            result, pictures = result if isinstance(result, tuple) else (result, [])
            if result is not None and not isinstance(result, str):
                raise TypeError(f"the result is {result!r:.40}, expected text, (text, [PIL.Image]) or None")
            if result and len(result) > LONGEST:
                raise ValueError(f"the result has {len(result):,} characters, expected {LONGEST:,} at most")
            return result, pictures
        except Exception as error:
            rewards.failures.note(self.environment, error, self.item)
            told = f"{error.kind}: {error.trace[-1].strip()}" if isinstance(error, RewardFailed) else repr(error)
            return f"error: {told}", []

    def end(self, tokens, finished):
        """The response ends, its last turn being `tokens` -> (has it answered?, its turns)."""
        if not finished:  # cut in the middle of a turn
            self.turns.append({"role": "assistant", "text": self.processor.decode(tokens)})
        return finished and self.answered, self.turns


def following(processor, text, pictures=()):
    """What follows an assistant's turn where a tool has answered, Encoded: up to where the next turn starts.

    As Qwen2.5's template renders the role tool: a user's turn with <tool_response>, by the checkpoint's own template.
    """
    asked = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    inside = [{"type": "image", "image": picture} for picture in pictures]
    head, tail = ({"type": "text", "text": part} for part in ("<tool_response>\n", f"{text}\n</tool_response>"))
    before = processor.encode(asked).input_ids
    whole = processor.encode([*asked, {"role": "user", "content": [head, *inside, tail]}], add_generation_prompt=True)
    turn = before.tolist()
    start = len(turn) - turn[::-1].index(processor.stop_ids[0]) if processor.stop_ids[0] in turn else len(turn) + 1
    if not start <= len(turn) or whole.input_ids[:start].tolist() != turn[:start]:
        raise InputError("found a chat template that does not end a turn in <|im_end|>, expected one for dialogues")
    return Encoded(whole.input_ids[start:], whole.pixel_values, whole.grid_thw)


def as_judged(processor, pairs):
    """Texts and items as rewards read them, of [(item, engine.Response)]; of a dialogue the text is its last turn.

    item["dialogue"] is all of its turns.
    """
    texts, items = [], []
    for item, response in pairs:
        texts.append(response.turns[-1]["text"] if response.turns else processor.decode(response.tokens))
        items.append({**item, "dialogue": response.turns} if response.turns else item)
    return texts, items
