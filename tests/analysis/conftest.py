"""What the tests of the engine share: models of every kind, sequences, studies of a second."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from analysis.adapters.base import as_adapter
from analysis.measure.calibrate import calibrate
from analysis.perturb.context import RouterContext, Tokens
from analysis.perturb.noise import Noise
from cartmoe import LanguageModel, ModelConfig
from cartmoe.checkpoint import save
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite

KINDS: dict[str, dict[str, Any]] = {
    "smoe": dict(family="smoe"),
    "smoe_share": dict(family="smoe_share"),
    "hash": dict(family="hash"),
    "fine_grained": dict(family="fine_grained", num_experts=8),
    "top_p": dict(family="top_p"),
    "cartesian": dict(family="cartesian"),
    "parallel": dict(family="cartesian", composition="parallel"),
    "sigmoid": dict(family="smoe_share", score="sigmoid"),
    "top1": dict(family="smoe_share", top_k=1),
    "raw": dict(family="smoe", renormalize=False),
}
LENGTHS = [8, 8, 5, 8, 3, 8, 1]  # tokens of each sequence; the rest is padding
LENGTH = max(LENGTHS)

WORDS = ["expert", "router", "token", "mass", "share", "column", "stage", "layer", "choice"]
STUDY = {
    "name": "tiny",
    "data": {"length": 64, "documents": 4, "max_tokens": 128, "shard": 3},
    "train": {
        "families": ["dense", "smoe_share", "cartesian"],
        "steps": 3,
        "batch_size": 2,
        "precision": "fp32",
        "model": {"d_model": 32, "ffn_width": 64, "num_layers": 2, "num_heads": 2},
    },
    "measure": {"batch_size": 2, "calibration": 2},
    "conditions": [
        {"perturbation": "DropTop", "m": [1, 2]},
        {"perturbation": "DropTop", "where": "stage 1", "point": "scores"},
        {"perturbation": "GaussianNoise", "sigma": [0.5, 2.0]},
        {"perturbation": ["Identity", "DropChosen", "DropUnchosen", "RandomRouting", "NoRouted"]},
    ],
}


GOLDENS = sorted((Path(__file__).parents[1] / "goldens").glob("*.safetensors"))


@pytest.fixture(
    params=[g for g in GOLDENS if g.stem not in ("dense", "hash")], ids=lambda g: g.stem
)
def golden(request):
    """(the authors' weights, their configuration, inputs and outputs of their code)."""
    with safe_open(request.param, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("w."): tensors.pop(k) for k in list(tensors) if k.startswith("w.")}
    return weights, config, tensors


@pytest.fixture(scope="session")
def model_of(tiny_model):
    """model_of(kind) -> a model under study of one of `KINDS`, or "dense"."""

    @functools.cache  # tests leave models as they find them
    def build(kind: str):
        options: dict[str, Any] = KINDS.get(kind, {"family": kind}).copy()
        model = tiny_model(options.pop("family"), **options)
        if kind == "sigmoid":
            for stage in model.modules():
                if hasattr(stage, "selection_bias_E"):
                    stage.selection_bias_E.uniform_(-0.3, 0.3)
        return as_adapter(model)

    return build


@pytest.fixture(scope="session")
def shard() -> Sequences:
    """Seven sequences of four documents, some padded."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(1, 13, (len(LENGTHS), LENGTH + 1), generator=generator)
    padding = torch.arange(LENGTH) >= torch.tensor(LENGTHS)[:, None]
    return Sequences(
        rows[:, :-1].masked_fill(padding, 0),
        rows[:, 1:].masked_fill(padding, IGNORE),
        torch.tensor([11, 5, 2**62, 7, 1, 99, 1234567]),
        ["a", "a", "a", "b", "b", "c", "d"],
        ["x", "x", "x", "y", "y", "x", "y"],
        torch.tensor(LENGTHS) * 2,
    )


@pytest.fixture
def rows_of():
    """rows_of(sequences, order) -> those rows in that order."""
    return lambda s, order: Sequences(
        s.tokens_SL[order],
        s.targets_SL[order],
        s.sequence_id_S[order],
        [s.document_id[i] for i in order],
        [s.domain[i] for i in order],
        s.num_bytes_S[order],
    )


@pytest.fixture
def context_of():
    """context_of(router, logits, seed=0) -> (its decision, a context for it)."""

    def build(router, logits_TE, seed=0, stats=None):
        T, E = logits_TE.shape
        tokens = Tokens.of(torch.zeros(1, T, dtype=torch.int64), torch.tensor([3]))
        site = RouterSite("router", 0, 0, E, router.top_k)
        clean = router.route(logits_TE)
        noise = Noise(seed, (0, 0), tokens.sequence_T, tokens.position_T, {})
        return clean, RouterContext(site, clean, None, tokens, noise, stats)

    return build


@pytest.fixture(scope="session")
def calibration_of(shard):
    """calibration_of(model) -> statistics over the shard."""
    return functools.cache(lambda model: calibrate(model, shard, rows=20))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of forty documents of different words, about four of them for validation."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        draw = random.Random(i)
        own = [f"{draw.choice(WORDS)}{i}{draw.choice('abcdef')}" for _ in range(20)]
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(own) for _ in range(60)))
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """One thread and a cache of tokens of its own, in this process and its children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COLUMNS", "200")  # help texts are not wrapped
        yield


@pytest.fixture(scope="session")
def study_dict_of(texts, environment):
    """study_dict_of(section={changes}, ...) -> `STUDY` with changes; None removes a section."""

    def build(**changes):
        study = json.loads(json.dumps(STUDY))
        study["data"]["corpus"] = str(texts)
        for name, change in changes.items():
            if change is None:
                study.pop(name, None)
            elif isinstance(change, dict):
                study[name] = study.get(name, {}) | change
            else:
                study[name] = change
        return study

    return build


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory, environment):
    """checkpoint_of(family, **changes) -> a folder of a model that was never trained."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def build(family, tokenizer="bytes", **changes):
        torch.manual_seed(1)
        shape = dict(d_model=32, ffn_width=64, num_layers=2, num_heads=2, init_std=0.2)
        model = LanguageModel(ModelConfig.preset("nano", family, **shape | changes))
        path = folder / f"{family}-{len(list(folder.iterdir()))}"
        save(model, path, {"tokenizer": tokenizer, "train_seed": 5})
        return path

    return build


def to_toml(study: dict) -> str:
    """The study as TOML: its sections are tables and arrays of tables."""

    def inline(value):
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k} = {inline(v)}' for k, v in value.items())}}}"
        if isinstance(value, list):
            return f"[{', '.join(map(inline, value))}]"
        return json.dumps(value)

    def pairs(table, name):
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        lines = [f"{k} = {inline(v)}" for k, v in plain.items()]
        for key in table.keys() - plain.keys():
            lines += [f"[{name}.{key}]", *pairs(table[key], f"{name}.{key}")]
        return lines

    lines = [f"{k} = {json.dumps(v)}" for k, v in study.items() if isinstance(v, str | int)]
    for name, value in study.items():
        if isinstance(value, dict):
            lines += [f"[{name}]", *pairs(value, name)]
        elif isinstance(value, list):
            for table in value:
                lines += [f"[[{name}]]", *pairs(table, name)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def write_study(study_dict_of):
    """write_study(path, **changes) -> the path of that study's TOML."""

    def write(path, **changes):
        path.write_text(to_toml(study_dict_of(**changes)))
        return path

    return write
