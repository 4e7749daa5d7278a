"""What a convolutional black box is taken to be: its layers in order, as text; channels and units are unknown.

    conv3          a convolution with 3 x 3 kernels; conv3p1s2: padding 1, stride 2
    pool2          max pooling over 2 x 2 windows, after the activation; avgpool2: their average
    linear         a dense layer; the last one gives the outputs

Every layer but the last is followed by the activation, and pooling comes after it. "conv3p1 pool2 conv3 linear" is
Conv2d, activation, MaxPool2d, Conv2d, activation, Flatten, Linear.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distrecon.errors import UserError

Shape = tuple[int, int, int]  # channels, height, width

UNKNOWN = "unknown"
USUAL = (  # what "unknown" tries, the cheapest to fit first
    "conv3 linear",
    "conv3p1 linear",
    "conv5 linear",
    "conv5p2 linear",
    "conv3 pool2 linear",
    "conv3p1 pool2 linear",
    "conv3 conv3 linear",
    "conv3p1 conv3p1 linear",
    "conv3p1 pool2 conv3 linear",
)

_WORD = re.compile(r"(?P<kind>conv|pool|avgpool)(?P<size>\d+)(?:p(?P<padding>\d+))?(?:s(?P<stride>\d+))?")


@dataclass(frozen=True)
class Stage:
    """One hidden layer as a convolution, then the activation, then pooling.

    A dense layer is a convolution whose one kernel covers the whole map. `before` and `after` are the map's height and
    width without and with pooling; pooling windows do not overlap, and what is left at the border is not seen.
    """

    kernel: tuple[int, int]
    before: tuple[int, int]
    padding: int = 0
    stride: int = 1
    pool: int = 1
    average: bool = False
    dense: bool = False

    @property
    def after(self) -> tuple[int, int]:
        return self.before[0] // self.pool, self.before[1] // self.pool

    @property
    def positions(self) -> int:
        """Of the map that the next layer reads."""
        return self.after[0] * self.after[1]


@dataclass(frozen=True)
class Hypothesis:
    """Hidden layers of a network that reads images of `input_shape` and ends with a dense layer."""

    text: str
    input_shape: Shape
    stages: tuple[Stage, ...]


def read_layers(text: str, input_shape: Shape) -> Hypothesis:
    """The hypothesis that a text like "conv3p1 pool2 conv3 linear" is, for images of this shape.

    Raises UserError that names the word that is none, or does not fit.
    """
    words, stages, size = text.split(), list[Stage](), input_shape[1:]
    if not words or words[-1] != "linear":
        raise UserError(f"layers={text!r}: the last layer must be linear")
    for word in words[:-1]:
        if word == "linear":
            stages.append(Stage(size, (1, 1), dense=True))
        else:
            match = _WORD.fullmatch(word)
            if match is None:
                known = "conv3, conv3p1, conv3s2, pool2, avgpool2, linear"
                raise UserError(f"layers={text!r}: {word!r} is none of {known}")
            stages = _with(stages, size, text, match)
        size = stages[-1].after
        if min(size) < 1:
            raise UserError(f"layers={text!r}: nothing is left of {input_shape[1]}x{input_shape[2]} images at {word!r}")
    if not stages:
        raise UserError(f"layers={text!r}: there is no hidden layer")
    return Hypothesis(" ".join(words), input_shape, tuple(stages))


def _with(stages: list[Stage], size: tuple[int, int], text: str, match: re.Match[str]) -> list[Stage]:
    """The stages with one more convolution, or with the last one pooled."""
    kind, number = match["kind"], int(match["size"])
    if kind == "conv":
        padding, stride = int(match["padding"] or 0), int(match["stride"] or 1)
        if number < 1 or stride < 1:
            raise UserError(f"layers={text!r}: {match[0]!r} needs a kernel and a stride of at least 1")
        height, width = ((side + 2 * padding - number) // stride + 1 for side in size)
        return [*stages, Stage((number, number), (height, width), padding, stride)]
    if not stages or stages[-1].pool > 1 or stages[-1].dense or match["padding"] or match["stride"] or number < 2:
        raise UserError(f"layers={text!r}: {match[0]!r} must follow a convolution, with windows of 2 or more")
    return [*stages[:-1], replace(stages[-1], pool=number, average=kind == "avgpool")]


def read_request(input_size: int | Sequence[int], layers: str | None) -> tuple[Shape | None, list[Hypothesis]]:
    """The images' shape and the hypotheses that a recovery is asked for; none of dense networks.

    Raises UserError where `input_size` does not go with `layers`.
    """
    if layers is None:
        if not isinstance(input_size, int):
            raise UserError(f"input_size={list(input_size)} needs layers=, such as 'conv3p1 pool2 linear' or 'unknown'")
        return None, []
    if isinstance(input_size, int) or len(input_size) != 3 or min(input_size) < 1:
        raise UserError(f"layers={layers!r} needs input_size=[channels, height, width], not {input_size}")
    channels, height, width = map(int, input_size)
    shape = (channels, height, width)
    found = usual(shape) if layers == UNKNOWN else [read_layers(layers, shape)]
    if not found:
        raise UserError(f"none of the usual layers fits {height}x{width} images: say which with layers=")
    return shape, found


def usual(input_shape: Shape) -> list[Hypothesis]:
    """The usual hypotheses that images of this shape allow."""
    found = []
    for text in USUAL:
        try:
            found.append(read_layers(text, input_shape))
        except UserError:
            continue
    return found
