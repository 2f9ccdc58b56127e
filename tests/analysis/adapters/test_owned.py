"""Whoever measures a model owns it: others are refused by name, copies are models of their own."""

import asyncio
import copy
import functools
import gc
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

import analysis as an
from analysis.adapters.owned import owned
from analysis.measure.clean import CleanPass
from analysis.measure.shard import measure
from cartmoe.data import Sequences
from cartmoe.hooks import capture_routing, hook_routers

from .other_moe import build

TOKENS_BL = torch.randint(1, 13, (6, 9), generator=torch.Generator().manual_seed(3))
DOCS = Sequences(
    *(TOKENS_BL, TOKENS_BL.roll(-1, 1), torch.arange(6), list("abcdef"), list("xyxyxy")),
    torch.full((6,), 9),
)
QUIET = dict(progress=False)
ENTRANCES = {
    "sweep": lambda model, path: an.sweep(model, DOCS, an.DropTop(1), **QUIET),
    "measure": lambda model, path: measure(model, [], DOCS),
    "compare": lambda model, path: an.compare(
        {"a": model, "b": copy.deepcopy(model)}, DOCS, an.DropTop(1), **QUIET
    ),
    "calibrate": lambda model, path: an.calibrate(model, DOCS),
    "record": lambda model, path: an.Trace.record(model, DOCS, path / "trace", **QUIET),
    "overlap": lambda model, path: an.measure_overlap(model, DOCS, "lift", **QUIET),
    "generate": lambda model, path: an.generation_agreement(
        model, DOCS, an.DropTop(1), prompt=3, new=2, **QUIET
    ),
    "regret": lambda model, path: an.regret(model, DOCS, "layer 0 stage 0", n=2, **QUIET),
    "flips": lambda model, path: an.flip_prediction(model, DOCS, 0.5, **QUIET),
    "substitution": lambda model, path: an.substitution(model, DOCS, "layer 0 stage 0", **QUIET),
    "removal": lambda model, path: an.expert_damage(model, DOCS, **QUIET),
    "takeover": lambda model, path: an.takeover(model, DOCS),
    "relate": lambda model, path: an.relate(model, DOCS, "lift", **QUIET),
}
ENTRANCE = pytest.mark.parametrize("entrance", ENTRANCES)


@pytest.fixture
def model(tiny_model):
    return an.adapt(tiny_model("cartesian"))


@pytest.fixture
def stage(model):
    return model.model.trunk.blocks[0].ffn.stages[0]


def damage(model, p, batch_size=16):
    found = an.sweep(model, DOCS, p, controls=False, batch_size=batch_size, **QUIET).damage(
        full=True
    )
    return found.delta_nats.item()


# ---- what is in the way is named, at every entrance


@ENTRANCE
def test_every_entrance_measures_an_undisturbed_model(model, tmp_path, entrance):
    ENTRANCES[entrance](model, tmp_path)


@ENTRANCE
def test_training_mode(model, tmp_path, entrance):
    model.model.train()
    with pytest.raises(ValueError, match=r"model \w+ is in training mode.*eval\(\) first"):
        ENTRANCES[entrance](model, tmp_path)


@ENTRANCE
def test_hooks_of_others(model, stage, tmp_path, entrance):
    stage.experts.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"has a hook of others \(.*lambda.*\) on trunk.blocks.0."):
        ENTRANCES[entrance](model, tmp_path)


@ENTRANCE
def test_an_open_block(model, tmp_path, entrance):
    with an.perturbed(model, an.DropTop(1)) as fired:
        with pytest.raises(ValueError, match=r"has an open block of analysis\.perturbed"):
            ENTRANCES[entrance](model, tmp_path)
        model.model(TOKENS_BL)
    assert set(fired.values()) == {1}


