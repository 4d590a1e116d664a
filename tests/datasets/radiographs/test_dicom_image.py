"""The header of a DICOM radiograph: each rule gives the right value, or a refusal with file, value and remedy."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit
from radiograph_samples import REAL, chest, code, dicom, scaled
from scipy import ndimage

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import GEOMETRIES, Grid
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.decoding import read

PIXELS = chest(most=4000).astype("<u2")
TWELVE = {"BitsStored": 12, "HighBit": 11}


def difference(data: bytes, expected: np.ndarray) -> float:
    """Largest difference of a file's image and the expected one, both in 0 to 1."""
    image = read(data, "image.dcm").pixels
    assert image.shape == expected.shape
    return float(np.abs(scaled(image) - scaled(expected)).max())


def notes(data: bytes) -> str:
    return "; ".join(read(data, "image.dcm").notes)


def refusal(data: bytes) -> str:
    with pytest.raises(FileError) as caught:
        read(data, "image.dcm")
    text = str(caught.value)
    assert text.startswith("image.dcm: ")
    return text


# --- padding ---


def padded(value: int, photometric: str, dtype: str = "<u2") -> tuple[np.ndarray, np.ndarray]:
    """Pixels with a round field of exposure, padded outside, and the bone-bright image with air there."""
    y, x = np.ogrid[-1:1:120j, -1:1:100j]
    outside = np.hypot(y, x) > 1
    bright = PIXELS.astype(np.int64) + 100
    expected = np.where(outside, bright[~outside].min(), bright)
    stored = bright if photometric == "MONOCHROME2" else 4200 - bright
    if dtype == "<i2":
        stored = stored - 2000
    return np.where(outside, value, stored).astype(dtype), expected


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("value", "dtype", "tags"),
    [
        (0, "<u2", {}),
        (65535, "<u2", {}),
        (65535, "<u2", TWELVE | {"BitsStored": 13, "HighBit": 12}),
        (-2000, "<i2", {}),
        (-32768, "<i2", {}),
    ],
)
def test_padding_is_dark_before_any_percentile_or_inversion(
    photometric: str, value: int, dtype: str, tags: dict[str, int]
) -> None:
    pixels, expected = padded(value, photometric, dtype)
    data = dicom(pixels, PhotometricInterpretation=photometric, PixelPaddingValue=value, **tags)
    assert difference(data, expected) < 1e-6
    assert "padding set to the darkest value (PixelPaddingValue" in notes(data)


def test_padding_up_to_a_limit_is_air() -> None:
    pixels, expected = padded(0, "MONOCHROME1")
    pixels[pixels == 0] = np.arange((pixels == 0).sum()) % 5
    data = dicom(pixels, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0, PixelPaddingRangeLimit=4)
    assert difference(data, expected) < 1e-6


def test_padding_up_to_a_limit_outside_bits_stored_is_air() -> None:
    pixels, expected = padded(0, "MONOCHROME2")
    outside = pixels == 0
    pixels[outside] = 40_000 + np.arange(outside.sum()) % 101
    data = dicom(pixels, PixelPaddingValue=40_000, PixelPaddingRangeLimit=40_100, BitsStored=13, HighBit=12)
    assert difference(data, expected) < 1e-6


def test_a_pixel_of_the_paddings_value_inside_the_field_is_not_padding() -> None:
    pixels, _ = padded(65535, "MONOCHROME2")
    pixels[60, 50] = 65535
    image = read(dicom(pixels, PixelPaddingValue=65535), "image.dcm").pixels
    assert image[60, 50] == image.max()
    assert image[0, 0] == image.min()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_large_padding_that_a_line_of_pixels_cuts_off_from_the_border_is_air(photometric: str) -> None:
    pixels, expected = padded(0, photometric)
    for image in (pixels, expected):
        image[[0, -1]] = image[:, [0, -1]] = 2100
    data = dicom(pixels, PhotometricInterpretation=photometric, PixelPaddingValue=0)
    expected = np.where(pixels == 0, expected[pixels != 0].min(), expected)
    assert difference(data, expected) < 1e-6
    assert "padding set to the darkest value (PixelPaddingValue 0)" in notes(data)


