"""CLEVR in one file: scenes drawn at random, a small ray caster that pictures them, and the functional programs.

    scene = sample_scene(rng)                       the official scene graph, with the camera and lamps that saw it
    image, object_index = render(scene, (320, 240)) a picture and, for each pixel, the object seen there
    execute(program, scene)                         the official question engine's answer, for one scene
    SceneTable(scenes).evaluate(program)            the same for thousands of scenes at once

Axes: S scenes, N objects (padded), H, W pixels, R rays; vectors stand first: (3, R).
"""

from functools import lru_cache

import numpy as np

from data import InputError

SHAPES = ("cube", "sphere", "cylinder")
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "material": MATERIALS}
RELATIONS = ("left", "right", "behind", "front")
INVALID = "__INVALID__"  # what the official engine answers to an ill-posed question

RADIUS = {"small": 0.35, "large": 0.7}
RGB = (
    np.array(
        [
            (87, 87, 87),
            (173, 35, 35),
            (42, 75, 215),
            (29, 105, 20),
            (129, 74, 25),
            (129, 38, 192),
            (41, 208, 208),
            (255, 238, 51),
        ],
        np.float32,
    ).T
    / 255
)  # (3, colours)

# The stage: a camera that looks at the origin, three area lamps that do too. Positions are Blender's; the strengths
# were fitted to the empty ground of official pictures (mean error 3 % of its brightness), in squared display values.
CAMERA = np.array([7.4811, -6.5076, 5.3437])
FOCAL = 35 / 32  # focal length over the longer side of the picture
LAMPS = np.array([(6.447, -2.905, 4.258), (-4.671, -4.014, 3.011), (-1.168, 2.646, 5.816)])  # key, fill, back
LAMP_RGB = np.array([(5.68, 5.25, 4.54), (1.08, 1.18, 1.49), (2.75, 2.74, 2.72)], np.float32)
AMBIENT = 0.163
GROUND = 0.52  # the ground's albedo: what the strengths above already contain
LAMP_SHINE = 1.5  # the lamps' reflection in metal
EDGE = 0.11  # width of the rounded edges of cubes and cylinders, in radii

_behind = -CAMERA[:2] / np.linalg.norm(CAMERA[:2])
_right = np.array([-_behind[1], _behind[0]]) * -1
DIRECTIONS = {  # fixed by the camera before its jitter, as in the official scenes
    "right": [*_right.tolist(), 0.0],
    "left": [*(-_right).tolist(), 0.0],
    "behind": [*_behind.tolist(), 0.0],
    "front": [*(-_behind).tolist(), 0.0],
    "above": [0.0, 0.0, 1.0],
    "below": [0.0, 0.0, -1.0],
}


# -- 1. scenes ---------------------------------------------------------------------------------------------------------


def sample_scene(rng, objects=(3, 10), size=(480, 320), area=3.0, zoom=1.0, visible=0.45, index=0, split="train"):
    """Draw one scene as the official generator does: objects apart from each other, none hidden, all in the picture.

    rng: numpy Generator; objects: (fewest, most); size: (W, H) pixels that `pixel_coords` refer to; area: objects lie
    within +-area of the origin, in scene units (a large object is 1.4 wide); zoom: focal length against the official
    one; visible: the least share of an object's disc that nearer ones leave in sight. Returns a dict with the official
    keys and also `camera` and `lamps` (jittered by 0.5 and 1 unit).
    """
    filename = f"CLEVR_{split}_{index:06d}.png"
    while True:  # an arrangement that cannot be completed is thrown away whole, so positions stay unbiased
        camera = {"location": (CAMERA + rng.uniform(-0.5, 0.5, 3)).tolist(), "zoom": zoom}
        wanted = int(rng.integers(objects[0], objects[1] + 1))
        placed = _place(rng, wanted, area)
        if placed is None:
            continue
        centres = np.array([(x, y, r) for x, y, r, _ in placed])
        pixels = project(centres, camera, size)
        if not _all_visible(pixels, centres[:, 2], size, zoom, visible):
            continue
        kinds = zip(
            rng.integers(3, size=wanted).tolist(),
            rng.integers(8, size=wanted).tolist(),
            rng.integers(2, size=wanted).tolist(),
            rng.uniform(0, 360, wanted).tolist(),
        )
        return {
            "image_index": index,
            "image_filename": filename,
            "split": split,
            "directions": DIRECTIONS,
            "camera": camera,
            "lamps": (LAMPS + rng.uniform(-1, 1, (3, 3))).tolist(),
            "objects": [
                {
                    "shape": SHAPES[shape],
                    "color": COLORS[color],
                    "size": size_name,
                    "material": MATERIALS[material],
                    "3d_coords": [x, y, r],
                    "rotation": rotation,
                    "pixel_coords": [int(u), int(v), depth],
                }
                for (x, y, r, size_name), (shape, color, material, rotation), (u, v, depth) in zip(
                    placed, kinds, pixels.tolist()
                )
            ],
            "relationships": relationships(centres),
        }


