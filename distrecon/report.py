"""report.html of the main job: one self-contained page with what was run, the tables, and figures drawn for reading."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrecon import figures, tables
from distrecon.cluster.journal import SweepRecord
from distrecon.cluster.sweeps import Place
from distrecon.console import duration
from distrecon.drawings import Drawing, drawings
from distrecon.tracking import Tracker
from distrecon.zoos.storage import store

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #222222; --soft: #5c5c5c; --line: #d8d8d8; --mark: #0b5fa5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e4e4e4; --soft: #a5a5a5; --line: #3a3d42; --mark: #7ab8f5; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 60rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.soft, figcaption, dt { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tr.best td { font-weight: 600; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; max-height: 32rem;
  color: var(--ink); fill: currentColor; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dd { margin: 0; }
code { font-size: .9em; } .warn { border-left: 4px solid #d55e00; padding: .5rem 1rem; }
a { color: var(--mark); }
"""


@dataclass
class Files:
    """What a report consists of: the page, and per sweep its figures and each trial's models."""

    page: Path
    summary: Path
    figures: dict[str, list[Path]] = field(default_factory=dict)
    models: dict[str, dict[str, list[Path]]] = field(default_factory=dict)


def write(
    folder: Path, sweeps: Sequence[SweepRecord], place: Place, about: Mapping[str, Any], tracker: Tracker
) -> Files:
    """Fetches the trials' models and arrays, draws, and writes figures/*.png, models/ and report.html."""
    files = Files(folder / "report.html", folder / "summary.json")
    (folder / "figures").mkdir(exist_ok=True)
    sections = []
    for sweep in sweeps:
        arrays = fetch(sweep, place, folder / "models", files)
        made = drawings(sweep, arrays)
        files.figures[sweep.name] = []
        for drawing in made:
            path = folder / "figures" / f"{sweep.name}-{drawing.name}.png"
            figures.save_png(drawing.figure, path)
            files.figures[sweep.name].append(path)
        sections.append(_section(sweep, made, tracker))
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
        "Commit": about["commit"] or "not a checkout",
        "Versions": ", ".join(f"{k} {v}" for k, v in {"distrecon": about["distrecon"], **about["versions"]}.items()),
        "MLflow": tracker.look,
    }
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    body = f"<h1>distrecon: sweeps</h1>{warning}<dl>{items}</dl>{''.join(sections)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>distrecon report</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _section(sweep: SweepRecord, made: Sequence[Drawing], tracker: Tracker) -> str:
    seconds = (sweep.ended - sweep.started) if sweep.ended and sweep.started else 0.0
    introduction = (
        f"{len(sweep.trials)} trials of kind {sweep.kind} in {duration(seconds)}; "
        f"objective {sweep.metric} ({sweep.mode})."
    )
    parts = [f"<h2>{html.escape(sweep.name)}</h2><p>{html.escape(introduction)}</p>", _table(sweep, tracker)]
    for drawing in made:
        svg = figures.inline_svg(drawing.figure, drawing.title, drawing.description)
        parts.append(
            f'<figure><h3>{html.escape(drawing.title)}</h3><div class="scroll">{svg}</div>'
            f"<figcaption>{html.escape(drawing.description)}</figcaption></figure>"
        )
    return "".join(parts)


def _table(sweep: SweepRecord, tracker: Tracker) -> str:
    columns = tables.COLUMNS[sweep.kind]
    head = "".join(f'<th title="{html.escape(c.meaning)}">{html.escape(c.heading)}</th>' for c in columns)
    best, body = sweep.best(), []
    for trial, row in zip(sweep.trials.values(), tables.rows(sweep), strict=True):
        url = tracker.run_url(sweep.name, trial.trial)
        link = f'<a href="{html.escape(url)}">{url.rsplit("/", 1)[1][:8]}</a>' if url else "-"
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f"<tr{' class=best' if trial is best else ''}>{cells}<td>{link}</td></tr>")
    errors = "".join(
        f"<li>{html.escape(tables.label(t.config))}: {html.escape(t.error)}</li>"
        for t in sweep.trials.values()
        if t.error
    )
    legend = "; ".join(tables.legend(sweep.kind))
    load = ""
    if sweep.kind == "autoencoder" and best and (url := tracker.run_url(sweep.name, best.trial)):
        line = f'distrecon.load_autoencoder("runs:/{url.rsplit("/", 1)[1]}")'
        load = f'<p class="soft">The best autoencoder in Python: <code>{html.escape(line)}</code></p>'
    return (
        f'<div class="scroll"><table><thead><tr><th>{html.escape(tables.heading(sweep))}</th>{head}'
        f"<th>MLflow run</th></tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="soft">* best by {html.escape(sweep.metric)}. {html.escape(legend)}.</p>'
        + load
        + (f'<p class="warn">Failed:</p><ul>{errors}</ul>' if errors else "")
    )
