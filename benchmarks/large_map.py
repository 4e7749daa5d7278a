"""The Kronecker map of a network of ResNet-18's layers: seconds to fit, encode and decode, and the peak of memory.

    python -m benchmarks.large_map [--models 4] [--places 1024]

Weights and what layers read are random: only time and memory are asked. One thread, one process.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from distrecon.autoencoder import kronecker_map
from distrecon.autoencoder.kronecker_map import Sides, eigenbasis_of_columns

STAGES = ((64, 64), (64, 128), (128, 256), (256, 512))  # channels in and out of each stage's two blocks
CLASSES = 1000


def layers() -> list[tuple[int, int]]:
    """Outputs and fan-in with the bias of every layer, normalisations (a scale and a shift a channel) included."""
    found = [(64, 3 * 49 + 1)]
    for before, after in STAGES:
        found += [(after, 9 * before + 1), *[(after, 9 * after + 1)] * 3]
        if before != after:
            found.append((after, before + 1))
    norms = [(1, 2 * o) for o, _ in found]
    return [*found, *norms, (CLASSES, STAGES[-1][1] + 1)]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4, help="of the sample (default: 4)")
    parser.add_argument("--places", type=int, default=1024, help="at which what a layer reads is taken (default: 1024)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    sizes = layers()
    matrices = [torch.randn(args.models, *size, generator=draw) for size in sizes]
    parameters = sum(o * f for o, f in sizes)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds[name] = time.process_time() - start
        return result

    def fit() -> dict[str, torch.Tensor]:
        sides = [
            Sides(*(eigenbasis_of_columns(torch.randn(side, args.places, generator=draw)) for side in size))
            for size in sizes
        ]
        return kronecker_map.fit(sides, matrices, parameters // 2, 3e-4)

    tensors = timed("fit", fit)
    one = [m[:1] for m in matrices]
    z = timed("encode", lambda: kronecker_map.compress(tensors, kronecker_map.coordinates(tensors, one)))
    timed("decode", lambda: kronecker_map.matrices(tensors, kronecker_map.expand(tensors, z)))
    seconds["GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(sizes)} layers, {parameters:,} parameters, {z.shape[1]:,} latent numbers, {args.models} models")
    print(", ".join(f"{name} {value:.1f}" for name, value in seconds.items()), "(CPU seconds of one thread; GiB peak)")
    return seconds


if __name__ == "__main__":
    main()
