"""Rows, word units, vocabularies and batches; each name is imported from its module when it is first used."""

from importlib import import_module

_HOMES = {
    "TEMPLATES": "templates",
    "RowReport": "rows",
    "Rows": "rows",
    "load_rows": "rows",
    "DistillCollator": "batch",
    "EncodeReport": "encoding",
    "EncodedRows": "encoding",
    "encode_prompts": "encoding",
    "encode_rows": "encoding",
    "TokenizerRelation": "spans",
    "char_to_byte_offsets": "spans",
    "matching_ids": "vocabulary",
    "shared_word_units": "spans",
    "token_bytes": "vocabulary",
    "tokenizer_relation": "spans",
    "word_units": "spans",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdkit.data' has no attribute '{name}'")
    return getattr(import_module(f"kdkit.data.{_HOMES[name]}"), name)
