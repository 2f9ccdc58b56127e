"""Padding and caches in forwards of pretrained models: the same tokens, the same perturbation."""

import pytest
import torch

import analysis as an
from analysis.adapters import adapt
from analysis.adapters.given import given_to
from cartmoe.tokenizers import ByteTokenizer
from studies.families import tiny

CONDITIONS = [
    *(an.GaussianNoise(1.0), an.DropSlots(0.5), an.DropTop(1), an.SwapRanks()),
]
IDS = torch.tensor([5, 6])


LAYERS = ["linear_attention", "full_attention", "linear_attention"]
MODELS = {"olmoe": {}, "qwen3_next": {"layer_types": LAYERS}}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return adapt(tiny(request.param, vocab_size=256, **MODELS[request.param]), ByteTokenizer())


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 250, (n,), generator=generator) for n in (9, 5)]


def padded(rows, side):
    """(tokens, mask), rows of one length."""
    length, tokens, masks = max(map(len, rows)), [], []
    for row in rows:
        pad, at = torch.zeros(length - len(row), dtype=torch.int64), torch.ones_like(row)
        parts = [(row, pad), (at, pad)] if side == "right" else [(pad, row), (pad, at)]
        tokens.append(torch.cat(parts[0]))
        masks.append(torch.cat(parts[1]))
    return torch.stack(tokens), torch.stack(masks)


@torch.no_grad()
def logits_under(model, perturbation, **given):
    with an.perturbed(model, perturbation):
        return model.module(use_cache=False, **given).logits


@pytest.mark.parametrize("perturbation", CONDITIONS, ids=str)
@pytest.mark.parametrize("how", ["left", "right", "right without a mask"])
def test_a_row_is_the_same_beside_longer_ones(model, rows, perturbation, how):
    tokens_BL, mask_BL = padded(rows, how.split()[0])
    given = dict(input_ids=tokens_BL)
    if how != "right without a mask":
        given["attention_mask"] = mask_BL
    if how == "left":
        given["position_ids"] = (mask_BL.cumsum(1) - 1).clamp(min=0)
    together = logits_under(model, perturbation, **given)
    for row, logits, mask in zip(rows, together, mask_BL, strict=True):
        alone = logits_under(model, perturbation, input_ids=row[None])[0]
        torch.testing.assert_close(logits[mask.bool()], alone, rtol=1e-4, atol=1e-4)


def test_padding_decides_as_before(model, rows):
    tokens_BL, mask_BL = padded(rows, "left")
    seen = []

    def watch(x_TD, routing, site, own):
        seen.append(routing)

    def decisions(perturbation):
        seen.clear()
        with torch.no_grad(), an.perturbed(model, perturbation), model.hooked(experts=watch):
            model.module(input_ids=tokens_BL, attention_mask=mask_BL, use_cache=False)
        return list(seen)

    clean, dropped = decisions(an.Identity()), decisions(an.DropTop(1))
    is_pad_T = mask_BL.flatten() == 0
    for was, now in zip(clean[:1], dropped[:1], strict=True):  # behind it the stream is another
        assert torch.equal(was.ids_TK[is_pad_T], now.ids_TK[is_pad_T])
        assert (was.ids_TK[~is_pad_T] != now.ids_TK[~is_pad_T]).any(-1).all()


def test_what_a_forward_is_given(model):
    tokens_BL = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]])
    mask_BL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    given = given_to(model.module, (), dict(input_ids=tokens_BL, attention_mask=mask_BL))
    assert given.position_BL.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert given.real_BL.tolist() == mask_BL.bool().tolist()
    plain = given_to(model.module, (tokens_BL.flip(1),), {})
    assert plain.real_BL is None
    assert plain.surely_BL.tolist() == mask_BL.flip(1).bool().tolist()
    with pytest.raises(ValueError, match="no input_ids"):
        given_to(model.module, (), dict(inputs_embeds=torch.ones(1, 2, 3)))


def generated(model, perturbation, tokens_BL, **how):
    with an.perturbed(model, perturbation, sequence_ids=IDS[: len(tokens_BL)]):
        return model.module.generate(
            tokens_BL, max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True, eos_token_id=None, **how,
        )  # fmt: skip


@pytest.mark.parametrize("perturbation", CONDITIONS, ids=str)
@pytest.mark.parametrize("side", ["none", "left"])
def test_with_a_cache_and_without(model, rows, perturbation, side):
    """Noise by position: decoding sees what a forward of the whole text would."""
    if side == "left":
        tokens_BL, mask_BL = padded(rows, side)
        given = dict(attention_mask=mask_BL)
    else:
        tokens_BL = rows[0][None]
        given = dict(attention_mask=torch.ones_like(tokens_BL))
    cached = generated(model, perturbation, tokens_BL, use_cache=True, **given)
    whole = generated(model, perturbation, tokens_BL, use_cache=False, **given)
    clean = generated(model, an.Identity(), tokens_BL, use_cache=True, **given)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert torch.equal(cached.sequences, whole.sequences)
    assert not torch.equal(cached.logits[0], clean.logits[0])


