"""Pictures: every kind of JPEG and PNG, pixels to tensor values, and boxes that find their way back."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, ModelError, TooLargeError
from edge_serve.processing.image import PAD_VALUE, Geometry, ImageProcessor
from edge_serve.spec import InputSpec
from tests.unit.material import assert_close, encoded, noise, plain, tensor

RGB8 = tensor((1, 8, 8, 3), "uint8", 1 / 255, 0)
RGB = tensor((1, 8, 8, 3))
GRAY = tensor((1, 8, 8, 1))


def processor(spec: TensorSpec = RGB8, **options: Any) -> ImageProcessor:
    return ImageProcessor(InputSpec(**options), spec)


def color(payload: bytes, spec: TensorSpec = RGB8, **options: Any) -> list[float]:
    """Give the middle pixel of the tensor."""
    array, _ = processor(spec, **options).decode(payload)
    assert array.shape == (1, *spec.shape[1:])
    assert array.flags.c_contiguous
    middle: list[float] = array[0, spec.shape[1] // 2, spec.shape[2] // 2].tolist()
    return middle


# Kinds of pictures.


def test_a_png_comes_through_exactly() -> None:
    picture = noise(8, 8)
    array, geometry = processor().decode(encoded(picture, "PNG"))
    np.testing.assert_array_equal(array[0], np.asarray(picture))
    assert (geometry.width, geometry.height) == (8, 8)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_the_payload_may_be_any_kind_of_bytes(form: type) -> None:
    assert color(form(encoded(plain(9, 9, (1, 2, 3)), "PNG"))) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_colours_of_a_jpeg(mode: str) -> None:
    found = color(encoded(plain(16, 16, (200, 60, 30)).convert(mode), "JPEG", quality=95))
    assert_close(found, [200, 60, 30], atol=3)


def test_a_gray_jpeg_or_png_has_three_equal_channels_in_a_colour_model() -> None:
    gray = plain(16, 16, (77, 77, 77)).convert("L")
    assert color(encoded(gray, "PNG")) == [77, 77, 77]
    assert_close(color(encoded(gray, "JPEG")), [77] * 3, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_colour_picture_becomes_luminance_in_a_gray_model(kind: str) -> None:
    found = color(encoded(plain(16, 16, (200, 60, 30)), kind), tensor((1, 8, 8, 1), "uint8", 1 / 255, 0))
    assert_close(found, [0.299 * 200 + 0.587 * 60 + 0.114 * 30], atol=2)


def test_a_black_and_white_png() -> None:
    assert color(encoded(plain(8, 8, (255, 255, 255)).convert("1"), "PNG")) == [255, 255, 255]


@pytest.mark.parametrize("transparency", [None, 0, bytes([10, 200])])
def test_a_palette_png_with_and_without_transparency(transparency: Any) -> None:
    """Pillow would warn of palettes with transparency, once for each process and place."""
    options = {} if transparency is None else {"transparency": transparency}
    assert color(encoded(plain(8, 8, (10, 20, 250)).quantize(2), "PNG", **options)) == [10, 20, 250]


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_plays_no_part(alpha: int) -> None:
    assert color(encoded(Image.new("RGBA", (8, 8), (10, 20, 30, alpha)), "PNG")) == [10, 20, 30]
    assert color(encoded(Image.new("LA", (8, 8), (40, alpha)), "PNG")) == [40, 40, 40]


@pytest.mark.parametrize("level", [0, 255, 256, 40_000, 65_535])
@pytest.mark.parametrize("spec", [RGB8, tensor((1, 8, 8, 1), "uint8", 1 / 255, 0)])
def test_a_16_bit_png_is_scaled_not_clipped(level: int, spec: TensorSpec) -> None:
    payload = encoded(Image.fromarray(np.full((8, 8), level, np.uint16)), "PNG")
    assert color(payload, spec) == [level >> 8] * spec.shape[3]


def test_a_16_bit_gray_ramp_keeps_its_order() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    array, _ = processor(tensor((1, 8, 8, 1), "uint8", 1 / 255, 0)).decode(encoded(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(array[0, :, :, 0], ramp >> 8)


def test_a_picture_with_a_second_one_inside_is_its_first() -> None:
    """Many phones write MPO: a JPEG with more JPEGs behind it."""
    payload = encoded(plain(16, 16, (250, 0, 0)), "MPO", save_all=True, append_images=[plain(16, 16, (0, 0, 250))])
    assert_close(color(payload), [250, 0, 0], atol=3)


def test_bgr_is_the_other_order() -> None:
    assert color(encoded(plain(8, 8, (1, 2, 3)), "PNG"), color="bgr") == [3, 2, 1]


# Bad pictures.


def png_header(width: int, height: int) -> bytes:
    """Write a PNG that says a size and holds hardly a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no picture",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        encoded(plain(8, 8), "GIF"),
        encoded(plain(8, 8), "BMP"),
        encoded(plain(8, 8), "TIFF"),
        encoded(plain(8, 8), "WEBP"),
        png_header(0, 5),
    ],
)
def test_what_is_no_jpeg_or_png_is_refused(payload: bytes) -> None:
    with pytest.raises(InputError, match=r"^payload is not a JPEG or PNG image \(") as caught:
        processor().decode(payload)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_picture_is_refused(kind: str, part: float) -> None:
    whole = encoded(noise(100, 100), kind)
    with pytest.raises(InputError, match=r"^image is damaged \("):
        processor().decode(whole[: int(len(whole) * part)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_whatever_is_damaged_the_answer_is_a_picture_or_an_input_error(kind: str) -> None:
    whole = encoded(noise(40, 30), kind)
    rng = np.random.default_rng(2)
    pictures = processor()
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 5):
            data[at] = rng.integers(256)
        try:
            array, _ = pictures.decode(bytes(data))
        except InputError:
            continue
        assert array.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (50_000_001, 1)])
