"""Space files: everything that can be wrong with one is found before a trial starts, in one line."""

import pytest
import yaml

from distrecon.cluster.space import one_trial
from distrecon.cluster.space import read_space as read
from distrecon.errors import UserError
from distrecon.kinds import KINDS

GOOD = {
    "name": "sweep",
    "kind": "autoencoder",
    "base": {"optim.epochs": 3},
    "space": {"loss.terms": {"grid": ["C+S", "C+S+B"]}, "loss.beta": {"grid": [0.1, 0.2, 0.5]}},
}


def read_space(path, overrides=None, smoke=False):
    return read(path, KINDS, overrides, smoke)


def write(tmp_path, **changes):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def test_reads_base_space_and_defaults(tmp_path):
    sweep = read_space(write(tmp_path))
    assert sweep.base.optim.epochs == 3
    assert sweep.trials == 6
    assert sweep.metric == "reconstruct/agreement_on_errors"
    assert sweep.mode == "max"
    assert len({tuple(values.items()) for values in sweep.grid()}) == 6


def test_overrides_win_over_base_and_take_a_swept_key_out(tmp_path):
    sweep = read_space(write(tmp_path), {"optim.epochs": 7, "loss.beta": 0.3})
    assert sweep.base.optim.epochs == 7
    assert sweep.base.loss.beta == 0.3
    assert list(sweep.space) == ["loss.terms"]


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("name: s\nkind: autoencoder\nbase: {optim.lr: 1e-4}\nspace: {}\n")
    assert read_space(path).base.optim.lr == 1e-4


def test_smoke_keeps_the_ends_of_each_grid(tmp_path):
    sweep = read_space(write(tmp_path), smoke=True)
    assert sweep.space["loss.beta"].values == (0.1, 0.5)
    assert sweep.base.zoo == ("smoke",)


def test_ranges_draw_samples(tmp_path):
    sweep = read_space(write(tmp_path, samples=5, space={"optim.lr": {"loguniform": [1e-4, 1e-2]}}))
    assert sweep.trials == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"loss.betta": 0.1}}, ["loss.betta", "did you mean 'loss.beta'"]),
        ({"space": {"los.terms": {"grid": ["C+S"]}}}, ["los.terms", "did you mean 'loss.terms'"]),
        ({"spcae": {}}, ["spcae", "did you mean 'space'"]),
        ({"base": {"optim.epochs": "many"}}, ["optim.epochs", "int", "'many'"]),
        ({"base": {"optim.epochs": True}}, ["optim.epochs", "int", "True"]),
        ({"space": {"loss.beta": {"grid": []}}}, ["loss.beta", "empty"]),
        ({"space": {"loss.beta": {"gird": [1]}}}, ["loss.beta", "'gird'", "did you mean 'grid'"]),
        ({"space": {"loss.beta": {"grid": [2.0]}}}, ["loss.beta", "between 0"]),
        ({"space": {"loss.beta": {"uniform": [1.0, 0.5]}}}, ["loss.beta", "low < high"]),
        ({"space": {"loss.terms": {"grid": ["C+X"]}}}, ["loss.terms", "'X'"]),
        ({"kind": "autoencodr"}, ["autoencodr", "did you mean 'autoencoder'"]),
        ({"metric": "reconstruct/agrement"}, ["did you mean 'reconstruct/agreement'"]),
        ({"mode": "maximum"}, ["mode", "did you mean 'max'"]),
        ({"scheduler": "asha"}, ["asha", "loss/total"]),
        ({"max_concurrent": 0}, ["max_concurrent", "from 1"]),
        ({"name": "a/b"}, ["a/b"]),
        ({"base": {"loss.beta": 0.1}}, ["loss.beta", "both in base and in space"]),
    ],
)
def test_wrong_spaces_are_refused_by_file_and_key(tmp_path, changes, words):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_space(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["a: [", "just words", "- a\n- b"])
def test_a_file_that_is_no_space_is_refused(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"not YAML|not a space file"):
        read_space(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml: no such space file"):
        read_space(tmp_path / "nowhere.yaml")


def test_one_trial_needs_no_file():
    overrides, small = {"optim.epochs": 7}, KINDS["autoencoder"]
    sweep = one_trial("train", small, {"zoo": ["mine"]}, overrides, False, "--zoo")
    assert (sweep.name, sweep.trials, sweep.zoos, sweep.base.optim.epochs) == ("train", 1, {"mine"}, 7)
    assert (sweep.metric, sweep.mode) == ("reconstruct/agreement_on_errors", "max")
    assert list(sweep.grid()) == [{"zoo": ("mine",)}]
    with pytest.raises(UserError, match=r"--zoo.*zoo is empty: it must list at least one value"):
        one_trial("train", small, {"zoo": []}, {}, False, "--zoo")


def test_early_stopping_is_offered_for_the_metrics_that_every_epoch_has(tmp_path):
    assert read_space(write(tmp_path, scheduler="asha", metric="loss/total")).scheduler == "asha"
    path = write(tmp_path, kind="expand_cluster", base={}, space={"seed": {"grid": [0]}}, scheduler="asha")
    with pytest.raises(UserError, match="known at their end only: use scheduler fifo"):
        read_space(path)


def test_dimensions_of_other_lengths_are_checked_to_their_ends(tmp_path):
    """Three choices beside a range of two ends: the third is tried with the range's second."""
    space = {"optim.batch_size": {"choice": [2, 4, 8]}, "optim.lr": {"loguniform": [1e-4, 1e-2]}}
    assert read_space(write(tmp_path, space=space)).trials == 1
    space["optim.batch_size"] = {"choice": [2, 4, 0]}
    with pytest.raises(UserError, match="batch_size"):
        read_space(write(tmp_path, space=space))
