"""The GTAPolicy itself: fourteen tools, 24 rules in our own prose, and the engine that applies them.

    policy_text()                                  what the model reads
    version("OCR", profile)                        "v4"
    next_step(wants, pictures, profile, history)   the one call that the rules ask for now, and the rules behind it

The version rules stand once, as rows; the prose and the engine are both made from them, so changing a row (an override)
changes the two alike. The method's facts (METHOD: versions by account type, age and credits) are the rows' content.
"""

import json
import re
from dataclasses import dataclass

NAME = "G14-Belmora"

# -- 1. versions by profile --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a version rule: which version serves whom. Ranges are (least, most), whole numbers, None = open."""

    version: str
    accounts: str = "ABCD"
    credits: tuple = (None, None)
    age: tuple = (None, None)

    def fits(self, profile):
        """Whether a profile {account_type, credits, age} meets every condition of the row."""
        inside = [
            (lo is None or profile[key] >= lo) and (hi is None or profile[key] <= hi)
            for key, (lo, hi) in (("credits", self.credits), ("age", self.age))
        ]
        return profile["account_type"] in self.accounts and all(inside)

    def words(self):
        """The conditions as the policy states them, such as "account type B or C, credits of 501 or more"."""
        parts = [] if self.accounts == "ABCD" else ["account type " + " or ".join(self.accounts)]
        for key, (lo, hi) in (("credits", self.credits), ("age", self.age)):
            if lo is not None and hi is not None:
                parts.append(f"{key} from {lo} to {hi}")
            elif lo is not None:
                parts.append(f"{key} of {lo} or more")
            elif hi is not None:
                parts.append(f"{key} of {hi} or less")
        return ", ".join(parts)


VERSIONS = {
    "ImageDescription": (Row("v5", "A"), Row("v4", "BC", credits=(501, None)), Row("v3", "BC", credits=(None, 500)),
                         Row("v2", "D", credits=(501, None)), Row("v1", "D", credits=(None, 500))),
    "OCR": (Row("v5", credits=(None, 250)), Row("v4", "AB", credits=(251, 750)), Row("v3", "CD", credits=(251, 750)),
            Row("v2", credits=(751, None), age=(None, 20)), Row("v1", credits=(751, None), age=(21, None))),
    "GoogleSearch": (Row("v1", age=(None, 20)), Row("v2", credits=(None, 499), age=(21, None)),
                     Row("v3", credits=(500, None), age=(21, None))),
    "TextToImage": (Row("v1", "ABC"), Row("v2", "D", credits=(501, None)), Row("v3", "D", credits=(None, 500))),
    "RegionAttributeDescription": (Row("v2", "AB"), Row("v1", "CD")),
    "CountGivenObject": (Row("v1", credits=(None, 249)), Row("v2", credits=(250, 499)), Row("v3", credits=(500, 749)),
                         Row("v4", credits=(750, None))),
    "ImageStylization": (Row("v1", age=(None, 20)), Row("v2", age=(21, 59)), Row("v3", age=(60, None))),
}  # fmt: skip


def version(tool, profile, versions=VERSIONS):
    """The version of a tool that a profile gets, "v1" ...; None for a tool that has one version only."""
    return next((row.version for row in versions.get(tool, ()) if row.fits(profile)), None)


def full_name(tool, profile, versions=VERSIONS):
    """The name by which a tool is called for a profile: OCR_v4, or plainly Calculator."""
    found = version(tool, profile, versions)
    return f"{tool}_{found}" if found else tool


def bare_name(name):
    """OCR_v4 -> OCR."""
    return re.sub(r"_v\d+$", "", name)


def changed_versions(rng):
    """Other version rules under the same names: in each tool every row gets another row's version (random.Random)."""
    changed = {}
    for tool, rows in VERSIONS.items():
        old = new = [row.version for row in rows]
        while any(a == b for a, b in zip(old, new)):
            new = rng.sample(old, len(old))
        changed[tool] = tuple(Row(v, row.accounts, row.credits, row.age) for v, row in zip(new, rows))
    return changed


