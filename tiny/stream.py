"""The text stream that the tiny base learns from: policies and questions about them, packed several to a row.

A row holds groups; a group is a prefix (a policy, mostly) with several queries after it, and each query sees its own
prefix and itself only, as if it stood there alone. What is asked:

    apply       a picture and a policy: the sentences on the path, recited and decided, then the action
    walk        the same with the decisions given: pure looking up
    recite      sentences by name
    check       a picture: is there a ...? many times over
    describe    a picture: its objects, one after the other
    pairs, copy key-value lists and repeated pieces: the seed of looking up
    tools       a policy of tools, a request with pictures: the whole dialogue, tools' results given (ToolStream)

Axes: model.py; a picture is 4 x 4 image tokens, a crop 2 x 2.
"""

import numpy as np

from data.clevr import CODE_BITS, COLORS, MATERIALS, SHAPES, SIZES
from data.clevr_policy import grow
from tiny import tools
from tiny.world import ACTIONS, ID, KINDS, NODES, POLICIES

COLUMN = {"shape": 0, "color": 1, "size": 2, "material": 3}  # of the pictures' attribute table
VALUES = [
    (kind, word) for kind, words in zip(KINDS, (SIZES, COLORS, MATERIALS, SHAPES)) for word in words
]  # in spoken order
KIND = np.array([KINDS.index(kind) for kind, _ in VALUES])
VALUE_ID = [ID[word] for _, word in VALUES]
INDEX = np.array(
    [
        {"shape": SHAPES, "color": COLORS, "size": SIZES, "material": MATERIALS}[kind].index(word)
        for kind, word in VALUES
    ]
)
TABLE_COLUMN = np.array([COLUMN[kind] for kind, _ in VALUES])
NODE_ID, ACTION_ID, POLICY_ID = ([ID[word] for word in words] for words in (NODES, ACTIONS, POLICIES))
THEN, ELSE, STOP, COLON, YES, NO, OF = (ID[word] for word in ("then", "else", ".", ":", "yes", "no", "of"))
PICTURE = [ID["<|vision_start|>"], *[ID["<|image_pad|>"]] * 16, ID["<|vision_end|>"]]
CROP = [ID["<|vision_start|>"], *[ID["<|image_pad|>"]] * 4, ID["<|vision_end|>"]]
OPEN = [
    ID["<|im_start|>"],
    ID["system"],
    ID["You are a helpful assistant."],
    ID["<|im_end|>"],
    ID["<|im_start|>"],
    ID["user"],
]
TURN = [ID["<|im_end|>"], ID["<|im_start|>"], ID["assistant"]]
END = [ID["<|im_end|>"]]
PAD = ID["<|endoftext|>"]


# -- 1. trees ----------------------------------------------------------------------------------------------------------


BITS = [1 << CODE_BITS.index(value) for value in VALUES]  # of a SceneTable's code


def matches(table):
    """Which objects have which value: bool (values, S, objects) from an attribute table (S, objects, 4)."""
    return table[:, :, TABLE_COLUMN].transpose(2, 0, 1) == INDEX[:, None, None]


def coded(match):
    """The values of every object as bits of a SceneTable's code, (S, objects) uint16, from `matches`."""
    return sum(seen.astype(np.uint16) * np.uint16(bit) for seen, bit in zip(match, BITS))


class Codes:
    """What data.clevr_policy.grow needs of a SceneTable: the values of every object as bits, (S, objects) uint16."""

    def __init__(self, code):
        self.code = code

    def __len__(self):
        return len(self.code)


def planted(rng, depth, codes):
    """A ClevrPolicy tree over these scenes: [(values spoken, yes, no)], children as node numbers or ~leaf, and the
    leaves' [(path [(node, answer)], scenes that end there)].
    """
    grown, count = grow(rng, depth, codes)
    nodes, leaves = [None] * len(grown), [None] * count

    def visit(child, alive, path):
        kind, k = child
        if kind == "leaf":
            leaves[k] = path, alive
            return ~k
        held = {**grown[k]["held"], **dict([grown[k]["asked"]])}
        spoken = sorted(VALUES.index(value) for value in held.items())
        asked = np.uint16(sum(BITS[v] for v in spoken))
        hit = ((codes.code[alive] & asked) == asked).any(1)
        yes, no = grown[k]["branches"]["yes"], grown[k]["branches"]["no"]
        nodes[k] = spoken, visit(yes, alive[hit], [*path, (k, True)]), visit(no, alive[~hit], [*path, (k, False)])
        return k

    visit(("node", 0), np.arange(len(codes), dtype=np.int32), [])
    return nodes, leaves


