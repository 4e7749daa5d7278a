"""The report is one page that stands alone, says in words what its figures show, and renders in a real browser."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage

from distrecon.expand_cluster.shown import OF_OUTPUTS
from distrecon.kinds import KINDS
from distrecon.record.folder import RunFolder
from distrecon.record.journal import SweepRecord
from distrecon.record.tracking import Tracker
from distrecon.report import figures
from distrecon.report import page as report

LAYERS = ("conv1", "conv2", "fc1", "fc2")
ABOUT = {
    "distrecon": "0.1.0",
    "smoke": False,
    "seed": 0,
    "seconds": 283.0,
    "finished": "2026-01-01 12:00:00",
    "machine": "2 CPUs, 0 GPUs, Linux x86_64",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "versions": {"torch": "2.13.0", "ray": "2.60.0", "mlflow": "3.17.2"},
    "zoos": {
        "digits": {
            "models": 1008,
            "states": 3024,
            "architecture": "cnn_small",
            "parameters": 1198,
            "images": "digits",
        }
    },
}
WIDTHS = (400, 1100)
FIGURES = 15  # of the three sweeps together


def autoencoders(rng):
    record = SweepRecord("loss_weights", "autoencoder", "reconstruct/agreement_on_errors", "max", 4, 1.0, 200.0)
    arrays = {}
    for i, terms in enumerate(("C+S", "C+B", "S+B", "C+S+B")):
        event = {"event": "started", "trial": f"t{i}", "config": {"loss.terms": terms}, "time": 0.0}
        record.apply(event)
        for epoch in range(1, 9):
            found = {f"loss/{n}": 2.0 / epoch + i for n in ("contrastive", "structural", "behavioral")}
            record.apply({"event": "metrics", "trial": f"t{i}", "epoch": epoch, "metrics": found, "time": 1.0})
        metrics = {"reconstruct/agreement_on_errors": 0.3 + 0.05 * i, "reconstruct/agreement": 0.7}
        for prefix, at in (("", 0.4 + 0.1 * i), ("baseline_noise/", 0.3), ("baseline_heldout/", 1.0)):
            metrics |= {f"generate/{prefix}novelty": at, f"generate/{prefix}accuracy_mean": 0.9 - 0.3 * at}
        record.apply({"event": "metrics", "trial": f"t{i}", "epoch": 9, "metrics": metrics, "time": 1.0})
        record.apply({"event": "finished", "trial": f"t{i}", "status": "completed", "error": None, "time": 2.0})
        arrays[f"t{i}"] = {
            "layers": np.array(LAYERS),
            "reconstruct/accuracy": rng.uniform(0.5, 0.95, (2, 150)),
            "reconstruct/agreement_matrix": np.clip(0.5 * np.eye(40) + rng.uniform(0.3, 0.5, (40, 40)), 0, 1),
            "generate/accuracy": rng.uniform(0.6, 0.9, 100),
            "generate/relatives": rng.uniform([[0.2], [0.6]], [[1.2], [0.9]], (2, 100)),
            "map/share": np.array([0.31, 0.12]),
            "map/train": np.c_[rng.normal(size=(300, 2)), rng.uniform(0.3, 0.9, 300)],
            "map/heldout": np.c_[rng.normal(size=(90, 2)), rng.uniform(0.3, 0.9, 90)],
            "map/generated": np.c_[0.5 * rng.normal(size=(100, 2)), rng.uniform(0.6, 0.9, 100)],
            "gradients/structural_share": rng.uniform(0.2, 0.7, 4),
            "gradients/behavioral_share": rng.uniform(0.2, 0.7, 4),
            "gradients/structural_cosine": rng.uniform(-0.2, 0.3, 4),
            "gradients/predicted_cosine": rng.uniform(0.8, 1.0, 4),
        }
    return record, arrays


def recoveries(rng):
    record = SweepRecord("student_counts", "expand_cluster", "recover/max_cosine_distance", "min", 4, 1.0, 90.0)
    arrays = {}
    for i, count in enumerate((1, 2, 10)):
        record.apply({"event": "started", "trial": f"r{i}", "config": {"students.count": count}, "time": 0.0})
        metrics = {"recover/layer_sizes": [20 + i], "recover/size_overhead": i / 20, "recover/verified": float(i < 2)}
        metrics |= {"recover/max_cosine_distance": 10.0 ** -(20 + i)}
        record.apply({"event": "metrics", "trial": f"r{i}", "epoch": 0, "metrics": metrics, "time": 1.0})
        record.apply({"event": "finished", "trial": f"r{i}", "status": "completed", "error": None, "time": 2.0})
        centres = rng.normal(size=(20, 8))
        vectors = np.repeat(centres, count + 1, 0) + 1e-6 * rng.normal(size=(20 * (count + 1), 8))
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        weights = rng.normal(size=(20, 64))
        arrays[f"r{i}"] = {
            "first_layer": weights,
            "first_layer_teacher": weights + 1e-9,
            **{f"certificate/{name}": rng.uniform(1e-3, 1, 13) for name in OF_OUTPUTS},
            "verdict": np.array([f"Verified: {count} <students>", "smooth: no kink; not relu", "<students>"]),
            "certificate/answers": np.array([16000, 1250, 3]),
            "certificate/hidden_share": np.array(0.0024),
            "layer1_merges": linkage(unit, "average"),
            "layer1_cut": np.array(1e-3),
            "layer1_cluster": np.repeat(np.arange(20), count + 1),
            "layer1_similarity": np.abs(unit @ unit.T).astype(np.float16),
        }
    record.apply({"event": "started", "trial": "r3", "config": {"students.count": 4}, "time": 0.0})
    error = "probes.count (5) is too small: " + "a_long_word_without_any_place_to_break_" * 4 + "<script>"
    record.apply({"event": "finished", "trial": "r3", "status": "failed", "error": error, "time": 2.0})
    return record, arrays


def latents():
    """Three sizes of the latent with two seeds each; a larger latent is better, and the loss falls to the end."""
    record = SweepRecord("latents", "autoencoder", "reconstruct/agreement", "max", 6, 1.0, 90.0)
    for i, (size, seed) in enumerate((s, r) for s in (4, 8, 16) for r in (0, 1)):
        config = {"model.latent": size, "seed": seed}
        record.apply({"event": "started", "trial": f"l{i}", "config": config, "time": 0.0})
        for epoch in range(1, 9):
            event = {"event": "metrics", "trial": f"l{i}", "epoch": epoch, "time": 1.0}
            record.apply({**event, "metrics": {"loss/total": 8.0 / epoch}})
        found = {"reconstruct/agreement": 0.5 + size / 40 + seed / 100, "reconstruct/refined/agreement": 0.97}
        record.apply({"event": "metrics", "trial": f"l{i}", "epoch": 8, "metrics": found, "time": 1.0})
        record.apply({"event": "finished", "trial": f"l{i}", "status": "completed", "error": None, "time": 2.0})
    return record, {}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of both kinds of sweep, written as a run writes it: its page and its records."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(1)
    records = []
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sent = {}
    for record, arrays in (autoencoders(rng), recoveries(rng), latents()):
        records.append(record)
        sent[record.name] = {"offset": 0, "experiment": "1", "runs": {t: f"{t}{'0' * 30}" for t in record.trials}}
        for trial, values in arrays.items():
            target = folder / "trials" / record.name / trial / "artifacts"
            target.mkdir(parents=True)
            np.savez(target / "arrays.npz", **values)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    (folder / "tracking.json").write_text(json.dumps({"uri": uri, "sweeps": sent}))
    tracker = Tracker(RunFolder(folder), [r.name for r in records], {})
    files = report.draw(RunFolder(folder), records, KINDS)
    report.write(RunFolder(folder), records, KINDS, ABOUT, files, tracker)
    patch.undo()
    return (folder / "report.html").read_text(), records, folder


def test_every_figure_is_there_with_words_in_its_place(written):
    page, records, folder = written
    drawn = {r.name: len(list((folder / "figures").glob(f"{r.name}-*.png"))) for r in records}
    assert drawn == {"loss_weights": 8, "student_counts": 5, "latents": 2}
    count = sum(drawn.values())
    assert page.count("<figure>") == page.count('<svg role="img"') == page.count("<desc>") == count == FIGURES
    said = [html.unescape(words) for words in re.findall(r"<desc>(.*?)</desc>", page)]
    assert said == [html.unescape(words) for words in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    assert min(len(words) for words in said) > 40
    for words in (
        "structural: conv1 0.",
        "original, 0.40",
        "held-out good models: 0.60 at 1.00",
        "10: 22 (not verified)",
        "31 % and 12 % of their variance",
        "20 of 20 neurons, each a picture of its 64 weights",
        "model.latent: 4 0.605, 8 0.705, 16 0.905",
        "Means over 2 seeds",
        "model.latent, refined: 4 0.970",
    ):
        assert words in page


def test_the_verdict_and_what_was_found_are_told_in_words(written):
    told = written[0][written[0].index("<h3>Verdict (students.count 10)</h3>") :]
    assert told[: told.index("<h3>", 4)].endswith(
        "<p>Verified: 10 &lt;students&gt;. Found: smooth: no kink; not relu.</p>"
    )


def test_the_certificate_is_a_table_of_the_outputs_that_disagree_most(written):
    page = html.unescape(written[0])
    table = page[page.index("<h3>Certificate (students.count") :]
    rows = re.findall(r"<tr>(<td>.*?)</tr>", table[: table.index("</table>")])
    shares = [float(re.findall(r"<td>([^<]*)</td>", row)[4].removesuffix(" %")) for row in rows]
    assert len(shares) == 12
    assert shares == sorted(shares, reverse=True)
    for words in ("16000 answers of the run and 1250 fresh ones", "less than 0.24 %", "1 outputs that agree better"):
        assert words in table


def test_the_report_says_what_to_try_next(written):
    assert "model.latent is best at the largest value tried, 16: try larger ones." in written[0]
    assert "loss/total of the best still fell by 25 % in the last quarter of its 8 epochs: train longer." in written[0]


def test_a_notebook_shows_a_figure_as_it_is():
    figure = figures.agreement(np.eye(3))
    assert "<svg" in figure._repr_svg_()


def test_the_page_stands_alone(written):
    page = written[0]
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)
    assert set(re.findall(r'<a href="(\w+):', page)) == {"http"}, "links, nothing that a page loads"
    assert "&lt;script&gt;" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_trial_links_to_its_mlflow_run(written):
    page, records, _ = written
    for record in records:
        for trial in record.trials:
            assert f"http://127.0.0.1:5000/#/experiments/1/runs/{trial}{'0' * 30}" in page
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in page
    assert page.count("http://127.0.0.1:5000/#/compare-runs?runs=%5B%22") == len(records)
    assert html.escape('distrecon.load_autoencoder("runs:/t3') in page


# -- in a browser -----------------------------------------------------------------------------------------------------

MEASURE = """
<!doctype html><title>harness</title><body><script>
const source = %s, found = [], frames = [];
for (const width of %s) for (const scheme of ["light", "dark"]) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:800px;border:0;color-scheme:${scheme}`;
  frames.push(new Promise(done => frame.onload = () => {
    const root = frame.contentDocument.documentElement, body = frame.contentDocument.body;
    const wide = [...body.querySelectorAll("body *")].filter(e => !e.closest(".scroll")
      && e.getBoundingClientRect().right > width + 1).map(e => e.tagName);
    const svg = [...body.querySelectorAll("svg[role=img]")].map(e => e.getBoundingClientRect());
    const style = frame.contentWindow.getComputedStyle(body);
    const link = frame.contentWindow.getComputedStyle(body.querySelector("a")).color;
    found.push({width, scheme, scroll: root.scrollWidth, wide, drawn: svg.filter(r => r.width > 300 && r.height > 150)
      .length, ink: style.color, paper: style.backgroundColor, link});
    done();
  }));
  frame.srcdoc = source;
  document.body.append(frame);
}
Promise.all(frames).then(() => document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>");
</script>
"""


@pytest.fixture(scope="module")
def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here: the report was not looked at in a browser")


def browse(chromium, folder, *arguments):
    done = subprocess.run(
        [
            chromium,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=10000",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def contrast(one, other):
    """WCAG's contrast ratio of two CSS colours like rgb(1, 2, 3)."""

    def luminance(colour):
        channels = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_renders_without_errors_at_two_widths_in_light_and_dark(written, chromium, tmp_path):
    page, _, _ = written
    harness = tmp_path / "harness.html"
    harness.write_text(MEASURE % (json.dumps(page).replace("</", "<\\/"), json.dumps(WIDTHS)))
    dom, console = browse(chromium, tmp_path, "--dump-dom", f"file://{harness}")
    assert console == []
    found = json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", dom, re.DOTALL)[1]))
    assert {(f["width"], f["scheme"]) for f in found} == {(w, s) for w in WIDTHS for s in ("light", "dark")}
    for look in found:
        assert look["scroll"] <= look["width"], look
        assert look["wide"] == [], look
        assert look["drawn"] == FIGURES
        assert contrast(look["ink"], look["paper"]) >= 7
        assert contrast(look["link"], look["paper"]) >= 4.5
    papers = {scheme: {f["paper"] for f in found if f["scheme"] == scheme} for scheme in ("light", "dark")}
    assert papers["light"].isdisjoint(papers["dark"])


def test_it_has_no_console_errors_as_a_file(written, chromium, tmp_path):
    dom, console = browse(chromium, tmp_path, "--dump-dom", f"file://{written[2] / 'report.html'}")
    assert console == []
    assert dom.count("<figure>") == written[0].count("<figure>")
