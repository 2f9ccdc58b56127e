"""Hooks on routers: what they see and change, and that nothing of them stays behind."""

import math
import re
from contextlib import nullcontext

import pytest
import torch

from cartmoe import FAMILIES, Router
from cartmoe.hooks import RouterSite, capture_routing, hook_routers, router_sites

MOE = pytest.mark.parametrize("family", [f for f in FAMILIES if f != "dense"])
BLOCKS = pytest.mark.parametrize(
    "block", [lambda model: hook_routers(model, nothing), capture_routing], ids=["hook", "capture"]
)
TOKENS_BL = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def nothing(routing, router, site):
    return None


def drop_top(routing, router, site):
    """The highest logit of each token to -inf."""
    top_T1 = routing.logits_TE.argmax(-1, keepdim=True)
    return router.route(routing.logits_TE.scatter(-1, top_T1, -math.inf))


def uniform(routing, router, site):
    return routing._replace(weights_TK=torch.full_like(routing.weights_TK, 0.5))


def hooks_of(model) -> dict[str, list]:
    """Every hook of every module, by module and kind."""
    return {
        f"{name}.{kind}": list(hooks.values())
        for name, module in model.named_modules()
        for kind, hooks in vars(module).items()
        if kind.endswith("_hooks") and hooks
    }


# ---- sites


def test_sites_in_order_of_depth(tiny_model):
    sites = router_sites(tiny_model("cartesian", top_k=(1, 2)))
    assert [(s.layer, s.stage, s.num_experts, s.top_k) for s in sites] == [
        (0, 0, 6, 1),
        (0, 1, 6, 2),
        (2, 0, 6, 1),
        (2, 1, 6, 2),
    ]


@MOE
def test_sites_name_their_router(tiny_model, family):
    model = tiny_model(family)
    for site, router in router_sites(model).items():
        assert isinstance(router, Router)
        assert model.get_submodule(site.name) is router


def test_sites_of_other_models(tiny_model):
    assert router_sites(tiny_model("dense")) == {}
    (site, *_) = router_sites(tiny_model("top_p"))
    assert site.top_k == 6  # as many slots as experts


# ---- what hooks see and change


@MOE
def test_identity_leaves_every_bit(tiny_model, family):
    model = tiny_model(family)
    clean = model(TOKENS_BL)
    for identity in (nothing, lambda routing, router, site: router.route(routing.logits_TE)):
        with hook_routers(model, identity) as fired:
            assert model(TOKENS_BL).equal(clean)
        assert fired == dict.fromkeys(router_sites(model), 1)


@MOE
def test_captured_is_what_the_trunk_returns(tiny_model, family):
    model = tiny_model(family)
    with capture_routing(model) as captured:
        _, routings = model.trunk(TOKENS_BL)
        model.trunk(TOKENS_BL[:1])
    assert list(captured) == list(router_sites(model))
    for (first, second), expected in zip(captured.values(), routings, strict=True):
        assert all(map(torch.equal, first, expected))
        assert not any(tensor.requires_grad for tensor in first)
        assert len(second.ids_TK) == 5


def test_fn_sees_the_decision_the_router_and_its_site(tiny_model):
    model = tiny_model("cartesian")
    seen = []
    with hook_routers(model, lambda *args: seen.append(args)):
        _, routings = model.trunk(TOKENS_BL)
    for (routing, router, site), expected in zip(seen, routings, strict=True):
        assert routing is expected
        assert router_sites(model)[site] is router


def test_where_chooses_and_only_what_follows_changes(tiny_model):
    model = tiny_model("cartesian")
    _, clean = model.trunk(TOKENS_BL)
    with hook_routers(model, drop_top, where=lambda s: (s.layer, s.stage) == (0, 1)) as fired:
        _, changed = model.trunk(TOKENS_BL)
    assert [(s.layer, s.stage) for s in fired] == [(0, 1)]
    same = [a.logits_TE.equal(b.logits_TE) for a, b in zip(clean, changed, strict=True)]
    assert same == [True, False, False, False]


def test_masking_a_hash_table_takes_the_next_experts(tiny_model):
    model = tiny_model("hash")
    clean = model(TOKENS_BL)
    table_VE = next(iter(router_sites(model).values())).gate.table_VE
    ranks_TE = table_VE[TOKENS_BL.flatten()].argsort(dim=-1, descending=True)
    with hook_routers(model, drop_top), capture_routing(model) as captured:
        assert not model(TOKENS_BL).equal(clean)
    for (routing,) in captured.values():
        assert routing.ids_TK.equal(ranks_TE[:, 1:3])
        torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(10))


def test_another_number_of_experts(tiny_model):
    """A decision may have more or fewer slots than the router would fill, down to one."""
    model = tiny_model("smoe_share")

    def first_only(routing, router, site):
        return routing._replace(ids_TK=routing.ids_TK[:, :1], weights_TK=routing.weights_TK[:, :1])

    def lose_second(routing, router, site):
        return routing._replace(weights_TK=routing.weights_TK * torch.tensor([1.0, 0.0]))

    with hook_routers(model, first_only):
        narrow = model(TOKENS_BL)
    with hook_routers(model, lose_second):
        torch.testing.assert_close(model(TOKENS_BL), narrow)


def test_hooks_act_in_order_of_entry(tiny_model):
    model = tiny_model("smoe_share")
    with hook_routers(model, drop_top), hook_routers(model, uniform):
        both = model(TOKENS_BL)
    with hook_routers(model, uniform), hook_routers(model, drop_top):
        drop_last = model(TOKENS_BL)
    with hook_routers(model, lambda *args: uniform(drop_top(*args), *args[1:])):
        assert model(TOKENS_BL).equal(both)
    with hook_routers(model, drop_top):
        assert model(TOKENS_BL).equal(drop_last)