def test_a_huge_declared_size_is_refused_before_anything_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(
        TooLargeError, match=rf"image of {size[0]}×{size[1]} pixels is over the limit of 50000000 \(max_pixels\)"
    ):
        processor().decode(png_header(*size))


def test_the_limit_of_pixels_is_configured() -> None:
    assert color(encoded(plain(10, 10), "PNG"), max_pixels=100) == [0, 0, 0]
    with pytest.raises(TooLargeError, match="over the limit of 99"):
        processor(max_pixels=99).decode(encoded(plain(10, 10), "PNG"))


def test_a_text_that_unpacks_to_far_more_than_it_is_is_refused() -> None:
    whole = encoded(plain(8, 8), "PNG")
    text = b"a\0\0" + zlib.compress(bytes(100_000_000))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    with pytest.raises(InputError):
        processor().decode(whole[:33] + chunk + whole[33:])


# Orientation.


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:]


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


# How a camera's pixels lie when the upright picture is turned: the inverse of what has to be done to them.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def quarters(width: int, height: int) -> Image.Image:
    """Give a picture whose four quarters are red, green, blue and white."""
    array = np.zeros((height, width, 3), np.uint8)
    array[: height // 2, : width // 2] = (250, 0, 0)
    array[: height // 2, width // 2 :] = (0, 250, 0)
    array[height // 2 :, : width // 2] = (0, 0, 250)
    array[height // 2 :, width // 2 :] = (250, 250, 250)
    return Image.fromarray(array)


@pytest.mark.parametrize("orientation", list(STORED))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(48, 32), (800, 480)])
def test_pictures_are_turned_upright(orientation: int, kind: str, size: tuple[int, int]) -> None:
    turn = STORED[orientation]
    upright = quarters(*size)
    stored = upright if turn is None else upright.transpose(turn)
    payload = encoded(stored, kind, exif=exif(orientation))
    array, geometry = processor().decode(payload)
    for (row, column), expected in {(1, 1): (250, 0, 0), (1, 6): (0, 250, 0), (6, 1): (0, 0, 250)}.items():
        assert_close(array[0, row, column], expected, atol=12)
    assert (geometry.width, geometry.height) == size
    assert geometry.box(0, 0, 1, 1) == [0, 0, *size]


def test_a_turned_photo_keeps_the_pixels_that_a_tall_model_needs() -> None:
    """The decoder shrinks by what the upright picture can spare, not the one that lies on its side."""
    tall = tensor((1, 160, 16, 3), "uint8", 1 / 255, 0)
    stripes = np.zeros((320, 640, 3), np.uint8)
    for row in range(4):
        stripes[row::8] = 255
    upright = Image.fromarray(stripes)
    straight, _ = processor(tall).decode(encoded(upright, "JPEG", quality=95))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    turned, _ = processor(tall).decode(encoded(stored, "JPEG", quality=95, exif=exif(6)))
    assert straight.std() > 100
    assert_close(turned.astype(float), straight.astype(float), atol=25)


@pytest.mark.parametrize(
    "data",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage and more garbage",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0\x36\0\0\0\0\0\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0",
        exif(6)[:-9],
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning", "ignore:Truncated File Read:UserWarning")
def test_damaged_metadata_does_not_spoil_a_sound_picture(data: bytes) -> None:
    payload = with_exif(encoded(plain(32, 16, (250, 0, 0)), "JPEG"), data)
    assert_close(color(payload), [250, 0, 0], atol=3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_of_metadata_spoils_a_sound_picture() -> None:
    picture = encoded(plain(32, 16, (250, 0, 0)), "JPEG")
    data = Image.Exif()
    data[0x0112], data[0x010E], data[0x8769] = 6, "hello", {0x9286: "x"}
    whole = data.tobytes()
    rng = np.random.default_rng(3)
    pictures = processor()
    for _ in range(2000):
        damaged = bytearray(whole)
        for at in rng.integers(6, len(damaged), 3):
            damaged[at] = rng.integers(256)
        array, _ = pictures.decode(with_exif(picture, bytes(damaged)))
        assert_close(array[0, 4, 4], [250, 0, 0], atol=3)


# Boxes.


def marked(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Give a black picture with a white box, in pixels."""
    picture = plain(width, height)
    picture.paste((255, 255, 255), box)
    return picture


def found_box(array: Any, geometry: Geometry) -> list[float]:
    """Find the white box in the tensor and give it in input pixels."""
    height, width = array.shape[1:3]
    rows, columns = np.nonzero(array[0, :, :, 0] > 190)
    return geometry.box(
        columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
    )


SIZES = [(64, 64), (640, 480), (480, 640), (1600, 1200), (1203, 377), (300, 500)]


@pytest.mark.parametrize("resize", ["stretch", "fit", "crop"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("target", [(64, 64), (40, 96)])
def test_a_marked_object_is_found_again_in_input_pixels(
    resize: str, size: tuple[int, int], kind: str, target: tuple[int, int]
) -> None:
    """JPEGs of the larger sizes are shrunk by their own decoder, which must not show."""
    width, height = size
    # In the middle part, which no cut takes away.
    box = (int(width * 0.45), int(height * 0.4), int(width * 0.6), int(height * 0.55))
    spec = tensor((1, *target, 3), "uint8", 1 / 255, 0)
    array, geometry = processor(spec, resize=resize).decode(encoded(marked(width, height, box), kind, quality=95))
    found = found_box(array, geometry)
    # One pixel of the tensor on each side.
    step_x, step_y = geometry.scale_x / target[1], geometry.scale_y / target[0]
    for value, expected, step in zip(found, box, (step_x, step_y) * 2, strict=True):
        assert abs(value - expected) <= step + 0.5, (found, box)


@pytest.mark.parametrize("resize", ["stretch", "fit", "crop"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_marked_object_of_a_turned_photo_is_found_in_the_upright_picture(resize: str, orientation: int) -> None:
    box = (300, 100, 420, 250)
    stored = marked(800, 400, box).transpose(STORED[orientation])  # type: ignore[arg-type]  # never None here
    spec = tensor((1, 64, 64, 3), "uint8", 1 / 255, 0)
    array, geometry = processor(spec, resize=resize).decode(encoded(stored, "JPEG", quality=95, exif=exif(orientation)))
    assert (geometry.width, geometry.height) == (800, 400)
    assert_close(found_box(array, geometry), box, atol=max(geometry.scale_x, geometry.scale_y) / 64 + 0.5)


def test_fitting_keeps_the_ratio_and_pads_with_gray() -> None:
    array, geometry = processor(resize="fit").decode(encoded(plain(16, 8, (255, 0, 0)), "PNG"))
    assert (array[0, :2] == PAD_VALUE).all()
    assert (array[0, 6:] == PAD_VALUE).all()
    np.testing.assert_array_equal(array[0, 2:6], np.broadcast_to([255, 0, 0], (4, 8, 3)))
    assert geometry.box(0, 0.25, 1, 0.75) == [0, 0, 16, 8]
    # What lies in the padding is cut at the picture's edge.
    assert geometry.box(0, 0, 1, 1) == [0, 0, 16, 8]


def test_cropping_keeps_the_ratio_and_cuts_the_edges() -> None:
    picture = plain(16, 8, (0, 0, 255))
    picture.paste((255, 0, 0), (4, 0, 12, 8))
    array, geometry = processor(resize="crop").decode(encoded(picture, "PNG"))
    np.testing.assert_array_equal(array[0], np.broadcast_to([255, 0, 0], (8, 8, 3)))
    assert geometry.box(0, 0, 1, 1) == [4, 0, 12, 8]


@pytest.mark.parametrize("size", [(55, 480), (480, 55), (1, 1), (1, 500), (500, 1), (3, 2)])
@pytest.mark.parametrize("resize", ["stretch", "fit", "crop"])
@pytest.mark.parametrize("target", [(224, 224), (96, 320)])
def test_odd_sizes_lead_over_no_edge(size: tuple[int, int], resize: str, target: tuple[int, int]) -> None:
    """55×480 cut to a square once began at −3.6e−15, which Pillow refuses."""
    spec = tensor((1, *target, 3), "uint8", 1 / 255, 0)
    for kind in ("PNG", "JPEG"):
        array, geometry = processor(spec, resize=resize).decode(encoded(plain(*size, (9, 9, 9)), kind))
        assert array.shape == (1, *target, 3)
        x0, y0, x1, y1 = geometry.box(0, 0, 1, 1)
        assert 0 <= x0 <= x1 <= size[0]
        assert 0 <= y0 <= y1 <= size[1]


def test_no_size_of_a_picture_breaks_a_crop() -> None:
    square = processor(tensor((1, 96, 96, 1), "uint8", 1 / 255, 0), resize="crop")
    for width in range(1, 300, 7):
        for height in (1, 55, 97, 480):
            array = np.zeros((height, width), np.uint8)
            square.from_pixels(array)


def test_boxes_are_cut_at_the_edges_and_rounded() -> None:
    geometry = Geometry(100, 50, 100, 50, 0, 0)
    assert geometry.box(-0.5, 0.123456, 1.5, 2) == [0, 6.17, 100, 50]


# Values.


def straightforward(pixels: Any, spec: TensorSpec, scale: float, mean: Any, std: Any) -> Any:
    """Compute what the look-up tables stand for, in float64."""
    real = (pixels.astype(np.float64) * scale - np.asarray(mean)) / np.asarray(std)
    if spec.scale is None or spec.zero_point is None:
        return real
    limits = np.iinfo(spec.dtype)
    return np.clip(np.round(real / spec.scale) + spec.zero_point, limits.min, limits.max)


@pytest.mark.parametrize(
    ("said", "scale", "mean", "std"),
    [
        ({"scale": 1 / 127.5, "mean": (1.0,)}, 1 / 127.5, 1.0, 1.0),
        (
            {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
            1 / 255,
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
        ),
        ({"scale": 1.0, "mean": (103.9, 116.8, 123.7)}, 1.0, (103.9, 116.8, 123.7), 1.0),
        ({"std": (0.5,)}, 1 / 255, 0.0, 0.5),
    ],
)
@pytest.mark.parametrize(
    "spec",
    [
        RGB,
        tensor((1, 8, 8, 3), "int8", 0.02, -5),
        tensor((1, 8, 8, 3), "uint8", 0.0186, 114),
        tensor((1, 8, 8, 3), "int16", 0.001, 0),
    ],
)
def test_tables_give_what_plain_arithmetic_gives(
    said: dict[str, Any], scale: float, mean: Any, std: Any, spec: TensorSpec
) -> None:
    picture = noise(8, 8, 4)
    array, _ = processor(spec, **said).decode(encoded(picture, "PNG"))
    assert array.dtype == np.dtype(spec.dtype)
    expected = straightforward(np.asarray(picture), spec, scale, mean, std)
    # A rounding at a half may fall to either side between float32 and float64.
    assert_close(array[0], expected, rtol=1e-5, atol=1e-5 if spec.scale is None else 1)
    if spec.scale is not None:
        assert (array[0] != expected).mean() < 0.02


def test_without_words_float_pixels_are_0_to_1_and_8_bit_ones_pass() -> None:
    picture = noise(8, 8)
    pixels = np.asarray(picture)
    payload = encoded(picture, "PNG")
    assert_close(processor(RGB).decode(payload)[0][0], pixels / 255, rtol=1e-6)
    np.testing.assert_array_equal(processor(RGB8).decode(payload)[0][0], pixels)
    signed = tensor((1, 8, 8, 3), "int8", 1 / 255, -128)
    np.testing.assert_array_equal(processor(signed).decode(payload)[0][0], pixels.astype(int) - 128)


def test_bgr_means_are_in_the_tensors_order() -> None:
    array, _ = processor(RGB, color="bgr", scale=1.0, mean=(1.0, 2.0, 3.0)).decode(
        encoded(plain(8, 8, (10, 20, 30)), "PNG")
    )
    assert array[0, 0, 0].tolist() == [30 - 1, 20 - 2, 10 - 3]


def test_every_picture_has_memory_of_its_own() -> None:
    pictures = processor(RGB8)
    first, _ = pictures.decode(encoded(plain(8, 8, (1, 1, 1)), "PNG"))
    pictures.decode(encoded(plain(8, 8, (2, 2, 2)), "PNG"))
    assert first[0, 0, 0, 0] == 1


# Arrays.


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4), (1, 6, 5, 3), (1, 6, 5, 1)])
def test_arrays_of_pixels_are_pictures(shape: tuple[int, ...]) -> None:
    for spec in (RGB, GRAY):
        array, geometry = processor(spec).from_pixels(np.full(shape, 255, np.uint8))
        assert_close(array, np.ones(spec.shape), atol=1e-5)
        assert (geometry.width, geometry.height) == (5, 6)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((), np.uint8),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array: Any) -> None:
    with pytest.raises(InputError, match=r"is no picture; send uint8 \[height, width, channels\]"):
        processor().from_pixels(array)


def test_arrays_have_the_same_limit_of_pixels() -> None:
    with pytest.raises(TooLargeError, match="image of 11×10 pixels is over the limit of 100"):
        processor(max_pixels=100).from_pixels(np.zeros((10, 11), np.uint8))


def test_an_array_that_is_a_view_is_taken_as_it_looks() -> None:
    pixels = np.asarray(noise(8, 8))
    turned, _ = processor().from_pixels(pixels[::-1, :, ::-1])
    np.testing.assert_array_equal(turned[0], pixels[::-1, :, ::-1])


# Models.


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((1, 10), {}, "is no image tensor"),
        ((2, 8, 8, 3), {}, "is no image tensor"),
        ((1, 3, 8, 8), {}, "is no image tensor"),
        ((1, 8, 8, 4), {}, "is no image tensor"),
        ((1, -1, -1, 3), {}, r"has a dynamic size .*; say size = \[height, width\]"),
        ((1, 8, 8, 3), {"size": (9, 8)}, r"size = \[9, 8\] does not fit the input 'x' of shape \[1, 8, 8, 3\]"),
        ((1, -1, 8, 3), {"size": (9,)}, r"size = \[9\]: give \[height, width\]"),
        ((1, 8, 8, 3), {"color": "gray"}, "has 3 channels, which does not fit color = 'gray'"),
        ((1, 8, 8, 1), {"color": "rgb"}, "has 1 channels, which does not fit color = 'rgb'"),
        ((1, 8, 8, 3), {"mean": (1.0, 2.0)}, "mean has 2 numbers, the input has 3 channels; give one number or 3"),
        ((1, 8, 8, 1), {"std": (1.0, 1.0, 1.0)}, "std has 3 numbers, the input has 1 channels"),
        ((1, 8, 8, 3), {"std": (1.0, 0.0, 1.0)}, "std holds a zero"),
    ],
)
def test_a_model_or_options_that_do_not_fit_are_refused(
    shape: tuple[int, ...], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        processor(tensor(shape), **options)


def test_a_dynamic_size_is_what_the_configuration_says() -> None:
    array, _ = processor(tensor((1, -1, -1, 3)), size=(5, 6)).decode(encoded(plain(20, 20), "PNG"))
    assert array.shape == (1, 5, 6, 3)


def test_a_tensor_without_channels_is_gray() -> None:
    array, _ = processor(tensor((1, 8, 8))).decode(encoded(plain(8, 8, (255, 255, 255)), "PNG"))
    assert array.size == 64
