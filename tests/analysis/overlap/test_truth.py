"""Overlap held against the known answer: scores of planted tables, routers that know a factor."""

import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from analysis.overlap.tables import Overlap
from analysis.overlap.truth import _score, factor_information, profiles, shared_truth, truth_scores
from analysis.stats import Bootstrap
from cartmoe.data import IGNORE, Sequences
from cartmoe.factorial import Factorial
from cartmoe.hooks import capture_routing

CORPUS = Factorial(topics=2, styles=3, common=0.4, topic=0.3, style=0.2, pair=0.1)
SITE = dict(model="m", family="cartesian", train_seed=3, layer=0, stage=1)
REST = dict(low=np.nan, high=np.nan, null=0.0, unit="batch of documents", num_units=4)


def table_of(use_EZ, domains=CORPUS.domains, **pairs):
    """The tables of one site: what share of each domain goes to each expert, and (E, E) metrics."""
    experts = [
        SITE | dict(metric="domain_specialization", expert=e, value=v, domain=domains[z]) | REST
        for (e, z), v in np.ndenumerate(use_EZ)
    ]
    rows = [
        SITE | dict(metric=name, expert_i=i, expert_j=j, value=v) | REST
        for name, value_EE in pairs.items()
        for (i, j), v in np.ndenumerate(value_EE)
        if i != j
    ]
    columns = [*SITE, "metric", "expert_i", "expert_j", "value", *REST]
    empty = pd.DataFrame(columns=[*SITE, "metric", "value", *REST])
    return Overlap(pd.DataFrame(experts), empty, pd.DataFrame(rows, columns=columns))


def some_use(experts=8, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(experts, 0.5), len(CORPUS.domains)).T


def expected_truth(use_EZ):
    """By summing over pairs of domains."""
    truth = np.zeros((len(use_EZ), len(use_EZ)))
    for i, j in np.ndindex(*truth.shape):
        p, q = use_EZ[i] / use_EZ[i].sum(), use_EZ[j] / use_EZ[j].sum()
        for (a, (t, s)), (b, (u, v)) in itertools.product(
            enumerate(itertools.product(range(2), range(3))), repeat=2
        ):
            shared = 0.4 + 0.3 * (t == u) + 0.2 * (s == v) + 0.1 * (a == b)
            truth[i, j] += p[a] * q[b] * shared
    return truth


def scored(overlap, **options):
    return truth_scores(overlap, CORPUS, **(dict(resamples=199) | options)).set_index("metric")


class TestProfiles:
    def test_by_hand(self):
        use = np.array([[0.5, 0, 0, 0, 0, 0], [0.5, 1, 0.5, 0, 0, 0], [0, 0, 0.5, 1, 1, 1]])
        ((key, found),) = profiles(table_of(use)).items()
        assert key == ("m", 3, 0, 1)
        assert list(found.columns) == CORPUS.domains
        expected = [[1, 0, 0, 0, 0, 0], [0.25, 0.5, 0.25, 0, 0, 0], [0, 0, 1 / 7] + [2 / 7] * 3]
        np.testing.assert_allclose(found, expected)

    def test_an_expert_without_tokens_has_none(self):
        use = some_use()
        use[5] = 0
        found = profiles(table_of(use))["m", 3, 0, 1]
        assert found.index[found.isna().any(axis=1)].tolist() == [5]
        assert 5 not in shared_truth(found, CORPUS).index

    def test_shared_truth(self):
        use = some_use()
        found = shared_truth(profiles(table_of(use))["m", 3, 0, 1], CORPUS)
        np.testing.assert_allclose(found, expected_truth(use), atol=1e-11)
        # An expert a domain: the corpus' own truth.
        found = shared_truth(profiles(table_of(np.eye(6)))["m", 3, 0, 1], CORPUS)
        np.testing.assert_allclose(found, CORPUS.truth(), atol=1e-11)

    def test_domains_go_by_name(self):
        use, order = some_use(), [3, 1, 5, 0, 4, 2]
        other = table_of(use[:, order], [CORPUS.domains[z] for z in order])
        found = shared_truth(profiles(other)["m", 3, 0, 1], CORPUS)
        np.testing.assert_allclose(found, expected_truth(use), atol=1e-11)

    def test_not_measured(self):
        overlap = table_of(some_use(), cka=np.zeros((8, 8)))
        overlap.experts["metric"] = "load"
        with pytest.raises(ValueError, match=r"'domain_specialization'.*'load', 'cka'"):
            profiles(overlap)


