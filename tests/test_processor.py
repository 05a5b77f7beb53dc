"""Pictures to patches, messages to tokens: against transformers, Pillow and the official template."""

import contextlib
import json
import os
import re

import jinja2
import numpy as np
import pytest
import torch
from helpers import TEMPLATE, picture, question, tiny_checkpoint
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import InputError
from model import Processor, open_image, smart_resize

SIZES = [(140, 196), (56, 84), (448, 616), (20, 20), (10, 2000), (2000, 10), (70, 70), (98, 42), (1, 150), (613, 417)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


def edited(folder, tmp_path, name, change):
    """A copy of the small files with one JSON file changed in place by `change`."""
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    content = json.loads((tmp_path / name).read_text())
    change(content)
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(3136, 12845056), (4 * 784, 64 * 784), (100 * 784, 200 * 784)], ids=str)
def test_patches_and_grids_are_those_of_transformers(folder, tmp_path, limits):
    def limit(content):
        content["min_pixels"], content["max_pixels"] = limits

    processor = Processor.from_pretrained(edited(folder, tmp_path, "preprocessor_config.json", limit))
    reference = Qwen2VLImageProcessorPil(min_pixels=limits[0], max_pixels=limits[1])
    pictures = [picture(w, h) for w, h in SIZES]
    pixel_values, grid_thw = processor.images(pictures)
    expected = reference(pictures, return_tensors="pt")
    assert torch.equal(grid_thw, expected["image_grid_thw"])
    assert pixel_values.dtype == torch.float32
    assert (pixel_values - expected["pixel_values"]).abs().max() <= 1e-6


def test_sides_round_half_to_even_and_a_side_may_round_to_nothing_first():
    """The two traps of the official resize: 70 is 56, not 84; and a 10x2000 strip still gets its minimum of pixels."""
    assert smart_resize(70, 70, 28, 3136, 12845056) == (56, 56)
    assert smart_resize(98, 98, 28, 3136, 12845056) == (112, 112)
    assert smart_resize(10, 2000, 28, 3136, 12845056) == (28, 812)


def test_a_picture_too_long_is_refused():
    with pytest.raises(InputError, match="2010x10 .* aspect ratio of 200"):
        smart_resize(10, 2010, 28, 3136, 12845056)


def test_limits_of_area_are_read_from_either_form_of_the_file(folder, tmp_path):
    def newer(content):
        content["size"] = {"shortest_edge": content.pop("min_pixels"), "longest_edge": content.pop("max_pixels")}

    found = Processor.from_pretrained(edited(folder, tmp_path, "preprocessor_config.json", newer))
    assert (found.min_pixels, found.max_pixels) == (3136, 12845056)
    options = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": options}))  # as transformers 5 saves
    assert Processor.from_pretrained(tmp_path).max_pixels == 12845056


def test_transparency_is_on_white_and_every_mode_becomes_rgb(tmp_path):
    red = np.zeros((8, 8, 4), np.uint8)
    red[..., 0], red[:4, :, 3] = 255, 255  # opaque above, transparent below
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    palette = Image.fromarray(red[..., :3]).quantize(2)
    palette.info["transparency"] = palette.getpixel((0, 0))
    cases = {
        "rgba": (Image.fromarray(red), (255, 255, 255)),
        "grey": (Image.fromarray(grey), (252, 252, 252)),
        "grey16": (Image.fromarray(grey.astype(np.uint16) * 257), (252, 252, 252)),
        "onebit": (Image.fromarray(grey > 100), (255, 255, 255)),
        "palette": (palette, (255, 255, 255)),
        "la": (Image.fromarray(np.stack([grey, 0 * grey], -1), "LA"), (255, 255, 255)),
    }
    for name, (image, corner) in cases.items():
        image.save(tmp_path / f"{name}.png")
        opened = open_image(tmp_path / f"{name}.png")
        assert (opened.mode, opened.getpixel((7, 7))) == ("RGB", corner), name
    assert open_image(tmp_path / "rgba.png").getpixel((0, 0)) == (255, 0, 0)
    assert np.array_equal(np.asarray(open_image(tmp_path / "grey16.png"))[..., 0], grey)  # Pillow's own would clip


def test_exif_rotation_is_applied_to_files(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    picture(40, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


def test_unreadable_pictures_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    picture(50, 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("cut.png", "empty.png", "text.png", "missing.png"):
        with pytest.raises(InputError, match=rf"{name}: found .* expected a readable picture"):
            open_image(tmp_path / name)


def test_what_runs_other_programs_is_no_picture_whatever_its_name(tmp_path):
    """Pillow would start Ghostscript for an EPS file that is called x.png."""
    picture(50, 50).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "x.png")
    with pytest.raises(InputError, match="x.png: found UnidentifiedImageError"):
        open_image(tmp_path / "x.png")
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(InputError, match="fifo.png: found FileNotFoundError"):
        open_image(tmp_path / "fifo.png")


def test_every_raster_format_that_pillow_writes_is_read(tmp_path):
    """A fixed list of formats, and none of those people have is missing from it."""
    image, read = picture(56, 84), set()
    Image.init()
    for name in sorted(Image.SAVE.keys() - {"EPS", "PDF"}):
        with contextlib.suppress(OSError, KeyError, ValueError):  # not of this mode, or no encoder in this Pillow
            image.save(tmp_path / "x", name)
            size = Image.open(tmp_path / "x").size
            assert open_image(tmp_path / "x").size == size, name
            read.add(name)
    assert {"BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP"} <= read


def test_pillow_s_limit_switched_off_leaves_our_own(tmp_path, monkeypatch):
    picture(50, 50).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "a.png").size == (50, 50)
    monkeypatch.setattr("support.pictures.LARGEST", 2499)
    with pytest.raises(InputError, match="50x50 pixels, more than 2499"):
        open_image(tmp_path / "a.png")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    picture(50, 50).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2499)
    with pytest.raises(InputError, match="50x50 pixels, more than 2499"):
        open_image(tmp_path / "bomb.png")