def test_padding_written_in_the_wrong_type_is_air() -> None:
    """A value representation of US for pixels that are signed: 63536 is -2000."""
    pixels, expected = padded(-2000, "MONOCHROME2", "<i2")
    data = dicom(pixels, PixelPaddingValue=-2000).replace(
        b"\x28\x00\x20\x01SS\x02\x00\x30\xf8", b"\x28\x00\x20\x01US\x02\x00\x30\xf8"
    )
    assert b"\x28\x00\x20\x01US" in data
    assert difference(data, expected) < 1e-6


def test_padding_is_dark_after_an_inversion_by_hand() -> None:
    pixels, _ = padded(0, "MONOCHROME2")
    image = read(dicom(pixels, PixelPaddingValue=0), "image.dcm", invert="yes").pixels
    bright = (pixels.max() + pixels[pixels > 0].min() - pixels.astype(np.int64))[pixels > 0]
    np.testing.assert_array_equal(image[pixels > 0], bright)
    assert (image[pixels == 0] == bright.min()).all()


def test_padding_of_the_whole_image_is_refused() -> None:
    text = refusal(dicom(np.full((120, 100), 7, "<u2"), PixelPaddingValue=7))
    assert "PixelPaddingValue" in text


# --- shutters ---


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("kind", ["Shutter", "Collimator"])
def test_what_a_round_shutter_covers_is_air(kind: str, photometric: str) -> None:
    y, x = np.ogrid[1:121, 1:101]
    covered = (y - 60) ** 2 + (x - 50) ** 2 >= 48**2
    bright = PIXELS.astype(np.int64) + 100
    stored = bright if photometric == "MONOCHROME2" else 4200 - bright
    shutter = {f"{kind}Shape": "CIRCULAR", f"CenterOfCircular{kind}": [60, 50], f"RadiusOfCircular{kind}": 48}
    data = dicom(np.where(covered, 60000, stored).astype("<u2"), PhotometricInterpretation=photometric, **shutter)
    expected = np.where(covered, bright[~covered].min(), bright)[12:107, 2:97]
    assert difference(data, expected) < 1e-6
    assert f"cropped ({kind}Shape)" in notes(data)


def test_what_a_polygonal_shutter_covers_is_air() -> None:
    pixels = PIXELS.copy()
    pixels[:, :10] = 60000
    corners = [1, 11, 1, 100, 120, 100, 120, 11]
    data = dicom(pixels, ShutterShape="POLYGONAL", VerticesOfThePolygonalShutter=corners)
    assert difference(data, PIXELS[:, 10:]) < 1e-6


# --- display windows ---


@pytest.mark.parametrize("window", [(50_000, 100), (-3000, 2000), (4200, 500), (2000, 10)])
def test_a_window_off_the_data_is_not_used_and_the_record_states_it(window: tuple[int, int]) -> None:
    data = dicom(WindowCenter=window[0], WindowWidth=window[1])
    assert difference(data, PIXELS) < 1e-6
    assert "ignored: it keeps" in notes(data)
    assert f"WindowCenter {window[0]}" in notes(data)


@pytest.mark.parametrize("window", [(50_000, 4000), (8000, 2000), (-4000, 1000)])
def test_a_sigmoid_off_the_data_is_not_used(window: tuple[int, int]) -> None:
    data = dicom(WindowCenter=window[0], WindowWidth=window[1], VOILUTFunction="SIGMOID")
    assert difference(data, PIXELS) < 1e-6
    assert "ignored: it keeps" in notes(data)


def test_a_sigmoid_on_the_data_is_used() -> None:
    data = dicom(WindowCenter=2000, WindowWidth=2000, VOILUTFunction="SIGMOID")
    assert difference(data, 1 / (1 + np.exp(-4 * (PIXELS.astype(float) - 2000) / 2000))) < 1e-3


def test_the_first_window_on_the_data_is_used() -> None:
    data = dicom(WindowCenter=[50_000, 2000], WindowWidth=[10, 2001])
    assert difference(data, PIXELS.clip(1000, 3000)) < 1e-3


