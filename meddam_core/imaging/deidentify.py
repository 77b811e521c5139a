"""What of a decoded file may go into a row: an allow-list, and keyed hashes in place of identifiers.

A row's fields are filled from the typed fields of `Decoded` alone; nothing of a header is copied because nobody thought
of removing it (PS3.15 Annex E removes, this package admits). Keys are HMAC-SHA256 with the user's secret: stable over
ingests with the same secret, worthless without it.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.png import encode_png, preview_jpeg
from meddam_core.imaging.render import render_stored, resolve_window
from meddam_core.records import EncodedImage, Window

_HASH_BYTES = 16
_MAY_SHOW_IDENTITY = frozenset({"ES", "OT", "SC", "US", "XC"})
"""Modalities whose pixels often carry a name, a date or a face (PS3.15 E.3.1)."""


def keyed_hash(secret: bytes | str, value: str) -> str:
    """32 hex digits that stand for `value`. Raises ValueError for an empty secret: hashes would be guessable."""
    key = secret.encode() if isinstance(secret, str) else secret
    if not key:
        raise ValueError("give a secret for the keyed hashes: without one, identifiers could be guessed from them")
    return hmac.new(key, value.encode(), hashlib.sha256).digest()[:_HASH_BYTES].hex()


def identity_keys(secret: bytes | str, decoded: Decoded) -> dict[str, str | None]:
    """patient_key and study_key of a row; None where the file names none."""
    who = decoded.identity
    return {
        "patient_key": keyed_hash(secret, f"patient:{who.patient_id}") if who.patient_id else None,
        "study_key": keyed_hash(secret, f"study:{who.study_uid}") if who.study_uid else None,
    }


def image_fields(decoded: Decoded, window: Window | str | None = None) -> dict[str, Any]:
    """The fields of `records.Image` that come from the file: pixels, preview, and the allow-listed facts.

    window: the recipe's, a CT preset's name, or None for the default; the one that is used is recorded.
    """
    chosen = window if window == "three_window" else resolve_window(decoded.stored, decoded, window)
    preview = render_stored(decoded.stored, decoded, chosen)
    return {
        "image": EncodedImage(bytes=encode_png(decoded.stored)),
        "preview": EncodedImage(bytes=preview_jpeg(preview)),
        "frames": [EncodedImage(bytes=encode_png(stored)) for stored in decoded.context] or None,
        "modality": decoded.modality,
        "frame": decoded.frame,
        "width": decoded.width,
        "height": decoded.height,
        "stored_bits": decoded.stored_bits,
        "rescale": decoded.rescale,
        "window": chosen if isinstance(chosen, Window) else decoded.window,
        "lut": decoded.lut,
        "photometric": decoded.photometric,
        "padding": list(decoded.padding) if decoded.padding else None,
        "decoder": decoded.decoder,
        "pixel_spacing_mm": list(decoded.pixel_spacing_mm) if decoded.pixel_spacing_mm else None,
        "orientation": decoded.orientation,
        "burned_in_annotation": decoded.burned_in_annotation,
    }


def may_show_identity(modality: str, burned_in_annotation: bool | None) -> bool:
    """Whether the pixels themselves may name or show the patient: such pictures need a look before they leave."""
    return burned_in_annotation is True or (burned_in_annotation is None and modality in _MAY_SHOW_IDENTITY)
