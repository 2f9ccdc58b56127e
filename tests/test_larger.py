"""The studies of size and of larger models: what is compared is comparable."""

import numpy as np
import pandas as pd
import pytest

from cartmoe import LanguageModel
from studies import larger, size


def test_widths_have_equal_tokens_per_parameter():
    specs = size.study([32, 64, 96], seeds=2).models
    assert [(m.name, m.train_seed) for m in specs[:3]] == [
        ("cartesian-32", 0),
        ("smoe_share-32", 0),
        ("cartesian-64", 0),
    ]
    for spec in specs:
        tokens = spec.train.steps * spec.train.batch_size * spec.train.length
        share = tokens / LanguageModel(spec.config).num_parameters()
        assert share == pytest.approx(size.TOKENS_PER_PARAMETER, rel=0.02)
        assert spec.train.learning_rate * spec.config.d_model == pytest.approx(0.004 * 64)
    assert len({m.train.steps for m in specs if m.name.endswith("-64")}) == 1


def differences(slope, noise=0.0):
    rng = np.random.default_rng(0)
    rows = [
        dict(label="DropTop(1)", width=w, train_seed=s, difference=slope * np.log2(w))
        for w in (32, 64, 128)
        for s in range(3)
    ]
    table = pd.DataFrame(rows)
    return table.assign(difference=table.difference + noise * rng.standard_normal(len(table)))


def test_slopes():
    (row,) = size.slopes(differences(0.3)).itertuples()
    assert row.slope == row.low == row.high == pytest.approx(0.3)
    (row,) = size.slopes(differences(0.3, noise=0.1)).itertuples()
    assert row.low < 0.3 < row.high
    assert row.num_pairs == 9
    (row,) = size.slopes(differences(0.3)[::3][:2]).itertuples()
    assert np.isnan(row.low)


@pytest.mark.parametrize("preset", larger.RECIPES)
def test_larger_models(preset):
    study = larger.study(preset, ["cartesian", "smoe_share"], seeds=2)
    assert [(m.name, m.train_seed) for m in study.models] == [
        ("cartesian", 0),
        ("smoe_share", 0),
        ("cartesian", 1),
        ("smoe_share", 1),
    ]
    config, train = study.models[0].config, study.models[0].train
    layers = {c.where.layer for c in study.conditions} - {None}
    assert layers == {0}  # the second is not routed
    assert all(config.is_moe(layer) for layer in layers)
    assert train.precision == "bf16"
    assert study.data.length == train.length
    assert len({m.train.steps for m in study.models}) == 1


def test_all_names_of_larger_models():
    names = [m.name for m in larger.study("nano", list(larger.MODELS), seeds=1).models]
    assert names[-2:] == ["parallel", "unshared"]


def test_names_that_there_are_none_of():
    with pytest.raises(ValueError, match="names is 'x'; choose one of 'dense'"):
        larger.study("nano", ["x"], seeds=1)
    with pytest.raises(ValueError, match="preset is 'base'; choose one of 'nano', 'small'"):
        larger.study("base", ["dense"], seeds=1)
