"""Pictures for GTAPolicy, drawn with Pillow: receipts, price lists, charts, signs, formulas and scenes of objects.

    picture = draw("receipt", rng)     picture.image, picture.texts, picture.objects, picture.about

A drawer keeps what it has put on the paper, so a simulated tool can answer from the facts: every line of text and every
object with its box (x1, y1, x2, y2) in pixels. Letters come from the font that Pillow carries, so nothing is fetched.
"""

from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

SIZE = (448, 336)  # 16 x 12 visual tokens of 28 px
PAPER, INK = (252, 250, 244), (24, 24, 28)
COLORS = {
    "red": (205, 45, 45),
    "blue": (45, 85, 200),
    "green": (40, 140, 70),
    "orange": (235, 140, 30),
    "purple": (125, 60, 165),
    "yellow": (240, 205, 50),
}
KINDS = ("mug", "apple", "star", "kite", "fish", "book")


@dataclass
class Picture:
    """A picture and its facts: texts [(box, line)], objects [{kind, color, box}], about: what a describer says."""

    family: str
    image: Image.Image
    about: str = ""
    texts: list = field(default_factory=list)
    objects: list = field(default_factory=list)
    facts: dict = field(default_factory=dict)  # what requests are made of: names and values by label


class Page:
    """A sheet with a pen that remembers the boxes of what it writes."""

    def __init__(self, background=PAPER, size=SIZE):
        self.image = Image.new("RGB", size, background)
        self.pen = ImageDraw.Draw(self.image)
        self.texts = []

    def write(self, at, line, size=20, color=INK, anchor="la"):
        """Write one line at `at` = (x, y) in pixels; the anchor is Pillow's (la = left, top). Returns its box."""
        font = ImageFont.load_default(size)
        box = tuple(round(edge) for edge in self.pen.textbbox(at, line, font, anchor))
        self.pen.text(at, line, color, font, anchor)
        self.texts.append((box, line))
        return box


def draw(family, rng):
    """Draw one picture of a family ("receipt", "prices", "chart", "sign", "formula", "scene") with a random.Random."""
    return DRAWERS[family](rng)


# -- 1. paper: receipts, price lists, signs ----------------------------------------------------------------------------

SHOPS = ("Corner Bakery", "Harbour Deli", "Green Grocer", "Maple Cafe", "Station Kiosk", "Hill Market", "Old Mill Shop",
         "Blue Door Books", "Sunny Garden", "Bridge Street Bar", "North Pier Fish", "Paper and Pens")  # fmt: skip
GOODS = ("Bread", "Coffee", "Apples", "Cheese", "Tea", "Soup", "Honey", "Juice", "Salad", "Muffin", "Notebook",
         "Candle",
         "Olives", "Rice", "Butter", "Lemonade", "Pears", "Walnuts")  # fmt: skip


def _rows(page, top, step, goods, prices, size):
    for row, (name, cents) in enumerate(zip(goods, prices)):
        page.write((60, top + row * step), name, size)
        page.write((388, top + row * step), f"{cents / 100:.2f}", size, anchor="ra")


def draw_receipt(rng):
    """A till receipt: the shop, three to five goods with prices, the total."""
    shop, goods = rng.choice(SHOPS), rng.sample(GOODS, rng.randint(3, 5))
    prices = [rng.randrange(120, 1990, 5) for _ in goods]
    page = Page()
    page.write((224, 18), shop, 28, anchor="ma")
    page.pen.line((50, 62, 398, 62), INK, 2)
    _rows(page, 76, 36, goods, prices, 21)
    bottom = 76 + 36 * len(goods)
    page.pen.line((50, bottom + 2, 398, bottom + 2), INK, 2)
    page.write((60, bottom + 12), "Total", 24)
    page.write((388, bottom + 12), f"{sum(prices) / 100:.2f}", 24, anchor="ra")
    facts = {"title": shop, "prices": dict(zip(goods, prices)), "total": sum(prices)}
    return Picture(
        "receipt",
        page.image,
        f"A till receipt from {shop} with {len(goods)} items and a total.",
        page.texts,
        facts=facts,
    )


