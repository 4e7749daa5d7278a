"""Training of one weight autoencoder, one step at a time; who feeds it, shows its losses and saves it is the caller.

- One step reads a global batch of models of one zoo, of which this worker holds the rows [offset, offset + b).
- Everything random (views, queries) is drawn for the global batch (`draws.py`): any number of workers, with any split
  of the batch, gives the same losses and gradients up to rounding.
- Contrastive negatives span the global batch (`distributed.global_rows`); gradients are summed during the backward
  pass (`reduction.py`).
- On the CPU the originals' outputs on the query pool are computed once a row: a permutation of units never changes
  them. A GPU computes those of the chosen queries anew, some 4 % of a step: the pool's would fill its memory.
- A GPU never waits for the host: weights stay on it, random indices go there in one copy, losses come back while the
  next step runs (`Training.steps`).
- The losses and how they are weighted and scaled: `losses.py`.

Legend: B models of this worker, G of the global batch, V views, P parameters, Q queries, C classes, J projection size,
U hidden units, N losses.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from distrecon.autoencoder import distributed, fisher, losses
from distrecon.autoencoder.config import AutoencoderConfig, OptimConfig
from distrecon.autoencoder.draws import generator, random_orders, views
from distrecon.autoencoder.flat import FlatParameters
from distrecon.autoencoder.model import Autoencoder, ZooSample, check_finite, statistics
from distrecon.autoencoder.precision import computes_at_once, products
from distrecon.autoencoder.reduction import GradientSums
from distrecon.autoencoder.rows import RowCache
from distrecon.autoencoder.transformer import Block
from distrecon.errors import UserError
from distrecon.images.queries import query_pool
from distrecon.nets import outputs
from distrecon.zoos.models import Batch

SMALLEST_SCALE = {"cycle": 0.01}  # the Fisher coders' latents, of unit variance, start with no cycle loss at all
SMALLEST_OF_A_WINDOW = {"behavioral": 1e-3}  # the first step's window may change the outputs by next to nothing
TARGET_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


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


@dataclass(frozen=True)
class Losses:
    """One step's losses on their way to the host."""

    batch: Batch
    values: Mapping[str, Tensor]  # [B] each, where they were computed
    mean_N: Tensor  # over the global batch, in the host's memory once `copied`
    copied: torch.Event | None

    def means(self) -> dict[str, float]:
        """By name. Raises UserError, on every worker, that names the row of a model whose loss is not finite."""
        if self.copied is not None and not self.copied.query():
            self.copied.synchronize()
        means = dict(zip(self.values, self.mean_N.tolist(), strict=True))
        # one bad model makes every contrastive loss bad, so the others say first which it was
        for name, mean in sorted(means.items(), key=lambda item: item[0] == "contrastive"):
            if not math.isfinite(mean):
                bad_B = ~self.values[name].isfinite()
                where = f"row {int(self.batch.row_b[bad_B.cpu()][0])}" if bad_B.any() else "a model of another worker"
                raise UserError(
                    f"the {name} loss of {where} (zoo {self.batch.zoo}) is not finite in epoch {self.batch.epoch}, "
                    f"step {self.batch.step}; a smaller optim.lr may help"
                )
        return means


