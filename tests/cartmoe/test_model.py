"""The language model around its layers: shapes, causality, steps, initialisation."""

import pytest
import torch
import torch.nn.functional as F

from cartmoe import FAMILIES, LanguageModel
from cartmoe.config import ModelConfig
from cartmoe.routing import Routing

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
TOKENS_BL = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@EVERY_FAMILY
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (2, 5)])
def test_shapes(tiny_model, family, shape):
    model = tiny_model(family)
    tokens_BL = torch.randint(13, shape)
    x_BLD, routings = model.trunk(tokens_BL)
    assert x_BLD.shape == (*shape, 16)
    assert model(tokens_BL).shape == (*shape, 13)
    assert len(routings) == {"dense": 0, "cartesian": 4}.get(family, 2)
    for routing in routings:
        assert isinstance(routing, Routing)
        assert routing.logits_TE.shape == routing.scores_TE.shape == (shape[0] * shape[1], 6)
        assert routing.ids_TK.shape == routing.weights_TK.shape


@EVERY_FAMILY
def test_the_future_does_not_reach_the_past(tiny_model, family):
    model = tiny_model(family)
    changed_BL = TOKENS_BL.clone()
    changed_BL[:, 4:] += 1
    before, after = model(TOKENS_BL), model(changed_BL)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=1e-5, atol=1e-6)
    assert (after[:, 4:] - before[:, 4:]).abs().amax(-1).min() > 1e-3


@EVERY_FAMILY
def test_sequences_of_a_batch_are_apart(tiny_model, family):
    model = tiny_model(family)
    alone = torch.cat([model(row[None]) for row in TOKENS_BL])
    torch.testing.assert_close(model(TOKENS_BL), alone, rtol=1e-5, atol=1e-5)


def test_positions_matter(tiny_model):
    """Without rotary embeddings, what stands before the last token would be a mere set."""
    model = tiny_model("dense", num_layers=1)
    a, b = (model(torch.tensor([row]))[0, -1] for row in ([1, 2, 3, 4], [2, 1, 3, 4]))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in FAMILIES), ("cartesian", dict(composition="parallel"))],
)
def test_steps_in_order_are_the_forward(tiny_model, family, changes):
    model = tiny_model(family, **changes)
    x, routings, routers = None, (), []
    for step in model.trunk.steps():
        x, taken = step.run(x, TOKENS_BL)
        assert len(taken) == len(step.routers)
        routings += taken
        routers += step.routers
    expected_x, expected_routings = model.trunk(TOKENS_BL)
    assert x.equal(expected_x)
    for got, expected in zip(routings, expected_routings, strict=True):
        assert all(map(torch.equal, got, expected))
    assert len({id(router) for router in routers}) == len(routings)


@pytest.mark.parametrize(
    ("family", "changes", "ffn_steps"),
    [
        ("dense", {}, ["ffn_0", "ffn_1", "ffn_2"]),
        ("smoe_share", {}, ["stage_0_0", "ffn_1", "stage_2_0"]),
        ("cartesian", {}, ["stage_0_0", "stage_0_1", "ffn_1", "stage_2_0", "stage_2_1"]),
        ("cartesian", dict(composition="parallel"), ["stage_0_0", "ffn_1", "stage_2_0"]),
        ("cartesian", dict(num_stages=1), ["stage_0_0", "ffn_1", "stage_2_0"]),
    ],
)
def test_names_of_steps(tiny_model, family, changes, ffn_steps):
    names = [step.name for step in tiny_model(family, **changes).trunk.steps()]
    assert [n for n in names if n.startswith(("ffn", "stage"))] == ffn_steps
    assert [n for n in names if n.startswith("attention")] == [f"attention_{i}" for i in range(3)]
    assert (names[0], names[-1]) == ("embed", "norm")


