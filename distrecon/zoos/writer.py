"""One writer at a time: whoever trains, imports, appends, seals or compacts has the zoo, or is told that another has.

On this machine's disks the zoo's folder is locked (`flock`, which ends with the process, however that ends). On any
store, a lock or not, `Writer.check` compares: `zoo.json` must still be what the writer found when it began, and the
beginning in `unfinished/` must still be its own. Who finds another there stops with one line and commits nothing.
"""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distrecon.errors import UserError
from distrecon.zoos.storage import Store

MANIFEST = "zoo.json"
UNFINISHED = "unfinished/origin.json"  # what is being made; its folder goes when the zoo is finished


@dataclass(frozen=True)
class Writer:
    """A writer's hold on a zoo, as it found it. Pickles, so that its tasks can check it too."""

    store: Store
    found: bytes | None  # zoo.json; None where there was none
    token: str  # of its beginning

    def check(self) -> None:
        """UserError where another writer has committed, or has taken over what this one began."""
        if self._read(MANIFEST) != self.found or self.taken_over():
            raise UserError(
                f"{self.store} was changed by another writer meanwhile, and this one has changed nothing: "
                "run the command again when the other has ended"
            )

    def taken_over(self) -> bool:
        """Whether what lies unfinished is another writer's."""
        begun = self._read(UNFINISHED)
        return begun is not None and json.loads(begun).get("writer", self.token) != self.token

    def begin(self, content: dict[str, Any]) -> None:
        """Says what is being made or, where that was begun before, that it is this writer who goes on with it."""
        self.store.write(UNFINISHED, json.dumps({**content, "writer": self.token}, indent=1).encode())

    def commit(self, manifest: bytes) -> None:
        """Makes this `zoo.json` the zoo's, if no other writer was faster; the only place where one is replaced."""
        self.check()
        self.store.write(MANIFEST, manifest)

    def _read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None


@contextlib.contextmanager
def writing(store: Store) -> Iterator[Writer]:
    """Holds the zoo for this process; UserError where another one holds it. A folder that stays empty goes again."""
    with _locked(store) if store.local else contextlib.nullcontext():
        writer = Writer(store, None, uuid.uuid4().hex)
        yield Writer(store, writer._read(MANIFEST), writer.token)


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[None]:
    made = not os.path.isdir(store.root)
    try:
        os.makedirs(store.root, exist_ok=True)
        folder = os.open(store.root, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write {store.root}: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{store} is being written by another process: wait for it, or stop it, then run the command again"
            ) from None
        except OSError:  # a network disk without locks: what follows is compared before it is committed
            pass
        yield
    finally:
        os.close(folder)
        if made:
            with contextlib.suppress(OSError):  # what was made in it stays
                os.rmdir(store.root)
