"""Reading a zoo: `open_zoo(path)` and what it gives: tables, weights, samples, a Ray dataset.

Legend: S states, B models' states, P parameters.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from distrecon.errors import UserError, nearest, reading
from distrecon.images import ImageSet, load
from distrecon.nets import Architecture
from distrecon.nets.given import Given, module_of, running
from distrecon.zoos import datasets, row_groups, seals
from distrecon.zoos import format as zoo_format
from distrecon.zoos.models import Models
from distrecon.zoos.storage import Store, inside, store

if TYPE_CHECKING:
    import ray.data


@dataclass(frozen=True)
class RowGroup:
    """Where some consecutive rows of the zoo lie."""

    part: int  # index into the zoo's parts
    group: int  # row group in that file
    first_row: int
    rows: int
    split: str


@dataclass(frozen=True)
class Zoo:
    """A zoo on disk. Nothing is read but `zoo.json` until rows are asked for; pickles, so workers can be given one.

    `split` is "train", "val", "test", or None for all; rows come in the zoo's own order.
    """

    store: Store
    info: dict[str, Any]  # the content of zoo.json
    images_directory: str | None = None  # where its images lie, if not in the zoo
    modules: tuple[nn.Module, ...] = ()  # one of which runs its networks, where those are a module's

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def digest(self) -> str:
        """A mark of its content: other models, settings or, where the zoo is sealed, other bytes give another one."""
        content = {key: value for key, value in self.info.items() if key != "footers" and (key != "files" or value)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def architecture(self) -> Architecture:
        with reading(f"the architecture in {self.store.path(zoo_format.MANIFEST)}"):
            return running(Architecture.from_dict(self.info["architecture"]), self.modules)

    @property
    def image_set(self) -> str | None:
        """Name of the image set its models were trained on; None where it is not known."""
        return self.info["image_set"]["name"]

    @property
    def image_folder(self) -> str | None:
        """The folder of this machine, outside of the zoo, that its images are read from; None where there is none."""
        entry = self.info["image_set"]
        within = "stored" in entry or self._holds(entry["directory"])
        return self.images_directory or (None if within else entry["directory"])

    def _holds(self, directory: str | None) -> bool:
        """Whether the images' folder that `zoo.json` names is one of the zoo's."""
        return directory is not None and inside(directory) and self.store.exists(directory)

    def images(self, directory: str | Path | None = None) -> ImageSet:
        """The images its models were trained on: from `directory`, or the one that the zoo was opened with (or its
        folder of the set's name), else those in the zoo, else from where they were when it was made."""
        if self.image_set is None:
            raise UserError(f"{self.store} names no image set that its models were trained on: import it with --images")
        limit = self.info["image_set"].get("limit")
        if (given := directory or self.images_directory) is not None:
            inner = Path(given) / self.image_set
            return load(self.image_set, inner if inner.is_dir() else given, limit)
        if "stored" in self.info["image_set"]:
            return datasets.read_images(self.store, self.info["image_set"], self.sealed)
        own = self.info["image_set"]["directory"]
        if own is not None and self.store.local and self._holds(own):  # arrays that lie in the zoo
            own = self.store.path(own)
        if own is not None and not Path(own).is_dir():
            raise UserError(
                f"{self.store}: its images, {self.image_set}, are not in {own}: say where they lie with --images DIR"
            )
        return load(self.image_set, own, limit)

    @property
    def num_states(self) -> int:
        return self.info["states"]

    @property
    def num_models(self) -> int:
        return self.info["models"]

    @property
    def sealed(self) -> dict[str, str]:
        """The seals of its files, by name; none in a zoo that was made before there were any."""
        return self.info["files"]

    @cached_property
    def parts(self) -> list[zoo_format.Part]:
        return zoo_format.parts_of(self.info)

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        """All row groups, in the order of their rows."""
        groups, first = [], 0
        for number, part in enumerate(self.parts):
            for group, (split, rows) in enumerate(part.row_groups()):
                groups.append(RowGroup(number, group, first, rows, split))
                first += rows
        return groups

    def groups_of(self, split: str | None) -> list[RowGroup]:
        """The row groups of a split; UserError for an unknown one."""
        if split is not None and split not in zoo_format.SPLITS:
            raise UserError(f"unknown split {split!r}{nearest(split, zoo_format.SPLITS)}")
        return [group for group in self.row_groups if split in (None, group.split)]

    def rows(self, split: str | None = None) -> Tensor:
        """The rows' numbers in the zoo, [S] int64."""
        spans = [torch.arange(g.first_row, g.first_row + g.rows) for g in self.groups_of(split)]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    def tables(self, split: str | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows file by file, in bounded memory."""
        groups = self.read(self.groups_of(split), columns)
        for _, of_part in itertools.groupby(groups, key=lambda pair: pair[0].part):
            yield pa.concat_tables([table for _, table in of_part])

    def read(
        self, groups: Iterable[RowGroup], columns: Sequence[str] | None = None
    ) -> Iterator[tuple[RowGroup, pa.Table]]:
        """Row groups in the given order, which must be by file: the one place where parts are read.

        Whatever is read is compared with its seal before it is handed on, the first time that this process reads it:
        row group by row group, or in older zoos file by file. Raises UserError for a file that is missing, damaged, or
        not as `zoo.json` describes it.
        """
        schema = zoo_format.schema(self.architecture.num_parameters)
        kinds = {field.name: field.type for field in schema}
        names = schema.names if columns is None else [name for name in schema.names if name in columns]
        by_part = [(self.parts[n], list(of)) for n, of in itertools.groupby(groups, key=lambda group: group.part)]
        whole = (part.file for part, _ in by_part if part.footer is None)
        with seals.Comparison(self.store, self.sealed, whole) as comparison:
            for part, of in by_part:
                numbers = [group.group for group in of]
                if part.footer is None:
                    tables = comparison.held(part.file, zoo_format.read_groups(self.store, part.file, numbers, names))
                else:
                    tables = row_groups.read(self.store, part.file, part.footer, numbers, names, kinds["weights"])
                for group, table in zip(of, tables, strict=True):
                    if table.num_rows != group.rows or any(kinds[f.name] != f.type for f in table.schema):
                        raise UserError(f"{self.store.path(part.file)} is damaged: not as {zoo_format.MANIFEST} says")
                    yield group, table

    def table(self, split: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows as one Arrow table with the columns of the format."""
        schema = zoo_format.schema(self.architecture.num_parameters)
        chosen = schema if columns is None else pa.schema([schema.field(c) for c in columns])
        return pa.concat_tables([chosen.empty_table(), *self.tables(split, columns)])

    def weights(self, split: str | None = None) -> Tensor:
        """theta[S, P] float32."""
        array = zoo_format.weights_array(self.table(split, ["weights"])["weights"])
        return torch.from_numpy(array.copy())

    def models(self, split: str | None = None) -> Models:
        """Weights and properties as tensors; a property that the zoo does not know is NaN."""
        table = self.table(split)

        def numbers(column: str) -> Tensor:
            return torch.tensor(table[column].to_numpy(), dtype=torch.float32)

        return Models(
            theta_BP=torch.from_numpy(zoo_format.weights_array(table["weights"]).copy()),
            model_id=table["model_id"].to_pylist(),
            row_B=self.rows(split),
            epoch_B=torch.tensor(table["epoch"].to_numpy()).long(),
            train_accuracy_B=numbers("train_accuracy"),
            test_accuracy_B=numbers("test_accuracy"),
            generalization_gap_B=numbers("generalization_gap"),
            train_loss_B=numbers("train_loss"),
        )

    def read_rows(self, rows_S: np.ndarray) -> np.ndarray:
        """weights[S, P] float32 of the given rows, in the given order; each row group is read once, one at a time."""
        out_SP = np.empty((len(rows_S), self.architecture.num_parameters), np.float32)
        order = np.argsort(rows_S, kind="stable")
        wanted = np.asarray(rows_S)[order]
        needed = np.unique(np.searchsorted(self._group_ends, wanted, side="right"))
        for group, table in self.read((self.row_groups[i] for i in needed), ["weights"]):
            low, high = np.searchsorted(wanted, [group.first_row, group.first_row + group.rows])
            weights_GP = zoo_format.weights_array(table["weights"])
            out_SP[order[low:high]] = weights_GP[wanted[low:high] - group.first_row]
        return out_SP

    @cached_property
    def _group_ends(self) -> np.ndarray:
        return np.array([group.first_row + group.rows for group in self.row_groups])

    def sample(self, count: int, seed: int, split: str | None = "train") -> Tensor:
        """theta[count, P] of different states drawn at random; the same for the same zoo and seed."""
        rows_S = self.rows(split).numpy()
        if count > len(rows_S):
            raise UserError(f"{self.store}: {count} states wanted, split {split!r} has {len(rows_S)}")
        return torch.from_numpy(self.read_rows(np.random.default_rng(seed).choice(rows_S, count, replace=False)))

    def dataset(self, split: str | None = None, columns: Sequence[str] | None = None) -> "ray.data.Dataset":
        """The rows as a Ray dataset, read lazily where Ray runs its tasks."""
        import ray.data

        numbers = sorted({group.part for group in self.groups_of(split)})

        def read(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
            groups = [group for group in self.groups_of(split) if group.part == int(batch["part"][0])]
            table = pa.concat_tables([table for _, table in self.read(groups, columns)])
            yield table if columns is None else table.select(list(columns))

        items = [{"part": number} for number in numbers]
        return ray.data.from_items(items, override_num_blocks=max(1, len(items))).map_batches(read, batch_size=1)


def open_zoo(
    path: str | os.PathLike[str] | Store,
    filesystem: Any = None,
    images: str | os.PathLike[str] | None = None,
    module: Given | Sequence[Given] | None = None,
) -> Zoo:
    """The zoo at a local path, a URL (`s3://...`), or a path on a pyarrow or fsspec filesystem.

    `images` is the directory where its images lie, for a zoo that has them neither in itself nor where they were.
    `module` runs the networks of a zoo that was made with a torch module: the module, a factory of it, or its name
    `package.file:factory`; or several, of which the one that fits is taken. Nothing is imported but what is given here.

    Raises UserError when there is none, when it is unfinished, or when its format is newer than this distrecon knows.
    """
    where = path if isinstance(path, Store) else store(path, filesystem)
    if where.exists(zoo_format.UNFINISHED) and not where.exists(zoo_format.MANIFEST):
        raise UserError(f"{where} is an unfinished zoo: run the command that began it again, and it continues")
    given: list[Given]
    if module is None:
        given = []
    elif isinstance(module, str) or not isinstance(module, Sequence):
        given = [module]
    else:
        given = [*module]
    directory = os.path.abspath(images) if images is not None else None
    return Zoo(where, zoo_format.read_manifest(where), directory, tuple(module_of(one) for one in given))