@ENTRANCE
def test_another_thread(model, tmp_path, entrance):
    """And it goes on when that one is done."""
    refusal = r"model (cartesian|a) is in use: thread MainThread measures it"
    with ThreadPoolExecutor(1) as other, owned(model), pytest.raises(ValueError, match=refusal):
        other.submit(ENTRANCES[entrance], model, tmp_path).result()
    with ThreadPoolExecutor(1) as other:
        other.submit(ENTRANCES[entrance], model, tmp_path).result()


PLACES = {
    "router": lambda model: model.trunk.blocks[0].ffn.stages[1].router,
    "gate": lambda model: model.trunk.blocks[0].ffn.stages[1].router.gate,
    "experts": lambda model: model.trunk.blocks[0].ffn.stages[1].experts,
    "stage": lambda model: model.trunk.blocks[0].ffn.stages[1],
    "trunk": lambda model: model.trunk,
    "model": lambda model: model,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["pre", "hook", "forward"])
def test_wherever_it_is_put(model, place, kind):
    part = PLACES[place](model.model)
    if kind == "forward":
        part.forward = functools.partial(type(part).forward, part)
    elif kind == "pre":
        part.register_forward_pre_hook(lambda *args: None)
    else:
        part.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="has a hook of others"):
        an.calibrate(model, DOCS)


def test_a_hook_on_all_modules(model):
    handle = register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(ValueError, match=r"a hook of others \(.*\) on every module"):
            an.calibrate(model, DOCS)
    finally:
        handle.remove()


@pytest.mark.parametrize("block", [capture_routing, lambda m: hook_routers(m, lambda *args: None)])
def test_blocks_of_plain_hooks(model, block):
    with block(model.model):
        with pytest.raises(ValueError, match=r"or capture_routing on trunk\.blocks\.0"):
            an.calibrate(model, DOCS)
        model.model(TOKENS_BL)


def test_hooks_elsewhere_are_the_users_own(model):
    """They change the model that is measured, as they change the one that she runs."""
    clean = an.sweep(model, DOCS, an.DropTop(1), **QUIET)
    model.model.trunk.blocks[0].attention.register_forward_hook(lambda m, args, out: 2 * out)
    changed = an.sweep(model, DOCS, an.DropTop(1), **QUIET)
    assert not changed.losses.nll_sum.equals(clean.losses.nll_sum)


def test_pruning_is_part_of_the_model(model, stage):
    prune.random_unstructured(stage.shared.down, "weight", 0.5) if stage.shared else None
    prune.random_unstructured(stage.router.gate, "weight", 0.5)
    an.calibrate(model, DOCS)


def test_another_model_of_another_make():
    model = build()
    refused = pytest.raises(ValueError, match="model other is in use")
    with owned(model), ThreadPoolExecutor(1) as other, refused:
        other.submit(damage, model, an.DropTop(1)).result()
    model.model.blocks[1].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"on blocks\.1"):
        damage(model, an.DropTop(1))


def test_two_adapters_of_one_model(model):
    refused = pytest.raises(ValueError, match="is in use")
    with owned(model), ThreadPoolExecutor(1) as other, refused:
        other.submit(damage, an.adapt(model.model), an.DropTop(1)).result()


def test_weights_that_change_meanwhile(model, stage):
    def tampering(logits_TE, ctx):
        with torch.no_grad():
            stage.router.gate.weight.mul_(2)
        return logits_TE

    with pytest.raises(RuntimeError, match="weights of cartesian were changed while"):
        an.sweep(model, DOCS, an.Custom(tampering, "tampering"), **QUIET)


# ---- threads, tasks, copies, generators: exact or refused


