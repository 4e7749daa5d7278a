"""Zoos of any torch module: stored tables, not code; what runs them is given by the user alone."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distrecon import generate
from distrecon.autoencoder import Training, ZooSample
from distrecon.autoencoder.store import save_autoencoder
from distrecon.console import DONE
from distrecon.errors import UserError
from distrecon.images import load
from distrecon.nets import Architecture, evaluate, initialise
from distrecon.zoos import Zoo, inspection, open_zoo, write_zoo
from distrecon.zoos.importing import ImportOptions, import_zoo
from distrecon.zoos.settings import ArchitectureConfig, ZooConfig, groups
from distrecon.zoos.train import Group, train_group
from examples.small_resnet import SmallResNet
from tests.autoencoder.small import tiny

pytestmark = pytest.mark.usefixtures("ray_session")

NAMED = "examples.small_resnet:SmallResNet"


@pytest.fixture(scope="module")
def arch() -> Architecture:
    return ArchitectureConfig(module=NAMED).build(load("digits"))


@pytest.fixture(scope="module")
def zoo(arch: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    theta_SP = initialise(arch, ["module", "kaiming_normal"] * 3, range(6))
    digits = load("digits")
    scores = evaluate(arch, theta_SP, digits.test.images, digits.test.labels_Q)
    return write_zoo(
        tmp_path_factory.mktemp("zoo") / "resnets",
        arch,
        theta_SP,
        model_id=[f"m{i}" for i in range(6)],
        split=["train"] * 4 + ["val", "test"],
        images="digits",
        test_accuracy=scores.accuracy_B.tolist(),
    )


def test_initial_weights_are_the_modules_own_or_drawn(arch: Architecture) -> None:
    own, drawn, again, other = initialise(arch, ["module", "normal", "module", "module"], [3, 3, 3, 4])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        assert torch.equal(own, arch.flatten(SmallResNet().state_dict()))
    assert torch.equal(own, again)
    assert not torch.equal(own, other)
    states = [arch.unflatten(theta_P) for theta_P in (own, drawn)]
    assert not torch.equal(states[0]["conv.weight"], states[1]["conv.weight"])
    assert float(states[1]["blocks.0.conv1.weight"].std()) == pytest.approx(72**-0.5, rel=0.1)
    assert torch.equal(states[1]["bn.weight"], torch.ones(8))


def test_a_zoo_is_read_without_its_module_and_run_with_it(zoo: Zoo, arch: Architecture) -> None:
    opened = open_zoo(zoo.store)
    assert opened.architecture == arch
    assert opened.weights().shape == (6, arch.num_parameters)
    assert opened.info["architecture"]["module"] == NAMED
    images = load("digits").test.images[:5]
    with pytest.raises(UserError, match=f"--module .*{NAMED}"):
        opened.architecture.forward(opened.weights(), images)
    running = open_zoo(zoo.store, module=NAMED)
    assert running.architecture.forward(running.weights(), images).shape == (6, 5, 10)
    fits_second = open_zoo(zoo.store, module=[torch.nn.Linear(2, 2), SmallResNet])
    assert fits_second.architecture.forward(running.weights(), images).shape == (6, 5, 10)
    with pytest.raises(UserError, match="in the module"):
        _ = open_zoo(zoo.store, module=torch.nn.Linear(2, 2)).architecture


def test_what_a_zoo_says_of_its_module_is_never_imported(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that would leave a trace is named in zoo.json, everywhere that a module is."""
    (tmp_path / "trap.py").write_text("from pathlib import Path\nPath('sprung').write_text('')\ndef make(): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    info = json.loads(json.dumps(zoo.info))
    info["architecture"]["module"] = "trap:make"
    info["origin"] = {"kind": "trained", "config": {"architecture.module": "trap:make"}}
    opened = Zoo(zoo.store, info)
    with pytest.raises(UserError, match="trap:make"):
        opened.architecture.forward(opened.weights(), load("digits").test.images[:2])
    inspection.describe(opened)
    inspection.check(opened, 2, 0, None)
    inspection.export(opened, "m0", tmp_path / "m0.safetensors")
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in sys.modules


def test_export_and_check(zoo: Zoo, tmp_path: Path) -> None:
    without, running = open_zoo(zoo.store), open_zoo(zoo.store, module=SmallResNet)
    inspection.export(without, "m2", tmp_path / "m2.safetensors")
    SmallResNet().load_state_dict(safetensors.torch.load_file(tmp_path / "m2.safetensors"))  # strictly
    found = inspection.check(without, 4, 0, None)
    assert (found.recomputed, found.problems) == (0, ())
    assert "--module" in found.note
    found = inspection.check(running, 4, 0, None)
    assert (found.recomputed, found.problems) == (4, ())
    assert NAMED in inspection.describe(without)


def test_training_a_group_writes_states_that_the_module_loads(arch: Architecture, tmp_path: Path) -> None:
    from distrecon.config import replace
    from distrecon.zoos import format as zoo_format
    from distrecon.zoos.storage import store

    values = {
        "architecture.module": NAMED,
        "grid.initialisation": ["module"],
        "grid.lr": [0.003],
        "grid.seeds": 2,
        "training.epochs": 2,
        "training.checkpoints": [2],
        "training.batch_size": 100,
    }
    config, digits = replace(ZooConfig(), values, "--set"), load("digits")
    (models,) = groups(config)
    report = train_group(Group(0, tuple(models)), store(tmp_path), config, arch, digits)
    table = next(zoo_format.read_groups(store(tmp_path), report["part"]["file"], [0]))
    theta_SP = torch.from_numpy(zoo_format.weights_array(table["weights"]).copy())
    module = SmallResNet().eval()
    module.load_state_dict(arch.unflatten(theta_SP[0]))
    assert float(module.bn.running_mean.abs().max()) > 0  # the statistics followed the batches
    predicted = module(digits.test.images).argmax(1)
    accuracy = float((predicted == digits.test.labels_Q).float().mean())
    assert accuracy == pytest.approx(table["test_accuracy"][0].as_py(), abs=2e-3)
    assert accuracy > 0.3


def test_generated_networks_are_written_for_the_module(
    zoo: Zoo, arch: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sample = ZooSample(open_zoo(zoo.store, module=NAMED).architecture, zoo.weights("train"), load("digits"))
    save_autoencoder(tmp_path / "autoencoder", Training(tiny(model__latent=2), [sample], 1).autoencoder)
    monkeypatch.chdir(tmp_path)
    arguments = ["--autoencoder", "autoencoder", "--zoo", str(zoo.store), "--count", "2", "--out", "out", "--json"]
    assert generate.main([*arguments, "--module", NAMED]) == DONE, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert len(told["models"]) == 2
    for model in told["models"]:
        SmallResNet().load_state_dict(safetensors.torch.load_file(Path("out", model["file"])))  # strictly


def test_import_of_state_dicts(arch: Architecture, tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = SmallResNet()
        module.bn.num_batches_tracked += 7
        torch.save({"state_dict": module.state_dict()}, tmp_path / f"model{seed}_epoch_1.pt")
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "model2_epoch_1.pt")
    lines = [f"model{i}_epoch_1,.1,.1" for i in range(3)]
    (tmp_path / "table.csv").write_text("\n".join(["file,train_acc,test_acc", *lines]) + "\n")
    with pytest.raises(UserError, match="--images"):
        import_zoo(tmp_path, tmp_path / "none", ImportOptions(module=NAMED))
    report = import_zoo(tmp_path, tmp_path / "zoo", ImportOptions(module=NAMED, images="digits"))
    assert (report.models, report.states, len(report.skipped)) == (2, 2, 1)
    imported = open_zoo(tmp_path / "zoo")
    assert imported.architecture == arch
    torch.manual_seed(0)
    assert torch.equal(
        arch.flatten(SmallResNet().state_dict()),
        imported.weights()[imported.table()["model_id"].to_pylist().index("model0")],
    )


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("nowhere_at_all:make", "cannot be imported"),
        ("json:nothing", "no callable"),
        ("json", "PACKAGE.FILE"),
        ("json:dumps", "dumps"),
    ],
)
def test_wrong_names_of_modules(named: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ArchitectureConfig(module=named).build(load("digits"))


def test_a_module_with_other_outputs_than_the_images_have_classes() -> None:
    with pytest.raises(UserError, match="10 classes"):
        ArchitectureConfig(module="tests.zoos.test_modules:five").build(load("digits"))


def five() -> SmallResNet:
    return SmallResNet(5)


def test_statistics_are_kept_finite_and_positive(arch: Architecture) -> None:
    theta_BP = initialise(arch, ["module"], [0])
    theta_BP[:, arch.table.places(("variance",))] = -1.0
    assert arch.forward(theta_BP, load("digits").test.images[:2]).isfinite().all()
    assert float(arch.unflatten(theta_BP[0])["bn.running_var"].min()) == 0
