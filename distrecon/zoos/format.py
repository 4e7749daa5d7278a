"""The zoo on disk: `zoo.json` and Parquet files of model states, readable with pyarrow alone.

    ZOO/zoo.json                    what the zoo is, and the list of its files: written last, so it is the commit
    ZOO/states/part-00000.parquet   one row a model state; all states of a model lie together
    ZOO/history/part-00000.parquet  optional: per-epoch metrics of every model, also of epochs without weights

Only the files that `zoo.json` lists belong to the zoo, each with its seal (`seals.py`), and each part with that of its
footer, which lists what its row groups hold (`row_groups.py`). A writer that dies leaves files
that are not listed, or no `zoo.json` at all: the old zoo or a resumable beginning, never a broken zoo.

Row groups are small (`ROW_GROUP_BYTES`) and never mix splits, so that a split or a shard is read without the rest.
A row's number in the zoo (`row`) counts through the files in their listed order; appending never renumbers.

Legend: S states, P parameters.
"""

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from distrecon.errors import UserError, reading, said
from distrecon.images import ImageSet
from distrecon.nets import Architecture
from distrecon.zoos import row_groups, seals, writer
from distrecon.zoos.storage import Store, inside
from distrecon.zoos.writer import Writer

FORMAT, VERSION = "distrecon-zoo", 2  # 1, unless several parts lie in one file
SPLITS = ("train", "val", "test")
METRICS = ("train_accuracy", "test_accuracy", "generalization_gap", "train_loss")
ROW_GROUP_BYTES = 512 * 1024
LARGE, PIECE_BYTES = 512 * 2**20, 10 * 2**20  # a zoo of so many bytes of weights is shuffled, and read, in such pieces
MOST_ROWS, MOST_GROUPS = 2**31, 2**20  # of a part: what a damaged list asks for beyond that is not counted out
MANIFEST, UNFINISHED = writer.MANIFEST, writer.UNFINISHED


def weights_type(num_parameters: int) -> pa.DataType:
    return pa.fixed_shape_tensor(pa.float32(), (num_parameters,))


def schema(num_parameters: int) -> pa.Schema:
    """The columns of a state, in order."""
    return pa.schema(
        [
            ("model_id", pa.string()),
            ("epoch", pa.int32()),
            ("split", pa.string()),
            ("weights", weights_type(num_parameters)),
            *((metric, pa.float32()) for metric in METRICS),
            ("config", pa.string()),
        ]
    )


def weights_column(weights_SP: np.ndarray) -> pa.FixedShapeTensorArray:
    """weights[S, P] float32 as a column; S may be 0."""
    kind = weights_type(weights_SP.shape[1])
    values = pa.array(weights_SP.reshape(-1), pa.float32())
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(values, weights_SP.shape[1]))