def test_parallel_stages_read_the_same_input(tiny_model):
    """Order of stages matters in a Cartesian layer, and not in its control."""
    for composition, same in [("sequential", False), ("parallel", True)]:
        model = tiny_model(composition=composition, num_layers=1)
        before = model(TOKENS_BL)
        layer = model.trunk.blocks[0].ffn
        layer.stages = torch.nn.ModuleList(reversed(layer.stages))
        assert torch.allclose(model(TOKENS_BL), before, atol=1e-5) == same


@EVERY_FAMILY
def test_initialisation(family):
    config = ModelConfig.preset("nano", family, init_std=0.02)
    model = LanguageModel(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            sampling_error = 0.02 / parameter.numel() ** 0.5
            assert abs(parameter.mean()) < 4 * sampling_error, name
            assert abs(parameter.std() - 0.02) < 4 * sampling_error, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_fresh_model_predicts_almost_uniformly():
    model = LanguageModel(ModelConfig.preset("nano"))
    tokens_BL = torch.randint(256, (2, 16))
    nll_BL = model.losses(tokens_BL, tokens_BL.roll(-1, 1))
    assert nll_BL.mean().item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.05)


def test_hash_tables_are_one(tiny_model):
    def tables(model):
        return [model.trunk.blocks[i].ffn.stages[0].router.gate.table_VE for i in (0, 2)]

    first, second = tables(tiny_model("hash"))
    assert first is second
    assert not first.equal(tables(tiny_model("hash", hash_seed=1))[0])


def test_hash_ignores_what_it_reads(tiny_model):
    _, (first, second) = tiny_model("hash").trunk(TOKENS_BL)
    assert first.ids_TK.equal(second.ids_TK)
    assert first.ids_TK[1].equal(first.ids_TK[3])  # both are token 1


@EVERY_FAMILY
def test_losses_are_those_of_the_logits(tiny_model, family):
    model = tiny_model(family)
    targets_BL = TOKENS_BL.roll(-1, 1)
    targets_BL[:, -1] = -100
    logits_BLV = model(TOKENS_BL)
    expected_BL = F.cross_entropy(logits_BLV.mT, targets_BL, reduction="none")
    nll_BL = model.losses(TOKENS_BL, targets_BL)
    torch.testing.assert_close(nll_BL, expected_BL.detach())
    assert not nll_BL.requires_grad
    x_BLD, _ = model.trunk(TOKENS_BL)
    torch.testing.assert_close(model.mean_loss(x_BLD, targets_BL), nll_BL.sum() / 10)


@EVERY_FAMILY
def test_every_parameter_learns(tiny_model, family):
    model = tiny_model(family)
    tokens_BL = torch.randint(13, (4, 32))
    x_BLD, _ = model.trunk(tokens_BL)
    model.mean_loss(x_BLD, tokens_BL.roll(-1, 1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@EVERY_FAMILY
def test_a_few_steps_of_training_lower_the_loss(tiny_model, family):
    model = tiny_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        x_BLD, _ = model.trunk(TOKENS_BL)
        loss = model.mean_loss(x_BLD, TOKENS_BL.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_bf16_autocast_stays_near_fp32(tiny_model):
    model = tiny_model(init_std=0.1)
    exact = model.losses(TOKENS_BL, TOKENS_BL)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.losses(TOKENS_BL, TOKENS_BL)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)


def test_state_dict_round_trip(tiny_model):
    model, other = tiny_model("cartesian", seed=1), tiny_model("cartesian", seed=2)
    assert not other(TOKENS_BL).equal(model(TOKENS_BL))
    other.load_state_dict(model.state_dict())
    assert other(TOKENS_BL).equal(model(TOKENS_BL))


def test_weights_follow_torchs_generator(tiny_model):
    first, second = tiny_model(seed=3), tiny_model(seed=3)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batches(tiny_model, shape):
    model = tiny_model()
    tokens_BL = torch.zeros(shape, dtype=torch.int64)
    assert model(tokens_BL).shape == (*shape, 13)
    assert model.losses(tokens_BL, tokens_BL).shape == shape
