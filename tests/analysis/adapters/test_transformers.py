"""Pretrained families, each as a tiny random model of its own config class: exact, or refused."""

import copy
import json
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import analysis as an
from analysis.adapters import adapt, steps
from analysis.adapters.running import run
from analysis.adapters.seat import Functions
from analysis.perturb import Condition
from cartmoe.tokenizers import ByteTokenizer
from studies.families import tiny
from tests.analysis.adapters.families import FAMILIES, NOT_EXPERTS, save_directory

QUICK = {"olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "laguna", "zaya", "gemma4"}


def every(but=()):
    chosen = [family for family in FAMILIES if family not in but]
    return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in chosen]


EVERY = every()


@pytest.fixture(scope="module")
def adapted():
    """adapted(family): each made once."""
    made = {}

    def build(family):
        if family not in made:
            made[family] = adapt(tiny(family, vocab_size=256), ByteTokenizer())
        return made[family]

    return build


def tokens_of(rows=2, length=9):
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_of(model, tokens_BL):
    with torch.no_grad():
        return model.model(input_ids=tokens_BL, use_cache=False).logits


def decisions_under(model, perturbation, tokens_BL):
    """(clean, perturbed) decisions, site by site."""
    with torch.no_grad():
        clean = run(model.segments(), tokens_BL).decisions
        taken = []
        with an.perturbed(model, perturbation), ExitStack() as stack:
            for seat in model.seats.values():
                stack.enter_context(seat.taken(Functions(taken=taken)))
            logits = logits_of(model, tokens_BL)
    return clean, taken, logits


@pytest.mark.parametrize("family", EVERY)
def test_nothing_is_changed_by_watching(family, adapted):
    model, tokens_BL = adapted(family), tokens_of()
    plain = logits_of(model, tokens_BL)
    with an.perturbed(model, an.Identity()):
        watched = logits_of(model, tokens_BL)
    assert torch.equal(plain, watched)
    assert torch.equal(plain, logits_of(model, tokens_BL))
    left = [name for name, part in model.model.named_modules() if "forward" in vars(part)]
    assert left == []
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.model.modules())


@pytest.mark.parametrize("family", EVERY)
def test_the_first_choice_is_dropped_at_every_site(family, adapted):
    model, tokens_BL = adapted(family), tokens_of()
    clean, taken, logits = decisions_under(model, an.DropTop(1), tokens_BL)
    assert len(taken) == len(model.sites()) > 0
    first_T1 = clean[0].logits_TE.argmax(-1, keepdim=True)  # of later sites the stream is another
    assert not ((taken[0].ids_TK == first_T1) & (taken[0].weights_TK != 0)).any()
    for was, now in zip(clean, taken, strict=True):
        assert now.logits_TE.isneginf().sum() == len(was.ids_TK)
        assert not now.logits_TE.gather(-1, now.ids_TK)[now.weights_TK != 0].isneginf().any()
    assert not torch.equal(logits, logits_of(model, tokens_BL))


@pytest.mark.parametrize("family", EVERY)
def test_outputs_of_single_experts_sum_to_the_whole(family, adapted):
    model, flows = adapted(family), {}

    def watch(x_TD, routing, site, own):
        flows[site] = x_TD, routing, own(x_TD, routing)
        return flows[site][2]

    with torch.no_grad(), model.hooked(experts=watch):
        logits_of(model, tokens_of())
    for site, (x_TD, routing, whole_TD) in flows.items():
        outputs_ETD = model.expert_outputs(site, x_TD)
        rows = torch.arange(len(x_TD))[:, None]
        chosen_TKD = outputs_ETD[routing.ids_TK, rows]
        summed_TD = (routing.weights_TK[..., None] * chosen_TKD).sum(1)
        torch.testing.assert_close(summed_TD, whole_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", every(but=NOT_EXPERTS))
def test_a_dropped_expert_is_as_if_it_were_cut_out(family, adapted):
    model, tokens_BL, e = adapted(family), tokens_of(), 2
    with an.perturbed(model, an.DropExperts(ids=(e,))):
        dropped = logits_of(model, tokens_BL)
    cut = copy.deepcopy(model.model)
    for seat in model.seats.values():
        router, experts = cut.get_submodule(seat.site.name), cut.get_submodule(name_of(model, seat))
        block = cut.get_submodule(name_of(model, seat).rpartition(".")[0])  # may hold a bias
        for part in (*router.modules(), *experts.modules(), block):
            without(part, seat.site.num_experts, e)
    with torch.no_grad():
        expected = cut(input_ids=tokens_BL, use_cache=False).logits
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-4)


