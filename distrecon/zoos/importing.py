"""Imports published zoos: checkpoint files become rows, in parallel over Ray, and what cannot is listed.

A file that holds more than tensors is refused, never executed. NaN or exploded weights, missing metrics, truncated
files, other shapes, repeated epochs are skipped, counted and listed with their reasons in `import_report.json`.
A killed import continues where it stopped; importing into an existing zoo appends what it does not have.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon.errors import UserError, said
from distrecon.images import load
from distrecon.nets import ACTIVATIONS, Architecture, ChainArchitecture
from distrecon.nets.recognise import recognise
from distrecon.zoos import build, datasets
from distrecon.zoos import format as zoo_format
from distrecon.zoos.checkpoints import read_state_dict, to_theta
from distrecon.zoos.seals import seals_of
from distrecon.zoos.settings import ArchitectureConfig, SplitConfig, assign_splits
from distrecon.zoos.sources import Model, Skip, Source, State, find, in_shares, problem
from distrecon.zoos.storage import Store, store
from distrecon.zoos.writer import Writer, writing
from distrecon.zoos.zoo import open_zoo

MODELS_PER_UNIT = 50
REPORT = "import_report.json"


@dataclass(frozen=True)
class ImportOptions:
    """What to take from a source, and what it does not say itself.

    `epochs`: only these; `architecture`: one of the known names, where several have the same weights; `activation`:
    where the source's configuration does not name it; `store_images`: as of `write_zoo`; `module`: the torch module,
    `package.file:factory`, whose state dicts they are (`images` then gives the inputs to trace it on);
    `strict`: stop at the first thing that would be skipped; `percent`: the source's accuracies are percentages.
    """

    epochs: tuple[int, ...] | None = None
    architecture: str | None = None
    activation: str | None = None
    images: str | None = None
    images_directory: str | None = None
    store_images: bool | None = None
    name: str | None = None
    seed: int = 0
    split: SplitConfig = field(default_factory=SplitConfig)
    strict: bool = False
    module: str | None = None
    percent: bool = False


@dataclass(frozen=True)
class ImportReport:
    """What an import read and what it left out; also in the zoo's `import_report.json`."""

    zoo: str
    source: str
    models: int
    states: int
    skipped: tuple[Mapping[str, Any], ...]  # model_id, file, reason

    @property
    def reasons(self) -> dict[str, int]:
        """How many were skipped for each kind of reason, the most frequent first."""
        return dict(Counter(kind_of(skip["reason"]) for skip in self.skipped).most_common())


def kind_of(reason: str) -> str:
    """A reason without its particulars."""
    return reason.split(" (")[0].split(":")[0]


@dataclass(frozen=True)
class ImportUnit:
    """The models of one task, with their splits."""

    number: int
    models: tuple[Model, ...]
    splits: tuple[str, ...]


def import_zoo(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ImportOptions | None = None,
    progress: build.Progress | None = None,
    resources: dict[str, Any] | None = None,
) -> ImportReport:
    """Imports everything at `source` into the zoo at `out`, which is made or appended to.

    Raises UserError when there is nothing to import, when nothing could be read, when the architecture or activation
    are not known, or with `strict` for the first thing that would be skipped.
    """
    options = options or ImportOptions()
    where, origin = store(out), find(store(source))
    with writing(where) as writer:
        return _import(writer, origin, options, progress, resources or {"num_cpus": 1})


def _import(
    writer: Writer,
    origin: Source,
    options: ImportOptions,
    progress: build.Progress | None,
    resources: dict[str, Any],
) -> ImportReport:
    where = writer.store
    known = _known_states(where)
    arch = _architecture(where, origin, options)
    image_set, dataset_problem = _image_set(where, origin, options)
    units, repeated = _units(writer, origin, options, known)
    shared = (origin, arch, options, known)
    reports = build.run(units, import_unit, writer, *shared, progress=progress, resources=resources)
    skipped = [*dataset_problem, *repeated, *(skip for report in reports for skip in report["skipped"])]
    parts = [zoo_format.Part(**report["part"]) for report in reports if report["part"]]
    report = ImportReport(
        zoo=str(where),
        source=str(origin.store),
        models=sum(report["models"] for report in reports),
        states=sum(part.rows for part in parts),
        skipped=tuple(skipped),
    )
    writer.check()
    where.write(REPORT, json.dumps({**asdict(report), "reasons": report.reasons}, indent=1).encode())
    if parts:
        _commit(writer, arch, image_set, parts, report, options)
    build.finish(where)
    if not parts and not known:
        raise UserError(f"{origin.store}: nothing could be imported: {_most(report)}")
    return report


