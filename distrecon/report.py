"""report.html of the main job: one self-contained page with what was run, the tables, and figures drawn for reading."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrecon import figures, tables
from distrecon.cluster.journal import SweepRecord, TrialRecord
from distrecon.cluster.sweeps import Place
from distrecon.console import duration
from distrecon.tracking import Tracker
from distrecon.zoos.storage import store

LOSSES = ("loss/contrastive", "loss/structural", "loss/behavioral")
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #222222; --soft: #5c5c5c; --line: #d8d8d8; --mark: #0b5fa5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e4e4e4; --soft: #a5a5a5; --line: #3a3d42; --mark: #7ab8f5; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.soft, figcaption, dt { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.best td { font-weight: 600; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; min-width: 34rem; height: auto; max-height: 32rem;
  color: var(--ink); fill: currentColor; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font-size: .9em; overflow-wrap: anywhere; } .warn { border-left: 4px solid #d55e00; padding: .5rem 1rem; }
a { color: var(--mark); }
"""


@dataclass
class Files:
    """What a report consists of: the page, and per sweep its figures and each trial's models."""

    page: Path
    summary: Path
    figures: dict[str, list[Path]] = field(default_factory=dict)
    models: dict[str, dict[str, list[Path]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """A figure with its title and the sentence that stands for it where it cannot be seen."""

    name: str
    title: str
    description: str
    figure: Any


def write(
    folder: Path, sweeps: Sequence[SweepRecord], place: Place, about: Mapping[str, Any], tracker: Tracker
) -> Files:
    """Fetches the trials' models and arrays, draws, and writes figures/*.png, models/ and report.html."""
    files = Files(folder / "report.html", folder / "summary.json")
    (folder / "figures").mkdir(exist_ok=True)
    sections = []
    for sweep in sweeps:
        arrays = fetch(sweep, place, folder / "models", files)
        drawings = DRAWINGS[sweep.kind](sweep, arrays)
        files.figures[sweep.name] = []
        for drawing in drawings:
            path = folder / "figures" / f"{sweep.name}-{drawing.name}.png"
            figures.save_png(drawing.figure, path)
            files.figures[sweep.name].append(path)
        sections.append(_section(sweep, drawings, tracker))
    page = _page(about, sections, tracker)
    temporary = folder / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(files.page)
    return files


def fetch(sweep: SweepRecord, place: Place, models: Path, files: Files) -> dict[str, dict[str, np.ndarray]]:
    """Copies the trials' models from storage to `models`/<sweep>/<trial>/ and returns their arrays for figures."""
    arrays: dict[str, dict[str, np.ndarray]] = {}
    copies = files.models.setdefault(sweep.name, {})
    for trial in sweep.trials:
        where = store(f"{place.storage}/trials/{sweep.name}/{trial}")
        for name in where.names("artifacts"):
            content = where.read(name)
            file = name.rsplit("/", 1)[-1]
            if file == "arrays.npz":
                with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
                    arrays[trial] = dict(loaded)
                continue
            target = models / sweep.name / trial / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            copies.setdefault(trial, []).append(target)
    return arrays


# -- figures of each kind of sweep ------------------------------------------------------------------------------------


def _autoencoder_drawings(sweep: SweepRecord, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> list[Drawing]:
    drawings = []
    curves = {loss.split("/")[1]: _curves(sweep, loss) for loss in LOSSES}
    if curves := {loss: trials for loss, trials in curves.items() if trials}:
        drawings.append(
            Drawing(
                "losses",
                "Losses by epoch",
                "Each loss over the training models, before scaling; a trial appears where it trains that loss.",
                figures.losses_by_epoch(curves),
            )
        )
    groups = {
        tables.label(sweep.trials[trial].config): {
            "original": values["reconstruct/accuracy"][0],
            "reconstructed": values["reconstruct/accuracy"][1],
            "generated": values["generate/accuracy"],
        }
        for trial, values in arrays.items()
    }
    if groups:
        means = "; ".join(
            f"{name}: " + ", ".join(f"{kind} {np.mean(v):.2f}" for kind, v in sets.items())
            for name, sets in groups.items()
        )
        drawings.append(
            Drawing(
                "accuracies",
                "Accuracy of original, reconstructed and generated models",
                f"One point a model, a line at each mean. Means: {means}.",
                figures.accuracy_distributions(groups),
            )
        )
    points = _novelty_points(sweep)
    if points:
        drawings.append(
            Drawing(
                "novelty",
                "Accuracy against novelty of generated models",
                "Novelty is the aligned distance to the nearest training model, 1 where a held-out good model lies. "
                "Noise on a training model and averages of two are the baselines that a generator has to beat.",
                figures.accuracy_novelty(points),
            )
        )
    return drawings


def _curves(sweep: SweepRecord, metric: str) -> dict[str, list[tuple[int, float]]]:
    curves = {}
    for trial in sweep.trials.values():
        points = [(epoch, m[metric]) for epoch, m in sorted(trial.epochs.items()) if _number(m.get(metric))]
        if points:
            curves[tables.label(trial.config)] = points
    return curves


def _novelty_points(sweep: SweepRecord) -> dict[str, list[tuple[float, float]]]:
    points: dict[str, list[tuple[float, float]]] = {}
    prefixes = {
        "generate/": "",
        "generate/baseline_noise/": "noise on a model",
        "generate/baseline_average/": "average of two",
    }
    for trial in sweep.trials.values():
        for prefix, name in prefixes.items():
            novelty, accuracy = (trial.metrics.get(f"{prefix}{m}") for m in ("novelty", "accuracy_mean"))
            if isinstance(novelty, float) and isinstance(accuracy, float):
                points.setdefault(name or tables.label(trial.config), []).append((novelty, accuracy))
    return {name: list(dict.fromkeys(values)) for name, values in points.items()}


def _recovery_drawings(sweep: SweepRecord, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> list[Drawing]:
    drawings = []
    done = [t for t in sweep.trials.values() if "recover/layer_sizes" in t.metrics]
    if done:
        sizes = [sum(t.metrics["recover/layer_sizes"]) for t in done]
        true = {round(s / (1 + t.metrics["recover/size_overhead"])) for s, t in zip(sizes, done, strict=True)}
        labels = [tables.label(t.config) for t in done]
        verified = [bool(t.metrics["recover/verified"]) for t in done]
        told = ", ".join(
            f"{name}: {size}{'' if ok else ' (not verified)'}"
            for name, size, ok in zip(labels, sizes, verified, strict=True)
        )
        drawings.append(
            Drawing(
                "sizes",
                f"Hidden neurons recovered, by {tables.heading(sweep)}",
                f"Recovered hidden neurons: {told}.",
                figures.recovered_sizes(labels, sizes, verified, true.pop() if len(true) == 1 else None),
            )
        )
    best = _most_students(done, arrays)
    if best is None:
        return drawings
    label, data = tables.label(best.config), arrays[best.trial]
    merges, cut, cluster_V = data["layer1_merges"], float(data["layer1_cut"]), data["layer1_cluster"]
    drawings.append(
        Drawing(
            "dendrogram",
            f"Clustering of the students' neurons ({tables.heading(sweep)} {label})",
            f"{cluster_V.max() + 1} clusters are kept below the cut at {cut:.1e}, of {len(cluster_V)} neurons.",
            figures.dendrogram(merges, cut, cluster_V),
        )
    )
    drawings.append(
        Drawing(
            "similarity",
            f"Similarity of the students' neurons ({tables.heading(sweep)} {label})",
            "Neurons of one cluster point the same way (cosine 1) and form blocks on the diagonal.",
            figures.similarity(data["layer1_similarity"], cluster_V),
        )
    )
    return drawings


def _most_students(trials: Sequence[TrialRecord], arrays: Mapping[str, Mapping[str, np.ndarray]]) -> TrialRecord | None:
    """The trial whose clustering shows most: the one with the most neurons clustered."""
    clustered = [t for t in trials if len(arrays.get(t.trial, {}).get("layer1_merges", ())) > 1]
    return max(clustered, key=lambda t: len(arrays[t.trial]["layer1_merges"]), default=None)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


DRAWINGS = {"autoencoder": _autoencoder_drawings, "expand_cluster": _recovery_drawings}


# -- the page ---------------------------------------------------------------------------------------------------------


def _page(about: Mapping[str, Any], sections: Sequence[str], tracker: Tracker) -> str:
    warning = ""
    if about["smoke"]:
        warning = '<p class="warn">This was a smoke run: every stage at its smallest. The numbers mean nothing.</p>'
    zoos = "; ".join(
        f"{name}: {z['models']} models, {z['states']} states of {z['architecture']} "
        f"({z['parameters']:,} parameters) on {z['images']}"
        for name, z in about["zoos"].items()
    )
    facts = {
        "Finished": about["finished"],
        "Took": duration(about["seconds"]),
        "Machine": about["machine"],
        "Zoos": zoos or "none",
        "Seed": about["seed"],
        "Versions": ", ".join(f"{k} {v}" for k, v in {"distrecon": about["distrecon"], **about["versions"]}.items()),
        "MLflow": tracker.uri,
    }
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    body = f"<h1>distrecon: sweeps</h1>{warning}<dl>{items}</dl>{''.join(sections)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>distrecon report</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _section(sweep: SweepRecord, drawings: Sequence[Drawing], tracker: Tracker) -> str:
    seconds = (sweep.ended - sweep.started) if sweep.ended and sweep.started else 0.0
    introduction = (
        f"{len(sweep.trials)} trials of kind {sweep.kind} in {duration(seconds)}; "
        f"objective {sweep.metric} ({sweep.mode})."
    )
    parts = [f"<h2>{html.escape(sweep.name)}</h2><p>{html.escape(introduction)}</p>", _table(sweep, tracker)]
    for drawing in drawings:
        svg = figures.inline_svg(drawing.figure, drawing.title, drawing.description)
        parts.append(
            f'<figure><h3>{html.escape(drawing.title)}</h3><div class="scroll">{svg}</div>'
            f"<figcaption>{html.escape(drawing.description)}</figcaption></figure>"
        )
    return "".join(parts)


def _table(sweep: SweepRecord, tracker: Tracker) -> str:
    run_ids, experiment = tracker.run_ids(sweep.name), tracker.experiment_id(sweep.name)
    remote = tracker.uri.startswith("http")
    columns = tables.COLUMNS[sweep.kind]
    head = "".join(f'<th title="{html.escape(c.meaning)}">{html.escape(c.heading)}</th>' for c in columns)
    best, body = sweep.best(), []
    for trial, row in zip(sweep.trials.values(), tables.rows(sweep), strict=True):
        run = run_ids.get(trial.trial, "")
        name = html.escape(run[:8])
        link = (
            f'<a href="{tracker.uri.rstrip("/")}/#/experiments/{experiment}/runs/{run}">{name}</a>' if remote else name
        )
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(
            f'<tr{" class=best" if trial is best else ""}>{cells}<td><code title="{run}">{link}</code></td></tr>'
        )
    errors = "".join(
        f"<li>{html.escape(tables.label(t.config))}: {html.escape(t.error)}</li>"
        for t in sweep.trials.values()
        if t.error
    )
    legend = "; ".join(tables.legend(sweep.kind))
    return (
        f'<div class="scroll"><table><thead><tr><th>{html.escape(tables.heading(sweep))}</th>{head}'
        f"<th>MLflow run</th></tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="soft">* best by {html.escape(sweep.metric)}. {html.escape(legend)}.</p>'
        + (f'<p class="warn">Failed:</p><ul>{errors}</ul>' if errors else "")
    )
