"""The only room that knows matplotlib: figures of sweeps, as PNG files and as inline SVG in the page's own colours.

Each function takes plain arrays and returns a Figure; `drawings` decides which, `report` where they go.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# a palette that keeps its contrast on white and on near-black, and for colour-blind readers (Okabe-Ito, darkened)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#9a7d00", "#56b4e9", "#7f7f7f")
INK, PAPER = "#222222", "#ffffff"
SIZE = (6.4, 3.6)
READABLE = 0.79  # least pixels a point on a page: text is legible, and a plain figure fits a phone


def _figure(width: float = SIZE[0], height: float = SIZE[1], columns: int = 1) -> tuple[Figure, list]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", colors=INK, labelsize=9)
        for spine in axis.spines.values():
            spine.set_color(INK)
    return figure, axes


def losses_by_epoch(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """curves[loss][trial] = [(epoch, value), ...]: one panel a loss, one line a trial, on log scales."""
    figure, axes = _figure(2.6 * max(2, len(curves)), 3.2, len(curves))
    names = list(dict.fromkeys(trial for trials in curves.values() for trial in trials))
    for axis, (loss, trials) in zip(axes, curves.items(), strict=True):
        for trial, points in trials.items():
            axis.plot(*zip(*points, strict=True), color=_colour(names.index(trial)), label=trial, linewidth=1.8)
        axis.set_title(loss, fontsize=10, color=INK)
        axis.set_xlabel("epoch", color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if all(value > 0 for points in trials.values() for _, value in points):
            axis.set_yscale("log")
    axes[0].set_ylabel("loss (before scaling)", color=INK)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def accuracy_distributions(groups: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """groups[trial][kind] = accuracies: a strip of points and the mean of each kind, trial by trial."""
    figure, (axis,) = _figure(max(6.4, 1.9 * len(groups)), 3.8)
    kinds = list(next(iter(groups.values())))
    rng = np.random.default_rng(0)
    for i, sets in enumerate(groups.values()):
        for j, (kind, values) in enumerate(sets.items()):
            at = i + (j - (len(kinds) - 1) / 2) * 0.26
            spread = at + rng.uniform(-0.09, 0.09, len(values))
            axis.scatter(
                spread, values, s=7, alpha=0.45, color=COLOURS[j], linewidths=0, label=kind if i == 0 else None
            )
            axis.hlines(np.mean(values), at - 0.12, at + 0.12, color=INK, linewidth=1.6)
    axis.set_xticks(range(len(groups)), list(groups), color=INK)
    axis.set_ylabel("accuracy on test images", color=INK)
    axis.set_ylim(0, 1.02)
    legend = figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=9, markerscale=2)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


def accuracy_novelty(points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """points[method] = [(novelty, mean accuracy), ...]."""
    figure, (axis,) = _figure()
    for i, (method, values) in enumerate(points.items()):
        values = sorted(values)
        axis.plot(*zip(*values, strict=True), "o-", color=_colour(i), label=method, markersize=6)
    axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlabel("novelty (1 = as far from the training models as a held-out good model)", color=INK, fontsize=9)
    axis.set_ylabel("mean accuracy", color=INK)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def place(distance_N: np.ndarray, accuracy_N: np.ndarray, predicted: float, error: float) -> Figure:
    """Training models by their distance from a network and their accuracy, and the network's predicted one."""
    figure, (axis,) = _figure()
    axis.plot(distance_N, accuracy_N, ".", color=_colour(0), markersize=3, alpha=0.5, label="training models")
    axis.errorbar([0.0], [predicted], [error], fmt="D", color=_colour(1), markersize=7, capsize=4, label="the network")
    axis.set_xlim(left=-0.03 * float(distance_N.max()))
    axis.set_xlabel("distance of the weights", color=INK)
    axis.set_ylabel("test accuracy", color=INK)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def gradients(layers: Sequence[str], shares: Mapping[str, np.ndarray], cosines: Mapping[str, np.ndarray]) -> Figure:
    """Per layer: each loss's share of its gradient's norm, and cosines between gradients; one line a name."""
    figure, axes = _figure(7.2, 3.4, 2)
    names = [*shares, *cosines]
    for axis, lines, title in zip(axes, (shares, cosines), ("share of the gradient's norm", "cosine"), strict=True):
        for name, values in lines.items():
            colour, marker = _colour(names.index(name)), "os^D"[names.index(name)]
            axis.plot(range(len(layers)), values, color=colour, marker=marker, label=name, linewidth=1.8)
        axis.set_xticks(range(len(layers)), layers, color=INK)
        axis.set_title(title, fontsize=10, color=INK)
        axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        axis.set_ylim(min(-0.05, *(np.nanmin([*v, 0.0]) - 0.08 for v in lines.values())), 1.05)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def agreement(matrix_BB: np.ndarray) -> Figure:
    """Agreement of reconstructions (rows) with originals (columns)."""
    return _matrix(matrix_BB, "agreement", "originals", "reconstructions")