def _place(rng, wanted, area, apart=0.25, margin=0.4):
    """Positions (x, y, radius, size name): a gap between objects, and no doubt about what is left or behind of what."""
    (rx, ry), (bx, by) = _right.tolist(), _behind.tolist()
    placed = []
    draws = rng.random((40 * wanted, 3)).tolist()
    for u, v, w in draws:
        name = SIZES[w < 0.5]
        x, y, r = area * (2 * u - 1), area * (2 * v - 1), RADIUS[name]
        for x2, y2, r2, _ in placed:
            dx, dy = x - x2, y - y2
            near = dx * dx + dy * dy < (r + r2 + apart) ** 2
            if near or abs(dx * rx + dy * ry) < margin or abs(dx * bx + dy * by) < margin:
                break
        else:
            placed.append((x, y, r, name))
            if len(placed) == wanted:
                return placed
    return None


_DISC = np.stack(
    [
        np.concatenate([[0], s * np.cos(a)]) if i == 0 else np.concatenate([[0], s * np.sin(a)])
        for i in range(2)
        for s, a in [(np.repeat([0.45, 0.85], 8), np.tile(np.arange(8) * np.pi / 4, 2))]
    ]
)


def _all_visible(pixels, radii, size, zoom, share):
    """Whether each object is inside the picture and at least `share` of its disc is not behind a nearer object."""
    reach = FOCAL * zoom * max(size) * radii / pixels[:, 2]  # radius in pixels
    u, v = pixels[:, 0], pixels[:, 1]
    if (u < reach).any() or (v < reach).any() or (u > size[0] - reach).any() or (v > size[1] - reach).any():
        return False
    points = pixels[:, :2, None] + reach[:, None, None] * _DISC  # (N, 2, points)
    gap = np.hypot(points[None, :, 0] - u[:, None, None], points[None, :, 1] - v[:, None, None])
    nearer = pixels[:, None, 2] < pixels[None, :, 2]
    hidden = ((gap < 1.1 * reach[:, None, None]) & nearer[..., None]).any(0)  # (N, points)
    return bool((hidden.mean(1) <= 1 - share).all())


def relationships(centres, eps=0.2):
    """For each direction and object the objects lying that way by more than `eps`: {"left": [[1, 2], [], ...], ...}."""
    flat = centres[:, :2]
    out = {}
    for name in RELATIONS:
        along = flat @ np.array(DIRECTIONS[name][:2])
        out[name] = [np.flatnonzero(row > eps).tolist() for row in along[None] - along[:, None]]
    return out


# -- 2. pictures -------------------------------------------------------------------------------------------------------


def _frame(camera):
    """The camera's place and its right, up and forward unit vectors."""
    place = np.array(camera["location"])
    forward = -place / np.linalg.norm(place)
    right = np.array([forward[1], -forward[0], 0]) / np.hypot(forward[0], forward[1])
    return place, right, np.cross(right, forward), forward


