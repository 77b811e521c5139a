"""The shipped templates and concepts, the linter, and the language of terms."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qa_library import lint, load_concepts, load_library, read_template_set
from qa_library.lint import lint_set
from qa_library.schema import TemplateSet
from qa_library.terms import compile_term, singular, tokens

DATA = Path(__file__).parents[1] / "data"
TEMPLATES = Path(__file__).parents[2] / "qa_library" / "templates"


def test_the_shipped_library_has_no_problems() -> None:
    assert lint(load_library()) == []


def test_every_label_of_the_datasets_has_a_template_or_a_reason() -> None:
    library = load_library()
    findings = library.sets["vindr_cxr"].attribute("finding").values
    assert len(findings) == 22
    assert [v.id for v in findings if not v.ask] == ["other_lesion"]
    concepts = (DATA / "skincon_concepts.txt").read_text().split("\n")
    labels = [label for a in library.sets["skincon"].attributes for v in a.values for label in v.labels]
    assert sorted(labels) == sorted(c for c in concepts if c)
    assert len(labels) == 48
    lidc = library.sets["lidc_idri"]
    covered = {label for a in lidc.attributes for label in a.labels} | {e.label for e in lidc.excluded}
    readers_form = (
        "subtlety internalStructure calcification sphericity margin lobulation spiculation texture malignancy"
    )
    assert set(readers_form.split()) <= covered


def test_concepts_carry_confirmed_codes_only() -> None:
    with (DATA / "ontology_codes.csv").open() as file:
        rows = list(csv.DictReader(file))
    exact = {r["radlex_rid"]: r["radlex_label"] for r in rows if r["radlex_match"] == "exact"}
    codes = [c for cs in load_concepts().values() for c in cs]
    radlex = {c.code: c.display for c in codes if c.system == "RadLex"}
    assert len(radlex) >= 25
    assert radlex.items() <= exact.items()
    assert {c.system for c in codes} == {"RadLex", "DCM"}


def test_users_bring_their_own_codes_and_templates(tmp_path: Path) -> None:
    own = tmp_path / "snomed.yaml"
    own.write_text(
        'systems: {SNOMED: {name: SNOMED CT, version: "1", uri: "http://snomed.info/sct"}}\n'
        "concepts: {pneumothorax: {codes: [{system: SNOMED, code: '36118008', display: Pneumothorax}]}}\n"
    )
    assert [c.system for c in load_concepts(own)["pneumothorax"]] == ["RadLex", "SNOMED"]
    own.write_text("concepts: {x: {codes: [{system: ICD, code: '1', display: x}]}}")
    with pytest.raises(ValueError, match="ICD"):
        load_concepts(own)
    template = yaml.safe_load((TEMPLATES / "lidc_idri.yaml").read_text())
    template["id"], template["datasets"] = "our_nodules", ["our-ct"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "ours.yaml").write_text(yaml.safe_dump(template))
    library = load_library(tmp_path / "own")
    found = library.find("our-ct", "CT")
    assert found is not None
    assert found.id == "our_nodules"
    assert library.version != load_library().version


def test_a_template_file_with_faults_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("id: x\nversion: 0\nunknown: 1\n")
    with pytest.raises(ValueError, match=r"bad\.yaml: .*version.*unknown"):
        read_template_set(file)
    file.write_text("a: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        read_template_set(file)


FAULTS = {
    "names the value itself": lambda v: v[0].update(confusers=["sharp"]),
    "which is not there": lambda v: v[0].update(confusers=["soft"]),
    "has no words": lambda v: v[0].update(terms=[], adjectives=[]),
    "belongs to both": lambda v: v[1].update(terms=[*v[1]["terms"], "circumscribed"]),
    "not in concepts.yaml": lambda v: v[0].update(concept="RID1"),
    "overlap": lambda v: v[1].update(scale=[1, 4]),
    "is there twice": lambda v: v[1].update(id="sharp"),
    "needs words": lambda v: v[0].update(terms=[".. sharp"]),
    "runs backwards": lambda v: v[0].update(scale=[5, 4]),
}


@pytest.mark.parametrize("message", FAULTS)
def test_the_linter_finds(message: str) -> None:
    content = yaml.safe_load((TEMPLATES / "lidc_idri.yaml").read_text())
    margin = next(a for a in content["attributes"] if a["id"] == "margin")
    FAULTS[message](margin["values"])
    problems = lint_set(TemplateSet.model_validate(content), set(load_library().concepts))
    assert any(message in p for p in problems), problems


def test_the_linter_finds_wording_that_gives_the_answer_away() -> None:
    content = yaml.safe_load((TEMPLATES / "lidc_idri.yaml").read_text())
    content["attributes"][0]["negative"] = "Is spiculation wrongly stated?"
    problems = lint_set(TemplateSet.model_validate(content), set(load_library().concepts))
    assert problems == ["lidc_idri: spiculation: the negative wording tells the judge what is expected"]


def test_importing_the_library_loads_neither_ray_nor_torch() -> None:
    check = "import qa_library, sys; print([m for m in ('ray', 'torch', 'meddam_core') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("term", "text", "found"),
    [
        ("pleural effusion", "bilateral pleural effusions", True),
        ("pulmonary edema", "pulmonary oedema", True),
        ("part solid", "A part-solid nodule", True),
        ("enlarged/dilated aorta", "a dilated aorta", True),
        ("aorta .. enlarged", "the aorta appears mildly enlarged", True),
        ("aorta .. enlarged", "the aorta is calcified and the heart is much enlarged", False),
        ("aorta .. enlarged", "the aorta is normal. Enlarged heart", False),
        ("atelecta*", "atelectatic bands", True),
        ("nodule", "nodules", True),
        ("mass", "masses", True),
        ("bulla", "tense bullae", True),
        ("effusion", "effusive", False),
    ],
)
def test_terms_match(term: str, text: str, found: bool) -> None:
    words = [t.word for t in tokens(text)]
    pattern = compile_term(term)
    assert any(pattern.match(words, i) is not None for i in range(len(words))) == found


@given(st.text())
def test_any_text_has_tokens(text: str) -> None:
    for token in tokens(text):
        assert token.word == singular(token.word) or token.word.endswith("s")
