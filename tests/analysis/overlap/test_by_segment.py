"""Overlap of models of which a layer's weights are in memory at a time: the same tables."""

import pandas as pd
import pytest

import analysis as an
from analysis.measure.bookmarks import Bookmarks
from cartmoe.tokenizers import ByteTokenizer
from tests.analysis.adapters.families import save_directory
from tests.analysis.adapters.test_streamed import documents

QUIET = dict(progress=False, batch_size=2, minibatch=8)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def build(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("overlap") / family
            save_directory(made[family], family)
        return made[family]

    return build


def both(folder):
    tokenizer = ByteTokenizer()
    return an.load(folder, tokenizer=tokenizer), an.load(folder, tokenizer=tokenizer, stream=True)


def check_same(found, expected):
    for name, rows in expected.tables.items():
        pd.testing.assert_frame_equal(found.tables[name], rows, check_exact=True)


FAMILIES = ["deepseek_v3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("olmoe", "gpt_oss"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tables_in_one_pass(family, folder_of):
    whole, streamed = both(folder_of(family))
    expected = an.measure_overlap(whole, documents(), **QUIET)
    before = streamed.shelf.reads
    found = an.measure_overlap(streamed, documents(), **QUIET)
    check_same(found, expected)
    assert streamed.shelf.reads - before <= len(streamed.shelf.layers)
    assert set(found.sites.metric) | set(found.pairs.metric) > {"cka", "lift", "router_cosine"}


def test_some_sites_and_metrics(folder_of):
    whole, streamed = both(folder_of("olmoe"))
    for args in ((["lift", "transition"], "layer 1"), (["flat_cosine", "router_cosine"], None)):
        found, expected = (
            an.measure_overlap(m, documents(), *args, **QUIET) for m in (streamed, whole)
        )
        check_same(found, expected)


def test_it_goes_on_behind_the_last_layer(folder_of, tmp_path, monkeypatch):
    whole, _ = both(folder_of("olmoe"))
    expected = an.measure_overlap(whole, documents(), ["cka", "lift", "transition"], **QUIET)
    own = Bookmarks.write

    def stopping(self, *args):
        own(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Bookmarks, "write", stopping)
    for _ in range(20):
        _, streamed = both(folder_of("olmoe"))
        before = streamed.shelf.reads
        try:
            found = an.measure_overlap(
                streamed, documents(), ["cka", "lift", "transition"], streams=tmp_path, **QUIET
            )
            break
        except KeyboardInterrupt:
            assert streamed.shelf.reads - before <= 2
    check_same(found, expected)
    assert not [*tmp_path.glob("*/*")]


def test_what_needs_a_gradient(folder_of):
    _, streamed = both(folder_of("olmoe"))
    for name in ("substitution", "removal_linear"):
        with pytest.raises(ValueError, match=f"metric '{name}' needs gradients.*load it whole"):
            an.measure_overlap(streamed, documents(), name, **QUIET)
    with pytest.raises(ValueError, match="'substitution' needs gradients"):
        an.substitution(streamed, documents(), streamed.sites()[0], progress=False)
