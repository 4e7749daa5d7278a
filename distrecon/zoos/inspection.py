"""Looking at a zoo: whether it is sound (`check`), what is in it (`describe`), one of its models (`export`)."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from distrecon.zoos import seals
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
    damaged = dict(seals.problems(zoo.store, zoo.sealed))
    problems: list[str] = [*damaged.values(), *_listing(zoo)]
    seen: set[tuple[str, int]] = set()
    home: dict[str, str] = {}
    states = 0
    for part, row_groups in zip(zoo.parts, _by_part(zoo), strict=True):
        if part.file in damaged:
            continue
        try:
            for table in _groups(zoo, part, row_groups, problems):
                states += table.num_rows
                problems += _rows(part.file, table, seen, home)
        except UserError as error:
            problems.append(str(error))
    if not damaged:
        problems += _counts(zoo, states, Counter(home.values()))
    if problems:
        recomputed, note, wrong = 0, "the rows have problems", problems
    else:
        recomputed, note, wrong = _recompute(zoo, sample, seed, images_directory)
    unsealed = sum(part.seal is None for part in zoo.parts)
    return Check(states, recomputed, note, tuple(wrong), len(zoo.sealed), unsealed)


def _listing(zoo: Zoo) -> Iterator[str]:
    """Files that zoo.json lists twice, and files in the zoo's folders that it does not list."""
    for name, count in Counter(part.file for part in zoo.parts).items():
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


def _counts(zoo: Zoo, states: int, models: Mapping[str, int]) -> Iterator[str]:
    """Where zoo.json counts otherwise than its files."""
    if states != zoo.num_states:
        yield f"{zoo_format.MANIFEST} says {zoo.num_states} states, the files have {states}"
    for split in zoo_format.SPLITS:
        number = zoo.info["splits"][split]["models"]
        if models[split] != number:
            yield f"{zoo_format.MANIFEST} says {number} models in {split}, the files have {models[split]}"


def _by_part(zoo: Zoo) -> list[list[RowGroup]]:
    groups: list[list[RowGroup]] = [[] for _ in zoo.parts]
    for group in zoo.row_groups:
        groups[group.part].append(group)
    return groups


def _groups(zoo: Zoo, part: zoo_format.Part, row_groups: Sequence[RowGroup], problems: list[str]) -> Iterator[pa.Table]:
    """A part's rows, row group by row group, after its layout has been compared with what zoo.json says."""
    try:
        with zoo.store.open(part.file) as source:
            file = pq.ParquetFile(source)
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            names = file.schema_arrow.names
    except FileNotFoundError:
        raise UserError(f"{part.file} is missing") from None
    except Exception as error:  # the reader raises nearly anything on a damaged file
        raise UserError(f"{part.file} is damaged: {said(error)}") from None
    if names != zoo_format.schema(zoo.architecture.num_parameters).names:
        raise UserError(f"{part.file} has columns {names}")
    if sizes != (wanted := [group.rows for group in row_groups]):
        raise UserError(f"{part.file} has row groups {sizes}, {zoo_format.MANIFEST} says {wanted}")
    for group, table in zoo.read(row_groups):
        found = set(table["split"].to_pylist())
        if found != {group.split}:
            problems.append(f"{part.file}: row group {group.group} is of {sorted(found)}, not of {group.split!r}")
        yield table


def _rows(file: str, table: pa.Table, seen: set[tuple[str, int]], home: dict[str, str]) -> Iterator[str]:
    """Problems of some rows, given the states and models seen before, which it adds to."""
    weights_SP = zoo_format.weights_array(table["weights"])
    finite_S = np.isfinite(weights_SP).all(1)
    columns = (table[c].to_pylist() for c in ("model_id", "epoch", "split"))
    for (model_id, epoch, split), finite in zip(zip(*columns, strict=True), finite_S, strict=True):
        if not finite:
            yield f"{file}: model {model_id!r}, epoch {epoch}: non-finite weights"
        if (model_id, epoch) in seen:
            yield f"{file}: model {model_id!r}, epoch {epoch} appears again"
        seen.add((model_id, epoch))
        if home.setdefault(model_id, split) != split:
            yield f"{file}: model {model_id!r} is both in {home[model_id]!r} and in {split!r}"


def _recompute(zoo: Zoo, sample: int, seed: int, directory: str | None) -> tuple[int, str, list[str]]:
    try:
        images = zoo.images(directory)
    except UserError as error:
        return 0, str(error), []
    arch = zoo.architecture
    rows_S = np.sort(np.random.default_rng(seed).permutation(zoo.num_states)[:sample])
    table = pa.concat_tables([t.select(["model_id", "epoch", "test_accuracy"]) for t in zoo.tables()]).take(rows_S)
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


# -- describing -------------------------------------------------------------------------------------------------------

BARS = " ▁▂▃▄▅▆▇█"


def describe(zoo: Zoo) -> str:
    """Counts, sizes and the distribution of test accuracies, by epoch, for a terminal."""
    arch, info = zoo.architecture, zoo.info
    size = sum(zoo.store.filesystem.get_file_info(zoo.store.path(part.file)).size for part in zoo.parts)
    lines = [
        f"{info['name']}  ({zoo.store})",
        f"  architecture  {arch.name}, {arch.kind}, {arch.num_parameters:,} parameters, {arch.num_tokens} tokens",
        f"  images        {zoo.image_set or 'not known'}",
        f"  models        {zoo.num_models:,} with {zoo.num_states:,} states, {len(info['excluded']):,} excluded",
        "  splits        " + ", ".join(f"{s} {info['splits'][s]['models']:,}" for s in zoo_format.SPLITS),
        f"  on disk       {size / 2**20:,.1f} MiB in {len(zoo.parts):,} files, {len(zoo.row_groups):,} row groups",
        f"  origin        {info['origin']['kind']}, distrecon {info['distrecon']}",
        "",
    ]
    table = pa.concat_tables(
        [t.select(["epoch", "test_accuracy"]) for t in zoo.tables(columns=["epoch", "test_accuracy"])]
    )
    return "\n".join(lines + _accuracies(table))


def facts(zoo: Zoo) -> dict[str, Any]:
    """What a zoo is, as plain data: `describe` for programs."""
    keys = ("name", "models", "states", "splits", "image_set", "origin", "excluded")
    arch = zoo.architecture
    return {
        "zoo": str(zoo.store),
        **{key: zoo.info[key] for key in keys},
        "architecture": {"name": arch.name, "activation": arch.kind, "parameters": arch.num_parameters},
    }


def _accuracies(table: pa.Table) -> list[str]:
    """A line an epoch: the states' test accuracies from 0 to 1 as a small histogram, mean and extremes."""
    lines = ["  test accuracy  0 " + "." * 20 + " 1     mean    min    max  states"]
    for epoch in sorted(set(table["epoch"].to_pylist())):
        column = table.filter(pc.equal(table["epoch"], epoch))["test_accuracy"]
        values = np.array([v for v in column.to_pylist() if v is not None])
        if not len(values):
            lines.append(f"  epoch {epoch:<7}  unknown {len(column):46,}")
            continue
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        bars = "".join(BARS[int(np.ceil(c / counts.max() * (len(BARS) - 1)))] for c in counts)
        lines.append(
            f"  epoch {epoch:<9}  |{bars}|  "
            f"{values.mean():6.3f} {values.min():6.3f} {values.max():6.3f} {len(column):7,}"
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
