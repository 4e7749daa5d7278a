"""Settings of one weight autoencoder; the dotted field names (`loss.beta`) are the keys of space files and of `--set`.

The defaults are the demo's: a minute on one core for the digits zoo. `PAPER` holds the dotted values of "Structure Is
Not Enough" (arXiv 2503.17138).
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from distrecon.autoencoder.losses import BEHAVIORAL
from distrecon.autoencoder.samplers import SAMPLERS
from distrecon.errors import UserError, nearest

KINDS = ("transformer", "fisher_residual", "fisher_pca")
METRICS = ("behavioral", "structural")
TERMS = ("C", "S", "B")
STRUCTURAL = ("layer", "token", "none", "fisher")
VIEWS = ("permutation", "noise", "none")
SCHEDULES = ("cosine", "onecycle", "constant")
PRECISIONS = ("float32", "bf16", "float64")


def _one_of(setting: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UserError(f"{setting}: {value!r} is unknown{nearest(value, known)}")


def _at_least(setting: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{setting} must be at least {least}, not {value}")


def _between(setting: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{setting} must lie between {low} and {high}, not {value}")


@dataclass(frozen=True)
class ModelConfig:
    """What maps weights to latents and back.

    `latent` counts numbers per token; the Fisher kinds have one vector of `latent * tokens` numbers a model.
    """

    kind: str = "transformer"
    width: int = 64
    layers: int = 2  # blocks of the encoder, and as many of the decoder
    heads: int = 4
    latent: int = 16
    projection: int = 30
    fisher_metric: str = "behavioral"  # or "structural": plain principal components of the weights
    fisher_models: int = 300  # of the sample, for the Gauss-Newton matrix
    fisher_queries: int = 60
    fisher_temperature: float = 2.0
    fisher_ridge: float = 0.03
    fisher_blocks: str = "global"  # or one linear map a "layer", or a layer's "token"; latents split by eigenvalue

    def __post_init__(self) -> None:
        _one_of("model.kind", self.kind, KINDS)
        _one_of("model.fisher_metric", self.fisher_metric, METRICS)
        _one_of("model.fisher_blocks", self.fisher_blocks, ("global", "layer", "token"))
        for name in ("width", "layers", "heads", "latent", "projection", "fisher_models", "fisher_queries"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        if self.width % self.heads:
            raise UserError(f"model.width ({self.width}) must be a multiple of model.heads ({self.heads})")
        if not self.fisher_temperature > 0 or not self.fisher_ridge > 0:
            raise UserError("model.fisher_temperature and model.fisher_ridge must be positive")


@dataclass(frozen=True)
class LossConfig:
    """gamma L_C + (1 - gamma) (beta L_S + (1 - beta) L_B) + lam L_cycle, over the terms named in `terms`.

    A term that is not named has no weight: without C gamma is 0, without S beta is 0, without B beta is 1.
    """

    terms: str = "C+S+B"
    gamma: float = 0.05
    beta: float = 0.5
    lam: float = 0.0  # cycle consistency
    temperature: float = 0.1  # of the contrastive loss
    behavioral: str = "mse_softmax"
    distillation_temperature: float = 2.0
    structural: str = "layer"  # weights standardised per layer, per token, raw, or weighted by the Fisher matrix

    def __post_init__(self) -> None:
        terms = self.terms.split("+")
        for term in terms:
            _one_of("loss.terms", term, TERMS)
        if len(set(terms)) != len(terms):
            raise UserError(f"loss.terms: {self.terms!r} names a term twice")
        if terms == ["C"]:
            raise UserError("loss.terms: 'C' alone trains no decoder; add S or B")
        _between("loss.gamma", self.gamma, 0, 1)
        _between("loss.beta", self.beta, 0, 1)
        _at_least("loss.lam", self.lam, 0)
        _one_of("loss.behavioral", self.behavioral, BEHAVIORAL)
        _one_of("loss.structural", self.structural, STRUCTURAL)
        if not self.temperature > 0 or not self.distillation_temperature > 0:
            raise UserError("loss.temperature and loss.distillation_temperature must be positive")

    @property
    def weights(self) -> dict[str, float]:
        """Loss name -> its factor; only the terms in use."""
        terms = self.terms.split("+")
        gamma = self.gamma if "C" in terms else 0.0
        beta = {"S": 1.0, "B": 0.0}.get("".join(t for t in terms if t != "C"), self.beta)
        weights = {"contrastive": gamma, "structural": (1 - gamma) * beta, "behavioral": (1 - gamma) * (1 - beta)}
        named = {"contrastive": "C", "structural": "S", "behavioral": "B"}
        used = {name: weight for name, weight in weights.items() if named[name] in terms}
        return used | ({"cycle": self.lam} if self.lam else {})


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a learning-rate schedule over all steps."""

    lr: float = 1e-3
    lr_without_b: float | None = None  # in place of lr when loss.terms has no B
    weight_decay: float = 0.01
    batch_size: int = 32  # models of a global batch, over all workers
    epochs: int = 8
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps
    clip: float = 1.0  # norm of the gradient; 0 for none
    precision: str = "float32"

    def __post_init__(self) -> None:
        _one_of("optim.schedule", self.schedule, SCHEDULES)
        _one_of("optim.precision", self.precision, PRECISIONS)
        _at_least("optim.batch_size", self.batch_size, 1)
        _at_least("optim.epochs", self.epochs, 0)
        _between("optim.warmup", self.warmup, 0, 1)
        for name in ("lr", "weight_decay", "clip"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        if self.lr_without_b is not None:
            _at_least("optim.lr_without_b", self.lr_without_b, 0)


@dataclass(frozen=True)
class DataConfig:
    """What the autoencoder sees: queries for the behavioural loss, views for the contrastive one."""

    query_set: str = "data"  # data, uniform, gaussian, patches, an image set's name, or a union: "data+uniform"
    query_pool: int = 512  # queries on which the originals' outputs are kept
    queries: int = 128  # drawn anew from the pool at each step
    views: str = "noise"
    noise: float = 0.1  # of the views "noise", in standard deviations of a layer's weights
    mix: float = 0.0  # share of the models replaced by a random point between them and another training model
    align: bool = True  # weight matching of every model to one reference, before encoding
    shards: int = 16  # virtual shards of the stream of models, whatever the number of workers
    target_precision: str = "float16"  # of the originals' outputs kept
    image_directory: str | None = None  # where another image set named in query_set lies

    def __post_init__(self) -> None:
        _one_of("data.views", self.views, VIEWS)
        _one_of("data.target_precision", self.target_precision, ("float16", "float32", "float64"))
        for name in ("query_pool", "queries", "shards"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        _at_least("data.noise", self.noise, 0)
        _between("data.mix", self.mix, 0, 1)
        if self.mix and not self.align:
            raise UserError("data.mix joins models whose units correspond: it needs data.align")
        if self.queries > self.query_pool:
            raise UserError(f"data.queries ({self.queries}) cannot exceed data.query_pool ({self.query_pool})")


@dataclass(frozen=True)
class TasksConfig:
    """How the trained autoencoder is judged."""

    samples: int = 100
    samplers: tuple[str, ...] = ("joint_kde",)  # the first gives the headline numbers
    bandwidth: float = 0.3  # in units of the kernel's rule-of-thumb width; the Gaussian's temperature
    good: float = 0.3  # share of the training models, best on validation images, that samplers draw from
    select: int = 1  # samples drawn for each one kept; the best on validation images are
    refine: int = 0  # steps on the latent of reconstructions (reported under refined/)
    generate_refine: int = 0  # steps on the latent of generated models
    teachers: int = 10  # good models whose averaged outputs a generated model is refined towards
    finetune_epochs: int = 0  # of generated models, on training images
    pairs: int = 24  # generated models compared with each other for diversity_l2
    candidates: int = 8  # training models aligned with each generated one to find the nearest

    def __post_init__(self) -> None:
        for sampler in self.samplers:
            _one_of("tasks.samplers", sampler, SAMPLERS)
        if not self.samplers:
            raise UserError("tasks.samplers must name at least one sampler")
        for name, least in (("samples", 2), ("select", 1), ("teachers", 1), ("pairs", 2), ("candidates", 1)):
            _at_least(f"tasks.{name}", getattr(self, name), least)
        for name in ("bandwidth", "refine", "generate_refine", "finetune_epochs"):
            _at_least(f"tasks.{name}", getattr(self, name), 0)
        if not 0 < self.good <= 1:
            raise UserError(f"tasks.good must be a share above 0 and up to 1, not {self.good}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything about one autoencoder and its training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if "contrastive" in self.loss.weights and self.data.views == "none":
            raise UserError("loss.terms with C needs two views of a model: set data.views to permutation or noise")

    @property
    def optim_in_use(self) -> OptimConfig:
        """`optim` with the learning rate that goes with `loss.terms`."""
        other = self.optim.lr_without_b
        return self.optim if other is None or "behavioral" in self.loss.weights else replace(self.optim, lr=other)


PAPER: dict[str, Any] = {
    "model.width": 256,
    "model.layers": 8,
    "model.heads": 8,
    "model.latent": 64,
    "loss.beta": 0.1,
    "data.views": "permutation",
    "data.align": False,
    "optim.batch_size": 64,
    "optim.lr": 1e-5,
    "optim.lr_without_b": 1e-4,
    "optim.epochs": 100,
    "data.query_pool": 4096,
    "data.queries": 256,
}
