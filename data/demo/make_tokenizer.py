"""Train the two demo tokenizers from `train.jsonl`: byte-level BPE and unigram.

    python data/demo/make_tokenizer.py [FOLDER]

The teachers share the BPE of 1,024 entries; the unigram of 768 is the deep student's. Each is written beside the models
that use it, in the folders of `TOKENIZERS`. The same rows give the same bytes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
UNIGRAM_SIZE = 768
MAX_LENGTH = 512
ASCII = [chr(code) for code in range(ord(" ") + 1, 0x7F)]
SPACE = "▁"
NEVER = -1000.0
"""Score of a piece that no text may be cut into where its letters are pieces too: "<eos>" is five letters."""
HERE = Path(__file__).parent


def texts(path: Path) -> Iterator[str]:
    """Every prompt and every wording of its answer."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers = row["output"] if isinstance(row["output"], list) else [row["output"]]
        yield "\n".join(part for part in (row["instruction"], row["input"], "Answer:\n") if part)
        yield from answers


def train_bpe(path: Path, vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `<pad>` = 0 and `<eos>` = 1, which adds neither by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(path), trainer)
    return _finished(tokenizer)


def train_unigram(path: Path, vocabulary_size: int = UNIGRAM_SIZE) -> PreTrainedTokenizerFast:
    """A unigram in SentencePiece's manner, with `<pad>` = 0, `<eos>` = 1 and `<unk>` = 2; adds none of them.

    Spaces become meta-spaces and nothing else is changed before cutting, so that all comes back, a meta-space in the
    text excepted; what has no piece falls back to its bytes.
    """
    reserved = ["<pad>", "<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [(piece, NEVER) for piece in reserved] + _pieces(path, vocabulary_size - len(reserved))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=reserved.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = _words()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(tokenizer, unk_token="<unk>")


TOKENIZERS = {"teacher": train_bpe, "moe_teacher": train_bpe, "deep_student": train_unigram}
"""Folder beside this file -> what makes the tokenizer in it."""


def _words() -> pre_tokenizers.PreTokenizer:
    """Words with the space before them; each character beyond ASCII alone, so that its bytes carry its place only."""
    beyond = pre_tokenizers.Split(Regex("[^ -~]"), "isolated")
    return pre_tokenizers.Sequence([beyond, pre_tokenizers.Metaspace(SPACE, prepend_scheme="never")])


def _pieces(path: Path, num_pieces: int) -> list[tuple[str, float]]:
    """The pieces that the library's trainer finds, with their scores, in an order of our own.

    The trainer walks hash maps: from run to run its scores differ in the last bits, and the characters that it keeps
    without a use come with other scores and in another order.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = _words()
    trainer = trainers.UnigramTrainer(vocab_size=num_pieces, initial_alphabet=ASCII, show_progress=False)
    tokenizer.train_from_iterator(texts(path), trainer)
    found = json.loads(tokenizer.to_str())["model"]["vocab"]
    lowest = min(score for piece, score in found if len(piece) > 1)  # of those that are there for their use
    scored = [(piece, round(score if score >= lowest else lowest - 1, 4)) for piece, score in found]
    return sorted(scored, key=lambda entry: (-entry[1], entry[0]))


def _finished(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    """As transformers reads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=MAX_LENGTH,
        padding_side="left",
        **tokens,
    )


def main() -> None:
    """Train on the rows beside this file and save."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, train in TOKENIZERS.items():
        train(HERE / "train.jsonl").save_pretrained(folder / name)


if __name__ == "__main__":
    main()
