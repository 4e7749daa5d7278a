"""The tables of "Structure Is Not Enough" (arXiv 2503.17138) on a zoo, by one command.

Five combinations of losses, shares of the structural loss, query sets and the cycle loss, all of the plain transformer;
beside them the coders that need no training, and one of them refined. Weight statistics are the baseline of prediction.

    python -m benchmarks losses --zoo ZOO --seeds 1 --set model.latent=64 optim.epochs=6 --finetune 1 [--only C+S]
"""

import time

from benchmarks.autoencoder.bench import Bench, Values, part
from benchmarks.harness import Row, percent, spread
from distrecon.autoencoder import generate, run_tasks
from distrecon.autoencoder.tasks import judging
from distrecon.nets import evaluate

CASES: dict[str, Values] = {
    **{terms: {"loss.terms": terms} for terms in ("C+S", "B", "C+B", "S+B")},
    "C+S+B": {},
    "beta 0.1": {"loss.beta": 0.1},
    "beta 0.9": {"loss.beta": 0.9},
    "uniform queries": {"data.query_set": "uniform"},
    "data+uniform queries": {"data.query_set": "data+uniform"},
    "cycle 0.1": {"loss.lam": 0.1},
    "Kronecker map": {"model.kind": "kronecker_pca"},
    "Kronecker map, refined": {"model.kind": "kronecker_pca", "tasks.refine": 2},
    "activation map": {"model.kind": "activation_pca"},
}
KEPT = (
    "predict/test_accuracy_r2", "predict/generalization_gap_r2", "reconstruct/accuracy_mean", "reconstruct/agreement",
    "reconstruct/agreement_on_errors", "reconstruct/own_nearest", "reconstruct/weight_l2", "generate/accuracy_mean",
    "generate/novelty", "generate/diversity_l2",
)  # fmt: skip

TABLES = {
    "prediction (R2 on held-out models) and reconstruction (agreement in %)": (
        spread("R2 acc", "predict/test_accuracy_r2"),
        spread("R2 gap", "predict/generalization_gap_r2"),
        percent("agreement", "reconstruct/agreement"),
        percent("on errors", "reconstruct/agreement_on_errors"),
        percent("own", "reconstruct/own_nearest"),
        spread("weight L2", "reconstruct/weight_l2", 1, 1),
    ),
    "best accuracy minus the zoo's best (points); how new generated models are": (
        percent("reconstr.", "reconstructed"),
        percent("generated", "generated"),
        percent("fine-tuned", "finetuned"),
        spread("novelty", "generate/novelty"),
        spread("pair L2", "generate/diversity_l2", 1, 1),
    ),
    "CPU seconds": (
        spread("training", "training_seconds", 1, 0),
        spread("scoring", "scoring_seconds", 1, 0),
    ),
}


def coder(zoo: Bench, case: str, seed: int) -> list[Row]:
    """Equal epochs for all that are trained; weight statistics as the probe's baseline."""
    autoencoder, seconds = zoo.autoencoder(CASES[case], seed)
    start = time.process_time()
    done = run_tasks(autoencoder, zoo.train, zoo.validation, zoo.test, zoo.images)
    scoring = time.process_time() - start
    found, images = done.metrics, judging(zoo.images, autoencoder.config.tasks.images).test
    best = float(evaluate(zoo.arch, zoo.test.theta_BP, images.images, images.labels_Q).accuracy_B.max())
    if autoencoder.config.tasks.refine:
        refined = "reconstruct/refined/"
        found = found | {k.replace(refined, "reconstruct/"): v for k, v in found.items() if k.startswith(refined)}
    row: Row = {key: found[key] for key in KEPT}
    row |= {
        "reconstructed": found["reconstruct/accuracy_max"] - best,
        "generated": found["generate/accuracy_max"] - best,
        "training_seconds": seconds,
        "scoring_seconds": scoring,
    }
    if zoo.finetune_epochs:
        tuned_MP = generate.finetuned(zoo.arch, done.generated_theta_BP, zoo.images, zoo.finetune_epochs, seed)
        tuned_M = evaluate(zoo.arch, tuned_MP, images.images, images.labels_Q).accuracy_B
        row |= {"finetuned": float(tuned_M.max()) - best, "finetuned/accuracy_mean": float(tuned_M.mean())}
    baseline = {
        f"predict/{name}_r2": found[f"predict/baseline_statistics/{name}_r2"]
        for name in ("test_accuracy", "generalization_gap")
    }
    return [row] if case != "C+S" or seed else [row, {"case": "weight statistics"} | baseline]


PARTS = {"losses": part(dict.fromkeys(CASES, coder), TABLES)}
