"""Untrained coders on a zoo's held-out models: agreement at several sizes of the latent, and refinement against time.

    python -m benchmarks.autoencoder.maps --zoo ZOO [--split val] [--latents 62 32] [--kinds activation_pca ...]
        [--models 60] [--refine gauss_newton:1 adam:10:0.02 ...]

`latents` are numbers a token (`model.latent`); `refine` is METHOD:STEPS[:LEARNING_RATE]. CPU times of one thread.
Choose by `--split val`; test models are for the final figure.
"""

import argparse
import time

import torch

from distrecon.autoencoder import Autoencoder, AutoencoderConfig, ZooSample
from distrecon.autoencoder.model import statistics
from distrecon.autoencoder.reconstruct import compare
from distrecon.autoencoder.refine import LEARNING_RATE
from distrecon.autoencoder.tasks import judging
from distrecon.config import replace
from distrecon.nets import outputs
from distrecon.zoos import open_zoo

KINDS = ("activation_pca", "kronecker_pca", "fisher_pca")
COLUMNS = ("agreement", "agreement_on_errors", "own_nearest")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", required=True)
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--latents", type=int, nargs="+", default=[62, 32])
    parser.add_argument("--kinds", nargs="+", default=[*KINDS])
    parser.add_argument("--models", type=int, default=60, help="for the metric (default: 60)")
    parser.add_argument("--refine", nargs="*", default=[])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    zoo = open_zoo(args.zoo)
    arch, images = zoo.architecture, judging(zoo.images(), 2000)
    sample_BP, theta_BP = zoo.models("train").theta_BP, zoo.models(args.split).theta_BP
    sizes = f"{len(sample_BP)} training states, {len(theta_BP)} of {args.split}, {len(images.test)} images"
    print(f"{zoo.info['name']}: {sizes}")
    print(f"{'coder':32s} numbers  share  agree errors    own    fit s  ms a model")
    for kind in args.kinds:
        for latent in args.latents:
            torch.manual_seed(0)
            config = replace(
                AutoencoderConfig(),
                {"model.kind": kind, "model.latent": latent, "model.fisher_models": args.models},
            )
            start = time.process_time()
            autoencoder = Autoencoder(config, [arch], [statistics(config, ZooSample(arch, sample_BP, zoo.images()))])
            seconds = time.process_time() - start
            aligned_BP = autoencoder.canonical(theta_BP, 0)
            z = autoencoder.encode(theta_BP)

            def row(name: str, z: torch.Tensor, spent: float) -> None:
                began = time.process_time()
                rebuilt_BP = autoencoder.decode(z)  # noqa: B023 (called at once)
                spent += time.process_time() - began
                found, _ = compare(arch, aligned_BP, rebuilt_BP, images.test)  # noqa: B023
                scores = " ".join(f"{100 * found[f'reconstruct/{c}']:6.1f}" for c in COLUMNS)
                share = z.shape[1] / arch.num_parameters
                cost = f"{seconds:8.1f} {1000 * spent / len(theta_BP):11.1f}"  # noqa: B023
                print(f"{name:32s} {z.shape[1]:7d} {100 * share:5.1f}% {scores} {cost}", flush=True)

            row(kind, z, 0.0)
            targets_BQC = outputs(arch, aligned_BP, autoencoder.fitted(0, "queries")).softmax(2) if args.refine else z
            for item in args.refine:
                method, steps, *rate = item.split(":")
                start = time.process_time()
                learning_rate = float(rate[0]) if rate else LEARNING_RATE
                refined = autoencoder.refine(z, targets_BQC, int(steps), 0, method, learning_rate=learning_rate)
                row(f"  {item}", refined, time.process_time() - start)


if __name__ == "__main__":
    main()