def draw_prices(rng):
    """A price board: a heading and four to six goods with prices, no total."""
    shop, goods = rng.choice(SHOPS), rng.sample(GOODS, rng.randint(4, 6))
    prices = [rng.randrange(100, 1500, 10) for _ in goods]
    shade = rng.choice([(34, 52, 46), (45, 40, 60), (60, 44, 34)])
    page = Page(shade)
    page.pen.rectangle((8, 8, 439, 327), outline=(214, 190, 130), width=4)
    chalk = (246, 243, 230)
    page.write((224, 22), f"{shop} prices", 25, chalk, "ma")
    for row, (name, cents) in enumerate(zip(goods, prices)):
        page.write((50, 74 + 40 * row), name, 23, chalk)
        page.write((398, 74 + 40 * row), f"{cents / 100:.2f}", 23, chalk, "ra")
    facts = {"title": shop, "prices": dict(zip(goods, prices))}
    return Picture(
        "prices",
        page.image,
        f"A dark price board headed {shop} prices, with {len(goods)} goods.",
        page.texts,
        facts=facts,
    )


SIGNS = (
    ("Museum of Clocks", "Open 9:00 to 17:30", "Closed on Mondays"),
    ("Lake Ferry", "Next boat 14:20", "Pier 3"),
    ("Quiet Zone", "No phones", "Reading room 2"),
    ("Trail Head", "Summit 6.4 km", "Hut 2.1 km"),
    ("Platform 7", "Train to Utrecht", "Departs 08:45"),
    ("City Library", "Returns on floor 1", "Open until 20:00"),
    ("Botanic Garden", "Palm house 26 C", "Please close the door"),
    ("Car Park B", "Free spaces 128", "Height 2.10 m"),
    ("Swimming Hall", "Water 27 C", "Lanes 1 to 4 reserved"),
    ("Tower Tour", "312 steps", "Last entry 16:45"),
    ("Bakers Lane", "One way", "Bicycles allowed"),
    ("Night Bus 61", "Every 20 minutes", "From 23:30"),
)


def draw_sign(rng):
    """A sign on a post under a sky: a heading and two lines."""
    heading, *lines = rng.choice(SIGNS)
    color = rng.choice(["blue", "green", "purple", "red"])
    page = Page((198, 222, 240))
    page.pen.rectangle((0, 280, 448, 336), (122, 160, 96))
    page.pen.rectangle((214, 220, 234, 320), (110, 110, 116))
    page.pen.rounded_rectangle((44, 34, 404, 232), 18, COLORS[color], (250, 250, 250), 5)
    page.write((224, 54), heading, 34, (255, 255, 255), "ma")
    for row, line in enumerate(lines):
        page.write((224, 116 + 48 * row), line, 27, (255, 255, 255), "ma")
    about = f"A {color} sign on a post in front of a meadow. It is headed {heading}."
    objects = [{"kind": "sign", "color": color, "box": (44, 34, 404, 232)}]
    return Picture("sign", page.image, about, page.texts, objects, {"title": heading, "lines": lines})


# -- 2. charts ---------------------------------------------------------------------------------------------------------

