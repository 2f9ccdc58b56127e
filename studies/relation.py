"""Does overlap say what dropping an expert costs? `make overlap`, or python studies/relation.py

Reads the trained models that come with the project, writes tables into runs/relation and those of
the README's pictures that show them.
"""

from pathlib import Path

import matplotlib.pyplot as plt

import analysis as an

HERE = Path(__file__).parents[1]
OUT = HERE / "runs" / "relation"


def main() -> None:
    routed = an.models().query("family != 'dense'")
    models = [an.load(name) for name in routed.name]
    docs = an.documents("stdlib", models[0], length=256, limit=96, max_tokens_per_document=256)
    found = an.relate(models, docs, batch_size=8)
    OUT.mkdir(parents=True, exist_ok=True)
    found.experts.to_csv(OUT / "experts.csv", index=False)
    found.takeover.to_csv(OUT / "takeover.csv", index=False)
    found.overlap.pairs.to_csv(OUT / "pairs.csv", index=False)
    for damage in ("per_mass", "damage"):
        table = found.table(damage)
        table.to_csv(OUT / f"{damage}.csv", index=False)
        print(table[table.model == "all"].round(3).to_string(index=False))
        draw(f"relation_{damage}", an.plots.relation_dots(table))
    draw("damage_overlap", an.plots.damage_against_overlap(found.experts, "token_js"))


def draw(name: str, drawing) -> None:
    """Into the folder of tables, and the README's gallery."""
    an.plots.save(drawing, OUT / name)
    figure = getattr(drawing, "figure", drawing)
    with an.plots.paper_style():
        figure.savefig(HERE / "gallery" / f"{name}.png", dpi=200)
    plt.close(figure)


if __name__ == "__main__":
    main()
