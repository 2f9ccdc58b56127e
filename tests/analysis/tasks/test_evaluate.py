"""Tasks of lm-eval: its own numbers without a perturbation, and the same answers however asked."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import analysis as an
from analysis.measure import Decoder, conditions_of
from analysis.tasks.scores import Question, scores
from cartmoe import hf
from tests.analysis.adapters.families import save_directory

TASKS = ["tiny_choice", "tiny_likelihood", "tiny_generation"]
NOISY = [an.DropTop(1), an.GaussianNoise(1.0), an.RandomRouting()]


@pytest.fixture(scope="module")
def model():
    return an.load("cartesian")


@pytest.fixture(scope="module")
def found(model, task_folder):
    return an.evaluate(model, TASKS, NOISY, include_path=task_folder, progress=False)


def rows_of(results, **wanted):
    rows = results.samples
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    return rows


def logged_by_lm_eval(folder, **options):
    tokenizer = hf.tokenizer_of("cartesian")
    options |= dict(tokenizer=tokenizer, batch_size=4, max_length=256)
    wrapped = HFLM(hf.from_checkpoint("cartesian"), **options)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    how = dict(task_manager=manager, log_samples=True, bootstrap_iters=0)
    return simple_evaluate(wrapped, tasks=TASKS, **how)["samples"]


def test_the_clean_answers_are_those_of_lm_eval(found, task_folder):
    logged = logged_by_lm_eval(task_folder)
    clean = rows_of(found, condition="clean")
    for task, metric, name in [
        ("tiny_choice", "acc", "acc"),
        ("tiny_generation", "exact_match", "exact_match"),
    ]:
        values = clean[(clean.task == task) & (clean.metric == name)].value
        assert values.tolist() == [float(sample[metric]) for sample in logged[task]]
    values = clean[clean.metric == "nats per byte"].value
    # With what starts a text there, it has a probability, too.
    without = logged_by_lm_eval(task_folder, add_bos_token=False)
    expected = [-sample["byte_perplexity"][0] for sample in without["tiny_likelihood"]]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    right = clean[(clean.task == "tiny_choice") & (clean.metric == "answer nats")].value
    expected = [-s["filtered_resps"][s["target"]][0] for s in logged["tiny_choice"]]
    np.testing.assert_allclose(right, expected, rtol=1e-4)
    assert clean[clean.metric == "acc"].value.mean() > 0.9


@pytest.mark.parametrize(
    "name", ["hash", "olmoe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("smoe", "top_p"))]
)
def test_other_models(name, task_folder):
    made = an.evaluate(
        an.load(name), TASKS, [an.DropTop(1)], include_path=task_folder, limit=4, progress=False
    )
    table = made.differences()
    assert set(table.task) == set(TASKS)
    assert (table.num_documents == 4).all()
    nats = table[table.metric == "nats per byte"].iloc[0]
    assert nats.difference > 0.1


def test_the_batch_size_changes_no_answer(model, task_folder):
    how = dict(include_path=task_folder, progress=False, limit=4)
    one, eight = (
        an.evaluate(model, TASKS, NOISY, batch_size=size, **how).samples for size in (1, 8)
    )
    pd.testing.assert_frame_equal(one, eight, rtol=1e-4, atol=1e-4)


def test_answers_to_one_question_meet_the_same_noise(model):
    """The tokens before the answers are routed alike, so that answers can be compared."""
    (noisy,) = conditions_of(an.GaussianNoise(1.0))
    start = model.tokenizer.encode("import os\nimport ").tolist()
    ends = [model.tokenizer.encode(text).tolist() for text in ("sys", "sys", "x")]
    same = [Question((*start, *end), len(end), 7, "q") for end in ends]
    other = same[0]._replace(sequence_id=8)
    first, again, _, apart = scores(model, [*same, other], [noisy], None)[noisy]
    assert first == again
    assert first.log_likelihood != apart.log_likelihood


def test_a_likelihood_is_that_of_a_forward_under_the_perturbation(model):
    condition, *_ = conditions_of(an.DropTop(1))
    start, end = (model.tokenizer.encode(text).tolist() for text in ("import ", "sys"))
    both = torch.tensor([start + end])
    with an.perturbed(model, an.DropTop(1)), torch.no_grad():
        log_p = model.model(both)[0, len(start) - 1 : -1].log_softmax(-1)
    expected = log_p.gather(-1, torch.tensor(end)[:, None]).sum().item()
    greedy = log_p.argmax(-1).tolist() == end
    question = Question((*start, *end), len(end), 0, "q")
    score = scores(model, [question], [condition], None)[condition][0]
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert score.greedy is greedy


def test_continuations_are_those_of_generate(task_folder, tmp_path):
    """By the transformers library's own loop, with a cache, under the same noise-free condition."""
    hf.export("cartesian", tmp_path / "hf")
    made = an.load(tmp_path / "hf")
    text = "def main("
    ids = made.tokenizer.encode(text)[None]
    how = dict(max_new_tokens=24, do_sample=False)
    with an.perturbed(made, an.DropTop(1)):
        expected = made.model.generate(torch.tensor(ids), **how)[0, ids.shape[1] :]
    batch = an.documents({"text": text + " " * 30}, made, length=ids.shape[1] + 1)[:1]
    batch.tokens_SL[0, : ids.shape[1]] = torch.tensor(ids)
    (condition,) = conditions_of(an.DropTop(1))
    decoder = Decoder(made, batch, ids.shape[1], 24, None)
    assert decoder.text(condition, torch.zeros(1, 0, dtype=torch.int64))[0].tolist() == (
        expected.tolist() + [0] * (24 - len(expected))
    )