# -- chats ------------------------------------------------------------------------------------------------------------

# Written by hand after the hub's file: with its numbering of pictures, off by default.
OFFICIAL = TEMPLATE.replace(
    "{% if part.type == 'image' %}",
    "{% if part.type == 'video' %}{% if add_vision_id %}Video {{ n }}: {% endif %}<|vision_start|><|video_pad|>"
    "<|vision_end|>{% elif part.type == 'image' %}{% if add_vision_id %}Picture {{ n }}: {% endif %}",
)
CHATS = {
    "text": question("what is this?"),
    "string": [{"role": "user", "content": "what is this?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "turns": [*question("one", answer="1"), *question("two", answer="2"), *question("three")],
    "picture": question("what is this?", picture(56, 84)),
    "between": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "before "},
                {"type": "image", "image": picture(56, 84)},
                {"type": "text", "text": " between "},
                {"type": "image", "image": picture(140, 196)},
                {"type": "text", "text": " after\n"},
            ],
        }
    ],
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_chat_strings_are_those_of_the_template(processor, name, prompt):
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(OFFICIAL)
    expected = template.render(messages=CHATS[name], add_generation_prompt=prompt)
    assert processor.chat(CHATS[name], add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("name", CHATS)
def test_tokens_are_those_of_transformers(processor, folder, name):
    """Every image token of the string stands for as many tokens as the picture has merged ones, 28x28 pixels each."""
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    encoded = processor.encode(CHATS[name])
    counts = iter([] if encoded.grid_thw is None else (encoded.grid_thw.prod(1) // 4).tolist())
    text = re.sub(r"<\|image_pad\|>", lambda _: "<|image_pad|>" * next(counts), processor.chat(CHATS[name]))
    assert encoded.input_ids.tolist() == reference(text)["input_ids"]
    assert encoded.input_ids.dtype == torch.int64


def test_decode_drops_special_tokens_and_keeps_what_rewards_read(processor):
    text = "<think>yes, no</think>\\boxed{A9} caf\u00e9 \u732b"
    ids = processor.tokenizer.encode(text).ids
    assert processor.decode([*ids, *processor.stop_ids]) == text


def test_paths_and_pictures_give_the_same(processor, tmp_path):
    picture(56, 84).save(tmp_path / "a.png")
    by_path = processor.encode(question("?", tmp_path / "a.png"))
    by_picture = processor.encode(question("?", picture(56, 84)))
    assert torch.equal(by_path.pixel_values, by_picture.pixel_values)
    assert torch.equal(by_path.input_ids, by_picture.input_ids)


def test_an_image_token_in_a_text_is_no_picture(processor):
    encoded = processor.encode(question("look: <|image_pad|>", picture(56, 84)))
    assert int((encoded.input_ids == processor.image_pad_id).sum()) == encoded.image_tokens == 6
    assert "look: <|image_pad|>" in processor.tokenizer.decode(encoded.input_ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    "content",
    [None, 3, [{"type": "video", "video": "a.mp4"}], [{"type": "text"}], ["text"], [{"type": "text", "text": 3}]],
)
def test_a_message_of_another_form_is_refused(processor, content):
    with pytest.raises(InputError, match="expected a (text part or an image part|string)"):
        processor.chat([{"role": "user", "content": content}])


# -- bad files --------------------------------------------------------------------------------------------------------


def drop_token(content):
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|image_pad|>"]


BAD = {
    "tokenizer.json no special token": ("tokenizer.json", drop_token, r"found no <\|image_pad\|>"),
    "tokenizer.json no model": ("tokenizer.json", lambda c: c.pop("model"), "tokenizer.json: found .* a tokenizer"),
    "config.json other token id": ("config.json", lambda c: c.update(image_token_id=7), "= 280, expected 7 as in"),
    "preprocessor bad limit": ("preprocessor_config.json", lambda c: c.update(min_pixels=-1), "min_pixels = -1"),
    "preprocessor no number": ("preprocessor_config.json", lambda c: c.update(patch_size="14"), "patch_size = '14'"),
    "preprocessor bad mean": ("preprocessor_config.json", lambda c: c.update(image_mean=[0.5]), "image_mean = "),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_processor_file_is_named_with_its_fault(folder, tmp_path, fault):
    name, change, message = BAD[fault]
    with pytest.raises(InputError, match=message) as error:
        Processor.from_pretrained(edited(folder, tmp_path, name, change))
    assert str(tmp_path) in str(error.value)


def test_a_missing_tokenizer_is_named(folder, tmp_path):
    edited(folder, tmp_path, "config.json", lambda content: None)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json: found no such file"):
        Processor.from_pretrained(tmp_path)