def _most(report: ImportReport) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in list(report.reasons.items())[:3]) or "no checkpoints"


# -- before the tasks -------------------------------------------------------------------------------------------------


def _known_states(where: Store) -> dict[str, tuple[str, frozenset[int]]]:
    """Model id -> its split and epochs, of the zoo that is appended to."""
    if not where.exists(zoo_format.MANIFEST):
        return {}
    found: dict[str, tuple[str, set[int]]] = {}
    for table in open_zoo(where).tables(columns=["model_id", "epoch", "split"]):
        for model_id, epoch, split in zip(*(table[c].to_pylist() for c in table.column_names), strict=True):
            found.setdefault(model_id, (split, set()))[1].add(epoch)
    return {model_id: (split, frozenset(epochs)) for model_id, (split, epochs) in found.items()}


def _architecture(where: Store, origin: Source, options: ImportOptions) -> Architecture:
    """The existing zoo's, or that of the first checkpoint that can be read."""
    if where.exists(zoo_format.MANIFEST):
        return open_zoo(where).architecture
    if options.module is not None:
        if options.images is None:
            raise UserError("importing state dicts of a module needs the images it reads: give --images")
        config = ArchitectureConfig(module=options.module)
        return config.build(load(options.images, options.images_directory))
    models = origin.models()
    spread = np.linspace(0, len(models) - 1, min(VOTERS, len(models))).round().astype(int).tolist()
    voters = [models[i] for i in spread] + [model for i, model in enumerate(models) if i not in set(spread)]
    problems: list[str] = []
    votes: Counter[str] = Counter()
    for number, model in enumerate(voters):
        if number >= VOTERS and (votes or len(problems) >= MOST_PROBLEMS):
            break
        for state in _states(origin, model):
            found = state.reason if isinstance(state, Skip) else _recognised(state, origin, options)
            if isinstance(found, Architecture):
                votes[json.dumps(found.to_dict())] += 1
                break
            if isinstance(state, State):
                problems.append(found)
    if not votes:
        raise UserError(f"{origin.store}: no checkpoint can be read: {problems[0] if problems else 'there is none'}")
    return Architecture.from_dict(json.loads(votes.most_common(1)[0][0]))


VOTERS = 9  # models all over the source, whose architectures are counted: one file that does not belong decides nothing
MOST_PROBLEMS = 1000  # files without any architecture before there is said to be none


def _recognised(state: State, origin: Source, options: ImportOptions) -> Architecture | str:
    """The architecture of a checkpoint, or what is wrong with it."""
    try:
        weights = read_state_dict(origin.store.read(state.file), state.file)
        return recognise(weights, _activation(state, options), options.architecture)
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a stranger's file makes its readers raise
        return f"{state.file}: cannot be read ({said(error)})"


ACTIVATION_KEYS = ("model::nlin", "activation", "nlin", "nonlinearity")


def _named_activation(state: State) -> str | None:
    """The activation that a state's configuration names, under its name here ("leakyrelu" is "leaky_relu")."""
    config = json.loads(state.config)
    named = next((str(config[key]) for key in ACTIVATION_KEYS if key in config), None) if config else None
    if named is None:
        return None
    plain = named.lower().replace("_", "").replace("-", "")
    return next((known for known in ACTIVATIONS if known.replace("_", "") == plain), named)


def _activation(state: State, options: ImportOptions) -> str:
    named = options.activation or _named_activation(state)
    if named is None:
        raise UserError(f"{state.file}: its activation is not known: give --activation")
    return named


