"""Checkpoints: what is saved comes back, and what is damaged does not."""

import errno
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cartmoe import FAMILIES, checkpoint, folders, load, save
from cartmoe.checkpoint import (
    CheckpointError,
    checkpoint_sha256,
    import_reference,
    newest,
    read_config,
    read_meta,
    read_optimizer,
    read_tokenizer,
    run_checkpoints,
    step_folder,
)
from cartmoe.files import temporary
from cartmoe.hooks import router_sites

GOLDENS = Path(__file__).parents[1] / "goldens"


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A checkpoint with every kind of file."""
    folder = tmp_path / "saved"
    state = {"head.weight/exp_avg": torch.randn(3)}
    save(tiny_model(), folder, {"step": 3}, tokenizer_json="{}", optimizer=state)
    return folder


FILES = [
    "config.json",
    "manifest.json",
    "meta.json",
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tiny_model, tmp_path):
    model = tiny_model(family)
    save(model, tmp_path / "a")
    before = torch.random.get_rng_state()
    loaded = load(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)  # loading draws no numbers
    assert loaded.config == model.config == read_config(tmp_path / "a")
    assert_same_state(loaded, model)
    assert all(p.requires_grad for p in loaded.parameters())
    tokens = torch.randint(13, (2, 8))
    assert torch.equal(loaded(tokens), model(tokens))


def test_the_hash_table_is_stored_once_and_stays_shared(tiny_model, tmp_path):
    model = tiny_model("hash", num_layers=5)
    tables = [r.gate.table_VE for r in router_sites(model).values()]
    tables[0].add_(1)  # not that of the configured seed
    save(model, tmp_path / "a")
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert sum(name.endswith("table_VE") for name in file.keys()) == 1  # noqa: SIM118
    gates = [r.gate for r in router_sites(load(tmp_path / "a")).values()]
    assert len(gates) == 3
    assert all(gate is gates[0] for gate in gates)
    assert torch.equal(gates[0].table_VE, tables[0])


def test_selection_biases_and_dtype_are_kept(tiny_model, tmp_path):
    model = tiny_model(score="sigmoid").bfloat16()
    router = next(iter(router_sites(model).values()))
    router.selection_bias_E += 0.5
    save(model, tmp_path / "a")
    assert_same_state(load(tmp_path / "a"), model)


def test_meta_tokenizer_and_optimizer(saved, tiny_model, tmp_path):
    assert read_meta(saved) == {"family": "cartesian", "step": 3}
    assert list(read_optimizer(saved)) == ["head.weight/exp_avg"]
    save(tiny_model(), tmp_path / "bytes", {"tokenizer": "bytes"})
    assert read_tokenizer(tmp_path / "bytes").vocab_size == 256
    save(tiny_model(), tmp_path / "none")
    assert read_tokenizer(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match=r"has no optimizer\.safetensors"):
        read_optimizer(tmp_path / "none")


def test_a_trained_tokenizer_comes_along(tiny_model, texts, tmp_path):
    from cartmoe.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("bpe:300", (path.read_text() for path in sorted(texts.iterdir())))
    save(tiny_model(), tmp_path / "a", {"tokenizer": "bpe:300"}, tokenizer_json=tokenizer.json)
    loaded = read_tokenizer(tmp_path / "a")
    assert (loaded.identity, loaded.name) == (tokenizer.identity, "bpe:300")


def test_identity_is_that_of_configuration_and_weights(saved, tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "same", {"anything": "else"})
    save(tiny_model(seed=1), tmp_path / "weights")
    other = tiny_model(top_k=1)
    other.load_state_dict(tiny_model().state_dict())
    save(other, tmp_path / "config")
    assert checkpoint_sha256(tmp_path / "same") == checkpoint_sha256(saved)
    for name in ("weights", "config"):
        assert checkpoint_sha256(tmp_path / name) != checkpoint_sha256(saved)


# Damage --------------------------------------------------------------------------------------


def test_the_files_are_those(saved):
    assert sorted(path.name for path in saved.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["missing", "truncated", "longer", "empty"])
def test_damaged_files_are_refused_by_name(saved, name, kind):
    path = saved / name
    data = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes({"truncated": data[:-1], "longer": data + b"\0", "empty": b""}[kind])
    with pytest.raises(CheckpointError, match=rf"saved is not a whole checkpoint: .*{name}"):
        load(saved)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_refused(saved, name):
    path = saved / name
    data = path.read_bytes()
    rng = random.Random(0)
    for bit in rng.sample(range(8 * len(data)), min(8 * len(data), 100)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="saved is not a whole checkpoint: "):
            load(saved)
    path.write_bytes(data)
    load(saved)


@pytest.mark.parametrize("read", [read_meta, read_config, read_optimizer])
def test_parts_are_checked_when_read_alone(saved, read):
    for name in set(FILES) - {"manifest.json"}:
        (saved / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError):
        read(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_layers=4), "model.safetensors is not of config.json: it lacks .*blocks.3"),
        (dict(num_layers=2), "model.safetensors is not of config.json: .*blocks.2.* too much"),
        (dict(vocab_size=14), "(?s)model.safetensors: .*size mismatch for trunk.embed"),
    ],
)
def test_weights_of_another_configuration(tiny_model, tmp_path, change, message):
    """Whole files, but put together wrongly."""
    model = tiny_model()
    model.config = replace(model.config, **change)
    save(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "a")


# Writing -------------------------------------------------------------------------------------


def test_nothing_is_overwritten(saved, tiny_model):
    with pytest.raises(FileExistsError, match="saved exists already"):
        save(tiny_model(seed=1), saved)
    assert_same_state(load(saved), tiny_model())


def test_a_full_disk_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    def full(tensors, path):
        Path(path).write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tiny_model(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_are_removed(tiny_model, tmp_path):
    (tmp_path / ".a.partial-0").mkdir()
    (tmp_path / ".a.partial-0" / "model.safetensors").write_bytes(b"begun")
    (tmp_path / ".b.partial-0").mkdir()  # somebody else's
    with temporary(tmp_path / "a") as alive:  # a writer that is not dead
        alive.mkdir()
        save(tiny_model(), tmp_path / "a")
        names = [".b.partial-0", "a", alive.name]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_the_folder_appears_last(tiny_model, tmp_path, monkeypatch):
    """By its rename, when all files and the folder that holds them are on the disk."""
    synced = []
    monkeypatch.setattr(folders, "sync", synced.append)
    rename = Path.rename

    def renamed(self, target):
        *files, folder = synced
        assert sorted(path.name for path in files) == [
            "config.json",
            "manifest.json",
            "meta.json",
            "model.safetensors",
        ]
        assert {path.parent for path in files} == {folder} == {self}
        synced.append("rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    save(tiny_model(), tmp_path / "a")
    assert synced[-2:] == ["rename", tmp_path]


# Runs ----------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_model, tmp_path):
    """A run's checkpoints of steps 5, 10 and 100, with weights of seeds 0, 1, 2."""
    for seed, step in enumerate([5, 10, 100]):
        save(tiny_model(seed=seed), step_folder(tmp_path / "run", step), {"step": step})
    return tmp_path / "run"