class TestScores:
    def test_perfect_metrics_and_what_is_left_of_them(self):
        use = some_use()
        truth = expected_truth(use)
        order = np.random.default_rng(1).permutation(8)
        skew = np.triu(np.random.default_rng(2).standard_normal((8, 8)), 1)
        found = scored(
            table_of(
                use,
                cka=truth,
                matched_cosine=np.exp(9 * truth),  # ranks alone count
                token_js=-truth,  # distances change their sign
                relative_distance=truth,
                co_activation=truth + skew - skew.T,  # both directions count
                lift=truth[np.ix_(order, order)],
                substitution=-truth,
                jaccard=np.ones((8, 8)),
            )
        )
        perfect = found.score[
            ["cka", "matched_cosine", "token_js", "co_activation", "substitution"]
        ]
        np.testing.assert_allclose(perfect, 1)
        assert (found.p[["cka", "token_js", "relative_distance"]] == 1 / 200).all()
        assert found.score["relative_distance"] == pytest.approx(-1)
        assert found.null_low["lift"] < found.score["lift"] < found.null_high["lift"]
        assert found.loc["jaccard", ["score", "p", "null_low", "null_high"]].isna().all()
        assert (found.num_pairs == 28).all()
        assert (found[[*SITE]] == pd.Series(SITE)).all(axis=None)

    def test_p_is_uniform_where_labels_are_permuted(self):
        use = some_use()
        truth, rng = expected_truth(use), np.random.default_rng(0)
        ps = []
        for _ in range(60):
            order = rng.permutation(8)
            found = scored(table_of(use, cka=truth[np.ix_(order, order)]), resamples=99)
            ps.append(found.p["cka"])
        assert 0.3 < np.mean(ps) < 0.7
        assert np.mean(np.array(ps) <= 0.1) < 0.25

    @pytest.mark.parametrize("lost", [[], [(0, 1), (3, 4)]])
    def test_against_all_orders(self, lost):
        """Score, band and p of scipy's correlation over all orders of five experts."""
        use = some_use(5, seed=3)
        truth = expected_truth(use)
        noise = np.random.default_rng(4).standard_normal((5, 5)) * 0.02
        value = truth + noise + noise.T
        for i, j in lost:
            value[j, i] = np.nan  # one direction is enough
        row = scored(table_of(use, cka=value), resamples=9999).loc["cka"]
        pairs = [p for p in itertools.combinations(range(5), 2) if p not in lost]
        of = [value[p] for p in pairs]
        null = [
            spearmanr(of, [round(truth[o[i], o[j]], 12) for i, j in pairs]).statistic
            for o in itertools.permutations(range(5))
        ]
        null = np.array(null)
        assert row.num_pairs == len(pairs)
        assert row.score == pytest.approx(null[0])
        assert row.p == pytest.approx(np.mean(np.abs(null) >= abs(null[0]) - 1e-9), abs=0.015)
        for bound, level in ((row.null_low, 0.025), (row.null_high, 0.975)):
            assert np.mean(null < bound - 1e-9) - 0.01 < level < np.mean(null < bound + 1e-9) + 0.01

    def test_names_of_experts_do_not_matter(self):
        use, order = some_use(), np.random.default_rng(0).permutation(8)
        value = np.random.default_rng(1).standard_normal((8, 8))
        a = scored(table_of(use, cka=value)).score["cka"]
        b = scored(table_of(use[order], cka=value[np.ix_(order, order)])).score["cka"]
        assert a == pytest.approx(b)
        assert scored(table_of(use, cka=value)).equals(scored(table_of(use, cka=value)))

    def test_experts_without_tokens_and_shared_ones_are_left_out(self):
        use = some_use()
        truth = expected_truth(use)
        use[2] = 0
        overlap = table_of(use, cka=truth)
        shared = overlap.pairs.replace({"expert_i": {7: -1}}).assign(value=99.0)
        both = pd.concat([overlap.pairs, shared[shared.expert_i == -1]])
        row = scored(Overlap(overlap.experts, overlap.sites, both)).loc["cka"]
        assert (row.score, row.num_pairs) == (pytest.approx(1), 21)

    def test_too_few_pairs(self):
        row = scored(table_of(some_use(2), cka=np.eye(2))).loc["cka"]
        assert (row.num_pairs, math.isnan(row.score)) == (1, True)

    def test_several_models_are_rows_of_their_own(self):
        use = some_use()
        overlap = table_of(use, cka=expected_truth(use))
        other = table_of(use, cka=-expected_truth(use))
        for table in (other.experts, other.pairs):
            table["model"] = "n"
        found = truth_scores(Overlap.join([overlap, other]), CORPUS, resamples=19)
        assert found.set_index("model").score.to_dict() == pytest.approx({"m": 1, "n": -1})

    def test_the_corpus_by_its_name(self):
        use = some_use()
        overlap = table_of(use, cka=expected_truth(use))
        pd.testing.assert_frame_equal(
            *(truth_scores(overlap, corpus, resamples=19) for corpus in (CORPUS, CORPUS.name))
        )

    def test_what_cannot_be_scored(self):
        with pytest.raises(ValueError, match="overlap is a str; give that of measure_overlap"):
            truth_scores("cka", CORPUS)
        with pytest.raises(ValueError, match="factorial is 'stdlib'; choose one of 'factorial'"):
            truth_scores(table_of(some_use(), cka=np.eye(8)), "stdlib")
        overlap = table_of(some_use(), cka=np.eye(8), transition=np.eye(8))
        assert list(scored(overlap).index) == ["cka"]  # transition is of two sites
        with pytest.raises(ValueError, match="metric is 'transition'; choose one of 'cka'"):
            scored(overlap, metrics="transition")
        with pytest.raises(ValueError, match="resamples is 0"):
            scored(overlap, resamples=0)
        with pytest.raises(ValueError, match=r"domain of 'factorial:.*' is 'topic1 style0'"):
            truth_scores(overlap, Factorial(1, 6, 0.4, 0.3, 0.2, 0.1))
        overlap.pairs["layer"] = 2
        with pytest.raises(ValueError, match=r"\('m', 3, 2, 1\); choose one of \('m', 3, 0, 1\)"):
            scored(overlap)


