"""The shipped prompts and prompt files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meddam_core.prompts import LENGTHS, list_prompts, load_prompt
from meddam_core.records import Label
from meddam_core.training.texts import Texts

ORACLE = Path(__file__).parents[2] / "data" / "oracle" / "dam_tiny"


def test_dam_prompts_are_the_reference_queries() -> None:
    queries = {load_prompt(p).text for p in ("dam-default", "dam-joint", "dam-video")}
    recorded = set()
    for path in sorted((ORACLE / "cases").glob("*.npz")):
        with np.load(path, allow_pickle=False) as case:
            recorded.add(str(case["prompt"]).split("USER: ", 1)[1].removesuffix(" ASSISTANT:"))
    assert queries == recorded, json.dumps(sorted(recorded), indent=1)


def test_every_shipped_prompt_is_ready_to_use() -> None:
    prompts = list_prompts()
    assert len({p.id for p in prompts}) == len(prompts) == len({p.version for p in prompts}) >= 9
    for prompt in prompts:
        assert prompt.num_views in (1, 8)
        assert ("{" in prompt.text) == prompt.tells_known == (prompt.id == "meddam-known-v1")
        assert prompt.text == prompt.text.strip()
        assert load_prompt(prompt.id) == prompt


def test_meddam_prompt_holds_every_instruction_of_the_paper() -> None:
    text = load_prompt("meddam-v1").text.lower()
    instructions = (
        "masked region",
        "abnormality",
        "type of finding",
        "where in the body",
        "radiology report",
        "one paragraph of three to six sentences",
        '"might"',
        '"could"',
        "outside the marked region",
        "bulleted list",
    )
    for words in instructions:
        assert words in text, words


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_change_the_text_and_the_id(length: str) -> None:
    prompt = load_prompt(f"meddam-v1-lung-ct+{length}")
    assert prompt.id == ("meddam-v1-lung-ct" if length == "paragraph" else f"meddam-v1-lung-ct+{length}")
    others = [load_prompt(f"meddam-v1-lung-ct+{other}").text for other in LENGTHS if other != length]
    assert prompt.text not in others


def test_knowledge_comes_with_the_expert_variants_only() -> None:
    plain, more = load_prompt("meddam-v1-chest-film"), load_prompt("meddam-v1-chest-film+knowledge")
    assert more.text.startswith(plain.text)
    assert "meniscus" in more.text
    assert "meniscus" not in plain.text
    assert load_prompt("meddam-v1-fundus+knowledge+phrase").id == "meddam-v1-fundus+phrase+knowledge"
    with pytest.raises(ValueError, match="knowledge"):
        load_prompt("meddam-v1+knowledge")


@pytest.mark.parametrize(
    "bad", ["nothing", "dam-default+phrase", "meddam-v1+short", "meddam-v1+phrase+sentence", "meddam-v1+"]
)
def test_unknown_prompts_and_options_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="prompt"):
        load_prompt(bad)


def test_a_file_is_named_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "my prompt.txt"
    file.write_text("Describe this.\r\n")
    first = load_prompt(file)
    assert first.text == "<image>\nDescribe this."
    assert first.id.startswith("my-prompt-")
    assert load_prompt(str(file)) == first
    file.write_text("Describe that.")
    assert load_prompt(file).id != first.id
    file.write_text("See <image> and tell.")
    assert load_prompt(file).text == "See <image> and tell."


@pytest.mark.parametrize("content", [b"", b" \n", b"<image>", b"<image><image> two", b"\xff\xfe\x00bad"])
def test_bad_files_are_refused_with_their_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.txt"):
        load_prompt(file)


def test_only_one_prompt_tells_what_is_known() -> None:
    labels = [Label(name="Pleural effusion", value="present"), Label(name="Pneumothorax", value="absent"),
              Label(name="Mass", value="undecided"), Label(name="part_of", value="left lung")]  # fmt: skip
    text = load_prompt("meddam-known-v1").about(labels)
    assert "known of it: Pleural effusion, no Pneumothorax, part of left lung.\n" in text
    assert "Mass" not in text
    assert "known of it: nothing." in load_prompt("meddam-known-v1+sentence").about([])
    assert load_prompt("meddam-v1").about(labels) == load_prompt("meddam-v1").text
    with pytest.raises(ValueError, match="tells the model what it is to learn"):
        Texts.of(("meddam-v1", "meddam-known-v1"), "truth")
