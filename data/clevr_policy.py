"""ClevrPolicy: decision trees over CLEVR pictures, written out as policies, with queries, answers and gold chains.

    python -m data.clevr_policy --out DIR --depth 4 --variant T --policies 10 --queries 200 --seed 0

A policy asks N questions of a picture on the way from its root to a response. Behind a yes the conditions speak of the
objects just found; after a no of the whole picture again. Variant M shows some attribute values as crops of pictures.
Everything is drawn from the seed; the same seed writes the same bytes on any number of processes.
"""

import argparse
import contextlib
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

import numpy as np
from PIL import Image

from data import MADE, InputError, command, open_text, refuse_strangers
from data.clevr import (
    ATTRIBUTES,
    CAMERA,
    CODE_BITS,
    FOCAL,
    INVALID,
    RADIUS,
    SceneTable,
    execute,
    project,
    render,
    sample_scene,
    word,
)
from data.conditions import grow_full
from data.dataset import KINDS
from data.prose import Prose
from data.sections import section_items

CROP = {"cube": 1.75, "sphere": 1.3, "cylinder": 1.55}  # half-width of an object's crop, in its radii

# -- 1. trees ----------------------------------------------------------------------------------------------------------


FEW = 1000  # scenes; a smaller folder cannot fill every branch of a deep tree, and its trees keep their depth anyway


def existence(held):
    """The functional program of "is there an object with these values?", {"color": "red", ...}."""
    program = [{"type": "scene", "inputs": [], "side_inputs": []}]
    for attribute, value in held.items():
        program.append({"type": f"filter_{attribute}", "inputs": [len(program) - 1], "side_inputs": [value]})
    return [*program, {"type": "exist", "inputs": [len(program) - 1], "side_inputs": []}]


def grow(rng, depth, table):
    """Draw a tree of existence conditions: nodes, parents before children and the root first, and the number of leaves.

    depth: layers of decisions; table: the scenes that the branches are weighed on. A node is {"held": {attribute:
    value} found on the way, "asked": (attribute, value), "program", "branches": {"yes": child, "no": child}}, a child
    ("node", k) or ("leaf", k). A branch that has found objects of all four attributes ends there, as there is nothing
    left to ask of them.
    """
    nodes, leaves = [], 0

    def visit(layer, rows, code, held, past):
        # rows: the scenes that come here; code (rows, N): their objects just found; past: [(conditions, answer), ...]
        nonlocal leaves
        options = _options(code, held, past, len(table)) if layer < depth and len(held) < len(ATTRIBUTES) else []
        if not options:
            leaves += 1
            return "leaf", leaves - 1
        attributes = sorted({CODE_BITS[k][0] for k in options})  # first the attribute, then its value
        attribute = attributes[int(rng.integers(len(attributes)))]
        options = [k for k in options if CODE_BITS[k][0] == attribute]
        bit = options[int(rng.integers(len(options)))]
        now = {**held, attribute: CODE_BITS[bit][1]}
        here, node = len(nodes), {"held": held, "asked": CODE_BITS[bit], "program": existence(now)}
        nodes.append(node)
        code = np.where(code & np.uint16(1 << bit), code, np.uint16(0))
        yes = code.any(1)
        node["branches"] = {"yes": visit(layer + 1, rows[yes], code[yes], now, [*past, (now, True)])}
        rows = rows[~yes]
        node["branches"]["no"] = visit(layer + 1, rows, table.code[rows], {}, [*past, (now, False)])
        return "node", here

    visit(0, np.arange(len(table)), table.code, {}, [])
    return nodes, leaves