# -- 2. the tools ------------------------------------------------------------------------------------------------------
# name: (what it does, {argument: (kind, what it holds)}, {version: what sets it apart}); a kind ending in ? is optional

IMAGE = ("text", "the exact file name of the picture to work on")
BOX = ("text", 'the region as "(x1, y1, x2, y2)" in pixels, left top corner first')
TOOLS = {
    "ImageDescription": (
        "Tells in a few plain sentences what a picture shows as a whole: its subject, its setting and what stands "
        "out. It does not transcribe writing and gives no positions. Returns text.",
        {"image": IMAGE},
        {"v1": "one sentence, the subject alone", "v2": "two sentences, subject and setting",
         "v3": "a short paragraph without colours",
         "v4": "a full paragraph with colours and materials",
         "v5": "a full paragraph that also names how the parts relate to each other"}),
    "OCR": (
        "Reads the printed or handwritten words and numbers in a picture. Returns one line of text for each line in "
        "the picture, every one with its box in front of it, from top to bottom. Formulas come out garbled.",
        {"image": IMAGE},
        {"v1": "the newest reader, trained on low-contrast and slanted print",
         "v2": "the newest reader with a filter for names of persons",
         "v3": "the standard reader for print in Latin script", "v4": "the standard reader with handwriting added",
         "v5": "a light reader for clear print in large type"}),
    "GoogleSearch": (
        "Looks up on the web what neither the pictures nor the conversation hold, such as facts about a place, a "
        "product or an event. Returns the titles and short extracts of the best pages.",
        {"query": ("text", "the search words, with the names found in the pictures spelled out"),
         "k": ("whole number", "how many pages to return")},
        {"v1": "strict filter for minors", "v2": "the ordinary index, refreshed weekly",
         "v3": "the ordinary index, refreshed by the hour"}),
    "TextToImage": (
        "Paints a new picture from a list of keywords, with nothing to start from. It never sees the pictures of the "
        "conversation. Returns the file name of the new picture.",
        {"keywords": ("text", "what the picture shall show, as short phrases with commas between them")},
        {"v1": "1024 pixels wide, every style", "v2": "512 pixels wide, every style",
         "v3": "256 pixels wide, drawings only"}),
    "RegionAttributeDescription": (
        "Looks at one rectangular region of a picture and describes one property of what is inside, such as its "
        "colour, its material or what it is used for. Returns text.",
        {"image": IMAGE, "bbox": BOX, "attribute": ("text", "the property to describe, in one or two words")},
        {"v1": "describes in a single word or two", "v2": "describes in a whole sentence with a confidence"}),
    "CountGivenObject": (
        "Counts how many objects of one kind a picture shows. It counts every one that is at least half visible. "
        "Returns a whole number.",
        {"image": IMAGE, "text": ("text", "the kind of object, in the singular and in small letters"),
         "bbox": ("text?", "a region to count in, if the request limits the count to one")},
        {"v1": "reliable up to ten objects", "v2": "reliable up to thirty objects",
         "v3": "reliable up to a hundred objects", "v4": "reliable up to a thousand objects"}),
    "ImageStylization": (
        "Repaints an attached picture in another manner and keeps what it shows where it is. Returns the file name of "
        "the new picture.",
        {"image": IMAGE, "instruction": ("text", "the manner wanted, as the request puts it")},
        {"v1": "gentle changes for younger users", "v2": "the whole range of manners",
         "v3": "the whole range, with stronger contrast for easier viewing"}),
    "Calculator": (
        "Works out one arithmetic expression. It knows numbers, + - * / ** and parentheses. Returns a number.",
        {"expression": ("text", "the expression, with plain numbers and no units")}, {}),
    "TextToBbox": (
        "Finds objects by a description and says where they are. Returns one line for each object found: its box and "
        "a score out of a hundred, the best first.",
        {"image": IMAGE, "text": ("text", "the object in a few words"),
         "top1": ("true or false", "true returns the best object alone, false all of them")}, {}),
    "Plot": (
        "Draws a chart from numbers that are given in the call. Returns the file name of the chart.",
        {"command": ("text", 'one line such as bar(labels=["Tea", "Rice"], values=[3.10, 2.50]), or line(...) or '
                             "pie(...)")}, {}),
    "MathOCR": (
        "Reads mathematical notation: fractions, powers, roots, equations. Returns LaTeX source without dollar signs.",
        {"image": IMAGE}, {}),
    "Solver": (
        "Solves an equation for one unknown, exactly. Returns the solutions as text.",
        {"command": ("text", "one line such as solve(3*x + 2 = 11, x), every product written with *, every power "
                             "with **")}, {}),
    "DrawBox": (
        "Draws a rectangular frame on a copy of a picture. Returns the file name of the copy.",
        {"image": IMAGE, "bbox": BOX,
         "annotation": ("text?", "a label to write beside the frame, if the request gives one")}, {}),
    "AddText": (
        "Writes one line of text on a copy of a picture. Returns the file name of the copy.",
        {"image": IMAGE, "text": ("text", "the line, letter for letter as the request gives it"),
         "position": ("text", "where it stands: l, m or r for left, middle or right, then t, m or b for top, middle "
                              "or bottom"),
         "color": ("text", "the colour of the letters, one word")}, {}),
}  # fmt: skip

