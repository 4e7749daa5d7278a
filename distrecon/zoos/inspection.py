"""Looking at a zoo: whether it is sound (`check`), what is in it (`describe`), one of its models (`export`)."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors.torch
import torch

from distrecon.errors import UserError, nearest, said
from distrecon.nets import ModuleArchitecture, evaluate
from distrecon.zoos import format as zoo_format
from distrecon.zoos import parallel, seals
from distrecon.zoos.storage import store
from distrecon.zoos.zoo import RowGroup, Zoo

ACCURACY_TOLERANCE = 2e-3  # recomputed accuracies differ by rounding at ties between classes


@dataclass(frozen=True)
class Check:
    """What a check found; sound where `problems` is empty."""

    states: int
    recomputed: int  # states whose accuracy was computed again
    note: str  # why none was, if none was
    problems: tuple[str, ...]
    sealed: int = 0  # files that were compared with their seals
    unsealed: int = 0  # parts that have none


def check(zoo: Zoo, sample: int = 64, seed: int = 0, images_directory: str | None = None) -> Check:
    """Compares every file with its seal, reads every row again, recomputes the test accuracy of a sample of states."""
    problems = [*_beside(zoo), *_listing(zoo)]
    files = _by_file(zoo)
    found: dict[tuple[int, ...], _File] = dict(parallel.run(_look_into, files, zoo))
    looked = [found[parts] for parts in files]
    problems += [text for each in looked for text in each.problems]
    sound = [each for each in looked if not each.damaged]
    states_S = np.concatenate([np.empty(0, np.uint64), *(each.states_S for each in sound)])
    models = np.concatenate([np.empty(0, np.uint64), *(each.models_M for each in sound)])
    home = np.concatenate([np.empty(0, np.int64), *(each.split_M for each in sound)])
    _, first_M = np.unique(models, return_index=True)
    again = _repeated(states_S), _repeated(_pairs(models, home)[:, 0])
    if any(map(len, again)):
        problems += _named(zoo, [parts for parts in files if not found[parts].damaged], *again)
    if len(sound) == len(looked):
        problems += _counts(zoo, len(states_S), _by_split(home[first_M]))
    if problems:
        recomputed, note, wrong = 0, "the rows have problems", problems
    else:
        recomputed, note, wrong = _recompute(zoo, sample, seed, images_directory)
    unsealed = sum(part.seal is None for part in zoo.parts)
    return Check(len(states_S), recomputed, note, tuple(wrong), len(zoo.sealed), unsealed)


def _listing(zoo: Zoo) -> Iterator[str]:
    """Files that zoo.json lists twice, and files in the zoo's folders that it does not list."""
    for (name, _), count in Counter((part.file, part.group) for part in zoo.parts).items():
        if count > 1:
            yield f"{name} is listed {count} times: {zoo_format.MANIFEST} counts its states as often"
    listed = {part.file for part in zoo.parts} | zoo.sealed.keys()
    # an older zoo's other folders are not listed at all
    folders = {"states", *(name.rpartition("/")[0] for name in zoo.sealed)}
    folders |= {name for name in zoo.store.folders() if name.startswith("images-")}
    for folder in sorted(folders):
        for name in zoo.store.names(folder):
            if name not in listed:
                yield f"{name} is not part of the zoo (left by a writer that died?)"


def _by_split(split_M: np.ndarray) -> list[int]:
    return [int((split_M == number).sum()) for number in range(len(zoo_format.SPLITS))]


def _counts(zoo: Zoo, states: int, models: Sequence[int]) -> Iterator[str]:
    """Where zoo.json counts otherwise than its files."""
    if states != zoo.num_states:
        yield f"{zoo_format.MANIFEST} says {zoo.num_states} states, the files have {states}"
    for split, found in zip(zoo_format.SPLITS, models, strict=True):
        number = zoo.info["splits"][split]["models"]
        if found != number:
            yield f"{zoo_format.MANIFEST} says {number} models in {split}, the files have {found}"


def _beside(zoo: Zoo) -> Iterator[str]:
    """What is wrong with the files beside the parts."""
    states = {part.file for part in zoo.parts}
    yield from dict(seals.problems(zoo.store, {f: s for f, s in zoo.sealed.items() if f not in states})).values()


def _by_file(zoo: Zoo) -> list[tuple[int, ...]]:
    """The parts by the file they lie in."""
    files: dict[str, list[int]] = {}
    for number, part in enumerate(zoo.parts):
        files.setdefault(part.file, []).append(number)
    return [tuple(of) for of in files.values()]