def test_the_generators_of_the_caller_go_on(model, task_folder):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    how = dict(include_path=task_folder, limit=2, progress=False)
    an.evaluate(model, "tiny_choice", an.DropTop(1), **how)
    after = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    assert after == (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002


def test_several_models_in_one_table(model, task_folder):
    how = dict(include_path=task_folder, limit=3, progress=False)
    both = an.evaluate({"a": model, "b": an.load("olmoe")}, "tiny_choice", an.DropTop(1), **how)
    assert both.table().model.tolist() == ["a", "a", "b", "b"]
    alone = an.evaluate({"b": an.load("olmoe")}, "tiny_choice", an.DropTop(1), **how)
    rows = both.samples[both.samples.model == "b"].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, alone.samples)


def test_what_is_shown(found):
    assert repr(found).startswith("TaskResults of cartesian in tiny_choice, tiny_likelihood")
    assert "DropTop(1)" in found._repr_html_()
    table = found.table()
    assert table.label.tolist() == ["clean", "DropTop(1)", "GaussianNoise(1)", "RandomRouting(1)"]
    assert {"tiny_choice", "tiny_choice difference", "tiny_choice low"} <= set(table)
    nats = found.table("nats per byte")
    assert (nats["tiny_likelihood difference"][1:] > 0).all()
    with pytest.raises(ValueError, match="metric is 'f1'; choose one of 'acc'"):
        found.table("f1")


@pytest.mark.parametrize(
    ("tasks", "options", "said"),
    [
        ("tiny_choise", {}, "tiny_choise.*did you mean tiny_choice"),
        ("tiny_sampled", {}, "tiny_sampled samples its texts"),
        ("tiny_choice", {"limit": 0}, "limit is 0"),
        ("tiny_choice", {"batch_size": 0}, "batch_size is 0"),
        ("tiny_generation", {"max_length": 20}, "max_length is 20.*writes 24"),
        ([], {}, "tasks is empty"),
    ],
)
def test_what_cannot_be_asked(model, task_folder, tasks, options, said):
    how = dict(include_path=task_folder, progress=False) | options
    with pytest.raises(ValueError, match=said):
        an.evaluate(model, tasks, an.DropTop(1), **how)


def test_a_model_without_a_tokenizer(task_folder):
    bare = an.adapt(an.load("smoe").model)
    with pytest.raises(ValueError, match="no tokenizer"):
        an.evaluate(bare, "tiny_choice", an.DropTop(1), include_path=task_folder)


def test_a_layer_at_a_time_the_same(task_folder, tmp_path):
    """Of a model that is larger than memory: all kinds of tasks."""
    save_directory(tmp_path / "olmoe", "olmoe")
    how = dict(include_path=task_folder, limit=4, progress=False)
    one, other = (
        an.evaluate(an.load(tmp_path / "olmoe", stream=stream), TASKS, an.DropTop(1), **how).samples
        for stream in (False, True)
    )
    pd.testing.assert_frame_equal(one, other, check_exact=True)
