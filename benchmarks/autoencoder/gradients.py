"""Predicted against autograd gradients, and structural against behavioural ones by layer."""

from pathlib import Path

from benchmarks.autoencoder.bench import RESIDUAL, Bench, Column, Row, Tables, Values
from distrecon.autoencoder import gradients
from distrecon.autoencoder.model import decode_latents
from distrecon.report import figures

SCALES = (0.001, 0.01, 0.1, 0.3, 1.0)
MODELS, QUERIES = 60, 128
CASES: dict[str, Values] = {"Fisher residual": RESIDUAL, "transformer": {}}

TABLES: Tables = {
    "cosine of predicted and autograd gradient by the scale of delta (1: as it is)": tuple(
        Column(f"delta x {scale:g}", f"{scale:g}", 1, 3) for scale in SCALES
    ),
    "by layer at delta as it is: cosines with autograd's, shares of the norm": (
        Column("predicted_cosine", "predicted"),
        Column("structural_cosine", "structural"),
        Column("structural_share", "struct. share"),
        Column("behavioral_share", "behav. share"),
    ),
}


def run(bench: Bench) -> None:
    """Both coders with every seed, and a figure of the first seed's."""
    for seed in range(bench.seeds):
        for case, values in CASES.items():
            bench.cell(case, seed, lambda c=case, v=values, s=seed: _coder(bench, c, v, s))  # type: ignore[misc]
    layers = [layer.name for layer in bench.zoo.arch.layers]
    first = {row["case"]: row for row in bench.rows if row["seed"] == 0}
    curves = {case: [(scale, first[case][f"delta x {scale:g}"]) for scale in SCALES] for case in CASES if case in first}
    shares = {
        case: {
            kind: [first[f"{case}, {layer}"][f"{kind}_share"] for layer in layers]
            for kind in ("structural", "behavioral")
        }
        for case in curves
    }
    figures.save_png(figures.gradient_analysis(layers, shares, curves), Path(bench.folder) / "gradients.png")


def _coder(bench: Bench, case: str, values: Values, seed: int) -> list[Row]:
    zoo, (autoencoder, _) = bench.zoo, bench.autoencoder(values, seed)
    theta_BP = autoencoder.canonical(zoo.test.theta_BP[:MODELS], 0)
    hat_BP = decode_latents(autoencoder, autoencoder.encode(theta_BP).detach())
    inputs = zoo.images.train.images[:QUERIES]
    curve = gradients.cosine_curve(zoo.arch, theta_BP, hat_BP, inputs, SCALES)
    rows: list[Row] = [{f"delta x {s:g}": float(c) for s, c in zip(SCALES, curve, strict=True)}]
    found = gradients.analyse(zoo.arch, theta_BP, hat_BP, inputs)
    structural_LB = found.structural_norm_LB / found.structural_norm_LB.norm(dim=0)
    behavioral_LB = found.behavioral_norm_LB / found.behavioral_norm_LB.norm(dim=0)
    for i, layer in enumerate(zoo.arch.layers):
        rows.append(
            {
                "case": f"{case}, {layer.name}",
                "predicted_cosine": float(found.cosine_LB[i].mean()),
                "structural_cosine": float(found.structural_cosine_LB[i].mean()),
                "structural_share": float(structural_LB[i].mean()),
                "behavioral_share": float(behavioral_LB[i].mean()),
            }
        )
    return rows