def scatter(rng, depth, words):
    """A tree of the same form whose conditions are drawn from few words, so that they collide; no picture fits it."""
    nodes, leaves = [], []

    def visit(path):
        if len(path) < depth and (not path or rng.random() < 0.9):
            number = len(nodes)
            nodes.append(None)
            picked = rng.permutation(len(words))[: rng.integers(1, min(4, len(words)) + 1)]
            spoken = sorted({KIND[words[i]]: words[i] for i in picked}.values(), key=KIND.__getitem__)
            a = visit([*path, (number, True)])
            nodes[number] = (spoken, a, visit([*path, (number, False)]))
            return number
        leaves.append((path, None))
        return ~(len(leaves) - 1)

    visit([])
    return nodes, leaves


# -- 2. groups ---------------------------------------------------------------------------------------------------------


class Query:
    """Tokens after a prefix, the weight of predicting each, and the pictures among them, as feature numbers."""

    def __init__(self, ids, weight, pictures=()):
        self.ids, self.weight, self.pictures = ids, weight, list(pictures)


class Policy:
    """A tree under random names: its sentences as tokens, in random order."""

    def __init__(self, rng, tree, crops=None):
        self.nodes, self.leaves = tree
        names = rng.permutation(len(NODE_ID))[: len(self.nodes)]
        actions = rng.permutation(len(ACTION_ID))[: len(self.leaves)]
        self.name = POLICY_ID[rng.integers(len(POLICY_ID))]
        self.names, self.actions = [NODE_ID[i] for i in names], [ACTION_ID[i] for i in actions]
        self.said, self.read, self.pictures = [], [], []
        order = rng.permutation(len(self.nodes))
        for i, (spoken, yes, no) in enumerate(self.nodes):
            tail = [THEN, self.target(yes), ELSE, self.target(no)]
            self.said.append([self.names[i], *[VALUE_ID[v] for v in spoken], *tail])
        self.text = [ID["policy"], self.name, COLON, ID["start"], self.names[0], STOP]
        for i in order:
            spoken = self.nodes[i][0]
            if crops is not None and rng.random() < 0.5:  # one of the words is shown
                shown = spoken[rng.integers(len(spoken))]
                words = []
                for v in spoken:
                    words += [ID[KINDS[KIND[v]]], OF, *CROP] if v == shown else [VALUE_ID[v]]
                self.pictures.append(crops(rng, shown))
                self.text += [self.names[i], *words, *self.said[i][1 + len(spoken) :], STOP]
            else:
                self.text += [*self.said[i], STOP]
        self.prefix = [*OPEN, *self.text]

    def target(self, child):
        return self.names[child] if child >= 0 else self.actions[~child]


def weigh(sentence, firm):
    """Weights of a recited sentence: high where a name must be looked up to know what comes next."""
    after_name, after_then, after_else, word = (3, 4, 2, 2) if firm else (2, 2, 1.5, 1)
    out, n = [1], len(sentence)
    for k in range(1, n):
        out.append(
            after_name
            if k == 1
            else after_then
            if k == n - 3
            else after_else
            if k == n - 1
            else 1
            if k in (n - 4, n - 2)
            else word
        )
    return out


def chain(policy, leaf, firm=False, decide=2.0):
    """The response on one path: thinking, action; ids and weights. decide: weight of yes and no."""
    path, _ = policy.leaves[leaf]
    ids, weight = [ID["<think>"]], [0.5]
    for node, answer in path:
        ids += [*policy.said[node], YES if answer else NO]
        weight += [*weigh(policy.said[node], firm), decide]
        if ids and len(weight) > 1 + len(policy.said[node]) + 1:
            weight[-2 - len(policy.said[node]) + 1] = 2.0  # the child's name, after the decision
    ids += [ID["</think>"], ID["\\boxed{"], policy.actions[leaf], ID["}"], *END]
    return ids, weight + [1.0, 0.5, 2.0, 0.5, 0.5]


def flat(*parts):
    return [token for part in parts for token in part]


