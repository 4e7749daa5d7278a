"""Where zoos lie: a folder on local disk, S3, or any filesystem that pyarrow or fsspec knows, with atomic writing.

A local file is written to a temporary sibling, synced and renamed, so that a reader sees the old file or the whole new
one, whatever kills the writer. An object store shows an object only once it is complete, which is the same promise.
"""

import os
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from distrecon.errors import UserError, redact


@dataclass(frozen=True)
class Store:
    """A folder `root` on `filesystem`; file names are relative to it. Pickles, so Ray tasks can be given one."""

    filesystem: pafs.FileSystem
    root: str

    @property
    def local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, name: str) -> str:
        """Where a file lies; UserError for a name that leads out of the folder, as a damaged file may hold."""
        if not inside(name):
            raise UserError(f"{self}: {name!r} leads out of it")
        return f"{self.root}/{name}"

    def __str__(self) -> str:
        return self.root if self.local else f"{self.filesystem.type_name}:{self.root}"

    def exists(self, name: str) -> bool:
        return self.filesystem.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted."""
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def names(self, folder: str) -> list[str]:
        """Names (with `folder/` in front) of the files in a folder, sorted; temporary files of writers left out."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        files = [info.base_name for info in self.filesystem.get_file_info(selector) if info.is_file]
        return sorted(f"{folder}/{name}" for name in files if not name.startswith("."))

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_file(self.path(name)) as file:
            return file.read()

    def open(self, name: str) -> pa.NativeFile:
        return self.filesystem.open_input_file(self.path(name))

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Writes a whole file atomically, with the folders above it; UserError where that cannot be done."""
        path = self.path(name)
        try:
            self.filesystem.create_dir(os.path.dirname(path), recursive=True)
            if self.local:
                _write_local(path, content)
            else:
                with self.filesystem.open_output_stream(path) as stream:
                    stream.write(content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}") from error

    def delete(self, name: str) -> None:
        self.filesystem.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        self.filesystem.delete_dir(self.path(name))


def inside(name: str) -> bool:
    """Whether a relative name stays in the folder that it is relative to."""
    return not name.startswith("/") and ".." not in name.split("/")


def _write_local(path: str, content: bytes | pa.Buffer) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)  # the rename itself must survive a power cut
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def store(path: str | os.PathLike[str], filesystem: Any = None) -> Store:
    """The store at a local path, at a URL (`s3://bucket/zoo`), or at a path on a given pyarrow or fsspec filesystem.

    Raises UserError for a URL that neither pyarrow nor fsspec understands, and for one with a password in it.
    """
    text = os.fspath(path)
    if "://" in text and redact(text) != text:
        raise UserError(
            f"{redact(text)}: no user, password or key may stand in an address, since addresses are written down: "
            "give credentials by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if filesystem is not None:
        return Store(_as_arrow(filesystem), text.rstrip("/"))
    if "://" not in text:
        return Store(pafs.LocalFileSystem(), os.path.abspath(text))
    try:
        return Store(*pafs.FileSystem.from_uri(text.rstrip("/")))
    except pa.ArrowInvalid:
        return _fsspec_store(text)


def _as_arrow(filesystem: Any) -> pafs.FileSystem:
    if isinstance(filesystem, pafs.FileSystem):
        return filesystem
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))


def _fsspec_store(url: str) -> Store:
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url}: pyarrow does not know this kind of address, and fsspec is not installed") from None
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from None
    return Store(_as_arrow(filesystem), root.rstrip("/"))
