"""The tables of "Structure Is Not Enough" (arXiv 2503.17138) for five combinations of losses: the plain transformer."""

from benchmarks.autoencoder.bench import Bench, part
from benchmarks.harness import Row, percent, spread
from distrecon.autoencoder import generate, run_tasks
from distrecon.nets import evaluate

COMBINATIONS = ("C+S", "B", "C+B", "S+B", "C+S+B")
FINETUNE_EPOCHS = 5  # as in the paper
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
        spread("train s", "training_seconds", 1, 0),
    ),
}


def combination(zoo: Bench, terms: str, seed: int) -> list[Row]:
    """Equal epochs for all; weight statistics as the probe's baseline."""
    autoencoder, seconds = zoo.autoencoder({} if terms == "C+S+B" else {"loss.terms": terms}, seed)
    done = run_tasks(autoencoder, zoo.train, zoo.validation, zoo.test, zoo.images)
    found, best = done.metrics, float(zoo.test.test_accuracy_B.max())
    tuned_MP = generate.finetuned(zoo.arch, done.generated_theta_BP, zoo.images, FINETUNE_EPOCHS, seed)
    tuned_M = evaluate(zoo.arch, tuned_MP, zoo.images.test.images, zoo.images.test.labels_Q).accuracy_B
    row: Row = {key: found[key] for key in KEPT}
    row |= {
        "reconstructed": found["reconstruct/accuracy_max"] - best,
        "generated": found["generate/accuracy_max"] - best,
        "finetuned": float(tuned_M.max()) - best,
        "finetuned/accuracy_mean": float(tuned_M.mean()),
        "training_seconds": seconds,
    }
    baseline = {
        f"predict/{name}_r2": found[f"predict/baseline_statistics/{name}_r2"]
        for name in ("test_accuracy", "generalization_gap")
    }
    return [row] if terms != COMBINATIONS[0] or seed else [row, {"case": "weight statistics"} | baseline]


PARTS = {"losses": part(dict.fromkeys(COMBINATIONS, combination), TABLES)}
