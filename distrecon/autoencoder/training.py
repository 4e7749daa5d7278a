"""Training of one weight autoencoder, one step at a time; who feeds it, shows its losses and saves it is the caller.

- One step reads a global batch of models of one zoo, of which this worker holds the rows [offset, offset + b).
- Everything random (views, queries) is drawn for the global batch from (seed, epoch, step), then sliced: any number of
  workers, with any split of the batch, gives the same losses and gradients up to rounding.
- Contrastive negatives span the global batch (`distributed.global_rows`); gradients are summed once (no DDP wrapper).
- The originals' outputs on the query pool are computed once a row: a permutation of units never changes them.
- The losses and how they are weighted and scaled: `losses.py`.

Legend: B models of this worker, G of the global batch, P parameters, Q queries, C classes, J projection size.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder import distributed, fisher, losses
from distrecon.autoencoder.config import AutoencoderConfig, OptimConfig
from distrecon.autoencoder.model import Autoencoder, ZooSample, check_finite, statistics
from distrecon.autoencoder.rows import RowCache
from distrecon.errors import UserError
from distrecon.images.queries import query_pool
from distrecon.nets import Architecture, outputs, permute, random_permutation
from distrecon.zoos.models import Batch

SMALLEST_SCALE = {"cycle": 0.01}  # the Fisher coders' latents, of unit variance, start with no cycle loss at all
TARGET_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def generator(seed: int, epoch: int, step: int, stream: int) -> torch.Generator:
    """The random numbers of one purpose (`stream`) in one step, the same on every worker."""
    state = np.random.SeedSequence([seed, epoch, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Linear warm-up over `warmup` of the steps, then constant or a cosine to zero; onecycle warms up over a third."""
    warmup = 1 / 3 if config.schedule == "onecycle" else config.warmup
    rising = max(1, round(warmup * total_steps))
    if step < rising and warmup:
        return config.lr * (step + 1) / rising
    if config.schedule == "constant":
        return config.lr
    share = (step - rising) / max(1, total_steps - rising)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def views(
    config: AutoencoderConfig, arch: Architecture, theta_BP: Tensor, batch: Batch, std_P: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Two views of the same models (the second is None for `none`); with `align` the first stays as it is."""
    kind, b = config.data.views, slice(batch.offset, batch.offset + len(theta_BP))
    if kind == "none":
        return theta_BP, None
    draw = generator(config.seed, batch.epoch, batch.step, 0)
    if kind == "noise":
        noise_GP = torch.randn(batch.global_size, arch.num_parameters, generator=draw)
        return theta_BP, theta_BP + config.data.noise * std_P * noise_GP[b].to(theta_BP)
    orders = [order_GH.chunk(2) for order_GH in random_permutation(arch, draw, 2 * batch.global_size)]
    first, second = ([order[i][b].to(theta_BP.device) for order in orders] for i in range(2))
    return (theta_BP if config.data.align else permute(arch, theta_BP, first)), permute(arch, theta_BP, second)


class Training:
    """`step(batch)` until the caller has had enough; `autoencoder` is the result.

    `total_steps` sets the learning-rate schedule.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        zoos: Sequence[ZooSample],
        total_steps: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.total_steps, self.device = config, total_steps, torch.device(device)
        self.zoos = list(zoos)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            fitted = [statistics(config, zoo) for zoo in zoos]
            self.autoencoder = Autoencoder(config, [zoo.architecture for zoo in zoos], fitted).to(self.device)
        distributed.broadcast([*self.autoencoder.parameters(), *self.autoencoder.buffers()])
        self.optimizer = torch.optim.AdamW(
            self.autoencoder.parameters(),
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self.steps_done = 0
        self.scales: list[dict[str, float]] = [{} for _ in zoos]  # per zoo, each loss at its first step
        self.pools = [self._pool(zoo) for zoo in zoos]
        self.targets = [
            RowCache((len(pool), zoo.architecture.num_outputs), TARGET_DTYPES[config.data.target_precision])
            for zoo, pool in zip(zoos, self.pools, strict=True)
        ]
        self.partners: dict[int, Tensor] = {}
        self.aligned = [RowCache((zoo.architecture.num_parameters,), self.autoencoder.dtype) for zoo in zoos]

    def _pool(self, zoo: ZooSample) -> Tensor:
        data = self.config.data
        pool = query_pool(
            data.query_set, zoo.images, zoo.architecture, data.query_pool, self.config.seed, data.image_directory
        )
        return pool.to(self.device, self.autoencoder.dtype)

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> dict[str, float]:
        """One update; returns the global batch's losses (`loss/...`), each before scaling, and their weighted sum.

        Raises UserError that names the row of a model whose weights or losses are not finite, and the step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.precision == "bf16"):
            values = self.losses(batch)
        means = self._means(values, batch)
        scales = self.scales[batch.zoo]
        for name, mean in means.items():
            scales.setdefault(name, max(abs(mean), SMALLEST_SCALE.get(name, 1e-12)))
        weights = self.config.loss.weights
        loss = torch.stack([weights[n] / scales[n] * v.sum() / batch.global_size for n, v in values.items()]).sum()
        loss.backward()
        distributed.sum_gradients(self.autoencoder.parameters())
        if self.config.optim.clip:
            torch.nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim_in_use, self.steps_done, self.total_steps)
        self.optimizer.step()
        self.steps_done += 1
        total = sum(weights[name] / scales[name] * mean for name, mean in means.items())
        return {f"loss/{name}": mean for name, mean in means.items()} | {"loss/total": total}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Each loss in use for each of this worker's models [B], differentiable; every worker must take part."""
        config, zoo, autoencoder = self.config, batch.zoo, self.autoencoder
        arch, coder, in_use = self.zoos[zoo].architecture, autoencoder.coder, config.loss.weights
        theta_BP, mixed_B = self._mixed(self._models(batch), batch)
        first_BP, second_BP = views(config, arch, theta_BP, batch, autoencoder.fitted(zoo, "std_P"))
        both = [autoencoder.standardise(v, zoo) for v in (first_BP, second_BP) if v is not None]
        z = coder.encode(torch.cat(both), zoo)
        values: dict[str, Tensor] = {}
        if "contrastive" in in_use:
            values["contrastive"] = self._contrastive(z, batch)
        # noise is not to be learnt, and with alignment the second view only serves contrast
        decoded = len(both) if config.data.views == "permutation" and not config.data.align else 1
        z = z[: decoded * len(theta_BP)]
        x_hat = coder.decode(z, zoo)
        if "structural" in in_use:
            per_view = self._structural(x_hat, torch.cat(both[:decoded]), zoo)
            values["structural"] = per_view.view(decoded, -1).mean(0)
        if "behavioral" in in_use:
            theta_hat_BP = autoencoder.unstandardise(x_hat[: len(theta_BP)].to(autoencoder.dtype), zoo)
            values["behavioral"] = self._behavioral(theta_hat_BP, first_BP, mixed_B, batch)
        if "cycle" in in_use:
            again = coder.encode(x_hat, zoo)
            values["cycle"] = losses.cycle(z, again).view(decoded, -1).mean(0)
        return values

    def _models(self, batch: Batch) -> Tensor:
        arch = self.zoos[batch.zoo].architecture
        arch.check(batch.theta_bP)
        rows = [f"in row {int(row)}" for row in batch.row_b]
        check_finite(batch.theta_bP, f"epoch {batch.epoch}, step {batch.step}", rows)
        theta_BP = batch.theta_bP.to(self.autoencoder.dtype)
        if self.config.data.align:
            theta_BP = self.aligned[batch.zoo].get(
                batch.row_b, lambda missing: self.autoencoder.canonical(theta_BP[missing], batch.zoo)
            )
        return theta_BP.to(self.device)

    def _mixed(self, theta_BP: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The models, some of them moved towards a model of the zoo's sample, and which; drawn for the global batch."""
        b, size = slice(batch.offset, batch.offset + len(theta_BP)), batch.global_size
        if not self.config.data.mix:
            return theta_BP, torch.zeros(len(theta_BP), dtype=torch.bool, device=self.device)
        draw = generator(self.config.seed, batch.epoch, batch.step, 2)
        mixed_B = (torch.rand(size, generator=draw) < self.config.data.mix)[b].to(self.device)
        share_B1 = torch.rand(size, 1, generator=draw)[b].to(theta_BP)
        partners_NP = self._partners(batch.zoo)
        partner_B = torch.randint(len(partners_NP), (size,), generator=draw)[b]
        between_BP = torch.lerp(theta_BP, partners_NP[partner_B].to(theta_BP), share_B1)
        return torch.where(mixed_B[:, None], between_BP, theta_BP), mixed_B

    def _partners(self, zoo: int) -> Tensor:
        """The zoo's sample in canonical order, aligned when first needed."""
        if zoo not in self.partners:
            sample_BP = self.zoos[zoo].sample_BP.to(self.autoencoder.dtype)
            self.partners[zoo] = self.autoencoder.canonical(sample_BP, zoo)
        return self.partners[zoo]

    def _contrastive(self, z: Tensor, batch: Batch) -> Tensor:
        local_BJ = self.autoencoder.coder.project(z, batch.zoo)
        local_2BJ = local_BJ.to(self.autoencoder.dtype).unflatten(0, (2, -1))
        everyone_2GJ = distributed.global_rows(local_2BJ, batch.offset, batch.global_size)
        return losses.contrastive(local_2BJ, everyone_2GJ, batch.offset, self.config.loss.temperature)

    def _structural(self, x_hat: Tensor, x: Tensor, zoo: int) -> Tensor:
        kind, autoencoder = self.config.loss.structural, self.autoencoder
        if kind == "layer":
            return losses.structural(x_hat - x)
        theta, difference = autoencoder.unstandardise(x, zoo), (x_hat - x) * autoencoder.fitted(zoo, "std_P")
        if kind == "fisher":
            return fisher.weighted(autoencoder.coder.fitted[zoo], x_hat - x)
        if kind == "token":
            return losses.structural_per_token(self.zoos[zoo].architecture, difference, theta)
        return losses.structural(difference)

    def _behavioral(self, theta_hat_BP: Tensor, theta_BP: Tensor, mixed_B: Tensor, batch: Batch) -> Tensor:
        data, loss, pool = self.config.data, self.config.loss, self.pools[batch.zoo]
        arch = self.zoos[batch.zoo].architecture
        draw = generator(self.config.seed, batch.epoch, batch.step, 1)
        chosen_Q = torch.randperm(len(pool), generator=draw)[: data.queries]
        inputs, own_B = pool[chosen_Q.to(pool.device)], (~mixed_B).cpu()
        cached = self.targets[batch.zoo].get(
            batch.row_b[own_B], lambda missing: outputs(arch, theta_BP[~mixed_B][missing.to(theta_BP.device)], pool)
        )
        targets_BQC = theta_BP.new_empty(len(theta_BP), len(inputs), arch.num_outputs)
        targets_BQC[~mixed_B] = cached[:, chosen_Q].to(theta_BP)
        if mixed_B.any():
            targets_BQC[mixed_B] = outputs(arch, theta_BP[mixed_B], inputs)
        outputs_BQC = arch.forward(theta_hat_BP, inputs)
        return losses.behavioral(loss.behavioral, outputs_BQC, targets_BQC, loss.distillation_temperature)

    def _means(self, values: Mapping[str, Tensor], batch: Batch) -> dict[str, float]:
        """Losses averaged over the global batch; every worker learns of a loss that is not finite."""
        sums = distributed.total(torch.stack([v.sum() for v in values.values()])) / batch.global_size
        means = dict(zip(values, sums.tolist(), strict=True))
        # one bad model makes every contrastive loss bad, so the others say first which it was
        for name, mean in sorted(means.items(), key=lambda item: item[0] == "contrastive"):
            if not math.isfinite(mean):
                bad_B = ~values[name].isfinite()
                where = f"row {int(batch.row_b[bad_B.cpu()][0])}" if bad_B.any() else "a model of another worker"
                raise UserError(
                    f"the {name} loss of {where} (zoo {batch.zoo}) is not finite in epoch {batch.epoch}, "
                    f"step {batch.step}; a smaller optim.lr may help"
                )
        return means

    # -- to resume ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically; caches are made again."""
        return {
            "autoencoder": self.autoencoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
            "scales": self.scales,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]
        self.scales = [dict(s) for s in state["scales"]]
