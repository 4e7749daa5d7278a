"""What the report's figures hold and how they are laid out, without drawing them."""

import numpy as np
import pytest

from distrecon.report import figures

SHARES = {
    "C": {"structural": [0.5, 0.5], "behavioral": [0.25, 0.75]},
    "S": {"structural": [1, 0], "behavioral": [0, 1]},
}
CURVES = {"C": [(0.1, 0.5), (1.0, 0.25)], "S": [(0.1, 0.75), (1.0, 0.5)]}
FIGURES = {  # a reader's screen is wider than tall, and so is every figure beside the square matrices
    "losses": lambda: figures.losses_by_epoch({"contrastive": {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 3.0), (2, 1.5)]}}),
    "against": lambda: figures.against(
        {"beta": {"C+S": [(0.1, 0.5, 0.4, 0.6), (0.2, 0.6, 0.5, 0.7)]}}, "r", {"beta": (0.2, 0.6)}
    ),
    "gradients": lambda: figures.gradient_analysis(["conv", "fc"], SHARES, CURVES),
    "distances": lambda: figures.relatives(np.ones(3), np.ones(3), np.ones(3)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_wider_than_tall(name):
    width, height = FIGURES[name]().get_size_inches()
    assert 1.2 * height <= width


def test_a_legend_names_every_bar_and_line():
    (legend,) = FIGURES["gradients"]().legends
    assert [text.get_text() for text in legend.get_texts()] == ["structural", "behavioral", "C", "S"]
    colours = [getattr(handle, "get_color", lambda: None)() for handle in legend.legend_handles]
    assert len(legend.legend_handles) == 4
    assert None not in colours[2:]
    assert colours[2] != colours[3]


def test_a_line_has_the_points_of_its_trial():
    (axis,) = FIGURES["losses"]().axes
    assert {line.get_label(): line.get_xydata().tolist() for line in axis.lines} == {
        "a": [[1, 2.0], [2, 1.0]],
        "b": [[1, 3.0], [2, 1.5]],
    }


def test_a_point_without_its_value_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        figures.losses_by_epoch({"contrastive": {"a": [(1, 2.0), (2,)]}})


def test_generated_models_and_their_relatives_are_drawn_alike():
    (axis,) = FIGURES["distances"]().axes
    sizes = {float(points.get_sizes()[0]) for points in axis.collections if hasattr(points, "get_sizes")}
    assert len(sizes) == 1


def test_a_cut_is_drawn_stronger_than_the_branches_it_cuts():
    merges = np.array([[0, 1, 1e-6, 2], [2, 3, 1e-5, 2], [4, 5, 1.0, 4]])  # two pairs below the cut, joined above it
    (axis,) = figures.dendrogram(merges, 0.01, np.array([0, 0, 1, 1])).axes
    *branches, cut = axis.lines
    assert len(branches) == 3
    assert set(cut.get_ydata()) == {0.01}
    assert {line.get_linewidth() for line in branches} == {cut.get_linewidth() / 2}
    assert len({line.get_color() for line in branches}) == 2  # clusters that are kept, and what joins them