def _options(code, held, past, total):
    """The conditions (bits of CODE_BITS) worth asking next: not settled yet, and dividing the scenes that come here.

    Those that leave a quarter of the scenes on either side, else a tenth, else the most even one; never fewer than one
    in a thousand of all.
    """
    allowed = []
    for k, (attribute, value) in enumerate(CODE_BITS):
        now = {**held, attribute: value}.items()
        settled = any(now <= known.items() if answer else known.items() <= now for known, answer in past)
        if attribute not in held and not settled:
            allowed.append(k)
    present = np.bitwise_or.reduce(code, axis=1)
    counts = {k: int(np.count_nonzero(present & np.uint16(1 << k))) for k in allowed}
    smaller = {k: min(yes, len(code) - yes) for k, yes in counts.items()}
    least = max(1, total / 1000)
    for share in (0.25, 0.1):
        options = [k for k in allowed if smaller[k] >= max(least, share * len(code))]
        if options:
            return options
    best = max(allowed, key=lambda k: smaller[k], default=None)
    if best is not None and smaller[best] >= least:
        return [best]
    return allowed if total < FEW else []


def build_policy(rng, depth, variant, table, style=None, conditions="existence", name=None, taken=(), crop_share=0.5):
    """Draw one policy: a tree, its wording, and which values are shown by pictures.

    rng: numpy Generator; depth: layers of decisions; variant: "T" all text, or "M" with a share `crop_share` of the
    nodes shown by crops; table: SceneTable to weigh branches on (a few thousand scenes are enough); style: see
    data/prose.py; conditions: "existence" or "full"; name: kept if given (an override reuses an old one). Returns a
    dict as in policies.json but for `images`: `crops` [(attribute, value), ...] says what each <image> has to show.
    """
    style = style or Prose()
    if conditions == "existence":
        nodes, leaves = grow(rng, depth, table)
    else:
        nodes, leaves = grow_full(rng, depth, table)
        while variant == "M" and not any(node["target"] for node in nodes):  # nothing that a picture could show
            nodes, leaves = grow_full(rng, depth, table)
        for node in nodes:
            attributes = list(node["target"] or ())
            if attributes:
                attribute = attributes[int(rng.integers(len(attributes)))]
                node["asked"] = (attribute, node["target"][attribute])
    shown = [k for k, node in enumerate(nodes) if "asked" in node] if variant == "M" else []
    shown = set(rng.permutation(shown)[: max(1, round(crop_share * len(shown)))].tolist()) if shown else set()
    policy = {
        "name": name or style.name(rng, depth, taken),
        "root": "n0",
        "depth": depth,
        "variant": variant,
        "conditions": conditions,
        "nodes": [
            {
                **node,
                "id": f"n{k}",
                "crop": k in shown,
                "blind": variant == "M",
                "branches": {answer: f"{kind[0]}{c}" for answer, (kind, c) in node["branches"].items()},
            }
            for k, node in enumerate(nodes)
        ],
        "leaves": [{"id": f"l{k}", "response": ""} for k in range(leaves)],
    }
    style.label(policy, rng)
    for node in policy["nodes"]:
        style.ask(node, rng)
    policy["text"] = style.text(policy, rng)
    policy["crops"] = [node["asked"] for node in policy["nodes"] if node["crop"]]
    return policy


# -- 2. scenes through trees -------------------------------------------------------------------------------------------


def route(policy, table):
    """Send scenes through a policy: (answers {node id: (S,) words}, leaf (S,) index into policy["leaves"]).

    A leaf of -1: some node on the scene's way is ill-posed there (`unique` finds none or several), so it is not used.
    """
    leaf, answers = np.full(len(table), -1), {}
    nodes = {node["id"]: node for node in policy["nodes"]}
    number = {entry["id"]: k for k, entry in enumerate(policy["leaves"])}
    stack = [(policy["root"], np.arange(len(table)))]
    while stack:
        key, rows = stack.pop()
        if key in number:
            leaf[rows] = number[key]
            continue
        if key not in answers:
            answers[key] = np.full(len(table), INVALID, object)
        found = table.take(rows).answers(nodes[key]["program"]) if len(rows) else np.zeros(0, "<U1")
        answers[key][rows] = found
        for answer, child in nodes[key]["branches"].items():
            stack.append((child, rows[found == answer]))
    return answers, leaf


