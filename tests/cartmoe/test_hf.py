"""The compact models in the transformers library: the same logits, and what that library does."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import analysis as an
from analysis.adapters.transformers import TransformersAdapter
from cartmoe import hf
from cartmoe.checkpoint import load, save
from cartmoe.config import FAMILIES, ModelConfig
from cartmoe.distributed import Ranks
from cartmoe.model import LanguageModel
from cartmoe.objective import Objective
from cartmoe.tokenizers import ByteTokenizer, load_tokenizer

SMALL = dict(d_model=16, ffn_width=32, num_layers=3, num_heads=2, num_experts=8)
VARIANTS = {family: dict(family=family) for family in FAMILIES} | {
    "parallel": dict(family="cartesian", composition="parallel"),
    "unshared": dict(family="cartesian", shared_experts=False),
    "sigmoid": dict(family="smoe_share", score="sigmoid"),
    "every_second": dict(family="cartesian", moe_interval=2),
}
CONDITIONS = [
    *(an.DropTop(1), an.GaussianNoise(0.5), an.RandomRouting(), an.DropChosen(1)),
    *(an.TopK(1), an.UniformWeights(1.0)),
]


def native(name, seed=0):
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig.preset("micro", **(SMALL | VARIANTS[name])))
    for parameter in model.parameters():  # larger than at the start of training: routing differs
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def ids(*shape):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "cartesian"
    hf.export("cartesian", folder)
    return folder


# The same model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_native_model(name, tmp_path):
    model = native(name)
    made = hf.from_native(model)
    tokens_BL = ids(2, 24)
    with torch.no_grad():
        expected = model(tokens_BL)
        assert torch.equal(made(tokens_BL).logits, expected)
        made.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(tokens_BL).logits, expected)
        assert torch.equal(hf.to_native(again)(tokens_BL), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_configurations_there_and_back(name, tmp_path):
    config = ModelConfig.preset("micro", **VARIANTS[name])
    made = hf.CartmoeConfig.of(config)
    made.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).native == config
    assert made.hidden_size == config.d_model
    assert made.num_hidden_layers == config.num_layers


def test_a_configuration_of_nothing_is_that_of_micro():
    assert hf.CartmoeConfig().native == ModelConfig.preset("micro")


def test_a_configuration_that_cannot_be():
    with pytest.raises(ValueError, match="family is 'x'; choose one of"):
        hf.CartmoeConfig(family="x")
    with pytest.raises(ValueError, match="num_experts"):
        hf.CartmoeConfig(num_experts_per_tok=99)
    with pytest.raises(ValueError, match="top_k is 1; here it is called num_experts_per_tok"):
        hf.CartmoeConfig(top_k=1)


def test_the_names_of_the_library_are_taken():
    made = hf.CartmoeConfig(hidden_size=32, num_hidden_layers=5, num_experts_per_tok=1)
    assert (made.d_model, made.num_layers, made.native.top_k) == (32, 5, (1, 1))


def test_a_new_model_begins_as_a_native_one_does():
    config = hf.CartmoeConfig(family="cartesian", init_std=0.05)
    torch.manual_seed(0)
    for name, parameter in hf.CartmoeForCausalLM(config).named_parameters():
        if parameter.dim() > 1:
            assert 0.03 < parameter.std() < 0.07, name
        else:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name


# What the library does ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cartesian", "hash", "top_p", "sigmoid"])
def test_a_cache_gives_the_logits_of_the_whole(name):
    made, tokens_BL = hf.from_native(native(name)), ids(2, 12)
    with torch.no_grad():
        expected = made(tokens_BL).logits
        cache, found = None, []
        for part in tokens_BL.split([5, 1, 3, 1, 2], dim=1):
            out = made(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate_with_a_cache_and_without(exported, kind):
    made, tokenizer = (c.from_pretrained(exported) for c in (AutoModelForCausalLM, AutoTokenizer))
    given = tokenizer("def main(", return_tensors="pt")
    how = dict(max_new_tokens=20, do_sample=False)
    whole = made.generate(**given, **how, use_cache=False)
    cache = {"cache_implementation": "static"} if kind == "static" else {}
    assert torch.equal(made.generate(**given, **how, **cache), whole)
    assert tokenizer.decode(whole[0], skip_special_tokens=True).startswith("def main(")


def test_a_static_cache_is_longer_than_what_is_in_it():
    made, tokens_BL = hf.from_native(native("cartesian")), ids(1, 10)
    cache = StaticCache(config=made.config, max_cache_len=32)
    with torch.no_grad():
        expected = made(tokens_BL).logits
        first = made(tokens_BL[:, :7], past_key_values=cache).logits
        rest = made(tokens_BL[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=1e-4, atol=1e-4)


def test_padding_at_the_left_changes_nothing(exported):
    made, tokenizer = (c.from_pretrained(exported) for c in (AutoModelForCausalLM, AutoTokenizer))
    texts = ["import os", "def f(x):\n    return"]
    tokenizer.padding_side = "left"
    how = dict(max_new_tokens=12, do_sample=False)
    both = made.generate(**tokenizer(texts, return_tensors="pt", padding=True), **how)
    for row, text in zip(both, texts, strict=True):
        alone = made.generate(**tokenizer(text, return_tensors="pt"), **how)[0]
        assert torch.equal(row[-len(alone) :], alone)


def test_a_loss_of_labels_with_the_balance_of_the_native_objective():
    model = native("cartesian")
    made, tokens_BL = hf.from_native(model), ids(2, 25)
    loss, (nll, balance, _), _ = Objective(model, 0.01, 0.0, Ranks(0, 1, "cpu"))(tokens_BL)
    inputs = tokens_BL[:, :-1]
    with torch.no_grad():  # the library moves labels by one
        after = {"shift_labels": tokens_BL[:, 1:].contiguous()}
        out = made(inputs, labels=inputs, output_router_logits=True, **after)
        torch.testing.assert_close(out.aux_loss, balance)
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(made(inputs, labels=inputs, **after).loss, nll)


def test_padding_takes_no_part_in_the_balance():
    made, tokens_BL = hf.from_native(native("cartesian")), ids(2, 12)
    longer = torch.cat([tokens_BL, torch.zeros(2, 9, dtype=torch.int64)], 1)
    mask = (torch.arange(21) < 12).long().expand(2, -1)
    with torch.no_grad():
        alone = made(tokens_BL, output_router_logits=True).aux_loss
        padded = made(longer, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(padded, alone)


def test_the_trainer_takes_steps(tmp_path):
    made = hf.from_native(native("cartesian")).train()
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 32)]
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=made, args=arguments, train_dataset=rows)
    assert np.isfinite(trainer.train().training_loss)
    moved = [name for name, tensor in made.state_dict().items() if (tensor != before[name]).any()]
    assert len(moved) == len(before)


def test_hidden_states_and_router_logits_can_be_asked_for():
    made, tokens_BL = hf.from_native(native("cartesian")), ids(2, 6)
    out = made(tokens_BL, output_hidden_states=True, output_router_logits=True)
    assert len(out.hidden_states) == 3 + 1
    assert [logits.shape for logits in out.router_logits] == [(12, 8)] * 6


# Exported, and under study -----------------------------------------------------------------------


def test_an_exported_model_is_the_one_that_it_was(exported):
    model, tokens_BL = an.load("cartesian").model, ids(2, 16)
    with torch.no_grad():
        made = AutoModelForCausalLM.from_pretrained(exported)
        assert torch.equal(made(tokens_BL).logits, model(tokens_BL))


def test_a_text_ends_where_the_next_document_starts(exported):
    made = AutoModelForCausalLM.from_pretrained(exported)
    for config in (made.config, made.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    assert isinstance(AutoModel.from_pretrained(exported), hf.CartmoeModel)


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn 'é'", "", "a\0b", "🜁 ß", " leading", "<|endoftext|> is a word"]
)
def test_the_tokenizer_of_bytes(exported, text):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours = ByteTokenizer()
    found = tokenizer(text).input_ids
    assert found == [ours.bos_id, *ours.encode(text)]
    assert tokenizer.decode(found[1:]) == text.replace("\0", " ")
    everything = bytes(range(1, 256)).decode("latin-1")
    assert tokenizer(everything).input_ids[1:] == [*ours.encode(everything)]


def test_a_trained_tokenizer_goes_with_it(tmp_path):
    words = ["import os", "def main():", "return 0"] * 30
    tokenizer = load_tokenizer("bpe:260", words)
    config = ModelConfig.preset("micro", "smoe", **(SMALL | {"vocab_size": tokenizer.vocab_size}))
    about = {"tokenizer": "bpe:260"}
    save(LanguageModel(config), tmp_path / "model", about, tokenizer_json=tokenizer.json)
    hf.export(tmp_path / "model", tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("import os").input_ids == [tokenizer.bos_id, *tokenizer.encode("import os")]


def test_a_study_of_an_exported_model_gives_the_native_numbers(exported):
    model, made = an.load("cartesian"), an.load(exported, name="cartesian")
    assert isinstance(made, TransformersAdapter)
    assert made.trained_on["corpus"] == "stdlib"
    assert [site.place for site in made.sites()] == [site.place for site in model.sites()]
    docs, same = (
        an.documents({"a": "import os\n" * 9, "b": "def f(x):\n    return x\n" * 4}, m, length=64)
        for m in (model, made)
    )
    assert torch.equal(docs.tokens_SL, same.tokens_SL)
    assert_same_damage(model, made, docs)


ROUTED = [name for name in VARIANTS if name not in ("dense", "hash")]
QUICK = ("cartesian", "top_p", "sigmoid")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ROUTED]
)
def test_the_adapter_gives_the_native_numbers(name):
    model = native(name)
    made = an.adapt(hf.from_native(model), ByteTokenizer(), name=model.config.family)
    assert isinstance(made, TransformersAdapter)
    ours = an.adapt(model, ByteTokenizer())
    docs = an.documents("stdlib", ours, length=32, limit=4, max_tokens_per_document=32)
    assert_same_damage(ours, made, docs)


def assert_same_damage(ours, made, docs):
    """All that is measured, but the size of a change beside the stream, which stands before the
    whole layer there."""
    found, expected = (
        an.sweep(m, docs, CONDITIONS, progress=False).damage(full=True) for m in (made, ours)
    )
    other = ["model", "family", "output_change"]
    near = dict(rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(found.drop(columns=other), expected.drop(columns=other), **near)


def test_overlap_is_that_of_the_native_model():
    model = native("cartesian")
    made = an.adapt(hf.from_native(model), ByteTokenizer(), name="cartesian")
    ours = an.adapt(model, ByteTokenizer())
    docs = an.documents("stdlib", ours, length=32, limit=4, max_tokens_per_document=32)
    metrics = ["cka", "matched_cosine", "router_cosine", "lift"]
    found, expected = (an.measure_overlap(m, docs, metrics, progress=False) for m in (made, ours))
    for table in ("experts", "pairs"):
        pd.testing.assert_frame_equal(
            getattr(found, table).drop(columns="family"),
            getattr(expected, table).drop(columns="family"),
        )
    with pytest.raises(ValueError, match="composite"):
        an.measure_overlap(made, docs, ["composite_cka"], progress=False)


def test_generation_under_a_perturbation(exported):
    made = an.load(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    given = tokenizer("def main(", return_tensors="pt")
    how = dict(max_new_tokens=12, do_sample=False)
    with an.perturbed(made, an.GaussianNoise(2.0)):
        noisy = made.model.generate(**given, **how)
        again = made.model.generate(**given, **how)
    clean = made.model.generate(**given, **how)
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, clean)


def test_a_table_is_refused_as_a_router():
    with pytest.raises(ValueError, match="no linear operation that gives logits"):
        an.adapt(hf.from_native(native("hash")))


def test_what_cannot_be_exported(tmp_path, exported):
    with pytest.raises(FileNotFoundError, match="nothing"):
        hf.export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(FileExistsError, match="cartesian"):
        hf.export("cartesian", exported)
    save(native("smoe"), tmp_path / "silent")  # its tokenizer is not known
    hf.export(tmp_path / "silent", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert load(tmp_path / "silent").config == AutoConfig.from_pretrained(tmp_path / "out").native