def test_a_window_without_width_is_ignored_by_its_value() -> None:
    text = notes(dicom(WindowCenter=2000, WindowWidth=0))
    assert text.startswith("display window (WindowCenter 2000.0, WindowWidth 0.0, VOILUTFunction LINEAR) ignored: ")
    assert "LINEAR_EXACT" not in text
    assert difference(dicom(WindowCenter=2000, WindowWidth=0), PIXELS) < 1e-6


def test_a_window_for_stored_values_is_not_used_on_rescaled_ones() -> None:
    data = dicom(RescaleSlope=0.01, RescaleIntercept=0, WindowCenter=2000, WindowWidth=500)
    assert difference(data, PIXELS) < 1e-6
    assert "ignored" in notes(data)


def test_a_window_does_not_turn_an_image_of_negative_slope() -> None:
    dark = (4000 - PIXELS).astype("<u2")
    data = dicom(dark, RescaleSlope=-1, RescaleIntercept=4000, WindowCenter=2000, WindowWidth=4002)
    assert difference(data, PIXELS) < 1e-3


def table(values: np.ndarray) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [len(values), 0, 16]
    item.add_new("LUTData", "US", values.astype(int).tolist())
    return [item]


def test_a_voi_table_is_followed_unless_it_leaves_nothing() -> None:
    curve = np.sqrt(np.arange(4096) / 4095) * 65535
    assert difference(dicom(VOILUTSequence=table(curve)), np.sqrt(PIXELS)) < 1e-3
    constant = dicom(VOILUTSequence=table(np.where(np.arange(4096) < 4090, 0, 65535)))
    assert difference(constant, PIXELS) < 1e-6
    assert "VOILUTSequence 1 ignored: it keeps" in notes(constant)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_table_in_bytes_is_applied_as_the_same_table_in_words(sequence: str, bits: int) -> None:
    curve = np.rint(np.sqrt(np.arange(4096) / 4095) * (2**bits - 1)).astype("<u2")
    images = []
    for vr, data in (("US", curve.tolist()), ("OW", curve.tobytes()), ("OW", curve.astype(f"<u{bits // 8}").tobytes())):
        item = Dataset()
        item.LUTDescriptor = [len(curve), 0, bits]
        item.add_new("LUTData", vr, data)
        image = read(dicom(BitsStored=12, HighBit=11, **{sequence: [item]}), "image.dcm")
        assert image.notes[0].startswith(sequence)
        assert image.notes[0].endswith("applied")
        images.append(image.pixels)
    np.testing.assert_array_equal(images[0], curve[PIXELS].astype(np.float32))
    np.testing.assert_array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[2], images[0])


def test_a_table_of_another_length_than_its_descriptor_is_ignored_and_recorded() -> None:
    item = table(np.arange(4096))[0]
    item.LUTDescriptor = [4095, 0, 16]
    data = dicom(VOILUTSequence=[item])
    assert difference(data, PIXELS) < 1e-6
    assert notes(data) == "VOILUTSequence 1 ignored: LUTData has 4096 entries, LUTDescriptor 4095"


def test_a_modality_table_of_another_length_is_refused() -> None:
    item = table(np.arange(4096))[0]
    item.LUTDescriptor = [4000, 0, 16]
    assert refusal(dicom(ModalityLUTSequence=[item])) == (
        "image.dcm: ModalityLUTSequence: LUTData has 4096 entries, LUTDescriptor 4000: correct or remove it"
    )


@pytest.mark.parametrize("vr", ["SS", "US"])
@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_table_of_signed_values_begins_below_zero_in_either_type(sequence: str, vr: str) -> None:
    item = table(np.sqrt(np.arange(4096) / 4095) * 65535)[0]
    item.add_new("LUTDescriptor", vr, [4096, -2000 if vr == "SS" else 2**16 - 2000, 16])
    data = dicom(PIXELS.astype("<i2") - 2000, **{sequence: [item]})
    assert difference(data, np.sqrt(PIXELS)) < 1e-3


def test_an_empty_voi_function_is_linear() -> None:
    images = [read(dicom(WindowCenter=1000, WindowWidth=1000, VOILUTFunction=f), "image") for f in ("", "LINEAR")]
    assert images[0].notes == images[1].notes
    assert images[0].notes == (
        "display window (WindowCenter 1000.0, WindowWidth 1000.0, VOILUTFunction LINEAR) applied",
    )
    np.testing.assert_array_equal(images[0].pixels, images[1].pixels)
    assert np.abs(scaled(images[0].pixels) - scaled(PIXELS.clip(500, 1499))).max() < 2e-3