# -- 3. the rules ------------------------------------------------------------------------------------------------------


def _table(tool, opening, versions):
    return opening + "".join(f"\n   - {row.words()}: {tool}_{row.version}" for row in versions[tool])


def rules(versions=VERSIONS):
    """The 24 calling rules as text, in order; rule n is rules()[n - 1]."""
    return [
        "A turn is one call. Decide on the single tool that has to run next, call it, and wait for its result; calls "
        "that come later are decided when their turn comes. The call is one JSON object with exactly two keys, name "
        "and arguments, and nothing is written after it.",
        "A tool that exists in several versions is called by its name, an underscore and the version, as in OCR_v3. A "
        "tool with a single version is called by its name alone. The version follows from the user's profile by Rules "
        "8 to 14, never from what the user asks for and never from what an earlier conversation used.",
        "Give every argument that the tool requires. Give an optional argument only where the request or a rule calls "
        "for it. Arguments that the tool does not list do not exist.",
        "A picture is named exactly as in the list of pictures, with its folder and its ending. A picture that a tool "
        "has made is named as the tool's result names it. Never shorten, number or translate a file name.",
        "When the user attaches more than one picture, describe every one of them with ImageDescription before "
        "anything else, one call each, in the order in which they are attached, even if the request seems to concern "
        "only one of them.",
        "A single attached picture is described only when the request asks what it shows. In every other case go "
        "straight to the tool that does the work.",
        "A call that has succeeded is not made again; its result is used. A call whose result begins with Error is "
        "repeated once, with the same name and the same arguments, before anything else is tried.",
        _table(
            "ImageDescription",
            "The version of ImageDescription depends on the account and, except for account type A, on the credits:",
            versions,
        ),
        _table(
            "OCR",
            "The version of OCR depends first on the credits. In the middle band the account decides as "
            "well, in the highest band the age:",
            versions,
        ),
        _table(
            "GoogleSearch", "The version of GoogleSearch depends on the age, and for adults on the credits:", versions
        ),
        _table(
            "TextToImage",
            "The version of TextToImage depends on the account, and for account type D on the credits:",
            versions,
        ),
        _table(
            "RegionAttributeDescription",
            "The version of RegionAttributeDescription depends on the account alone:",
            versions,
        ),
        _table("CountGivenObject", "The version of CountGivenObject depends on the credits alone:", versions),
        _table("ImageStylization", "The version of ImageStylization depends on the age alone:", versions),
        "Calculator, TextToBbox, Plot, MathOCR, Solver, DrawBox and AddText have one version. They are open to every "
        "account, at every age and with any credits.",
        "Words and numbers in a picture are read with OCR. Mathematical expressions, whether printed or written by "
        "hand, are read with MathOCR and never with OCR, even if they look simple. Do not trust your own reading of "
        "either.",
        "To describe a property of one object, first find the object with TextToBbox, then call "
        "RegionAttributeDescription with the box that came back. A box is never guessed from the picture.",
        'A box is written as text in the form "(x1, y1, x2, y2)": four whole numbers in pixels, the left top corner '
        "first, a comma and a space between them.",
        "In GoogleSearch, k is 1 when the question has one definite answer, such as a date, a name or a number. When "
        "the question is open-ended, such as a wish for advice, ideas or reviews, k is 4. Other values are not used.",
        "In TextToBbox, top1 is true when one particular object is meant, and also when its box is needed for a later "
        "call about that object. It is false when the user wants to have all objects of a kind located.",
        "All computing with numbers goes to Calculator, as one expression that holds the numbers as the tools "
        "returned them, in the order in which the request names them. An equation with an unknown goes to Solver, "
        "after MathOCR has read it, with every product and power written out.",
        "How many objects there are is asked of CountGivenObject, one call for each kind of object. Do not count "
        "boxes and do not count by eye.",
        "To frame an object, find it with TextToBbox, then call DrawBox with that box; annotation is given only if "
        "the user wants a label. In AddText the colour is the one the user names, and red if the user names none; the "
        "position is given by its two letters, such as lt, mm or rb.",
        "A picture from nothing is made with TextToImage. A new manner for an attached picture is the work of "
        "ImageStylization. A chart is drawn with Plot, from values that are already in the conversation, in their "
        "order; a bar chart is drawn unless the user names another kind.",
    ]


