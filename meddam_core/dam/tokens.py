"""Text to token ids and back, as the reference does it, without transformers.

A prompt is cut at every `<image>`; each piece is tokenised on its own, and IMAGE_TOKEN_ID stands between the pieces.
`tokenizer.model` (sentencepiece) is read as transformers' slow LlamaTokenizer with legacy=False reads it, which is what
the reference forces; `tokenizer.json` is used where there is no `tokenizer.model`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = -200
"""Stands for one view in a prompt's ids (LLaVA's convention)."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Vicuna's conversation "v1", which DAM was trained with."""
FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SPACE = "\u2581"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# transformers' clean_up_tokenization, in its order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def conversation(query: str) -> str:
    """The whole prompt around a query, in conversation "v1"."""
    return f"{SYSTEM} USER: {query} ASSISTANT:"


class _Pieces(Protocol):
    """What the two file formats have in common: plain text without special tokens to ids and back."""

    size: int

    def encode(self, text: str, *, first: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def find(self, token: str) -> int | None: ...


class _SentencePieces:
    def __init__(self, model: bytes, unk: str) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(model)
        proto.normalizer_spec.add_dummy_prefix = False  # the prefix is added by hand, to the first piece only
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.size: int = self._sp.get_piece_size()
        self._guard = unk
        self._guard_length = len(self._sp.encode(unk))

    def encode(self, text: str, *, first: bool) -> list[int]:
        text = (_SPACE if first else "") + text
        if not text.startswith((_SPACE, " ")):
            return list(self._sp.encode(text))
        # A leading space would be lost without something in front of it.
        return list(self._sp.encode(self._guard + text)[self._guard_length :])

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [self._sp.id_to_piece(i) for i in ids]
        if pieces and pieces[0].startswith(_SPACE):
            pieces[0] = pieces[0][1:]
        return str(self._sp.decode(pieces))

    def find(self, token: str) -> int | None:
        found = self._sp.piece_to_id(token)
        return found if self._sp.id_to_piece(found) == token else None


class _FastPieces:
    def __init__(self, document: bytes) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self._fast = FastTokenizer.from_str(document.decode("utf-8"))
        self.size: int = self._fast.get_vocab_size(with_added_tokens=False)

    def encode(self, text: str, *, first: bool) -> list[int]:
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._fast.decode(list(ids), skip_special_tokens=False))

    def find(self, token: str) -> int | None:
        found: int | None = self._fast.token_to_id(token)
        return found


