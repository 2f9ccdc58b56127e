"""Conditions in words: what tables call them can be typed."""

import pytest

import analysis as an
from analysis.perturb import Where, condition_from_text
from analysis.stats import label_of


@pytest.mark.parametrize(
    ("text", "perturbation", "rest"),
    [
        ("DropTop(1)", an.DropTop(1), {}),
        ("DropTop(m=2)", an.DropTop(2), {}),
        ("RandomRouting", an.RandomRouting(), {}),
        ("GaussianNoise(0.5), stage 0", an.GaussianNoise(0.5), {"where": "stage 0"}),
        ("DropTop(1), layer 1 stage 0, scores", an.DropTop(1), {"point": "scores"}),
        ("DropTop(1), part set", an.DropTop(1), {"effect": "part set"}),
        ("ResidualNoise(of=DropTop(1))", an.ResidualNoise(an.DropTop(1)), {}),
        ("KeepRanks([1, 3])", an.KeepRanks([1, 3]), {}),
        ("DropTop(1), replay", an.DropTop(1), {"downstream": "replay"}),
        ("Compose([RandomRouting, NoRouted])", an.Compose([an.RandomRouting(), an.NoRouted()]), {}),
    ],
)
def test_what_is_meant(text, perturbation, rest):
    found = condition_from_text(text, seed=3)
    assert found.perturbation == perturbation
    assert found.eval_seed == 3
    for name, value in rest.items():
        assert getattr(found, name) == (Where.parse(value) if name == "where" else value)


@pytest.mark.parametrize(
    "condition",
    [
        an.Condition(an.DropTop(2)),
        an.Condition(an.DropTop(1), Where.parse("layer 1"), "scores"),
        an.Condition(an.Temperature(2.0)),
        an.Condition(an.DropTop(1), effect="part weights"),
    ],
)
def test_the_labels_of_tables_can_be_typed(condition):
    columns = condition.columns()
    names = ("perturbation", "strength", "where", "point", "effect", "downstream")
    assert condition_from_text(label_of(**{name: columns[name] for name in names})) == condition


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("DropTop(", "write it like"),
        ("Drop(1)", "perturbation is 'Drop'; choose one of"),
        ("DropTop(1, 2, 3, 4)", "DropTop"),
        ("DropTop(x=1)", "x"),
        ("DropTop(-1)", "m is -1"),
        ("DropTop(1 + os)", "no value"),
        ("DropTop(1), scores, logits", "'scores' and 'logits' both say its point"),
        ("DropTop(1), stage one", "stage one"),
        ("DropTop(**{'m': 2})", "none by name"),
        ("DropTop(m=1, m=2)", "write it like|twice"),
        ("GaussianNoise({[]: 1})", "no value"),
        ("", "write it like"),
        ("(1)", "begins with no perturbation"),
    ],
)
def test_what_is_no_condition(text, said):
    with pytest.raises(ValueError, match=said):
        condition_from_text(text)