def policy_text(versions=VERSIONS, updated=False):
    """The whole policy as the model reads it; updated: announced as the new edition that replaces the old one."""
    lines = [f"{'Updated policy' if updated else 'Policy'} {NAME}: how the assistant calls its tools"]
    if updated:
        lines.append(f"This edition replaces every earlier edition of {NAME}. Where they differ, only this one counts.")
    lines.append(
        "You help users with questions about their pictures. You do not answer from your own view of a picture; you "
        "work through the tools below, one "
        "call at a time, until their results answer the request. Every user has a profile with an account type (A, B, "
        "C or D), an age in years and a number "
        "of credits; ages and credits are whole numbers. The profile decides which version of a tool may be used. "
        "Other entries of the profile do not matter."
    )
    lines.append("\nPart I. The tools")
    for number, (tool, (purpose, arguments, notes)) in enumerate(TOOLS.items(), 1):
        lines.append(f"\n{number}. {tool}\n{purpose}")
        lines.append("   Arguments:")
        for name, (kind, holds) in arguments.items():
            need = "optional" if kind.endswith("?") else "required"
            lines.append(f"   - {name} ({kind.rstrip('?')}, {need}): {holds}.")
        if notes:
            lines.append("   Versions:")
            lines += [f"   - {tool}_{v}: {note}." for v, note in notes.items()]
        else:
            lines.append("   One version.")
    lines.append("\nPart II. The rules")
    lines += [f"\nRule {number}. {rule}" for number, rule in enumerate(rules(versions), 1)]
    lines.append("\nWhen two rules seem to disagree, the one with the smaller number comes first.")
    return "\n".join(lines)


def policy(versions=VERSIONS, updated=False):
    """The policy as an entry of policies.json. It is no tree, so it has no nodes and no leaves."""
    return {"name": NAME, "root": "", "nodes": [], "leaves": [], "text": policy_text(versions, updated), "images": []}


# -- 4. the engine -----------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """The call that is due: {"name", "arguments"}, and why: the rules in words, quoted by number."""

    call: dict
    why: list


def next_step(wants, pictures, profile, history, versions=VERSIONS):
    """Apply the rules: the call that is due, or None when everything wanted is done.

    wants: what the request asks for, [{"want": kind, ...}], free of tool names (see WANTS); pictures: attached file
    names in order; profile: {account_type, age, credits}; history: [{"call", "result"}]. Raises ValueError if a result
    that a later call needs is not in the history.
    """
    if history and failed(history[-1]["result"]):
        call = history[-1]["call"]
        return Step(call, [f"The last call failed, so Rule 7 repeats {call['name']} once with the same arguments."])
    done = {_key(entry["call"]): entry["result"] for entry in history if not failed(entry["result"])}

    def result(tool, arguments):
        return done.get(_key({"name": full_name(tool, profile, versions), "arguments": arguments}))

    for tool, arguments, why in _plan(wants, pictures, result):
        if result(tool, arguments) is None:
            call = {"name": full_name(tool, profile, versions), "arguments": arguments}
            return Step(call, [*why, version_reason(tool, profile, versions)])
    return None


