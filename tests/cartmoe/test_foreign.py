"""What others wrote: read, or refused in a line that names the file; nothing is left out unsaid."""

import codecs
import json
import os
import pickle
import random
import shutil

import pytest
import torch
import zstandard
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cartmoe import LanguageModel, ModelConfig, load, save
from cartmoe.checkpoint import CheckpointError, import_reference, newest, read_meta
from cartmoe.corpora import read_corpus
from cartmoe.data import prepare
from cartmoe.folders import write_folder
from cartmoe.foreign import named, read_object
from cartmoe.tokenizers import JsonTokenizer, load_tokenizer, tokenizer_key

DEEP = b"[" * 100_000
FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def test_what_libraries_raise():
    for error in (RuntimeError("x"), Exception("x"), KeyError("x"), OverflowError("x")):
        with pytest.raises(CheckpointError, match=r"^file: '?x'?$"), named("file", CheckpointError):
            raise error
    with pytest.raises(OSError, match="No space left on device: 'file'"), named("file"):
        raise RuntimeError(FULL)
    with pytest.raises(ValueError, match="file: it is nested too deeply"), named("file"):
        json.loads(DEEP)
    with pytest.raises(ValueError, match="file: it takes more memory"), named("file"):
        raise MemoryError
    with pytest.raises(KeyboardInterrupt), named("file"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", DEEP, b"\xff", b'{"a": 1e}'])
def test_no_json_object(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is (not JSON|no JSON object|not UTF-8)"):
        read_object(tmp_path / "x.json")


# ---- checkpoints


def tiny(family="smoe", **changes):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(family, 256, 32, 64, 2, 2, num_experts=4, **changes)).eval()


@pytest.fixture
def hostile(tmp_path):
    """Makes a checkpoint, whole by its manifest, of which some files are others."""
    save(tiny(), tmp_path / "good", {"tokenizer": "bytes"})

    def make(name, content):
        def fill(folder):
            for file in ("config.json", "meta.json", "model.safetensors"):
                shutil.copy(tmp_path / "good" / file, folder)
            if isinstance(content, dict):
                there = json.loads((folder / name).read_text())
                (folder / name).write_text(json.dumps(there | content))
            else:
                (folder / name).write_bytes(content)

        write_folder(tmp_path / "bad", fill)
        return tmp_path / "bad"

    return make


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", pickle.dumps(1)),
        ("model.safetensors", b""),
        ("config.json", {"top_p": "x"}),
        ("config.json", {"d_model": 10**9}),
        ("config.json", {"vocab_size": 10**30}),
        ("config.json", {"renormalize": "x"}),
        ("config.json", {"hash_seed": "x"}),
        ("config.json", {"unknown": 1}),
        ("config.json", b"[]"),
        ("config.json", DEEP),
        ("meta.json", b"[]"),
        ("meta.json", DEEP),
        ("meta.json", {"train_seed": "x"}),
        ("meta.json", {"step": -1}),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
    ],
)
def test_a_hostile_checkpoint(hostile, name, content):
    from analysis import load as load_model

    with pytest.raises(CheckpointError, match=rf"bad/{name}"):
        load_model(hostile(name, content))


@pytest.mark.parametrize("family", ["smoe", "hash", "cartesian", "dense"])
def test_tied_weights(tmp_path, family):
    """What was tied outside of the configuration is stored twice, what it shares once."""
    model = tiny(family)
    model.head.weight = model.trunk.embed.weight
    save(model, tmp_path / "tied")
    tokens = torch.arange(9)[None]
    assert torch.equal(load(tmp_path / "tied")(tokens), model(tokens))


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError(FULL)

    monkeypatch.setattr("cartmoe.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(tiny(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["step-00000005.bak", "step-00000005 (copy)", "step-", "step-٣"])
def test_what_somebody_put_beside_checkpoints(tmp_path, name):
    place = tmp_path / "run" / "checkpoints"
    save(tiny(), place / "step-00000005", {"step": 5})
    shutil.copytree(place / "step-00000005", place / name)
    assert newest(tmp_path / "run").name == "step-00000005"
    assert read_meta(tmp_path / "run")["step"] == 5


# ---- the authors' checkpoints


def theirs(folder, *fp32):
    """In bf16, but for tensors whose names hold one of `fp32`."""
    V, D, F, E, layer = 64, 16, 32, 4, "model.layers.0"
    sizes = dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_experts=E, moe_top_k=2)
    sizes |= dict(num_hidden_layers=1, num_attention_heads=2, rms_norm_eps=1e-6, use_moe=True)
    sizes |= dict(initial_moe_layer=0, expert_interval=1, use_residual=True)
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    shapes |= {f"{layer}.{norm}_layernorm": (D,) for norm in ("input", "post_attention")}
    shapes |= {f"{layer}.self_attn.{part}_proj": (D, D) for part in "qkvo"}
    shapes |= {f"{layer}.wg": (E, D), f"{layer}.coefficient": (2, D)}
    for ffn in (*(f"mlp.{e}" for e in range(E)), "res_mlp"):
        parts = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        shapes |= {f"{layer}.{ffn}.{part}_proj": shape for part, shape in parts.items()}
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    state[f"{layer}.coefficient.bias"] = torch.zeros(2)
    state = {n: t if any(p in n for p in fp32) else t.bfloat16() for n, t in state.items()}
    config = sizes | dict(c2_fine_grain=False, fine_grain=False)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def test_tensors_of_several_dtypes(tmp_path):
    """All are taken in the one that holds every number; a gate may be in fp32 alone."""
    tokens = torch.arange(10)[None]
    alone = import_reference(theirs(tmp_path / "a", ".wg"), tmp_path / "alone")
    assert alone.head.weight.dtype == torch.bfloat16
    assert alone(tokens).isfinite().all()
    with pytest.warns(
        UserWarning, match=r"2 tensors are not of torch\.bfloat16 .* as torch\.float32"
    ):
        mixed = import_reference(theirs(tmp_path / "b", ".wg", "coefficient"), tmp_path / "mixed")
    assert {tensor.dtype for tensor in mixed.parameters()} == {torch.float32}
    assert torch.equal(mixed.head.weight, alone.head.weight.float())
    assert mixed(tokens).isfinite().all()


