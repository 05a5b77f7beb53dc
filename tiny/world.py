"""The tiny world: pictures of one to three CLEVR objects, 112 x 112 pixels, drawn by the project's own renderer.

scene, image, index = picture(seed, number)
image, index, table, spot = pictures(folder, count, seed)      the same for many, in memory-mapped files, by every core
write_tokenizer(folder)                           one word per token, with Qwen's own special tokens among them
Terse()                                           how policies read here: `N14 small rubber cube then A9 else A7 .`
"""

import json
import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from data import InputError
from data.clevr import ATTRIBUTES, COLORS, MATERIALS, SHAPES, SIZES, render, sample_scene
from data.clevr_policy import write_json
from data.dataset import IMAGE

SIDE = 112  # pixels: 8 x 8 patches of 14, 16 visual tokens
CROP = 56  # pixels of a policy's crop: 4 visual tokens
OBJECTS = 3
LOOK = {"area": 1.9, "zoom": 1.6}  # closer than the official camera: a small object is 15 pixels wide
VISIBLE = 50  # pixels of each object that must be seen


def picture(seed, number, look=LOOK):
    """Draw picture `number` of world `seed`: (scene, image uint8 (112, 112, 3), object index int8 (112, 112))."""
    rng = np.random.default_rng([seed, number])
    while True:
        scene = sample_scene(rng, (1, OBJECTS), (SIDE, SIDE), index=number, **look)
        image, index = render(scene, (SIDE, SIDE))
        if np.bincount(index[index >= 0], minlength=len(scene["objects"])).min() >= VISIBLE:
            return scene, image, index


def attributes(scene):
    """The attributes of up to three objects as numbers: int8 (3, 4), columns as in ATTRIBUTES, -1 where none is."""
    table = np.full((OBJECTS, len(ATTRIBUTES)), -1, np.int8)
    for row, thing in zip(table, scene["objects"]):
        row[:] = [values.index(thing[name]) for name, values in ATTRIBUTES.items()]
    return table


def _fill(job):
    folder, seed, start, stop = job
    image, index, table, spot = (
        np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("image", "index", "table", "spot")
    )
    for number in range(start, stop):
        scene, image[number], index[number] = picture(seed, number)
        table[number] = attributes(scene)
        for k, thing in enumerate(scene["objects"]):
            spot[number, k] = thing["pixel_coords"][:2]


def pictures(folder, count, seed, workers=os.cpu_count()):
    """Draw `count` pictures into memory-mapped arrays in `folder`, unless they are there, and return the four: image
    uint8 (S, 112, 112, 3), index int8 (S, 112, 112), table int8 (S, 3, 4), spot uint8 (S, 3, 2), objects' middles.
    """
    folder = Path(folder)
    done = folder / "done.json"
    wanted = {"count": count, "seed": seed}
    if not (done.exists() and json.loads(done.read_text()) == wanted):
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {
            "image": ((SIDE, SIDE, 3), np.uint8),
            "index": ((SIDE, SIDE), np.int8),
            "table": ((OBJECTS, 4), np.int8),
            "spot": ((OBJECTS, 2), np.uint8),
        }
        for name, (shape, dtype) in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *shape)).flush()
        jobs = [(folder, seed, start, min(start + 500, count)) for start in range(0, count, 500)]
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of each worker: on small matrices more only wait for each other
        with get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(_fill, jobs):
                pass
        done.write_text(json.dumps(wanted))
    return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("image", "index", "table", "spot"))


# -- 2. words ----------------------------------------------------------------------------------------------------------

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
SYSTEM = "You are a helpful assistant."  # the chat's default system message: here one token
ADDED = [SYSTEM, "<think>", "</think>", "\\boxed{", "}"]  # found in a text also where no space stands around them
NODES, ACTIONS, POLICIES = (
    [f"{letter}{i}" for i in range(count)] for letter, count in (("N", 64), ("A", 64), ("P", 16))
)
WORDS = [
    "<unk>",
    "system",
    "user",
    "assistant",
    ".",
    ",",
    ":",
    "?",
    "yes",
    "no",
    "then",
    "else",
    "start",
    "policy",
    "updated",
    "apply",
    "recite",
    "walk",
    "check",
    "describe",
    "section",
    "next",
    "of",
    "is",
    "answer",
    "and",
    "not",
    "the",
]
KINDS = ["size", "color", "material", "shape"]  # the order in which a condition names its attributes
WORDS += KINDS + [*SIZES, *COLORS, *MATERIALS, *SHAPES] + POLICIES + NODES + ACTIONS
TOKENS = SPECIAL + ADDED + WORDS
ID = {word: i for i, word in enumerate(TOKENS)}


