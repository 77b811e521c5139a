"""The tokenizer gives the reference's ids and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meddam_core.dam.tokens import IMAGE_TOKEN_ID, Tokenizer, conversation, read_tokenizer
from tests.meddam_core.dam.small import CHECKPOINT, ORACLE, tokenizer

CASES: list[dict[str, Any]] = json.loads((ORACLE / "tokenizer_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.get("query", case.get("raw")))[:40])
def test_ids_and_text_of_the_reference(case: dict[str, Any]) -> None:
    ours = tokenizer()
    if "query" in case:
        assert conversation(case["query"]) == case["prompt"]
        assert ours.encode_prompt(case["query"]) == case["input_ids"]
    else:
        assert ours.encode(case["raw"]) == case["input_ids"]
        assert ours.decode(case["input_ids"]) == case["decoded"]


@pytest.mark.parametrize(
    "text", ["</s>a", " </s>", "a</s></s>b", "<unk> x", "\u2581x", "a\n\n b", "\u00e9\u4e2d", "<s>"]
)
def test_ids_of_transformers(text: str) -> None:
    """Texts beyond the oracle's, against the class the reference uses."""
    from transformers import LlamaTokenizer

    theirs = LlamaTokenizer.from_pretrained(CHECKPOINT / "llm", legacy=False)
    if type(theirs).__mro__[1].__name__ == "TokenizersBackend":  # transformers 5 always takes the fast one
        assert (
            tokenizer().decode(tokenizer().encode(text)).strip() == theirs.decode(theirs(text).input_ids, True).strip()
        )
    else:
        assert tokenizer().encode(text) == theirs(text).input_ids


def test_one_placeholder_a_view() -> None:
    ids = tokenizer().encode_prompt("Video: " + "<image>" * 8 + "\nDescribe.")
    assert ids.count(IMAGE_TOKEN_ID) == 8 and ids[0] == 1


def test_a_query_without_a_place_for_the_region_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no <image>"):
        tokenizer().encode_prompt("Describe the region.")


def test_captions_are_stripped_as_the_reference_does() -> None:
    ours = tokenizer()
    ids = ours.encode("  a nodule </")[1:]
    assert ours.caption(ids) == "a nodule </"
    assert ours.caption([*ours.encode(" x ")[1:], ours.eos_id]) == "x"


def test_partial_characters_do_not_raise() -> None:
    ours = tokenizer()
    ids = ours.encode("\u4e2d")
    assert ours.decode(ids) == "\u4e2d" and "\ufffd" in ours.decode(ids[:-1])


def test_missing_files_and_unknown_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_config.json, special_tokens_map.json, tokenizer.model or tokeni"):
        read_tokenizer(tmp_path)
    files = dict(tokenizer().files)
    settings = json.loads(files["tokenizer_config.json"])
    settings |= {"add_eos_token": True, "add_prefix_space": False}
    settings["added_tokens_decoder"]["2"]["rstrip"] = True
    with pytest.raises(ValueError, match=r"add_eos_token is True; add_prefix_space is False; .*'</s>' has rstrip"):
        Tokenizer({**files, "tokenizer_config.json": json.dumps(settings).encode()})


def test_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    """A checkpoint whose tokenizer is only in the fast format."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    fast = Fast(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes(tokenizer().files[name])
    ours = read_tokenizer(tmp_path)
    assert len(ours) == len(pieces)
    assert (
        ours.encode("ab c") == [1, 259, 260, 261, 259, 262] and ours.decode([1, 259, 260, 261, 259, 262, 2]) == "ab c"
    )
    assert ours.encode_prompt("<image>x").count(IMAGE_TOKEN_ID) == 1
