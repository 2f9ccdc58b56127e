"""The main study from nothing, scratch.toml, made so small that it takes seconds; a corpus of its
size."""

import random
import re
from pathlib import Path

STUDY = Path(__file__).parents[1] / "studies" / "scratch.toml"
# Of [data], [train] and [measure].
SMALL = dict(length=64, documents=6, max_tokens=128, shard=8, steps=3, batch_size=4, calibration=4)
MODEL = dict(d_model=32, ffn_width=64, num_layers=2, num_heads=2)


def tiny_study(**changes) -> str:
    """scratch.toml with its conditions, and the values of `SMALL` and `changes` for its own."""
    text = STUDY.read_text()
    for key, value in (SMALL | changes).items():
        value = f'"{value}"' if isinstance(value, str | Path) else str(value).replace("'", '"')
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert count, f"scratch.toml has no {key}"
    model = "\n".join(f"{key} = {value}" for key, value in MODEL.items())
    return text.replace("[measure]", f"[train.model]\n{model}\n\n[measure]")


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """Documents of words of their own in two domains."""
    for i in range(documents):
        rng = random.Random(i)
        words = [f"{rng.choice('bcdfgklm')}{rng.choice('aeiou')}n" for _ in range(9)]
        path = folder / "xy"[i % 2] / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choice(words) for _ in range(60)))
    return folder