class Training:
    """`step(batch)` until the caller has had enough, or `steps(batches)`; `autoencoder` is the result.

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
        if config.optim.compile:  # block by block: all of them share one compiled function
            for module in self.autoencoder.modules():
                if isinstance(module, Block):
                    module.compile()
        distributed.broadcast([*self.autoencoder.parameters(), *self.autoencoder.buffers()])
        self.on_cpu = computes_at_once(self.device)
        # on the CPU a parameter is a matter of microseconds, and together they would round otherwise
        bf16 = torch.bfloat16 if config.optim.precision == "bf16" else None
        self.flat = None if self.on_cpu else FlatParameters(self.autoencoder, bf16)
        self.parameters = [self.flat.vector] if self.flat else [*self.autoencoder.parameters()]
        dtype = self.autoencoder.dtype
        sent = torch.bfloat16 if config.optim.reduce == "bf16" else dtype
        self.gradients = GradientSums(self.flat.leaves if self.flat else self.parameters, dtype, sent)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self.steps_done = 0
        self.scales: list[dict[str, float]] = [{} for _ in zoos]  # per zoo, each loss at its first step
        weights = config.loss.weights  # in the order of what `losses` returns
        self.smallest = SMALLEST_SCALE | (SMALLEST_OF_A_WINDOW if config.model.window else {})
        table = [[*weights.values()], [self.smallest.get(name, 1e-12) for name in weights]]
        self.weight_N, self.smallest_N = torch.tensor(table, dtype=torch.float64).to(self.device)
        # per zoo and losses in use, weights over scales [N], on the device
        self.factors: list[dict[tuple[str, ...], Tensor]] = [{} for _ in zoos]
        self.pools = [self._pool(zoo) for zoo in zoos]
        self.targets = [
            RowCache((len(pool), zoo.architecture.num_outputs), TARGET_DTYPES[config.data.target_precision])
            for zoo, pool in zip(zoos, self.pools, strict=True)
        ]
        if not self.on_cpu:
            for i, zoo in enumerate(zoos):  # brings its index maps there
                zoo.architecture.tokenize(self.autoencoder.fitted(i, "mean_P")[None])
        self.partners: dict[int, Tensor] = {}
        self.models = [
            RowCache((zoo.architecture.num_parameters,), self.autoencoder.dtype, self.device) for zoo in zoos
        ]

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
        return self._read(self._update(batch))

    def steps(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, dict[str, float]]]:
        """`step` for every batch; yields each with its losses.

        A GPU begins the next step before the losses of one are read. Those of an epoch's last step are read first, so
        that between epochs everything done has been checked. After an error the weights are not to be used.
        """
        waiting: Losses | None = None
        for batch in batches:
            begun = self._update(batch)
            if waiting is not None:
                yield waiting.batch, self._read(waiting)
            waiting = begun
            if self.on_cpu or batch.last:
                yield batch, self._read(begun)
                waiting = None
        if waiting is not None:
            yield waiting.batch, self._read(waiting)

    def _update(self, batch: Batch) -> Losses:
        """One update, whose losses are under way; on the CPU they are checked before anything changes."""
        self.optimizer.zero_grad(set_to_none=True)
        with products(self.device, self.config.optim.precision):
            values = self._losses_in_precision(batch)
            sum_N = torch.stack([*values.values()]).sum(1)
            mean_N = distributed.total(sum_N) / batch.global_size
            under_way = self._sent(values, mean_N, batch)
            if self.on_cpu:
                under_way.means()
            self.gradients.begin(batch.zoo)
            sum_N.backward(self._factors(mean_N, tuple(values), batch.zoo) * (1 / batch.global_size))
        self._set(self.gradients.finish())
        if self.config.optim.clip:
            self._clip(self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim_in_use, self.steps_done, self.total_steps)
        self.optimizer.step()
        self.steps_done += 1
        return under_way

    def _set(self, gradients: Sequence[Tensor | None]) -> None:
        """What the optimiser steps along."""
        if self.flat:
            self.flat.set_gradient(gradients)
        else:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

    def _clip(self, most: float) -> None:
        """Scales the gradients down to this norm, if theirs is larger."""
        if self.flat:  # one gradient, whose norm needs no norm of norms
            norm = torch.linalg.vector_norm(cast(Tensor, self.flat.vector.grad))
            torch.nn.utils.clip_grads_with_norm_(self.parameters, most, norm)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, most)

    def _losses_in_precision(self, batch: Batch) -> dict[str, Tensor]:
        """`losses`, computed as `optim.precision` says, from the flat parameters where there are such."""
        bf16 = self.config.optim.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            if self.flat is None:
                return self.losses(batch)
            return self.flat.call(lambda: self.losses(batch))

    def _sent(self, values: Mapping[str, Tensor], mean_N: Tensor, batch: Batch) -> Losses:
        """The losses, their copy to the host begun."""
        detached = {name: value.detach() for name, value in values.items()}
        if self.device.type != "cuda":
            return Losses(batch, detached, mean_N.cpu(), None)
        on_host_N, copied = mean_N.to("cpu", non_blocking=True), torch.Event(self.device)
        copied.record()
        return Losses(batch, detached, on_host_N, copied)

    def _factors(self, mean_N: Tensor, names: tuple[str, ...], zoo: int) -> Tensor:
        """What each loss is multiplied by [N]: its weight over its value at a zoo's first step, never read here."""
        known = self.factors[zoo]
        if names not in known:
            smallest_N, weight_N, everything = self.smallest_N, self.weight_N, [*self.config.loss.weights]
            if [*names] != everything:  # one by one: a list of places would be copied to the device
                which = [everything.index(name) for name in names]
                smallest_N, weight_N = (torch.stack([of[i] for i in which]) for of in (smallest_N, weight_N))
            factor_N = (weight_N / torch.maximum(mean_N.double().abs(), smallest_N)).to(mean_N)
            for before, earlier_N in known.items():  # losses that were in use before one joined them
                factor_N = torch.stack(
                    [earlier_N[before.index(n)] if n in before else factor_N[i] for i, n in enumerate(names)]
                )
            self.factors[zoo] = {names: factor_N}
        return self.factors[zoo][names]

    def _read(self, losses: Losses) -> dict[str, float]:
        """A step's losses by name, and their total."""
        means, scales = losses.means(), self.scales[losses.batch.zoo]
        for name, mean in means.items():
            scales.setdefault(name, max(abs(mean), self.smallest.get(name, 1e-12)))
        weights = self.config.loss.weights
        total = sum(weights[name] / scales[name] * mean for name, mean in means.items())
        return {f"loss/{name}": mean for name, mean in means.items()} | {"loss/total": total}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Each loss in use for each of this worker's models [B], differentiable; every worker must take part."""
        config, zoo, autoencoder = self.config, batch.zoo, self.autoencoder
        arch, coder, in_use = self.zoos[zoo].architecture, autoencoder.coder, self._in_use()
        order_2BU, query_Q = random_orders(config, arch, batch), self._queries(batch)
        place_B, missing = self.models[zoo].find(batch.row_b)
        order_2BU, query_Q, place_B = self._on_device(order_2BU, query_Q, place_B)
        theta_BP, mixed_B = self._mixed(self._models(batch, place_B, missing), batch)
        seen_VBP = views(config, arch, theta_BP, batch, autoencoder.fitted(zoo, "std_P"), order_2BU)
        if "behavioral" in in_use:  # before anything is kept for the backward pass
            inputs, targets_BQC = self._targets(seen_VBP[0], mixed_B, query_Q, batch)
        x = autoencoder.standardise(seen_VBP.flatten(0, 1), zoo)
        spans = coder.spans(zoo)
        span = spans[self._draw(len(spans), batch)] if spans else None
        z = coder.encode(x, zoo) if span is None else coder.encode_span(x, zoo, span)
        values: dict[str, Tensor] = {}
        if "contrastive" in in_use:
            values["contrastive"] = self._contrastive(z, batch)
        # noise is not to be learnt, and with alignment the second view only serves contrast
        decoded = len(seen_VBP) if config.data.views == "permutation" and not config.data.align else 1
        if decoded < len(seen_VBP):
            z, x = z[: len(theta_BP)], x[: len(theta_BP)]
        seen_arch = autoencoder.architectures[zoo]
        if span is None:
            x_hat = coder.decode(z, zoo)
        else:  # the rest of each model stays as it is
            x_hat = seen_arch.with_tokens(x, coder.decode_span(z, zoo, span), span)
        with torch.autocast(self.device.type, enabled=False):
            if "structural" in in_use:
                values["structural"] = self._structural(x_hat, x, zoo).view(decoded, -1).mean(0)
                if span is not None:  # a mean over what was read
                    values["structural"] *= arch.num_parameters / int(seen_arch.token_mask_TD[span].sum())
        if "behavioral" in in_use:
            theta_hat_BP = autoencoder.unstandardise(x_hat[: len(theta_BP)].to(autoencoder.dtype), zoo)
            outputs_BQC = arch.forward(theta_hat_BP, inputs).to(targets_BQC)
            with torch.autocast(self.device.type, enabled=False):
                values["behavioral"] = losses.behavioral(
                    config.loss.behavioral, outputs_BQC, targets_BQC, config.loss.distillation_temperature
                )
        if "cycle" in in_use:
            again = coder.encode(x_hat, zoo) if span is None else coder.encode_span(x_hat, zoo, span)
            with torch.autocast(self.device.type, enabled=False):
                values["cycle"] = losses.cycle(z.to(again), again).view(decoded, -1).mean(0)
        return values

    def _in_use(self) -> set[str]:
        """The losses of this step."""
        names = set(self.config.loss.weights)
        if self.steps_done < round(self.config.loss.behavioral_from * self.total_steps):
            names.discard("behavioral")
        return names

    def _draw(self, count: int, batch: Batch) -> int:
        """Which of so many windows this step reads, the same on every worker."""
        return int(torch.randint(count, (), generator=generator(self.config.seed, batch.epoch, batch.step, 3)))

    def _queries(self, batch: Batch) -> Tensor:
        """Which queries of the pool this step asks, the same on every worker."""
        draw = generator(self.config.seed, batch.epoch, batch.step, 1)
        return torch.randperm(len(self.pools[batch.zoo]), generator=draw)[: self.config.data.queries]

    def _on_device(self, *indices: Tensor) -> list[Tensor]:
        """Indices, brought to the device in one copy."""
        flat = torch.cat([index.flatten() for index in indices]).to(self.device, non_blocking=True)
        parts = flat.split([index.numel() for index in indices])
        return [part.view(index.shape) for part, index in zip(parts, indices, strict=True)]

    def _models(self, batch: Batch, place_B: Tensor, missing: Tensor) -> Tensor:
        """The batch's models on the device, in canonical order: kept where that costs something, order or a copy."""
        self.zoos[batch.zoo].architecture.check(batch.theta_bP)
        rows = [f"in row {int(row)}" for row in batch.row_b]
        check_finite(batch.theta_bP, f"epoch {batch.epoch}, step {batch.step}", rows)
        theta_BP = batch.theta_bP.to(self.autoencoder.dtype)
        if self.on_cpu and not self.config.data.align:
            return theta_BP
        return self.models[batch.zoo].values(
            place_B, batch.row_b, missing, lambda those: self.autoencoder.canonical(theta_BP[those], batch.zoo)
        )

    def _mixed(self, theta_BP: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The models, some of them moved towards a model of the zoo's sample, and which; drawn for the global batch."""
        b, size = slice(batch.offset, batch.offset + len(theta_BP)), batch.global_size
        if not self.config.data.mix:
            return theta_BP, None
        draw = generator(self.config.seed, batch.epoch, batch.step, 2)
        mixed_B = (torch.rand(size, generator=draw) < self.config.data.mix)[b].to(self.device, non_blocking=True)
        share_B1 = torch.rand(size, 1, generator=draw)[b].to(theta_BP, non_blocking=True)
        partners_NP = self._partners(batch.zoo)
        partner_B = torch.randint(len(partners_NP), (size,), generator=draw)[b].to(self.device, non_blocking=True)
        between_BP = torch.lerp(theta_BP, partners_NP[partner_B], share_B1)
        return torch.where(mixed_B[:, None], between_BP, theta_BP), mixed_B

    def _partners(self, zoo: int) -> Tensor:
        """The zoo's sample in canonical order, aligned when first needed."""
        if zoo not in self.partners:
            sample_BP = self.zoos[zoo].sample_BP.to(self.autoencoder.dtype)
            self.partners[zoo] = self.autoencoder.canonical(sample_BP, zoo).to(self.device)
        return self.partners[zoo]

    def _contrastive(self, z: Tensor, batch: Batch) -> Tensor:
        # its product is a loss's, and no switch of TF32 reaches float64
        dtype = torch.float64 if self.config.optim.precision == "tf32" else self.autoencoder.dtype
        local_BJ = self.autoencoder.coder.project(z, batch.zoo)
        with torch.autocast(self.device.type, enabled=False):
            local_2BJ = local_BJ.to(dtype).unflatten(0, (2, -1))
            everyone_2GJ = distributed.global_rows(local_2BJ, batch.offset, batch.global_size)
            loss_B = losses.contrastive(local_2BJ, everyone_2GJ, batch.offset, self.config.loss.temperature)
        return loss_B.to(self.autoencoder.dtype)

    def _structural(self, x_hat: Tensor, x: Tensor, zoo: int) -> Tensor:
        kind, autoencoder = self.config.loss.structural, self.autoencoder
        if kind == "layer":
            return losses.structural(x_hat - x)
        std_P = autoencoder.fitted(zoo, "std_P")
        numbers, difference = x * std_P + autoencoder.fitted(zoo, "mean_P"), (x_hat - x) * std_P
        if kind == "fisher":
            return fisher.weighted(autoencoder.coder.fitted[zoo], x_hat - x)
        if kind == "token":
            return losses.structural_per_token(self.zoos[zoo].architecture, difference, numbers)
        return losses.structural(difference)

    def _targets(
        self, theta_BP: Tensor, mixed_B: Tensor | None, query_Q: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The chosen queries and the originals' outputs [B, Q, C] on them.

        The CPU keeps those for the whole pool, but of models that were mixed in this step.
        """
        arch, pool, cache = self.zoos[batch.zoo].architecture, self.pools[batch.zoo], self.targets[batch.zoo]
        inputs = pool[query_Q]
        if not self.on_cpu:
            return inputs, outputs(arch, theta_BP, inputs).to(theta_BP)
        if mixed_B is None:
            kept_BQC = cache.get(batch.row_b, lambda missing: outputs(arch, theta_BP[missing], pool))
            return inputs, kept_BQC[:, query_Q].to(theta_BP)
        own_BP = theta_BP[~mixed_B]
        kept_BQC = cache.get(batch.row_b[~mixed_B], lambda missing: outputs(arch, own_BP[missing], pool))
        targets_BQC = theta_BP.new_empty(len(theta_BP), len(query_Q), arch.num_outputs)
        targets_BQC[~mixed_B] = kept_BQC[:, query_Q].to(theta_BP)
        if mixed_B.any():
            targets_BQC[mixed_B] = outputs(arch, theta_BP[mixed_B], inputs)
        return inputs, targets_BQC

    # -- to resume ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically, on any kind of device; caches are made again."""
        optimizer = self.optimizer.state_dict()
        return {
            "autoencoder": self.autoencoder.state_dict(),
            "optimizer": self.flat.optimizer_state(optimizer) if self.flat else optimizer,
            "steps_done": self.steps_done,
            "scales": self.scales,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.autoencoder.load_state_dict(state["autoencoder"])
        optimizer = state["optimizer"]
        self.optimizer.load_state_dict(self.flat.flat_state(optimizer) if self.flat else optimizer)
        self.steps_done = state["steps_done"]
        self.scales = [dict(s) for s in state["scales"]]
        weights = self.config.loss.weights
        for zoo, scales in enumerate(self.scales):
            names = tuple(name for name in weights if name in scales)
            factors = [weights[name] / scales[name] for name in names]
            known = {names: torch.tensor(factors, dtype=self.autoencoder.dtype).to(self.device)}
            self.factors[zoo] = known if names else {}