def project(points, camera, size):
    """Points (n, 3) as the camera sees them: columns x, y in pixels of a (W, H) picture, and the depth."""
    place, right, up, forward = _frame(camera)
    seen = (points - place) @ np.stack([right, up, forward]).T
    focal = FOCAL * camera["zoom"] * max(size)
    x, y = size[0] / 2 + focal * seen[:, 0] / seen[:, 2], size[1] / 2 - focal * seen[:, 1] / seen[:, 2]
    return np.stack([x, y, seen[:, 2]], 1)


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _light(point, normal, lamps):
    """What each lamp gives to a surface (3 lamps, R): the cosines at both ends over the squared distance."""
    shares = np.empty((3, point.shape[1]), np.float32)
    for i, lamp in enumerate(lamps):
        to = lamp[:, None] - point  # (3, R)
        square = _dot(to, to)
        here = to[2] if normal is None else np.maximum(_dot(to, normal), 0)  # no normal: level ground
        there = np.maximum(_dot(lamp / np.linalg.norm(lamp), to), 0)  # lamps face the origin
        shares[i] = here * there / (square * square)
    return shares


@lru_cache(maxsize=16)
def _pixel_grid(width, height, zoom):
    """Picture-plane coordinates (2, H*W) of the pixel centres, right and up, in focal lengths."""
    focal = FOCAL * zoom * max(width, height)
    x, y = (np.arange(width) + 0.5 - width / 2) / focal, -(np.arange(height) + 0.5 - height / 2) / focal
    return np.stack([np.tile(x, height), np.repeat(y, width)]).astype(np.float32)


@lru_cache(maxsize=16)
def _pixel_of_ray(width, height):
    """The picture's pixel (4*H*W,) that each ray of the grid twice as fine belongs to."""
    return (np.arange(2 * height)[:, None] // 2 * width + np.arange(2 * width) // 2).ravel()


@lru_cache(maxsize=16)
def _enlarge(small, large):
    """Linear interpolation from `small` to `large` pixels as a matrix (large, small)."""
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(small))).astype(np.float32)


