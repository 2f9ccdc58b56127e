"""The studies of size and of larger models: what is compared is comparable."""

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from cartmoe import LanguageModel
from cartmoe.train import TrainConfig, train
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
    one, other = (larger.study(preset, name, seed=1) for name in ("cartesian", "smoe_share"))
    (model,), (compared,) = one.models, other.models
    assert (model.name, model.train_seed) == ("cartesian", 1)
    layers = {c.where.layer for c in one.conditions} - {None}
    assert layers == {0}  # the second is not routed
    assert all(model.config.is_moe(layer) for layer in layers)
    assert model.train.precision == "bf16"
    assert one.data.length == model.train.length
    assert model.train == compared.train


def test_variants_of_larger_models():
    parallel, unshared = (larger.config("nano", name) for name in ("parallel", "unshared"))
    assert parallel.family == unshared.family == "cartesian"
    assert parallel.composition == "parallel"
    assert not unshared.shared_experts
    assert parallel.d_model == 128


def test_damage_of_a_larger_model_over_training(tmp_path, tiny_config):
    recipe = TrainConfig(steps=4, batch_size=2, length=16, checkpoint_every=2, keep=2)
    run = train(tiny_config("smoe", vocab_size=256), recipe, tmp_path / "run", progress=False)
    found = larger.over_training(run)
    assert set(found.label) == {"DropTop(1)", "RandomRouting(1)"}
    assert found.groupby("step").tokens.first().to_dict() == {2: 64, 4: 128}


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (larger, ["--name", "x"], "name is 'x'; choose one of 'dense'"),
        (larger, ["--preset", "base"], "preset is 'base'; choose one of 'nano', 'small'"),
        (larger, ["--seed", "-1"], "greater than or equal to 0"),
        (size, ["--width", "48"], "width is 48; give multiples of 32"),
    ],
)
def test_what_there_is_none_of(script, words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()