def crops_by_value(table, clean, rows):
    """Numbers of the crops that show each value, from the pictures `rows`; clean: bool (2 S,).

    Picture s of S shows its object s % (how many it has) alone in two crops: s, cut out to fill the crop, and S + s at
    the picture's own scale, for sizes.
    """
    rows = np.asarray(rows)
    count = (table[rows][:, :, 0] >= 0).sum(1)
    shown = table[rows, rows % count]  # (rows, 4)
    numbers = []
    for v in range(len(VALUES)):
        mine = rows[shown[:, TABLE_COLUMN[v]] == INDEX[v]] + (len(table) if KINDS[KIND[v]] == "size" else 0)
        numbers.append(mine[clean[mine] > 0])
    return numbers


class Stream:
    """Draws groups of every kind. table: attributes (S, 3, 4) of the pictures that may be used, whose feature numbers
    begin at `first`; crops: for each value the numbers of the crops that show it. Crop k is picture ~k."""

    def __init__(self, seed, table, crops=None, first=0):
        self.rng = np.random.default_rng(seed)
        self.table, self.crops, self.first = table, crops, first
        self.match = matches(table)
        self.code = coded(self.match)
        self.count = (table[:, :, 0] >= 0).sum(1)
        self.trees = {}

    def crop(self, rng, value):
        return ~int(rng.choice(self.crops[value]))

    def tree(self, depth, fresh=0.15, keep=2000):
        """A grown tree, often one of those grown before, under new names: growing is the slow part."""
        pool = self.trees.setdefault(depth, [])
        if len(pool) < 50 or self.rng.random() < fresh:
            scenes = self.rng.choice(
                len(self.table), min(len(self.table), max(1200, 60 * 2**depth)), replace=False
            ).astype(np.int32)
            nodes, leaves = planted(self.rng, depth, Codes(self.code[scenes]))
            made = nodes, [(path, scenes[alive]) for path, alive in leaves]
            if len(pool) < keep:
                pool.append(made)
            else:
                pool[self.rng.integers(keep)] = made
            return made
        return pool[self.rng.integers(len(pool))]

    def words(self):
        return self.rng.choice(len(VALUES), self.rng.integers(3, 8), replace=False).tolist()

    # each kind returns (prefix ids, pictures in the prefix, weight of the prefix's tokens | None, queries)

    def pairs(self):
        rng, n = self.rng, int(self.rng.integers(4, 20))
        keys = rng.choice(NODE_ID if rng.random() < 0.7 else NODE_ID + POLICY_ID + ACTION_ID, n, replace=False)
        values = rng.choice(VALUE_ID if rng.random() < 0.6 else NODE_ID + ACTION_ID + VALUE_ID, n)
        order = rng.integers(n, size=2 * n)
        ids = [int(x) for i in order for x in (keys[i], values[i])]
        return flat(*[(int(k), int(v)) for k, v in zip(keys, values)]), (), None, [Query(ids, [0, 3] * (2 * n))]

    def copy(self):
        rng, queries = self.rng, []
        letters = rng.choice(NODE_ID + ACTION_ID + VALUE_ID, int(rng.integers(8, 40)), replace=False)
        ids = [int(x) for x in rng.choice(letters, int(rng.integers(20, 50)))]
        for _ in range(4):
            a = int(rng.integers(len(ids) - 12))
            piece = ids[a : a + 12]
            queries.append(Query(piece, [0, 0] + [1.5] * 10))
        return ids, (), None, queries

    def recite(self, most, crops=False, each=4):
        rng, n = self.rng, int(self.rng.integers(3, most + 1))
        words = self.words()
        spoken = [self.condition(words) for _ in range(n)]
        nodes, leaf = [], 0
        for s in spoken:
            children = []
            for _ in range(2):
                if rng.random() < 0.5 or leaf >= len(ACTION_ID) - 1:
                    children.append(int(rng.integers(n)))
                else:
                    children.append(~leaf)
                    leaf += 1
            nodes.append((s, *children))
        policy = Policy(rng, (nodes, [None] * max(leaf, 1)), self.crop if crops else None)
        queries = []
        for _ in range(each):
            asked = rng.choice(n, min(n, int(rng.integers(1, 5))), replace=False)
            ids = [ID["recite"], policy.name, COLON, *[policy.names[i] for i in asked], *TURN]
            weight = [0] * len(ids)
            for i in asked:
                ids += [*policy.said[i], STOP]
                weight += [*weigh(policy.said[i], True), 0.5]
            queries.append(Query(ids + END, weight + [0.5]))
        return policy.prefix, policy.pictures, None, queries

    def condition(self, words):
        """One to four values of different kinds, most often few, from `words`."""
        picked = self.rng.permutation(words)[: self.rng.integers(1, 5)]
        return sorted({KIND[v]: int(v) for v in picked}.values(), key=KIND.__getitem__)

    def walk(self, depth, each=4):
        rng = self.rng
        tree = scatter(rng, depth, self.words()) if rng.random() < 0.6 else self.tree(depth)
        policy, queries = Policy(rng, tree), []
        for leaf in rng.integers(len(policy.leaves), size=each):
            steps = [YES if answer else NO for _, answer in policy.leaves[leaf][0]]
            head = [ID["walk"], policy.name, COLON, *steps, *TURN]
            ids, weight = chain(policy, leaf, firm=True, decide=0.5)
            queries.append(Query(head + ids, [0] * len(head) + weight))
        return policy.prefix, policy.pictures, None, queries

    def apply(self, depth, each=4, crops=False, blind=0.02, document=0.1):
        """A policy and pictures; now and then the policy itself is learnt as text, or it is missing."""
        rng = self.rng
        policy, queries = Policy(rng, self.tree(depth), self.crop if crops else None), []
        ready = [leaf for leaf, (_, scenes) in enumerate(policy.leaves) if len(scenes)]
        for leaf in rng.choice(ready, each):
            scene = self.first + int(rng.choice(policy.leaves[leaf][1]))
            head = [*PICTURE, ID["apply"], policy.name, COLON, *TURN]
            ids, weight = chain(policy, leaf)
            queries.append(Query(head + ids, [0] * len(head) + weight, [scene]))
        if rng.random() < blind:
            return OPEN, (), None, [Query(q.ids, [w / 4 for w in q.weight], q.pictures) for q in queries[:2]]
        learnt = [0] * len(OPEN) + [0.1] * len(policy.text) if rng.random() < document and not crops else None
        return policy.prefix, policy.pictures, learnt, queries

    def judge(self, scene, most=4):
        """A condition about a picture, true half of the time; false ones miss by one word."""
        rng, match = self.rng, self.match[:, scene, : self.count[scene]]  # (values, objects)
        thing = int(rng.integers(match.shape[1]))
        kinds = rng.permutation(4)[: rng.integers(1, most + 1)]
        spoken = [int(v) for v in np.flatnonzero(match[:, thing]) if KIND[v] in kinds]
        if rng.random() < 0.5:
            for _ in range(6):
                i = int(rng.integers(len(spoken)))
                others = np.flatnonzero(KIND == KIND[spoken[i]])
                wrong = [*spoken[:i], int(rng.choice(others)), *spoken[i + 1 :]]
                if not match[wrong].all(0).any():
                    return wrong, False
        return spoken, True

    def check(self, each=3, decisions=6, most=4):
        """Many decisions about one picture, each after a bare condition or a whole sentence with random names."""
        rng, queries = self.rng, []
        for scene in rng.integers(len(self.table), size=each):
            ids = [*PICTURE, ID["check"], COLON, *TURN]
            weight = [0] * len(ids)
            whole = rng.random() < 0.5
            for _ in range(decisions):
                spoken, truth = self.judge(scene, most)
                words = [VALUE_ID[v] for v in spoken]
                if whole:
                    names = rng.choice(NODE_ID + ACTION_ID, 3)
                    words = [int(names[0]), *words, THEN, int(names[1]), ELSE, int(names[2])]
                ids += [*words, YES if truth else NO]
                weight += [0] * len(words) + [2.0]
            queries.append(Query(ids + END, weight + [0.2], [self.first + int(scene)]))
        return OPEN, (), None, queries

    def describe(self, each=4):
        queries = []
        for scene in self.rng.integers(len(self.table), size=each):
            order = sorted(
                range(self.count[scene]), key=lambda thing: np.flatnonzero(self.match[:, scene, thing]).tolist()
            )
            ids = [*PICTURE, ID["describe"], COLON, *TURN]
            weight = [0] * len(ids)
            for thing in order:
                ids += [*[VALUE_ID[v] for v in np.flatnonzero(self.match[:, scene, thing])], STOP]
                weight += [1, 1, 1, 1, 0.5]
            queries.append(Query(ids + END, weight + [0.5], [self.first + int(scene)]))
        return OPEN, (), None, queries

    def name_crop(self, each=8):
        """A crop in the words of an M policy: `color of <crop>`, and the word that it shows."""
        rng, queries = self.rng, []
        for _ in range(each):
            v = int(rng.integers(len(VALUES)))
            ids = [*CROP, ID[KINDS[KIND[v]]], OF, *TURN]
            queries.append(Query([*ids, VALUE_ID[v], *END], [0] * len(ids) + [2.0, 0.2], [self.crop(rng, v)]))
        return OPEN, (), None, queries

    def group(self, kind, depth=0, **more):
        return getattr(self, kind)(*([depth] if depth else []), **more)


