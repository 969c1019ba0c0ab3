"""Draw images in a grid, as PNG: groups of images with titles, under a caption.

Every picture of several images that a command writes is drawn here.

Shapes: K images of a group, C H W image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from e2ediff.data import ImageSpec, to_pixels

_CELL = 64  # pixels at least of a side of an image, twice as many where there are few images
_FEW = 12
_PAD = 2  # around an image
_GAP = 8  # between groups, and around the picture
_LEAST_WIDTH = 320  # of the picture, so that its caption has room
_ASPECT = 1.5  # width to height that the layout comes close to
_LONGEST_ROW = 16  # images that are kept in one row on request
_SIZE = 12  # of the font
_LINE = 16  # height of a line of text
_PAPER, _INK = 232, 40  # a light grey, on which white images show


@attrs.frozen(eq=False)
class Group:
    """Images x (K, C, H, W) in [-1, 1], with 1 or 3 channels, which are shown together."""

    x: Tensor
    title: str = ""


def by_class(x: Tensor, labels: Sequence[int], image: ImageSpec) -> list[Group]:
    """Return images (M, C, H, W) in groups of one label each, by label.

    Images without classes, or with conditions of another kind, are one group.

    Args:
        x: The images.
        labels: The label of each; the one after the last class means none.
        image: Has the classes and their names.
    """
    if not image.classes:
        return [Group(x)]
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return [Group(x[rows[label]], class_title(label, image)) for label in sorted(rows)]


def class_title(label: int | str, image: ImageSpec) -> str:
    """Return the index of a class and its name: fonts may lack the letters of a name.

    `none` and the label after the last class mean no class.
    """
    names = image.class_names
    if not isinstance(label, int) or label >= image.classes:
        return "no class"
    return f"{label} {names[label]}" if label < len(names) else f"class {label}"


def sampling_words(weights: str, seed: int, sampler: object, guidance: object) -> str:
    """Describe how images were sampled, for a caption; parts are given as in a recipe."""
    words = [f"weights {weights}", f"sampler {_part(sampler, 'steps')}"]
    words += [f"guidance {_part(guidance, 'scale')}"] if guidance else []
    return ", ".join([*words, f"seed {seed}"])


def _part(block: object, option: str) -> str:
    assert isinstance(block, Mapping)
    value = block.get(option)
    return f"{block.get('name')}" + (f" ({option} {value})" if value is not None else "")


def grid_png(groups: Sequence[Group], caption: str = "", *, in_rows: bool = False) -> bytes:
    """Encode groups of images as one PNG, of a size that suits a screen.

    Images are enlarged by repeating pixels, to 64 pixels or more; a title that is too long for
    its group is cut. How many images and groups stand side by side is chosen so that the picture
    is neither a strip nor a tower.

    Args:
        groups: One or more groups of images of one shape.
        caption: Text above the images, of any length.
        in_rows: Keep up to 16 images of a group in one row, as they belong together in order.
    """
    shape = groups[0].x.shape[1:]
    few = sum(len(group.x) for group in groups) <= _FEW
    times = max(1, math.ceil(_CELL * (2 if few else 1) / min(shape[1:])))
    cell = (shape[2] * times + 2 * _PAD, shape[1] * times + 2 * _PAD)
    titled = any(group.title for group in groups)
    across, columns = _layout([len(group.x) for group in groups], cell, titled, in_rows)
    text = _Text()
    blocks = [_block(group, across, times, cell, text if titled else None) for group in groups]
    width, height = (max(block.size[i] for block in blocks) for i in (0, 1))
    rows = math.ceil(len(blocks) / columns)
    whole = max(columns * (width + _GAP) + _GAP, _LEAST_WIDTH)
    lines = list(text.wrapped(caption, whole - 2 * _GAP))
    top = _GAP + len(lines) * _LINE + (_GAP if lines else 0)
    sheet = Image.new(blocks[0].mode, (whole, top + rows * (height + _GAP)), _fill(blocks[0].mode))
    for number, line in enumerate(lines):
        sheet.paste(text.drawn(line, whole - 2 * _GAP, sheet.mode), (_GAP, _GAP + number * _LINE))
    for number, block in enumerate(blocks):
        row, column = divmod(number, columns)
        sheet.paste(block, (_GAP + column * (width + _GAP), top + row * (height + _GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _layout(
    counts: Sequence[int], cell: tuple[int, int], titled: bool, in_rows: bool
) -> tuple[int, int]:
    """Return how many images of a group, and how many groups, stand side by side."""
    most, groups = max(counts), len(counts)
    widths = [most] if in_rows and most <= _LONGEST_ROW else range(1, most + 1)

    def cost(choice: tuple[int, int]) -> tuple[float, int]:
        across, columns = choice
        deep, rows = math.ceil(most / across), math.ceil(groups / columns)
        width = columns * (across * cell[0] + _GAP)
        height = rows * (deep * cell[1] + _GAP + (_LINE if titled else 0))
        empty = 1 - sum(counts) / (across * columns * deep * rows)
        cramped = titled and across < min(2, most)
        return abs(math.log(width / height / _ASPECT)) + 2 * empty + 0.5 * cramped, -across

    choices = [(across, columns) for across in widths for columns in range(1, groups + 1)]
    return min(choices, key=cost)


def _block(
    group: Group, across: int, times: int, cell: tuple[int, int], text: _Text | None
) -> Image.Image:
    """Draw a group, with its title above it if there is `text` to draw with."""
    x = to_pixels(group.x.detach().cpu().clamp(-1, 1))
    x = x.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)
    pixels = x.permute(0, 2, 3, 1).numpy()
    mode = "L" if pixels.shape[-1] == 1 else "RGB"
    top = _LINE if text else 0
    size = (across * cell[0], top + math.ceil(len(x) / across) * cell[1])
    block = Image.new(mode, size, _fill(mode))
    if text:
        block.paste(text.drawn(group.title, size[0], mode), (0, 0))
    for number, one in enumerate(pixels):
        row, column = divmod(number, across)
        image = Image.fromarray(one[..., 0] if mode == "L" else one)
        block.paste(image, (column * cell[0] + _PAD, top + row * cell[1] + _PAD))
    return block


def _fill(mode: str) -> int | tuple[int, int, int]:
    return _PAPER if mode == "L" else (_PAPER, _PAPER, _PAPER)


class _Text:
    """Draws text in the font that comes with matplotlib, one line at a time."""

    def __init__(self) -> None:
        # Imported here: it takes a while, and `check` does not need it.
        import matplotlib

        path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
        self.font = ImageFont.truetype(str(path), _SIZE)

    def drawn(self, text: str, width: int, mode: str) -> Image.Image:
        """Draw a line no wider than `width`, cut with "..." if it is longer."""
        line = Image.new("L", (max(1, width), _LINE), _PAPER)
        ImageDraw.Draw(line).text((_PAD, 0), self._cut(_plain(text), width), _INK, self.font)
        return line.convert(mode)

    def _cut(self, text: str, width: int) -> str:
        if self.fits(text, width):
            return text
        fitting, longer = 0, len(text)
        while fitting + 1 < longer:
            middle = (fitting + longer) // 2
            if self.fits(f"{text[:middle]}...", width):
                fitting = middle
            else:
                longer = middle
        return f"{text[:fitting].rstrip()}..."

    def fits(self, text: str, width: int) -> bool:
        """Return whether a line is no wider than this."""
        return self.font.getlength(text) <= width - 2 * _PAD

    def wrapped(self, text: str, width: int) -> Iterator[str]:
        """Break text into lines, between words."""
        line = ""
        for word in _plain(text).split():
            longer = f"{line} {word}".lstrip()
            if line and not self.fits(longer, width):
                yield line
                longer = word
            line = longer
        if line:
            yield line


def _plain(text: str) -> str:
    """Replace what is no visible character, and leave out what no line could hold."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:300])