def choose(leaf, leaves, count, rng, used=None):
    """Indices of `count` scenes, as even over the leaves as the scenes allow; those used least elsewhere come first.

    leaf: (S,) leaf index of each scene, -1 for none; used: (S,) how often each scene is used already. Returns fewer
    indices than `count` where there are no more. The order is random.
    """
    order = rng.permutation(len(leaf))
    if used is not None:
        order = order[np.argsort(used[order], kind="stable")]
    pools = [order[leaf[order] == k] for k in range(leaves)]
    sizes = np.array([len(pool) for pool in pools])
    level = np.zeros(leaves, int)  # raise all leaves together, each until its scenes run out
    while level.sum() < min(count, sizes.sum()):
        open_ = np.flatnonzero(level < sizes)
        missing = min(count, sizes.sum()) - level.sum()
        if missing < len(open_):
            level[rng.permutation(open_)[:missing]] += 1
        else:
            level[open_] = np.minimum(level[open_] + missing // len(open_), sizes[open_])
    rows = np.concatenate([pool[:n] for pool, n in zip(pools, level)]) if leaves else np.zeros(0, int)
    return rows[rng.permutation(len(rows))]


def walk(policy, answers, row):
    """One scene's way through the tree: (path [{"node", "answer"}], the response)."""
    nodes = {node["id"]: node["branches"] for node in policy["nodes"]}
    key, path = policy["root"], []
    while key in nodes:
        answer = str(answers[key][row])
        path.append({"node": key, "answer": answer})
        key = nodes[key][answer]
    return path, next(leaf["response"] for leaf in policy["leaves"] if leaf["id"] == key)


def make_items(policy, style, table, rows, answers, rng, split):
    """Queries on the scenes `rows` of the table, with answers, paths and gold chains; answers: what route returned."""
    items = []
    for number, row in enumerate(rows.tolist()):
        path, response = walk(policy, answers, row)
        scene = table.scenes[row]
        items.append(
            {
                "id": f"{policy['name']}-{split}-{number}",
                "policy": policy["name"],
                "scene": scene["image_filename"],
                "images": [picture_name(scene)],
                "question": style.query(policy, rng),
                "answer": response,
                "path": path,
                "cot": style.chain(policy, path),
            }
        )
    return items


# -- 3. pictures and crops ---------------------------------------------------------------------------------------------


def picture_name(scene):
    return f"images/{scene['split']}/{scene['image_filename']}"


def croppable(scene, size, scale=False):
    """For each object a box (left, top, right, bottom) that shows it and no other, or None: [box or None, ...].

    scale: the box is as wide as a large object needs, so that a small one looks small in it.
    """
    camera = scene.get("camera") or {"location": CAMERA, "zoom": 1.0}
    centres = np.array([o["3d_coords"] for o in scene["objects"]])
    radii = np.array([RADIUS[o["size"]] * CROP[o["shape"]] for o in scene["objects"]])
    if "camera" in scene:
        seen = project(centres, camera, size)
    else:  # the camera's jitter is unknown, the objects' pixels are known; official pictures come in 3:2 or 4:3
        seen = np.array([o["pixel_coords"] for o in scene["objects"]], float)
    unit = FOCAL * camera["zoom"] * max(size) / seen[:, 2]  # pixels
    reach = unit * radii
    boxes = []
    for k, (u, v, _) in enumerate(seen.tolist()):
        r = unit[k] * RADIUS["large"] * CROP["cube"] if scale else reach[k]
        gap = np.maximum(np.abs(seen[:, 0] - u), np.abs(seen[:, 1] - v)) - r - reach
        gap[k] = 1
        inside = u - r >= 0 and v - r >= 0 and u + r <= size[0] and v + r <= size[1]
        boxes.append((int(u - r), int(v - r), int(u + r) + 1, int(v + r) + 1) if inside and (gap > 0).all() else None)
    return boxes


def draw_crops(policy, table, size, style, rng):
    """One example picture for each entry of policy["crops"]: [PIL image, ...].

    table: scenes to cut from; size: (W, H) of the pictures that are drawn. Raises InputError if no scene shows a value
    alone.
    """
    crops = []
    for attribute, value in policy["crops"]:
        showing = np.argwhere(table.value[attribute] == ATTRIBUTES[attribute].index(value))
        for row, k in showing[rng.permutation(len(showing))].tolist():
            scene = table.scenes[row]
            box = croppable(scene, picture_size(scene, size), scale=attribute == "size")[k]
            if box:
                crops.append(style.crop(open_picture(scene, size).crop(box)))
                break
        else:
            raise InputError(
                f"policy {policy['name']}: no scene shows a {value} object apart from others, expected one"
            )
    return crops


# -- 4. scenes to draw from --------------------------------------------------------------------------------------------


def read_clevr(folder):
    """The scenes of a folder in the official CLEVR v1.0 layout: {"train": scenes, "test": scenes}, with "file" paths.

    Training queries come from scenes/CLEVR_train_scenes.json, test queries from CLEVR_val_scenes.json. Raises
    InputError naming the file and what is wrong in it.
    """
    splits = {}
    for split, official in (("train", "train"), ("test", "val")):
        path = os.path.join(folder, "scenes", f"CLEVR_{official}_scenes.json")
        try:
            with open_text(path) as file:
                scenes = json.load(file)["scenes"]
        except FileNotFoundError:
            raise InputError(f"{path}: no such file, expected a folder in the official CLEVR v1.0 layout") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: no scene file of CLEVR ({error!r:.80})") from None
        for k, scene in enumerate(scenes):
            for key in ("image_filename", "objects", "relationships"):
                if not isinstance(scene, dict) or key not in scene:
                    raise InputError(f"{path}: scene {k} lacks the key {key!r}")
            name = scene["image_filename"]
            file = os.path.join(folder, "images", official, os.path.basename(name))
            if name != os.path.basename(name) or not os.path.isfile(file):
                raise InputError(f"{path}: scene {k}: picture {name!r} is missing from {os.path.dirname(file)}")
            scene["file"], scene["split"] = file, official
        if not scenes:
            raise InputError(f"{path}: no scenes, expected at least one")
        splits[split] = scenes
    return splits


def _sample_range(job):
    seed, split, start, end, options = job
    return [
        sample_scene(np.random.default_rng([seed, {"train": 0, "val": 1}[split], k]), index=k, split=split, **options)
        for k in range(start, end)
    ]


def sample_scenes(seed, counts, run=map, **options):
    """Scenes of the project's own: {"train": scenes, "test": scenes}, each drawn from its own seed.

    counts: {"train": S, "test": S}; run: map, or a process pool's map; options: for clevr.sample_scene.
    """
    out = {}
    for split, official in (("train", "train"), ("test", "val")):
        jobs = [(seed, official, k, min(k + 500, counts[split]), options) for k in range(0, counts[split], 500)]
        out[split] = [scene for part in run(_sample_range, jobs) for scene in part]
    return out


def open_picture(scene, size):
    """A scene's picture as PIL image: the folder's own, or drawn at size (W, H)."""
    if "file" not in scene:
        return Image.fromarray(render(scene, size)[0])
    try:
        return read_picture(scene["file"]).convert("RGB")
    except OSError as error:  # the header was fine, the rest is not
        raise InputError(f"{scene['file']}: unreadable picture ({error})") from None


def picture_size(scene, size):
    return read_picture(scene["file"]).size if "file" in scene else size


@lru_cache(maxsize=16)
def read_picture(path):
    """A picture file, decoded only when its pixels are used; raises InputError if it is none."""
    try:
        return Image.open(path)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: unreadable picture ({error})") from None


def _write_picture(job):
    scene, size, path = job
    if "file" in scene:
        shutil.copyfile(scene["file"], path)
    else:
        open_picture(scene, size).save(path)


# -- 5. a data set -----------------------------------------------------------------------------------------------------


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def write_jsonl(path, items):
    with open(path, "w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


class NewFolder:
    """A folder that appears whole or not at all: it is filled beside its place and moved there at the end.

    with NewFolder(path, overwrite) as draft: ...   raises InputError if something is at `path` and overwrite is unset,
    or if something is there that no such command wrote: MADE lists what it did.
    """

    PAGES = ("inspect.html", "check.html")  # ours, too

    def __init__(self, path, overwrite=False):
        self.path, self.draft = os.path.abspath(path), f"{os.path.abspath(path)}.draft-{os.getpid()}"
        if os.path.exists(self.path) and not overwrite and (not os.path.isdir(self.path) or os.listdir(self.path)):
            raise InputError(f"{path}: exists already, expected a new or empty folder (--overwrite replaces it)")
        made = os.path.join(self.path, MADE)
        ours = open(made).read().splitlines() if os.path.isfile(made) else []
        refuse_strangers(self.path, [MADE, *self.PAGES, *ours])

    def __enter__(self):
        os.makedirs(self.draft)
        return self.draft

    def __exit__(self, kind, *_):
        if kind is None:
            with open(os.path.join(self.draft, MADE), "w") as file:
                file.write("".join(f"{name}\n" for name in sorted(os.listdir(self.draft)) if name != MADE))
            if os.path.isdir(self.path):
                shutil.rmtree(self.path)
            os.replace(self.draft, self.path)
        else:
            shutil.rmtree(self.draft, ignore_errors=True)


def make_dataset(
    out,
    scenes,
    *,
    depth,
    variant,
    policies,
    queries,
    sft,
    test,
    seed,
    style=None,
    conditions="existence",
    cpt=("applied", "document"),
    size=(480, 320),
    run=map,
    overwrite=False,
):
    """Write a whole data folder: policies.json, the four JSONL files, scenes/ and images/.

    scenes: {"train", "test"} as read_clevr or sample_scenes give them; counts (queries, sft, test) are per policy;
    cpt: kinds of VM-CPT items; run: map, or a process pool's map. Returns figures for a report. Raises InputError if
    the scenes do not supply the queries.
    """
    style = style or Prose()
    tables = {split: SceneTable(part) for split, part in scenes.items()}
    total = len(tables["train"])
    weigh = tables["train"].take(np.arange(min(total, 4000)))
    if total < FEW:
        weigh = SceneTable(scenes["train"] + scenes["test"])
    used = {split: np.zeros(len(table), int) for split, table in tables.items()}
    drawn, taken, files, report = [], set(), {"cpt": [], "sft": [], "rl": [], "test": []}, []
    with NewFolder(out, overwrite) as draft:
        os.makedirs(os.path.join(draft, "images", "crops"))
        for p in range(policies):
            rng = np.random.default_rng([seed, 2, p])
            policy = build_policy(rng, depth, variant, weigh, style, conditions, taken=taken)
            taken.add(policy["name"])
            items = {}
            for split, wanted in (("train", queries), ("test", test)):
                answers, leaf = route(policy, tables[split])
                rows = choose(leaf, len(policy["leaves"]), wanted, rng, used[split])
                if len(rows) < wanted:
                    raise InputError(
                        f"policy {policy['name']}: {wanted} {split} queries asked for, the folder's scenes "
                        f"supply {len(rows)}"
                    )
                used[split][rows] += 1
                items[split] = make_items(policy, style, tables[split], rows, answers, rng, split)
                if split == "train":
                    thoughtful = choose(leaf[rows], len(policy["leaves"]), sft, rng)
                    sft_items = [items["train"][k] for k in sorted(thoughtful.tolist())]
                    sft_rows = rows[np.sort(thoughtful)]
                    files["cpt"] += cpt_items(policy, style, sft_items, tables[split].scenes[sft_rows], cpt, rng)
            files["sft"] += sft_items
            files["rl"] += items["train"]
            files["test"] += items["test"]
            policy["images"] = []
            for k, crop in enumerate(draw_crops(policy, tables["train"], size, style, rng), 1):
                policy["images"].append(f"images/crops/{policy['name']}-{k}.png")
                crop.save(os.path.join(draft, policy["images"][-1]))
            drawn.append(policy)
            report.append(figures(policy, items["train"] + items["test"]))
        write_json(os.path.join(draft, "policies.json"), [stored(policy) for policy in drawn])
        for name, lines in files.items():
            write_jsonl(os.path.join(draft, f"{name}.jsonl"), lines)
        os.makedirs(os.path.join(draft, "scenes"))
        for split, official in (("train", "train"), ("test", "val")):
            os.makedirs(os.path.join(draft, "images", official))
            kept = [scenes[split][k] for k in np.flatnonzero(used[split])]
            jobs = [(scene, size, os.path.join(draft, picture_name(scene))) for scene in kept]
            for _ in run(_write_picture, jobs):
                pass
            write_json(
                os.path.join(draft, "scenes", f"CLEVR_{official}_scenes.json"),
                {
                    "info": {"split": official, "version": "1.0"},
                    "scenes": [{k: v for k, v in scene.items() if k != "file"} for scene in kept],
                },
            )
    return report


def stored(policy):
    """A policy as policies.json keeps it: without what only its making needed."""
    nodes = []
    for node in policy["nodes"]:
        entry = {
            key: node[key]
            for key in ("id", "program", "question", "quote", "section", "recite", "branches")
            if key in node
        }
        if node["crop"]:
            entry["crop"] = dict([node["asked"]])
        nodes.append(entry)
    keys = ("name", "root", "depth", "variant", "conditions")
    return {
        **{key: policy[key] for key in keys},
        "nodes": nodes,
        "leaves": policy["leaves"],
        "text": policy["text"],
        "images": policy["images"],
    }


def figures(policy, items):
    """What a report says of a policy: sizes, and the share of the most frequent answer, which is a guesser's score."""
    answers = [item["answer"] for item in items]
    counts = {leaf["response"]: answers.count(leaf["response"]) for leaf in policy["leaves"]}
    return {
        "name": policy["name"],
        "nodes": len(policy["nodes"]),
        "responses": len(policy["leaves"]),
        "words": len(policy["text"].split()),
        "pictures": len(policy["images"]),
        "most frequent": max(counts.values()) / max(1, len(items)),
        "unreached": sum(count == 0 for count in counts.values()),
    }


def cpt_items(policy, style, items, scenes, kinds, rng):
    """VM-CPT items of one policy, of the kinds wanted, around its chain-of-thought items and their scenes.

    "applied": the item with the policy in front; "document": the policy alone, one for every ten items; "response":
    the same query, answered by all sections in random order, each with its answer on the picture; "section": items
    about single sections, with one simulated case a response.
    """
    out = []
    if "applied" in kinds:
        out += [{**item, "id": f"{item['id']}-applied", "kind": "applied"} for item in items]
    if "document" in kinds:
        for k in range(max(1, len(items) // 10)):
            out.append(
                {
                    "id": f"{policy['name']}-document-{k}",
                    "policy": policy["name"],
                    "kind": "document",
                    "images": [],
                    "question": "",
                    "answer": "",
                }
            )
    if "response" in kinds:
        for item, scene in zip(items, scenes):
            path = []
            for k in rng.permutation(len(policy["nodes"])).tolist():
                node = policy["nodes"][k]
                found = word(execute(node["program"], scene))
                path += [{"node": node["id"], "answer": found}] if found in node["branches"] else []
            out.append(
                {
                    **item,
                    "id": f"{item['id']}-response",
                    "kind": "response",
                    "path": path,
                    "answer": f"<think>{style.chain(policy, path)}</think>",
                    "cot": "",
                }
            )
    if "section" in kinds:
        out += section_items(policy, style, rng, scenes[: len(policy["leaves"])])
    return out


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m data.clevr_policy",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="the data folder to write")
    add("--depth", type=int, default=4, metavar="N", help="layers of decisions; the paper has 2, 4 and 6")
    add("--variant", choices=("T", "M"), default="T", help="T all text, M some attribute values shown by pictures")
    add("--policies", type=int, default=10, metavar="P", help="policies internalised at once")
    add("--queries", type=int, default=200, metavar="Q", help="training queries per policy; the paper has 2000")
    add("--sft", type=int, metavar="Q", help="of these with a chain of thought, per policy; default queries / 8")
    add("--test", type=int, metavar="Q", help="test queries per policy, on unseen scenes; default queries / 10")
    add("--seed", type=int, default=0, help="the same seed writes the same bytes")
    add(
        "--clevr-root",
        metavar="FOLDER",
        help="scenes and pictures of a folder in the official CLEVR v1.0 layout; without it the project draws its own",
    )
    add(
        "--conditions",
        choices=("existence", "full"),
        default="existence",
        help="existence: the paper's; full: counts, relations, comparisons, several-way branches",
    )
    add(
        "--cpt",
        default="applied,document",
        metavar="KINDS",
        help="kinds of VM-CPT items, of applied (the paper's form), document, section, response",
    )
    add("--size", default="480x320", metavar="WxH", help="pixels of the pictures that the project draws")
    add("--objects", default="3-10", metavar="A-B", help="objects in the scenes that the project draws")
    add(
        "--scenes",
        type=int,
        metavar="S",
        help="training scenes that the project draws to choose from, and a quarter more "
        "for the test; default: enough that rare responses have queries and that policies need not share pictures",
    )
    add(
        "--paper",
        action="store_true",
        help="the paper's sizes: 10 policies, 2000 queries, 250 of them with chains, "
        "200 for the test, kinds of VM-CPT: applied",
    )
    add("--processes", type=int, default=1, metavar="N", help="processes that draw scenes and pictures")
    add("--overwrite", action="store_true", help="replace the folder if it exists")
    return parser


def _pair(text, mark, flag):
    parts = text.split(mark)
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"{flag} {text!r} found, expected two whole numbers above 0 with {mark!r} between them")
    return int(parts[0]), int(parts[1])


def main(argv=None):
    args = arguments().parse_args(argv)
    if args.paper:
        args.policies, args.queries, args.sft, args.test, args.cpt = 10, 2000, 250, 200, "applied"
    args.sft = max(1, args.queries // 8) if args.sft is None else args.sft
    args.test = max(1, args.queries // 10) if args.test is None else args.test
    for flag in ("depth", "policies", "queries", "test", "processes"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)} found, expected at least 1")
    if not 0 <= args.sft <= args.queries:
        raise InputError(f"--sft {args.sft} found, expected 0 to {args.queries}, the number of queries")
    if args.scenes is not None and args.scenes < args.queries:
        raise InputError(f"--scenes {args.scenes} found, expected at least --queries {args.queries}")
    if args.depth > 10:
        raise InputError(f"--depth {args.depth} found, expected 10 at most: the tree doubles with every layer")
    kinds = args.cpt.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--cpt {kind!r} found, expected one of {', '.join(KINDS)}")
    size, objects = _pair(args.size, "x", "--size"), _pair(args.objects, "-", "--objects")
    if not objects[0] <= objects[1] <= 10 or min(size) < 56 or max(size) > 4096:
        raise InputError(
            f"--objects {args.objects} --size {args.size} found, expected 1 to 10 objects, 56 to 4096 pixels"
        )
    NewFolder(args.out, args.overwrite)  # refuses a taken place before any work
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(ProcessPoolExecutor(args.processes)).map if args.processes > 1 else map
        if args.clevr_root:
            scenes = read_clevr(args.clevr_root)
        else:  # enough that rare responses are not, and that policies can have pictures of their own
            count = args.scenes or max(2000, 4 * args.queries, args.policies * args.queries * 6 // 5)
            counts = {"train": count, "test": max(count // 4, 8 * args.test, args.policies * args.test * 6 // 5)}
            scenes = sample_scenes(args.seed, counts, run, size=size, objects=objects)
        report = make_dataset(
            args.out,
            scenes,
            depth=args.depth,
            variant=args.variant,
            policies=args.policies,
            queries=args.queries,
            sft=args.sft,
            test=args.test,
            seed=args.seed,
            cpt=kinds,
            conditions=args.conditions,
            size=size,
            run=run,
            overwrite=args.overwrite,
        )
    for row in report:
        print(
            f"{row['name']:16} {row['nodes']:4} conditions {row['responses']:4} responses {row['words']:6} words "
            f"{row['pictures']:3} pictures   most frequent answer {row['most frequent']:.3f}"
            + (f"   {row['unreached']} responses that no scene reaches" if row["unreached"] else "")
        )
    print(
        f"{args.out}: {args.policies * args.queries} training queries, {args.policies * args.sft} with chains, "
        f"{args.policies * args.test} test queries"
    )


if __name__ == "__main__":
    command(main)