def name_of(model, seat):
    return next(name for name, part in model.model.named_modules() if part is seat.experts)


def without(part, num_experts, e):
    """The module's own tensors of so many experts, without one of them."""
    keep = torch.tensor([i for i in range(num_experts) if i != e])
    for name, tensor in (part._parameters | part._buffers).items():
        if tensor is not None and num_experts in tensor.shape:
            cut = tensor.data.index_select(tensor.shape.index(num_experts), keep)
            delattr(part, name)
            setattr(part, name, torch.nn.Parameter(cut, requires_grad=False))
    for name in ("num_experts", "out_features", "num_local_experts"):
        if getattr(part, name, None) == num_experts:
            setattr(part, name, num_experts - 1)


@pytest.mark.parametrize("family", EVERY)
def test_layer_by_layer_is_the_whole_forward(family, adapted):
    """Of a condition at the last site, from the clean stream before it."""
    model, tokens_BL = adapted(family), tokens_of()
    last = model.sites()[-1]
    with an.perturbed(model, an.DropTop(1), where=last.__eq__):
        whole = logits_of(model, tokens_BL)
    with torch.no_grad():
        states = [after for _, _, after in steps(model.segments(), run([], tokens_BL))]
        number = next(i for i, s in enumerate(model.segments()) if last in s.sites)
        start = states[number - 1] if number else run([], tokens_BL)
        fired = []

        def drop(routing, router, site, x_TD):
            fired.append(site)
            top_T1 = routing.logits_TE.argmax(-1, keepdim=True)
            return router.route(routing.logits_TE.scatter(-1, top_T1, -torch.inf))

        with model.hooked(router=drop, where=last.__eq__):
            state = run(model.segments()[number:], start)
        logits_TV = model.logits(state.hidden_BLD.flatten(0, 1))
    assert fired == [last]
    assert torch.equal(logits_TV.view(whole.shape), whole.float())


CONDITIONS = [
    *(an.DropTop(1), an.TopK(1), an.UniformWeights(1.0), an.Lag(1), an.GaussianNoise(0.5)),
    *(an.DropSlots(0.5), an.SwapRanks(), an.RandomRouting(), an.ResidualNoise(an.DropTop(1))),
    *(Condition(an.DropTop(1), effect=e) for e in ("selection", "weights", "no_refill")),
    *(Condition(an.DropTop(1), point="scores"), Condition(an.DropTop(1), downstream="replay")),
    an.Worst(1),
]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "gemma4"])
def test_a_sweep(family, adapted):
    model = adapted(family)
    docs = an.documents("stdlib", model, length=24, limit=3, max_tokens_per_document=48)
    found = an.sweep(model, docs, CONDITIONS, progress=False).damage(full=True)
    assert found.delta_nats.notna().all()
    same = found.set_index("label")
    assert same.delta_nats["Identity"] == 0
    assert (same.mass_moved[["DropTop(1)", "RandomRouting(1)", "GaussianNoise(0.5)"]] > 0.05).all()
    assert same.flips["DropTop(1)"] == pytest.approx(0.5)  # one of two


def test_another_forward_of_an_instance_comes_back():
    """As accelerate has them."""
    model = adapt(tiny("olmoe", vocab_size=256), ByteTokenizer())
    plain, calls = logits_of(model, tokens_of()), []
    for seat in model.seats.values():
        for part in (seat.router.module, seat.experts):

            def forward(*args, part=part, own=part.forward, **kwargs):
                calls.append(part)
                return own(*args, **kwargs)

            part.forward = forward
    before = [vars(part).get("forward") for part in model.model.modules()]
    with an.perturbed(model, an.Identity()):
        assert torch.equal(logits_of(model, tokens_of()), plain)
    assert len(calls) == 6
    assert [vars(part).get("forward") for part in model.model.modules()] == before


def test_changed_weights_are_seen_on_the_same_tokens():
    model, tokens_BL = adapt(tiny("olmoe", vocab_size=256), ByteTokenizer()), tokens_of()
    with torch.no_grad():
        before = run(model.segments(), tokens_BL).hidden_BLD
        identity = model.identity
        model.model.get_input_embeddings().weight.mul_(1.5)
        after = run(model.segments(), tokens_BL).hidden_BLD
        body = model.body.module(input_ids=tokens_BL, use_cache=False).last_hidden_state
    assert model.identity != identity
    assert not torch.equal(after, before)
    assert torch.equal(after, body)


