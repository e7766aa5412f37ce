"""Small fast tokenizers of three families, trained on a text: byte-level BPE, unigram with meta-space, WordPiece."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The naïve café owner, Ærøskøbing's finest, sells 12,345 pies — “crème brûlée” too…",
    "  leading spaces, two  between,\tand\ta tab\nnew line\n\nparagraph ",
    "🙂 👩‍👩‍👧 🏳️‍🌈 ❤️ and plain words",
    "你好，世界。这是一个测试 mixed with English",
    "日本語のテキスト、カタカナ 한국어 텍스트",
    "e\u0301 against \u00e9, no\u00a0break, zero\u200bwidth",
    "CamelCase snake_case def f(x): return x ** 2  # comment",
    "antidisestablishmentarianism don't they'LL we've I'm",
    "!",
    " a",
)


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


SPECIAL = ["<pad>", "<eos>", "<unk>"]


def byte_level(texts=TEXTS, size: int = 500) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast(tokenizer)


def metaspace(texts=TEXTS, size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return fast(tokenizer)


def word_piece(texts=TEXTS, size: int = 400) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    return fast(tokenizer)


FAMILIES = {"byte-level": byte_level, "meta-space": metaspace, "WordPiece": word_piece}
