"""Tables that pictures are drawn from, and the pictures of overlap by name."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis import plots

from .overlaps import DOMAINS, FAMILIES, SHARES, SIMILAR, E, draws, pairs, site, stages_of


@pytest.fixture(scope="package")
def overlap():
    """Three models of two layers: "cka", "lift", "transition", composites and domains."""
    tables = []
    for k, family in enumerate(FAMILIES):
        n = E + (family == "smoe_share")
        for layer in (1, 3):
            for stage in stages_of(family):
                where = site(family, layer, stage)
                del where["family"]
                cka = draws((k, layer, stage), n)
                tables.append(pairs(cka, shared=n > E, **where))
                lift = np.exp(4 * draws((9, k, layer, stage)) - 2)
                lift[2, 5] = 0
                tables.append(pairs(lift, "lift", null=1.0, **where))
                if (layer, stage) != (1, 0):
                    usage = draws((8, k, layer, stage))
                    tables.append(pairs(usage, "transition", 1 / E, diagonal=True, **where))
    sites = [
        site("cartesian", layer)
        | dict(metric=f"composite_{name}", value=value, low=value - 0.05, high=value + 0.05)
        | dict(null=np.nan if name == "cka_unrelated" else value / 2)
        for layer in (1, 3)
        for name, value in (SHARES | SIMILAR).items()
    ]
    load_E = np.random.default_rng(5).dirichlet(np.full(E, 3.0))
    experts = [
        site(family, 1) | dict(metric="domain_specialization", expert=e, domain=domain)
        | dict(value=load_E[e] * 2.0 ** ((e + d) % 4 - 1), low=0.0, high=1.0, null=load_E[e])
        for family in FAMILIES for e in range(E) for d, domain in enumerate(DOMAINS)
    ]  # fmt: skip
    return SimpleNamespace(
        pairs=pd.concat(tables, ignore_index=True),
        sites=pd.DataFrame(sites),
        experts=pd.DataFrame(experts),
    )


@pytest.fixture(scope="package")
def experts():
    """The experts' table of a relation."""
    rng = np.random.default_rng(3)
    rows = []
    for family in FAMILIES:
        for layer in (1, 3):
            own = pd.DataFrame(site(family, layer) | dict(expert=range(E)))
            cka = rng.uniform(0, 0.8, E)
            own = own.assign(load=rng.dirichlet(np.full(E, 3.0)), mass=0.1, cka=cka)
            rows.append(own.assign(token_js=-cka, per_mass=0.6 - cka, damage=0.1 - cka / 10))
    return pd.concat(rows, ignore_index=True).assign(per_mass_a=0.0, damage_low=0.0)


@pytest.fixture(scope="package")
def correlations():
    """The table of a relation."""
    rng = np.random.default_rng(4)
    rows = [
        dict(
            metric=metric,
            damage="per_mass",
            model=family,
            family=family,
            r=r,
            low=r - 0.1,
            high=r + 0.1,
        )
        | dict(null_low=-0.2, null_high=0.25, ceiling=0.85)
        for family in ("smoe", "all", "cartesian")
        for metric, r in zip(("cka", "token_js", "load"), rng.uniform(-0.6, 0.6, 3), strict=True)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="package")
def substitution():
    """As `analysis.substitute.substitution` gives it, of two sites."""
    tables = []
    for layer in (1, 3):
        rows = pairs(draws((7, layer)) - 0.3, "substitution", layer=layer)
        rows = rows.rename(columns={"value": "linear"}).drop(columns=["null", "metric"])
        chosen = np.array(["", "lowest", "random"])[np.arange(len(rows)) % 3]
        measured = np.where(chosen == "", np.nan, 1.1 * rows.linear)
        rows = rows.assign(chosen=chosen, measured=measured, probability=0.5, downstream="reroute")
        tables.append(rows.assign(low=rows.measured - 0.1, high=rows.measured + 0.1))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="package")
def saturation():
    steps = np.array([100, 200, 300])
    tables = []
    for family in ("smoe", "cartesian"):
        for layer in (1, 3):
            for stage in stages_of(family):
                value = 0.4 + 0.05 * layer + 0.0005 * steps + 0.02 * stage
                frame = pd.DataFrame(site(family, layer, stage) | dict(step=steps, value=value))
                tables.append(frame.assign(low=value - 0.03, high=value + 0.03, null=0.15))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture
def pictures(overlap, experts, correlations, substitution, saturation):
    """name -> what draws it."""
    place = dict(layer=1, stage=0)
    return {
        "heatmap": lambda: plots.overlap_heatmap(overlap, "cka", model="smoe_share"),
        "clustered": lambda: plots.overlap_heatmap(overlap, "lift", model="smoe", clustered=True),
        "single": lambda: plots.overlap_heatmap(overlap, "cka", model="smoe", null=False),
        "damage": lambda: plots.damage_against_overlap(experts, "cka"),
        "turned": lambda: plots.damage_against_overlap(experts, "token_js", "damage"),
        "relation": lambda: plots.relation_dots(correlations),
        "substitution": lambda: plots.substitution_matrix(substitution, **place),
        "usage": lambda: plots.cartesian_usage(overlap, layer=3, model="cartesian"),
        "domains": lambda: plots.specialization(overlap, **place, model="smoe"),
        "saturation": lambda: plots.saturation_curve(saturation),
        "profile": lambda: plots.overlap_profile(overlap, "cka"),
        "profile of sites": lambda: plots.overlap_profile(overlap, "composite_a"),
    }
