"""Settings that no run could end with are refused in one line: numbers, names, sizes, keys."""

import pytest

from distrecon import config, train, zoo
from distrecon.autoencoder import AutoencoderConfig
from distrecon.cluster.space import read_space
from distrecon.console import WRONG_REQUEST
from distrecon.errors import UserError
from distrecon.kinds import KINDS
from distrecon.record.folder import RunFolder
from distrecon.zoos.settings import ZooConfig


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "a/b", "a\\b", "", "a" * 101, "a\n", "a\x1b[2J"])
def test_names_of_sweeps_are_safe_as_folders(tmp_path, name):
    import yaml

    space = {"name": name, "kind": "autoencoder", "space": {"loss.beta": {"grid": [0.1]}}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(space))
    with pytest.raises(UserError, match="name"):
        read_space(tmp_path / "s.yaml", KINDS)


def test_a_grid_of_a_hundred_million_points_is_refused_at_once(tmp_path):
    values = ", ".join(str(i / 100) for i in range(1, 100))
    keys = ("loss.beta", "loss.gamma", "loss.temperature", "optim.lr")
    space = "".join(f"  {key}: {{grid: [{values}]}}\n" for key in keys)
    (tmp_path / "s.yaml").write_text(f"name: s\nkind: autoencoder\nspace:\n{space}")
    with pytest.raises(UserError, match=r"96,059,601 trials, more than 10,000"):
        read_space(tmp_path / "s.yaml", KINDS)
    (tmp_path / "s.yaml").write_text(
        "name: s\nkind: autoencoder\nsamples: 1000000\nspace: {loss.beta: {choice: [0.1]}}"
    )
    with pytest.raises(UserError, match=r"1,000,000 trials"):
        read_space(tmp_path / "s.yaml", KINDS)


def test_a_zoo_of_too_many_models_is_refused_at_once():
    with pytest.raises(UserError, match=r"4,000,000,000 models, more than 1,000,000"):
        config.replace(ZooConfig(), {"grid.seeds": 10**9})


@pytest.mark.parametrize("value", [-1, 2**63, 10**40, float("nan"), float("inf"), "nan"])
@pytest.mark.parametrize("kind", [ZooConfig, AutoencoderConfig])
def test_seeds_are_whole_numbers_from_0(kind, value):
    with pytest.raises(UserError, match="seed"):
        config.replace(kind(), {"seed": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("grid.lr", [float("nan")]), ("grid.lr", [-1.0]), ("grid.weight_decay", [-1e-3]), ("architecture.hidden", [-3])],
)
def test_numbers_are_finite_and_in_their_range(key, value):
    values = {"architecture.name": "mlp", key: value}
    with pytest.raises(UserError, match=key):
        config.replace(ZooConfig(), values)


@pytest.mark.parametrize("key", [1, 1.5, None, True])
def test_a_key_that_is_no_text_is_an_unknown_one(key):
    with pytest.raises(UserError, match=f"unknown key {key!r}"):
        config.replace(ZooConfig(), {key: 3})


def test_a_negative_seed_of_a_command_is_one_line(capsys):
    for main, arguments in ((train.main, []), (zoo.main, ["train", "--out", "x"])):
        assert main([*arguments, "--seed", "-1"]) == WRONG_REQUEST
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1
        assert "--seed" in told


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "null", "{", "[" * 10**5, '{"command": 3}', '{"command": "train", "format": "x"}']
)
def test_a_damaged_request_or_summary_is_one_line(tmp_path, text, capsys):
    from distrecon.kinds.autoencoder import autoencoder_folder

    (tmp_path / "request.json").write_text(text)
    assert train.main(["--resume", str(tmp_path)]) == WRONG_REQUEST
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert RunFolder(tmp_path).command in (None, 3, "train")
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError) as error:
        autoencoder_folder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("best", ["../../secret", "/etc", 3, None])
def test_a_summary_cannot_lead_out_of_its_run(tmp_path, best):
    import json

    from distrecon.kinds.autoencoder import autoencoder_folder

    (tmp_path.parent / "secret").mkdir(exist_ok=True)
    (tmp_path.parent / "secret/autoencoder.json").write_text("{}")
    sweep = {"kind": "autoencoder", "name": "s", "best": best}
    (tmp_path / "summary.json").write_text(json.dumps({"sweeps": [sweep]}))
    with pytest.raises(UserError):
        autoencoder_folder(tmp_path)
