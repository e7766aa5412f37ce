"""Small things that many test files need; nothing here reads the network or a GPU."""

import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdkit import cli

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A naïve café owner sells crêpes and coffee for 12 euros.",
    "Please write a short answer to the question below.",
    "### Instruction:\nSay hello.\n\n### Response:\nHello there!",
    "All happy families are alike; each unhappy family is unhappy in its own way.",
)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 ids: any text, no unknown token, an emoji in several tokens; pad is not end-of-text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def kdkit(monkeypatch, capsys):
    """Calls the command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdkit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
