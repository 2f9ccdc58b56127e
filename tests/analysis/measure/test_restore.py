"""Nothing of ours stays behind in a model, however blocks are opened, closed and interrupted."""

import contextlib
import functools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import cartmoe.interrupt
from analysis.adapters import Watch, as_adapter, clean_routing
from analysis.adapters import cartmoe as adapter
from analysis.measure.intervene import perturbed
from analysis.measure.shard import measure
from analysis.perturb.compound import Compose, ResidualNoise
from analysis.perturb.condition import Condition
from analysis.perturb.decisions import Lag, TopK
from analysis.perturb.flips import Worst
from analysis.perturb.logits import GaussianNoise, RandomRouting
from analysis.perturb.masks import DropTop
from cartmoe import LanguageModel, ModelConfig
from cartmoe.data import Sequences
from cartmoe.hooks import capture_routing, hook_routers

from ..routers import hooks_of

TOKENS_BL = torch.randint(1, 13, (2, 5), generator=torch.Generator().manual_seed(3))
SHARD = Sequences(
    TOKENS_BL, TOKENS_BL.roll(-1, 1), torch.arange(2), ["a", "b"], ["x", "x"], torch.tensor([5, 5])
)
PERTURBATIONS = [
    *(DropTop(1), GaussianNoise(2.0), TopK(3), Lag(1), Lag(over="sites")),
    *(ResidualNoise(), Compose((DropTop(1), GaussianNoise(1.0)))),
]


def build() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(
            family="cartesian", vocab_size=13, d_model=16, ffn_width=32, num_layers=1, num_heads=2,
            num_experts=6, init_std=0.3,
        )
    ).eval()  # fmt: skip


def forward(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS_BL)


# ---- any order


class Blocks(RuleBasedStateMachine):
    """Blocks of every kind, nested and interleaved, with the user's own hooks between them."""

    def __init__(self):
        super().__init__()
        self.model = build()
        self.adapter = as_adapter(self.model)
        self.site = self.adapter.sites()[1]
        self.experts = self.model.get_submodule(self.site.name.replace("router", "experts"))
        self.clean = forward(self.model)
        self.open: list = []
        self.users: list = []

    def enter(self, block):
        block.__enter__()
        self.open.append(block)

    @rule(p=st.sampled_from(PERTURBATIONS), where=st.sampled_from(["all", "stage 0", "stage 1"]))
    def open_perturbed(self, p, where):
        self.enter(perturbed(self.model, p, where))

    @rule(ours=st.sampled_from([hook_routers, capture_routing]))
    def open_hooks(self, ours):
        arguments = (self.model, lambda *args: None) if ours is hook_routers else (self.model,)
        self.enter(ours(*arguments))

    @rule()
    def open_watch(self):
        self.enter(self.adapter.hooked(experts=Watch()))

    @rule(zero=st.booleans())
    def open_replaced_experts(self, zero):
        fn = (lambda x_TD, *args: torch.zeros_like(x_TD)) if zero else (lambda *args: None)
        self.enter(self.adapter.hooked(experts=fn, where=self.site.__eq__))

    @rule()
    def open_output(self):
        self.enter(self.adapter.hooked(output=lambda output_TD, site: output_TD + 1))

    @rule()
    def open_all(self):
        nothing = dict.fromkeys(("forward", "router", "experts", "output"), lambda *args: None)
        self.enter(self.adapter.hooked(**nothing))

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(),
        error=st.sampled_from([None, ZeroDivisionError, KeyboardInterrupt, GeneratorExit]),
    )
    def close_any(self, data, error):
        block = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        exception = (None, None, None) if error is None else (error, error(), None)
        with contextlib.suppress(RuntimeError):  # routers that did not run inside the block
            assert not block.__exit__(*exception)

    @rule()
    def run(self):
        forward(self.model)

    @rule(error=st.sampled_from([ZeroDivisionError, KeyboardInterrupt]))
    def run_into_an_error(self, error):
        def fail(*args):
            raise error

        before = hooks_of(self.model)
        with pytest.raises(error), hook_routers(self.model, fail):
            forward(self.model)
        with (
            pytest.raises(ValueError, match="needs statistics"),
            perturbed(self.model, RandomRouting()),
        ):
            forward(self.model)
        assert hooks_of(self.model) == before

    @rule()
    def refused_arguments(self):
        before = hooks_of(self.model)
        with pytest.raises(ValueError, match="where is 'layer 7'; it must select routers"):
            self.enter(perturbed(self.model, DropTop(1), "layer 7"))
        with pytest.raises(ValueError, match="where selects no router"):
            self.enter(hook_routers(self.model, print, lambda site: False))
        assert hooks_of(self.model) == before

    @precondition(lambda self: len(self.users) < 4)
    @rule(data=st.data())
    def add_a_hook_of_the_users(self, data):
        modules = [m for m in self.model.modules() if not hasattr(m, "weight")]
        module = data.draw(st.sampled_from(range(len(modules))))
        self.users.append(modules[module].register_forward_hook(lambda *args: None))

    @precondition(lambda self: self.users)
    @rule()
    def remove_a_hook_of_the_users(self):
        self.users.pop(0).remove()

    @precondition(lambda self: "forward" not in vars(self.experts))
    @rule()
    def replace_forward_as_a_user(self):
        own = self.experts.forward
        self.experts.forward = functools.partial(own)
        self.own_forward = self.experts.forward

    def own_of_the_user(self):
        own = {"forward"} if getattr(self, "own_forward", None) else set()
        return len(self.users), own

    @invariant()
    def nothing_of_ours_without_a_block(self):
        if self.open:
            return
        left = hooks_of(self.model)
        number, own = self.own_of_the_user()
        assert sum(len(h) for name, h in left.items() if name.endswith("_hooks")) == number
        attributes = [h for name, h in left.items() if name.endswith(".forward")]
        assert attributes == ([[self.own_forward]] if own else [])
        assert forward(self.model).equal(self.clean)

    def teardown(self):
        while self.open:
            with contextlib.suppress(RuntimeError):
                self.open.pop(0).__exit__(None, None, None)
        self.nothing_of_ours_without_a_block()


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=40, stateful_step_count=25)