def damage(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_the_newest_checkpoint_of_a_run(run, tiny_model):
    assert [path.name[-3:] for path in run_checkpoints(run)] == ["005", "010", "100"]
    assert newest(run) == step_folder(run, 100) == newest(step_folder(run, 100))
    assert read_meta(run)["step"] == 100
    assert_same_state(load(run), tiny_model(seed=2))


def test_a_damaged_newest_is_passed_over_with_a_warning(run, tiny_model):
    damage(step_folder(run, 100))
    with pytest.warns(UserWarning, match=r"00000100 is damaged: model.safetensors has .* bytes"):
        assert newest(run) == step_folder(run, 10)
    with pytest.warns(UserWarning, match="step-00000010 is used instead"):
        assert_same_state(load(run), tiny_model(seed=1))


def test_all_damaged(run):
    for folder in run_checkpoints(run):
        damage(folder)
    with pytest.raises(CheckpointError, match=r"00000100 is damaged.*00000005 is damaged"):
        newest(run)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        load(tmp_path)


# The authors' checkpoints --------------------------------------------------------------------


@pytest.fixture
def reference(tmp_path):
    """reference(num_shards, index) writes the folder of one golden; (folder, inputs, logits)."""

    def write(num_shards=1, index=False):
        with safe_open(GOLDENS / "cartesian_shared.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config = file.metadata()["config"]
        weights = {k[2:]: t for k, t in tensors.items() if k.startswith("w.")}
        folder = tmp_path / "reference"
        folder.mkdir()
        (folder / "config.json").write_text(config)
        names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
        names = names if num_shards > 1 else ["model.safetensors"]
        shard_of = {key: names[i % num_shards] for i, key in enumerate(weights)}
        for name in names:
            save_file({k: t for k, t in weights.items() if shard_of[k] == name}, folder / name)
        if index:
            text = json.dumps({"weight_map": shard_of})
            (folder / "model.safetensors.index.json").write_text(text)
        return folder, tensors["input_ids"], tensors["logits"]

    return write


@pytest.mark.parametrize(("num_shards", "index"), [(1, False), (3, True), (3, False)])
def test_import(reference, tmp_path, num_shards, index):
    folder, tokens, logits = reference(num_shards, index)
    import_reference(folder, tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out")(tokens), logits, rtol=0, atol=1e-5)
    meta = read_meta(tmp_path / "out")
    assert meta == {"family": "cartesian", "source": "reference checkpoint"}


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "is no JSON object"),
        (
            lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
            FileNotFoundError,
            "lacks model-00002-of-00003.safetensors of model.safetensors.index.json",
        ),
        (
            lambda f: (f / "model-00002-of-00003.safetensors").write_bytes(b"x" * 99),
            CheckpointError,
            "model-00002-of-00003.safetensors is not a whole safetensors file",
        ),
        (
            lambda f: [path.unlink() for path in f.glob("*safetensors*")],
            FileNotFoundError,
            r"has no \*.safetensors file",
        ),
    ],
)
def test_import_of_what_is_not_whole(reference, tmp_path, break_it, error, message):
    folder, *_ = reference(3, True)
    break_it(folder)
    with pytest.raises(error, match=message):
        import_reference(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
