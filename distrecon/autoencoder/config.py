"""Settings of one weight autoencoder; the dotted field names (`loss.beta`) are the keys of space files and of `--set`.

The defaults are the demo's: a minute on one core for the digits zoo. `PAPER` holds the dotted values of "Structure Is
Not Enough" (arXiv 2503.17138).
"""

from dataclasses import dataclass, field, replace
from typing import Any

from distrecon.autoencoder.coder import CoderConfig
from distrecon.autoencoder.coders import CODERS
from distrecon.autoencoder.losses import BEHAVIORAL
from distrecon.autoencoder.refine import REFINERS
from distrecon.autoencoder.samplers import SAMPLERS
from distrecon.config import check, setting
from distrecon.errors import UserError, nearest
from distrecon.nets import SYMMETRIES

TERMS = {"C": "contrastive", "S": "structural", "B": "behavioral"}


@dataclass(frozen=True)
class ModelConfig(CoderConfig):
    """What maps weights to latents and back: which coder, and its settings."""

    kind: str = setting("transformer", "the coder", choices=CODERS)


@dataclass(frozen=True)
class LossConfig:
    """The weights and kinds of the losses; their formula stands in `losses.py`."""

    terms: str = setting("C+S+B", "the losses in use: C, S and B joined by +")
    gamma: float = setting(0.05, "weight of the contrastive loss", least=0, most=1)
    beta: float = setting(0.5, "share of the structural loss in the rest", least=0, most=1)
    lam: float = setting(0.0, "weight of the cycle loss", least=0)
    behavioral_from: float = setting(
        0.0, "share of the steps after which B joins: those before are cheaper, and bring weights near", least=0, most=1
    )
    temperature: float = setting(0.1, "of the contrastive loss", above=0)
    behavioral: str = setting("mse_softmax", "how outputs are compared", choices=BEHAVIORAL)
    distillation_temperature: float = setting(2.0, "of the behavioural loss distillation", above=0)
    structural: str = setting(
        "layer",
        "weights standardised per layer, per token, raw, or weighted by the Fisher matrix",
        choices=("layer", "token", "none", "fisher"),
    )

    def __post_init__(self) -> None:
        check(self, "loss")
        terms = self.terms.split("+")
        for term in terms:
            if term not in TERMS:
                raise UserError(f"loss.terms: {term!r} is unknown{nearest(term, TERMS)}")
        if len(set(terms)) != len(terms):
            raise UserError(f"loss.terms: {self.terms!r} names a term twice")
        if terms == ["C"]:
            raise UserError("loss.terms: 'C' alone trains no decoder; add S or B")
        if self.behavioral_from and not {"S", "B"} <= set(terms):
            raise UserError("loss.behavioral_from: S has to train before B joins it; loss.terms has to name both")

    @property
    def weights(self) -> dict[str, float]:
        """Loss name -> its factor; only the terms in use."""
        terms = self.terms.split("+")
        gamma = self.gamma if "C" in terms else 0.0
        beta = {"S": 1.0, "B": 0.0}.get("".join(t for t in terms if t != "C"), self.beta)
        weights = {"C": gamma, "S": (1 - gamma) * beta, "B": (1 - gamma) * (1 - beta)}
        used = {name: weights[term] for term, name in TERMS.items() if term in terms}
        return used | ({"cycle": self.lam} if self.lam else {})


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a learning-rate schedule over all steps."""

    lr: float = setting(1e-3, least=0)
    lr_without_b: float | None = setting(None, "in place of lr when loss.terms has no B", least=0)
    weight_decay: float = setting(0.01, least=0)
    batch_size: int = setting(32, "models of a global batch, over all workers", least=1)
    epochs: int = setting(8, "of coders that learn; the others need none", least=0)
    schedule: str = setting("cosine", choices=("cosine", "onecycle", "constant"))
    warmup: float = setting(0.05, "share of the steps", least=0, most=1)
    clip: float = setting(1.0, "norm of the gradient; 0 for none", least=0)
    precision: str = setting(
        "float32", "of the coder and of networks; losses are float32", choices=("float32", "tf32", "bf16", "float64")
    )
    compile: bool = setting(False, "the transformer's blocks by torch.compile; the first step then takes a minute")
    reduce: str = setting(
        "exact", "how workers send gradients: in the parameters' type, or in half the bytes", choices=("exact", "bf16")
    )

    def __post_init__(self) -> None:
        check(self, "optim")


@dataclass(frozen=True)
class DataConfig:
    """What the autoencoder sees: queries for the behavioural loss, views for the contrastive one."""

    query_set: str = setting(
        "data", 'data, uniform, gaussian, patches, an image set\'s name, or a union: "data+uniform"'
    )
    query_pool: int = setting(512, "queries on which the originals' outputs are kept", least=1)
    queries: int = setting(128, "drawn anew from the pool at each step", least=1)
    views: str = setting("noise", "two views of a model for C", choices=("permutation", "noise", "none"))
    noise: float = setting(0.1, 'of the views "noise", in standard deviations of a layer\'s weights', least=0)
    mix: float = setting(
        0.0, "share of the models replaced by a random point between them and another training model", least=0, most=1
    )
    align: bool = setting(True, "weight matching of every model to one reference, before encoding")
    symmetries: str = setting(
        "order",
        "what the matching undoes: the order of units, or all that leaves the function as it is (signs of tanh and "
        "sigmoid, scales of relu)",
        choices=SYMMETRIES,
    )
    shards: int = setting(16, "virtual shards of the stream of models, whatever the number of workers", least=1)
    target_precision: str = setting(
        "float16", "of the originals' outputs kept", choices=("float16", "float32", "float64")
    )
    image_directory: str | None = setting(None, "where another image set named in query_set lies")

    def __post_init__(self) -> None:
        check(self, "data")
        if self.mix and not self.align:
            raise UserError("data.mix joins models whose units correspond: it needs data.align")
        if self.symmetries != "order" and not self.align:
            raise UserError("data.symmetries are undone by matching models to a reference: it needs data.align")
        if self.queries > self.query_pool:
            raise UserError(f"data.queries ({self.queries}) cannot exceed data.query_pool ({self.query_pool})")


@dataclass(frozen=True)
class TasksConfig:
    """How the trained autoencoder is judged."""

    samples: int = setting(100, "generated models", least=2)
    images: int = setting(1000, "validation and as many test images that judge, where a set has more", least=1)
    samplers: tuple[str, ...] = setting(
        ("joint_kde",), "of latents; the first gives the headline numbers", choices=SAMPLERS, filled=True
    )
    bandwidth: float = setting(0.3, "in units of the kernel's rule-of-thumb width; the Gaussian's temperature", least=0)
    good: float = setting(
        0.3, "share of the training models, best on validation images, that samplers draw from", above=0, most=1
    )
    select: int = setting(1, "samples drawn for each one kept; the best on validation images are", least=1)
    refine: int = setting(0, "steps on the latent of reconstructions (reported under refined/)", least=0)
    generate_refine: int = setting(0, "steps on the latent of generated models", least=0)
    refiner: str = setting("gauss_newton", "how latents are refined; Adam's steps cost a tenth", choices=REFINERS)
    remeasure: int = setting(
        256,
        "training images for measuring statistics of batch normalisation again (reported under remeasured/); 0: none",
        least=0,
    )
    teachers: int = setting(10, "good models whose averaged outputs a generated model is refined towards", least=1)
    finetune_epochs: int = setting(0, "of generated models, on training images", least=0)
    pairs: int = setting(24, "generated models compared with each other for diversity_l2", least=2)
    candidates: int = setting(8, "training models aligned with each generated one to find the nearest", least=1)

    def __post_init__(self) -> None:
        check(self, "tasks")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything about one autoencoder and its training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    seed: int = setting(0, "of everything random", least=0)

    def __post_init__(self) -> None:
        check(self)
        if "contrastive" in self.loss.weights and self.data.views == "none":
            raise UserError("loss.terms with C needs two views of a model: set data.views to permutation or noise")

    @property
    def epochs(self) -> int:
        """Epochs of training: none for a coder that is only fitted."""
        return self.optim.epochs if CODERS[self.model.kind].learns else 0

    @property
    def optim_in_use(self) -> OptimConfig:
        """`optim` with the learning rate that goes with `loss.terms`."""
        other = self.optim.lr_without_b
        return self.optim if other is None or "behavioral" in self.loss.weights else replace(self.optim, lr=other)


# What `distrecon.train` takes where no setting says how to train: of all coders the one whose reconstructions behave
# most like their originals (docs/autoencoder.md)
RECOMMENDED: dict[str, Any] = {"model.kind": "activation_pca"}

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