def states_table(
    arch: Architecture,
    *,
    model_id: Sequence[str],
    epoch: Sequence[int],
    split: Sequence[str],
    theta_SP: Tensor,
    metrics: Mapping[str, Any],
    config: Sequence[str],
) -> pa.Table:
    """States as a table of the format; `metrics` has a [S] sequence for each of METRICS (None where unknown).

    Raises UserError that names the model for non-finite weights, an unknown split, a model in two splits, or the same
    epoch of a model twice.
    """
    arch.check(theta_SP)
    finite_S = theta_SP.isfinite().all(1)
    for i, name in enumerate(model_id):
        if not finite_S[i]:
            raise UserError(f"model {name!r}, epoch {epoch[i]}: non-finite weights")
        if split[i] not in SPLITS:
            raise UserError(f"model {name!r}: unknown split {split[i]!r}; known: {', '.join(SPLITS)}")
    _check_keys(model_id, epoch, split)
    weights_SP = theta_SP.detach().cpu().float().contiguous().numpy()
    columns = [
        pa.array(model_id, pa.string()),
        pa.array(epoch, pa.int32()),
        pa.array(split, pa.string()),
        weights_column(weights_SP),
        *(pa.array(metrics[metric], pa.float32()) for metric in METRICS),
        pa.array(config, pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=schema(arch.num_parameters))


def _check_keys(model_id: Sequence[str], epoch: Sequence[int], split: Sequence[str]) -> None:
    for (name, at), count in Counter(zip(model_id, epoch, strict=True)).items():
        if count > 1:
            raise UserError(f"model {name!r}: epoch {at} appears {count} times")
    home: dict[str, str] = {}
    for name, part in zip(model_id, split, strict=True):
        if home.setdefault(name, part) != part:
            raise UserError(f"model {name!r} is both in {home[name]!r} and in {part!r}: a model belongs to one split")


# -- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A Parquet file of the zoo. Its row groups hold `group_rows` rows; the last of each split has the rest."""

    file: str
    group_rows: int
    states: Mapping[str, int]  # split -> number of rows, in the file's order
    models: Mapping[str, int]  # split -> number of models that no earlier part has
    seal: str | None = None  # of the file; None in zoos that were made before there were any
    footer: str | None = None  # the seal of its footer; None where that lists no row groups
    group: int = 0  # its first row group in the file, where several parts lie in one

    def __post_init__(self) -> None:
        if not re.fullmatch(r"states/part-\d{5,}\.parquet", self.file):
            raise ValueError(f"a part is called {self.file!r}")
        counts = [*self.states.values(), *self.models.values()]
        if not _whole(self.group_rows, 1) or not all(_whole(count, 0) for count in [*counts, self.group]):
            raise ValueError(f"{self.file} has counts that are no whole numbers")
        if self.rows > MOST_ROWS or self.rows > MOST_GROUPS * self.group_rows:
            raise ValueError(f"{self.file} has {self.rows} states in row groups of {self.group_rows}")
        if unknown := [split for split in [*self.states, *self.models] if split not in SPLITS]:
            raise ValueError(f"{self.file} has a split {unknown[0]!r}")

    @property
    def rows(self) -> int:
        return sum(self.states.values())

    def row_groups(self) -> Iterator[tuple[str, int]]:
        """Split and number of rows of each row group, in order."""
        for split, rows in self.states.items():
            for start in range(0, rows, self.group_rows):
                yield split, min(self.group_rows, rows - start)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def part_name(number: int) -> str:
    return f"states/part-{number:05d}.parquet"


def part_number(file: str) -> int:
    return int(file.removeprefix("states/part-").removesuffix(".parquet"))


def rows_per_group(num_parameters: int) -> int:
    return max(1, ROW_GROUP_BYTES // (4 * num_parameters))


def write_part(store: Store, file: str, table: pa.Table, known: Container[str] = ()) -> Part:
    """Writes states as one Parquet file, split by split, atomically. The rows of each split keep their order.

    `known` models have states in other parts of the zoo, which count them.
    """
    size = rows_per_group(table.schema.field("weights").type.shape[0])
    by_split = {split: table.filter(pc.equal(table["split"], split)) for split in SPLITS}
    by_split = {split: rows for split, rows in by_split.items() if rows.num_rows}
    states = {split: rows.num_rows for split, rows in by_split.items()}
    models = {s: sum(name not in known for name in t["model_id"].unique().to_pylist()) for s, t in by_split.items()}
    groups = (rows.slice(i, size) for rows in by_split.values() for i in range(0, rows.num_rows, size))
    return Part(file, size, states, models, *write_groups(store, file, table.schema, groups))


def write_groups(store: Store, file: str, schema: pa.Schema, groups: Iterable[pa.Table]) -> tuple[str, str]:
    """Writes a part's file of these row groups, atomically; its seal, and that of its footer."""
    compression = {column: "none" if column == "weights" else "zstd" for column in schema.names}
    sink = row_groups.Sink()
    with pq.ParquetWriter(
        pa.PythonFile(sink.content, mode="w"),
        schema,
        compression=compression,
        use_dictionary=["model_id", "split", "config"],
        data_page_size=2**30,  # a row group's weights are one page, however large a model is
    ) as writer:
        for group in groups:
            start = sink.content.tell()
            writer.write_table(group, row_group_size=group.num_rows)
            sink.close_group(start, weights_array(group["weights"]))
        writer.add_key_value_metadata(sink.listing())
    content = pa.py_buffer(sink.content.getbuffer())
    store.write(file, content)
    footer = content.slice(content.size - row_groups.footer_size(content.slice(content.size - 8).to_pybytes()))
    return seals.seal(content), seals.seal(footer)


def to_parquet(table: pa.Table) -> pa.Buffer:
    """A small table as the content of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_groups(
    store: Store, file: str, groups: Iterable[int], columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Row groups of one part, one after the other; UserError names a file that is missing or damaged."""
    try:
        with store.open(file) as source:
            parquet = pq.ParquetFile(source)
            for group in groups:
                yield parquet.read_row_group(group, columns=columns, use_threads=False)
    except FileNotFoundError:
        raise UserError(f"{store.path(file)} is missing; the zoo lists it") from None
    except Exception as error:  # the reader raises nearly anything on a damaged file
        raise UserError(f"{store.path(file)} is damaged: {said(error)}") from None


def weights_array(column: pa.ChunkedArray) -> np.ndarray:
    """The weights column as [S, P] float32."""
    arrays = [chunk.to_numpy_ndarray() for chunk in column.chunks]
    if not arrays:
        return np.empty((0, column.type.shape[0]), np.float32)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


# -- zoo.json ---------------------------------------------------------------------------------------------------------


def image_entry(images: ImageSet | None, directory: str | None = None) -> dict[str, Any]:
    """What `zoo.json` says of the images that the models were trained on, which lie in `directory`; None: not known."""
    if images is None:
        return {"name": None, "directory": None, "preprocessing": None, "classes": []}
    classes = list(images.classes)
    return {"name": images.name, "directory": directory, "preprocessing": images.preprocessing, "classes": classes}


def commit(
    store: Store,
    *,
    name: str,
    arch: Architecture,
    image_set: Mapping[str, Any],
    parts: Sequence[Part],
    origin: Mapping[str, Any],
    excluded: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, str] | None = None,
    kept: Mapping[str, Any] | None = None,
    writer: Writer | None = None,
) -> dict[str, Any]:
    """Writes `zoo.json`, which makes the given parts a zoo; returns its content.

    `image_set` is an `image_entry`; `origin` has kind ("trained", "imported", ...)
    and its settings; `excluded` lists models that were left out, each with model_id and reason; `files` are the seals
    of files beside the parts; `kept` is what is to stay as it was, of a zoo that holds in other files what it held
    before: its digest, the size of its pieces. Raises UserError where a part is given twice and, with its `writer`,
    where another one has changed the zoo meanwhile.
    """
    if doubled := [place for place, count in Counter((p.file, p.group) for p in parts).items() if count > 1]:
        raise UserError(f"{store}: {doubled[0][0]} is listed twice")
    states: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for part in parts:
        models.update(part.models)
        states.update(part.states)
    content = {
        "format": FORMAT,
        "version": 2 if any(part.group for part in parts) else 1,
        "distrecon": metadata.version("distrecon"),
        "name": name,
        "architecture": arch.to_dict(),
        "image_set": dict(image_set),
        "origin": dict(origin),
        "models": sum(models.values()),
        "states": sum(states.values()),
        "splits": {s: {"models": models[s], "states": states[s]} for s in SPLITS},
        "excluded": [dict(e) for e in excluded],
        "parts": [_entry(part) for part in parts],
        "files": {**(files or {}), **{part.file: part.seal for part in parts if part.seal is not None}},
        "footers": {part.file: part.footer for part in parts if part.footer is not None},
    }
    if 4 * arch.num_parameters * sum(states.values()) >= LARGE:
        content["piece_bytes"] = PIECE_BYTES
    content |= kept or {}
    if writer is None:
        store.write(MANIFEST, manifest(content))
    else:
        writer.commit(manifest(content))
    return content


def _entry(part: Part) -> dict[str, Any]:
    """What `"parts"` says of a part; what is of the whole file stands elsewhere."""
    entry = {key: value for key, value in asdict(part).items() if key not in ("seal", "footer")}
    return entry if part.group else {key: value for key, value in entry.items() if key != "group"}


def manifest(content: Mapping[str, Any]) -> bytes:
    """`zoo.json` with this content."""
    return seals.signed(json.dumps(content, indent=1))


def read_manifest(store: Store, edited: bool = False) -> dict[str, Any]:
    """The content of `zoo.json`; UserError when it is missing, is not a zoo's, is of a newer version, or is damaged.

    One that was `edited`, so that its own SHA-256 is another, is read where that is said.
    """
    path = store.path(MANIFEST)
    try:
        raw = store.read(MANIFEST)
        content = json.loads(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{store} is not a zoo: it has no {MANIFEST}; make one with distrecon.zoo train or distrecon.zoo import"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {said(error)}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f'{path} does not describe a zoo (no "format": "{FORMAT}")')
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise UserError(
            f"{path} has format version {content.get('version')}, this distrecon reads up to {VERSION}: "
            "update distrecon"
        )
    own = content.pop(seals.KEY, None)
    if not edited and (own is not None or "files" in content) and not seals.is_as_signed(raw, str(own)):
        raise UserError(
            f"{path} is damaged, or was edited: it is not what its own SHA-256 says; if it is as it should be, "
            f"zoo seal {store} accepts it"
        )
    with reading(path):
        _check(content)
    return content


_KINDS = {  # of zoo.json's values
    "distrecon": str,
    "name": str,
    "architecture": dict,
    "image_set": dict,
    "origin": dict,
    "models": int,
    "states": int,
    "splits": dict,
    "excluded": list,
    "parts": list,
}
_IMAGE_KINDS: dict[str, type | tuple[type, ...]] = {  # of what it says of the images, where it says it
    "name": (str, type(None)),
    "directory": (str, type(None)),
    "preprocessing": (str, type(None)),
    "stored": str,
    "limit": int,
    "classes": list,
}


def _check(content: dict[str, Any]) -> None:
    """ValueError for a `zoo.json` without one of its keys, with values of other kinds, or names that leave the zoo."""
    for key, kind in _KINDS.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"its {key!r} must be {kind.__name__}, not {content.get(key)!r:.60}")
    if not isinstance(content["origin"].get("kind"), str):
        raise ValueError(f"its origin has no kind: {content['origin']!r:.60}")
    if not all(isinstance(left_out, dict) for left_out in content["excluded"]):
        raise ValueError("the models that it excludes are no list of objects")
    images, files, footers = content["image_set"], content.setdefault("files", {}), content.setdefault("footers", {})
    counts = [content["models"], content["states"]]
    counts += [content["splits"][split][key] for split in SPLITS for key in ("models", "states")]
    if not all(_whole(count, 0) for count in counts):
        raise ValueError("it has counts that are no whole numbers")
    for key, value in images.items():
        if key in _IMAGE_KINDS and not isinstance(value, _IMAGE_KINDS[key]):
            raise ValueError(f"its images' {key!r} is {value!r:.60}")
    if any(key not in images for key in ("name", "directory", "classes", "preprocessing")):
        raise ValueError(f"its images have only {', '.join(images)}")
    if not {*map(type, files.values()), *map(type, footers.values())} <= {str}:
        raise ValueError("its seals are no text")
    if not _whole(content.get("piece_bytes", 0), 0) or not isinstance(content.get("digest", ""), str):
        raise ValueError("its piece_bytes or its digest are none")
    if not re.fullmatch(r"images(-[0-9a-f]{8})?", images.get("stored", "images")):
        raise ValueError(f"its images lie in {images['stored']!r}")
    for name in files:
        if not inside(name):
            raise ValueError(f"{name!r} leads out of the zoo")


def parts_of(content: Mapping[str, Any]) -> list[Part]:
    """The parts that `zoo.json` lists, each with its seal; UserError for what can be none."""
    with reading(MANIFEST):
        files, footers = content["files"], content["footers"]
        return [
            Part(**part, seal=files.get(part["file"]), footer=footers.get(part["file"])) for part in content["parts"]
        ]
