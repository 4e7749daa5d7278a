"""The tables of "Structure Is Not Enough" (arXiv 2503.17138) for five combinations of losses: the plain transformer."""

from benchmarks.autoencoder.bench import Bench, Column, Row, Tables, percent
from distrecon.autoencoder import generate, run_tasks
from distrecon.nets import evaluate

COMBINATIONS = ("C+S", "B", "C+B", "S+B", "C+S+B")
FINETUNE_EPOCHS = 5  # as in the paper

TABLES: Tables = {
    "prediction (R2 on held-out models) and reconstruction (agreement in %)": (
        Column("predict/test_accuracy_r2", "R2 acc"),
        Column("predict/generalization_gap_r2", "R2 gap"),
        percent("reconstruct/agreement", "agreement"),
        percent("reconstruct/agreement_on_errors", "on errors"),
        percent("reconstruct/own_nearest", "own"),
        Column("reconstruct/weight_l2", "weight L2", 1, 1),
    ),
    "best accuracy minus the zoo's best (points); how new generated models are": (
        percent("reconstructed", "reconstr."),
        percent("generated", "generated"),
        percent("finetuned", "fine-tuned"),
        Column("generate/novelty", "novelty"),
        Column("generate/diversity_l2", "pair L2", 1, 1),
        Column("training_seconds", "train s", 1, 0),
    ),
}


def run(bench: Bench) -> None:
    """Every combination with every seed, equal epochs; weight statistics as the probe's baseline."""
    for seed in range(bench.seeds):
        for terms in COMBINATIONS:
            bench.cell(terms, seed, lambda t=terms, s=seed: _combination(bench, t, s))  # type: ignore[misc]


def _combination(bench: Bench, terms: str, seed: int) -> list[Row]:
    zoo = bench.zoo
    autoencoder, seconds = bench.autoencoder({} if terms == "C+S+B" else {"loss.terms": terms}, seed)
    done = run_tasks(autoencoder, zoo.train, zoo.validation, zoo.test, zoo.images)
    found, best = done.metrics, float(zoo.test.test_accuracy_B.max())
    tuned_MP = generate.finetuned(zoo.arch, done.generated_theta_BP, zoo.images, FINETUNE_EPOCHS, seed)
    tuned_M = evaluate(zoo.arch, tuned_MP, zoo.images.test.images, zoo.images.test.labels_Q).accuracy_B
    keys = [column.key for columns in TABLES.values() for column in columns if column.key in found]
    row: Row = {key: found[key] for key in [*keys, "generate/accuracy_mean", "reconstruct/accuracy_mean"]}
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