def test_a_slope_that_leaves_nothing_is_refused() -> None:
    assert "RescaleSlope 0" in refusal(dicom(RescaleSlope="0", RescaleIntercept=0))


def test_a_slope_or_an_intercept_alone_is_followed() -> None:
    data = dicom((4000 - PIXELS).astype("<u2"), RescaleSlope=-1)
    assert difference(data, PIXELS) < 1e-6
    assert notes(data) == "rescaled (RescaleSlope -1, RescaleIntercept 0)"
    np.testing.assert_array_equal(read(dicom(RescaleIntercept=-500), "image.dcm").pixels, PIXELS - 500.0)


# --- whether bone is bright ---


@pytest.mark.parametrize("is_bright", [True, False])
@pytest.mark.parametrize(
    ("tags", "note"),
    [
        (
            {"PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "INVERSE"},
            "PresentationLUTShape INVERSE contradicts PhotometricInterpretation MONOCHROME2",
        ),
        (
            {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"},
            "PresentationLUTShape IDENTITY contradicts PhotometricInterpretation MONOCHROME1",
        ),
        ({"PresentationIntentType": "FOR PROCESSING"}, "PresentationIntentType FOR PROCESSING"),
    ],
)
def test_a_header_that_does_not_state_whether_bone_is_bright_leaves_it_to_the_image(
    tags: dict[str, str], note: str, is_bright: bool
) -> None:
    data = dicom(PIXELS if is_bright else (4000 - PIXELS).astype("<u2"), **tags)
    assert difference(data, PIXELS) < 1e-6
    assert f"{note}: whether bone is bright was detected in the image" in notes(data)
    assert not any("bone was dark" in note for note in read(data, "image.dcm", invert="no").notes)


def test_an_empty_rescale_is_none() -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom()))
    dataset.RescaleSlope = dataset.RescaleIntercept = None
    file = io.BytesIO()
    dataset.save_as(file)
    image = read(file.getvalue(), "image.dcm")
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert image.notes == ()


# --- bits ---


def compressed(pixels: np.ndarray, **tags: Any) -> bytes:
    """A file whose JPEG 2000 frame has all bits of its containers, whatever the header stores."""
    frame = imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True)
    return dicom(pixels, **tags, syntax=JPEG2000Lossless, PixelData=encapsulate([bytes(frame)]))


@pytest.mark.parametrize("bits", [0x8000, 0x1000, 0xF000])
@pytest.mark.parametrize("make", [dicom, compressed])
def test_overlay_bits_above_those_stored_are_masked(make: Any, bits: int) -> None:
    pixels = PIXELS.copy()
    pixels[10:30, 10:40] |= bits
    data = make(pixels, **TWELVE)
    assert difference(data, PIXELS) < 1e-6
    assert "bits above BitsStored 12 masked" in notes(data)


@pytest.mark.parametrize("make", [dicom, compressed])
def test_overlay_bits_above_signed_values_are_masked(make: Any) -> None:
    signed = PIXELS.astype("<i2") - 2000
    pixels = signed.view("<u2") & 0x0FFF
    pixels[10:30, 10:40] |= 0x8000
    data = make(pixels, PixelRepresentation=1, **TWELVE)
    assert difference(data, PIXELS) < 1e-6


def test_values_in_the_high_bits_are_taken_from_there() -> None:
    pixels = PIXELS << 4
    pixels[10:30, 10:40] |= 0x0001
    data = dicom(pixels, BitsStored=12, HighBit=15)
    assert difference(data, PIXELS) < 1e-6
    assert "HighBit 15" in notes(data)


@pytest.mark.parametrize(
    "tags",
    [
        {"BitsStored": 8, "HighBit": 7}, {"BitsStored": 11, "HighBit": 10}, TWELVE | {"PixelRepresentation": 1},
    ],
)  # fmt: skip
def test_a_header_under_which_values_wrap_around_is_refused(tags: dict[str, int]) -> None:
    text = refusal(dicom(**tags))
    assert f"BitsStored {tags['BitsStored']}" in text
    assert "correct these tags" in text