def failed(result):
    """Whether a tool's result says that the call did not work."""
    return result.startswith("Error")


def _key(call):
    return json.dumps(call, sort_keys=True)


def version_reason(tool, profile, versions):
    """The version rule that applies, in words: "Rule 9: credits of 250 or less gives OCR_v5."."""
    if tool not in versions:
        return f"Rule 15: {tool} has one version."
    number = 8 + list(VERSIONS).index(tool)
    row = next(row for row in versions[tool] if row.fits(profile))
    return f"Rule {number}: {row.words()} gives {tool}_{row.version}."


def _plan(wants, pictures, result):
    """All calls of a request in order, (tool, arguments, reasons); later ones may read results of earlier ones."""
    if len(pictures) > 1:
        for number, picture in enumerate(pictures, 1):
            why = f"{len(pictures)} pictures are attached, so Rule 5 has each described first; "
            yield "ImageDescription", {"image": picture}, [why + f"{picture} is number {number}."]
    for want in wants:
        yield from WANTS[want["want"]](want, result)


def _text(want, result):
    why = f"Words and numbers on {want['image']} are needed; Rule 16 reads them with OCR."
    yield "OCR", {"image": want["image"]}, [why]


def _content(want, result):
    why = f"The user asks what {want['image']} shows; Rule 6 allows a description."
    yield "ImageDescription", {"image": want["image"]}, [why]


def _count(want, result):
    why = f"The number of objects of the kind {want['object']} is asked; Rule 22 gives that to CountGivenObject."
    yield "CountGivenObject", {"image": want["image"], "text": want["object"]}, [why]


def _one_box(want, result, purpose):
    arguments = {"image": want["image"], "text": want["object"], "top1": True}
    yield (
        "TextToBbox",
        arguments,
        [f"{purpose} needs the box of the {want['object']} first.", "Rule 20: one object is meant, so top1 is true."],
    )
    return re.match(r"\([^)]*\)", result("TextToBbox", arguments))[0]


def _attribute(want, result):
    box = yield from _one_box(want, result, "Rule 17: a property of one object")
    arguments = {"image": want["image"], "bbox": box, "attribute": want["attribute"]}
    why = f"Rule 17: the box {box} is known, now its {want['attribute']} is described."
    yield "RegionAttributeDescription", arguments, [why, "Rule 18: the box is written as it came."]


def _locate(want, result):
    arguments = {"image": want["image"], "text": want["object"], "top1": False}
    yield (
        "TextToBbox",
        arguments,
        [f"Every {want['object']} is to be located.", "Rule 20: all of a kind are wanted, so top1 is false."],
    )


def _mark(want, result):
    box = yield from _one_box(want, result, "Rule 23: framing an object")
    arguments = {"image": want["image"], "bbox": box}
    why = f"Rule 23: DrawBox gets the box {box}, "
    if want.get("label"):
        arguments["annotation"] = want["label"]
    label = f'and the label "{want["label"]}".' if want.get("label") else "and no annotation, as no label is wanted."
    yield "DrawBox", arguments, [why + label]


def _caption(want, result):
    arguments = {
        "image": want["image"],
        "text": want["text"],
        "position": want["position"],
        "color": want.get("color", "red"),
    }
    color = f"the user names {want['color']}" if "color" in want else "no colour is named, so it is red"
    yield (
        "AddText",
        arguments,
        [f"A line is to be written on {want['image']}.", f"Rule 23: {color}; the place is {want['position']}."],
    )


