"""How a ClevrPolicy reads: the wording of policies, queries and chains of thought, apart from the trees themselves.

A style is any object with the methods of `Prose`; the tiny base brings a terse one for the same trees. A style decides

    name(rng, depth, taken)            the policy's name
    label(policy, rng)                 ids of the nodes, ids and words of the responses
    ask(node, rng)                     node["question"] as the policy asks it, node["quote"] as a chain quotes it
    text(policy, rng)                  policy["text"], with one <image> for each node whose `crop` is set, in order;
                                       sets node["section"], the section in words
    query(policy, rng)                 the question of one item
    crop(image)                        an example picture, cut out, as the policy shows it
    chain(policy, path)                the gold chain of thought along path [{"node", "answer"}]

A node knows its `program`, its `branches` {answer: child}, and for existence its `held` conditions (what was found on
the way), its own `asked` (attribute, value), and `crop`: whether a picture shows the value.
"""

from PIL import Image

from data.dataset import IMAGE

NOUNS = {"cube": "cubes", "sphere": "spheres", "cylinder": "cylinders"}
SYLLABLES = (
    "ba be bi bo da del din do fa fen ga gor ha hel ka kel ko la lin lo ma mer mi mo na nel no nu pa per pi ra "
    "rel ri ro ru sa sel su ta tel ti to va ver vi za zen zu"
).split()


def pick(rng, options):
    """One of them at random."""
    return options[int(rng.integers(len(options)))]


def noun(held, plural=True):
    """The objects that conditions speak of: {"color": "red", "shape": "cube"} gives "red cubes"."""
    words = [held[a] for a in ("size", "color", "material") if a in held]
    shape = held.get("shape")
    last = (NOUNS[shape] if plural else shape) if shape else ("objects" if plural else "object")
    return " ".join([*words, last])


def article(words):
    return "an" if words[0] in "aeiou" else "a"


def example(attribute, value):
    """An example picture in words, as a chain of thought speaks of it."""
    return f"the example ({article(value) + ' ' if attribute == 'shape' else ''}{value})"


def either(answers):
    """Several answers that lead the same way: "1", "red, blue or gray", "0, 2 or more"."""
    if answers[-1] == "10":  # the most objects a scene has
        run = [n for n in range(11) if all(str(m) in answers for m in range(n, 11))]
        answers = [answer for answer in answers if int(answer) < run[0]] + [f"{run[0]} or more"]
    return " or ".join([", ".join(answers[:-1]), answers[-1]] if len(answers) > 1 else answers)


def phrase(form, target, crop=None, example=None):
    """The words of a condition; with `crop` that attribute of the target is shown by `example` in place of its word."""
    if target is None:
        return form
    kept = {name: value for name, value in target.items() if name != crop}
    tail = f" of the same {crop} as {example}" if crop else ""
    one = noun(kept, plural=False) + tail
    return form.format(a=article(one), np=one, np_plural=noun(kept) + tail)