@pytest.mark.parametrize("family", EVERY)
def test_its_identity(family, adapted):
    assert len(adapted(family).identity) == 64


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "granitemoe", "gpt_oss"])
def test_weights_of_experts(family, adapted):
    """They make the outputs."""
    model = adapted(family)
    site = model.sites()[0]
    gate_EFD, up_EFD, down_EDF = model.expert_weights(site)
    x_TD = torch.randn(5, down_EDF.shape[1])
    experts = model.seats[site].experts
    for e, output_TD in enumerate(model.expert_outputs(site, x_TD)):
        gate, up = F.linear(x_TD, gate_EFD[e]), F.linear(x_TD, up_EFD[e])
        if family == "gpt_oss":
            bias = experts.gate_up_proj_bias[e]
            gate, up = (gate + bias[::2]).clamp(max=7), (up + bias[1::2]).clamp(-7, 7)
            made = F.linear((up + 1) * gate * (1.702 * gate).sigmoid(), down_EDF[e])
            made = made + experts.down_proj_bias[e]
        else:
            made = F.linear(F.silu(gate) * up, down_EDF[e])
        torch.testing.assert_close(made, output_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_in_bf16_it_is_attached_all_the_same(family):
    """Rounding is no reason to refuse it."""
    model = adapt(tiny(family).bfloat16())
    assert all(model.router(site).scored for site in model.sites())
    assert (len(model.segments()) > 2) == (family not in ("zaya", "gemma4"))


def test_a_model_in_another_dtype():
    model = adapt(tiny("olmoe", vocab_size=256).bfloat16(), ByteTokenizer())
    docs = an.documents("stdlib", model, length=24, limit=2, max_tokens_per_document=24)
    found = an.sweep(model, docs, [an.DropTop(1)], progress=False).damage(full=True)
    assert found.set_index("label").delta_nats["Identity"] == 0


def test_overlap(adapted):
    model = adapted("olmoe")
    docs = an.documents("stdlib", model, length=24, limit=3, max_tokens_per_document=48)
    metrics = ["cka", "lift", "matched_cosine", "router_cosine"]
    found = an.measure_overlap(model, docs, metrics, progress=False)
    assert set(found.pairs.metric) == set(metrics)


def test_a_directory(tmp_path):
    folder = tmp_path / "mine"
    save_directory(folder, "olmoe")
    model = an.load(folder)
    assert (model.name, model.family, len(model.sites())) == ("mine", "olmoe", 3)
    text = tmp_path / "text.txt"
    text.write_text("a text, and another text. " * 20)
    docs = an.documents(text, model, length=24)
    assert docs.tokens_SL[0, 0] == model.tokenizer.bos_id == 0
    clean = an.sweep(model, docs, [an.DropTop(1)], progress=False).clean()
    assert clean.bits_per_byte.notna().all()


def test_a_directory_without_a_tokenizer(tmp_path):
    tiny("olmoe").save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        an.load(tmp_path / "mine")


def test_what_there_is_not(tmp_path):
    with pytest.raises(FileNotFoundError, match="none is fetched"):
        an.load("allenai/OLMoE-1B-7B-0924")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer"):
        an.load(tmp_path)
    with pytest.raises(ValueError, match="has no table of embeddings"):
        adapt(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("changed", ["gate", "layers", "shape"])
def test_weights_that_are_absent_are_not_made_up(tmp_path, changed):
    """The library fills them with random numbers."""
    save_directory(tmp_path / "mine", "olmoe")
    file, config = tmp_path / "mine" / "model.safetensors", tmp_path / "mine" / "config.json"
    tensors = load_file(file)
    if changed == "gate":
        del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, file, {"format": "pt"})
    said = {"layers": {"num_hidden_layers": 4}, "shape": {"num_experts": 8}}.get(changed, {})
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    with pytest.raises(
        ValueError, match=r"has no weights, or of another shape, for|mismatched_sizes"
    ):
        an.load(tmp_path / "mine")


def test_directories_of_neither_kind(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint of this project, and no model"):
        an.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no checkpoint of this project, and no model"):
        an.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="olmoe_tuned come with the project"):
        an.load("olmo")
