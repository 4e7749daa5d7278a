"""Kills writers: `python -m tests.zoos.kills FOLDER COUNT [SEED]`.

For each way to write a zoo (import, append, train, seal, compact), COUNT times: two processes begin the same command at
once, one of them, drawn by lot, is killed with -9 at a random moment, the other ends as it may, and the command is
given again. Then the zoo must open, be sound by every check, and hold just what an undisturbed command makes. Prints a
line of JSON a command. The tasks run in the processes themselves, without Ray, so that starting one costs a fork.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from distrecon.errors import UserError
from distrecon.nets import architecture, initialise
from distrecon.zoos import importing, open_zoo, row_groups, seals, tasks
from distrecon.zoos.compact import compact
from distrecon.zoos.importing import ImportOptions, import_zoo
from distrecon.zoos.inspection import check
from distrecon.zoos.settings import GridConfig, ImagesConfig, TrainingConfig, ZooConfig
from distrecon.zoos.train import ensure
from distrecon.zoos.write import seal_zoo

ZOO = ZooConfig(
    name="killed",
    images=ImagesConfig(limit=50),
    grid=GridConfig(initialisation=("uniform",), seeds=6),
    training=TrainingConfig(epochs=1, checkpoints=(1,), batch_size=50),
    group_size=1,
)
DONE, REFUSED, BROKEN = 0, 2, 3
GONE = os.WEXITED | os.WNOHANG | os.WNOWAIT


def write_source(folder: Path, epochs: tuple[int, ...] = (1, 2)) -> None:
    """Twelve models of two epochs as files."""
    arch = architecture("zoo_cnn")
    folder.mkdir()
    for number, theta_P in enumerate(initialise(arch, ["normal"] * 12, range(12))):
        for epoch in epochs:
            torch.save(arch.unflatten(theta_P * epoch), folder / f"net{number}_epoch_{epoch}.pt")


def serially(function, items, *shared, resources):
    for item in items:
        yield item, function(item, *shared)


def begin(work: Callable[[], object], said: Path) -> int:
    """Does the work in another process, which tells by its exit code how it ended, and in a file what it said."""
    if pid := os.fork():
        return pid
    try:
        work()
        code = DONE
    except UserError as error:
        said.write_text(str(error))
        code = REFUSED
    except BaseException as error:
        said.write_text(repr(error))
        code = BROKEN
    os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(zoo: Path) -> list[object]:
    """What a zoo holds, in an order that does not depend on how it came there."""
    opened = open_zoo(zoo)
    rows = zip(opened.table(columns=["model_id", "epoch", "split"]).to_pylist(), opened.weights().tolist(), strict=True)
    return sorted((row["model_id"], row["epoch"], row["split"], weights) for row, weights in rows)


def forget() -> None:
    """As in a new process: nothing has been compared yet."""
    seals._compared.clear()
    row_groups._known.clear()


def read(zoo: Path) -> None:
    """The old zoo or the new one is there throughout; files that a compaction joined go once the new zoo is there."""
    forget()
    try:
        open_zoo(zoo).weights()
    except UserError as error:
        if "missing; the zoo lists it" not in str(error):
            raise
        open_zoo(zoo).weights()


def unseal(folder: Path) -> None:
    manifest = json.loads((folder / "zoo.json").read_text())
    del manifest["files"], manifest["footers"], manifest["sha256"]
    (folder / "zoo.json").write_text(json.dumps(manifest))


def main(folder: Path, count: int, seed: int = 0) -> int:
    tasks.run, importing.MODELS_PER_UNIT = serially, 2
    torch.set_num_threads(1)
    draw, bad = random.Random(seed), 0
    folder.mkdir(parents=True, exist_ok=True)
    source, half, whole = folder / "source", folder / "half", folder / "whole"
    write_source(source)
    first, every = ImportOptions(epochs=(1,), activation="tanh"), ImportOptions(activation="tanh")
    import_zoo(source, half, first)
    import_zoo(source, whole, every)
    sealed = Path(shutil.copytree(whole, folder / "sealed"))
    unseal(whole)
    commands: dict[str, tuple[Path | None, Callable[[Path], object]]] = {  # what is there before, what is done
        "import": (None, lambda zoo: import_zoo(source, zoo, every)),
        "append": (half, lambda zoo: import_zoo(source, zoo, every)),
        "train": (None, lambda zoo: ensure(ZOO, zoo)),
        "seal": (whole, lambda zoo: seal_zoo(zoo)),
        "compact": (sealed, lambda zoo: compact(zoo)),
    }
    for name, (before, work) in commands.items():

        def prepare(zoo: Path, before: Path | None = before) -> Path:
            shutil.rmtree(zoo, ignore_errors=True)
            if before is not None:
                shutil.copytree(before, zoo)
            return zoo

        reference, undisturbed = prepare(folder / f"{name}-reference"), prepare(folder / "zoo")
        work(reference)  # everything is loaded now, as in the processes that follow
        start = time.monotonic()
        ended(begin(partial(work, undisturbed), folder / "first"))
        seconds, expected = time.monotonic() - start, content(reference)
        outcomes: Counter[str] = Counter()
        wrong = []
        for moment in range(count):
            zoo = prepare(folder / "zoo")
            said = [folder / "first", folder / "second"]
            pids = [begin(partial(work, zoo), said[i]) for i in range(2)]
            victim = draw.randrange(2)
            time.sleep(draw.uniform(0, seconds))
            early = {i: ended(pid) for i, pid in enumerate(pids) if os.waitid(os.P_PID, pid, GONE) is not None}
            if 1 - victim not in early and victim in early:  # refused at once: it is the writer's turn
                victim = 1 - victim
            if victim not in early:
                os.kill(pids[victim], signal.SIGKILL)
            if before is not None:
                read(zoo)
            codes = [early[i] if i in early else ended(pid) for i, pid in enumerate(pids)]
            outcomes["killed" if codes[victim] < 0 else "too late"] += 1
            other = codes[1 - victim]
            outcomes[{DONE: "other done", REFUSED: "other refused"}.get(other, "other broken")] += 1
            if other == REFUSED:
                refusal = said[1 - victim].read_text()
                if "another" not in refusal or "\n" in refusal:
                    wrong.append((moment, refusal))
            last = ended(begin(partial(work, zoo), folder / "last"))
            forget()
            problems = check(open_zoo(zoo), sample=0).problems
            if other not in (DONE, REFUSED) or last != DONE or problems or content(zoo) != expected:
                wrong.append((moment, codes, last, problems[:2], (folder / "last").read_text() if last else ""))
        print(json.dumps({"command": name, "moments": count, "seconds": round(seconds, 3), **outcomes, "wrong": wrong}))
        bad += len(wrong)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), *(int(text) for text in sys.argv[3:4])))