@dataclass(frozen=True)
class _File:
    """What a file holds: a mark of each state and of each model, and the models' splits; and what is wrong with it."""

    problems: list[str]
    damaged: bool = True
    states_S: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    models_M: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    split_M: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def _look_into(parts: tuple[int, ...], zoo: Zoo) -> _File:
    """Compares one file with its seal and reads all its rows."""
    file = zoo.parts[parts[0]].file
    if file in zoo.sealed and (wrong := dict(seals.problems(zoo.store, {file: zoo.sealed[file]}))):
        return _File([*wrong.values()])
    problems: list[str] = []
    states, models = [np.empty(0, np.uint64)], [np.empty((0, 2), np.uint64)]
    groups = zoo.groups(np.flatnonzero(np.isin(zoo.layout.part_G, parts)))
    try:
        _compare_groups(zoo, file, groups)
        for group, table in zoo.read(groups):
            if without := [name for name in ("model_id", "epoch", "split") if table[name].null_count]:
                raise UserError(f"{file}: row group {group.group} has rows without {without[0]}")
            found = set(table["split"].to_pylist())
            if found != {group.split}:
                problems.append(f"{file}: row group {group.group} is of {sorted(found)}, not of {group.split!r}")
            finite_S = np.isfinite(zoo_format.weights_array(table["weights"])).all(1)
            for row in table.filter(pa.array(~finite_S)).select(["model_id", "epoch"]).to_pylist():
                problems.append(f"{file}: model {row['model_id']!r}, epoch {row['epoch']}: non-finite weights")
            model_S, state_S, split_S = _marks(table)
            states.append(state_S)
            models.append(_pairs(model_S, split_S))
    except UserError as error:
        return _File([*problems, str(error)])
    models_M2 = np.unique(np.concatenate(models), axis=0)
    return _File(problems, False, np.concatenate(states), models_M2[:, 0], models_M2[:, 1].astype(np.int64))


def _compare_groups(zoo: Zoo, file: str, groups: Sequence[RowGroup]) -> None:
    """UserError where a file's columns or row groups are not what `zoo.json` says."""
    try:
        with zoo.store.open(file) as source:
            opened = pq.ParquetFile(source)
            sizes = [opened.metadata.row_group(g).num_rows for g in range(opened.metadata.num_row_groups)]
            names = opened.schema_arrow.names
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except Exception as error:  # the reader raises nearly anything on a damaged file
        raise UserError(f"{file} is damaged: {said(error)}") from None
    if names != zoo_format.schema(zoo.architecture.num_parameters).names:
        raise UserError(f"{file} has columns {names}")
    wanted = [group.rows for group in sorted(groups, key=lambda group: group.group)]
    if sizes != wanted:
        raise UserError(f"{file} has row groups {sizes}, {zoo_format.MANIFEST} says {wanted}")


def _marks(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row, a mark of its model and one of its state (64 bits), and its split's number (one more: unknown)."""
    names = table["model_id"].combine_chunks().dictionary_encode()
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names.dictionary.to_pylist()]
    model_S = np.frombuffer(b"".join(digests), np.uint64)[names.indices.to_numpy()]
    mixed_S = (model_S ^ table["epoch"].to_numpy().astype(np.uint64) * np.uint64(_ODD[0])) * np.uint64(_ODD[1])
    splits = {split: number for number, split in enumerate(zoo_format.SPLITS)}
    split_S = np.array([splits.get(split, len(splits)) for split in table["split"].to_pylist()])
    return model_S, mixed_S, split_S


def _pairs(model_S: np.ndarray, split_S: np.ndarray) -> np.ndarray:
    """Every model with every split it is in, once, [M, 2]."""
    return np.unique(np.stack([model_S, split_S.astype(np.uint64)], 1), axis=0)


_ODD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # multiplying by these and folding spreads every bit


def _repeated(marks: np.ndarray) -> np.ndarray:
    """Those that are there more than once."""
    unique, counts = np.unique(marks, return_counts=True)
    return unique[counts > 1]


