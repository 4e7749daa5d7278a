"""report.html: one self-contained page with what was run, the tables, and figures drawn for reading."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrecon.console import duration
from distrecon.files import write_text
from distrecon.record.artifacts import fetch
from distrecon.record.folder import RunFolder
from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Drawing, Kind, Table
from distrecon.record.tracking import Tracker
from distrecon.report import figures, tables, trends

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
    """What was drawn and fetched: per sweep its figures, as files and for the page, and each trial's models."""

    figures: dict[str, list[Path]] = field(default_factory=dict)
    inline: dict[str, str] = field(default_factory=dict)
    models: dict[str, dict[str, list[Path]]] = field(default_factory=dict)


def draw(folder: RunFolder, sweeps: Sequence[SweepRecord], kinds: Mapping[str, Kind]) -> Files:
    """Fetches the trials' models and arrays, draws, and writes figures/*.png and models/."""
    files = Files()
    folder.figures.mkdir(exist_ok=True)
    for sweep in sweeps:
        stored = {
            trial: fetch(f"{folder.trials(sweep.name)}/{trial}", folder.models / sweep.name / trial)
            for trial in sweep.trials
        }
        files.models[sweep.name] = {trial: models for trial, (_, models) in stored.items()}
        kind, arrays = kinds[sweep.kind], {trial: arrays for trial, (arrays, _) in stored.items() if arrays}
        overview = trends.trends(sweep)
        drawings = [*([overview] if overview else []), *kind.drawings(sweep, arrays)]
        small = [table for make in kind.tables if (table := make(sweep, arrays)) is not None]
        files.figures[sweep.name] = [folder.figures / f"{sweep.name}-{drawing.name}.png" for drawing in drawings]
        for drawing, path in zip(drawings, files.figures[sweep.name], strict=True):
            figures.save_png(drawing.figure, path)
        files.inline[sweep.name] = _drawn(trends.advice(sweep, kind), small, drawings)
    return files


def write(
    folder: RunFolder,
    sweeps: Sequence[SweepRecord],
    kinds: Mapping[str, Kind],
    about: Mapping[str, Any],
    files: Files,
    tracker: Tracker,
) -> None:
    """Writes report.html."""
    sections = [_section(sweep, kinds[sweep.kind], files.inline[sweep.name], tracker) for sweep in sweeps]
    write_text(folder.page, _page(", ".join(sweep.name for sweep in sweeps), about, sections, tracker))


# -- the page ---------------------------------------------------------------------------------------------------------


def _page(title: str, about: Mapping[str, Any], sections: Sequence[str], tracker: Tracker) -> str:
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
        "MLflow": tracker.viewer,
    }
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    body = f"<h1>distrecon: {html.escape(title)}</h1>{warning}<dl>{items}</dl>{''.join(sections)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>distrecon report</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _section(sweep: SweepRecord, kind: Kind, drawn: str, tracker: Tracker) -> str:
    count = len(sweep.trials)
    introduction = (
        f"{count} trial{'' if count == 1 else 's'} of kind {kind.name} in {duration(sweep.seconds)}; "
        f"objective {sweep.metric} ({sweep.mode})."
    )
    return f"<h2>{html.escape(sweep.name)}</h2><p>{html.escape(introduction)}</p>{_table(sweep, kind, tracker)}{drawn}"


def _drawn(told: Sequence[str], small: Sequence[Table], drawings: Sequence[Drawing]) -> str:
    """What to try next, the small tables and the figures."""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in told)
    advice = f"<h3>What to try next</h3><ul>{items}</ul>" if told else ""
    return advice + "".join(map(_small, small)) + "".join(map(_figure, drawings))


def _figure(drawing: Drawing) -> str:
    svg = figures.inline_svg(drawing.figure, drawing.title, drawing.description)
    return (
        f'<figure><h3>{html.escape(drawing.title)}</h3><div class="scroll">{svg}</div>'
        f"<figcaption>{html.escape(drawing.description)}</figcaption></figure>"
    )


def _small(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    shown = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    note = f"<p{' class=soft' if table.rows else ''}>{html.escape(table.note)}</p>"
    return f"<h3>{html.escape(table.title)}</h3>{shown if table.rows else ''}{note}"


def _table(sweep: SweepRecord, kind: Kind, tracker: Tracker) -> str:
    head = "".join(f'<th title="{html.escape(m.meaning)}">{html.escape(m.heading)}</th>' for m in kind.columns)
    best, body = sweep.best(), []
    for trial, row in zip(sweep.trials.values(), tables.rows(sweep, kind), strict=True):
        url = tracker.run_url(sweep.name, trial.trial)
        link = f'<a href="{html.escape(url)}">{url.rsplit("/", 1)[1][:8]}</a>' if url else "-"
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f"<tr{' class=best' if trial is best else ''}>{cells}<td>{link}</td></tr>")
    errors = "".join(
        f"<li>{html.escape(tables.label(t.config))}: {html.escape(t.error)}</li>"
        for t in sweep.trials.values()
        if t.error
    )
    legend = "; ".join(tables.legend(kind))
    offer = ""
    if kind.offer and best and (url := tracker.run_url(sweep.name, best.trial)):
        what, line = kind.offer
        code = html.escape(line.format(run=f"runs:/{url.rsplit('/', 1)[1]}"))
        offer = f'<p class="soft">{html.escape(what)}: <code>{code}</code></p>'
    if url := tracker.compare_url(sweep.name):
        offer += f'<p class="soft"><a href="{html.escape(url)}">Compare the trials in MLflow</a></p>'
    return (
        f'<div class="scroll"><table><thead><tr><th>{html.escape(tables.heading(sweep))}</th>{head}'
        f"<th>MLflow run</th></tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="soft">* best by {html.escape(sweep.metric)}. {html.escape(legend)}.</p>'
        + offer
        + (f'<p class="warn">Failed:</p><ul>{errors}</ul>' if errors else "")
    )
