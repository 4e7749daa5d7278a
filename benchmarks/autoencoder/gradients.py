"""Predicted against autograd gradients, and structural against behavioural ones by layer."""

from argparse import Namespace
from collections.abc import Sequence

from benchmarks.autoencoder.bench import RESIDUAL, Bench, Values, part
from benchmarks.harness import Row, spread
from distrecon.autoencoder import gradients
from distrecon.autoencoder.model import decode_latents
from distrecon.report import figures

SCALES = (0.001, 0.01, 0.1, 0.3, 1.0)
MODELS, QUERIES = 60, 128
CASES: dict[str, Values] = {"Fisher residual": RESIDUAL, "transformer": {}}

TABLES = {
    "cosine of predicted and autograd gradient by the scale of delta (1: as it is)": tuple(
        spread(f"{scale:g}", f"delta x {scale:g}", 1, 3) for scale in SCALES
    ),
    "by layer at delta as it is: cosines with autograd's, shares of the norm": (
        spread("predicted", "predicted_cosine"),
        spread("structural", "structural_cosine"),
        spread("struct. share", "structural_share"),
        spread("behav. share", "behavioral_share"),
    ),
}


def coder(zoo: Bench, case: str, seed: int) -> list[Row]:
    """A row for the scales of delta, and one a layer."""
    autoencoder, _ = zoo.autoencoder(CASES[case], seed)
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


def pictures(rows: Sequence[Row], args: Namespace) -> None:
    """A figure of the first seed's."""
    first = {row["case"]: row for row in rows if row["seed"] == 0}
    curves = {case: [(scale, first[case][f"delta x {scale:g}"]) for scale in SCALES] for case in CASES if case in first}
    layers = [name.split(", ")[1] for name in first if name.startswith(f"{next(iter(curves))}, ")]
    shares = {
        case: {
            kind: [first[f"{case}, {layer}"][f"{kind}_share"] for layer in layers]
            for kind in ("structural", "behavioral")
        }
        for case in curves
    }
    figures.save_png(figures.gradient_analysis(layers, shares, curves), args.rows.with_suffix(".png"))


PARTS = {"gradients": part(dict.fromkeys(CASES, coder), TABLES, pictures)}