def _image_set(where: Store, origin: Source, options: ImportOptions) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The zoo's entry for its images, and why `dataset.pt` is not it."""
    if options.images is not None:
        images = load(options.images, options.images_directory)
        return datasets.entry(where, images, options.images_directory, options.store_images), []
    unknown = zoo_format.image_entry(None)
    if not origin.store.exists(datasets.FILE):
        return unknown, []
    try:
        return datasets.copy_images(origin.store, where), []
    except UserError as error:
        reason = str(error).removeprefix(f"{datasets.FILE}: ")
    except Exception as error:  # whatever its content makes its readers raise
        reason = f"cannot be read ({said(error)})"
    return unknown, [_skip("", Skip(datasets.FILE, reason))]


def _units(
    writer: Writer, origin: Source, options: ImportOptions, known: Mapping[str, tuple[str, frozenset[int]]]
) -> tuple[list[ImportUnit], list[dict[str, str]]]:
    """The models by task, as an interrupted import had them, or all anew in a seeded random order; repeated ids."""
    request = {"kind": "import", "source": str(origin.store), "options": json.loads(json.dumps(asdict(options)))}
    request["options"].pop("strict")
    where = writer.store
    interrupted = build.begun(where)
    if interrupted is None:
        content = {**request, **_listing(origin, options, known)}
        first = build.begin(writer, content)
    else:
        first, content = interrupted
        content["options"] = {"percent": False, **content.get("options", {})}  # one begun by an earlier version
        if {key: content.get(key) for key in request} != request:
            raise UserError(
                f"{where} has an unfinished {content['kind']} of {content.get('source', 'a zoo')} "
                "with other options: finish it by the same command, or delete its folder 'unfinished'"
            )
        build.go_on(writer, first, content)
    rows = content["models"]
    chunks = [rows[i : i + MODELS_PER_UNIT] for i in range(0, len(rows), MODELS_PER_UNIT)]
    units = [
        ImportUnit(
            first + number,
            tuple(Model(row["id"], tuple(row["files"])) for row in chunk),
            tuple(row["split"] for row in chunk),
        )
        for number, chunk in enumerate(chunks)
    ]
    return units, content["repeated"]


def _listing(
    origin: Source, options: ImportOptions, known: Mapping[str, tuple[str, frozenset[int]]]
) -> dict[str, list[dict[str, Any]]]:
    """Every model of the source once, with its split, and the folders or files that repeat an id."""
    unique: dict[str, Model] = {}
    repeated = [_skip("", skip) for skip in origin.left_out]
    for model in origin.models():
        if model.model_id != model.model_id.encode(errors="replace").decode():
            repeated.append(_skip(repr(model.model_id), Skip(model.files[0], "its id is no text")))
            continue
        if unique.setdefault(model.model_id, model) is not model:
            repeated.append(_skip(model.model_id, Skip(model.files[0], "duplicate id")))
    if repeated and options.strict:
        raise UserError(f"{repeated[0]['file']}: {repeated[0]['reason']} (--strict)")
    models = list(unique.values())
    models = [models[i] for i in np.random.default_rng(options.seed).permutation(len(models))]
    splits = assign_splits(len(models), options.split)
    rows = [
        {"id": m.model_id, "files": list(m.files), "split": known[m.model_id][0] if m.model_id in known else split}
        for m, split in zip(models, splits, strict=True)
    ]
    return {"models": rows, "repeated": repeated}


# -- in a task --------------------------------------------------------------------------------------------------------


def import_unit(
    unit: ImportUnit,
    where: Store,
    origin: Source,
    arch: Architecture,
    options: ImportOptions,
    known: Mapping[str, tuple[str, frozenset[int]]],
) -> dict[str, Any]:
    """Reads the models of a unit and writes its part; the body of a Ray task."""
    torch.set_num_threads(1)
    rows: list[tuple[str, str, State]] = []
    thetas: list[Tensor] = []
    skipped = []
    for model, split in zip(unit.models, unit.splits, strict=True):
        seen = set(known[model.model_id][1]) if model.model_id in known else set()
        for found in _states(origin, model, options.percent):
            if isinstance(found, State) and options.epochs is not None and found.epoch not in options.epochs:
                continue
            result = found if isinstance(found, Skip) else _read(found, seen, origin, arch)
            if isinstance(result, Skip):
                skipped.append(_skip(model.model_id, result))
                if options.strict:
                    raise UserError(f"{result.file}: {result.reason} (--strict)")
            elif isinstance(found, State):
                seen.add(found.epoch)
                rows.append((model.model_id, split, found))
                thetas.append(result)
    if not rows:
        return {"part": None, "skipped": skipped, "models": 0}
    table = zoo_format.states_table(
        arch,
        model_id=[model_id for model_id, _, _ in rows],
        epoch=[state.epoch for _, _, state in rows],
        split=[split for _, split, _ in rows],
        theta_SP=torch.stack(thetas),
        metrics={m: [(state.metrics or {}).get(m) for _, _, state in rows] for m in zoo_format.METRICS},
        config=[state.config for _, _, state in rows],
    )
    part = zoo_format.write_part(where, zoo_format.part_name(unit.number), table, known)
    return {"part": asdict(part), "skipped": skipped, "models": len({model_id for model_id, _, _ in rows})}


