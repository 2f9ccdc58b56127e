"""Two hundred studies with a mistake each, made from a good one by seeded draws: all are refused in
a line or a few that name file and key, before anything is computed."""

import random
import statistics
import time
from collections import Counter

from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.study.study import Study

from ..conftest import to_toml

NUMBER = 200
WRONG = ["many", -3, 2.5, True, [], {}, "", ["x"]]
# Section, key, and values that are wrong whatever else the study says.
VALUES = [
    ("data", "length", WRONG),
    ("data", "documents", WRONG),
    ("data", "shard", WRONG),
    ("data", "max_tokens", WRONG),
    ("data", "split", ["test", 3, "", []]),
    ("data", "corpus", ["/not/there", 3, "", []]),
    ("data", "tokenizer", ["/not/there.json", "bpe:3", "bpe:many", 3, ""]),
    ("measure", "batch_size", WRONG),
    ("measure", "calibration", WRONG),
    ("measure", "precision", ["fp8", 16, ""]),
    ("measure", "tokens", ["yes", 1, []]),
    ("measure", "threads", WRONG),
    ("train", "families", ["moe", [], ["dense", "moe"], 3]),
    ("train", "preset", ["tiny", 3, []]),
    ("train", "seeds", ["a", [], [0, -1], 1.5]),
    ("train", "steps", WRONG),
    ("train", "batch_size", WRONG),
    ("train", "learning_rate", ["fast", -1.0, 0]),
    ("train", "model", [3, {"width": 3}, {"d_model": 30}, {"num_layers": 0}]),
    ("contrasts", "reference", ["moe", 3, ""]),
    ("contrasts", "conditions", [["DropTop(9)"], [], 3]),
    ("contrasts", "margin", ["small", -0.1]),
]
CONDITIONS = [
    ("perturbation", ["DropTpo", 3, [], ["DropTop", "Drop"], "nowhere:Mine", "math:pi", ""]),
    ("m", [-1, "one", 1.5, [[1]], []]),
    ("where", ["top", "stage", "positions 4:2", "tokens digits", 3]),
    ("point", ["logit", 3]),
    ("effect", ["half", ["full", "half"]]),
    ("downstream", ["stop", 1]),
    ("eval_seed", [-1, "a", 0.5]),
]
NESTED = [
    {"perturbation": "Compose", "parts": [{"name": "DropTpo"}]},
    {"perturbation": "Compose", "parts": {"name": "DropTop"}},
    {"perturbation": "KeepRanks", "ranks": [0]},
    {"perturbation": "KeepRanks", "ranks": [[1], 2]},
    {"perturbation": "Replay", "trace": "/not/there"},
    {"perturbation": "GateSwap", "checkpoint": "/not/there"},
    {"perturbation": "ResidualNoise", "of": {"name": "ResidualNoise"}},
]
SECTIONS = ("data", "measure", "train", "models", "conditions", "contrasts")


def good(texts) -> dict:
    return {
        "name": "good",
        "data": {"corpus": str(texts), "length": 64, "documents": 4, "shard": 3},
        "train": {"families": ["smoe_share", "cartesian"], "steps": 2},
        "measure": {"batch_size": 2, "tokens": True, "threads": 1},
        "contrasts": {"reference": "cartesian", "conditions": ["DropTop(1)"]},
        "conditions": [{"perturbation": "DropTop", "m": [1, 2]}, {"perturbation": "Identity"}],
    }


def mutate(study: dict, draw: random.Random) -> tuple[str, str, str]:
    """(kind of mistake, the study's text with it, a word that the message must have)."""
    kind = draw.choice(
        ["key", "value", "value", "condition", "nested", "nesting", "model", "syntax", "empty"]
    )
    if kind == "key":
        section, key = draw.choice(SECTIONS[:3]), f"k{draw.randrange(1000)}"
        study[section][key] = draw.choice([1, "x", [1]])
        return kind, to_toml(study), f"{section}.{key}: no such key; choose one of"
    if kind == "value":
        section, key, values = draw.choice(VALUES)
        study[section][key] = draw.choice(values)
        return kind, to_toml(study), key.removesuffix("ies").removesuffix("s")
    if kind == "condition":
        key, wrong_ones = draw.choice(CONDITIONS)
        study["conditions"][0][key] = draw.choice(wrong_ones)
        return kind, to_toml(study), "conditions[0]"
    if kind == "nested":
        study["conditions"].append(draw.choice(NESTED))
        return kind, to_toml(study), "conditions[2]"
    if kind == "nesting":
        section = draw.choice(SECTIONS)
        others = to_toml({k: v for k, v in study.items() if k != section})
        wrong = draw.choice([f"{section} = 3\n", f'{section} = ["x"]\n', f'{section} = "x"\n'])
        return kind, wrong + others, section
    if kind == "model":
        study["models"] = [draw.choice([{}, {"path": "/not/there"}, {"path": 3}, {"name": "x"}])]
        return kind, to_toml(study), "models[0]"
    if kind == "empty":
        return kind, draw.choice(["", "\n\n", "# nothing\n", "\x00", 'name = "x"\n']), ""
    lines = to_toml(study).splitlines()
    wrong = draw.choice(
        ["[data", "x = ", "= 3", 'x = "', "a b = 3", "[[conditions]", "{", "x = [1"]
    )
    lines.insert(draw.randrange(len(lines) + 1), wrong)
    return kind, "\n".join(lines), "not TOML"


def test_all_are_refused(tmp_path, texts, environment, capsys):
    assert Study.from_dict(good(texts)).models
    seconds, kinds = [], Counter()
    for number in range(NUMBER):
        kind, text, word = mutate(good(texts), random.Random(number))
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        start = time.perf_counter()
        result = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "out")])
        seconds.append(time.perf_counter() - start)
        kinds[kind] += 1
        assert result.exit_code == 2, (text, result.output)
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert lines[0].startswith(f"error: {path}: "), (text, result.stderr)
        assert "Traceback" not in result.stderr
        assert len(lines) <= 6, (text, result.stderr)
        assert word in result.stderr, (text, result.stderr)
    assert not (tmp_path / "out").exists()
    assert len(kinds) == 8
    with capsys.disabled():
        print(
            f"\n{NUMBER} malformed studies, {dict(kinds)}: all refused, median "
            f"{statistics.median(seconds):.4f} s, at most {max(seconds):.4f} s"
        )