def test_blocks_of_experts_in_any_order():
    """The last one entered is asked first, and one that says None leaves it to the next."""
    model = as_adapter(build())
    site = model.sites()[0]
    experts = model.model.get_submodule(site.name.replace("router", "experts"))

    def constant(value):
        return lambda x_TD, *args: torch.full_like(x_TD, value)

    x_TD, nothing = torch.zeros(2, 16), None
    blocks = {
        name: model.hooked(experts=fn, where=site.__eq__)
        for name, fn in [
            ("one", constant(1.0)),
            ("none", lambda *args: None),
            ("two", constant(2.0)),
        ]
    }
    got = []
    for name in blocks:
        blocks[name].__enter__()
        got.append(experts(x_TD, nothing)[0, 0].item())
    assert got == [1, 1, 2]
    blocks["one"].__exit__(None, None, None)
    assert experts(x_TD, nothing)[0, 0] == 2
    blocks["two"].__exit__(None, None, None)
    routing = model.router(site).route(torch.randn(2, 6))
    assert experts(x_TD + 1, routing).equal(type(experts).forward(experts, x_TD + 1, routing))
    assert "forward" in vars(experts)
    blocks["none"].__exit__(None, None, None)
    assert "forward" not in vars(experts)


def test_measuring_inside_a_block_is_refused():
    model = as_adapter(build())
    before = forward(model.model)
    with (
        pytest.raises(ValueError, match=r"has an open block of analysis\.perturbed"),
        perturbed(model, DropTop(1)),
    ):
        measure(model, [Condition(DropTop(1))], SHARD)
    assert not hooks_of(model.model)
    assert forward(model.model).equal(before)


def test_parts_of_a_model_are_refused_inside_a_block():
    """There is no whole forward, and what was announced for the last one is not for them."""
    model = as_adapter(build())
    with perturbed(model, DropTop(1)):
        forward(model.model)
        with pytest.raises(RuntimeError, match=r"nobody announced: .* must run as a whole"):
            clean_routing(model, TOKENS_BL.flip(0))