# ---- a byte order mark


def byte_level(**options):
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>"]
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, [], **options))
    made.decoder = decoders.ByteLevel()
    return made.to_str()


def test_a_byte_order_mark(tmp_path):
    for name, text in {"t.json": byte_level(), "config.json": '{"vocab_size": 9}'}.items():
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    assert load_tokenizer(tmp_path / "t.json").identity == JsonTokenizer(byte_level(), "t").identity
    with pytest.raises(CheckpointError, match=r"config\.json: .* lacks 'hidden_size'"):
        import_reference(tmp_path, tmp_path / "out")
    (tmp_path / "c.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "a"}\n{"text": "b"}')
    assert [d.text for d in read_corpus(tmp_path / "c.jsonl")] == ["a", "b"]


# ---- tokenizers


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "<s>": 1}, unk_token="[UNK]"),
        models.WordPiece({"a": 0, "<s>": 1}, unk_token="[UNK]"),
        models.Unigram([("<s>", 0.0), ("a", -1.0)], None, False),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_tokenizer_without_its_unknown_token(tmp_path, texts, model):
    (tmp_path / "mine.json").write_text(Tokenizer(model).to_str())
    with pytest.raises(ValueError, match="tokenizer 'mine' cannot encode a text: "):
        prepare(texts, tmp_path / "mine.json")


@pytest.mark.parametrize("size", ["99999999999999999999", "2147483648", "256", "٣٠٠", "-1", ""])
def test_a_size_that_no_bpe_has(size):
    with pytest.raises(ValueError, match="the size of a byte-level BPE is at least 257"):
        tokenizer_key(f"bpe:{size}")


# ---- corpora


def write_lines(path, domains):
    texts = [f"document {i} " + f"word{i * 7919} " * 30 for i in range(len(domains))]
    records = [
        {"text": text, "meta": {"pile_set_name": domain}}
        for text, domain in zip(texts, domains, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, records)))


@pytest.mark.parametrize("wrong", [7, 1.5, True, ["a", "b"], {"a": 1}, "a\0b"])
def test_a_domain_that_is_no_text(tmp_path, wrong):
    write_lines(tmp_path / "c.jsonl", ["Wiki", wrong, "Wiki"])
    with pytest.raises(ValueError, match=r"c\.jsonl:2 has the pile_set_name .*; it must be a text"):
        list(read_corpus(tmp_path / "c.jsonl"))


@pytest.mark.parametrize("odd", ["Web\rcrawl", "a\r\nb", 'a "b", c', "NA", "é\u2028", " x "])
def test_domains_come_back_from_the_cache(tmp_path, odd):
    write_lines(tmp_path / "c.jsonl", ["Books", odd, "Books", "Wiki", None])
    documents = prepare(tmp_path / "c.jsonl", cache_dir=tmp_path / "cache").documents
    assert sorted(documents.domain) == sorted(["Books", odd, "Books", "Wiki", "unknown"])


def test_a_domain_without_utf8(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "x", "meta": {"pile_set_name": "\\ud800"}}')
    assert [d.domain for d in read_corpus(tmp_path / "c.jsonl")] == ["?"]


def test_a_file_name_that_is_no_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("some text")
    with pytest.raises(ValueError, match=r"has a file whose name is not UTF-8: caf.*\.txt; rename"):
        list(read_corpus(tmp_path))


def test_linked_folders(tmp_path):
    for folder, names in {"elsewhere": "ab", "data/books": "c"}.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / f"{name}.txt").write_text(f"text {name}")
    (tmp_path / "data" / "wiki").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    found = sorted(document.id for document in read_corpus(tmp_path / "data"))
    assert found == ["books/c.txt", "wiki/a.txt", "wiki/b.txt"]


@pytest.mark.parametrize("name", ["B.TXT", "b.jsonl.gz", "b.txt.zst", "b.json"])
def test_files_that_are_left_out_are_said(tmp_path, name):
    for file in ("a.txt", name, "picture.png", ".hidden.gz"):
        (tmp_path / file).write_text("some text")
    with pytest.warns(UserWarning, match=f"1 files are left out, such as {name}; .txt, .md"):
        assert [document.id for document in read_corpus(tmp_path)] == ["a.txt"]


def frames(number, documents=5):
    """Of JSON lines, one frame after the other, a block a document."""
    compressor, made = zstandard.ZstdCompressor(), []
    for frame in range(number):
        one = compressor.compressobj()
        for i in range(documents):
            made.append(one.compress(json.dumps({"text": f"{frame} {i}"}).encode() + b"\n"))
            made.append(one.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        made.append(one.flush())
    return made


def test_zstandard_frames(tmp_path):
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(b"".join(frames(3)))
    assert [d.text for d in read_corpus(path)] == [f"{f} {i}" for f in range(3) for i in range(5)]


@pytest.mark.parametrize("seed", range(10))
def test_half_a_zstandard_file(tmp_path, seed):
    path, parts = tmp_path / "c.jsonl.zst", frames(2)
    whole, first = b"".join(parts), len(b"".join(parts[: len(parts) // 2]))
    length = random.Random(seed).choice([i for i in range(1, len(whole)) if i != first])
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"c\.jsonl\.zst(:\d+)? is not"):
        list(read_corpus(path))
