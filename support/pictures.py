"""Pictures as files: which are opened, how large they may be, any of them as upright RGB, and its size when scaled."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import InputError
from support.files import shown

# Formats of picture files: all that Pillow reads by itself. EPS would start Ghostscript, metafiles run their commands.
FORMATS = frozenset(
    "AVIF BLP BMP CUR DCX DDS DIB FITS FLI FTEX GBR GIF ICNS ICO IM IMT IPTC JPEG JPEG2000 MCIDAS MPO MSP PCD PCX "
    "PIXAR PNG PPM PSD QOI SGI SPIDER SUN TGA TIFF WEBP XBM XPM XVTHUMB".split()
)
LARGEST = 89_478_485  # pixels of a picture file, Pillow's own limit, where that is switched off


def to_rgb(image):
    """Any PIL.Image as RGB: transparency on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path):
    """A picture file as an upright RGB PIL.Image. Raises InputError that names the file where it cannot be read."""
    Image.preinit()
    Image.init()
    try:
        if not Path(path).is_file():  # a FIFO would never answer
            raise FileNotFoundError("no such file")
        with Image.open(path, formats=[name for name in Image.ID if name in FORMATS]) as image:
            if image.width * image.height > (most := Image.MAX_IMAGE_PIXELS or LARGEST):
                raise ValueError(f"{image.width}x{image.height} pixels, more than {most}")
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise anything on damaged files
        found = f"{type(error).__name__} ({shown(str(error))})"
        raise InputError(f"{path}: found {found}, expected a readable picture") from None


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Sides in multiples of `factor`, with an area within the limits, close to the old aspect ratio. All in pixels."""
    if not 0 < max(height, width) <= 200 * min(height, width):
        raise InputError(f"found a picture of {width}x{height} pixels, expected an aspect ratio of 200 at most")
    h, w = round(height / factor) * factor, round(width / factor) * factor  # banker's rounding: 70 -> 56
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w