def test_errors_inside_measure_leave_nothing():
    model = as_adapter(build())
    for p, message in (
        (RandomRouting(), "needs statistics"),
        (DropTop(7), "has only 6 experts"),
        (TopK(7), "has only 6 experts"),
        (ResidualNoise(DropTop(7)), "has only 6 experts"),
    ):
        for reuse in ((), [Condition(p, "layer 0")]):
            with pytest.raises(ValueError, match=message):
                measure(model, [Condition(p, "layer 0")], SHARD, reuse=reuse)
            assert not hooks_of(model.model)


# ---- Ctrl-C at every line

FILES = [cartmoe.interrupt.__file__, adapter.__file__]
FILES += [str(sys.modules[f.__module__].__file__) for f in (perturbed, hook_routers)]


def interrupted_at(number: int, run, look) -> bool:
    """Run `run` with a SIGINT before the line of ours with that number; look(error) while the
    exception is held. Whether there is such a line."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            seen += 1
            if seen == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    tracer, handler = sys.gettrace(), signal.getsignal(signal.SIGINT)
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt as error:
        sys.settrace(tracer)
        look(error)
    except RuntimeError as error:
        if "did not run inside the block" not in str(error):
            raise
    finally:
        sys.settrace(tracer)
    assert signal.getsignal(signal.SIGINT) is handler
    return seen >= number


def came_at_the_door(error: BaseException) -> bool:
    """Whether a Ctrl-C came at the moment that cannot be guarded: in `__exit__` before its `try`
    (where Python itself looks for signals on entry only)."""
    lines = []
    traceback = error.__traceback__
    while traceback:
        lines.append((traceback.tb_frame.f_code, traceback.tb_lineno))
        traceback = traceback.tb_next
    code = cartmoe.interrupt._Restoring.__exit__.__code__
    before = (code.co_firstlineno + 1, code.co_firstlineno + 2)
    return any(c is code and line in before for c, line in lines)


BLOCKS = {
    "perturbed": lambda m: perturbed(m, ResidualNoise(), "stage 0"),
    "hook_routers": lambda m: hook_routers(m.model, lambda *args: None),
    "capture_routing": lambda m: capture_routing(m.model),
    "experts": lambda m: m.hooked(experts=lambda *args: None, where=m.sites()[0].__eq__),
    "output": lambda m: m.hooked(output=lambda *args: None),
    "forward": lambda m: m.hooked(forward=lambda *args: None),
    "watch": lambda m: m.hooked(experts=Watch()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_ctrl_c_at_every_line(name):
    """It comes out, and no hook is left while it is still held, as it is in a notebook; but for
    the first lines of `__exit__`, where the last goes when it is let go of."""
    model = as_adapter(build())
    clean = forward(model.model)

    def run():
        with BLOCKS[name](model):
            if name == "hook_routers":  # one with what runs inside
                forward(model.model)

    reached, interrupted = True, 0
    number, left = 0, []

    def look(error):
        nonlocal interrupted
        interrupted += 1
        if hooks_of(model.model):
            left.append(number)
            assert came_at_the_door(error)

    while reached:
        number += 1
        reached = interrupted_at(number, run, look)
        assert not hooks_of(model.model)
    assert interrupted == number - 1 > 20
    assert len(left) <= 2
    assert forward(model.model).equal(clean)


# ---- Ctrl-C at any time


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True], ids=["let go", "kept"])
def test_fifty_interrupts(keep):
    """A process that measures and perturbs without end; `keep`: what a notebook does, which holds
    the last exception with its traceback."""
    rng = random.Random(7)
    script = Path(__file__).with_name("interrupted.py")
    child = subprocess.Popen(
        [sys.executable, str(script), str(int(keep))], stdout=subprocess.PIPE, text=True
    )
    reports = []
    try:
        for _ in range(50):
            assert child.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.001, 0.25))
            child.send_signal(signal.SIGINT)
            reports.append(json.loads(child.stdout.readline()))
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert reports == [{"hooks": 0, "changed": False}] * 50


def test_searches_are_part_of_it():
    """What the slow test runs, once and without an interrupt."""
    model = as_adapter(build())
    measure(model, [Condition(Worst(1)), Condition(ResidualNoise())], SHARD)
    assert not hooks_of(model.model)