def _states(origin: Source, model: Model, percent: bool = False) -> Iterator[State | Skip]:
    """A model's states; what breaks off the listing of one is a skip, and the others go on."""
    try:
        for found in origin.states(model):
            yield in_shares(found) if percent and isinstance(found, State) else found
    except Exception as error:  # whatever a stranger's folder makes its readers raise
        yield Skip(model.files[0], f"cannot be read ({said(error)})")


def _read(state: State, seen: set[int], origin: Source, arch: Architecture) -> Tensor | Skip:
    """theta[P] of a checkpoint, or why it is left out."""
    if not 0 <= state.epoch < 2**31:
        return Skip(state.file, f"impossible epoch ({state.epoch})")
    if state.epoch in seen:
        return Skip(state.file, f"epoch {state.epoch} is already in the zoo")
    if (reason := problem(state.metrics)) is not None:
        return Skip(state.file, reason)
    named = _named_activation(state)
    if isinstance(arch, ChainArchitecture) and named not in (None, arch.activation):
        return Skip(state.file, f"another activation ({named}; the zoo has {arch.activation})")
    try:
        return to_theta(arch, read_state_dict(origin.store.read(state.file), state.file), state.file)
    except UserError as error:
        return Skip(state.file, str(error).removeprefix(f"{state.file}: "))
    except Exception as error:  # whatever a stranger's file makes its readers raise
        return Skip(state.file, f"cannot be read ({said(error)})")


def _skip(model_id: str, skip: Skip) -> dict[str, str]:
    return {"model_id": model_id, "file": skip.file, "reason": skip.reason}


# -- after the tasks --------------------------------------------------------------------------------------------------


def _commit(
    writer: Writer,
    arch: Architecture,
    image_set: dict[str, Any],
    parts: Sequence[zoo_format.Part],
    report: ImportReport,
    options: ImportOptions,
) -> None:
    where = writer.store
    before: list[zoo_format.Part] = []
    origin: dict[str, Any] = {"kind": "imported", "sources": []}
    name = options.name or report.source.rstrip("/").rpartition("/")[2]
    excluded: list[Any] = []
    sealed: dict[str, str] = {}
    replaced: dict[str, Any] = {}  # the images in whose place others come
    if writer.found is not None:
        old = open_zoo(where)
        before, name, excluded, sealed = old.parts, old.name, old.info["excluded"], old.sealed
        origin = {**old.info["origin"]}
        had = old.info["image_set"]
        image_set = image_set if image_set["name"] else had
        replaced = had if had.get("stored") != image_set.get("stored") else {}
    images = datasets.files_of(image_set)
    files = {file: seal for file, seal in sealed.items() if file not in datasets.files_of(replaced)}
    unsealed = [part.file for part in parts if part.seal is None]  # written by an earlier version
    files |= seals_of(where, [*unsealed, *(file for file in images if file not in files)])
    last = {"source": report.source, "states": report.states, "skipped": len(report.skipped)}
    zoo_format.commit(
        where,
        name=name,
        arch=arch,
        image_set=image_set,
        parts=[*before, *parts],
        origin={**origin, "sources": [*origin.get("sources", []), last]},
        excluded=excluded,
        files=files,
        writer=writer,
    )
    if replaced.get("stored"):
        where.delete_folder(replaced["stored"])
