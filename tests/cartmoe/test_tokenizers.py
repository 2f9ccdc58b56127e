import json
from string import ascii_lowercase

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from cartmoe.corpora import Document
from cartmoe.data import sequences_from
from cartmoe.tokenizers import BOS_TOKENS, ByteTokenizer, JsonTokenizer, load_tokenizer

TEXTS = ["the cat sat on the mat, the cat", "naïve café — ☕ and 日本語", "def f(x):\n    return x"]
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe():
    return load_tokenizer("bpe:300", TEXTS * 5)


def sentencepiece_like(bos="<s>"):
    """A space is part of the word after it, and one before the text is not part of the text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<unk>", bos], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


class TestBytes:
    @given(any_text)
    def test_round_trip(self, text):
        tokenizer = ByteTokenizer()
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert tokenizer.bos_id not in ids
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == text.replace("\0", " ")
        assert tokenizer.num_bytes([tokenizer.bos_id, *ids]) == len(text.encode())

    def test_half_a_character_decodes(self):
        assert ByteTokenizer().decode([0, 65, 0xC3]) == "A\ufffd"


class TestBpe:
    def test_round_trip_and_bytes_of_any_part(self, bpe):
        for text in [*TEXTS, "unseen ∀ symbols \0\n", ""]:
            ids = bpe.encode(text)
            assert ids.dtype == np.int64
            assert bpe.decode([bpe.bos_id, *ids]) == text
            assert bpe.num_bytes([bpe.bos_id, *ids]) == len(text.encode())
            assert sum(bpe.num_bytes([id]) for id in ids) == len(text.encode())

    def test_bos_is_never_read_from_a_text(self, bpe):
        text = "about <|endoftext|> tokens"
        ids = bpe.encode(text)
        assert bpe.bos_id not in ids
        assert bpe.decode(ids) == text

    def test_training_is_deterministic(self, bpe):
        again = load_tokenizer("bpe:300", iter(TEXTS * 5))
        assert again.identity == bpe.identity
        assert bpe.vocab_size == 300
        assert load_tokenizer("bpe:290", TEXTS * 5).identity != bpe.identity

    def test_saved_tokenizer_is_the_same(self, bpe, tmp_path):
        (tmp_path / "mine.json").write_text(bpe.json)
        loaded = load_tokenizer(tmp_path / "mine.json")
        assert (loaded.name, loaded.identity) == ("mine", bpe.identity)
        np.testing.assert_array_equal(loaded.encode(TEXTS[1]), bpe.encode(TEXTS[1]))

    def test_added_tokens_stand_for_their_text(self, bpe):
        library = tokenizers.Tokenizer.from_str(bpe.json)
        library.add_tokens(["☕☕"])
        tokenizer = JsonTokenizer(library.to_str(), "added")
        ids = tokenizer.encode("a ☕☕")
        assert tokenizer.vocab_size == 301
        assert 300 in ids
        assert tokenizer.num_bytes(ids) == len("a ☕☕".encode())


class TestJson:
    @pytest.mark.parametrize("bos", BOS_TOKENS)
    def test_bos_and_bytes_without_byte_level(self, bos):
        tokenizer = JsonTokenizer(sentencepiece_like(bos), "metaspace")
        ids = tokenizer.encode("the cat sat")
        assert tokenizer.bos_id == 1
        assert tokenizer.decode([1, *ids]) == "the cat sat"
        assert tokenizer.num_bytes([1, *ids]) == 11

    def test_length_limits_of_the_file_do_not_apply(self, bpe):
        library = tokenizers.Tokenizer.from_str(bpe.json)
        library.enable_truncation(2)
        library.enable_padding(length=50)
        tokenizer = JsonTokenizer(library.to_str(), "limited")
        np.testing.assert_array_equal(tokenizer.encode(TEXTS[0]), bpe.encode(TEXTS[0]))


class TestErrors:
    def test_unknown_tokenizer(self):
        with pytest.raises(FileNotFoundError, match=r"'words'; give 'bytes', 'bpe:<vocabulary"):
            load_tokenizer("words")

    @pytest.mark.parametrize("spec", ["bpe:256", "bpe:", "bpe:-3", "bpe:many"])
    def test_size_of_bpe(self, spec):
        with pytest.raises(ValueError, match=f"{spec}.*at least 257"):
            load_tokenizer(spec, TEXTS)

    def test_bpe_needs_a_corpus(self):
        with pytest.raises(ValueError, match=r"take prepare\(corpus, 'bpe:300'\)\.tokenizer"):
            load_tokenizer("bpe:300")

    def test_json_of_something_else(self, tmp_path):
        (tmp_path / "config.json").write_text('{"vocab_size": 3}')
        with pytest.raises(ValueError, match="'config' is not one of the tokenizers library"):
            load_tokenizer(tmp_path / "config.json")

    def test_no_token_to_start_a_document(self):
        with pytest.raises(ValueError, match=r"could start a document; it needs one of <s>, <bos>"):
            JsonTokenizer(sentencepiece_like(bos="<start>"), "odd")


@pytest.fixture(scope="module")
def byte_fallback():
    """As of Llama 2, Mistral and Gemma: characters without a token are tokens of their bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *ascii_lowercase, "é"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    )
    steps = tokenizers.normalizers
    made.normalizer = steps.Sequence([steps.Prepend("▁"), steps.Replace(" ", "▁")])
    steps = tokenizers.decoders
    made.decoder = steps.Sequence(
        [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "<unk>"])
    return JsonTokenizer(made.to_str(), "fallback")


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "text",
    [
        "router  expert naïve café",
        "🙂🙃 hello 😀👍 a",
        "ሰላም መጽሐፍት x ሰ",
        "文章漢字是在有人我他不了大中国",
        " a",
        "é",
        "🙂",
        "a é🙂 é 🙂é",
    ],
)
def test_bytes_of_byte_fallback_tokens(byte_fallback, text, length):
    """Those of windows, wherever they are cut, are those of the text."""
    docs = sequences_from([Document("a", "a", "d", text)], byte_fallback, length)
    assert docs.num_bytes_S.sum() == len(text.encode())
    assert (docs.num_bytes_S >= 0).all()


@pytest.mark.parametrize("length", [1, 2, 3, 64])
def test_a_space_put_before_a_text_is_not_counted(bpe, length):
    """As of RoBERTa, and of GPT-2 by some settings."""
    definition = json.loads(bpe.json)
    definition["pre_tokenizer"]["add_prefix_space"] = True
    prefixed = JsonTokenizer(json.dumps(definition), "prefixed")
    text = "router naïve 🙂 router"
    assert prefixed.decode(prefixed.encode(text)) == " " + text
    docs = sequences_from([Document("a", "a", "d", text)], prefixed, length)
    assert docs.num_bytes_S.sum() == len(text.encode())
