"""Large JSON files, an array element at a time: COCO's annotations take gigabytes when loaded whole.

    for name, element in array_elements(stream, {"images", "annotations"}): ...

Invariant: memory holds one element and one chunk of text, besides the values of other top-level names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

CHUNK = 1 << 20
_SPACE = " \t\r\n"
_AFTER = tuple(",]}" + _SPACE)
"""What may stand right after a number."""


class TextStream(Protocol):
    """Something that text can be read from."""

    def read(self, size: int, /) -> str:
        """At most `size` characters; "" at the end."""
        ...


class _Cursor:
    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False

    def _more(self) -> bool:
        chunk = "" if self._ended else self._stream.read(max(CHUNK, len(self._text) - self._at))
        self._ended = not chunk
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Steps over the next character. Raises ValueError if it is another."""
        if self.peek() != character:
            raise ValueError(f"expected {character!r}")
        self._at += 1

    def value(self) -> Any:
        """The next whole value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except ValueError:
                if not self._more():
                    raise
                continue
            cut = isinstance(value, int | float) and self._text[end : end + 1] not in _AFTER
            if cut and self._more():
                continue  # a number may go on in the next chunk
            self._at = end
            return value


def array_elements(stream: TextStream, names: set[str]) -> Iterator[tuple[str, Any]]:
    """(name, element) of the top-level arrays called `names`, in file order. Other values are skipped.

    Raises ValueError where the file is not a JSON object, or where it is cut short.
    """
    cursor = _Cursor(stream)
    cursor.take("{")
    while cursor.peek() != "}":
        name = cursor.value()
        cursor.take(":")
        if name not in names or cursor.peek() != "[":
            cursor.value()
        else:
            cursor.take("[")
            while cursor.peek() != "]":
                yield name, cursor.value()
                if cursor.peek() == ",":
                    cursor.take(",")
            cursor.take("]")
        if cursor.peek() == ",":
            cursor.take(",")
    cursor.take("}")
