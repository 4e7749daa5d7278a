"""A network's place in a zoo: the same for all weights of one function; distances and novelty worked by hand."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import save_file

from benchmarks.__main__ import main
from distrecon import evaluate, recover, write_zoo
from distrecon.autoencoder import Training, ZooSample, predict
from distrecon.autoencoder.place import place, zoo_with
from distrecon.autoencoder.scoring import score
from distrecon.errors import UserError
from distrecon.expand_cluster import recover_network
from distrecon.expand_cluster.convolution.hypothesis import read_layers
from distrecon.expand_cluster.convolution.network import Chain as ConvChain
from distrecon.images import LabelledImages
from distrecon.kinds.autoencoder import KIND
from distrecon.nets import ChainArchitecture, architecture, permute, random_permutation, rescale
from distrecon.nets.activations import activation as find_activation
from distrecon.nets.layers import Layer
from distrecon.zoos import open_zoo
from distrecon.zoos.inspection import export
from tests.autoencoder.small import as_models, related_models, tiny
from tests.conftest import CHECKOUT

SIZES = (64, 3, 10)
CONFIG = tiny(model__kind="activation_pca", data__symmetries="all", tasks__samples=4)


@pytest.fixture(scope="module")
def arch():
    return architecture("mlp", sizes=SIZES, activation="tanh")


@pytest.fixture(scope="module")
def zoo(arch, images, tmp_path_factory):
    """60 related networks of three hidden units, without training."""
    theta_BP = related_models(arch, 60)
    few = replace(images, test=LabelledImages(images.test.images[:200], images.test.labels_Q[:200]))
    models = as_models(arch, theta_BP, few)
    path = tmp_path_factory.mktemp("zoo") / "mlps"
    split = ["train"] * 40 + ["val"] * 10 + ["test"] * 10
    write_zoo(
        path,
        arch,
        theta_BP,
        model_id=models.model_id,
        split=split,
        images="digits",
        epoch=models.epoch_B.tolist(),
        train_accuracy=models.train_accuracy_B.tolist(),
        test_accuracy=models.test_accuracy_B.tolist(),
        generalization_gap=models.generalization_gap_B.tolist(),
    )
    return open_zoo(path)


@pytest.fixture(scope="module")
def autoencoder(arch, zoo, images):
    return Training(CONFIG, [ZooSample(arch, zoo.weights("train"), images)], 1).autoencoder.eval()


@pytest.fixture(scope="module")
def run(autoencoder, zoo, tmp_path_factory):
    """A folder as a scored training leaves it."""
    folder = tmp_path_factory.mktemp("scored")
    score(autoencoder, zoo, CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def probes(autoencoder, zoo):
    splits = [zoo.models(split) for split in ("train", "val", "test")]
    return predict.predict(autoencoder, splits, [autoencoder.encode(split.theta_BP) for split in splits])[2]


def disguised(arch, theta_P, seed=0):
    """Other weights of the same function."""
    generator = torch.Generator().manual_seed(seed)
    permuted = permute(arch, theta_P[None], random_permutation(arch, generator))
    return rescale(arch, permuted, [torch.tensor([[-1.0, 1.0, -1.0]])])[0]


def test_all_weights_of_a_function_have_one_place(autoencoder, probes, arch, zoo):
    train, validation, test = (zoo.models(split) for split in ("train", "val", "test"))
    for theta_P in test.theta_BP[:3]:
        here, there = (place(autoencoder, probes, t, train, validation) for t in (theta_P, disguised(arch, theta_P)))
        assert here.predicted.keys() == {"test_accuracy", "generalization_gap", "epoch"}
        for name, value in here.predicted.items():
            assert there.predicted[name] == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert [n.model_id for n in there.nearest] == [n.model_id for n in here.nearest]
        assert there.novelty == pytest.approx(here.novelty, rel=1e-5)
        torch.testing.assert_close(there.latent, here.latent, rtol=1e-4, atol=1e-4)


def test_nearest_and_novelty_by_hand(autoencoder, probes, arch, zoo):
    """Models that differ in their last bias alone, in disguise: 0 and 3 to train on, 1 held out, .5 to place."""
    base_P = zoo.weights("test")[0]

    def moved(*values):
        models_BP = torch.stack([disguised(arch, base_P, i) for i in range(len(values))])
        models_BP[:, -1] += torch.tensor(values)
        count = torch.arange(len(values))
        names = [f"at {value:g}" for value in values]
        return replace(
            zoo.models("val"), theta_BP=models_BP, model_id=names, epoch_B=count, test_accuracy_B=0.5 + 0.1 * count
        )

    found = place(autoencoder, probes, moved(0.5).theta_BP[0], moved(3.0, 0.0, 0.25), moved(1.0), count=2)
    assert [n.model_id for n in found.nearest] == ["at 0.25", "at 0"]
    assert [n.distance for n in found.nearest] == pytest.approx([0.25, 0.5], abs=1e-5)
    assert [n.epoch for n in found.nearest] == [2, 1]
    assert [n.test_accuracy for n in found.nearest] == pytest.approx([0.7, 0.6])
    assert found.novelty == pytest.approx(0.25 / 0.75, abs=1e-5)
    assert found.distance_N.tolist() == pytest.approx([2.5, 0.5, 0.25], abs=1e-5)


def test_a_network_of_another_architecture_is_one_line(arch):
    def layers(*sizes):
        return [(torch.zeros(b, a), torch.zeros(b)) for a, b in pairwise(sizes)]

    assert zoo_with([architecture("cnn_small"), arch], layers(*SIZES), "tanh") == 1
    for sizes, activation in (((64, 4, 10), "tanh"), (SIZES, "relu"), ((64, 3, 3, 10), "tanh")):
        found = f"{'-'.join(map(str, sizes))} {activation}"
        with pytest.raises(UserError, match=f"the network is {found}, the autoencoder's models are 64-3-10 tanh"):
            zoo_with([arch], layers(*sizes), activation)


def test_a_black_box_is_recovered_and_placed_as_its_weights_are(zoo, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = zoo.models("test").model_id[4]
    export(zoo, name, tmp_path / "box.safetensors")
    options = ["--autoencoder", str(run), "--zoo", str(zoo.store), "--json"]
    assert recover.main(["--teacher", "box.safetensors", *options, "--out", "recovered"]) == 0
    recovered = json.loads(capsys.readouterr().out)
    found = recovered["place"]
    assert evaluate.main(["--model", "box.safetensors", *options, "--out", "evaluated"]) == 0
    expected = json.loads(capsys.readouterr().out)["place"]
    assert found["predicted"] == pytest.approx(expected["predicted"], rel=1e-3, abs=1e-4)
    assert [n["model_id"] for n in found["nearest"]] == [n["model_id"] for n in expected["nearest"]]
    assert recovered["metrics"]["place/novelty"] == pytest.approx(expected["novelty"], rel=1e-3)
    assert json.loads((tmp_path / "recovered" / "summary.json").read_text())["place"] == found
    for folder in ("recovered", "evaluated"):
        page = (tmp_path / folder / "report.html").read_text()
        assert "The network among the zoo" in page
        assert found["nearest"][0]["model_id"] in page
    client = MlflowClient(recovered["mlflow"])
    recoveries = client.search_runs([client.get_experiment_by_name("recover").experiment_id], "tags.trial_id != ''")
    (logged,) = [run for run in recoveries if run.data.tags["run_folder"] == str(tmp_path / "recovered")]
    assert logged.data.metrics["place/test_accuracy"] == pytest.approx(found["predicted"]["test_accuracy"])
    evaluations = client.search_runs([client.get_experiment_by_name("evaluate").experiment_id], "tags.trial_id != ''")
    (again,) = [run for run in evaluations if run.data.tags["run_folder"] == str(tmp_path / "evaluated")]
    assert again.data.metrics["place/distance"] == pytest.approx(expected["nearest"][0]["distance"])


def test_a_recovered_convolutional_network_has_the_place_of_its_weights(images):
    arch = ChainArchitecture("conv", (Layer("a", 1, 2, 3), Layer("b", 72, 10, positions=36)), "tanh", (1, 8, 8))
    theta_BP = related_models(arch, 40)
    autoencoder = Training(CONFIG, [ZooSample(arch, theta_BP[:30], images)], 1).autoencoder.eval()
    few = replace(images, test=LabelledImages(images.test.images[:200], images.test.labels_Q[:200]))
    train, val, test = (as_models(arch, theta_BP[rows], few) for rows in (slice(30), slice(30, 35), slice(35, 40)))
    latents = [autoencoder.encode(split.theta_BP) for split in (train, val, test)]
    probes = predict.predict(autoencoder, (train, val, test), latents)[2]
    truth = [(weight[0], bias[0]) for weight, bias in arch.weights_and_biases(test.theta_BP[:1].double())]
    box = ConvChain(read_layers("conv3 linear", (1, 8, 8)), truth, find_activation("tanh"))
    recovery = recover_network(box.module().requires_grad_(False), (1, 8, 8), "tanh", layers="conv3 linear")
    assert recovery.verified, recovery.reason
    assert zoo_with([arch], recovery.weights, "tanh", recovery.function.architecture()) == 0
    padded = replace(
        arch, layers=(replace(arch.layers[0], padding=1), replace(arch.layers[1], in_features=128, positions=64))
    )
    with pytest.raises(UserError, match=r"the network is 1x8x8 conv3p0-2 linear-10 tanh, .* are 1x8x8 conv3p1-2"):
        zoo_with([padded], recovery.weights, "tanh", recovery.function.architecture())
    flat_P = torch.cat([part.flatten() for layer in recovery.weights for part in layer])
    found, expected = (place(autoencoder, probes, theta_P, train, val) for theta_P in (flat_P, test.theta_BP[0]))
    assert found.predicted == pytest.approx(expected.predicted, rel=1e-3, abs=1e-4)
    assert found.novelty == pytest.approx(expected.novelty, rel=1e-3)


def test_a_recovery_of_other_sizes_stands_and_says_why_it_has_no_place(zoo, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--autoencoder", str(run), "--zoo", str(zoo.store)]
    assert recover.main(["--smoke", *options, "--out", "run"]) == 0
    assert (
        "not placed   the network is 6-4-1 tanh, the autoencoder's models are 64-3-10 tanh" in capsys.readouterr().out
    )
    assert "place/novelty" not in json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]


def test_wrong_requests_are_one_line(zoo, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file({"layers.0.weight": torch.zeros(2, 64)}, tmp_path / "other.safetensors")
    options = ["--autoencoder", str(run)]
    for command, arguments, message in (
        (evaluate.main, options, "--zoo ZOO is needed"),
        (evaluate.main, [*options, "--model", "none.pt"], "is not known from it: name one with --zoo"),
        (evaluate.main, [*options, "--zoo", str(zoo.store), "--model", "none.pt"], "no such file"),
        (evaluate.main, [*options, "--zoo", str(zoo.store), "--model", "other.safetensors"], "other.safetensors"),
        (recover.main, ["--smoke", "--zoo", str(zoo.store)], "--autoencoder RUN"),
    ):
        assert command(arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_the_served_autoencoder_predicts(run, zoo, autoencoder, probes, tmp_path, monkeypatch):
    served = KIND.serve(run)
    theta_BP = zoo.weights("test")
    found = served.call(theta_BP.numpy(), task="predict")
    expected = predict.predicted(autoencoder, probes, theta_BP)
    assert found.shape == (10, 3)
    for column, name in enumerate(("test_accuracy", "generalization_gap", "epoch")):
        np.testing.assert_allclose(found[:, column], expected[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="predict, not 'guess'"):
        served.call(theta_BP.numpy(), task="guess")
    (tmp_path / "bare").mkdir()
    for file in run.glob("autoencoder.*"):
        (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="no probes of zoo 0"):
        KIND.serve(tmp_path / "bare").call(theta_BP.numpy(), task="predict")


@pytest.mark.slow
def test_twenty_black_boxes_are_placed_as_their_weights_are(tmp_path, monkeypatch):
    """Held-out models of the shipped dense zoo, which is trained here: all recovered, and R2 of their accuracies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    assert main(["placement", "--precision", "float64", "--json", "placed.json"]) == 0
    ((_, found),) = json.loads((tmp_path / "placed.json").read_text()).items()
    rows = found["rows"]
    assert len(rows) == 20
    assert all(row["verified"] for row in rows)
    predicted, by_true_weights, actual = (
        np.array([row[key] for row in rows]) for key in ("predicted", "by_true_weights", "true_accuracy")
    )
    np.testing.assert_allclose(predicted, by_true_weights, atol=1e-5)
    assert predict.r2(predicted, actual) > 0.9
