"""Every answer kept on disk at once, so that an interrupted run pays for none twice.

A folder holds `answers.bin`: a header (magic, numbers of inputs and outputs, checksum) and one record a call: the
number of rows and its checksum, the checksum of the numbers, then queries [Q, I] and answers [Q, O] side by side as
little-endian float64. Records are only ever appended, and each is on the disk before the next call is made. What a
kill left of the last record is cut off when the folder is opened again.
"""

import fcntl
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from distrecon.errors import UserError, WorkFailed

MAGIC = b"distrecon answers 1\n"
HEADER = struct.Struct("<20sIII")  # magic, inputs, outputs, checksum of the three
RECORD = struct.Struct("<III")  # rows, their checksum, the numbers' checksum


class KeptAnswers:
    """The answers in a folder, made if it is not there: `rows()` are those of earlier runs, `append` adds a call's.

    Raises UserError when the folder's answers are damaged, are of another number of inputs, or when another run is
    using it; WorkFailed when they cannot be written.
    """

    def __init__(self, folder: str | Path, inputs: int) -> None:
        self.folder, self.inputs, self.outputs = Path(folder), inputs, 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.folder / "answers.bin", "a+b", buffering=0)
        except OSError as error:
            raise UserError(f"answers={folder}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._numbers = self._read()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"answers={folder}: another run is using it") from None
        except OSError as error:
            self._file.close()
            raise UserError(f"answers={folder}: {error.strerror}") from None
        except UserError:
            self._file.close()
            raise

    def rows(self) -> tuple[Tensor, Tensor]:
        """Queries x[Q, I] and answers y[Q, O] of earlier runs; O is 0 when there are none."""
        return self._numbers[:, : self.inputs], self._numbers[:, self.inputs :]

    def append(self, x_QI: Tensor, y_QO: Tensor) -> None:
        """Keeps the answers of one call; returns when they are on the disk."""
        start = b""
        if not self.outputs:
            self.outputs = y_QO.shape[1]
            start = HEADER.pack(MAGIC, self.inputs, self.outputs, _checksum(self.inputs, self.outputs))
        numbers = torch.cat([x_QI, y_QO], dim=1).numpy().astype("<f8").tobytes()
        record = RECORD.pack(len(x_QI), _checksum(len(x_QI)), zlib.crc32(numbers)) + numbers
        left = memoryview(start + record)
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise WorkFailed(f"{self._file.name} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()

    def _read(self) -> Tensor:
        """The numbers [Q, I + O] of all whole records; a torn last one, or a torn header, is cut off."""
        self._file.seek(0)
        data = self._file.read()
        records, whole = [], 0
        if len(data) >= HEADER.size:
            whole = self._read_header(data)
            while (numbers := self._record(data, whole)) is not None:
                records.append(numbers)
                whole += RECORD.size + numbers.nbytes
        elif not MAGIC.startswith(data[: len(MAGIC)]):
            raise UserError(f"{self._file.name} does not hold kept answers")
        self._file.truncate(whole)
        width = self.inputs + self.outputs
        return torch.from_numpy(np.concatenate(records or [np.empty((0, width))]))

    def _read_header(self, data: bytes) -> int:
        magic, inputs, outputs, checksum = HEADER.unpack_from(data)
        if magic != MAGIC or checksum != _checksum(inputs, outputs):
            raise UserError(f"{self._file.name} does not hold kept answers")
        if inputs != self.inputs:
            raise UserError(f"{self._file.name} holds answers to queries of {inputs} inputs, not {self.inputs}")
        self.outputs = outputs
        return HEADER.size

    def _record(self, data: bytes, start: int) -> np.ndarray | None:
        """The numbers of the record at byte `start`; None where the file ends, or what is left is part of a record."""
        if start + RECORD.size > len(data):
            return None
        rows, rows_checksum, checksum = RECORD.unpack_from(data, start)
        if not rows and not data[start:].strip(b"\0"):  # what a machine that lost its power may leave
            return None
        width, first = self.inputs + self.outputs, start + RECORD.size
        end = first + 8 * rows * width
        sound = rows_checksum == _checksum(rows)
        if sound and end > len(data):
            return None
        if not sound or zlib.crc32(data[first:end]) != checksum:
            raise UserError(f"{self._file.name} is damaged at byte {start}: restore it, or choose another folder")
        return np.frombuffer(data, "<f8", rows * width, first).reshape(rows, width).astype(np.float64)


def _checksum(*numbers: int) -> int:
    return zlib.crc32(struct.pack(f"<{len(numbers)}I", *numbers))
