"""The only room that knows matplotlib: figures of sweeps, as PNG files and as inline SVG in the page's own colours.

Each function takes plain arrays and returns a Figure; `drawings` decides which, `report` where they go.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# a palette that keeps its contrast on white and on near-black, and for colour-blind readers (Okabe-Ito, darkened)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#9a7d00", "#56b4e9", "#7f7f7f")
INK, PAPER = "#222222", "#ffffff"
SIZE = (6.4, 3.6)
MIDDLE = ListedColormap(colormaps["viridis"](np.linspace(0.12, 0.88, 128)))  # seen on white and on near-black
READABLE, LARGEST = 0.79, 1.9  # pixels a point on a page: text is legible, a plain figure fits a phone and fills a page
TICKS = 48  # letters of a panel's labels that fit side by side


class Picture(Figure):
    """A figure that notebooks show as it is."""

    def _repr_svg_(self) -> str:
        buffer = io.StringIO()
        self.savefig(buffer, format="svg", facecolor=PAPER)
        return buffer.getvalue()


def _figure(width: float = SIZE[0], height: float = SIZE[1], columns: int = 1) -> tuple[Figure, list]:
    figure = Picture(figsize=(width, height), layout="constrained")
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
    upright = sum(map(len, layers)) > TICKS
    figure, axes = _figure(7.2, 4.4 if upright else 3.4, 2)
    names = [*shares, *cosines]
    for axis, lines, title in zip(axes, (shares, cosines), ("share of the gradient's norm", "cosine"), strict=True):
        for name, values in lines.items():
            colour, marker = _colour(names.index(name)), "os^D"[names.index(name)]
            axis.plot(range(len(layers)), values, color=colour, marker=marker, label=name, linewidth=1.8)
        axis.set_xticks(range(len(layers)), layers, color=INK, rotation=90 if upright else 0)
        axis.set_title(title, fontsize=10, color=INK)
        axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        axis.set_ylim(min(-0.05, *(np.nanmin([*v, 0.0]) - 0.08 for v in lines.values())), 1.05)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def latent_map(sets: Mapping[str, np.ndarray], share: Sequence[float]) -> Figure:
    """sets[name] [B, 3]: two coordinates and the accuracy, which is the colour; the first set lies below the others."""
    figure, (axis,) = _figure(6.4, 4.6)
    accuracies = np.concatenate([points[:, 2] for points in sets.values()])
    least, most = float(accuracies.min()), float(accuracies.max())
    shown: Any = None
    for i, (name, points) in enumerate(sets.items()):
        shown = axis.scatter(
            *points[:, :2].T,
            c=points[:, 2],
            vmin=least,
            vmax=most,
            cmap=MIDDLE,
            s=(14, 20, 40)[i],
            marker="os^"[i],
            edgecolors=(INK if i else "none"),
            linewidths=0.5,
            alpha=(0.6, 0.95, 0.95)[i],
            label=name,
            zorder=2 + i,
        )
    for which, part in zip((axis.set_xlabel, axis.set_ylabel), share, strict=True):
        which(f"{'first' if which == axis.set_xlabel else 'second'} component ({100 * part:.0f} %)", color=INK)
    bar = figure.colorbar(shown, ax=axis, shrink=0.85)
    bar.set_label("accuracy on test images", color=INK)
    bar.ax.tick_params(colors=INK)
    legend = figure.legend(loc="outside lower center", ncols=len(sets), frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        handle.set(facecolor=COLOURS[6], alpha=1)  # type: ignore[union-attr]
    return figure


def reconstructions(panels: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """panels[trial][kind] = accuracies [2, B] of originals and of what was made of them, around the line where they
    are equal."""
    figure, axes = _figure(2.5 * max(2, len(panels)), 3.1, len(panels))
    every = np.concatenate([values.ravel() for kinds in panels.values() for values in kinds.values()])
    ends = float(every.min()) - 0.02, float(every.max()) + 0.02
    for axis, (trial, kinds) in zip(axes, panels.items(), strict=True):
        axis.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":")
        for i, (kind, (original_B, made_B)) in enumerate(kinds.items()):
            axis.scatter(
                original_B, made_B, s=12, marker="o^"[i], alpha=0.6, color=_colour(i + 1), linewidths=0, label=kind
            )
        axis.set_xlim(ends)
        axis.set_ylim(ends)
        axis.set_title(trial, fontsize=10, color=INK)
        axis.set_xlabel("original", color=INK)
    axes[0].set_ylabel("accuracy of what it became", color=INK)
    labelled = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=3, frameon=False, markerscale=2
    )
    return figure


def relatives(distance_M: np.ndarray, accuracy_M: np.ndarray, relative_M: np.ndarray) -> Figure:
    """Generated models, at their distance from the nearest training model, joined with that one's accuracy."""
    figure, (axis,) = _figure()
    axis.vlines(distance_M, accuracy_M, relative_M, color=COLOURS[6], linewidth=0.8, alpha=0.6)
    axis.scatter(distance_M, relative_M, s=22, facecolors="none", edgecolors=COLOURS[6], label="its nearest relative")
    axis.scatter(distance_M, accuracy_M, s=22, color=COLOURS[1], linewidths=0, label="generated", zorder=3)
    axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlabel("distance (1 = of a held-out good model to its own nearest)", color=INK, fontsize=9)
    axis.set_ylabel("accuracy on test images", color=INK)
    axis.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def against(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    metric: str,
    best: Mapping[str, tuple[float, float]],
) -> Figure:
    """panels[setting][line] = [(its value, mean of the metric, least, most), ...], and best[setting] = (value, metric).

    A value whose metrics were several has the span from the least to the most drawn. Axes whose numbers span a factor
    of ten (the metric's: a hundred) or more are logarithmic.
    """
    figure, axes = _figure(max(4.6, 3.1 * len(panels)), 3.6, len(panels))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (setting, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            x, mean, least, most = np.array(points).T
            colour = _colour(names.index(name))
            axis.plot(x, mean, "o-", color=colour, label=name, markersize=5, linewidth=1.6)
            axis.vlines(x, least, most, color=colour, linewidth=3, alpha=0.35)
        axis.scatter(*best[setting], s=130, facecolors="none", edgecolors=INK, linewidths=1.4, label="best", zorder=4)
        every = np.array([p for points in lines.values() for p in points])
        if _spans(every[:, 0], 10):
            axis.set_xscale("log")
        if _spans(every[:, 2:], 100):
            axis.set_yscale("log")
        ticks = np.unique(every[:, 0])
        if len(ticks) <= 8:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], color=INK)
            axis.set_xticks([], minor=True)
        axis.set_xlabel(setting, color=INK)
    axes[0].set_ylabel(metric, color=INK, fontsize=9)
    handles = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _spans(values: np.ndarray, factor: float) -> bool:
    return bool(np.min(values) > 0 and np.max(values) >= factor * np.min(values))


