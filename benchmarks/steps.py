"""A whole training step of the autoencoder, and its parts that are not networks' evaluation."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.harness import CPU, Row, compare, speed
from benchmarks.zoos import random_models
from distrecon.autoencoder import losses
from distrecon.autoencoder.config import AutoencoderConfig, DataConfig, LossConfig, ModelConfig, OptimConfig
from distrecon.autoencoder.model import Autoencoder, ZooSample
from distrecon.autoencoder.training import Batch, Training
from distrecon.images import ImageSet, LabelledImages, load
from distrecon.nets import Architecture, architecture, permute, random_permutation


def config_of(paper: bool) -> AutoencoderConfig:
    """A transformer with all three losses; the paper's size is 256 wide, 8 + 8 layers, 8 heads, latent 64."""
    model = ModelConfig(width=256, layers=8, heads=8, latent=64) if paper else ModelConfig()
    data = DataConfig(queries=256, query_pool=512, views="permutation", align=False)
    return AutoencoderConfig(model, LossConfig(beta=0.1), OptimConfig(batch_size=16 if paper else 32), data)


def random_images(arch: Architecture) -> ImageSet:
    """As many random images of the architecture's size as a pool of queries needs."""
    part = LabelledImages(torch.randn(512, *arch.input_shape), torch.zeros(512, dtype=torch.long))
    return ImageSet("random", part, part, part, tuple("0123456789"), "none")


def published_step(
    config: AutoencoderConfig, arch: Architecture, autoencoder: Autoencoder, pool: Tensor, theta_BP: Tensor
) -> Callable[[], None]:
    """One step with the same autoencoder and optimiser, but models as checkpoints.

    Every step copies, permutes and tokenises each checkpoint twice, evaluates originals and reconstructions by vmap
    over models, and compares all pairs of projections.
    """
    net, states, weights = baselines.module(arch), baselines.state_dicts(arch, theta_BP), config.loss.weights
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=config.optim.lr)
    coder = autoencoder.coder

    def step() -> None:
        views = []
        for _ in range(2):
            orders = [random_permutation(arch) for _ in states]
            views.append([baselines.permuted(arch, s, [o[0] for o in order]) for s, order in zip(states, orders)])  # noqa: B905
        tokens = torch.stack([baselines.tokens_of(arch, state) for view in views for state in view])
        x = autoencoder.standardise(arch.detokenize(tokens), 0)
        z = coder.encode(x, 0)
        first, second = coder.project(z, 0).chunk(2)
        contrastive = baselines.contrastive(first, second, config.loss.temperature)
        x_hat = coder.decode(z, 0)
        structural = (x_hat - x).square().mean()
        reconstructed_BP = autoencoder.unstandardise(x_hat[: len(states)], 0)
        queries = pool[torch.randperm(len(pool))[: config.data.queries]]
        behavioural = baselines.behavioural_loss(
            arch, net, reconstructed_BP, arch.detokenize(tokens)[: len(states)], queries
        )
        loss = weights["contrastive"] * contrastive + weights["structural"] * structural
        optimizer.zero_grad(set_to_none=True)
        (loss + weights["behavioral"] * behavioural).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()

    return step


def training_of(paper: bool, models: int, device: torch.device = CPU, queries: int = 256, **optim: Any) -> Training:
    """A training of the demo's or the paper's autoencoder on untrained models; `optim`: settings of that name."""
    config, arch = config_of(paper), architecture("cnn3" if paper else "cnn_small")
    data = replace(config.data, queries=queries)
    images = random_images(arch) if paper else load("digits")
    sample = ZooSample(arch, random_models(arch, models), images)
    settings = replace(config, optim=replace(config.optim, **optim), data=data)
    return Training(settings, [sample], total_steps=1000, device=device)


def stepper(training: Training, low: int = 0, high: int | None = None) -> Callable[[], object]:
    """Steps over the training's own sample, of which this worker holds a share; the first fills the cache."""
    sample_BP, number = training.zoos[0].sample_BP, count()
    theta_bP, row_b = sample_BP[low:high], torch.arange(len(sample_BP))[low:high]

    def step() -> object:
        return training.step(Batch(0, next(number), 0, row_b, theta_bP, len(sample_BP), low))

    return step


def paper_step(models: int, precision: str, device: torch.device, compiled: bool) -> Callable[[], object]:
    """A training step of the paper's size on 256 queries; `compiled`: the transformer by torch.compile."""
    return stepper(training_of(True, models, device, precision=precision, compile=compiled))


def whole_step(args: Namespace, paper: bool, models: int, repeats: int) -> list[Row]:
    """One training step with contrastive, structural and behavioural loss, against the published way."""
    training = training_of(paper, models, args.device)
    config, arch = training.config, training.zoos[0].architecture
    theta_BP = training.zoos[0].sample_BP.to(args.device)
    published = published_step(config, arch, training.autoencoder, training.pools[0], theta_BP)
    size = f"{config.model.width} wide, {config.model.layers}+{config.model.layers} layers"
    name = f"whole step, {arch.name}, {models} models x 256 queries, {size}"
    return [compare(name, stepper(training), published, repeats, device=args.device)]


def tokens(args: Namespace, name: str, models: int) -> list[Row]:
    """Permute, tokenise and detokenise, against one state dict at a time."""
    arch = architecture(name)
    theta_BP = random_models(arch, models).to(args.device)
    states, names = baselines.state_dicts(arch, theta_BP), list(baselines.module(arch).state_dict())
    orders = [o.to(args.device) for o in random_permutation(arch, torch.Generator().manual_seed(0), models)]
    tokens_BTD = arch.tokenize(theta_BP)

    def permuted() -> object:
        return [baselines.permuted(arch, state, [o[i] for o in orders]) for i, state in enumerate(states)]

    def tokenised() -> object:
        return torch.stack([baselines.tokens_of(arch, state) for state in states])

    def detokenised() -> object:
        return [baselines.state_of(arch, names, tokens_TD) for tokens_TD in tokens_BTD]

    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "permute": (lambda: permute(arch, theta_BP, orders), permuted),
        "tokenise": (lambda: arch.tokenize(theta_BP), tokenised),
        "detokenise": (lambda: arch.detokenize(tokens_BTD), detokenised),
    }
    return [compare(f"{what}, {name}, {models} models", *both, 9, device=args.device) for what, both in ways.items()]


def contrastive(args: Namespace, models: int) -> list[Row]:
    """The contrastive loss, forward and backward, against all pairs' cosine similarity."""
    local_2BJ = torch.randn(2, models, 30, device=args.device).requires_grad_()

    def ours() -> Tensor:
        return torch.autograd.grad(losses.contrastive(local_2BJ, local_2BJ, 0, 0.1).mean(), local_2BJ)[0]

    def common() -> Tensor:
        return torch.autograd.grad(baselines.contrastive(local_2BJ[0], local_2BJ[1], 0.1), local_2BJ)[0]

    torch.testing.assert_close(ours(), common(), rtol=1e-3, atol=1e-6)
    return [compare(f"contrastive loss, {models} models", ours, common, 5, device=args.device)]


PARTS = {
    "whole_step": speed(whole_step, [(False, 32, 9), (True, 16, 3)], [(False, 32, 3), (True, 4, 3)]),
    "tokens": speed(tokens, [("cnn_small", 64), ("cnn3", 64)], [("cnn_small", 64), ("cnn3", 16)]),
    "contrastive": speed(contrastive, [(64,), (512,)], [(64,)]),
}