def test_a_static_cache(model, rows):
    tokens_BL = rows[0][None]
    one = generated(model, an.GaussianNoise(1.0), tokens_BL, cache_implementation="static")
    other = generated(model, an.GaussianNoise(1.0), tokens_BL, use_cache=False)
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_by_default_a_text_keeps_the_id_of_its_prompt(model, rows):
    tokens_BL = rows[0][None]
    how = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    with an.perturbed(model, an.GaussianNoise(1.0)):
        first = model.module.generate(tokens_BL, **how)
        again = model.module.generate(tokens_BL, **how)
    assert torch.equal(first, again)


def test_looking_back_into_a_cache(model, rows):
    with pytest.raises(ValueError, match=r"Lag looks back .* use_cache=False"):
        generated(model, an.Lag(1), rows[0][None], use_cache=True)
    generated(model, an.Lag(1), rows[0][None], use_cache=False)


@torch.no_grad()
def test_a_cache_from_before_the_block(model, rows):
    """Whose rows have no ids."""
    row = rows[0][None]
    cache = model.module(input_ids=row, use_cache=True).past_key_values
    match = "in this block, has 0 rows"
    with pytest.raises(ValueError, match=match), an.perturbed(model, an.DropTop(1)):
        model.module(input_ids=row[:, :1], past_key_values=cache)


@torch.no_grad()
def test_what_was_put_in_a_routers_place_is_noticed(model, rows):
    """As `kernelize` puts it there."""
    gate, given = next(iter(model.seats.values())).router.module, dict(input_ids=rows[0][None])
    own = gate.forward

    def twice():
        model.module(**given, use_cache=False)
        gate.forward = lambda *args, **kwargs: own(*args, **kwargs)
        model.module(**given, use_cache=False)

    with pytest.raises(RuntimeError, match="put in its place"), an.perturbed(model, an.DropTop(1)):
        twice()
    assert "forward" not in vars(gate)


def test_a_block_without_a_forward(model):
    with pytest.raises(RuntimeError, match="did not run inside"), an.perturbed(model, an.DropTop()):
        pass


@pytest.mark.parametrize("perturbation", CONDITIONS, ids=str)
def test_a_static_cache_and_padding(model, rows, perturbation):
    """Whose mask `generate` makes of queries by keys."""
    tokens_BL, mask_BL = padded(rows, "left")
    how = dict(attention_mask=mask_BL)
    one = generated(model, perturbation, tokens_BL, cache_implementation="static", **how)
    other = generated(model, perturbation, tokens_BL, **how)
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_mask_by_position(model, rows):
    tokens_BL, mask_BL = padded(rows, "left")
    named = logits_under(model, an.GaussianNoise(1.0), input_ids=tokens_BL, attention_mask=mask_BL)
    with an.perturbed(model, an.GaussianNoise(1.0)):
        placed = model.module(tokens_BL, mask_BL, use_cache=False).logits
    assert torch.equal(named, placed)


def test_masks_that_tell_no_padding(model):
    tokens_BL = torch.ones(2, 4, dtype=torch.int64)
    apart = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    whole = given_to(model.module, (tokens_BL,), dict(attention_mask=apart))
    assert whole.real_BL is None
    apart[:, :, 2:, :2] = False  # two texts in a row
    for mask in (apart, torch.ones(2, 3), "causal"):
        with pytest.raises(ValueError, match="from which padding cannot be told"):
            given_to(model.module, (tokens_BL,), dict(attention_mask=mask))


@torch.no_grad()
def test_two_caches_and_their_rows(model, rows):
    """Each goes on with the ids of its own rows, also where these change places."""
    one, other = rows[0][None, :6].repeat(2, 1), rows[0][None, 2:8].repeat(2, 1)
    one[1, 0] += 1
    mask = torch.ones(2, 7, dtype=torch.int64)
    noise = an.GaussianNoise(1.0)

    def begun(tokens_BL):
        return model.module(input_ids=tokens_BL, use_cache=True).past_key_values

    def continued(cache, rows=(0, 1)):
        nexts = torch.tensor([[7], [9]])[list(rows)]
        given = dict(input_ids=nexts, past_key_values=cache, attention_mask=mask)
        return model.module(**given).logits

    with an.perturbed(model, noise):
        plain = continued(begun(one))
    with an.perturbed(model, noise):
        cache = begun(one)
        begun(other)
        assert torch.equal(continued(cache), plain)
    if model.family == "olmoe":  # a linear cache has no such method
        with an.perturbed(model, noise):
            cache = begun(one)
            cache.reorder_cache(torch.tensor([1, 0]))
            torch.testing.assert_close(continued(cache, (1, 0)), plain[[1, 0]])
        assert "reorder_cache" not in vars(cache)


@torch.no_grad()
def test_another_number_of_experts_is_noticed(model, rows):
    gate = next(iter(model.seats.values())).router.module
    before = model.identity
    gate.top_k = 1
    try:
        assert model.identity != before
        with pytest.raises(RuntimeError, match="chooses 1 experts where it chose 2"):
            logits_under(model, an.DropTop(1), input_ids=rows[0][None])
    finally:
        gate.top_k = 2
