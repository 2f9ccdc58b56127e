"""Models of which a layer's weights are in memory at a time: the same numbers, to the last bit."""

import json
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import analysis as an
from analysis.adapters.shelf import Shelf
from analysis.adapters.streamed import load_streamed
from analysis.measure import measure
from analysis.measure.batch import Batch
from analysis.measure.bookmarks import Bookmarks, forget_streams
from analysis.measure.calibrate import Calibrating, calibrate
from analysis.perturb import condition_from_text
from cartmoe.data import IGNORE, Sequences
from cartmoe.lock import LOCK
from cartmoe.tokenizers import ByteTokenizer
from tests.analysis.adapters.families import FAMILIES, save_directory

# Of which layers cannot be called again; and one that the library itself loads from no directory.
LEFT_OUT = {"gemma4", "zaya", "mistral4"}
QUICK = {"olmoe", "gpt_oss", "deepseek_v3"}
CONDITIONS = [
    *("DropTop(1)", "DropTop(1), layer 1", "GaussianNoise(0.5)", "RandomRouting", "NoRouted"),
    *("ResidualNoise(of=DropTop(1))", "Lag(1)", "DropChosen(1)", "DropTop(1), replay"),
]


def documents(rows=6, length=12):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 250, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[1, 7:] = IGNORE
    names, sizes = [f"d{i}" for i in range(rows)], torch.full((rows,), length)
    return Sequences(tokens[:, :-1], targets, torch.arange(rows), names, ["x"] * rows, sizes)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(family): a tiny random model as it would be published."""
    made = {}

    def build(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("streamed") / family
            save_directory(folder, family)
            made[family] = folder
        return made[family]

    return build


def both(folder):
    whole = an.load(folder, tokenizer=ByteTokenizer())
    return whole, an.load(folder, tokenizer=ByteTokenizer(), stream=True)


def every():
    chosen = [family for family in FAMILIES if family not in LEFT_OUT]
    return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in chosen]


@pytest.mark.parametrize("family", every())
def test_the_same_cells(family, folder_of):
    whole, streamed = both(folder_of(family))
    conditions, docs = [condition_from_text(text) for text in CONDITIONS], documents()
    stats = [calibrate(model, docs) for model in (whole, streamed)]
    how = dict(batch_size=4, keep_tokens=True)
    expected = measure(whole, conditions, docs, calibration=stats[0], **how)
    before = streamed.shelf.reads
    found = measure(streamed, conditions, docs, calibration=stats[1], **how)
    assert streamed.shelf.reads - before <= 2 * len(streamed.shelf.layers)
    for one, other in zip(found, expected, strict=True):
        for name in ("losses", "routing", "tokens"):
            frames = getattr(one, name), getattr(other, name)
            pd.testing.assert_frame_equal(*frames, check_exact=True)


@pytest.mark.parametrize("family", ["gemma4", "zaya"])
def test_layers_that_cannot_be_called_again_are_refused(family, folder_of):
    with pytest.raises(ValueError, match="cannot be called again by themselves"):
        load_streamed(folder_of(family), ByteTokenizer())


def test_a_sweep_is_that_of_the_whole_model(folder_of):
    whole, streamed = both(folder_of("olmoe"))
    perturbations = [an.DropTop(1), an.GaussianNoise(0.5)]
    how = dict(batch_size=4, progress=False)
    found, expected = (
        an.sweep(model, documents(), perturbations, **how).damage(full=True)
        for model in (streamed, whole)
    )
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_two_layers_are_there_at_most(folder_of):
    _, streamed = both(folder_of("mixtral"))
    measure(streamed, [condition_from_text("DropTop(1)")], documents())
    layers = streamed.model.model.layers
    there = [not any(p.is_meta for p in layer.parameters()) for layer in layers]
    assert sum(there) <= 2


def test_identity_is_that_of_the_directory(folder_of):
    whole, streamed = both(folder_of("olmoe"))
    assert streamed.identity == whole.identity
    assert streamed.streamed
    assert streamed.sites() == whole.sites()


def test_what_is_searched_for_needs_the_whole_model(folder_of):
    _, streamed = both(folder_of("olmoe"))
    with pytest.raises(ValueError, match=r"Worst.*needs the whole model.*load it whole"):
        an.sweep(streamed, documents(), an.Worst(1), controls=False, progress=False)


def test_weights_that_are_missing(folder_of, tmp_path):
    folder = tmp_path / "olmoe"
    save_directory(folder, "olmoe")
    path = folder / "model.safetensors"
    tensors = whole = load_file(path)
    tensors = dict(tensors)
    del tensors[next(name for name in tensors if "layers.1." in name and "q_proj" in name)]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"{folder} has no weights for .*layers\.1"):
        load_streamed(folder, ByteTokenizer())
    for part in ("layers.1.", "embed_tokens", "model.norm", "lm_head"):  # of a partial download
        rest = {name: tensor for name, tensor in whole.items() if part not in name}
        save_file(rest, path, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{folder} has no weights for .*{part}"):
            load_streamed(folder, ByteTokenizer())


def test_files_are_those_that_the_library_reads(folder_of, tmp_path):
    """Whatever else lies there; and the dtype is that of the files where nothing is said."""
    folder = tmp_path / "olmoe"
    save_directory(folder, "olmoe", dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    other = {"lm_head.weight": torch.ones_like(tensors["lm_head.weight"])}
    save_file(other, folder / "zz-old.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "dtype"})
    )
    docs, conditions = documents(), [condition_from_text("DropTop(1)")]
    one, other = (measure(model, conditions, docs)[1] for model in both(folder))
    pd.testing.assert_frame_equal(one.losses, other.losses, check_exact=True)
    half = {name: t for name, t in tensors.items() if "layers.0" in name}
    rest = {name: t for name, t in tensors.items() if "layers.0" not in name}
    save_file(half, folder / "a.safetensors", {"format": "pt"})
    save_file(rest, folder / "b.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        load_streamed(folder, ByteTokenizer())
    files = dict.fromkeys(half, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    again = measure(load_streamed(folder, ByteTokenizer()), conditions, docs)[1]
    pd.testing.assert_frame_equal(again.losses, one.losses, check_exact=True)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        load_streamed(folder, ByteTokenizer())


def test_an_adapter_is_not_forgotten(folder_of, tmp_path):
    folder = tmp_path / "olmoe"
    save_directory(folder, "olmoe")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter"):
        load_streamed(folder, ByteTokenizer())


def test_a_layer_that_could_not_be_read_is_read_again(folder_of, monkeypatch):
    whole, streamed = both(folder_of("olmoe"))
    own, broken = Shelf._read, [True]

    def read(self, group):
        if group.endswith("layers.1") and broken[0]:
            raise OSError("the disk is away")
        own(self, group)

    monkeypatch.setattr(Shelf, "_read", read)
    conditions, docs = [condition_from_text("DropTop(1)")], documents()
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is away"):
            measure(streamed, conditions, docs)
    broken[0] = False
    found, expected = (measure(model, conditions, docs)[1] for model in (streamed, whole))
    pd.testing.assert_frame_equal(found.losses, expected.losses, check_exact=True)


def test_damaged_behind_the_last_layer(folder_of, tmp_path, monkeypatch):
    """What needs a calibration gets it again."""
    whole, streamed = both(folder_of("olmoe"))
    conditions, docs = [condition_from_text("RandomRouting")], documents()
    expected = measure(whole, conditions, docs, calibration=calibrate(whole, docs), batch_size=4)
    monkeypatch.setattr(Batch, "end", lambda self: 1 / 0)
    how = dict(batch_size=4, streams=tmp_path)
    with pytest.raises(ZeroDivisionError):
        measure(streamed, conditions, docs, calibration=Calibrating(streamed, docs), **how)
    monkeypatch.undo()
    (path, _) = sorted(tmp_path.glob("*/batch*"))
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged.*made again"):
        found = measure(streamed, conditions, docs, calibration=Calibrating(streamed, docs), **how)
    pd.testing.assert_frame_equal(found[1].losses, expected[1].losses, check_exact=True)


def test_bookmarks_are_of_what_changes_numbers(tmp_path):
    """Precision, and whatever the caller says."""
    folders = [Bookmarks(tmp_path, {"a": 1}).folder, Bookmarks(tmp_path, {"a": 2}).folder]
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            folders.append(Bookmarks(tmp_path, {"a": 1}).folder)
    assert len({*folders}) == 4


def test_a_sweep_of_two_models_goes_on_with_the_second(folder_of, tmp_path, monkeypatch):
    models = [load_streamed(folder_of(f), ByteTokenizer(), name=f) for f in ("olmoe", "mixtral")]
    how = dict(batch_size=4, progress=False, controls=False, streams=tmp_path)
    own = Bookmarks.write

    def stopping(self, *args):
        own(self, *args)
        if models[1].identity in self.identity:
            raise Stop

    monkeypatch.setattr(Bookmarks, "write", stopping)
    with pytest.raises(Stop):
        an.sweep(models, documents(), an.DropTop(1), **how)
    monkeypatch.undo()
    before = models[0].shelf.reads
    an.sweep(models, documents(), an.DropTop(1), **how)
    assert models[0].shelf.reads == before


def test_a_perturbation_of_the_whole_clean_pass_is_refused(folder_of):
    @dataclass(frozen=True)
    class Mine(an.Perturbation):
        expects = "weights"

        def prepare(self, model, clean, condition):
            return an.Identity()

    _, streamed = both(folder_of("olmoe"))
    with pytest.raises(ValueError, match=r"Mine.*needs the whole model at once"):
        an.sweep(streamed, documents(), Mine(), controls=False, progress=False)


def packed(folder, dtype):
    """A gpt-oss as it is published: experts in MXFP4, four bits a number and a scale for 32."""
    shape = dict(hidden_size=64, intermediate_size=64, num_local_experts=4, num_hidden_layers=2)
    save_directory(folder, "gpt_oss", dtype=dtype, **shape)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        of_blocks, of_scales = (experts, rows, width // 32, 16), (experts, rows, width // 32)
        blocks = torch.randint(0, 256, of_blocks, generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, of_scales, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_are_dequantized(dtype, tmp_path):
    whole, streamed = both(packed(tmp_path / "packed", dtype))
    conditions, docs = [condition_from_text(text) for text in CONDITIONS], documents()
    cells = [
        measure(m, conditions, docs, calibration=calibrate(m, docs)) for m in (whole, streamed)
    ]
    for one, other in zip(*cells, strict=True):
        pd.testing.assert_frame_equal(one.losses, other.losses, check_exact=True)
    streamed.shelf.need(streamed.shelf.layers[0])
    assert streamed.model.model.layers[0].mlp.experts.down_proj.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("family", ["deepseek_v3", "olmoe"])
def test_in_half_precision_the_same(family, tmp_path):
    """What a family keeps in fp32 stays so."""
    save_directory(tmp_path / family, family, dtype="bfloat16")
    whole, streamed = both(tmp_path / family)
    docs, conditions = documents(), [condition_from_text("DropTop(1)")]
    one, other = (measure(model, conditions, docs)[1] for model in (whole, streamed))
    pd.testing.assert_frame_equal(one.losses, other.losses, check_exact=True)
    dtypes = [
        {n: p.dtype for n, p in model.model.named_parameters()} for model in (whole, streamed)
    ]
    assert torch.bfloat16 in dtypes[0].values()
    state = [{n: b.dtype for n, b in model.model.named_buffers()} for model in (whole, streamed)]
    assert state[0] == state[1]


def test_what_cannot_be_streamed(folder_of, tmp_path):
    folder = tmp_path / "quantized"
    save_directory(folder, "olmoe")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized; load it whole"):
        an.load(folder, tokenizer=ByteTokenizer(), stream=True)
    with pytest.raises(ValueError, match="stream is for models of the transformers library"):
        an.load("smoe", stream=True)


class Stop(Exception):
    """Somebody stops the measurement."""


@pytest.mark.parametrize("family", ["olmoe", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_streams_on_the_disk_go_on_where_they_were(family, folder_of, tmp_path, monkeypatch):
    """Stopped behind any segment of any batch, it reads no layer before that one again, and gives
    the same cells to the last bit."""
    whole, _ = both(folder_of(family))
    conditions, docs = [condition_from_text(text) for text in CONDITIONS], documents()
    how = dict(batch_size=4, keep_tokens=True)
    expected = measure(whole, conditions, docs, calibration=calibrate(whole, docs), **how)
    writes = [0]

    def stopping(self, *args):
        own(self, *args)
        writes[0] += 1
        if writes[0] == 1:
            raise Stop

    own = Bookmarks.write
    how |= dict(streams=tmp_path)
    monkeypatch.setattr(Bookmarks, "write", stopping)
    for _ in range(100):
        writes[0], (_, streamed) = 0, both(folder_of(family))
        before = streamed.shelf.reads
        try:
            found = measure(
                streamed, conditions, docs, calibration=Calibrating(streamed, docs), **how
            )
            break
        except Stop:
            assert streamed.shelf.reads - before <= 2  # its own and the next one
    assert streamed.shelf.reads - before <= 2
    for one, other in zip(found, expected, strict=True):
        for name in ("losses", "routing", "tokens"):
            frames = getattr(one, name), getattr(other, name)
            pd.testing.assert_frame_equal(*frames, check_exact=True)
    forget_streams(tmp_path, model=streamed.identity)
    assert not [*tmp_path.iterdir()]


def test_damaged_streams_are_made_again(folder_of, tmp_path, monkeypatch):
    whole, streamed = both(folder_of("olmoe"))
    conditions, docs = [condition_from_text("GaussianNoise(0.5)")], documents()
    expected = measure(whole, conditions, docs, batch_size=4)
    monkeypatch.setattr(Batch, "end", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(streamed, conditions, docs, batch_size=4, streams=tmp_path)
    monkeypatch.undo()
    (path, _) = sorted(tmp_path.glob("*/batch*"))
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 3, len(data) // 2):
        data[i] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged.*made again"):
        found = measure(streamed, conditions, docs, batch_size=4, streams=tmp_path)
    for one, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one.losses, other.losses, check_exact=True)


def test_streams_of_other_measurements_are_left_alone(folder_of, tmp_path):
    """Two sweeps in one folder, of other conditions and documents."""
    whole, streamed = both(folder_of("olmoe"))
    how = dict(batch_size=4, progress=False, controls=False)
    for perturbation in (an.DropTop(1), an.GaussianNoise(0.5)):
        for docs in (documents(), documents(rows=3)):
            found = an.sweep(streamed, docs, perturbation, streams=tmp_path, **how)
            expected = an.sweep(whole, docs, perturbation, **how)
            pd.testing.assert_frame_equal(found.losses, expected.losses, check_exact=True)
    assert not [path for path in tmp_path.iterdir() if path.name != LOCK]


def test_streams_are_for_streamed_models(folder_of, tmp_path):
    whole, streamed = both(folder_of("olmoe"))
    with pytest.raises(ValueError, match=r"streams is for models.*stream=True"):
        an.sweep(whole, documents(), an.DropTop(1), streams=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        an.sweep(streamed, documents(), an.DropTop(1), streams=tmp_path / "file")


def test_what_another_sweep_has_begun_is_kept(folder_of, tmp_path, monkeypatch):
    _, streamed = both(folder_of("olmoe"))
    how = dict(batch_size=4, progress=False, controls=False, streams=tmp_path)
    monkeypatch.setattr(Batch, "end", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        an.sweep(streamed, documents(), an.DropTop(1), **how)
    monkeypatch.undo()
    begun = {*tmp_path.glob("*/batch*")}
    an.sweep(streamed, documents(), an.GaussianNoise(0.5), **how)
    assert begun == {*tmp_path.glob("*/batch*")} != set()