def sequences_of(token_SL, domain):
    """Each a document."""
    S = len(token_SL)
    ids = [f"d{s}" for s in range(S)]
    return Sequences(token_SL, token_SL, torch.arange(S), ids, domain, torch.ones(S))


def test_truth_that_is_one_number_has_no_score():
    values_EE = np.random.default_rng(0).random((5, 5))
    found = _score(values_EE + values_EE.T, np.ones((5, 5)), Bootstrap(resamples=9))
    assert np.isnan([found["score"], found["p"]]).all()


class TestRouters:
    def test_a_table_that_tells_topics_but_not_styles(self, model_of):
        """Documents repeat one token, each topic its own, whose experts no other topic uses."""
        model = model_of("hash")
        ids_V2 = model.router(model.sites()[0]).gate.table_VE.topk(2).indices
        a, b = next(
            (v, w)
            for v, w in itertools.combinations(range(13), 2)
            if not set(ids_V2[v].tolist()) & set(ids_V2[w].tolist())
        )
        domain = [d for d in CORPUS.domains for _ in range(4)]
        tokens = torch.tensor([[a if d.startswith("topic0") else b] * 5 for d in domain])
        table = factor_information(model, sequences_of(tokens, domain), CORPUS, shuffles=99)
        assert [(r.layer, r.stage) for r in table.itertuples()] == [
            (s.layer, s.stage) for s in model.sites()
        ]
        slots = 24 * 5 * 2
        assert (table.num_slots == slots).all()
        assert (table.num_documents == 24).all()
        # Cells that occur: 4 experts x topics 2 x 2, styles 3 x 4, pairs 6 x 2.
        corrections = dict(topic=4 + 2 - 4 - 1, style=4 + 3 - 12 - 1, pair=4 + 6 - 12 - 1)
        for factor, plain in dict(topic=math.log(2), style=0, pair=math.log(2)).items():
            expected = plain + corrections[factor] / (2 * slots)
            np.testing.assert_allclose(table[f"mi_{factor}"], expected, atol=1e-9)
        assert (table.mi_topic_p == 0.01).all()
        assert (table.mi_topic > table.mi_topic_high + 0.3).all()
        assert (table.mi_style < table.mi_style_null).all()  # balanced more than by chance
        assert (table.mi_style_p > 0.9).all()

    @pytest.mark.parametrize("kind", ["cartesian", "top_p"])
    def test_against_counting_one_by_one(self, kind, model_of):
        """Padding and slots of weight 0 are left out; several sequences are one document."""
        model, rng = model_of(kind), torch.Generator().manual_seed(1)
        tokens = torch.randint(13, (12, 6), generator=rng)
        targets = tokens.clone()
        targets[::3, 4:] = IGNORE
        document = [f"d{s // 2}" for s in range(12)]
        domain = [CORPUS.domains[s // 2] for s in range(12)]
        docs = Sequences(tokens, targets, torch.arange(12), document, domain, torch.ones(12))
        table = factor_information(model, docs, CORPUS, shuffles=9, batch_size=5)
        with torch.no_grad(), capture_routing(model.model) as seen:
            model.model(tokens)
        for row, site in zip(table.itertuples(), model.sites(), strict=True):
            counts = Counter()
            (routing,) = seen[site]
            for t, ids in enumerate(routing.ids_TK.tolist()):
                s, place = divmod(t, 6)
                if targets[s, place] != IGNORE:
                    for k, e in enumerate(ids):
                        if routing.weights_TK[t, k] != 0:
                            counts[domain[s], e] += 1
            N = sum(counts.values())
            of_domain, of_expert = Counter(), Counter()
            for (d, e), n in counts.items():
                of_domain[d] += n
                of_expert[e] += n
            mi = sum(
                n / N * math.log(n * N / of_domain[d] / of_expert[e])
                for (d, e), n in counts.items()
            )
            mi -= (len(counts) - len(of_domain) - len(of_expert) + 1) / (2 * N)
            assert row.num_slots == N
            assert row.mi_pair == pytest.approx(mi, abs=1e-9)

    def test_null_of_documents_without_factors(self, model_of):
        """Tokens of one law everywhere: p is no smaller than chance allows, for most sites."""
        domain = [d for d in CORPUS.domains for _ in range(5)]
        tokens = torch.randint(13, (30, 12), generator=torch.Generator().manual_seed(0))
        docs = sequences_of(tokens, domain)
        table = factor_information(model_of("cartesian"), docs, CORPUS, shuffles=199)
        ps = table[["mi_topic_p", "mi_style_p", "mi_pair_p"]].to_numpy()
        assert ps.min() > 0.005
        assert 0.2 < ps.mean() < 0.8
        # Miller and Madow alone does not know that slots of a document go together.
        assert (table.mi_pair_null > -0.01).all()

    def test_what_cannot_be_asked(self, model_of):
        docs = sequences_of(torch.ones(2, 3, dtype=torch.int64), ["topic0 style0", "code"])
        model = model_of("cartesian")
        with pytest.raises(ValueError, match=r"domain of 'factorial:.*' is 'code'; choose one of"):
            factor_information(model, docs, CORPUS)
        with pytest.raises(ValueError, match="docs has no sequence"):
            factor_information(model, docs[:0], CORPUS)
        with pytest.raises(ValueError, match="shuffles is 0"):
            factor_information(model, docs[:1], CORPUS, shuffles=0)
        with pytest.raises(ValueError, match="it is dense"):
            factor_information(model_of("dense"), docs, CORPUS)