def write_tokenizer(folder, ids=ID, more=(), decoder=None):
    """Write tokenizer.json, tokenizer_config.json and the files of the processor and of sampling into `folder`.

    ids: {token: id}; more: tokens that are found in a text also where no space stands around them; decoder: how tokens
    become a text (default: with spaces between them).
    """
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    words.add_tokens([AddedToken(word, special=False) for word in [*ADDED, *more]])
    if decoder:
        words.decoder = decoder
    words.save(str(folder / "tokenizer.json"))
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {
        str(ids[word]): {"content": word, **plain, "special": word in SPECIAL} for word in [*SPECIAL, *ADDED, *more]
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": added,
            "unk_token": "<unk>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_pixels": CROP * CROP,
            "max_pixels": SIDE * SIDE,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [ID["<|im_end|>"], ID["<|endoftext|>"]], "pad_token_id": ID["<|endoftext|>"]},
    )


class Terse:
    """The words of a ClevrPolicy in the tiny world: a style like `data.prose.Prose`, one sentence per node."""

    updated = ""  # the base has no words to say that a policy replaces another

    def name(self, rng, depth, taken=()):
        free = [name for name in POLICIES if name not in taken]
        if not free:
            raise InputError(
                f"found {len(taken)} policies, expected at most {len(POLICIES)}: the tiny base knows no more names"
            )
        return free[int(rng.integers(len(free)))]

    def label(self, policy, rng):
        """Nodes and responses take random names of the base's vocabulary."""
        new = {}
        for entries, names in ((policy["nodes"], NODES), (policy["leaves"], ACTIONS)):
            if len(entries) > len(names):
                raise InputError(
                    f"found a policy of {len(entries)} sections, expected at most {len(names)}, "
                    "as the tiny base knows no more names"
                )
            new |= {entry["id"]: names[k] for entry, k in zip(entries, rng.permutation(len(names)).tolist())}
        policy["root"] = new[policy["root"]]
        for leaf in policy["leaves"]:
            leaf["id"] = leaf["response"] = new[leaf["id"]]
        for node in policy["nodes"]:
            node["id"] = new[node["id"]]
            node["branches"] = {answer: new[child] for answer, child in node["branches"].items()}

    def ask(self, node, rng):
        attribute, value = node["asked"]
        spoken = {**node["held"], attribute: value}
        shown = {**spoken, attribute: f"{attribute} of {IMAGE}"} if node["crop"] else spoken
        node["quote"], node["question"] = (
            " ".join(words[kind] for kind in KINDS if kind in words) for words in (spoken, shown)
        )

    def sentence(self, node, words):
        return f"{node['id']} {words} then {node['branches']['yes']} else {node['branches']['no']}"

    def text(self, policy, rng):
        sentences = [f"policy {policy['name']} : start {policy['root']} ."]
        for node in policy["nodes"]:
            node["section"] = self.sentence(node, node["quote"]) + " ."
            node["recite"] = self.restate(policy, node, rng)
        order = rng.permutation(len(policy["nodes"])).tolist()
        policy["nodes"] = [policy["nodes"][k] for k in order]  # pictures follow the order of the text
        return " ".join([*sentences, *[self.sentence(node, node["question"]) + " ." for node in policy["nodes"]]])

    def query(self, policy, rng):
        return f"apply {policy['name']} :"

    def restate(self, policy, node, rng):
        return f"recite {policy['name']} : {node['id']}"

    def lead(self, policy, node, answer, rng):
        return None  # the base has no words to ask for one branch

    def case(self, policy, path, scene, rng):
        """The answers instead of the picture: the base's own task of that name."""
        return f"walk {policy['name']} : {' '.join(step['answer'] for step in path)}"

    def crop(self, image):
        return image.resize((CROP, CROP), Image.BICUBIC)

    def chain(self, policy, path):
        nodes = {node["id"]: node for node in policy["nodes"]}
        return " ".join(
            f"{self.sentence(nodes[step['node']], nodes[step['node']]['quote'])} {step['answer']}" for step in path
        )
