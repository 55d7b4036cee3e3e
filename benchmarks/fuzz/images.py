"""Valid images, and what their pixels are."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

TURNS = {  # EXIF's orientation -> how an upright picture comes of the stored one
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}
ORIENTATION = 0x0112  # a tag of EXIF
SIDES = (40, 56, 64, 90, 112)


class Made(NamedTuple):
    """A valid file. what: how it was made. ending: of its name. right: what the embedder must see
    in it, for `Made.kind`: pixels [H, W, C], frames [T, H, W, 3], or samples at `rate`; None where
    that is not known."""

    kind: str
    what: str
    ending: str
    content: bytes
    right: np.ndarray | None = None
    rate: float = 0.0


def picture(rng: np.random.Generator, channels: int = 3) -> np.ndarray:
    """Blurred colours and some noise, uint8 [H, W, channels], wider or higher than the other."""
    height, width = rng.choice(SIDES, 2, replace=False).tolist()
    coarse = rng.integers(0, 230, (4, 5, channels), np.uint8)
    planes = [
        np.asarray(Image.fromarray(coarse[:, :, i]).resize((width, height)))
        for i in range(channels)
    ]
    noise = rng.integers(0, 25, (height, width, channels), np.uint8)
    return np.stack(planes, axis=2) + noise


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    """The bytes of an image in a format of PIL's."""
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def jpeg(rng: np.random.Generator) -> Made:
    """Baseline or progressive, in colour, grey or CMYK."""
    mode = rng.choice(["RGB", "L", "CMYK"])
    options = {"quality": int(rng.integers(20, 96)), "progressive": bool(rng.integers(2))}
    content = saved(Image.fromarray(picture(rng)).convert(mode), "JPEG", **options)
    right = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return Made("image", f"JPEG {mode} {options}", ".jpg", content, right)


def turned(rng: np.random.Generator) -> Made:
    """With an orientation in EXIF."""
    orientation = int(rng.integers(2, 9))
    name, ending = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")][
        rng.integers(4)
    ]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"WEBP": {"lossless": True}, "TIFF": {"tiffinfo": {ORIENTATION: orientation}}}
    given = options.get(name, {}) if name == "TIFF" else {"exif": exif, **options.get(name, {})}
    content = saved(Image.fromarray(picture(rng)), name, **given)
    stored = np.asarray(_unturned(content))
    right = np.ascontiguousarray(TURNS[orientation](stored))
    return Made("image", f"{name} of orientation {orientation}", ending, content, right)


def _unturned(content: bytes) -> Image.Image:
    """The stored pixels. PIL itself turns those of a TIFF."""
    image = Image.open(io.BytesIO(content))
    if image.format == "TIFF":
        image.tag_v2.pop(ORIENTATION, None)
        image.getexif().pop(ORIENTATION, None)
    return image.convert("RGB")


def png(rng: np.random.Generator) -> Made:
    """8 bits, 16 bits of grey, transparency, a palette, one bit."""
    kind = rng.choice(["RGB", "RGBA", "L", "P", "I;16", "1"])
    pixels = picture(rng, 4 if kind == "RGBA" else 3)
    if kind == "I;16":
        levels = pixels[:, :, 0].astype(np.uint16) * 256 + pixels[:, :, 1]
        return Made("image", "PNG 16 bits", ".png", saved(Image.fromarray(levels), "PNG"),
                    pixels[:, :, :1].repeat(3, 2))  # fmt: skip
    image = Image.fromarray(pixels)
    if kind in ("L", "1"):
        image = image.convert(kind)
    if kind == "P":
        image = image.quantize(int(rng.choice([2, 16, 200])))
    right = pixels if kind == "RGBA" else np.asarray(image.convert("RGB"))
    return Made("image", f"PNG {kind}", ".png", saved(image, "PNG"), right)


def lossless(rng: np.random.Generator) -> Made:
    """BMP, TIFF of several compressions, WebP, PPM, TGA, PCX, JPEG 2000."""
    tiff = str(rng.choice(["raw", "tiff_lzw", "tiff_deflate", "packbits"]))
    name, ending, options = [
        ("BMP", ".bmp", {}),
        ("TIFF", ".tiff", {"compression": tiff}),
        ("WEBP", ".webp", {"lossless": True}),
        ("PPM", ".ppm", {}),
        ("TGA", ".tga", {}),
        ("PCX", ".pcx", {}),
        ("JPEG2000", ".jp2", {"irreversible": False}),
    ][rng.integers(7)]
    pixels = picture(rng)
    content = saved(Image.fromarray(pixels), name, **options)
    return Made("image", f"{name} {options}", ending, content, pixels)


def animated(rng: np.random.Generator) -> Made:
    """GIF, APNG or WebP; the first frame counts."""
    name, ending = [("GIF", ".gif"), ("PNG", ".png"), ("WEBP", ".webp")][rng.integers(3)]
    first = picture(rng)
    others = [
        Image.fromarray(rng.integers(0, 256, first.shape, np.uint8))
        for _ in range(rng.integers(1, 5))
    ]
    options = {"lossless": True} if name == "WEBP" else {}
    content = saved(
        Image.fromarray(first), name, save_all=True, append_images=others, duration=80, **options
    )
    right = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return Made("image", f"animated {name}, {1 + len(others)} frames", ending, content, right)


MAKERS: tuple[Callable[[np.random.Generator], Made], ...] = (
    jpeg,
    turned,
    png,
    lossless,
    animated,
)
