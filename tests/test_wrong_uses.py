"""Wrong uses end in one line that names what is wrong and what to do, with the right exit code, and leave nothing."""

import fcntl
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from distrecon import __main__, evaluate, generate, job, status, train, tune, zoo
from distrecon.autoencoder import Autoencoder, ZooSample, save_autoencoder
from distrecon.autoencoder.model import statistics
from distrecon.cluster.sweeps import innermost
from distrecon.console import INTERRUPTED, SOME_FAILED, WRONG_REQUEST
from distrecon.images import load
from distrecon.nets import architecture
from distrecon.recover import main as recover
from distrecon.zoos import format as zoo_format
from distrecon.zoos.storage import store
from tests.autoencoder.small import related_models, tiny
from tests.zoos.test_format import unseal

MAINS = {
    "tune": tune.main,
    "train": train.main,
    "evaluate": evaluate.main,
    "generate": generate.main,
    "recover": recover,
    "status": status.main,
    "zoo": zoo.main,
}
NEURONS = architecture("cnn_small")


def write_zoo(folder, arch, theta_SP):
    count = len(theta_SP)
    splits = ["train"] * (count - 8) + ["val"] * 4 + ["test"] * 4
    table = zoo_format.states_table(
        arch,
        model_id=[f"m{i}" for i in range(count)],
        epoch=[1] * count,
        split=splits,
        theta_SP=theta_SP.nan_to_num(),
        metrics={name: [0.5] * count for name in zoo_format.METRICS},
        config=["{}"] * count,
    )
    weights = zoo_format.weights_column(theta_SP.numpy())  # also those that the format would refuse
    table = table.set_column(table.column_names.index("weights"), "weights", weights)
    where = store(folder)
    part = zoo_format.write_part(where, zoo_format.part_name(0), table)
    digits = {"name": "digits", "directory": None, "preprocessing": "", "classes": [str(i) for i in range(10)]}
    zoo_format.commit(where, name=folder.name, arch=arch, image_set=digits, parts=[part], origin={"kind": "test"})


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder of zoos, autoencoders and runs, good and bad ones."""
    folder = tmp_path_factory.mktemp("things")
    theta_SP = related_models(NEURONS, 24)
    write_zoo(folder / "zoo", NEURONS, theta_SP)
    other = architecture("mlp", sizes=(64, 5, 10))
    write_zoo(folder / "mlps", other, related_models(other, 24))
    broken_SP = theta_SP.clone()
    broken_SP[21, 7] = float("nan")  # of the test split
    broken_SP[3, 7] = float("nan")  # of the training split
    write_zoo(folder / "nan_zoo", NEURONS, broken_SP)
    for name, values in {"huge": {"states": 10**12}, "newer_zoo": {"version": 99}}.items():
        shutil.copytree(folder / "zoo", folder / name)
        unseal(folder / name, **values)
    sample = ZooSample(NEURONS, theta_SP[:16], load("digits"))
    config = tiny(data__query_pool=20)
    save_autoencoder(folder / "autoencoder", Autoencoder(config, [NEURONS], [statistics(config, sample)]))
    shutil.copytree(folder / "autoencoder", folder / "newer_autoencoder")
    edit(folder / "newer_autoencoder" / "autoencoder.json", version=99)
    shutil.copytree(folder / "autoencoder", folder / "torn_autoencoder")
    (folder / "torn_autoencoder" / "autoencoder.safetensors").write_bytes(b"torn")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "request.json").write_text('{"format": 1, "command": "train"}')
    shutil.copytree(folder / "unfinished", folder / "newer_run")
    edit(folder / "newer_run" / "request.json", format=99)
    save_file(
        {"a.weight": torch.full((3, 4), float("nan")), "a.bias": torch.zeros(3)}
        | {"b.weight": torch.ones(2, 3), "b.bias": torch.zeros(2)},
        folder / "nan.safetensors",
    )
    (folder / "hungry_teacher.py").write_text("import torch\n\ndef ask(x):\n    return torch.empty(2**50, len(x))\n")
    return folder


AUTOENCODER = ["--autoencoder", "autoencoder"]
ON_ZOO = [*AUTOENCODER, "--zoo", "zoo"]
USES = {
    "misspelt subcommand": ("zoo trian --out x", "'trian' is unknown; did you mean 'train'?"),
    "misspelt option": ("tune --sapce x.yaml", "unknown option '--sapce'; did you mean '--space'?"),
    "misspelt option of a subcommand": ("zoo train --out x --confg y", "did you mean '--config'?"),
    "misspelt sampler": ("generate --autoencoder autoencoder --sampler gausian", "did you mean 'gaussian'?"),
    "name that no registry takes": ("train --zoo zoo --register a/b", "a model's name is not empty and has no / or :"),
    "option without value": ("tune --space", "--space: expected at least one argument; see distrecon.tune --help"),
    "misspelt key": ("train --zoo zoo --set optim.epoch=3", "'optim.epoch'; did you mean 'optim.epochs'?"),
    "missing zoo": ("train --zoo zoos/none", "zoos/none is not a zoo: it has no zoo.json; make one with distrecon.zoo"),
    "misspelt zoo": ("train --zoo digts", "no zoo 'digts' here; did you mean 'digits'?"),
    "missing zoo to evaluate": ("evaluate --autoencoder autoencoder --zoo none", "make one with distrecon.zoo train"),
    "zoo of another architecture": (
        "evaluate --autoencoder autoencoder --zoo mlps",
        "models are mlp (385 parameters, tanh); the autoencoder was trained on cnn_small (1198 parameters, relu): name",
    ),
    "the same, to generate": ("generate --autoencoder autoencoder --zoo mlps", "or train one on this zoo"),
    "no such autoencoder": ("evaluate --autoencoder none --zoo zoo", "none: no such folder; name a run of distrecon"),
    "folder that is no autoencoder": (
        "generate --autoencoder zoo",
        "zoo holds no autoencoder and no finished run; name",
    ),
    "torn autoencoder": ("evaluate --autoencoder torn_autoencoder --zoo zoo", "torn_autoencoder cannot be read"),
    "autoencoder that does not tell its zoo": ("generate --autoencoder autoencoder", "name one with --zoo"),
    "NaN model": ("evaluate --autoencoder autoencoder --zoo nan_zoo", "model m3 has a weight that is not finite"),
    "data that are a folder": ("recover --teacher nan.safetensors --data zoo", "--data: zoo is not a .npy file of"),
    "NaN teacher": ("recover --teacher nan.safetensors", "not finite"),
    "too little memory to train": ("train --zoo huge", "scoring holds its 1000000000000 states 3 times"),
    "too little memory to evaluate": ("evaluate --autoencoder autoencoder --zoo huge", "import fewer states"),
    "no GPU": ("train --zoo zoo --use-gpu", "the whole cluster has at most 0: lower resources.num_workers"),
    "workers on shares of a GPU": (
        "train --zoo zoo --use-gpu --num-workers 4 --set resources.gpus_per_worker=0.25",
        "must be 1 with 4 workers, not 0.25: NCCL refuses two processes on one GPU; shares are for trials of one",
    ),
    "several GPUs a worker": (
        "train --zoo zoo --use-gpu --set resources.gpus_per_worker=2",
        "resources.gpus_per_worker must be above 0 and at most 1, not 2",
    ),
    "a device that was not asked for": (
        "train --zoo zoo --set resources.device=cuda",
        "add --use-gpu, or leave it auto",
    ),
    "no GPU to train a zoo": ("zoo train --smoke --gpus-per-task 1 --out x", "whole cluster has 0 GPUs; lower it, or"),
    "interrupted run": (
        "evaluate --autoencoder unfinished --zoo zoo",
        "the run did not finish: continue it with python -m distrecon.train --resume unfinished",
    ),
    "resume of nothing": ("train --resume none", "no run there"),
    "resume of another command's run": ("tune --resume unfinished", "was made by distrecon.train, not distrecon.tune"),
    "resume of an incomplete request": ("train --resume unfinished", "has no 'spaces'; start anew with another --out"),
    "newer zoo": ("train --zoo newer_zoo", "format version 99, this distrecon reads up to 2: update distrecon"),
    "newer autoencoder": ("evaluate --autoencoder newer_autoencoder --zoo zoo", "newer than 1: update distrecon"),
    "newer run": ("train --resume newer_run", "was made by a newer distrecon; update to continue it"),
}


def listing(folder):
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts and p.is_file()}


@pytest.fixture
def here(things, monkeypatch):
    monkeypatch.chdir(things)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return things


def refused(words, main, arguments, capsys, code=WRONG_REQUEST):
    """Runs the command; asserts its code and its one line, which it returns."""
    assert main(arguments) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in told if line.startswith("distrecon")]
    assert len(errors) == 1, told
    assert told[-1] == errors[0]
    assert words in errors[0]
    assert len(errors[0]) < 400
    return errors[0]


@pytest.mark.parametrize("name", USES)
def test_a_wrong_use_is_one_line_and_leaves_nothing(name, here, capsys, ray_session):
    line, words = USES[name]
    command, *arguments = line.split()
    before = listing(here)
    refused(words, MAINS[command], arguments, capsys)
    assert listing(here) == before


def test_a_misspelt_command(capsys):
    refused("unknown command 'tunne'; did you mean 'tune'?", __main__.main, ["tunne"], capsys)


def test_the_document_of_a_failure(here, capsys):
    assert evaluate.main(["--autoencoder", "none", "--zoo", "zoo", "--json"]) == WRONG_REQUEST
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert (document["command"], document["exit_code"]) == ("distrecon.evaluate", WRONG_REQUEST)
    assert document["error"] in told.err


def test_memory_that_runs_out_is_one_line(here, capsys, monkeypatch):
    monkeypatch.syspath_prepend(here)
    arguments = ["--teacher", "hungry_teacher:ask", "--input-size", "3", "--out", "hungry"]
    refused("out of memory: lower", recover, arguments, capsys, SOME_FAILED)


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of",
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 TiB for an array",
    ],
)
def test_a_trial_that_ran_out_of_memory_says_what_to_lower(line):
    assert innermost(f"Traceback (most recent call last):\n  File x\n{line}\n").startswith("out of memory: lower optim")


@pytest.mark.parametrize(("command", "work"), [(evaluate, "score"), (generate, "generate")])
def test_interrupted_work_leaves_nothing(here, capsys, monkeypatch, command, work):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, work, stop)
    before = listing(here)
    refused("interrupted", command.main, [*ON_ZOO, "--out", "stopped"], capsys, INTERRUPTED)
    assert listing(here) == before
    assert not (here / "stopped").exists()


def test_an_interrupted_zoo_says_how_to_go_on(here, capsys, monkeypatch, ray_session):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("distrecon.zoos.train.ensure", stop)
    words = "interrupted: run the same command again, and it continues"
    refused(words, zoo.main, ["train", "--smoke", "--out", "began"], capsys, INTERRUPTED)


def test_a_stale_run_is_not_resumed(here, tmp_path, capsys, ray_session):
    zoo_folder, run = tmp_path / "zoo", tmp_path / "run"
    shutil.copytree(here / "zoo", zoo_folder)
    space = tmp_path / "space.yaml"
    space.write_text(f"{{name: train, kind: autoencoder, space: {{zoo: {{grid: [[{zoo_folder}]]}}}}}}")
    job.prepare(job.Request(spaces=(str(space),)), str(run), "train")
    folder, request = job.reopen(str(run), "train", None)
    assert (folder.path, request.spaces) == (run, (str(run / "spaces/train.yaml"),))
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("another process still works on it", train.main, ["--resume", str(run)], capsys)
    write_zoo(zoo_folder, NEURONS, related_models(NEURONS, 20))
    refused("has changed since; start anew with another --out", train.main, ["--resume", str(run)], capsys)
    shutil.rmtree(zoo_folder)
    refused("is not a zoo", train.main, ["--resume", str(run)], capsys)


@pytest.mark.slow
def test_a_nan_model_fails_its_training_and_is_named(here, tmp_path, capsys, ray_session, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    arguments = ["--zoo", "nan_zoo", "--out", str(tmp_path / "run"), "--set", "resources.max_failures=0"]
    assert train.main([*arguments, "--set", "optim.epochs=1", "--json"]) == SOME_FAILED
    told = capsys.readouterr()
    assert "sweeps" in json.loads(told.out), told.err
    (sweep,) = json.loads(told.out)["sweeps"]
    (trial,) = sweep["trials"]
    assert trial["status"] == "failed"
    assert "has a weight that is not finite" in trial["error"]
