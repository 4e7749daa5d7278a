"""Tables of the autoencoder: python -m benchmarks.autoencoder_tables PART --zoo ZOO [--seeds 3] [--out FOLDER].

Parts: `reconstruction` (kinds of coder, amortised and refined), `controls` (the same refinement in a random subspace
and from scratch), `losses` (the tables of "Structure Is Not Enough" for five combinations), `generation` (accuracy
against novelty by compute budget, with baselines), `gradients` (predicted against autograd gradients). Each prints
means and deviations over the seeds and writes them to FOLDER/PART.json; what is finished stays in FOLDER, and a second
call goes on from there. Nothing is chosen on test models or test images. One thread, no Ray.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.autoencoder import generation, gradients, losses, reconstruction
from benchmarks.autoencoder.bench import Bench, Tables, Zoo, summary, table

PARTS: dict[str, tuple[Callable[[Bench], None], Tables]] = {
    "reconstruction": (reconstruction.run, reconstruction.TABLES),
    "controls": (reconstruction.controls, reconstruction.TABLES),
    "losses": (losses.run, losses.TABLES),
    "generation": (generation.run, generation.TABLES),
    "gradients": (gradients.run, gradients.TABLES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--zoo", required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/autoencoder_tables/NAME_OF_THE_ZOO")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="cases whose names contain one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo, (run, tables) = Zoo(arguments.zoo), PARTS[arguments.part]
    folder = arguments.out or Path("runs/autoencoder_tables", zoo.name)
    bench = Bench(zoo, arguments.seeds, folder, arguments.part, arguments.only)
    run(bench)
    lines = summary(bench.rows)
    print(f"\n{arguments.part} on {zoo.name}: {len(zoo.test)} held-out states, {arguments.seeds} seeds, mean±deviation")
    for title, columns in tables.items():
        print("\n" + table(lines, columns, title))
    found = {"part": arguments.part, "zoo": zoo.name, "seeds": arguments.seeds, "summary": lines, "rows": bench.rows}
    (bench.folder / f"{arguments.part}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
