"""Chat templates of other models: Jinja in the sandbox that transformers renders them in, within limits.

A template comes with a checkpoint, from anybody. The sandbox keeps it from the process; what it may cost is limited
here: lines run, characters made, and the ways to make a long text in one step.
"""

import json
import sys
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import InputError
from support.files import shown

STEPS = 10**6  # lines that a chat may run
LONGEST = 10**7  # characters of any text on the way
GROWING = frozenset(  # filters and methods of texts whose result is as long as a number says
    "batch center expandtabs format format_map indent ljust pprint random rjust slice translate urlize wordwrap "
    "xmlattr zfill".split()
)


class Spent(BaseException):
    """The template's budget is used up; nothing between here and `within_budget` may catch it."""


def within_budget(work):
    """work(), ended where it takes more steps, or makes a longer text, than a chat can need."""
    left, before = STEPS, sys.gettrace()

    def watch(frame, event, value):
        nonlocal left
        left -= 1
        if event == "call":  # of Jinja's own functions the lines do not count
            frame.f_trace_lines = frame.f_code.co_filename == "<template>"
        if left < 0 or event == "return" and isinstance(value, str) and len(value) > LONGEST:
            raise Spent(f"more than {STEPS:,} steps" if left < 0 else f"a text of more than {LONGEST:,} characters")
        return watch

    sys.settrace(watch)
    try:
        return work()
    finally:
        sys.settrace(before)


def check_growth(text, *values):
    """Refuse `text.replace(...)`, `text.join(...)` and their like where texts multiply."""
    sizes = [len(value) for value in values if hasattr(value, "__len__")]
    if isinstance(text, str) and len(text) * max(sizes, default=0) > 10 * LONGEST:
        raise jinja2.TemplateError("texts that grow too long")


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context, operator, left, right):
        numbers = all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in (left, right))
        if operator == "**" or not numbers:
            raise jinja2.TemplateError(f"{operator!r} of {type(left).__name__} and {type(right).__name__}")
        return super().call_binop(context, operator, left, right)

    def getattr(self, value, name):
        if type(value) is dict and name in value and not hasattr(dict, name):  # what most of a template does
            return value[name]
        return super().getattr(value, name)

    def is_safe_attribute(self, value, name, found):
        return name not in GROWING and super().is_safe_attribute(value, name, found)

    def call(self, context, function, *args, **kwargs):
        check_growth(getattr(function, "__self__", None), *args)
        return super().call(context, function, *args, **kwargs)


class Generation(Extension):
    """{% generation %}, which marks what an assistant wrote for training; in a prompt it says nothing."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True)).set_lineno(line)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if isinstance(indent, int) and indent > 16 or isinstance(indent, str) and len(indent) > 16:
        raise jinja2.TemplateError("an indent of more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message):
    raise jinja2.TemplateError(message)


def sandbox():
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    plain = {name: function for name, function in made.filters.items() if name not in GROWING}
    replace, join = plain["replace"], plain["join"]

    @jinja2.pass_eval_context
    def bounded_replace(context, text, *args, **kwargs):
        check_growth(str(text), *args, *kwargs.values())
        return replace(context, text, *args, **kwargs)

    @jinja2.pass_eval_context
    def bounded_join(context, values, *args, **kwargs):
        values = list(values)
        for separator in (*args, *kwargs.values()):
            check_growth(separator, values)
        return join(context, values, *args, **kwargs)

    made.filters = {**plain, "tojson": to_json, "replace": bounded_replace, "join": bounded_join}
    strftime_now = lambda format: datetime.now().strftime(format)
    made.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}
    return made


class Template:
    """One template of a checkpoint, compiled. tokens: what it may write by name, e.g. {"eos_token": "<|im_end|>"}."""

    def __init__(self, path, text, tokens):
        self.path, self.tokens = path, tokens
        try:
            self.template = sandbox().from_string(text)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise self._bad(error, "a Jinja template") from None

    def render(self, messages, add_generation_prompt):
        """The text of a chat, as `official` in support/template.py has it; pictures are not shown to a template."""
        chat = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [
                    part if part["type"] == "text" else {"type": "image", "image": "picture"} for part in content
                ]
            chat.append({**message, "content": content})
        values = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        template = self.template
        context = template.new_context({**template.environment.globals, **self.tokens, **values}, shared=True)
        try:
            return within_budget(lambda: template.environment.concat(template.root_render_func(context)))
        except (Exception, Spent) as error:  # a template may raise anything
            raise self._bad(error, "one that renders this chat") from None

    def _bad(self, error, expected):
        kind = type(error).__name__
        found = f"a chat template that fails ({kind}: {shown(str(error), 200)})"
        return InputError(f"{self.path}: found {found}, expected {expected}")
