"""Study files: what they mean, and every mistake named at once."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.perturb.base import Identity
from analysis.perturb.compound import Compose, ResidualNoise
from analysis.perturb.condition import Condition
from analysis.perturb.decisions import NoRouted
from analysis.perturb.logits import GaussianNoise, RandomRouting
from analysis.perturb.masks import DropChosen, DropTop, KeepRanks
from analysis.study.plan import conditions_for
from analysis.study.specs import Contrasts, Data, Measure
from analysis.study.study import Study, study_dict
from analysis.study.texts import documents_of
from cartmoe.checkpoint import load, save
from cartmoe.config import FAMILIES

QUICK = Path(__file__).parents[3] / "studies"
TRAIN = {"families": ["cartesian"], "steps": 2}


def study(**sections) -> Study:
    return Study.from_dict({"train": TRAIN} | sections)


def mistakes(table) -> list[str]:
    with pytest.raises(ValueError, match=r"^study: ") as error:
        Study.from_dict(table)
    lines = str(error.value).splitlines()
    assert all(line.startswith("study: ") for line in lines)
    assert len(lines) == len(set(lines))
    return [line.removeprefix("study: ") for line in lines]


# ---- what a study means


@pytest.mark.parametrize("name", ["scratch", "small", "paper"])
def test_studies_of_the_project_can_be_read(name):
    got = Study.read(QUICK / f"{name}.toml")
    assert got.models
    assert got.conditions
    assert study_dict(got)["name"] == got.name


def test_variants_are_models_of_a_name():
    train = {"families": ["smoe"], "seeds": [0, 1], "steps": 2, "model": {"num_experts": 8}}
    parallel = {"family": "cartesian", "composition": "parallel", "num_experts": 4}
    got = study(train=train | {"variants": {"control": parallel}})
    assert [(m.name, m.train_seed) for m in got.models] == [
        *[("smoe", 0), ("smoe", 1)],
        *[("control", 0), ("control", 1)],
    ]
    config = got.models[2].config
    assert (config.family, config.composition, config.num_experts) == ("cartesian", "parallel", 4)
    assert got.models[0].config.num_experts == 8
    assert got.models[3].train == replace(got.models[2].train, seed=1)
    alone = study(train=train | {"families": [], "variants": {"control": parallel}})
    assert alone.models == got.models[2:]
    only = {"perturbation": "DropTop", "m": 1, "models": ["control"]}
    got = study(train=train | {"variants": {"control": parallel}}, conditions=[only])
    assert got.only[got.conditions[0]].models == ("control",)


def test_a_definition_is_what_the_file_still_says(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text('[data]\ndocuments = 7\n[train]\nfamilies = ["smoe"]\nsteps = 2\n')
    read = Study.read(path)
    assert read.definition == path.read_text()
    assert replace(read, data=replace(read.data, documents=3)).definition == ""


def test_families_and_seeds():
    got = study(train={"preset": "small", "families": ["smoe", "dense"], "seeds": [0, 3]},
                data={"length": 32, "tokenizer": "bpe:8192"})  # fmt: skip
    assert [(m.name, m.train_seed) for m in got.models] == [
        ("smoe", 0),
        ("smoe", 3),
        ("dense", 0),
        ("dense", 3),
    ]
    assert all(m.train.seed == m.train_seed for m in got.models)
    assert all(m.train.length == 32 and m.train.tokenizer == "bpe:8192" for m in got.models)
    assert all(m.config.vocab_size == 8192 and m.config.family == m.name for m in got.models)


def test_defaults():
    got = Study.from_dict({"train": {}}, default_name="mine")
    assert got.name == "mine"
    assert [m.name for m in got.models] == list(FAMILIES)
    assert (got.data, got.measure, got.conditions) == (Data(), Measure(), ())


def test_model_options():
    got = study(train=TRAIN | {"model": {"d_model": 32, "num_experts": 4, "top_k": [1, 2]}})
    assert got.models[0].config.d_model == 32
    assert got.models[0].config.top_k == (1, 2)


def test_grid():
    got = study(
        conditions=[
            {"perturbation": "DropTop", "m": [1, 2], "where": ["all", "stage 0"]},
            {"perturbation": ["Identity", "NoRouted"]},
            {"perturbation": "GaussianNoise", "sigma": 0.5, "eval_seed": [0, 1]},
        ]
    )
    assert got.conditions == (
        Condition(DropTop(1)),
        Condition(DropTop(1), "stage 0"),
        Condition(DropTop(2)),
        Condition(DropTop(2), "stage 0"),
        Condition(Identity()),
        Condition(NoRouted()),
        Condition(GaussianNoise(0.5)),
        Condition(GaussianNoise(0.5), eval_seed=1),
    )


def test_duplicates_are_removed():
    got = study(
        conditions=[
            {"perturbation": ["DropTop", "DropChosen"], "m": [1, 1]},
            {"perturbation": "DropTop"},
            {"perturbation": "GaussianNoise", "sigma": [1, 1.0]},
            {"perturbation": "RandomRouting", "share": [1, 1.0], "where": "all"},
        ]
    )
    assert got.conditions == tuple(
        map(Condition, [DropTop(1), DropChosen(1), GaussianNoise(1.0), RandomRouting()])
    )


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("cartesian", ["all", "stage 0", "stage 1", "layer 0", "layer 2 stage 1", "positions 0:4"]),
        ("smoe_share", ["all", "layer 0", "positions 0:4"]),
        ("dense", []),
    ],
)
def test_conditions_of_a_model(model_of, kind, kept):
    """Those without a router, and a stage that is the whole, are left out."""
    wheres = ["all", "stage 0", "stage 1", "layer 0", "layer 1", "layer 2 stage 1",
              "positions 0:4", "stage 2"]  # fmt: skip
    conditions = [Condition(DropTop(1), where) for where in wheres]
    assert [str(c.where) for c in conditions_for(model_of(kind).sites(), conditions)] == kept


def test_given_models(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    tables = [
        {"path": str(tmp_path / "one")},
        {"path": str(tmp_path / "two"), "name": "b", "train_seed": 4},
        {"path": str(tmp_path / "two") + "/.", "train_seed": 1},
    ]
    got = Study.from_dict({"models": tables})
    assert [(m.name, m.train_seed) for m in got.models] == [("one", 0), ("b", 4), ("two", 1)]
    listed = Study.from_dict({"models": [{"path": [table["path"] for table in tables[:2]]}]})
    assert [(m.name, m.train_seed) for m in listed.models] == [("one", 0), ("two", 0)]
    both = Study.from_dict({"models": tables, "train": TRAIN})
    assert [m.name for m in both.models] == ["cartesian", "one", "b", "two"]


# ---- files


def test_read(tmp_path, write_study):
    path = write_study(tmp_path / "s.toml", name=None)
    got = Study.read(path)
    assert got.name == "s"
    assert len(got.models) == 3
    assert len(got.conditions) == 10
    assert Study.read(str(path)) == got


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no models: give"),
        (b"# nothing\n", "no models: give"),
        (b"[data\n", "not TOML"),
        (b"name = quick", "not TOML"),
        (b"\x80\x81\xff", "not TOML"),
        (b"[train]\nsteps = 1\nsteps = 2", "not TOML"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "s.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Study.read(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_no_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no study at"):
        Study.read(tmp_path / name)


# ---- values that are lists, perturbations within others, one's own, other models


def test_a_list_of_lists_stands_for_several():
    got = study(
        conditions=[
            {"perturbation": "KeepRanks", "ranks": [1, 2]},
            {"perturbation": "KeepRanks", "ranks": [[1], [1, 2], [2, 3]], "point": ["logits"]},
            {"perturbation": ["KeepRanks", "Identity"], "where": ["all", "layer 0"]},
        ]
    )
    assert got.conditions == (
        Condition(KeepRanks((1, 2))),
        Condition(KeepRanks((1,))),
        Condition(KeepRanks((2, 3))),
        Condition(KeepRanks((1,)), "layer 0"),
        Condition(Identity()),
        Condition(Identity(), "layer 0"),
    )


def test_nested_perturbations():
    top, noise = {"name": "DropTop", "m": 1}, {"name": "GaussianNoise", "sigma": 2.0}
    got = study(
        conditions=[
            {"perturbation": "Compose", "parts": [top, noise]},
            {"perturbation": "Compose", "parts": [[noise], [top, noise]]},
            {"perturbation": "ResidualNoise", "of": [top, noise]},
        ]
    )
    assert got.conditions == (
        Condition(Compose((DropTop(1), GaussianNoise(2.0)))),
        Condition(Compose((GaussianNoise(2.0),))),
        Condition(ResidualNoise(DropTop(1))),
        Condition(ResidualNoise(GaussianNoise(2.0))),
    )


def test_a_perturbation_of_ones_own(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    got = study(conditions=[{"perturbation": ["killers:Kills", "DropTop"], "eval_seed": [0, 1]}])
    assert [c.perturbation.label for c in got.conditions] == ["Kills"] * 2 + ["DropTop"] * 2
    assert got.conditions[0].to_dict()["perturbation"]["name"] == "killers:Kills"


def test_contrasts():
    conditions = [{"perturbation": "DropTop", "m": [1, 2], "point": ["logits", "scores"]}]
    got = study(conditions=conditions, contrasts={"reference": "cartesian"})
    assert got.contrasts == Contrasts("cartesian", ("DropTop(1)",), 0.05)
    asked = {"reference": "cartesian", "conditions": ["DropTop(2), scores"], "margin": 0.1}
    got = study(conditions=conditions, contrasts=asked)
    assert got.contrasts == Contrasts("cartesian", ("DropTop(2), scores",), 0.1)
    assert study().contrasts is None


# ---- mistakes

MISTAKES = [
    # sections
    ({"dat": {}}, "dat: no such key; choose one of conditions, contrasts, data, measure, models, "),
    ({"name": 3}, "name is 3; it must be a text"),
    ({"data": 3}, "data: it is 3; write a table, [data]"),
    ({"measure": []}, "measure: it is []; write a table, [measure]"),
    ({"train": "all"}, "train: it is 'all'; write a table, [train]"),
    ({"models": {"path": "x"}}, "models: it is {'path': 'x'}; write tables, [[models]]"),
    ({"models": ["x"]}, "models: it is ['x']; write tables, [[models]]"),
    ({"conditions": {"perturbation": "DropTop"}}, "conditions: it is {'perturbation': 'DropTop'};"),
    # data
    ({"data": {"corpora": "x"}}, "data.corpora: no such key; choose one of corpus, documents, "),
    ({"data": {"corpus": 3}}, "data: corpus is 3; it must be a text"),
    ({"data": {"tokenizer": ""}}, "data: tokenizer is ''; it must be a text"),
    ({"data": {"split": "test"}}, "data: split is 'test'; choose one of 'train', 'validation'"),
    ({"data": {"length": 1}}, "data: length is 1; it must be at least 2"),
    ({"data": {"length": "long"}}, "data: length is 'long'; it must be a whole number"),
    ({"data": {"length": 64.0}}, "data: length is 64.0; it must be a whole number"),
    ({"data": {"length": True}}, "data: length is True; it must be a whole number"),
    ({"data": {"documents": 1}}, "data: documents is 1; it must be at least 2"),
    ({"data": {"documents": "all"}}, "data: documents is 'all'; it must be a whole number"),
    ({"data": {"max_tokens": 0}}, "data: max_tokens is 0; it must be at least 1"),
    ({"data": {"shard": 0.5}}, "data: shard is 0.5; it must be a whole number"),
    # measure
    ({"measure": {"batch_size": 0}}, "measure: batch_size is 0; it must be at least 1"),
    ({"measure": {"calibration": 2.5}}, "measure: calibration is 2.5; it must be a whole number"),
    ({"measure": {"tokens": 1}}, "measure: tokens is 1; it must be True or False"),
    ({"measure": {"threads": 0}}, "measure: threads is 0; it must be at least 1"),
    ({"measure": {"precision": "fp16"}}, "measure: precision is 'fp16'; choose one of 'fp32', 'bf"),
    # train
    ({"train": {"family": "x"}}, "train.family: no such key; choose one of accumulate, balance, "),
    ({"train": {"length": 3}}, "train.length: no such key"),
    ({"train": {"preset": "tiny"}}, "train.preset: preset is 'tiny'; choose one of 'micro', "),
    ({"train": {"families": ["moe"]}}, "train.families: family is 'moe'; choose one of 'dense', "),
    ({"train": {"families": "moe"}}, "train.families: family is 'moe'; choose one of 'dense', "),
    ({"train": {"families": []}}, "train.families: the list is empty"),
    ({"train": {"families": [["smoe"]]}}, "train.families: family is ['smoe']; choose one of"),
    ({"train": {"families": ["smoe", "smoe"]}}, "models: 'smoe' with seed 0 stands twice"),
    ({"train": {"seeds": []}}, "train.seeds: the list is empty"),
    ({"train": {"seeds": ["a"]}}, "train.seeds: seed is 'a'; it must be a whole number"),
    ({"train": {"seeds": [0, -1]}}, "train.seeds: seed is -1; it must be at least 0"),
    ({"train": {"seeds": [[0]]}}, "train.seeds: seed is [0]; it must be a whole number"),
    ({"train": {"steps": 0}}, "train: steps is 0; it must be at least 1"),
    ({"train": {"steps": "many"}}, "train: steps is 'many'; it must be"),
    ({"train": {"precision": "fp8"}}, "train: precision is 'fp8'; choose one of 'auto', "),
    ({"train": {"model": 3}}, "train.model: it is 3; write a table, [train.model]"),
    ({"train": {"model": {"width": 3}}}, "train.model: field of ModelConfig is 'width'; choose on"),
    ({"train": {"model": {"d_model": "x"}}}, "train.model: d_model is 'x'; it must be a whole num"),
    ({"train": {"model": {"top_p": "x"}}}, "train.model: "),
    ({"train": {"model": {"d_model": 30}}}, "train.model: d_model is 30; it must be a multiple of"),
    ({"train": {"variants": []}}, "train.variants: it is []; write a table, [train.variants]"),
    ({"train": {"variants": {"a": 3}}}, "train.variants.a: it is 3; write a table, ["),
    ({"train": {"variants": {"a": {"width": 3}}}}, "train.variants.a.width: no such key; choose o"),
    ({"train": {"variants": {"a": {"family": "x"}}}}, "train.variants.a: family is 'x'; choose"),
    ({"train": {"variants": {"a": {"family": []}}}}, "train.variants.a: "),
    ({"train": {"variants": {"smoe": {}}}}, "models: 'smoe' with seed 0 stands twice"),
    ({"train": {"variants": {"a": {"name": "x"}}}}, "train.variants.a.name: no such key; choose o"),
    *(
        ({"train": {"variants": {name: {}}}}, f"train.variants.{name}: {name!r} must be 1 to 100")
        for name in ("a/b", "..", "", " ", "x, y", "a\0b", "n" * 101, "all")
    ),
    # models
    ({"models": [{}]}, "models[0]: give one of path, hf"),
    ({"models": [{"path": ""}]}, "models[0].path: '' is no checkpoint or run directory"),
    ({"models": [{"path": "/none"}]}, "models[0].path: '/none' is no checkpoint or run directory"),
    ({"models": [{"path": 3}]}, "models[0].path: 3 is no checkpoint or run directory"),
    ({"models": [{"path": ".", "seed": 3}]}, "models[0].seed: no such key; choose one of hf"),
    ({"models": [{"path": ".", "name": 3}]}, "models[0]: name is 3; it must be a text"),
    ({"models": [{"path": ".", "train_seed": "a"}]}, "models[0]: train_seed is 'a'; it must be a "),
    ({"models": [{"path": "."}, {"path": "."}]}, "models: "),
    # conditions
    ({"conditions": [{}]}, "conditions[0].perturbation: perturbation is None; choose one of"),
    ({"conditions": [{"perturbation": "DropTpo"}]}, "conditions[0].perturbation: perturbation is "),
    ({"conditions": [{"perturbation": []}]}, "conditions[0].perturbation: the list is empty"),
    ({"conditions": [{"perturbation": {"a": 1}}]}, "conditions[0].perturbation: perturbation is {"),
    ({"conditions": [{"perturbation": "DropTop", "k": 1}]}, "conditions[0].k: no such key; choose"),
    ({"conditions": [{"perturbation": "DropTop", "m": []}]}, "conditions[0].m: the list is empty"),
    ({"conditions": [{"perturbation": "DropTop", "m": 1.5}]}, "conditions[0]: m is 1.5; it must b"),
    ({"conditions": [{"perturbation": "DropTop", "m": "1"}]}, "conditions[0]: m is '1'; it must b"),
    ({"conditions": [{"perturbation": "DropTop", "m": [[1]]}]}, "conditions[0]: m is [1]; it must"),
    ({"conditions": [{"perturbation": "DropTop", "ratio": 2}]}, "conditions[0]: ratio is 2; it mu"),
    ({"conditions": [{"perturbation": "DropTop", "m": [1, 2], "ratio": 0.5}]},
     "conditions[0]: m is 2 and ratio is 0.5; give one of them"),
    ({"conditions": [{"perturbation": "GaussianNoise", "sigma": math.nan}]},
     "conditions[0]: sigma is nan"),
    ({"conditions": [{"perturbation": ["DropTop", "NoRouted"], "m": 1}]},
     "conditions[0]: parameter of NoRouted is 'm'; choose one of"),
    ({"conditions": [{"perturbation": "DropTop", "where": "top", "m": [1, 2, 3]}]},
     "conditions[0]: where is 'top'; write 'all', 'layer 2'"),
    ({"conditions": [{"perturbation": "DropTop", "point": "logit"}]},
     "conditions[0]: point is 'logit'; choose one of 'logits', 'scores'"),
    ({"conditions": [{"perturbation": "DropTop", "effect": {"a": 1}}]}, "conditions[0]: "),
    ({"conditions": [{"perturbation": "DropTop", "eval_seed": -1}]},
     "conditions[0]: eval_seed is -1; it must be"),
    ({"conditions": [{"perturbation": "KeepRanks", "ranks": []}]}, "conditions[0]: ranks is []; "),
    ({"conditions": [{"perturbation": "KeepRanks", "ranks": 1}]}, "conditions[0]: ranks is 1; "),
    ({"conditions": [{"perturbation": "KeepRanks", "ranks": [[1], 2]}]}, "conditions[0]: ranks is"),
    ({"conditions": [{"perturbation": "Compose"}]}, "conditions[0]: Compose lacks parts"),
    ({"conditions": [{"perturbation": "Compose", "parts": [{"name": "DropTpo"}]}]},
     "conditions[0]: perturbation is 'DropTpo'; choose one of"),
    ({"conditions": [{"perturbation": "Compose", "parts": [{"name": "DropTop", "k": 1}]}]},
     "conditions[0]: parameter of DropTop is 'k'; choose one of 'm'"),
    ({"conditions": [{"perturbation": "ResidualNoise", "of": 3}]}, "conditions[0]: of is 3; it "),
    ({"conditions": [{"perturbation": "Compose", "parts": [{"name": "Replay", "trace": "/no"}]}]},
     "conditions[0]: trace is '/no', and there is no trace; give an analysis.Trace, or"),
    ({"conditions": [{"perturbation": "Replay"}]}, "conditions[0]: trace is "),
    ({"conditions": [{"perturbation": "Replay", "trace": "/none"}]},
     "conditions[0]: trace is '/none', and there is no trace; give an analysis.Trace, or"),
    ({"conditions": [{"perturbation": "GateSwap", "checkpoint": ["/none"]}]},
     "conditions[0]: checkpoint is '/none', and there is no whole one; give the path"),
    ({"conditions": [{"perturbation": "nowhere:Mine"}]},
     "conditions[0].perturbation: 'nowhere:Mine'"),
    ({"conditions": [{"perturbation": "os:path"}]}, "conditions[0].perturbation: 'os:path'"),
    # contrasts
    ({"contrasts": 3}, "contrasts: it is 3; write a table, [contrasts]"),
    ({"contrasts": {"against": "x"}, "conditions": [{"perturbation": "DropTop"}]},
     "contrasts.against: no such key; choose one of conditions, margin, reference"),
    ({"contrasts": {"reference": "moe"}, "conditions": [{"perturbation": "DropTop"}]},
     "contrasts.reference: reference is 'moe'; choose one of 'cartesian'"),
    ({"contrasts": {"reference": "cartesian", "conditions": ["DropTop(2)"]},
      "conditions": [{"perturbation": "DropTop", "where": "stage 0"}]},
     "contrasts.conditions: condition is 'DropTop(2)'; choose one of 'DropTop(1), stage 0'"),
    ({"contrasts": {"reference": "cartesian", "margin": -1}}, "contrasts: margin is -1; it must"),
    ({"contrasts": {"reference": "cartesian", "conditions": []}}, "contrasts: conditions is []; "),
]  # fmt: skip


@pytest.mark.parametrize(("table", "expected"), MISTAKES, ids=[str(table) for table, _ in MISTAKES])
def test_one_mistake(table, expected):
    """It is named once, and nothing else is."""
    (line,) = mistakes({"train": TRAIN} | table)
    assert line.startswith(expected)


def test_all_mistakes_at_once():
    table = {
        "extra": 1,
        "data": {"length": 0, "split": "test", "corpus": "nowhere", "tokenizer": "gone.json"},
        "measure": {"batch_size": "x"},
        "train": {
            "families": ["moe", "dense"],
            "seeds": ["a"],
            "steps": 0,
            "model": {"d_model": 0},
        },
        "models": [{"path": "/none"}],
        "conditions": [
            {"perturbation": "DropTpo"},
            {"perturbation": "DropTop", "m": [-1, -2], "where": "all"},
        ],
    }
    starts = [
        "extra: ",
        "data: split",
        "data: length",
        "measure: batch_size",
        "train.families: family is 'moe'",
        "train: steps",
        "train.seeds: seed is 'a'",
        "train.model: d_model",
        "models[0].path",
        "conditions[0].perturbation",
        "conditions[1]: m is -1",
        "conditions[1]: m is -2",
        "data.corpus: corpus is 'nowhere'",
        "data.tokenizer: tokenizer is 'gone.json'",
    ]
    lines = mistakes(table)
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_conditions_of_one_name_are_refused_before_they_are_measured(tmp_path):
    """Tables could not tell them apart; where they are for different models they can."""
    (tmp_path / "run").mkdir()
    model = {"path": str(tmp_path / "run"), "name": "a"}
    custom = {"perturbation": "Custom", "function": "torch:relu", "title": "mine"}
    table = {"models": [model], "conditions": [custom | {"version": [1, 2]}]}
    with pytest.raises(ValueError, match=r"conditions: 2 have one name in tables, 'mine'"):
        Study.from_dict(table)
    table["models"] = [model, model | {"name": "b"}]
    table["conditions"] = [
        custom | {"version": 1, "models": ["a"]},
        custom | {"version": 2, "models": ["b"]},
        {"perturbation": "GaussianNoise", "eval_seed": [0, 1]},
    ]
    assert len(Study.from_dict(table).conditions) == 4


def test_a_preset_has_its_recipe():
    """As on the command line; what the study says goes first."""
    (model,) = Study.from_dict({"train": {"preset": "micro", "families": ["dense"]}}).models
    assert (model.train.batch_size, model.train.learning_rate) == (16, 4e-3)
    own = {"preset": "micro", "families": ["dense"], "learning_rate": 1e-3}
    (model,) = Study.from_dict({"train": own}).models
    assert (model.train.batch_size, model.train.learning_rate) == (16, 1e-3)


def test_what_a_model_was_trained_on_is_not_measured(study_dict_of, checkpoint_of, tmp_path):
    """Also where the corpus is split at another place than when it was trained."""
    given = checkpoint_of("smoe")

    def groups(path):
        models = [{"path": str(path)}]
        data = {"documents": 2}
        study = Study.from_dict(study_dict_of(models=models, train=None, data=data))
        corpus, docs = documents_of(study)
        return {*corpus.split("validation").group}, docs.sha256

    held_out, digest = groups(given)
    moved = min(held_out)
    trained_on_more = tmp_path / "model"
    save(load(given), trained_on_more, {"tokenizer": "bytes", "groups": [moved]})
    others, other_digest = groups(trained_on_more)
    assert others == held_out - {moved}
    assert other_digest != digest
