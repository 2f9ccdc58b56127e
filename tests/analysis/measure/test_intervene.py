"""`perturbed` and `calibrate`: what they do to a running model, and that nothing stays behind."""

from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn

from analysis.adapters.base import State, as_adapter
from analysis.adapters.load import adapt
from analysis.measure.calibrate import calibrate
from analysis.measure.clean import CleanPass
from analysis.measure.intervene import Intervention, perturbed
from analysis.perturb.compound import ResidualNoise
from analysis.perturb.condition import Condition
from analysis.perturb.context import Tokens
from analysis.perturb.logits import GaussianNoise, RandomRouting
from analysis.perturb.masks import DropTop
from cartmoe.data import IGNORE, Sequences
from cartmoe.ffn import RoutedStage
from cartmoe.hooks import capture_routing, hook_routers, router_sites
from cartmoe.routing import expert_counts

from ..routers import hooks_of

TOKENS_BL = torch.randint(1, 13, (4, 9), generator=torch.Generator().manual_seed(3))
BATCH = Sequences(
    TOKENS_BL, TOKENS_BL, torch.arange(4), list("abcd"), list("abcd"), torch.full((4,), 9)
)
MOE = pytest.mark.parametrize("kind", ["smoe", "hash", "top_p", "cartesian", "parallel"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def decisions(model, tokens_BL=TOKENS_BL):
    with capture_routing(model) as captured:
        model(tokens_BL)
    return {(s.layer, s.stage): routing for s, (routing,) in captured.items()}


# ---- nothing stays behind


@MOE
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_restores_exactly(model_of, kind, error):
    model = model_of(kind).model
    user = model.trunk.blocks[0].register_forward_hook(lambda *args: None)
    before, clean = hooks_of(model), model(TOKENS_BL)
    with (
        pytest.raises(error) if error else nullcontext(),
        perturbed(model, GaussianNoise(3.0)) as fired,
    ):
        assert not model(TOKENS_BL).equal(clean)
        assert hooks_of(model).keys() > before.keys()
        if error:
            raise error
    assert set(fired.values()) == {1}
    assert hooks_of(model) == before
    assert model(TOKENS_BL).equal(clean)
    user.remove()
    assert not hooks_of(model)


def test_an_error_within_the_forward(model_of):
    """RandomRouting without statistics fails in the middle of the model."""
    model = model_of("cartesian").model
    clean = model(TOKENS_BL)
    with pytest.raises(ValueError, match="needs statistics"), perturbed(model, RandomRouting()):
        model(TOKENS_BL)
    assert not hooks_of(model)
    assert model(TOKENS_BL).equal(clean)


def test_nested(model_of):
    """The inner one perturbs what the outer one made of the decision."""
    model = model_of("smoe_share").model
    with perturbed(model, DropTop(3)):
        three = decisions(model)[0, 0]
        with perturbed(model, DropTop(1)):
            four = decisions(model)[0, 0]
        assert decisions(model)[0, 0].ids_TK.equal(three.ids_TK)
    with perturbed(model, DropTop(4)):
        assert decisions(model)[0, 0].ids_TK.equal(four.ids_TK)
    assert not hooks_of(model)


def test_users_hooks_act_too(model_of):
    model = model_of("cartesian").model
    seen = []
    with (
        hook_routers(model, lambda routing, router, site: seen.append(routing)),
        perturbed(model, DropTop(1), "layer 0 stage 0"),
        hook_routers(model, lambda routing, router, site: seen.append(routing)),
    ):
        model(TOKENS_BL)
    assert seen[0].logits_TE.isfinite().all()
    assert seen[1].logits_TE.isinf().any()


def test_gradients_flow_and_stay_out_of_the_way(model_of):
    model = model_of("smoe_share").model
    with torch.enable_grad(), perturbed(model, DropTop(1)):
        loss = model(TOKENS_BL).square().mean()
        grads = torch.autograd.grad(loss, [r.gate.weight for r in router_sites(model).values()])
    assert all(g.isfinite().all() and g.any() for g in grads)


# ---- where


@pytest.mark.parametrize(
    ("where", "sites"),
    [
        ("all", [(0, 0), (0, 1), (2, 0), (2, 1)]),
        ("stage 1", [(0, 1), (2, 1)]),
        ("layer 2", [(2, 0), (2, 1)]),
        (lambda site: site.layer + site.stage == 3, [(2, 1)]),
    ],
)
def test_where(model_of, where, sites):
    model = model_of("cartesian").model
    with perturbed(model, DropTop(1), where) as fired:
        changed = decisions(model)
    assert [(s.layer, s.stage) for s in fired] == sites
    masked = [place for place, routing in changed.items() if routing.logits_TE.isinf().any()]
    assert masked == sites


def test_positions(model_of):
    model = model_of("smoe_share").model
    with perturbed(model, DropTop(1), "layer 0 positions 2:4"):
        masked_T = decisions(model)[0, 0].logits_TE.isinf().any(-1)
    assert masked_T.view(4, 9).equal((torch.arange(9) // 2 == 1).expand(4, 9))


def test_a_plain_function(model_of):
    model = model_of("cartesian").model
    with perturbed(model, lambda logits_TE, ctx: logits_TE.flip(-1), "layer 0 stage 0"):
        flipped = decisions(model)[0, 0]
    assert flipped.logits_TE.equal(decisions(model)[0, 0].logits_TE.flip(-1))


def test_what_a_perturbation_sees(model_of):
    model, seen = model_of("cartesian"), []

    def look(logits_TE, ctx):
        seen.append(ctx)
        with pytest.raises(ValueError, match=r"took no decision before"):
            ctx.previous(model.sites()[-1])
        return logits_TE

    with perturbed(model, look, sequence_ids=torch.tensor([7, 7, 8, 9])):
        model.model(TOKENS_BL)
    assert [ctx.site for ctx in seen] == model.sites()
    for ctx in seen:
        assert ctx.x_TD.shape == (36, 16)
        assert ctx.tokens.token_ids_T.equal(TOKENS_BL.flatten())
        assert ctx.tokens.position_T.equal(torch.arange(9).repeat(4))
        assert ctx.tokens.sequence_T.unique().tolist() == [7, 8, 9]
        assert ctx.stats is None
        router = router_sites(model.model)[ctx.site]
        assert ctx.clean.logits_TE.equal(router(ctx.x_TD, ctx.tokens.token_ids_T).logits_TE)
    assert seen[-1].previous(model.sites()[0]).ids_TK.equal(seen[0].clean.ids_TK)


def test_what_routers_came_to_of_themselves(model_of):
    """`earlier` has what was imposed on routers before, `own` what they had decided."""
    model, seen = model_of("cartesian"), []

    def look(logits_TE, ctx):
        seen.append((ctx.site, ctx.clean, dict(ctx.earlier), dict(ctx.own)))
        return -logits_TE

    with perturbed(model, look):
        taken = decisions(model.model)
    owns = {site: clean for site, clean, _, _ in seen}
    for number, (site, _, earlier, own) in enumerate(seen):
        before = model.sites()[:number]
        assert site == model.sites()[number]
        assert list(earlier) == list(own) == before
        for s in before:
            assert own[s] is owns[s]
            assert earlier[s].ids_TK.equal(taken[s.layer, s.stage].ids_TK)
            assert earlier[s].logits_TE.equal(-own[s].logits_TE)


def test_a_site_as_where(model_of):
    model = model_of("cartesian")
    with perturbed(model, DropTop(1), model.sites()[2]) as fired:
        decisions(model.model)
    assert list(fired) == [model.sites()[2]]


@pytest.mark.parametrize("p", [DropTop(1), ResidualNoise(DropTop(1)), GaussianNoise(1.0)], ids=str)
def test_two_blocks_of_the_same_are_two(model_of, p):
    """Each acts on its own state, nested in either way."""
    model = model_of("smoe_share").model
    with perturbed(model, p):
        once = model(TOKENS_BL)
        with perturbed(model, p):
            twice = model(TOKENS_BL)
        assert model(TOKENS_BL).equal(once)
    assert not twice.equal(once)
    assert not hooks_of(model)


# ---- sequence ids


def test_ids_by_content(model_of):
    model = model_of("smoe_share").model
    with perturbed(model, GaussianNoise(2.0), "layer 0"):
        whole = model(TOKENS_BL)
        again = model(TOKENS_BL)
        shuffled = model(TOKENS_BL[[2, 0, 3, 1]])
        alone = torch.cat([model(row[None]) for row in TOKENS_BL])
        twice = model(TOKENS_BL[[1, 1]])
    assert again.equal(whole)
    torch.testing.assert_close(shuffled, whole[[2, 0, 3, 1]])
    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(twice[0], twice[1])
    with perturbed(model, GaussianNoise(2.0), "layer 0", seed=1):
        assert not model(TOKENS_BL).allclose(whole)


def test_ids_given(model_of):
    model = model_of("smoe_share").model
    ids = torch.tensor([5, 6, 7, 8])
    with perturbed(model, GaussianNoise(2.0), sequence_ids=ids):
        whole = model(TOKENS_BL)
    with perturbed(model, GaussianNoise(2.0), sequence_ids=[7, 5]):
        torch.testing.assert_close(model(TOKENS_BL[[2, 0]]), whole[[2, 0]])
    with perturbed(model, GaussianNoise(2.0), sequence_ids=ids + 1):
        assert not model(TOKENS_BL).allclose(whole)


@pytest.mark.parametrize("ids", [torch.arange(3), torch.arange(5), []], ids=len)
def test_ids_of_another_number(model_of, ids):
    model = model_of("smoe_share").model
    message = rf"sequence_ids has {len(ids)} rows; the model was given 4"
    with pytest.raises(ValueError, match=message), perturbed(model, DropTop(1), sequence_ids=ids):
        model(TOKENS_BL)
    assert not hooks_of(model)


# ---- what is refused


def test_dense(model_of):
    with (
        pytest.raises(ValueError, match="no router to hook: it is dense"),
        perturbed(model_of("dense"), DropTop(1)),
    ):
        pass


@pytest.mark.parametrize("wrapper", [True, False])
def test_compiled(tiny_model, wrapper):
    model = tiny_model("cartesian")
    if wrapper:
        model.trunk = torch.compile(model.trunk, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled"), perturbed(model, DropTop(1)):
        pass


def test_a_model_that_never_ran(model_of):
    with (
        pytest.raises(RuntimeError, match="did not run inside the block"),
        perturbed(model_of("cartesian"), DropTop(1)),
    ):
        pass


@pytest.mark.parametrize("wrong", [dict(where="layer 7"), dict(point="x"), dict(seed=-1)], ids=str)
def test_wrong_arguments_leave_nothing(model_of, wrong):
    model = model_of("cartesian").model
    with pytest.raises(ValueError, match=f"^{next(iter(wrong)).replace('seed', 'eval_seed')}"):
        perturbed(model, DropTop(1), **wrong).__enter__()
    assert not hooks_of(model)


def test_other_models():
    for wrap in (as_adapter, adapt):
        with pytest.raises(ValueError, match=r"model is a Linear|has no table of embeddings"):
            wrap(nn.Linear(2, 2))


# ---- reroute and replay


def test_downstream(model_of):
    """Reroute: later routers follow the changed stream. Replay: they repeat the clean run."""
    model = model_of("cartesian")
    clean = decisions(model.model)
    recorded = {s: clean[s.layer, s.stage] for s in model.sites()}
    tokens = Tokens.of(TOKENS_BL, torch.arange(4))
    got = {}
    for downstream in ("reroute", "replay"):
        condition = Condition(DropTop(1), "layer 0", downstream=downstream)
        intervention = Intervention(condition, recorded=recorded)
        intervention.begin(tokens, {})
        with model.hooked(router=intervention):
            got[downstream] = decisions(model.model)
    reroute, replay = got.values()
    first = model.sites()[0]
    dropped = router_sites(model.model)[first].route(replay[0, 1].logits_TE)
    assert all(map(torch.equal, reroute[0, 0], replay[0, 0]))
    assert replay[0, 1].ids_TK.equal(dropped.ids_TK)
    for place in ((2, 0), (2, 1)):
        assert all(map(torch.equal, replay[place], clean[place]))
        assert not reroute[place].logits_TE.equal(clean[place].logits_TE)
    top_T1 = clean[0, 1].logits_TE.argmax(-1, keepdim=True)
    assert replay[0, 1].logits_TE.equal(clean[0, 1].logits_TE.scatter(-1, top_T1, -torch.inf))


# ---- calibration


def test_calibration(model_of, shard):
    """Against everything computed at once; padding takes no part."""
    model = model_of("cartesian")
    used_T = (shard.targets_SL != IGNORE).flatten()
    clean = decisions(model.model, shard.tokens_SL)
    got = calibrate(model, shard, rows=10**6, batch_size=3)
    for site, stats in got.sites.items():
        routing = clean[site.layer, site.stage]
        logits_TE = routing.logits_TE[used_T]
        assert len(stats.reservoir_RE) == used_T.sum()
        torch.testing.assert_close(stats.reservoir_RE.sort(0).values, logits_TE.sort(0).values)
        assert stats.std == pytest.approx(logits_TE.std().item(), rel=1e-5)
        counts_E = expert_counts(type(routing)(*(t[used_T] for t in routing)))
        torch.testing.assert_close(stats.load_E, counts_E / counts_E.sum())
        assert stats.load_E.sum().item() == pytest.approx(1)


def test_reservoir_does_not_depend_on_the_batch(model_of, shard, rows_of):
    model = model_of("smoe_share")
    a = calibrate(model, shard, rows=9, batch_size=2)
    b = calibrate(model, rows_of(shard, [4, 2, 0, 6, 5, 1, 3]), rows=9, batch_size=7)
    other = calibrate(model, shard, rows=9, seed=1)
    for site, stats in a.sites.items():
        assert stats.reservoir_RE.shape == (9, 6)
        torch.testing.assert_close(stats.reservoir_RE, b.sites[site].reservoir_RE)
        assert not stats.reservoir_RE.allclose(other.sites[site].reservoir_RE)
    assert a.sha256 == calibrate(model, shard, rows=9, batch_size=2).sha256 != other.sha256


def test_calibration_needs_sequences(model_of, shard):
    with pytest.raises(ValueError, match="at least one sequence"):
        calibrate(model_of("cartesian"), shard[:0])


# ---- the adapter's parts


@MOE
def test_segments_are_the_model(model_of, kind):
    model = model_of(kind)
    state = State(None, TOKENS_BL)
    passed = []
    for segment in model.segments():
        state = segment.run(state)
        passed += segment.sites
    assert passed == model.sites()
    assert (
        model.logits(state.hidden_BLD.flatten(0, 1))
        .view(4, 9, -1)
        .equal(model.model(TOKENS_BL).float())
    )


@MOE
def test_branches(model_of, kind):
    """c_0 and ||c_0 routed|| of the clean pass, against what the routed experts gave."""
    model, inputs, routed = model_of(kind), {}, []

    def look(routing, router, site, x_TD):
        inputs[site] = x_TD

    stages = [m for m in model.model.modules() if isinstance(m, RoutedStage)]
    with ExitStack() as stack:
        for stage in stages:
            keep = stage.experts.register_forward_hook(lambda m, args, out: routed.append(out))
            stack.callback(keep.remove)
        stack.enter_context(model.hooked(router=look))
        found = CleanPass.of(model, BATCH).branches
    for stage, site, routed_TD in zip(stages, model.sites(), routed, strict=True):
        c_T = torch.ones(36)
        if stage.shared is not None:
            c_T = stage.mix(inputs[site]).softmax(-1)[:, 0]
        torch.testing.assert_close(found[site][0], c_T)
        torch.testing.assert_close(found[site][1], (c_T[:, None] * routed_TD).norm(dim=-1))
    assert not hooks_of(model.model)


def test_branches_of_a_dense_model(model_of):
    model = model_of("dense")
    assert CleanPass.of(model, BATCH).branches == {}


def test_expert_weights_and_outputs(model_of):
    model = model_of("cartesian")
    site, x_TD = model.sites()[1], torch.randn(7, 16)
    gate, up, down = model.expert_weights(site)
    outputs = model.expert_outputs(site, x_TD)
    assert outputs.shape == (6, 7, 16)
    for e in (0, 5):
        hidden = nn.functional.silu(x_TD @ gate[e].T) * (x_TD @ up[e].T)
        torch.testing.assert_close(outputs[e], hidden @ down[e].T)
    torch.testing.assert_close(model.expert_outputs(site, x_TD, [4, 1]), outputs[[4, 1]])


def test_identity_of_a_model_in_memory(tiny_model):
    a, b = (as_adapter(tiny_model("cartesian", seed=s)) for s in (0, 1))
    assert a.identity == as_adapter(tiny_model("cartesian")).identity != b.identity