def tool_query(words, weight, pictures):
    """A Query of tiny.tools' words, <image> where a picture stands."""
    parts = [PICTURE if word == tools.IMAGE else [tools.IDS[word]] for word in words]
    spread = [[w if part is not PICTURE else 0.0] * len(part) for part, w in zip(parts, weight)]
    return Query(flat(*parts), flat(*spread), pictures)


class ToolStream(Stream):
    """The same, and dialogues with tools. What tools tell comes from the table; boxes and numbers are made up."""

    def facts(self):
        """Pictures that a request is about: one, two or three, as numbers of features and as tools see them."""
        rng, names = self.rng, {kind: [word for k, word in VALUES if k == kind] for kind in KINDS}
        chosen, images = rng.integers(len(self.table), size=rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2))).tolist(), []
        for s in chosen:
            seen, objects = self.match[:, s, : self.count[s]], []  # (values, objects)
            for thing in range(self.count[s]):
                words = [VALUES[v][1] for v in np.flatnonzero(seen[:, thing])]
                left, top = rng.integers(80, size=2).tolist()
                right, bottom = left + int(rng.integers(5, 20)), top + int(rng.integers(5, 20))
                objects.append({**dict(zip(names, words)), "box": [left, top, right, bottom]})
            images.append({"objects": objects, "number": int(rng.integers(50))})
        fails = [int(rng.integers(3))] if rng.random() < 0.08 else []
        return {"images": images, "fails": fails}, [self.first + s for s in chosen]

    def tool_policy(self, least, most):
        policy = tools.draw_policy(self.rng, int(self.rng.integers(least, most + 1)))
        return policy, [*OPEN, *[tools.IDS[word] for word in tools.policy_words(policy)]]

    def tools(self, least, most, each=4, single=False, blind=0.02):
        """Requests under a policy of `least` to `most` tools; single: only one turn of each dialogue is learnt."""
        rng, queries = self.rng, []
        policy, prefix = self.tool_policy(least, most)
        verbs = list(policy["tools"])
        while len(queries) < each:
            facts, numbers = self.facts()
            verb = verbs[rng.integers(len(verbs))]
            goal = tools.draw_goal(rng, policy, facts, verb)
            if goal:
                profile = tools.draw_profile(rng, policy["tools"][verb]["rule"])
                turns = tools.dialogue(policy, facts, goal, profile)
                words, weight = tools.lesson(
                    policy, facts, goal, profile, turns, rng.integers(len(turns)) if single else None
                )
                queries.append(tool_query(words, weight, numbers))
        if rng.random() < blind:
            return OPEN, (), None, [Query(q.ids, [w / 4 for w in q.weight], q.pictures) for q in queries[:1]]
        return prefix, (), None, queries

    def which(self, each=3, decisions=8):
        """Several pictures, and which of them show a thing: `with small cube 1 no 2 yes`, many times over."""
        rng, queries = self.rng, []
        while len(queries) < each:
            facts, numbers = self.facts()
            count = len(numbers)
            if count == 1:
                continue
            words = [word for k in range(count) for word in ("image", str(k + 1), tools.IMAGE)]
            words += ["check", ":", "<|im_end|>", "<|im_start|>", "assistant"]
            weight = [0.0] * len(words)
            for k in rng.integers(count, size=decisions):
                things = facts["images"][k]["objects"]
                phrase = tools.draw_phrase(rng, things[rng.integers(len(things))])
                words, weight = [*words, "with", *phrase], weight + [0.0] * (1 + len(phrase))
                for image in range(1, count + 1):
                    words += [str(image), "yes" if tools.matching(facts, image, phrase) else "no"]
                    weight += [0.0, 2.0]
            queries.append(tool_query(words, weight, numbers))
        return OPEN, (), None, queries

    def compare(self, decisions=24):
        """Numbers that lie near each other: `age 41 below 43 yes`, many times over."""
        rng = self.rng
        words, weight = ["check", ":", "<|im_end|>", "<|im_start|>", "assistant"], [0.0] * 5
        for number, edge in zip(rng.integers(100, size=decisions), rng.integers(-6, 7, size=decisions)):
            edge = int(np.clip(number + edge, 5, 94))
            words += [
                ("age", "credits")[rng.integers(2)],
                str(number),
                "below",
                str(edge),
                "yes" if number < edge else "no",
            ]
            weight += [0.0] * 4 + [2.0]
        return OPEN, (), None, [tool_query(words, weight, [])]

    def tool_recite(self, least, most, each=6):
        """Sentences of a tool policy by their names."""
        policy, prefix = self.tool_policy(least, most)
        said, queries = tools.sentences(policy), []
        for key in self.rng.permutation(list(said))[:each].tolist():
            head = [tools.IDS[word] for word in ("recite", policy["name"], ":", *key.split())] + TURN
            ids = [tools.IDS[word] for word in (*said[key], ".")]
            queries.append(Query(head + ids + END, [0] * len(head) + [1, 3] + [1] * (len(ids) - 2) + [0.5]))
        return prefix, (), None, queries