def gradient_analysis(
    layers: Sequence[str],
    shares: Mapping[str, Mapping[str, Sequence[float]]],
    curves: Mapping[str, Sequence[tuple[float, float]]],
) -> Figure:
    """How gradients spread over layers, shares[model][kind] = one number a layer, a panel a model; and, last,
    curves[model] = [(scale of the reconstruction error, cosine of predicted and exact gradient), ...]."""
    figure, axes = _figure(3.0 * (len(shares) + 1), 3.4, len(shares) + 1)
    for axis, (model, kinds) in zip(axes, shares.items(), strict=False):
        for i, (kind, values) in enumerate(kinds.items()):
            at = np.arange(len(layers)) + (i - (len(kinds) - 1) / 2) * 0.38
            axis.bar(at, values, 0.36, color=_colour(i), label=kind)
        axis.set_xticks(range(len(layers)), list(layers), color=INK)
        axis.set_title(model, fontsize=10, color=INK)
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("share of the gradient's norm", color=INK)
    bars = axes[0].get_legend_handles_labels()
    for i, (model, points) in enumerate(curves.items()):
        axes[-1].plot(*zip(*points, strict=True), "o-", color=_colour(i + 2), label=model, markersize=5)
    axes[-1].set_xscale("log")
    axes[-1].set_xlabel("scale of the reconstruction error", color=INK)
    axes[-1].set_title("cosine of predicted and exact", fontsize=10, color=INK)
    lines = axes[-1].get_legend_handles_labels()
    handles, labels = [*bars[0], *lines[0]], [*bars[1], *lines[1]]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def recovered_sizes(
    students: Sequence[str], sizes: Sequence[int], verified: Sequence[bool], true: int | None
) -> Figure:
    """Recovered neurons against the trials' swept value; hollow where the recovery could not be verified."""
    figure, (axis,) = _figure()
    places = np.arange(len(students))
    if true is not None:
        axis.axhline(true, color=COLOURS[1], linewidth=1.2, label=f"teacher: {true}")
    axis.plot(places, sizes, color=COLOURS[0], linewidth=1, alpha=0.5)
    for truth, face, text in ((True, COLOURS[0], "verified"), (False, "none", "not verified")):
        chosen = [i for i, v in enumerate(verified) if bool(v) == truth]
        if chosen:
            axis.scatter(
                places[chosen],
                np.array(sizes)[chosen],
                s=60,
                facecolors=face,
                edgecolors=COLOURS[0],
                label=text,
                zorder=3,
            )
    axis.set_xticks(places, students, color=INK)
    axis.set_ylabel("hidden neurons recovered", color=INK)
    axis.set_ylim(0, 1.15 * max([*sizes, true or 0]))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def dendrogram(merges: np.ndarray, cut: float, cluster_V: np.ndarray) -> Figure:
    """The linkage of all students' neurons with the height of the cut; leaves outside any kept cluster are grey."""
    from scipy.cluster.hierarchy import dendrogram as layout

    figure, (axis,) = _figure(6.4, 3.2)
    tree = layout(merges, no_plot=True)
    floor = max(1e-17, min(cut, float(merges[:, 2][merges[:, 2] > 0].min(initial=1.0))) / 10)
    for x, y in zip(tree["icoord"], tree["dcoord"], strict=True):
        kept = max(y) <= cut
        axis.plot(x, np.maximum(y, floor), color=COLOURS[0] if kept else COLOURS[6], linewidth=0.7)
    axis.axhline(cut, color=COLOURS[1], linewidth=1.4)
    found = int(cluster_V.max()) + 1
    axis.set_title(f"cut at {cut:.1e}: {found} clusters kept of {len(cluster_V)} neurons", fontsize=10, color=INK)
    axis.set_yscale("log")
    axis.set_ylabel("distance", color=INK)
    axis.set_xticks([])
    axis.set_xlabel("neurons of all students", color=INK)
    return figure


def similarity(similarity_VV: np.ndarray, cluster_V: np.ndarray) -> Figure:
    """Cosine similarity of all students' neurons, ordered by cluster."""
    order = np.argsort(np.where(cluster_V < 0, cluster_V.max() + 1, cluster_V), kind="stable")
    label = "neurons, by cluster; outside clusters last"
    return _matrix(similarity_VV[np.ix_(order, order)].astype(float), "cosine similarity", label, "")


def _matrix(values: np.ndarray, what: str, columns: str, rows: str) -> Figure:
    """Values from 0 to 1 as an image with its scale."""
    figure, (axis,) = _figure(4.6, 4.0)
    image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", rasterized=True)
    axis.set_xlabel(columns, color=INK, fontsize=9)
    axis.set_ylabel(rows, color=INK, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    bar = figure.colorbar(image, ax=axis, shrink=0.8)
    bar.set_label(what, color=INK)
    bar.ax.tick_params(colors=INK)
    return figure


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def save_png(figure: Figure, path: Path) -> None:
    """A PNG on white, 144 dots an inch."""
    figure.savefig(path, dpi=144, facecolor=PAPER)


def inline_svg(figure: Figure, title: str, description: str) -> str:
    """The figure as SVG for a page: no background, ink in the page's text colour, with a text alternative."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("#000000", "currentColor")
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    least = round(READABLE * 72 * figure.get_figwidth())
    unique = f"f{abs(hash((title, description))) % 10**8}"  # ids must not clash between the page's figures
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{unique}-", svg)
    text = f"<title>{_escape(title)}</title><desc>{_escape(description)}</desc>"
    return svg.replace("<svg ", f'<svg role="img" style="min-width: {least}px" ', 1).replace(">", f">{text}", 1)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