def assert_only_the_right_sign_is_read(image: np.ndarray) -> None:
    """Files of 8 and 16 bits, signed and unsigned, with the right and with the wrong PixelRepresentation."""
    image = scaled(image.astype(np.float64))
    for bits in (8, 16):
        for low, high in (
            (0, 2**bits - 1),
            (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
            (-(2 ** (bits - 2)), 2 ** (bits - 2)),
        ):
            pixels = np.rint(low + image * (high - low)).astype(f"{'i' if low else 'u'}{bits // 8}")
            assert difference(dicom(pixels), pixels.astype(np.float64)) < 1e-6
            text = refusal(dicom(pixels, PixelRepresentation=int(low == 0)))
            assert f"BitsStored {bits}, HighBit {bits - 1} and PixelRepresentation" in text


def test_a_sign_that_contradicts_values_of_all_bits_is_refused() -> None:
    grid = Grid(32, 11.25)
    for image in (chest(), chest(1000, 900), *render_drrs(thorax(0, grid)[0], grid, GEOMETRIES["chest"](grid))):
        assert_only_the_right_sign_is_read(image)


@pytest.mark.parametrize("name", REAL)
def test_a_sign_that_contradicts_a_real_radiograph_is_refused(name: str, real_data: Path) -> None:
    image = np.asarray(Image.open(real_data / "xray" / f"{name}.jpg").convert("L"))
    assert_only_the_right_sign_is_read(image[::3, ::3] if len(image) > 1000 else image)


@pytest.mark.parametrize("bits", [8, 16])
def test_bright_letters_on_a_dark_image_are_no_wrong_sign(bits: int) -> None:
    pixels = np.rint(chest(600, 500, 200) / 200 * (2**bits - 1) * 0.15)
    letters = Image.new("L", (500, 600))
    font = ImageFont.load_default(size=36)
    for place, text in (((40, 60), "L PORTABLE"), ((200, 540), "14:05 AP SUPINE")):
        ImageDraw.Draw(letters).text(place, text, 255, font=font)
    pixels += np.asarray(letters) / 255 * (2**bits - 1 - pixels)
    assert difference(dicom(np.rint(pixels).astype(f"u{bits // 8}")), np.rint(pixels)) < 1e-6


@pytest.mark.parametrize(
    "tags",
    [
        {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, {"Rows": 119}, {"Columns": 99},
        {"Rows": 100, "Columns": 120}, {"Rows": 60, "Columns": 200},
    ],
)  # fmt: skip
def test_a_header_of_another_size_than_the_pixels_is_refused(tags: dict[str, int]) -> None:
    text = refusal(dicom(**tags))
    assert "correct Rows, Columns and BitsAllocated" in text


def test_a_compressed_frame_of_another_size_is_refused_before_it_is_decoded() -> None:
    assert "has 120 x 100 pixels, the header 121 x 100" in refusal(compressed(PIXELS, Rows=121))


# --- color ---


@pytest.mark.parametrize("tag", ["SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"])
def test_a_header_without_a_tag_that_pixels_need_is_refused_with_it(tag: str) -> None:
    assert refusal(dicom(**{tag: None})) == f"image.dcm: {tag} absent or empty, so the pixels have no meaning: set them"


def test_a_frame_of_another_kind_than_the_transfer_syntax_is_refused_with_both() -> None:
    frame = imagecodecs.jpegls_encode(PIXELS)
    assert refusal(dicom(syntax=JPEG2000Lossless, PixelData=encapsulate([frame]))) == (
        "image.dcm: the frame is JPEG-LS, the transfer syntax JPEG 2000 Image Compression (Lossless Only): correct "
        "TransferSyntaxUID"
    )
    frame = imagecodecs.jpeg2k_encode(PIXELS, reversible=True, level=0)
    text = refusal(dicom(syntax=JPEGBaseline8Bit, PixelData=encapsulate([frame])))
    assert "the frame is JPEG 2000, the transfer syntax JPEG Baseline" in text
    assert "PixelData has 2 frames" in refusal(dicom(syntax=JPEG2000Lossless, PixelData=encapsulate([frame, frame])))


def palette(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> dict[str, Any]:
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, values in (("Red", red), ("Green", green), ("Blue", blue)):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = values.astype("<u2").tobytes()
    return tags


def test_a_gray_palette_is_applied() -> None:
    gray = chest().astype(np.uint8)
    order = np.random.default_rng(0).permutation(256)
    indices = np.argsort(order)[gray].astype(np.uint8)
    data = dicom(indices, **palette(*[order * 257] * 3))
    assert difference(data, gray) < 1e-6
    assert "palette" in notes(data)


def test_a_palette_of_colors_is_refused() -> None:
    ramp = np.arange(256) * 257
    text = refusal(dicom(chest().astype(np.uint8), **palette(ramp, ramp[::-1], ramp)))
    assert "PhotometricInterpretation PALETTE COLOR" in text
    assert "store the radiograph as a grayscale image" in text


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_an_image_of_three_equal_channels_is_read_as_gray(photometric: str, planar: int) -> None:
    gray = chest().astype(np.uint8)
    neutral = [gray, np.full_like(gray, 128), np.full_like(gray, 128)] if photometric == "YBR_FULL" else [gray] * 3
    data = dicom(
        gray, PhotometricInterpretation=photometric, SamplesPerPixel=3, PlanarConfiguration=planar,
        PixelData=np.stack(neutral, axis=0 if planar else -1).tobytes(),
    )  # fmt: skip
    assert difference(data, gray) < 1e-6
    assert "three equal channels" in notes(data)


def test_three_samples_in_monochrome_are_refused_with_the_remedy() -> None:
    gray = chest().astype(np.uint8)
    text = refusal(dicom(gray, SamplesPerPixel=3, PlanarConfiguration=0, PixelData=np.dstack([gray] * 3).tobytes()))
    assert text == (
        "image.dcm: PhotometricInterpretation MONOCHROME2 with SamplesPerPixel 3: correct one of these tags"
    )


def test_an_image_in_color_is_refused_with_the_remedy() -> None:
    gray = chest().astype(np.uint8)
    pixels = np.stack([gray, gray // 2, 255 - gray], axis=-1).tobytes()
    text = refusal(
        dicom(gray, PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0, PixelData=pixels)
    )
    assert "PhotometricInterpretation RGB" in text
    assert "store the radiograph as a grayscale image" in text


# --- square pixels ---


@pytest.mark.parametrize(
    "tags",
    [
        {"PixelSpacing": [0.4, 0.2]}, {"ImagerPixelSpacing": [0.4, 0.2]}, {"NominalScannedPixelSpacing": [0.4, 0.2]},
        {"PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.4, 0.2], "ImagerPixelSpacing": [0.3, 0.3]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("axis", [0, 1])
def test_an_image_has_square_pixels(tags: dict[str, Any], axis: int) -> None:
    smooth = ndimage.gaussian_filter(PIXELS.astype(float), 3)
    halved = (smooth[::2] + smooth[1::2]) / 2 if axis == 0 else (smooth[:, ::2] + smooth[:, 1::2]) / 2
    tags = tags if axis == 0 else {name: values[::-1] for name, values in tags.items()}
    data = dicom(halved.astype("<u2"), **tags)
    assert difference(data, smooth) < 0.03
    assert "resampled to square pixels" in notes(data)


@pytest.mark.parametrize("spacing", [[0, 0], [0.2, -0.2]])
def test_a_spacing_that_is_none_is_ignored_and_recorded(spacing: list[float]) -> None:
    data = dicom(PixelSpacing=spacing)
    assert difference(data, PIXELS) < 1e-6
    assert "PixelSpacing" in notes(data)


@pytest.mark.parametrize(
    ("tags", "point", "comma"),
    [
        ({"PixelSpacing": [0.4, 0.2]}, b"0.4\\0.2 ", b"0,4\\0,2 "),
        ({"RescaleSlope": -1.5, "RescaleIntercept": 7}, b"-1.5", b"-1,5"),
        ({"WindowCenter": 1000.5, "WindowWidth": 2000}, b"1000.5", b"1000,5"),
    ],
)
def test_a_decimal_comma_is_a_decimal_point(tags: dict[str, Any], point: bytes, comma: bytes) -> None:
    data = dicom(**tags)
    assert data.count(point) == 1
    np.testing.assert_array_equal(read(data.replace(point, comma), "image.dcm").pixels, read(data, "image.dcm").pixels)
    with_text = data.replace(point, b"x" * len(point))
    if "RescaleSlope" in tags:
        assert refusal(with_text).startswith("image.dcm: RescaleSlope xxxx and RescaleIntercept 7.0: correct or remove")
    else:
        assert " ignored: " in notes(with_text)
        assert difference(with_text, PIXELS) < 1e-6


def test_the_rotation_of_the_detector_is_not_that_of_the_patient() -> None:
    assert difference(dicom(FieldOfViewRotation=90, FieldOfViewHorizontalFlip="YES"), PIXELS) < 1e-6


def test_pixels_far_from_square_are_refused() -> None:
    assert "PixelSpacing 0.2\\40.0 makes pixels of 0.005 to 1" in refusal(dicom(PixelSpacing=[0.2, 40]))


# --- other body parts, many frames ---


def test_a_photometric_interpretation_in_lower_case_is_followed() -> None:
    data = dicom((4000 - PIXELS).astype("<u2"), PhotometricInterpretation="MONOCHROME1")
    assert difference(data.replace(b"MONOCHROME1", b"monochrome1"), PIXELS) < 1e-6


def test_a_header_that_is_cut_off_is_refused_with_the_remedy() -> None:
    assert refusal(dicom()[:300]) == (
        "image.dcm: no Rows and Columns: it is not an image, or its end is missing: copy it again"
    )


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"BodyPartExamined": "HAND"}, ["BodyPartExamined HAND", "give a radiograph of the chest"]),
        ({"BodyPartExamined": "LEFT KNEES"}, ["BodyPartExamined LEFT KNEES is not a chest"]),
        ({"AnatomicRegionSequence": [code("85562004", "SCT", "Hand")]}, ["AnatomicRegionSequence HAND is not a chest"]),
        ({"StudyDescription": "XR Abdomen AP"}, ["StudyDescription XR ABDOMEN AP is not a chest"]),
        ({"Modality": "MG"}, ["modality MG is not that of a radiograph"]),
        ({"NumberOfFrames": 30}, ["NumberOfFrames 30", "save the frame as a file of its own"]),
        ({"PhotometricInterpretation": "HSV"}, ["HSV"]),
        ({"PixelData": None}, ["no PixelData"]),
    ],
)  # fmt: skip
def test_what_is_no_radiograph_of_a_chest_is_refused(tags: dict[str, Any], words: list[str]) -> None:
    text = refusal(dicom(**tags))
    assert all(word in text for word in words)


def test_a_view_that_contradicts_the_header_is_recorded() -> None:
    for tags, view, note in [
        ({"ViewPosition": "LL"}, "frontal", "the header names a lateral view, and it is given as the frontal one"),
        ({"ViewPosition": "LLD"}, "frontal", "ViewPosition LLD is neither frontal nor lateral, and it is given as the"),
        ({"ViewCodeSequence": [code("399067008", "SCT", "lateral")]}, "lateral", ""),
        ({"ViewPosition": "LL"}, "oblique30", ""),
    ]:
        found = "; ".join(read(dicom(**tags), "image.dcm", view=view).notes)
        assert found.startswith(note)
        assert bool(found) == bool(note)


@pytest.mark.parametrize("part", ["CHEST", "PORT CHEST", "THORAX", "", "TSPINE", "CHEST ABDOMEN"])
def test_a_chest_by_any_name_is_read(part: str) -> None:
    assert difference(dicom(BodyPartExamined=part), PIXELS) < 1e-6
    assert difference(dicom(BodyPartExamined=part, StudyDescription="XR CHEST AND HAND"), PIXELS) < 1e-6
    described = dicom(BodyPartExamined=part, SeriesDescription="Chest PA", StudyDescription="XR Abdomen series")
    assert difference(described, PIXELS) < 1e-6


def test_pixels_of_few_levels_are_a_mask() -> None:
    assert "gray levels: a mask" in refusal(dicom(((PIXELS > 1000) * 255).astype(np.uint8)))
