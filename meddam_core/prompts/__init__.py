"""Prompts: what a captioner is asked, as text files with ids.

    load_prompt("meddam-v1")                        the MedDAM-prompt (Figure 2 of the paper, in our own wording)
    load_prompt("meddam-v1-lung-ct+sentence")       an expert variant, answered in one sentence
    load_prompt("meddam-v1-lung-ct+knowledge")      with descriptions of the visual attributes as background
    load_prompt("meddam-known-v1")                  tells the model what is known of the region, and asks for the rest
    load_prompt("my_prompt.txt")                    any text file; its id is its name and a hash of its content

Notes:
- The id of a prompt belongs to a caption's identity and its text to the run's fingerprint, so a shipped file is never
  edited: a changed wording is a new file.
- A text holds one `<image>` for each view given to the model: one for an image, eight for a video prompt. A text
  without any gets "<image>" and a line break in front.
- The knowledge describes the whole vocabulary of a modality, never the label of the region at hand.
- Only a text with `{known}` is told the labels of the region at hand: to make data of keywords, never to be scored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

IMAGE_TOKEN = "<image>"
KNOWN = "{known}"
"""Where a prompt tells what is known of the region."""
_PRESENT, _ABSENT, _UNDECIDED = ("present", "yes", "true"), ("absent", "no", "none", "false"), ("undecided", "unknown")
VIDEO_VIEWS = 8

Length = Literal["keyword", "phrase", "sentence", "paragraph"]
LENGTHS: tuple[Length, ...] = get_args(Length)
DEFAULT_LENGTH: Length = "paragraph"
"""The paper asks for one paragraph of three to six sentences."""

_FOLDER = Path(__file__).parent
_KNOWLEDGE = "knowledge"


class KnownLabel(Protocol):
    """A label as rows carry it (meddam_core.records.Label)."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a captioner is asked. `text` holds one `<image>` for each view."""

    id: str
    text: str
    version: str
    """First 12 hex digits of the SHA-256 of `text`: equal versions mean equal wording."""

    @property
    def num_views(self) -> int:
        """How many views the text asks for: 1 for an image, 8 for a video prompt."""
        return self.text.count(IMAGE_TOKEN)

    @property
    def tells_known(self) -> bool:
        """Whether the text tells the region's own labels."""
        return KNOWN in self.text

    def about(self, labels: Sequence[KnownLabel]) -> str:
        """The text for one region: with its labels where it has a place for them, those that are undecided left out."""
        if not self.tells_known:
            return self.text
        said = [
            f"no {label.name}" if label.value in _ABSENT else label.name if label.value in _PRESENT
            else f"{label.name} {label.value}"
            for label in labels if label.value not in _UNDECIDED
        ]  # fmt: skip
        return self.text.replace(KNOWN, ", ".join(s.replace("_", " ") for s in said) or "nothing")


def load_prompt(prompt: str | Path) -> Prompt:
    """The prompt of a shipped id or of a text file.

    An id may carry options after "+": a length (keyword, phrase, sentence, paragraph) and `knowledge`, in any order;
    paragraph is the default and is left out of the id. A file is any UTF-8 text; its id is its stem, a hyphen and the
    first 8 hex digits of the hash of its text, so that an edited file is another prompt.
    Raises ValueError for an unknown id or option, an empty or non-UTF-8 file, and a count of `<image>` other than
    0, 1 or 8.
    """
    name, *options = str(prompt).split("+")
    if not isinstance(prompt, Path) and name in _shipped_ids():
        return _shipped(name, options)
    path = Path(prompt)
    if not path.is_file():
        raise ValueError(f"no prompt {str(prompt)!r}: give a text file or one of {', '.join(_shipped_ids())}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"the prompt file {path.name} is not UTF-8 text") from e
    text = _with_image_token(text.replace("\r\n", "\n").strip(), path.name)
    version = _hash(text)
    return Prompt(f"{re.sub(r'[^A-Za-z0-9._-]+', '-', path.stem)}-{version[:8]}", text, version)


def list_prompts() -> list[Prompt]:
    """Every shipped prompt at its default length, sorted by id."""
    return [load_prompt(name) for name in _shipped_ids()]


def length_text(length: Length) -> str:
    """The instruction that asks for an answer of that length, for questions in free text."""
    return _read(_FOLDER / "lengths" / f"{length}.txt").removeprefix("- ")


def _shipped_ids() -> list[str]:
    return sorted(p.stem for p in _FOLDER.glob("*.txt"))


def _shipped(name: str, options: list[str]) -> Prompt:
    text = _read(_FOLDER / f"{name}.txt")
    lengths = [o for o in options if o in LENGTHS]
    unknown = [o for o in options if o not in (*LENGTHS, _KNOWLEDGE)]
    if unknown or len(lengths) > 1 or len(options) != len(set(options)):
        raise ValueError(
            f"{'+'.join([name, *options])!r}: the options of a prompt are one of {', '.join(LENGTHS)}, and {_KNOWLEDGE}"
        )
    knowledge = _KNOWLEDGE in options
    if lengths and "{length}" not in text:
        raise ValueError(f"{name} has one fixed length; the meddam prompts take +{lengths[0]}")
    if knowledge and "{knowledge}" not in text:
        raise ValueError(
            f"{name} has no knowledge to add; expert variants (such as meddam-v1-lung-ct) take +{_KNOWLEDGE}"
        )
    length = lengths[0] if lengths else DEFAULT_LENGTH
    text = text.replace("{length}", _read(_FOLDER / "lengths" / f"{length}.txt"))
    background = _read(_FOLDER / _KNOWLEDGE / f"{name.removeprefix('meddam-v1-')}.txt") if knowledge else ""
    text = _with_image_token(text.replace("{knowledge}", "\n" + background if background else "").rstrip(), name)
    suffix = [length] if length != DEFAULT_LENGTH else []
    return Prompt("+".join([name, *suffix, *([_KNOWLEDGE] if knowledge else [])]), text, _hash(text))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _with_image_token(text: str, name: str) -> str:
    if not text.replace(IMAGE_TOKEN, "").strip():
        raise ValueError(f"the prompt {name} is empty")
    views = text.count(IMAGE_TOKEN)
    if views == 0:
        return f"{IMAGE_TOKEN}\n{text}"
    if views not in (1, VIDEO_VIEWS):
        raise ValueError(
            f"the prompt {name} has {views} {IMAGE_TOKEN}; write 1 for an image, {VIDEO_VIEWS} for a video, or none"
        )
    return text


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
