"""The claim audit on written captions and on captions of phantoms."""

from __future__ import annotations

import pytest

from meddam_core.judging.claims import FREE, KIND, ClaimTally, audit
from meddam_core.judging.controls import shuffled_captions, truth_captions
from meddam_core.records import Label
from qa_library.truth import Truth, truth_of
from tests.meddam_core.judging.test_scores import LIBRARY, phantoms

NODULE = LIBRARY.sets["lidc_idri"]
KNOWN = {"spiculation": "5", "lobulation": "1", "texture": "3", "margin": "5", "diameter_mm": "12"}


def truth(**labels: str) -> Truth:
    return truth_of(NODULE, [Label(name=name, value=value) for name, value in (KNOWN | labels).items()])


def found(caption: str, **labels: str) -> dict[tuple[str, str, str], str]:
    return {(c.attribute, c.value, c.status): c.verdict for c in audit(caption, NODULE, truth(**labels))}


def test_each_claim_is_held_against_what_is_known() -> None:
    caption = "A 12 mm spiculated nodule with an ill-defined margin. No lobulation. It is likely benign."
    assert found(caption) == {
        (KIND, "lidc_idri", "stated"): "supported",
        ("size", "mm", "stated"): "supported",
        ("spiculation", "spiculated", "stated"): "supported",
        ("margin", "poorly_defined", "stated"): "contradicted",
        ("lobulation", "lobulated", "denied"): "supported",
        (FREE, "", "stated"): "unverifiable",
    }


def test_a_wrong_length_and_a_denied_truth_are_contradicted() -> None:
    claims = found("A nodule of 40 mm without spiculation.")
    assert claims["size", "mm", "stated"] == "contradicted"
    assert claims["spiculation", "spiculated", "denied"] == "contradicted"


def test_two_parts_make_the_whole() -> None:
    assert set(found("It has a solid and a ground-glass component.").values()) == {"supported"}
    assert found("A ground-glass nodule.")["texture", "ground_glass", "stated"] == "contradicted"


def test_undecided_labels_verify_nothing() -> None:
    assert found("A spiculated nodule.", spiculation="3")["spiculation", "spiculated", "stated"] == "unverifiable"


def test_a_broader_word_is_not_contradicted() -> None:
    film = LIBRARY.sets["vindr_cxr"]
    labels = {v.labels[0]: "absent" for v in film.attribute("finding").values}
    known = truth_of(film, [Label(name=n, value=v) for n, v in {**labels, "Consolidation": "present"}.items()])
    verdicts = {c.value: c.verdict for c in audit("An opacity, and a pneumothorax.", film, known)}
    assert verdicts == {"lung_opacity": "unverifiable", "pneumothorax": "contradicted"}


def test_a_value_said_twice_is_one_claim_and_nothing_is_none() -> None:
    claims = audit("A spiculated nodule. The nodule is spiculated.", NODULE, truth())
    assert [c.attribute for c in claims] == [KIND, "spiculation"]
    assert audit("", NODULE, truth()) == []


def test_truth_made_captions_of_phantoms_claim_what_is_so_and_shuffled_ones_do_not() -> None:
    _, known, _ = phantoms()
    captions = truth_captions(known, LIBRARY)
    tallies = []
    for texts in (captions, shuffled_captions(captions, known, LIBRARY)):
        tally = ClaimTally()
        for region in known:
            template_set = LIBRARY.find(region.dataset, region.modality)
            assert template_set is not None
            own = truth_of(template_set, region.labels)
            tally.add(audit(texts[region.region_id], template_set, own), own)
        tallies.append(tally)
    made, dealt = tallies
    assert (made.precision, made.recall) == (1.0, 1.0)
    assert made.num_contradicted_captions == 0
    assert dealt.precision is not None
    assert dealt.precision < 0.7
    assert dealt.num_contradicted_captions > 0.7 * dealt.num_captions
    assert dealt.contradictions.total() == pytest.approx(dealt.count("contradicted"))