class Tokenizer:
    """The tokenizer of a checkpoint's `llm/` folder. `files` are its documents, byte for byte, for saving."""

    def __init__(self, files: Mapping[str, bytes], origin: str = "llm/") -> None:
        """Raises ValueError that says which files are missing or which settings are not implemented."""
        missing = [n for n in ("tokenizer_config.json", "special_tokens_map.json") if n not in files]
        if "tokenizer.model" not in files and "tokenizer.json" not in files:
            missing.append("tokenizer.model or tokenizer.json")
        if missing:
            raise ValueError(f"{origin}: {', '.join(missing)} missing; the tokenizer is part of the checkpoint")
        self.files = dict(files)
        config = json.loads(files["tokenizer_config.json"])
        names = {**json.loads(files["special_tokens_map.json"]), **config}
        roles = {role: _content(names[role]) for role in _ROLES if names.get(role) is not None}
        _refuse(config, names, origin)
        self._pieces: _Pieces = (
            _SentencePieces(files["tokenizer.model"], roles.get("unk_token", "<unk>"))
            if "tokenizer.model" in files
            else _FastPieces(files["tokenizer.json"])
        )
        self._added = _added_tokens(config, files, roles, self._pieces)
        ids = {role: self._added[token] for role, token in roles.items()}
        if "bos_token" not in ids or "eos_token" not in ids:
            raise ValueError(f"{origin}: the tokenizer names no beginning or no end of sequence")
        self.bos_id, self.eos_id = ids["bos_token"], ids["eos_token"]
        extra = {_content(t) for t in names.get("additional_special_tokens") or []}
        self._special = set(ids.values()) | {i for token, i in self._added.items() if token in extra}
        self._split = re.compile("|".join(re.escape(t) for t in sorted(self._added, key=len, reverse=True)))
        self._add_bos: bool = config.get("add_bos_token", True)
        self._clean_up: bool = config.get("clean_up_tokenization_spaces", True)

    def __len__(self) -> int:
        """Size of the vocabulary with added tokens: the rows of the embedding that are used."""
        return self._pieces.size + sum(i >= self._pieces.size for i in self._added.values())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, beginning of sequence included; special tokens in the text become their ids."""
        ids = [self.bos_id] if self._add_bos else []
        start, first = 0, True
        for match in [*self._split.finditer(text), None]:
            plain = text[start : match.start() if match else len(text)]
            # The word-start mark is set before the text is split, so it belongs to whatever comes first.
            if plain:
                ids += self._pieces.encode(plain, first=first)
            if match:
                ids.append(self._added[match.group()])
                start = match.end()
            first = False
        return ids

    def encode_prompt(self, query: str) -> list[int]:
        """Ids of the whole conversation around `query`, IMAGE_TOKEN_ID where a view's tokens go.

        Raises ValueError for a query without `<image>`, as the reference does.
        """
        if IMAGE_TOKEN not in query:
            raise ValueError("the query holds no <image>: DAM needs to know where the region's tokens go")
        head, *rest = (self.encode(piece) for piece in conversation(query).split(IMAGE_TOKEN))
        ids = list(head)
        for piece in rest:
            ids += [IMAGE_TOKEN_ID, *piece[int(self._add_bos) :]]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out, spaces as the reference leaves them (not stripped)."""
        runs: list[str] = []
        run: list[int] = []
        names = {i: token for token, i in self._added.items()}
        for i in ids:
            if i in self._special:
                continue
            if i in names:
                runs += [self._pieces.decode(run)] if run else []
                runs.append(names[i])
                run = []
            else:
                run.append(i)
        runs += [self._pieces.decode(run)] if run else []
        text = " ".join(runs)
        for old, new in _CLEAN_UP if self._clean_up else ():
            text = text.replace(old, new)
        return text

    def caption(self, ids: Sequence[int]) -> str:
        """The text the reference returns for generated ids: decoded, stripped, without a literal end mark."""
        return self.decode(ids).strip().removesuffix("</s>").strip()


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of an `llm/` folder. Raises ValueError for missing files or settings that are not implemented."""
    folder = Path(folder)
    return Tokenizer({name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}, str(folder))


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _refuse(config: Mapping[str, Any], names: Mapping[str, Any], origin: str) -> None:
    """Settings that would change the ids and that are not implemented, all in one error."""
    problems = [
        f"{key} is {config[key]!r}"
        for key, allowed in (
            ("add_eos_token", (False, None)),
            ("add_prefix_space", (True, None)),
            ("sp_model_kwargs", ({}, None)),
        )
        if config.get(key, allowed[0]) not in allowed
    ]
    tokens = [names.get(role) for role in _ROLES] + list(config.get("added_tokens_decoder", {}).values())
    for token in tokens:
        strict = [k for k in ("lstrip", "rstrip", "single_word") if isinstance(token, Mapping) and token.get(k)]
        if strict:
            problems.append(f"added token {_content(token)!r} has {', '.join(strict)}")
    if problems:
        raise ValueError(f"{origin}: not implemented in a tokenizer: {'; '.join(problems)}")


def _added_tokens(
    config: Mapping[str, Any], files: Mapping[str, bytes], roles: Mapping[str, str], pieces: _Pieces
) -> dict[str, int]:
    """Tokens that are recognised in text before anything else, with their ids."""
    added = {_content(token): int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    if "added_tokens.json" in files:
        added |= {token: int(i) for token, i in json.loads(files["added_tokens.json"]).items()}
    for token in roles.values():
        if token not in added:
            found = pieces.find(token)
            if found is None:
                raise ValueError(f"the special token {token!r} is not in the vocabulary")
            added[token] = found
    return added