def render(scene, size=(320, 240)):
    """Picture a scene by casting rays at its objects' bounding boxes only; four rays a pixel there, soft shadows.

    scene: official keys (`camera` and `lamps` if it has them); size: (W, H) pixels. Returns the image, uint8 (H, W, 3),
    and the object seen by each pixel, int8 (H, W): an index into scene["objects"], -1 for the ground.
    """
    width, height = size
    camera = scene.get("camera") or {"location": CAMERA, "zoom": 1.0}
    lamps = np.asarray(scene.get("lamps", LAMPS), np.float32)
    place, *axes = _frame(camera)
    place, axes = place.astype(np.float32), np.stack(axes).astype(np.float32)
    order = sorted(range(len(scene["objects"])), key=lambda k: SHAPES.index(scene["objects"][k]["shape"]))
    objects = [scene["objects"][k] for k in order]  # the rays of a shape stay together
    radius = np.array([RADIUS[o["size"]] for o in objects], np.float32)
    centre = np.array([o["3d_coords"] for o in objects], np.float32).reshape(-1, 3)

    # the ground: its light is soft, so every other pixel is enough
    coarse = ((width + 1) // 2, (height + 1) // 2)
    ray = axes[:2].T @ _pixel_grid(*coarse, camera["zoom"]) + axes[2][:, None]  # (3, pixels), of depth 1
    ground = place[:, None] + ray * (-place[2] / np.minimum(ray[2], -0.02))
    open_to = _shadows(ground, centre, radius, lamps, camera, coarse)  # (3 lamps + sky, pixels)
    ground = LAMP_RGB.T @ (_light(ground, None, lamps) * open_to[:3]) + AMBIENT * open_to[3]
    picture = _enlarge(coarse[1], height) @ ground.reshape(3, *coarse[::-1]) @ _enlarge(coarse[0], width).T
    picture = picture.reshape(3, -1)  # (3, H*W)
    index = np.full(height * width, -1, np.int8)

    # the objects: rays on a grid twice as fine as the picture's
    fine = (2 * width, 2 * height)
    ray, owner = _rays_at(objects, radius, centre, camera, fine)
    direction = axes[:2].T @ _pixel_grid(*fine, camera["zoom"]).take(ray, axis=1) + axes[2][:, None]  # (3, R)
    hit, depth, normal = _hit(direction, owner, objects, radius, centre, place)
    nearest = np.full(fine[0] * fine[1], np.inf, np.float32)
    np.minimum.at(nearest, ray[hit], depth)
    seen = np.flatnonzero(depth == nearest[ray[hit]])  # of several objects on a ray the first
    depth, normal, hit = depth[seen], normal.take(seen, 1), hit[seen]
    ray, owner, direction = ray[hit], owner[hit], direction.take(hit, 1)
    color = RGB[:, [COLORS.index(o["color"]) for o in objects]].reshape(3, -1).take(owner, 1)
    metal = np.array([o["material"] == "metal" for o in objects], bool)[owner]
    shade = _shade(place[:, None] + depth * direction, normal, direction, color, metal, radius[owner], lamps)
    pixel = _pixel_of_ray(width, height)[ray]
    hits = np.bincount(pixel, minlength=height * width)
    for c in range(3):
        picture[c] = picture[c] * (1 - hits / 4) + np.bincount(pixel, shade[c], height * width) / 4
    index[pixel] = np.array(order, np.int8)[owner]
    index[hits < 2] = -1
    image = np.sqrt(np.clip(picture, 0, 1)) * 255  # display values
    return image.T.astype(np.uint8).reshape(height, width, 3), index.reshape(height, width)


def _shadows(ground, centre, radius, lamps, camera, size):
    """The share of each lamp, and last of the sky, that reaches ground points (4, pixels); objects count as balls."""
    width, height = size
    blocked = np.zeros((4, width * height), np.float32)
    seen = project(centre, camera, size)
    reach = 3.4 * radius * FOCAL * camera["zoom"] * max(size) / seen[:, 2]
    windows = []
    for (u, v, _), r in zip(seen.tolist(), reach.tolist()):  # pixels around each object's foot
        rows = np.arange(max(0, int(v - 0.5 * r)), min(height, int(v + 0.9 * r) + 1))
        columns = np.arange(max(0, int(u - r)), min(width, int(u + r) + 1))
        windows.append((rows[:, None] * width + columns).ravel())
    pixel = np.concatenate([np.zeros(0, int), *windows])
    owner = np.repeat(np.arange(len(windows)), [len(w) for w in windows])
    r, point = radius[owner], ground.take(pixel, 1)
    to = centre.T.take(owner, 1) - point  # (3, R)
    square = _dot(to, to)
    near = r / np.sqrt(square)
    fade = np.clip(1.75 - 0.5 / near, 0, 1)  # gone before the window ends
    sky = near**3 * fade  # a ball's solid angle times its cosine
    for i, lamp in enumerate(lamps):
        light = lamp[:, None] - point
        along = _dot(light, to) / np.sqrt(_dot(light, light))
        miss = np.sqrt(np.maximum(square - along * along, 0)) / r  # 1 where the ray grazes the ball
        dark = np.clip((1.3 - miss) / 0.8, 0, 1) * (along > 0) * fade
        blocked[i] = np.bincount(pixel, 0.8 * dark + 0.3 * sky, width * height)
    blocked[3] = np.bincount(pixel, 0.9 * sky, width * height)
    return 1 - np.minimum(blocked, 0.9)


# Half-widths of the bounding boxes in the picture, in radii: seen from this height, whatever the rotation.
_BOX = {"cube": (1.45, 1.6), "sphere": (1.05, 1.05), "cylinder": (1.05, 1.42)}


def _rays_at(objects, radius, centre, camera, size):
    """Indices of the rays inside the objects' bounding boxes (R,), and the object that each is meant for (R,)."""
    width, height = size
    spread = np.array([_BOX[o["shape"]] for o in objects]).reshape(-1, 2) * radius[:, None]
    seen = project(centre, camera, size)
    reach = FOCAL * camera["zoom"] * max(size) * spread / (seen[:, 2:] - spread) + 1
    low, high = np.maximum(seen[:, :2] - reach, 0).astype(int), (seen[:, :2] + reach).astype(int) + 1
    boxes = []
    for (u0, v0), (u1, v1) in zip(low.tolist(), high.tolist()):
        boxes.append((np.arange(v0, min(height, v1))[:, None] * width + np.arange(u0, min(width, u1))).ravel())
    rays = np.concatenate([np.zeros(0, int), *boxes])
    return rays, np.repeat(np.arange(len(boxes)), [len(box) for box in boxes])


def _hit(direction, owner, objects, radius, centre, place):
    """The rays that hit the object they are meant for (indices into R), their depth, and outward normal (3, hits)."""
    angle = np.array([o.get("rotation", 0.0) for o in objects])  # Blender takes these numbers for radians
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    start = (place - centre).T / radius  # (3, N): in its own frame every object has radius 1
    start = np.stack([cos * start[0] + sin * start[1], cos * start[1] - sin * start[0], start[2]]).take(owner, 1)
    scale, cos, sin = 1 / radius[owner], cos[owner], sin[owner]
    step = np.stack([cos * direction[0] + sin * direction[1], cos * direction[1] - sin * direction[0], direction[2]])
    step *= scale
    hits, depths, normals = [], [], []
    shapes = [o["shape"] for o in objects]
    ends = np.searchsorted(owner, [shapes.count("cube"), shapes.count("cube") + shapes.count("sphere")])
    inner = 1 - EDGE
    for name, part in zip(SHAPES, (slice(0, ends[0]), slice(*ends), slice(ends[1], None))):
        o, d = start[:, part], step[:, part]
        near, far = np.full(o.shape[1], -np.inf, np.float32), np.float32(np.inf)
        for i in {"cube": (0, 1, 2), "cylinder": (2,), "sphere": ()}[name]:  # between two planes
            inverse = 1 / np.where(d[i] == 0, np.float32(1e-9), d[i])
            middle, half = -o[i] * inverse, np.abs(inverse)
            near, far = np.maximum(near, middle - half), np.minimum(far, middle + half)
        if name != "cube":  # inside a quadric: x^2 + y^2 (+ z^2) <= 1
            round_ = 2 if name == "cylinder" else 3
            a, b, c = (sum(u[i] * v[i] for i in range(round_)) for u, v in ((d, d), (o, d), (o, o)))
            root = b * b - a * (c - 1)
            reach = np.sqrt(np.maximum(root, 0))
            near, far = np.maximum(near, (-b - reach) / a), np.minimum(far, (reach - b) / a)
            far = np.where(root < 0, -np.float32(np.inf), far)
        hit = np.flatnonzero(near < far)
        p = o.take(hit, 1) + near[hit] * d.take(hit, 1)
        if name == "cube":  # the normal points away from a core that is smaller by the rounded edge
            p = p - np.clip(p, -inner, inner)
        elif name == "cylinder":
            ring = np.sqrt(p[0] ** 2 + p[1] ** 2)
            out = np.maximum(ring - inner, 0) / np.maximum(ring, 1e-6)
            p = np.stack([p[0] * out, p[1] * out, p[2] - np.clip(p[2], -inner, inner)])
        p /= np.sqrt(np.maximum(_dot(p, p), 1e-12))
        hits.append(hit + part.start)
        depths.append(near[hit])
        normals.append(p)
    hits, normal = np.concatenate(hits), np.concatenate(normals, 1)
    cos, sin = cos[hits], sin[hits]
    normal[:2] = cos * normal[0] - sin * normal[1], sin * normal[0] + cos * normal[1]
    return hits, np.concatenate(depths), normal


def _shade(point, normal, direction, color, metal, radius, lamps):
    """The light that comes from a point towards the camera (3, R): rubber is matte, metal mirrors ground and lamps."""
    above = point[2] / radius  # 0 at the foot, 2 at the top
    share = _light(point, normal, lamps)
    sky = (0.75 + 0.25 * normal[2]) * np.clip(0.45 + 0.55 * above, 0, 1)  # an object darkens its own foot
    light = (LAMP_RGB.T @ share + AMBIENT * sky) / GROUND
    view = direction / np.sqrt(_dot(direction, direction))
    mirror = view - 2 * _dot(view, normal) * normal
    gloss = np.empty((3, len(above)), np.float32)  # how bright each lamp is in the surface
    for i, lamp in enumerate(lamps):
        to = lamp[:, None] - point
        cosine = _dot(to, mirror) / np.sqrt(_dot(to, to))
        gloss[i] = np.where(
            metal, LAMP_SHINE * np.clip((cosine - 0.97) / 0.02, 0, 1), 0.05 * np.maximum(cosine, 0) ** 6
        )
    gloss = (LAMP_RGB.T / LAMP_RGB.max()) @ gloss
    out = color * light + gloss
    m = np.flatnonzero(metal)
    p, d = point.take(m, 1), mirror.take(m, 1)
    foot = p + d * (p[2] / np.maximum(-d[2], 0.02))
    floor = (LAMP_RGB.T @ _light(foot, None, lamps) + AMBIENT) * np.clip(0.35 + 0.4 * above[m], 0, 1)
    world = np.where(d[2] < -0.02, floor, AMBIENT * np.clip(1 - 1.6 * d[2], 0.12, 1))
    for c in range(3):  # row by row, which numpy does much faster than all at once
        out[c, m] = color[c, m] * (0.06 * light[c, m] + 1.25 * world[c]) + gloss[c, m]
    return out


# -- 3. programs -------------------------------------------------------------------------------------------------------


def steps(program):
    """A program's steps as (function, inputs, values), in either official spelling: type or function, side_inputs or
    value_inputs."""
    for step in program:
        name = step.get("type", step.get("function"))
        yield name, step["inputs"], step.get("side_inputs", step.get("value_inputs", []))


def execute(program, scene):
    """Answer a functional program on one scene as the official question engine does.

    program: list of {"type", "inputs", "side_inputs"} (or the spelling of the official question files). Returns a bool,
    an int, an attribute value, a list of object indices, or INVALID when `unique` does not find exactly one object.
    """
    objects, results = scene["objects"], []
    for name, inputs, values in steps(program):
        given = [results[i] for i in inputs]
        if any(g is INVALID for g in given):
            results.append(INVALID)
            continue
        head, _, attribute = name.partition("_")
        if name == "scene":
            out = list(range(len(objects)))
        elif head == "filter" and attribute in ATTRIBUTES:
            out = [i for i in given[0] if objects[i][attribute] == values[0]]
        elif name == "unique":
            out = given[0][0] if len(given[0]) == 1 else INVALID
        elif name == "relate":
            out = list(scene["relationships"][values[0]][given[0]])
        elif name == "union":
            out = sorted(set(given[0]) | set(given[1]))
        elif name == "intersect":
            out = sorted(set(given[0]) & set(given[1]))
        elif name == "count":
            out = len(given[0])
        elif name == "exist":
            out = len(given[0]) > 0
        elif head == "query" and attribute in ATTRIBUTES:
            out = objects[given[0]][attribute]
        elif head == "same" and attribute in ATTRIBUTES:
            mine = objects[given[0]][attribute]
            out = [i for i, o in enumerate(objects) if o[attribute] == mine and i != given[0]]
        elif head == "equal" and attribute in (*ATTRIBUTES, "integer", "object"):
            out = given[0] == given[1]
        elif name == "less_than":
            out = given[0] < given[1]
        elif name == "greater_than":
            out = given[0] > given[1]
        else:
            raise InputError(f"program function {name!r} found, expected one of the official CLEVR catalogue")
        results.append(out)
    return results[-1]


def word(answer):
    """An answer as a word: yes, no, a number or an attribute value."""
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)


