"""Measures: how fast, how exact, how well.

    python -m benchmarks                                      # the parts of docs/performance.md, each in its process
    python -m benchmarks PART [PART ...] [options]            # some; `PART --help` lists the options of one
    python -m benchmarks --quick                              # small sizes: does it run, not how fast
    python -m benchmarks --page docs/performance.md           # and the tables of the page are replaced
    python -m benchmarks scaling s3_stream many_nodes --fresh --page docs/scaling.md

Parts marked * keep what is finished in runs/benchmarks/PART.jsonl (`--rows`) and go on from there; `--fresh` begins
anew. With `--json` everything is also written as JSON; parts that were not measured keep their entries there, and their
tables on the page. With `--device cuda` ours and the baselines run on the GPU, in the parts where that means something;
their tables are further ones, after those of the CPU.

A new part is a `harness.Part` in the `PARTS` of its module, and a line in the table below.
"""

import argparse
import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import harness
from benchmarks.harness import Part
from distrecon.errors import UserError


class Entry(NamedTuple):
    """Where a part is, its heading, whether it belongs to the suite of docs/performance.md and whether a GPU helps."""

    module: str
    title: str
    suite: bool = False
    gpu: bool = False


PARTS = {
    "behavioural": Entry("networks", "Behavioural loss, forward and backward", True, True),
    "threads": Entry("networks", "Two threads", True),
    "whole_step": Entry("steps", "A whole training step of the autoencoder", True, True),
    "tokens": Entry("steps", "Permutations and tokens", True, True),
    "contrastive": Entry("steps", "Contrastive loss, forward and backward", True, True),
    "zoo_training": Entry("networks", "Zoo training", True, True),
    "evaluation": Entry("networks", "Evaluation", True, True),
    "students": Entry("solvers", "Students", True),
    "linkage": Entry("solvers", "Clustering", True),
    "ray": Entry("pipeline", "Ray", True),
    "default_run": Entry("tune_run", "The default run", True),
    "growth": Entry("growth", "Growth of cost", True),
    "fake_gpu": Entry("fake_gpu.part", "What a GPU would be asked for, counted without one", True),
    "gpu": Entry("gpu", "GPU", True, True),
    "scaling": Entry("scaling", "Measured here, computed for 1 to 64 GPUs"),
    "zoo_stream": Entry("pipeline", "States from disk to the workers"),
    "large_zoo": Entry("large", "Zoos of millions of states"),
    "s3_stream": Entry("remote", "Models from an object store that answers late"),
    "many_nodes": Entry("many_nodes", "Clusters of 1, 8 and 16 nodes"),
    "recovery": Entry("recovery", "Teachers recovered: synthetic, digits, from files"),
    "ablation": Entry("ablation", "Students and clusters: which does the work"),
    "boxes": Entry("boxes", "Black boxes as people have them"),
    "convolutions": Entry("conv_boxes", "Convolutional black boxes recovered"),
    "placement": Entry("placement", "From a black box to its place in a zoo"),
    "reconstruction": Entry("autoencoder.reconstruction", "Reconstruction by kind of coder, amortised and refined"),
    "controls": Entry("autoencoder.reconstruction", "The same refinement without a learned space"),
    "losses": Entry("autoencoder.losses", "Losses, query sets and coders: the paper's tables"),
    "generation": Entry("autoencoder.generation", "Accuracy of new models against their novelty, by compute"),
    "gradients": Entry("autoencoder.gradients", "Predicted against autograd gradients, and by layer"),
}
ON_GPU = ", on a GPU"  # after the titles of tables that a CPU has too


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    options = argv[len(names) :]
    listing = [f"  {name:<15} {'  ' if entry.suite else '* '}{entry.title}" for name, entry in PARTS.items()]
    parser = _parser("[PART ...]", __doc__, "\n".join(["parts (* kept):", *listing]))
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if len(names) == 1:
        return _one(names[0], options)
    args = _checked(parser, options, names)
    on_cpu = args.device.type == "cpu"
    failed = []
    for name in names or [name for name, entry in PARTS.items() if entry.suite and (on_cpu or entry.gpu)]:
        if subprocess.run([sys.executable, "-m", "benchmarks", name, *options], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser(usage: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """With the options that all parts have."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {usage}", description=description, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page whose tables are replaced")
    parser.add_argument("--fresh", action="store_true", help="forget the finished rows of parts marked * first")
    return parser


def _checked(parser: argparse.ArgumentParser, options: Sequence[str], names: Sequence[str]) -> argparse.Namespace:
    """The options, if these parts can be measured where they say and the page has a place for tables."""
    args = parser.parse_args(options)
    args.device = torch.device(args.device)
    if args.device.type == "cuda":
        if not all(PARTS[name].gpu for name in names):
            parser.error(f"--device cuda measures {', '.join(name for name, entry in PARTS.items() if entry.gpu)}")
        if not torch.cuda.is_available():
            parser.error("--device cuda: no such device here")
    if args.page and not (args.page.is_file() and harness.BEGIN in args.page.read_text()):
        parser.error(f"--page {args.page}: no such file with a line {harness.BEGIN}")
    return args


def _one(name: str, options: Sequence[str]) -> int:
    """One part in this process: measured, shown, written."""
    entry = PARTS[name]
    part: Part = importlib.import_module(f"benchmarks.{entry.module}").PARTS[name]
    parser = _parser(name, entry.title)
    for option, keywords in part.options.items():
        parser.add_argument(option, **keywords)
    if part.kept:
        default = Path("runs", "benchmarks", f"{name}.jsonl")
        parser.add_argument("--rows", type=Path, default=default, help="where finished rows stay (%(default)s)")
        parser.add_argument("--only", nargs="+", metavar="TEXT", help="cells whose names contain one of these")
    args = _checked(parser, options, [name])
    if part.kept and args.fresh:
        args.rows.unlink(missing_ok=True)
    try:
        found = harness.measure(part, args)
    except UserError as error:
        parser.error(str(error))
    if not found["rows"] and name != "gpu":
        parser.error("these options choose nothing")
    on_gpu = ON_GPU if found["device"] == "cuda" and name != "gpu" else ""
    text = harness.section(entry.title + on_gpu, part, found, args)
    print(text, flush=True)
    if part.finish:
        part.finish(found["rows"], args)
    if args.json:
        _write_json(args.json, name + on_gpu, found)
    if args.page:
        titles = [entry.title for entry in PARTS.values()]
        harness.replace_sections(args.page, [text], [*titles, *(title + ON_GPU for title in titles)])
    return 0


def _write_json(file: Path, name: str, found: dict[str, Any]) -> None:
    """Beside what other parts wrote there."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known | {name: found}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