# -- 3. rows -----------------------------------------------------------------------------------------------------------


def positions(ids, pictures, start):
    """M-RoPE positions (3, T) of tokens that begin at `start`, and where the next ones begin."""
    ids = np.asarray(ids)
    out, at, k, n = np.zeros((3, len(ids)), np.int64), start, 0, 0
    pad = ID["<|image_pad|>"]
    while k < len(ids):
        if ids[k] == pad:
            side = 4 if pictures[n] >= 0 else 2
            out[0, k : k + side * side] = at
            out[1, k : k + side * side] = at + np.repeat(np.arange(side), side)
            out[2, k : k + side * side] = at + np.tile(np.arange(side), side)
            at, k, n = at + side, k + side * side, n + 1
        else:
            out[:, k] = at
            at, k = at + 1, k + 1
    return out, at


def rows(stream, mixture, count, length):
    """Pack `count` rows of `length` tokens from a mixture [(share of tokens, kind, arguments)].

    Returns ids (B, T), group and query numbers (B, T) (0 = padding; query 0 = the prefix), positions (3, B, T), target
    (B, T), weight (B, T) of predicting the target, and the pictures in reading order.
    """
    ids, group, query = (np.zeros((count, length), np.int64) for _ in range(3))
    ids[:] = PAD
    place, weight, pictures = np.zeros((3, count, length), np.int64), np.zeros((count, length), np.float32), []
    target = np.zeros((count, length), np.int64)
    debt = stream.__dict__.setdefault(
        "debt", {}
    )  # tokens drawn of each kind so far: the kind that lacks most comes next
    total = sum(share for share, *_ in mixture)
    spent = debt.setdefault(id(mixture), np.zeros(len(mixture)))
    for b in range(count):
        k, g, misses = 0, 0, 0
        while misses < 3 and k < length - 24:
            lack = spent / np.array([share / total for share, *_ in mixture])
            choice = int(np.argmin(lack + stream.rng.random(len(lack)) * 400))
            _, kind, arguments = mixture[choice]
            prefix, shown, learnt, queries = stream.group(kind, **arguments)
            fits, used = 0, len(prefix)
            while fits < len(queries) and k + used + len(queries[fits].ids) <= length:
                used, fits = used + len(queries[fits].ids), fits + 1
            if not fits:
                misses += 1
                continue
            g, spent[choice] = g + 1, spent[choice] + used
            n = len(prefix)
            ids[b, k : k + n], group[b, k : k + n], query[b, k : k + n] = prefix, g, 0
            place[:, b, k : k + n], after = positions(prefix, shown, 0)
            pictures += shown
            if learnt is not None:
                target[b, k : k + n - 1], weight[b, k : k + n - 1] = prefix[1:], learnt[1:]
            k += n
            for q, one in enumerate(queries[:fits]):
                n = len(one.ids)
                ids[b, k : k + n], group[b, k : k + n], query[b, k : k + n] = one.ids, g, q + 1
                place[:, b, k : k + n], _ = positions(one.ids, one.pictures, after)
                target[b, k : k + n - 1], weight[b, k : k + n - 1] = one.ids[1:], one.weight[1:]
                pictures += one.pictures
                k += n
    return ids, group, query, place, target, weight, pictures