def test_threads(model):
    asked = {"drop": an.DropTop(1), "noise": an.GaussianNoise(2.0)}
    want = {name: damage(model, p) for name, p in asked.items()}
    exact = refused = 0
    for _ in range(5):
        start, found = threading.Barrier(2), {}

        def work(name, start=start, found=found):
            start.wait()
            try:
                found[name] = damage(model, asked[name], batch_size=1)
            except ValueError as error:
                found[name] = str(error)

        threads = [threading.Thread(target=work, args=[name]) for name in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, value in found.items():
            if isinstance(value, str):
                assert "is in use" in value
                refused += 1
            else:
                assert value == pytest.approx(want[name], abs=1e-5)
                exact += 1
    assert exact >= 5
    assert exact + refused == 10


def test_a_forward_in_another_thread(model):
    with an.perturbed(model, an.DropTop(1)), ThreadPoolExecutor(1, "reader") as other:
        with pytest.raises(ValueError, match="thread reader_0 runs a model that thread MainThread"):
            other.submit(model.model, TOKENS_BL).result()
        model.model(TOKENS_BL)


def test_a_block_in_another_thread(model):
    with an.perturbed(model, an.DropTop(1)), ThreadPoolExecutor(1) as other:
        with pytest.raises(ValueError, match="is in use: thread MainThread perturbs it"):
            other.submit(an.perturbed(model, an.DropTop(2)).__enter__).result()
        model.model(TOKENS_BL)


def test_tasks(model):
    async def perturbs(entered, done):
        with an.perturbed(model, an.DropTop(1)):
            model.model(TOKENS_BL)
            entered.set()
            await done.wait()

    async def main():
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(perturbs(entered, done), name="reader")
        await entered.wait()
        with pytest.raises(ValueError, match="runs a model that thread MainThread, task reader"):
            model.model(TOKENS_BL)
        with pytest.raises(ValueError, match="task reader perturbs it"):
            damage(model, an.DropTop(1))
        done.set()
        await task
        return damage(model, an.DropTop(1))

    assert asyncio.run(main()) == damage(model, an.DropTop(1))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("p", [an.DropTop(1), an.ResidualNoise(an.DropTop(1))], ids=str)
def test_copies_made_in_a_block(model, copied, p):
    """They are models of their own: within the block, after it, and to be measured."""
    with torch.no_grad():
        clean, want = model.model(TOKENS_BL), damage(model, p)
        with an.perturbed(model, p):
            changed = model.model(TOKENS_BL)
            of_block = copied(model.model)
            assert of_block(TOKENS_BL).equal(clean)
            assert damage(an.adapt(of_block), p) == want
            assert model.model(TOKENS_BL).equal(changed)
        assert of_block(TOKENS_BL).equal(clean)
        assert damage(an.adapt(of_block), p) == want
        with an.perturbed(an.adapt(of_block), p):
            assert of_block(TOKENS_BL).equal(changed)


def test_an_adapter_copied_in_a_block(model):
    with an.perturbed(model, an.DropTop(1)):
        of_block = copy.deepcopy(model)
        model.model(TOKENS_BL)
    assert damage(of_block, an.DropTop(1)) == damage(model, an.DropTop(1))


def test_an_abandoned_generator(model):
    def rows():
        with an.perturbed(model, an.DropTop(1)):
            yield from model.model(TOKENS_BL)

    generator = rows()
    next(generator)
    with pytest.raises(ValueError, match="has an open block"):
        damage(model, an.DropTop(1))
    del generator
    gc.collect()
    clean = model.model(TOKENS_BL)
    assert damage(model, an.DropTop(1)) == damage(copy.deepcopy(model), an.DropTop(1))
    assert model.model(TOKENS_BL).equal(clean)


def test_a_thread_that_is_gone(model):
    """Its name and number may be another one's; the block is still its."""
    block = an.perturbed(model, an.DropTop(1))
    gone = threading.Thread(target=block.__enter__)
    gone.start()
    gone.join()
    with pytest.raises(ValueError, match="is in use"):
        damage(model, an.DropTop(1))
    with pytest.raises(RuntimeError, match="did not run inside the block"):
        block.__exit__(None, None, None)
    damage(model, an.DropTop(1))


def test_nothing_is_left_of_a_failed_call(model):
    with pytest.raises(ValueError, match="has only"):
        damage(model, an.DropTop(99))
    with ThreadPoolExecutor(1) as other:
        other.submit(damage, model, an.DropTop(1)).result()


@pytest.mark.parametrize("entrance", sorted({*ENTRANCES} - {"compare"}))
def test_inference_mode_around_it_changes_nothing(entrance, model, tmp_path):
    """Where a search by gradients is among the perturbations, too. (`compare` would copy in it.)"""
    with torch.inference_mode():
        ENTRANCES[entrance](model, tmp_path)
        results = an.sweep(model, DOCS, an.Worst(1), **QUIET)
    same = an.sweep(model, DOCS, an.Worst(1), **QUIET)
    assert results.damage(full=True).equals(same.damage(full=True))


@ENTRANCE
def test_weights_of_inference_mode(entrance, model, tmp_path):
    with torch.inference_mode():
        made = an.adapt(copy.deepcopy(model.model))
    with pytest.raises(ValueError, match=r"(cartesian|a) was made in torch\.inference_mode"):
        ENTRANCES[entrance](made, tmp_path)


@pytest.mark.parametrize("kind", ["full_backward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_on_gradients(model, stage, kind, everywhere):
    """The worst flips are those that gradients name."""
    register = getattr(stage.router, f"register_{kind}")
    if everywhere:
        register = getattr(torch.nn.modules.module, f"register_module_{kind}")
    handle = register(lambda *args: None)
    try:
        with pytest.raises(ValueError, match="cartesian has a hook of others"):
            an.sweep(model, DOCS, an.Worst(1), **QUIET)
    finally:
        handle.remove()


def test_the_forward_of_another_module(model, stage):
    """Of the same class, with other weights."""
    other = copy.deepcopy(stage.router.gate)
    stage.router.gate.forward = other.forward
    with pytest.raises(ValueError, match=r"forward\) on trunk.blocks.0.ffn.stages.0.router.gate"):
        damage(model, an.DropTop(1))


def test_weights_that_are_changed_behind_the_back_of_torch(model, stage):
    def negating(logits_TE, ctx):
        stage.router.gate.weight.data.mul_(-5)
        return logits_TE

    with pytest.raises(RuntimeError, match="weights of cartesian were changed while"):
        damage(model, an.Custom(negating, "Negating"))


def test_the_model_whose_gates_are_taken(model):
    """It is measured with, and so as undisturbed as the one that is measured."""
    other = an.adapt(copy.deepcopy(model.model), name="other")
    expected = damage(model, an.GateSwap(other))
    gate = other.model.trunk.blocks[0].ffn.stages[0].router.gate
    handle = gate.register_forward_hook(lambda module, args, out: -out)
    with pytest.raises(ValueError, match=r"model other has a hook of others .* on .*router.gate"):
        damage(model, an.GateSwap(other))
    handle.remove()
    other.model.train()
    with pytest.raises(ValueError, match="model other is in training mode"):
        damage(model, an.Compose((an.DropTop(1), an.GateSwap(other))))
    other.model.eval()
    assert damage(model, an.GateSwap(other)) == expected


def test_a_wrong_argument_is_told_with_the_functions_name(model):
    with pytest.raises(TypeError, match=r"regret\(\) got an unexpected keyword argument 'sites'"):
        an.regret(model, DOCS, sites="layer 0 stage 0")
    with pytest.raises(TypeError, match=r"takeover\(\) missing 2 required positional arguments"):
        an.takeover()


def test_a_clean_pass_watches_for_its_own_thread(model):
    """The parts that measuring is made of, too."""
    with owned(model), ThreadPoolExecutor(1) as other:
        clean = CleanPass.of(model, DOCS)
        with model.hooked(router=lambda *args: None):
            with pytest.raises(ValueError, match="perturbs or measures meanwhile"):
                other.submit(CleanPass.of, model, DOCS).result()
            model.model(TOKENS_BL)
    assert clean.losses.nll_T.equal(CleanPass.of(model, DOCS).losses.nll_T)
