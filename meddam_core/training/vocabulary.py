"""A tokenizer of its own for a small DAM: sentencepiece, with whole prompt lines as single tokens.

    files = train_tokenizer(captions, prompt_lines(prompts), vocab_size=640)
    tokenizer = Tokenizer(files)

A line of a prompt that the model is trained with is one token, because a small model has no use for its words, and they
would be most of what it reads. Other text is split into pieces and, failing these, bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence

from meddam_core.dam.tokens import IMAGE_TOKEN, SYSTEM, conversation

_SPACE = "\u2581"
_ASSISTANT = " ASSISTANT:"


def prompt_lines(prompts: Iterable[str]) -> list[str]:
    """The lines of the conversations around prompts (queries with `<image>`), sorted, each with its line break."""
    found = {"\n", f" {SYSTEM} USER:", _ASSISTANT}
    for query in prompts:
        for piece in conversation(query).removesuffix(_ASSISTANT).split(IMAGE_TOKEN)[1:]:
            found |= {f"\n{line}" for line in piece.split("\n") if line}
    return sorted(found)


def train_tokenizer(texts: Sequence[str], symbols: Sequence[str], vocab_size: int) -> dict[str, bytes]:
    """The files of an `llm/` folder's tokenizer, trained on `texts`; `symbols` are kept whole.

    Raises ValueError where `vocab_size` leaves no room for the symbols and bytes.
    """
    import sentencepiece

    if vocab_size < len(symbols) + 259 + 64:
        raise ValueError(f"a vocabulary of {vocab_size} is too small for {len(symbols)} prompt lines and 256 bytes")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        user_defined_symbols=[s.replace(" ", _SPACE) for s in symbols], byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        split_by_whitespace=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return {"tokenizer.model": model.getvalue(), **_documents()}


def _documents() -> dict[str, bytes]:
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    added = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                 "special": True}
        for i, token in enumerate(("<unk>", "<s>", "</s>"))
    }  # fmt: skip
    config = {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
        "model_max_length": 512, "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
        **roles, "added_tokens_decoder": added,
    }  # fmt: skip
    return {
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
        "special_tokens_map.json": json.dumps(roles, indent=1).encode(),
    }