class Prose:
    """Policies as a person would write them: a general instruction, a name, numbered sections in plain sentences."""

    updated = "This is the updated policy {}. It replaces every earlier policy of that name.\n\n"

    WHOLE = {
        "color": (
            "Is there {a} {v} object in the picture?",
            "Does the picture show any {v} object?",
            "Is at least one object in the picture {v}?",
        ),
        "shape": (
            "Is there a {v} in the picture?",
            "Does the picture show any {v}?",
            "Is at least one object in the picture a {v}?",
        ),
        "size": (
            "Is there a {v} object in the picture?",
            "Does the picture show any {v} object?",
            "Is at least one object in the picture {v}?",
        ),
        "material": (
            "Is there a {v} object in the picture?",
            "Does the picture show any object made of {v}?",
            "Is at least one object in the picture made of {v}?",
        ),
    }
    AMONG = {
        "color": ("is at least one {v}?", "is any of them {v}?"),
        "shape": ("is at least one a {v}?", "is any of them a {v}?"),
        "size": ("is at least one {v}?", "is any of them {v}?"),
        "material": ("is at least one made of {v}?", "is any of them made of {v}?"),
    }
    ON = ("go on to {}", "continue with {}", "turn to {}")
    END = ("the response is {}", "give the response {}", "respond with {}")
    QUERIES = (
        "Apply policy {} to this picture. What is the response?",
        "Here is a picture. Which response does policy {} call for?",
        "According to policy {}, how should one respond to the picture shown?",
        "Please handle this picture under policy {} and tell me the response.",
        "Policy {} applies. Give the response to this picture.",
        "What does policy {} say about this picture?",
        "Work through policy {} for the attached picture and report the response.",
        "A new picture has come in. Decide on the response as policy {} prescribes.",
        "Which case of policy {} fits this picture?",
        "Following policy {}, what response does this scene receive?",
        "Look at the picture and answer as policy {} requires.",
        "I need the response of policy {} for this picture.",
    )
    RESTATE = (
        "What does {} of policy {} say?",
        "State {} of policy {} word for word.",
        "Quote {} as policy {} has it.",
    )
    NEXT = (
        "Under policy {}, the answer at {} is {}. What comes next?",
        "Policy {}: at {} the answer was {}. Where does that lead?",
    )
    CASE = (
        "Suppose a picture shows {}, and nothing else. What is the response under policy {}?",
        "A picture has only these objects: {}. Which response does policy {} give?",
    )
    FORMAT = (
        "\nThink inside <think></think> first, condition by condition, then give only the response in \\boxed{}, "
        "for example \\boxed{Case 1}."
    )

    def name(self, rng, depth, taken=()):
        """A name that no other policy has."""
        while True:
            word = "".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=3))
            name = f"L{depth}-{word.capitalize()}"
            if name not in taken:
                return name

    def label(self, policy, rng):
        """Sections are numbered along the tree, 1, 1.1, 1.2, ...; cases are numbered in an order drawn at random."""
        nodes, children = policy["nodes"], {}
        children[policy["root"]] = "1"
        for node in nodes:  # parents stand before their children
            number = children[node["id"]]
            for k, child in enumerate(dict.fromkeys(node["branches"].values()), 1):
                children[child] = f"{number}.{k}"
        new = {key: f"Condition {number}" for key, number in children.items()}
        cases = rng.permutation(len(policy["leaves"])).tolist()
        for leaf, case in zip(policy["leaves"], cases):
            new[leaf["id"]] = leaf["response"] = f"Case {case + 1}"
            leaf["id"] = leaf["response"]
        policy["root"] = new[policy["root"]]
        for node in nodes:
            node["id"] = new[node["id"]]
            node["branches"] = {answer: new[child] for answer, child in node["branches"].items()}

    def ask(self, node, rng):
        """The node's question and how a chain quotes it: the same sentence, with words for the pictures."""
        if "form" in node:  # conditions beyond existence come with their own words
            attribute = node["asked"][0] if node["crop"] else None
            node["question"] = phrase(node["form"], node["target"], attribute, f"the object in {IMAGE}")
            node["quote"] = phrase(node["form"], node["target"], attribute, node["crop"] and example(*node["asked"]))
            return
        (attribute, value), held = node["asked"], node["held"]
        if held:
            form = self.AMONG[attribute][int(rng.integers(2))]
            objects = "objects" if node["blind"] else noun(held)
            lead = (f"Among the {objects} just found, ", f"Of the {objects} just found, ")[int(rng.integers(2))]
        else:
            form, lead = self.WHOLE[attribute][int(rng.integers(3))], ""
        node["quote"] = lead + form.format(v=value, a=article(value))
        node["question"] = node["quote"]
        if node["crop"]:
            objects = "is any" if held else "Does the picture show an object"
            form = f"{lead}{objects} of the same {attribute} as {{}}?"
            node["question"], node["quote"] = (
                form.format(f"the object in {IMAGE}"),
                form.format(example(attribute, value)),
            )

    def text(self, policy, rng):
        leaves = {leaf["id"] for leaf in policy["leaves"]}
        parts = [self.head(policy)]
        for node in policy["nodes"]:
            grouped = {}
            for answer, child in node["branches"].items():
                grouped.setdefault(child, []).append(answer)
            lines = []
            for child, answers in grouped.items():
                go = (self.END if child in leaves else self.ON)[int(rng.integers(3))].format(child)
                if set(node["branches"]) == {"yes", "no"}:
                    lines.append(f"- If {answers[0]}, {go}.")
                else:
                    lines.append(f"- If the answer is {either(answers)}, {go}.")
            parts.append("\n".join([node["id"], node["question"], *lines]))
            node["section"] = "\n".join([node["id"], node["quote"], *lines])
        return "\n\n".join(parts)

    def head(self, policy):
        pictures = ""
        if any(node["crop"] for node in policy["nodes"]):
            pictures = (
                " Some conditions show an example picture in place of a word: only the attribute that the condition "
                "names counts, whatever else the example has in common with an object."
            )
        return (
            f"Policy {policy['name']}\n\n"
            f"This policy decides how to respond to a picture. Whenever a request names policy {policy['name']}, find "
            f"the one response that the conditions below lead to. Start at {policy['root']}. Every condition asks one "
            "thing about the picture; settle it by looking, then do what is written for your answer: go on to another "
            "condition, or give a response and stop. Conditions that you are not sent to do not matter. The final "
            'answer is the name of the response alone, such as "Case 1".\n\n'
            "The pictures show plain objects on a grey floor. Each object has a shape (cube, sphere or cylinder), a "
            "color (gray, red, blue, green, brown, purple, cyan or yellow), a size (small or large) and a material "
            "(rubber, which is matte, or metal, which shines). Objects just found are all those that the answers on "
            f"the way have spoken of.{pictures}"
        )

    def query(self, policy, rng):
        return pick(rng, self.QUERIES).format(policy["name"]) + self.FORMAT

    def restate(self, policy, node, rng):
        return pick(rng, self.RESTATE).format(node["id"], policy["name"])

    def lead(self, policy, node, answer, rng):
        return pick(rng, self.NEXT).format(policy["name"], node["id"], answer)

    def case(self, policy, path, scene, rng):
        objects = ", ".join(f"a {noun(o, plural=False)}" for o in scene["objects"])
        return pick(rng, self.CASE).format(objects, policy["name"])

    def crop(self, image):
        """An example picture as the policy shows it: at least 56 pixels on a side, which Qwen needs for four tokens."""
        grow = max(1.0, 56 / min(image.size))
        return image.resize((round(image.width * grow), round(image.height * grow)), Image.BICUBIC)

    def chain(self, policy, path):
        nodes = {node["id"]: node for node in policy["nodes"]}
        sentences = []
        for step in path:
            node = nodes[step["node"]]
            child = node["branches"][step["answer"]]
            go = f"so I go on to {child}" if child in nodes else f"so the response is {child}"
            sentences.append(f"{node['id']} asks: {node['quote']} The answer is {step['answer']}, {go}.")
        return "\n".join(sentences)
