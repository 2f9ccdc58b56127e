"""The corpus with a known answer: its law, its truth, its name, its way into everything else."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import analysis as an
from analysis.study.specs import Data
from analysis.study.study import Study
from cartmoe import load
from cartmoe.__main__ import app
from cartmoe.checkpoint import newest, read_meta
from cartmoe.corpora import check_options, is_built_in, open_source, read_corpus
from cartmoe.data import prepare
from cartmoe.factorial import HASH_BITS, SYMBOLS, Factorial
from cartmoe.train import train

SMALL = "factorial:documents=48,length=300,topics=2,styles=3"


def centred(log_odds_ZHA):
    """(Z, H * A): of each context less their mean, since only differences are seen in text."""
    rows = log_odds_ZHA - log_odds_ZHA.mean(-1, keepdims=True)
    return rows.reshape(len(rows), -1)


class TestTruth:
    @pytest.mark.parametrize("shares", [(0.25,) * 4, (0.9, 0.1, 0, 0), (0, 0, 0.5, 0.5)])
    def test_is_written_out(self, shares):
        names = ("common", "topic", "style", "pair")
        corpus = Factorial(topics=2, styles=3, **dict(zip(names, shares, strict=True)))
        common, topic, style, pair = shares
        for a, (i, j) in enumerate((i, j) for i in range(2) for j in range(3)):
            assert corpus.domains[a] == f"topic{i} style{j}"
            for b, (k, m) in enumerate((k, m) for k in range(2) for m in range(3)):
                shared = common + (topic if i == k else 0) + (style if j == m else 0)
                shared += pair if (i, j) == (k, m) else 0
                assert corpus.truth()[a, b] == pytest.approx(shared)

    @pytest.mark.parametrize(
        "shares",
        [
            {},
            dict(common=0.6, topic=0.4, style=0.0, pair=0.0),
            dict(common=0.0, topic=0.0, style=0.0, pair=1.0),
            dict(common=0.1, topic=0.2, style=0.3, pair=0.4),
        ],
    )
    def test_is_the_correlation_of_log_odds(self, shares):
        """Within sampling error: 1024 x 31 numbers a domain, so 0.006 a correlation; those of one
        component are shared by many pairs."""
        corpus = Factorial(context=2, **shares)
        found = np.corrcoef(centred(corpus.log_odds()))
        np.testing.assert_allclose(found, corpus.truth(), atol=0.025)

    def test_scale_is_the_deviation_of_log_odds_at_every_share(self):
        for common in (0.0, 0.5, 1.0):
            corpus = Factorial(common=common, topic=1 - common, style=0, pair=0, scale=3, context=2)
            assert corpus.log_odds().std() == pytest.approx(3, rel=0.02)

    def test_shares_mix_the_same_tables(self):
        alone = {
            name: Factorial(**(dict.fromkeys(("common", "topic", "style", "pair"), 0) | {name: 1}))
            for name in ("common", "topic", "style", "pair")
        }
        shares = dict(common=0.1, topic=0.2, style=0.3, pair=0.4)
        mixed = sum(math.sqrt(shares[name]) * alone[name].log_odds() for name in shares)
        np.testing.assert_allclose(Factorial(**shares).log_odds(), mixed, atol=1e-12)
        assert np.ptp(alone["common"].log_odds(), axis=0).max() == 0  # one for all domains
        by_pair = alone["style"].log_odds().reshape(4, 4, -1)
        assert (by_pair == by_pair[:1]).all()
        assert (by_pair[:, 0] != by_pair[:, 1]).all()


class TestText:
    @pytest.mark.parametrize("context", [0, 1, 2])
    def test_follows_the_tables(self, context):
        """Counts of what follows each context against the probabilities, as a chi-square."""
        corpus = Factorial(
            2, 1, alphabet=5, context=context, documents=200, length=2000, scale=1.0, seed=3
        )
        counts = Counter()
        for domain, text in corpus.texts():
            for at in range(context, len(text)):
                counts[domain, text[at - context : at], text[at]] += 1
        log_odds = corpus.log_odds()
        p = np.exp(log_odds) / np.exp(log_odds).sum(-1, keepdims=True)
        seen = np.zeros_like(p)
        for (domain, before, after), count in counts.items():
            row = sum(SYMBOLS.index(c) * 5**n for n, c in enumerate(reversed(before)))
            seen[corpus.domains.index(domain), row, SYMBOLS.index(after)] = count
        expected = seen.sum(-1, keepdims=True) * p
        chi2, freedom = ((seen - expected) ** 2 / expected).sum(), 4 * p[..., 0].size
        assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)
        # And the log-odds themselves, in standard errors: log of a count n has variance 1 / n.
        variance = (1 - 2 / 5) / seen + (1 / seen).sum(-1, keepdims=True) / 25
        error = (centred(np.log(seen)) - centred(log_odds)) / np.sqrt(variance.reshape(2, -1))
        assert np.abs(error).max() < 4.5
        wrong = seen[::-1].sum(-1, keepdims=True) * p  # of the other domain: the test can fail
        assert ((seen[::-1] - wrong) ** 2 / wrong).sum() > 10 * freedom

    def test_long_contexts_share_rows(self):
        corpus = Factorial(context=3)
        assert corpus.log_odds().shape == (16, 2**HASH_BITS, 32)
        rows = corpus.rows(np.arange(32**3))
        counts = np.bincount(rows, minlength=2**HASH_BITS)
        assert len(counts) == 2**HASH_BITS
        assert counts.min() >= 30  # of 32 on average
        assert counts.max() <= 34
        assert len(next(corpus.texts())[1]) == 1000

    def test_is_the_same_every_time_and_another_for_another_seed(self):
        corpus = Factorial(documents=20, length=50)
        assert list(corpus.texts()) == list(corpus.texts())
        other = dataclasses.replace(corpus, seed=1)
        assert not {t for _, t in corpus.texts()} & {t for _, t in other.texts()}

    def test_domains_take_turns_also_where_the_last_round_is_not_full(self):
        corpus = Factorial(topics=3, styles=1, documents=7, length=11, alphabet=94, context=8)
        found = list(corpus.texts())
        assert [d for d, _ in found] == [f"topic{i} style0" for i in (0, 1, 2, 0, 1, 2, 0)]
        assert {len(text) for _, text in found} == {11}
        assert {text.encode().isascii() and text.isprintable() for _, text in found} == {True}

    def test_symbols_are_a_byte_each(self):
        assert len(set(SYMBOLS)) == len(SYMBOLS.encode()) == 94
        assert not any(c.isspace() for c in SYMBOLS)


class TestName:
    def test_of_defaults(self):
        assert Factorial.parse("") == Factorial()
        assert Factorial().name == "factorial"
        assert open_source("factorial").fingerprint == Factorial().fingerprint

    def test_round_trip(self):
        third = (1 - 0.9) / 3
        corpus = Factorial(common=0.9, topic=third, style=third, pair=third, seed=4, alphabet=7)
        head, _, options = corpus.name.partition(":")
        assert head == "factorial"
        assert Factorial.parse(options) == corpus
        assert Factorial.parse(" topic = 0.4, style=0.1 ,").topic == 0.4

    def test_every_parameter_is_in_the_fingerprint(self):
        base = Factorial(common=0.4, topic=0.3, style=0.2, pair=0.1)
        changes = [dict(common=0.3, topic=0.4), dict(style=0.1, pair=0.2)]
        changes += [dict(topic=0.2, style=0.3)]
        for field in ("topics", "styles", "documents", "length", "alphabet", "context", "seed"):
            changes.append({field: getattr(base, field) + 1})
        changes.append(dict(scale=2.5))
        found = {dataclasses.replace(base, **change).fingerprint for change in changes}
        assert len(found | {base.fingerprint}) == len(changes) + 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("topic=0.5", r"common=0.25, topic=0.5, .*sum to 1, and sum to 1.25"),
            ("topic=-0.5,common=1", "topic is -0.5; it must be at least 0"),
            ("topic=nan", "topic is nan; it must be at least 0"),
            ("scale=inf", "scale is inf; it must be a finite number"),
            ("topic=much", "topic is 'much'; it must be a finite number"),
            ("seed=1.5", "seed is '1.5'; it must be a whole number"),
            ("alphabet=95", "alphabet is 95; it must be at most 94"),
            ("alphabet=1", "alphabet is 1; it must be at least 2"),
            ("context=9", "context is 9; it must be at most 8"),
            ("topics=0", "topics is 0; it must be at least 1"),
            ("sharing=1", "field of corpus 'factorial' is 'sharing'; choose one of 'topics', "),
            ("0.4", "has the option '0.4'; write field=value, with a field of topics, styles, "),
            ("seed=1,seed=2", "two values of seed"),
        ],
    )
    def test_what_is_wrong_is_named_wherever_it_stands(self, options, message):
        for read in (open_source, read_corpus, prepare, an.documents, check_options):
            with pytest.raises(ValueError, match=message):
                read(f"factorial:{options}")
        with pytest.raises(ValueError, match=message):
            Data(corpus=f"factorial:{options}")

    def test_other_corpora_have_no_options(self):
        with pytest.raises(ValueError, match=r"corpus is 'stdlib:fast'; 'stdlib' has no options"):
            open_source("stdlib:fast")
        with pytest.raises(FileNotFoundError, match=r"'nowhere:topic=1'.*'factorial'"):
            open_source("nowhere:topic=1")
        assert is_built_in("factorial:topic=1")
        assert not is_built_in(Path("factorial"))
        check_options("no/such:path")  # that is found out where it is read


class TestUse:
    def test_prepared(self, token_cache):
        corpus = prepare(SMALL)
        assert len(corpus.documents) == 48  # none is a near-duplicate
        assert set(corpus.documents.domain) == set(Factorial.parse(SMALL[10:]).domains)
        assert corpus.documents.split.value_counts()["train"] > 30
        # A character is a token, and a document begins with another.
        assert set(corpus.documents.end - corpus.documents.start) == {301}
        assert prepare(f"{SMALL},seed=1").sha256 != corpus.sha256
        assert prepare(SMALL).sha256 == corpus.sha256

    def test_trained_on_and_measured(self, tmp_path, tiny_run):
        model_config, config = tiny_run(corpus=SMALL, steps=2)
        train(model_config, config, tmp_path / "run")
        folder = newest(tmp_path / "run")
        assert read_meta(folder)["corpus"] == SMALL
        assert load(folder).config == model_config
        model = an.load(tmp_path / "run")
        docs = an.documents(SMALL, model, length=32, limit=6)
        # Whole groups, those that the model has not seen.
        held_out = prepare(SMALL).split("validation")
        assert set(docs.document_id) <= set(held_out.document_id)
        assert set(docs.domain) <= set(Factorial.parse(SMALL[10:]).domains)
        results = an.sweep(model, docs, an.DropTop(1), controls=False, progress=False)
        assert np.isfinite(results.damage(full=True).delta_nats).all()

    def test_on_the_command_line(self, tmp_path, token_cache):
        words = f"train --corpus {SMALL} --steps 1 --batch-size 2 --length 16".split()
        for setting in ("d_model=32", "ffn_width=64", "num_layers=1", "num_heads=2"):
            words += ["--set", setting]
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")])
        assert result.exit_code == 0, result.stderr
        words[2] = "factorial:colour=1"
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "other")])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: field of corpus 'factorial' is 'colour'")

    def test_in_a_study(self, tmp_path):
        study = {
            "data": {"corpus": SMALL},
            "train": {"families": ["cartesian"], "steps": 1},
            "conditions": [{"perturbation": "DropTop", "m": 1}],
        }
        assert Study.from_dict(study).models[0].train.corpus == SMALL
        study["data"]["corpus"] += ",seed=none"
        with pytest.raises(ValueError, match=r"data: seed is 'none'; it must be a whole number"):
            Study.from_dict(study)