def _named(zoo: Zoo, files: Sequence[tuple[int, ...]], states: np.ndarray, models: np.ndarray) -> Iterator[str]:
    """The states that appear again, and the models of two splits, by name; the files are read once more."""
    seen: set[int] = set()
    home: dict[int, str] = {}
    for parts in files:
        groups = zoo.groups(np.flatnonzero(np.isin(zoo.layout.part_G, parts)))
        for group, table in zoo.read(groups, ["model_id", "epoch", "split"]):
            model_S, state_S, _ = _marks(table)
            file = zoo.parts[group.part].file
            for i in np.flatnonzero(np.isin(state_S, states) | np.isin(model_S, models)):
                row = {name: table[name][int(i)].as_py() for name in ("model_id", "epoch", "split")}
                model, state = int(model_S[i]), int(state_S[i])
                if state in seen:
                    yield f"{file}: model {row['model_id']!r}, epoch {row['epoch']} appears again"
                seen.add(state)
                if home.setdefault(model, row["split"]) != row["split"]:
                    yield f"{file}: model {row['model_id']!r} is both in {home[model]!r} and in {row['split']!r}"


def _recompute(zoo: Zoo, sample: int, seed: int, directory: str | None) -> tuple[int, str, list[str]]:
    try:
        images = zoo.images(directory)
    except UserError as error:
        return 0, str(error), []
    arch = zoo.architecture
    rows_S = np.sort(np.random.default_rng(seed).permutation(zoo.num_states)[:sample])
    table = _of_rows(zoo, rows_S, ["model_id", "epoch", "test_accuracy"])
    theta_SP = torch.from_numpy(zoo.read_rows(rows_S))
    if isinstance(arch, ModuleArchitecture) and arch.module is None:
        return 0, "running its networks needs --module", []
    scores = evaluate(arch, theta_SP, images.test.images, images.test.labels_Q)
    problems, known = [], 0
    for row, found in zip(table.to_pylist(), scores.accuracy_B.tolist(), strict=True):
        if row["test_accuracy"] is None:
            continue
        known += 1
        if abs(row["test_accuracy"] - found) > ACCURACY_TOLERANCE:
            problems.append(
                f"model {row['model_id']!r}, epoch {row['epoch']}: "
                f"test accuracy {row['test_accuracy']:.4f} is recorded, {found:.4f} on {images.name}"
            )
    return known, "" if known else "the zoo records no accuracies", problems


def _of_rows(zoo: Zoo, rows_S: np.ndarray, columns: list[str]) -> pa.Table:
    """Columns of some rows, which ascend."""
    needed = np.unique(np.searchsorted(zoo.layout.ends_G, rows_S, side="right"))
    schema = zoo_format.schema(zoo.architecture.num_parameters)
    found = [pa.schema([schema.field(name) for name in columns]).empty_table()]
    for group, table in zoo.read(zoo.groups(needed), columns):
        inside = (rows_S >= group.first_row) & (rows_S < group.first_row + group.rows)
        found.append(table.take(rows_S[inside] - group.first_row))
    return pa.concat_tables(found)


# -- describing -------------------------------------------------------------------------------------------------------

BARS = " ▁▂▃▄▅▆▇█"


def describe(zoo: Zoo) -> str:
    """Counts, sizes and the distribution of test accuracies, by epoch, for a terminal."""
    arch, info = zoo.architecture, zoo.info
    size, files = _size(zoo), _by_file(zoo)
    lines = [
        f"{info['name']}  ({zoo.store})",
        f"  architecture  {arch.name}, {arch.kind}, {arch.num_parameters:,} parameters, {arch.num_tokens} tokens",
        f"  images        {zoo.image_set or 'not known'}",
        f"  models        {zoo.num_models:,} with {zoo.num_states:,} states, {len(info['excluded']):,} excluded",
        "  splits        " + ", ".join(f"{s} {info['splits'][s]['models']:,}" for s in zoo_format.SPLITS),
        f"  on disk       {size / 2**20:,.1f} MiB in {len(files):,} files, {len(zoo.layout.rows_G):,} row groups",
        f"  origin        {info['origin']['kind']}, distrecon {info['distrecon']}",
        "",
    ]
    found = dict(parallel.run(_epochs_and_accuracies, files, zoo))
    epoch_S, accuracy_S = (np.concatenate([np.empty(0), *(found[parts][i] for parts in files)]) for i in range(2))
    return "\n".join(lines + _accuracies(epoch_S, accuracy_S))


