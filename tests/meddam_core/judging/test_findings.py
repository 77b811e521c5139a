"""Captions as coded findings."""

from __future__ import annotations

from meddam_core.judging.findings import findings, template_set_of
from qa_library.loader import load_library

LIBRARY = load_library()


def test_stated_denied_and_measured() -> None:
    caption = "A solid nodule of 12 mm with a spiculated margin, without calcification."
    found = {(f.attribute, f.value): f for f in findings(caption, LIBRARY.sets["lidc_idri"], LIBRARY)}
    margin = found["spiculation", "spiculated"]
    assert margin.present and not margin.hedged
    assert [(c.system, c.code) for c in margin.codes] == [
        (c.system, c.code) for c in LIBRARY.concepts["spiculated margin"]
    ]
    assert found["texture", "solid"].present
    assert not any(f.present for (attribute, _), f in found.items() if "calcification" in attribute)
    assert [f.length_mm for f in found.values() if f.length_mm] == [12.0]


def test_what_is_not_said_is_not_found_and_what_may_be_is_hedged() -> None:
    assert findings("An image.", LIBRARY.sets["vindr_cxr"], LIBRARY) == []
    (found,) = (
        f
        for f in findings("Possible pleural effusion.", LIBRARY.sets["vindr_cxr"], LIBRARY)
        if f.value == "pleural_effusion"
    )
    assert found.present and found.hedged
    assert found.codes[0].code == "RID34539"
    (denied,) = (
        f for f in findings("No pneumothorax.", LIBRARY.sets["vindr_cxr"], LIBRARY) if f.value == "pneumothorax"
    )
    assert not denied.present


def test_which_vocabulary() -> None:
    assert [getattr(template_set_of(LIBRARY, r, m), "id", None) for r, m in (
        ("phantom-ct", "CT"), ("ct", "CT"), ("chest-film", "DX"), ("idrid-all", "XC"), ("generic", "MR"),
    )] == ["phantom_ct", "lidc_idri", "vindr_cxr", "ophthalmology", None]  # fmt: skip
