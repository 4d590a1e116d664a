"""Images that are no chest radiographs, for `input_checks.py`: each kind is a function of a random generator.

Every image is float32 in [0, 1], of 160 to 480 pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Points = np.ndarray
WORDS = (
    "patient",
    "chest",
    "view",
    "report",
    "the",
    "of",
    "and",
    "no",
    "in",
    "right",
    "left",
    "study",
    "normal",
    "with",
)


def noise(random: np.random.Generator) -> np.ndarray:
    """Noise with a spectrum of white, pink or brown color."""
    rows, columns = _size(random)
    spectrum = np.fft.rfft2(random.standard_normal((rows, columns)))
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])
    frequency[0, 0] = 1.0
    return scaled(np.fft.irfft2(spectrum * frequency ** -random.choice([0.0, 1.0, 2.0]), (rows, columns)))


def gradient(random: np.random.Generator) -> np.ndarray:
    """A linear or a radial gradient."""
    y, x = _axes(*_size(random))
    angle, center = random.uniform(0, 2 * np.pi), random.uniform(-0.7, 0.7, 2)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    radius = np.hypot(x - center[0], y - center[1])
    return scaled(random.choice([-1, 1]) * (ramp if random.random() < 0.5 else radius))


def text(random: np.random.Generator) -> np.ndarray:
    """A page of text, dark on white or white on dark."""
    rows, columns = _size(random)
    page = Image.new("L", (columns, rows), 0)
    pen, points = ImageDraw.Draw(page), int(random.integers(9, 26))
    font = ImageFont.load_default(points)
    for top in range(8, rows - points, int(1.5 * points)):
        line = " ".join(random.choice(WORDS, 30))[: int(random.integers(5, 2 * columns // points))]
        pen.text((8, top), line, fill=255, font=font)
    letters = np.asarray(page, np.float32) / 255
    return letters if random.random() < 0.5 else 1 - letters


def screenshot(random: np.random.Generator) -> np.ndarray:
    """Windows of a desktop: uniform boxes with bars and text."""
    rows, columns = _size(random)
    screen = Image.new("L", (columns, rows), int(random.integers(0, 256)))
    pen = ImageDraw.Draw(screen)
    for _ in range(int(random.integers(3, 10))):
        left, top = random.integers(0, [columns - 60, rows - 60])
        right, bottom = random.integers([left + 40, top + 30], [columns + 1, rows + 1])
        fill, bar = (int(value) for value in random.integers(0, 256, 2))
        pen.rectangle((int(left), int(top), int(right), int(bottom)), fill=fill)
        pen.rectangle((int(left), int(top), int(right), int(top) + 12), fill=bar)
        for line in range(int(top) + 18, int(bottom) - 12, 14):
            pen.text((int(left) + 6, line), " ".join(random.choice(WORDS, 4)), fill=255 - fill)
    return np.asarray(screen, np.float32) / 255


def photograph(random: np.random.Generator) -> np.ndarray:
    """Opaque shaded disks over one another, whose edges and contrasts have the statistics of a photograph
    (dead leaves; Lee, Mumford and Huang 2001).
    """
    rows, columns = _size(random)
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    image = np.full((rows, columns), 0.5, np.float32)
    for radius in sorted(10 / random.uniform(0.05, 1, 300), reverse=True):
        row, column = random.uniform(0, rows), random.uniform(0, columns)
        shade = random.normal(0, 0.15) * (x - column + random.normal() * (y - row)) / radius
        disk = np.hypot(x - column, y - row) < radius
        image[disk] = (random.uniform(0, 1) + shade)[disk]
    noisy = ndimage.gaussian_filter(image, random.uniform(0, 1.5)) + random.normal(0, 0.03, image.shape)
    return np.clip(noisy, 0, 1).astype(np.float32)


def hand(random: np.random.Generator) -> np.ndarray:
    """A hand with four fingers and a thumb of bones in soft tissue, fingers up."""
    y, x = _axes(*_size(random))
    image = np.zeros_like(x)
    wrist = np.array([random.normal(0, 0.05), random.uniform(0.75, 1.1)])
    _add(image, x, y, wrist, wrist + _point(0, 0.5), 0.26, 0.5)
    _add(image, x, y, wrist + _point(0, -0.5), wrist + _point(0, -0.3), 0.36, 0.5)
    spread = random.uniform(0.1, 0.3)
    for finger in range(4):
        angle = spread * (finger - 1.5) + random.normal(0, 0.05)
        joint, direction = wrist + _point(0.19 * (finger - 1.5), -0.6), np.array([np.sin(angle), -np.cos(angle)])
        length = random.uniform(0.2, 0.28)
        _add(image, x, y, joint, joint + 3 * length * direction, 0.09, 0.5)
        _add(image, x, y, wrist + _point(0.09 * (finger - 1.5), -0.15), joint, 0.045, 0.8)
        for part in range(3):
            start = joint + (part * length + 0.03) * direction
            _add(image, x, y, start, start + (length - 0.06) * direction, 0.045, 0.8)
    side = random.choice([-1, 1])
    thumb = wrist + _point(side * 0.3, -0.3)
    _add(image, x, y, thumb, thumb + _point(side * 0.3, -0.35), 0.1, 0.5)
    _add(image, x, y, thumb, thumb + _point(side * 0.28, -0.32), 0.05, 0.8)
    return _exposed(image, random)


def skull(random: np.random.Generator) -> np.ndarray:
    """A skull from the front or the side: a shell with orbits or a face, a jaw and the neck."""
    y, x = _axes(*_size(random))
    wide, high, shell = random.uniform(0.55, 0.75), random.uniform(0.65, 0.8), random.uniform(0.86, 0.93)
    lateral = random.random() < 0.5
    center = -0.2
    image = 0.6 * _chord(x / wide, (y - center) / high) - 0.35 * _chord(x / wide / shell, (y - center) / high / shell)
    neck = 0.25 if lateral else 0.0
    _add(image, x, y, np.array([neck, 0.5]), np.array([neck, 1.4]), 0.35, 0.25)
    _add(image, x, y, np.array([neck, 0.5]), np.array([neck, 1.4]), 0.1, 0.3)
    if lateral:
        _add(image, x, y, np.array([-0.5, 0.55]), np.array([0.1, 0.45]), 0.1, 0.4)
        _add(image, x, y, np.array([-0.5, 0.1]), np.array([-0.5, 0.5]), 0.12, 0.25)
    else:
        for side in (-1, 1):
            image -= 0.15 * (np.hypot(x - side * 0.27, (y - 0.1) * 1.2) < 0.16)
            _add(image, x, y, np.array([side * 0.4, 0.4]), np.array([side * 0.1, 0.75]), 0.09, 0.4)
    return _exposed(image.clip(0) if random.random() < 0.5 else image.clip(0)[:, ::-1], random)


def knee(random: np.random.Generator) -> np.ndarray:
    """Two long bones in soft tissue with a joint."""
    y, x = _axes(*_size(random))
    image, tilt = np.zeros_like(x), random.normal(0, 0.15)
    joint, width = np.array([random.normal(0, 0.1), random.normal(0, 0.15)]), random.uniform(0.3, 0.5)
    for end in (joint + _point(tilt, -1.6), joint + _point(-tilt, 1.6)):
        _add(image, x, y, joint, end, width, 0.5)
        _add(image, x, y, joint + 0.1 * (end - joint), end, width / 2.5, 0.5)
        _add(image, x, y, joint + 0.12 * (end - joint) - [width / 4, 0], joint + 0.12 * (end - joint) + [width / 4, 0],
             width / 2.5, 0.3)  # fmt: skip
    return _exposed(image, random)


def pelvis(random: np.random.Generator) -> np.ndarray:
    """Soft tissue with the lumbar spine, iliac bones, femoral heads and gas."""
    y, x = _axes(*_size(random))
    image = 0.6 * _chord(x / random.uniform(0.9, 1.2), y / random.uniform(1.5, 3))
    _add(image, x, y, np.array([0, -1.4]), np.array([0, 0.1]), 0.14, 0.25)
    for side in (-1, 1):
        _add(image, x, y, np.array([side * 0.2, 0.1]), np.array([side * 0.6, -0.3]), 0.2, 0.2)
        _add(image, x, y, np.array([side * 0.55, 0.4]), np.array([side * 0.75, 1.2]), 0.13, 0.3)
        _add(image, x, y, np.array([side * 0.5, 0.35]), np.array([side * 0.1, 0.55]), 0.08, 0.2)
    for _ in range(5):
        row, column = random.uniform(-0.9, 0.2), random.uniform(-0.6, 0.6)
        image -= 0.1 * _chord((x - column) / random.uniform(0.08, 0.2), (y - row) / random.uniform(0.08, 0.2))
    return _exposed(image.clip(0), random)


def slices(volumes: Sequence[np.ndarray], planes: Sequence[str]) -> Callable[[np.random.Generator], np.ndarray]:
    """Slices of CT volumes in HU and volume order, in one of three windows."""

    def slice_of(random: np.random.Generator) -> np.ndarray:
        hu, plane = volumes[random.integers(len(volumes))], random.choice(list(planes))
        axis = ("axial", "coronal", "sagittal").index(plane)
        position = int(hu.shape[axis] * random.uniform(0.3, 0.7))
        level, width = [(-600, 1500), (40, 400), (-100, 2000)][random.integers(3)]
        pixels = np.take(hu, position, axis).astype(np.float32)
        return ((pixels - level) / width + 0.5).clip(0, 1)

    return slice_of


KINDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "noise": noise,
    "gradient": gradient,
    "text": text,
    "screenshot": screenshot,
    "disks as of a photograph": photograph,
    "hand": hand,
    "skull": skull,
    "knee": knee,
    "pelvis": pelvis,
}


def scaled(image: np.ndarray) -> np.ndarray:
    """The image in [0, 1]."""
    return ((image - image.min()) / np.ptp(image)).astype(np.float32)


def _size(random: np.random.Generator) -> tuple[int, int]:
    rows, columns = (int(side) for side in random.integers(160, 480, 2))
    return max(rows, columns // 2), max(columns, rows // 2)


def _axes(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of points in [-1, 1]."""
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    return y, x


def _point(x: float, y: float) -> Points:
    return np.array([x, y])


def _chord(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Length of the ray through a unit sphere, as a fraction of the diameter."""
    return np.sqrt(np.clip(1 - x**2 - y**2, 0, None))


def _add(
    image: np.ndarray, x: np.ndarray, y: np.ndarray, start: Points, end: Points, radius: float, density: float
) -> None:
    """Add the projection of a cylinder with round ends."""
    along = end - start
    t = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along @ along), 0, 1)
    distance = np.hypot(x - start[0] - t * along[0], y - start[1] - t * along[1])
    image += density * np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, None))


def _exposed(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """With blur, noise and another gamma."""
    noisy = ndimage.gaussian_filter(image, random.uniform(0, 2)) + random.normal(0, 0.01, image.shape)
    return scaled(noisy.clip(0) ** random.uniform(0.5, 1.5))