def test_capture_sees_the_final_decision_whatever_the_order(tiny_model):
    model = tiny_model("cartesian")
    with (
        capture_routing(model) as outer,
        hook_routers(model, drop_top),
        capture_routing(model) as inner,
        hook_routers(model, uniform),
    ):
        _, routings = model.trunk(TOKENS_BL)
    for (a,), (b,), final in zip(outer.values(), inner.values(), routings, strict=True):
        assert a.ids_TK.equal(b.ids_TK)
        assert a.weights_TK.equal(b.weights_TK)
        assert (a.weights_TK == 0.5).all()
        assert a.logits_TE.equal(final.logits_TE)
        assert (a.logits_TE == -math.inf).sum(-1).eq(1).all()


def test_gradients_pass_through_hooks(tiny_model):
    model = tiny_model("smoe_share")
    with hook_routers(model, drop_top):
        model(TOKENS_BL).square().mean().backward()
    for router in router_sites(model).values():
        assert router.gate.weight.grad.isfinite().all()
        assert router.gate.weight.grad.any()


# ---- nothing stays behind


@BLOCKS
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_only_own_hooks_are_removed(tiny_model, block, error):
    model = tiny_model("cartesian")
    own = []
    router = model.trunk.blocks[0].ffn.stages[0].router
    handle = router.register_forward_hook(lambda *args: own.append(1))
    before = hooks_of(model)
    assert len(before) == 1

    def run():
        with block(model):
            assert hooks_of(model) != before
            model(TOKENS_BL)
            if error:
                raise error

    with pytest.raises(error) if error else nullcontext():
        run()
    assert hooks_of(model) == before
    model(TOKENS_BL)
    assert len(own) == 2
    handle.remove()
    assert not hooks_of(model)


def test_an_exception_of_fn_comes_out_and_leaves_nothing(tiny_model):
    model = tiny_model("cartesian")

    def fail(routing, router, site):
        raise ZeroDivisionError("of fn")

    with pytest.raises(ZeroDivisionError, match="of fn"), hook_routers(model, fail):
        model(TOKENS_BL)
    assert not hooks_of(model)


def test_an_exception_before_any_forward_is_not_masked(tiny_model):
    """Every router was silent then, and that is not what went wrong."""
    with pytest.raises(KeyError), hook_routers(tiny_model("cartesian"), nothing):
        raise KeyError("of the user")


def test_blocks_may_interleave(tiny_model):
    model = tiny_model("smoe_share")
    clean = model(TOKENS_BL)
    with hook_routers(model, drop_top):
        dropped = model(TOKENS_BL)
    first, second = hook_routers(model, uniform), hook_routers(model, drop_top)
    first.__enter__()
    second.__enter__()
    model(TOKENS_BL)
    first.__exit__(None, None, None)
    assert model(TOKENS_BL).equal(dropped)
    second.__exit__(None, None, None)
    assert model(TOKENS_BL).equal(clean)
    assert not hooks_of(model)


# ---- what is refused


def test_silent_routers_are_named(tiny_model):
    model = tiny_model("cartesian")
    first_step = model.trunk.blocks[0].ffn.steps()[0]
    with (
        pytest.raises(RuntimeError, match="did not run inside the block") as error,
        hook_routers(model, nothing),
    ):
        first_step(torch.randn(4, 16), TOKENS_BL.flatten()[:4])
    silent = [site.name for site in router_sites(model)][1:]
    assert re.findall(r"trunk\.\S*router", str(error.value)) == silent
    assert not hooks_of(model)


def test_a_model_that_never_ran(tiny_model):
    model = tiny_model("smoe_share")
    names = ", ".join(site.name for site in router_sites(model))
    with pytest.raises(RuntimeError, match=re.escape(names)), hook_routers(model, nothing):
        pass


@pytest.mark.parametrize("block", [lambda m, w: hook_routers(m, nothing, w), capture_routing])
def test_where_that_selects_nothing_lists_the_choices(tiny_model, block):
    model = tiny_model("cartesian")
    have = "layer 0 stage 0, layer 0 stage 1, layer 2 stage 0, layer 2 stage 1"
    with (
        pytest.raises(ValueError, match=f"where selects no router; the model has {have}"),
        block(model, lambda site: site.layer == 1),
    ):
        pass
    assert not hooks_of(model)


@BLOCKS
def test_dense_is_refused(tiny_model, block):
    with (
        pytest.raises(ValueError, match="no router to hook: it is dense"),
        block(tiny_model("dense")),
    ):
        pass


@BLOCKS
@pytest.mark.parametrize("compiled", ["wrapper", "module", "part", "wrapped part"])
def test_compiled_is_refused(tiny_model, block, compiled):
    model = tiny_model("cartesian")
    if compiled == "wrapper":
        model = torch.compile(model, backend="eager")
    elif compiled == "module":
        model.compile(backend="eager")
    elif compiled == "part":
        model.trunk.blocks[0].compile(backend="eager")
    else:
        model.trunk = torch.compile(model.trunk, backend="eager")
    with (
        pytest.raises(ValueError, match=r"is compiled .*Pass the model as it was before"),
        block(model),
    ):
        pass


def test_a_site_is_a_value():
    site = RouterSite("r", 0, 1, 4, 2)
    assert {site: 1}[RouterSite("r", 0, 1, 4, 2)] == 1
    with pytest.raises(AttributeError):
        site.layer = 2
