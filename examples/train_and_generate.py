"""Trains a weight autoencoder in this process, without Ray, reconstructs held-out models and generates new ones."""

import sys

import torch

from distrecon import config, open_zoo
from distrecon.autoencoder import AutoencoderConfig, Batch, Training, ZooSample, run_tasks

zoo = open_zoo(sys.argv[1] if len(sys.argv) > 1 else "zoos/example")
settings = config.replace(AutoencoderConfig(), {"loss.terms": "C+S+B", "optim.epochs": 5, "tasks.samples": 20})
train, validation, test = (zoo.models(split) for split in ("train", "val", "test"))
size = settings.optim.batch_size
steps = -(-len(train) // size)
training = Training(
    settings, [ZooSample(zoo.architecture, train.theta_BP, zoo.images())], settings.optim.epochs * steps
)
for epoch in range(settings.optim.epochs):
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
    for step, rows in enumerate(order.split(size)):
        batch = Batch(epoch, step, 0, train.row_B[rows], train.theta_BP[rows], len(rows), 0)
        losses = training.step(batch)
    print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))

results = run_tasks(training.autoencoder, train, validation, test, zoo.images())
for name in ("predict/test_accuracy_r2", "reconstruct/agreement", "generate/accuracy_mean", "generate/novelty"):
    print(f"{name} {results.metrics[name]:.3f}")