def weight_pictures(rows: Mapping[str, np.ndarray], columns: int = 10) -> Figure:
    """rows[name] [N, height, width]: each neuron's weights as a picture of its own scale (blue to red, white is 0), a
    row a name, `columns` neurons and then the next rows below."""
    count, height, width = next(iter(rows.values())).shape
    columns = min(columns, count)
    blocks = -(-count // columns)
    gap = max(1, round(0.12 * min(height, width)))
    lines = blocks * len(rows)
    mosaic = np.full((lines * (height + gap) + (blocks - 1) * gap, columns * (width + gap)), np.nan)
    ticks = []
    for block in range(blocks):
        for i, pictures in enumerate(rows.values()):
            top = (block * len(rows) + i) * (height + gap) + block * gap
            ticks.append(top + (height - 1) / 2)
            for j, picture in enumerate(pictures[block * columns : (block + 1) * columns]):
                left = j * (width + gap)
                mosaic[top : top + height, left : left + width] = picture / max(np.abs(picture).max(), 1e-300)
    wide = 6.4
    figure, (axis,) = _figure(wide, min(8.0, 0.5 + (wide - 1.0) * mosaic.shape[0] / mosaic.shape[1]))
    axis.imshow(mosaic, vmin=-1, vmax=1, cmap="RdBu_r", rasterized=True, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks(ticks, [*rows] * blocks, color=INK)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
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
    least, most = (round(pixels * 72 * figure.get_figwidth()) for pixels in (READABLE, LARGEST))
    unique = f"f{abs(hash((title, description))) % 10**8}"  # ids must not clash between the page's figures
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{unique}-", svg)
    text = f"<title>{_escape(title)}</title><desc>{_escape(description)}</desc>"
    return svg.replace("<svg ", f'<svg role="img" style="min-width: {least}px; max-width: {most}px" ', 1).replace(
        ">", f">{text}", 1
    )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
