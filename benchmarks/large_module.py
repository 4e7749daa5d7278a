"""An epoch on a zoo of ResNet-18-sized states: what a training on windows of tokens costs, and the peak of memory.

    python -m benchmarks.large_module [--states 32] [--out DIR]

The states are PyTorch's initial weights, and the pictures scikit-learn's digits on three channels: only time and
memory are asked. They are written as a zoo and read from it batch by batch; one process, one thread.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from distrecon.autoencoder import AutoencoderConfig, Training, ZooSample
from distrecon.config import replace
from distrecon.images import load
from distrecon.nets import architecture, initialise
from distrecon.zoos import open_zoo, write_zoo
from distrecon.zoos.models import Batch
from tests.nets.module_networks import ResNet18

SETTINGS = {
    "loss.terms": "C+S+B",
    "model.token_size": 512,
    "model.window": 512,
    "model.width": 64,
    "data.align": False,
    "data.queries": 32,
    "data.query_pool": 64,
    "optim.batch_size": 4,
}


class Network(ResNet18):
    """ResNet-18 of ten classes that reads pictures of one channel."""

    def __init__(self) -> None:
        super().__init__(10)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(-1, 3, -1, -1))


def write(path: Path, states: int) -> None:
    """A zoo of so many states, written one by one's worth of memory at a time."""
    make: type[nn.Module] = Network
    arch = architecture(make(), inputs=load("digits").train.images[:4], make=make)
    theta_BP = initialise(arch, ["module"] * states, range(states))
    names = [f"m{i}" for i in range(states)]
    write_zoo(path, arch, theta_BP, model_id=names, split=["train"] * states, images="digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=32, help="of the zoo (default: 32, 1.4 GiB)")
    parser.add_argument("--out", type=Path, help="where the zoo is written (default: a temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = (args.out or Path(folder)) / "zoo"
        if not (path / "zoo.json").exists():
            write(path, args.states)
            print(f"zoo: {args.states} states, peak {peak():.2f} GiB while it was written", flush=True)
        epoch(path)


def epoch(path: Path) -> None:
    """One epoch, and two whole models encoded and decoded window by window."""
    images, zoo = load("digits"), open_zoo(path, module=Network)
    config = replace(AutoencoderConfig(), SETTINGS)
    size, states = config.optim.batch_size, zoo.info["states"]
    training = Training(config, [ZooSample(zoo.architecture, zoo.sample(2 * size, 0), images)], states // size)
    own = training.autoencoder.architectures[0]
    print(f"{own.num_parameters:,} numbers in {own.num_tokens:,} tokens of {own.token_size}", flush=True)
    start = time.process_time()
    for step in range(states // size):
        row_b = torch.arange(step * size, (step + 1) * size)
        theta_bP = torch.from_numpy(zoo.read_rows(row_b.numpy()))
        last = step + 1 == states // size
        batch = Batch(epoch=0, step=step, zoo=0, row_b=row_b, theta_bP=theta_bP, global_size=size, offset=0, last=last)
        losses = training.step(batch)
        assert all(torch.tensor(list(losses.values())).isfinite())
    print(f"epoch: {time.process_time() - start:.0f} CPU s, peak {peak():.2f} GiB", flush=True)
    start = time.process_time()
    with torch.no_grad():
        latents = training.autoencoder.encode(torch.from_numpy(zoo.read_rows(row_b[:2].numpy())))
        decoded = training.autoencoder.decode(latents)
    assert decoded.isfinite().all()
    print(f"two models encoded and decoded: {time.process_time() - start:.0f} CPU s, peak {peak():.2f} GiB")


def peak() -> float:
    """Of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
