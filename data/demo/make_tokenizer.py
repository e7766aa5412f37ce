"""Train the demo tokenizer: byte-level BPE with 1,024 entries, from `train.jsonl`.

    python data/demo/make_tokenizer.py [FOLDER]

Writes the tokenizer files beside the teacher. The same rows give the same bytes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
MAX_LENGTH = 512
HERE = Path(__file__).parent


def texts(path: Path) -> Iterator[str]:
    """Every prompt and every wording of its answer."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers = row["output"] if isinstance(row["output"], list) else [row["output"]]
        yield "\n".join(part for part in (row["instruction"], row["input"], "Answer:\n") if part)
        yield from answers


def train(path: Path, vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer with `<pad>` = 0 and `<eos>` = 1, which adds neither by itself."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )


def main() -> None:
    """Train on the rows beside this file and save."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "teacher"
    train(HERE / "train.jsonl").save_pretrained(folder)


if __name__ == "__main__":
    main()