def _size(zoo: Zoo) -> int:
    """Bytes of the files with states, by their seals where they have some; missing ones have none."""
    seal_of = {part.file: part.seal for part in zoo.parts}
    unknown = [zoo.store.path(file) for file, seal in seal_of.items() if seal is None]
    known = sum(int(seal.rpartition(":")[2]) for seal in seal_of.values() if seal is not None)
    return known + sum(info.size or 0 for info in zoo.store.filesystem.get_file_info(unknown))


def _epochs_and_accuracies(parts: tuple[int, ...], zoo: Zoo) -> tuple[np.ndarray, np.ndarray]:
    """Of each state of a file; NaN where the accuracy is not known."""
    groups = zoo.groups(np.flatnonzero(np.isin(zoo.layout.part_G, parts)))
    tables = [table for _, table in zoo.read(groups, ["epoch", "test_accuracy"])]
    if not tables:
        return np.empty(0, np.int32), np.empty(0, np.float32)
    table = pa.concat_tables(tables)
    return table["epoch"].to_numpy(), table["test_accuracy"].to_numpy()


def facts(zoo: Zoo) -> dict[str, Any]:
    """What a zoo is, as plain data: `describe` for programs."""
    keys = ("name", "models", "states", "splits", "image_set", "origin", "excluded")
    arch = zoo.architecture
    return {
        "zoo": str(zoo.store),
        **{key: zoo.info[key] for key in keys},
        "architecture": {"name": arch.name, "activation": arch.kind, "parameters": arch.num_parameters},
    }


def _accuracies(epoch_S: np.ndarray, accuracy_S: np.ndarray) -> list[str]:
    """A line an epoch: the states' test accuracies from 0 to 1 as a small histogram, mean and extremes."""
    lines = ["  test accuracy  0 " + "." * 20 + " 1     mean    min    max  states"]
    for epoch in np.unique(epoch_S).astype(int).tolist():
        every = accuracy_S[epoch_S == epoch].astype(float)
        values = every[np.isfinite(every)]
        if not len(values):
            lines.append(f"  epoch {epoch:<7}  unknown {len(every):46,}")
            continue
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        bars = "".join(BARS[int(np.ceil(c / counts.max() * (len(BARS) - 1)))] for c in counts)
        lines.append(
            f"  epoch {epoch:<9}  |{bars}|  "
            f"{values.mean():6.3f} {values.min():6.3f} {values.max():6.3f} {len(every):7,}"
        )
    return lines


# -- exporting --------------------------------------------------------------------------------------------------------


def export(zoo: Zoo, model_id: str, out: str | Path, epoch: int | None = None) -> int:
    """Writes one state of a model as safetensors, under its layers' names; returns its epoch (the last by default).

    The file's metadata has the architecture, the model's id and epoch. Raises UserError for an unknown model or epoch,
    and where the file exists.
    """
    path = Path(out)
    if path.exists():
        raise UserError(f"--out {path}: exists already")
    rows = np.concatenate([_matches(table, model_id) for table in _with_rows(zoo)])
    if not len(rows):
        known = pa.concat_tables(zoo.tables(columns=["model_id"]))["model_id"].unique().to_pylist()
        raise UserError(f"{zoo.store}: no model {model_id!r}{nearest(model_id, known) if len(known) < 5000 else ''}")
    epochs = dict(sorted(map(tuple, rows.tolist())))
    chosen = max(epochs) if epoch is None else epoch
    if chosen not in epochs:
        raise UserError(f"{zoo.store}: model {model_id!r} has epochs {', '.join(map(str, epochs))}, not {chosen}")
    theta_P = torch.from_numpy(zoo.read_rows(np.array([epochs[chosen]])))[0]
    metadata = {
        "architecture": json.dumps(zoo.architecture.to_dict()),
        "model_id": model_id,
        "epoch": str(chosen),
        "zoo": zoo.name,
    }
    content = safetensors.torch.save(zoo.architecture.unflatten(theta_P), metadata)
    store(path.absolute().parent).write(path.name, content)
    return chosen


def _with_rows(zoo: Zoo) -> Iterator[pa.Table]:
    first = 0
    for table in zoo.tables(columns=["model_id", "epoch"]):
        yield table.append_column("row", pa.array(np.arange(first, first + table.num_rows)))
        first += table.num_rows


def _matches(table: pa.Table, model_id: str) -> np.ndarray:
    """(epoch, row) of a model's states, [S, 2]."""
    found = table.filter(pc.equal(table["model_id"], model_id))
    return np.stack([found["epoch"].to_numpy(), found["row"].to_numpy()], axis=1)