CHARTS = (
    ("Visitors a day", ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat")),
    ("Rain in mm", ("Jan", "Feb", "Mar", "Apr", "May")),
    ("Books lent", ("Art", "Maps", "Poems", "Comics")),
    ("Bikes counted", ("North", "East", "South", "West")),
    ("Trees planted", ("Oak", "Elm", "Ash", "Lime", "Beech")),
    ("Cups sold", ("Tea", "Coffee", "Cocoa", "Milk")),
    ("Power in kWh", ("Roof", "Barn", "Shed", "Wall")),
    ("Letters sent", ("Anna", "Ben", "Carla", "Dario", "Eve")),
)


def draw_chart(rng):
    """A bar chart: a title, four to six bars, each value above its bar."""
    title, labels = rng.choice(CHARTS)
    values = rng.sample(range(12, 96), len(labels))
    color = rng.choice(list(COLORS))
    page = Page((255, 255, 255))
    page.write((224, 12), title, 26, anchor="ma")
    page.pen.line((40, 292, 430, 292), INK, 2)
    slot, objects = 384 / len(labels), []
    for i, (label, value) in enumerate(zip(labels, values)):
        left, right, top = round(44 + slot * (i + 0.18)), round(44 + slot * (i + 0.82)), round(290 - 2.2 * value)
        page.pen.rectangle((left, top, right, 290), COLORS[color])
        page.write(((left + right) / 2, top - 4), str(value), 19, anchor="md")
        page.write(((left + right) / 2, 298), label, 19, anchor="ma")
        objects.append({"kind": "bar", "color": color, "box": (left, top, right, 290)})
    about = f"A bar chart titled {title} with {len(labels)} {color} bars."
    return Picture(
        "chart", page.image, about, page.texts, objects, {"title": title, "values": dict(zip(labels, values))}
    )


# -- 3. formulas -------------------------------------------------------------------------------------------------------


def draw_formula(rng):
    """An equation in one unknown on a blackboard: linear, quadratic, or with a fraction; `latex` is its source."""
    kind, x = rng.choice(["linear", "quadratic", "fraction"]), rng.choice("xyzt")
    a, b, root = rng.randint(2, 9), rng.randint(1, 20), rng.randint(2, 9)
    page = Page((32, 62, 50))
    page.pen.rectangle((6, 6, 441, 329), outline=(150, 110, 70), width=8)
    if kind == "linear":  # a x + b = c
        parts, latex = [f"{a}{x} + {b} = {a * root + b}"], f"{a}{x} + {b} = {a * root + b}"
        code, solution = f"{a}*{x} + {b} = {a * root + b}", [root]
    elif kind == "quadratic":  # x^2 - (p + q) x + p q = 0
        other = root + rng.randint(1, 6)
        tail = f" - {root + other}{x} + {root * other} = 0"
        parts, latex = [x, ("power", "2"), tail], f"{x}^{{2}}{tail}"
        code, solution = f"{x}**2 - {root + other}*{x} + {root * other} = 0", [root, other]
    else:  # x / a + b = c
        parts, latex = [("fraction", x, str(a)), f" + {b} = {root + b}"], f"\\frac{{{x}}}{{{a}}} + {b} = {root + b}"
        code, solution = f"{x}/{a} + {b} = {root + b}", [a * root]
    chalk, size = (245, 245, 235), 44
    font, small = ImageFont.load_default(size), ImageFont.load_default(28)
    width = sum(font.getlength(part) if isinstance(part, str) else 36 for part in parts)
    left = cursor = (448 - width) / 2
    for part in parts:
        if isinstance(part, str):
            page.pen.text((cursor, 160), part, chalk, font, "lm")
            cursor += font.getlength(part)
        elif part[0] == "power":
            page.pen.text((cursor + 2, 138), part[1], chalk, small, "lm")
            cursor += 24
        else:
            page.pen.text((cursor + 18, 128), part[1], chalk, font, "mm")
            page.pen.line((cursor, 160, cursor + 36, 160), chalk, 4)
            page.pen.text((cursor + 18, 192), part[2], chalk, font, "mm")
            cursor += 40
    page.texts.append(((round(left), 108, round(cursor), 212), latex))
    facts = {"latex": latex, "equation": code, "unknown": x, "kind": kind, "solution": str(solution)}
    return Picture("formula", page.image, "A green blackboard with one equation in chalk.", page.texts, facts=facts)


# -- 4. scenes of objects to count and to point at ---------------------------------------------------------------------


def _mug(pen, x, y, color):
    pen.ellipse((x + 34, y + 14, x + 62, y + 46), outline=color, width=7)
    pen.rounded_rectangle((x + 2, y + 4, x + 46, y + 58), 6, color, INK, 2)
    return x + 2, y + 4, x + 62, y + 58


def _apple(pen, x, y, color):
    pen.ellipse((x + 6, y + 16, x + 38, y + 60), color)
    pen.ellipse((x + 24, y + 16, x + 56, y + 60), color)
    pen.line((x + 31, y + 20, x + 36, y + 4), (90, 60, 30), 4)
    return x + 6, y + 4, x + 56, y + 60


def _star(pen, x, y, color):
    points = [(30, 2), (38, 22), (59, 23), (42, 36), (48, 57), (30, 45), (12, 57), (18, 36), (1, 23), (22, 22)]
    pen.polygon([(x + u, y + v) for u, v in points], color, INK)
    return x + 1, y + 2, x + 59, y + 57


def _kite(pen, x, y, color):
    pen.polygon([(x + 30, y), (x + 52, y + 24), (x + 30, y + 54), (x + 8, y + 24)], color, INK)
    pen.line((x + 30, y, x + 30, y + 54), INK, 2)
    pen.line((x + 8, y + 24, x + 52, y + 24), INK, 2)
    pen.line((x + 30, y + 54, x + 38, y + 64), INK, 2)
    return x + 8, y, x + 52, y + 64


def _fish(pen, x, y, color):
    pen.polygon([(x + 40, y + 32), (x + 62, y + 16), (x + 62, y + 48)], color, INK)
    pen.ellipse((x + 2, y + 14, x + 48, y + 50), color, INK, 2)
    pen.ellipse((x + 12, y + 24, x + 18, y + 30), INK)
    return x + 2, y + 14, x + 62, y + 50


def _book(pen, x, y, color):
    pen.rectangle((x + 8, y + 4, x + 52, y + 60), color, INK, 2)
    pen.rectangle((x + 8, y + 4, x + 16, y + 60), INK)
    pen.rectangle((x + 24, y + 14, x + 46, y + 26), (250, 246, 230))
    return x + 8, y + 4, x + 52, y + 60


BRUSHES = {"mug": _mug, "apple": _apple, "star": _star, "kite": _kite, "fish": _fish, "book": _book}


def draw_scene(rng):
    """Six to twelve objects of two or three kinds on a table; one kind stands there once, so it can be pointed at."""
    kinds = rng.sample(KINDS, rng.randint(2, 3))
    counts = [1, *(rng.randint(3, 5) for _ in kinds[1:])]
    cells = rng.sample([(column, row) for row in range(3) for column in range(5)], sum(counts))
    page = Page(rng.choice([(236, 226, 206), (224, 232, 236), (232, 236, 224)]))
    page.pen.line((0, 12, 448, 12), (190, 176, 150), 6)
    objects = []
    for kind in (kind for kind, count in zip(kinds, counts) for _ in range(count)):
        column, row = cells[len(objects)]
        color = rng.choice(list(COLORS))
        x, y = 12 + 87 * column + rng.randint(0, 14), 26 + 102 * row + rng.randint(0, 26)
        objects.append({"kind": kind, "color": color, "box": BRUSHES[kind](page.pen, x, y, COLORS[color])})
    objects.sort(key=lambda thing: thing["box"][0])
    listing = " and ".join(f"{count} {plural(kind, count)}" for kind, count in zip(kinds, counts))
    return Picture(
        "scene",
        page.image,
        f"A table seen from above with {listing}.",
        [],
        objects,
        {"counts": dict(zip(kinds, counts)), "single": kinds[0]},
    )


def plural(kind, count=2):
    """The word for `count` objects of a kind."""
    return kind if count == 1 or kind == "fish" else kind + "s"


DRAWERS = {
    "receipt": draw_receipt,
    "prices": draw_prices,
    "chart": draw_chart,
    "sign": draw_sign,
    "formula": draw_formula,
    "scene": draw_scene,
}
