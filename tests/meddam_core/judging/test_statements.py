"""What captions state, and what several captions of one region agree on."""

from __future__ import annotations

import pytest

from meddam_core.judging.statements import consensus, statements
from meddam_core.records import Label
from qa_library import load_library
from qa_library.truth import truth_of

CT = load_library().sets["phantom_ct"]
FILM = load_library().sets["vindr_cxr"]


def test_statements_are_by_attribute_and_silence_is_none() -> None:
    found = statements(CT, "A small solid nodule with a spiculated margin in the left lung.")
    assert found["density"] == {"solid": "stated"}
    assert found["margin"] == {"spiculated": "stated"}
    assert found["side"] == {"left": "stated"}
    assert "texture" not in found
    assert statements(CT, "") == {}
    film = statements(FILM, "A pleural effusion without pneumothorax.")["finding"]
    assert film["pleural_effusion"] == "stated"
    assert film["pneumothorax"] == "denied"


def test_captions_vote_as_readers_do() -> None:
    captions = ["A solid nodule on the left.", "A solid mass on the left.", "A solid nodule.", "A cavitary nodule."]
    labels = {label.name: label for label in consensus(CT, captions)}
    assert labels["finding"] == Label(name="finding", value="nodule", trust=0.75)
    assert labels["density"] == Label(name="density", value="solid", trust=0.75)
    assert labels["side"] == Label(name="side", value="left", trust=0.5)  # silence counts against it
    truth = truth_of(CT, list(labels.values()), min_trust=0.6)
    assert truth.state("density", "solid") == "present"
    assert truth.state("density", "cavitary") == "absent"
    assert truth.state("side", "left") == "undecided"


def test_findings_that_are_there_or_not_are_voted_on_one_by_one() -> None:
    captions = ["A pleural effusion, no pneumothorax.", "A pleural effusion.", "No pleural effusion."]
    labels = {label.name: (label.value, label.trust) for label in consensus(FILM, captions)}
    assert labels["pleural_effusion"] == ("present", pytest.approx(2 / 3))
    assert labels["pneumothorax"] == ("absent", pytest.approx(1 / 3))
    assert truth_of(FILM, consensus(FILM, captions)).state("finding", "pneumothorax") == "undecided"