CODE_BITS = tuple((name, value) for name, values in ATTRIBUTES.items() for value in values)  # bit k of SceneTable.code


class SceneTable:
    """Many scenes as arrays, so that a program is answered for all of them in a few array operations.

    `mask` (S, N) bool: the objects that exist; `value[attribute]` (S, N) int8: indices into ATTRIBUTES[attribute], -1
    where there is no object; `code` (S, N) uint16: all values of an object as bits, in the order of CODE_BITS;
    `related[direction]` (S, N, N) bool: [s, i, j], j lies that way of i.
    """

    def __init__(self, scenes):
        """scenes: list of scene dicts with the official keys; raises InputError for an unknown attribute value."""
        self.scenes = np.empty(len(scenes), object)
        self.scenes[:] = scenes
        most = max((len(s["objects"]) for s in scenes), default=0)
        self.mask = np.zeros((len(scenes), most), bool)
        self.value = {name: np.full((len(scenes), most), -1, np.int8) for name in ATTRIBUTES}
        self._related = self._whole = None
        for s, scene in enumerate(scenes):
            self.mask[s, : len(scene["objects"])] = True
            for name, values in ATTRIBUTES.items():
                try:
                    row = [values.index(o[name]) for o in scene["objects"]]
                except (KeyError, ValueError):
                    found = [o.get(name) for o in scene["objects"]]
                    where = scene.get("image_filename", f"scene {s}")
                    raise InputError(f"{where}: {name} found {found}, expected values of {values}") from None
                self.value[name][s, : len(row)] = row
        self.code = np.zeros((len(scenes), most), np.uint16)
        for k, (name, value) in enumerate(CODE_BITS):
            self.code |= (self.value[name] == ATTRIBUTES[name].index(value)).astype(np.uint16) << np.uint16(k)

    def __len__(self):
        return len(self.scenes)

    @property
    def related(self):
        if self._related is None and self._whole:  # a part's are the whole's, worked out once
            whole, rows = self._whole
            self._related = {name: cube[rows] for name, cube in whole.related.items()}
        elif self._related is None:
            count, most = self.mask.shape
            self._related = {name: np.zeros((count, most, most), bool) for name in RELATIONS}
            for s, scene in enumerate(self.scenes):
                for name in RELATIONS:
                    for i, others in enumerate(scene["relationships"][name]):
                        self._related[name][s, i, others] = True
        return self._related

    def take(self, rows):
        """The table of some of the scenes; rows: their indices."""
        part = object.__new__(SceneTable)
        part.scenes, part.mask, part.code = self.scenes[rows], self.mask[rows], self.code[rows]
        part.value = {name: column[rows] for name, column in self.value.items()}
        part._related, part._whole = None, (self, rows)
        return part

    def answers(self, program):
        """Answer a program for every scene: (S,) strings, INVALID where a `unique` does not find one object."""
        found, valid = self.evaluate(program)
        name = list(steps(program))[-1][0]
        if name.startswith("query_"):
            found = np.array(ATTRIBUTES[name[6:]])[found]
        elif found.dtype == bool:
            found = np.array(["no", "yes"])[found.astype(int)]
        return np.where(valid, found.astype(str), INVALID)

    def evaluate(self, program):
        """Answer a program for every scene: (answers (S,), valid (S,) bool), valid where every `unique` found one.

        Answers are bool, int64, or int8 indices into the queried attribute's values; what stands where valid is False
        has no meaning.
        """
        results, valid, rows = [], np.ones(len(self), bool), np.arange(len(self))
        for name, inputs, values in steps(program):
            given = [results[i] for i in inputs]
            head, _, attribute = name.partition("_")
            if name == "scene":
                out = self.mask
            elif head == "filter":
                out = given[0] & (self.value[attribute] == ATTRIBUTES[attribute].index(values[0]))
            elif name == "unique":
                valid = valid & (given[0].sum(1) == 1)
                out = given[0].argmax(1)  # (S,) object indices
            elif name == "relate":
                out = self.related[values[0]][rows, given[0]]
            elif name == "union":
                out = given[0] | given[1]
            elif name == "intersect":
                out = given[0] & given[1]
            elif name == "count":
                out = given[0].sum(1)
            elif name == "exist":
                out = given[0].any(1)
            elif head == "query":
                out = self.value[attribute][rows, given[0]]
            elif head == "same":
                column = self.value[attribute]
                out = self.mask & (column == column[rows, given[0]][:, None])
                out[rows, given[0]] = False
            elif head == "equal":
                out = given[0] == given[1]
            elif name == "less_than":
                out = given[0] < given[1]
            elif name == "greater_than":
                out = given[0] > given[1]
            else:
                raise InputError(f"program function {name!r} found, expected one of the official CLEVR catalogue")
            results.append(out)
        return results[-1], valid