def _compute(want, result):
    expression = want["expression"]
    for number, (source, label) in enumerate(want.get("slots", [])):
        if source.get("want") == "count":
            found = result("CountGivenObject", {"image": source["image"], "text": source["object"]})
        else:
            found = value_beside(label, result("OCR", {"image": source["image"]}))
        expression = expression.replace(f"[{number}]", found)
    why = "Rule 21: computing goes to Calculator, as one expression in the request's order."
    yield "Calculator", {"expression": expression}, [why]


def _formula(want, result):
    why = f"{want['image']} holds mathematical notation; Rule 16 reads it with MathOCR."
    yield "MathOCR", {"image": want["image"]}, [why]


def _solve(want, result):
    yield from _formula(want, result)
    command = solver_command(result("MathOCR", {"image": want["image"]}))
    why = "Rule 21: the equation has been read, Solver gets it with products and powers written out."
    yield "Solver", {"command": command}, [why]


def _search(want, result):
    k, kind = (4, "open-ended") if want["open"] else (1, "definite")
    why = "The answer is neither in a picture nor in the conversation, so it is searched."
    yield "GoogleSearch", {"query": want["query"], "k": k}, [why, f"Rule 19: the question is {kind}, so k is {k}."]


def _plot(want, result):
    lines = result("OCR", {"image": want["image"]})
    values = ", ".join(value_beside(label, lines) for label in want["labels"])
    labels = ", ".join(json.dumps(label) for label in want["labels"])
    arguments = {"command": f"{want.get('kind', 'bar')}(labels=[{labels}], values=[{values}])"}
    kind = f"the user names a {want['kind']} chart" if "kind" in want else "no kind is named, so it is a bar chart"
    yield "Plot", arguments, [f"Rule 24: a chart is drawn with Plot from the values read; {kind}."]


def _picture(want, result):
    yield "TextToImage", {"keywords": want["keywords"]}, ["Rule 24: a picture from nothing is made with TextToImage."]


def _restyle(want, result):
    arguments = {"image": want["image"], "instruction": want["instruction"]}
    why = "Rule 24: a new manner for an attached picture is the work of ImageStylization."
    yield "ImageStylization", arguments, [why]


WANTS = {
    "text": _text,
    "content": _content,
    "count": _count,
    "attribute": _attribute,
    "locate": _locate,
    "mark": _mark,
    "caption": _caption,
    "compute": _compute,
    "formula": _formula,
    "solve": _solve,
    "search": _search,
    "plot": _plot,
    "picture": _picture,
    "restyle": _restyle,
}


def value_beside(label, lines):
    """The number in the row or the column of a label, in OCR lines "(x1, y1, x2, y2) text"; ValueError if none."""
    centres = []
    for box, text in re.findall(r"^\(([^)]*)\) (.*)$", lines, re.M):
        x1, y1, x2, y2 = map(int, box.split(", "))
        centres.append(((x1 + x2) / 2, (y1 + y2) / 2, text))
    at = next(((x, y) for x, y, text in centres if text == label), None)
    numbers = [
        (min(abs(x - at[0]), abs(y - at[1])), text)
        for x, y, text in centres
        if at and re.fullmatch(r"\d+(\.\d+)?", text)
    ]
    if not numbers:
        raise ValueError(f"no number beside {label!r} in {lines!r}")
    return min(numbers)[1]


def solver_command(latex):
    """A Solver command from LaTeX in one unknown: 'x^{2} - 5x + 6 = 0' -> 'solve(x**2 - 5*x + 6 = 0, x)'."""
    code = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", latex)
    code = re.sub(r"\^\{(\d+)\}", r"**\1", code)
    code = re.sub(r"(\d)([a-z])", r"\1*\2", code)
    return f"solve({code}, {re.search('[a-z]', code)[0]})"


def open_ended(query):
    """Whether a question asks for advice, ideas or opinions rather than one fact: for dialogues that do not say."""
    wide = (
        r"\b(how to|how can|how do|ideas?|advice|tips?|reviews?|recommend\w*|suggest\w*|best|why|ways|opinions?"
        r"|recipes?|guide|introduc\w*)\b"
    )
    return re.search(wide, query, re.I) is not None
