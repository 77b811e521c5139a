"""Configuration: read strictly, refused with everything that is wrong at once."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meddam_core.dam.config import component_folders, parse_config, read_config
from meddam_core.dam.documents import DAM_3B, documents
from tests.meddam_core.dam.small import CHECKPOINT, CONFIG, small_config


def test_the_oracle_checkpoint_is_read() -> None:
    config = read_config(CHECKPOINT)
    assert (config.view_size, config.num_image_tokens, config.num_used_layers) == (112, 16, 3)
    assert config.llm.head_dim == 16 and config.context_length == 4096 and config.llm.eos_token_ids == (2,)
    assert not config.context.treat_image_as_cimage and config.view.mean == (0.5, 0.5, 0.5)


def test_dam_3b_has_196_tokens_a_view_and_skips_its_last_layer() -> None:
    assert DAM_3B.num_image_tokens == 196 and DAM_3B.num_used_layers == 26 and DAM_3B.vision.grid == 27


@pytest.mark.parametrize(
    "config",
    [
        DAM_3B,
        CONFIG,
        small_config(context__treat_image_as_cimage=True, llm__tie_word_embeddings=True, llm__eos_token_ids=(2, 7)),
        small_config(context__context_image_as_queries=True, select_layer=-1, llm__tokenizer_model_max_length=None),
        small_config(context__masked_cross_attn=True, context__zero_init_output=False),
    ],
)
def test_what_is_written_is_what_is_read(config: Any) -> None:
    written = json.loads(json.dumps(documents(config)))
    assert parse_config(written) == config


def _documents(**changes: Any) -> dict[str, dict[str, Any]]:
    """Documents of the small model; a key is file__key, the value ... removes it."""
    files = copy.deepcopy(documents(CONFIG))
    names = {"root": "config.json", "pre": "vision_tower/preprocessor_config.json", "llm": "llm/config.json",
             "vision": "vision_tower/config.json", "context": "context_provider/config.json",
             "projector": "mm_projector/config.json"}  # fmt: skip
    for name, value in changes.items():
        file, _, key = name.partition("__")
        if value is ...:
            del files[names[file]][key]
        else:
            files[names[file]][key] = value
    return files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"root__image_aspect_ratio": "pad"}, "image_aspect_ratio is 'pad'; implemented: 'resize'"),
        ({"root__mm_vision_select_feature": "patch"}, "mm_vision_select_feature is 'patch'"),
        ({"root__mm_vision_select_feature": ...}, "is missing, which means 'patch'"),
        ({"root__mask_encoder_cfg": {"a": 1}}, "mask_encoder_cfg"),
        ({"root__mm_vision_select_layer": -9}, "outside the vision tower's layers"),
        ({"root__new_switch": True}, "config.json: new_switch = true is not a key"),
        ({"llm__hidden_act": "gelu"}, "hidden_act is 'gelu'; implemented: 'silu'"),
        ({"llm__attention_bias": True}, "attention_bias is True"),
        ({"llm__model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"llm__rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary positions"),
        ({"llm__rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "scaled rotary positions"),
        ({"llm__head_dim": 99}, "head_dim is 99"),
        ({"llm__num_key_value_heads": 4}, "4 key-value heads do not divide"),
        ({"llm__hidden_size": "48"}, "hidden_size is '48'; expected a int"),
        ({"llm__num_hidden_layers": ...}, "num_hidden_layers is missing"),
        ({"llm__rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"vision__num_mask_channels": 0}, "num_mask_channels is 0; implemented: 1"),
        ({"vision__architectures": ["CLIPVisionModel"]}, "implemented: a SigLIP vision model"),
        ({"pre__size": {"height": 64, "width": 64}}, "views of 64 pixels do not make the 9 x 9 patches"),
        ({"pre__size": {"height": 128, "width": 64}}, "expected equal height and width"),
        ({"pre__image_mean": [0.5]}, "expected three numbers"),
        ({"pre__do_normalize": False}, "do_normalize is False"),
        ({"context__context_provider_type": "concat"}, "context_provider_type is 'concat'"),
        ({"context__context_provider_layer_indices": [0]}, "context_provider_layer_indices is [0]"),
        ({"context__num_hidden_layers": 2}, "num_hidden_layers is 2; implemented: 3"),
        ({"context__masked_cross_attn": True, "context__context_image_as_queries": True}, "not defined with"),
        ({"projector__mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="cannot be loaded as it is") as refused:
        parse_config(_documents(**change))
    assert said in str(refused.value)


def test_everything_wrong_is_listed_at_once() -> None:
    wrong = _documents(root__new_switch=1, llm__hidden_act="gelu", vision__extra=2, pre__crop=3, context__gate="tanh")
    with pytest.raises(ValueError, match="cannot be loaded") as refused:
        parse_config(wrong)
    said = str(refused.value)
    assert all(word in said for word in ("new_switch", "hidden_act", "extra", "crop", "gate"))
    assert said.count("\n  - ") == 5


def test_keys_without_effect_at_inference_are_allowed() -> None:
    files = _documents(root__tune_language_model=True, root__mm_projector_lr=None, root__s2=True, llm__pretraining_tp=1)
    assert parse_config(files) == CONFIG


def test_transformers_5_rope_theta_is_found() -> None:
    files = _documents(llm__rope_theta=..., llm__rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert parse_config(files).llm.rope_theta == 5000.0


def test_eos_ids_come_from_the_generation_config_first() -> None:
    files = _documents(llm__eos_token_id=5)
    files["llm/generation_config.json"] = {"eos_token_id": [2, 9]}
    assert parse_config(files).llm.eos_token_ids == (2, 9)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json is missing: this is not a DAM checkpoint folder"):
        read_config(tmp_path)
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "dam"))
    shutil.rmtree(folder / "mm_projector")
    root = json.loads((folder / "config.json").read_text())
    root["context_provider_cfg"] = None
    (folder / "config.json").write_text(json.dumps(root))
    with pytest.raises(ValueError, match="cannot be loaded") as refused:
        read_config(folder)
    assert "mm_projector: there is no" in str(refused.value) and "context_provider_cfg is None" in str(refused.value)


def test_a_component_may_lie_elsewhere(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "dam"))
    shutil.move(folder / "llm", tmp_path / "language")
    root = json.loads((folder / "config.json").read_text())
    root["llm_cfg"] = str(tmp_path / "language")
    (folder / "config.json").write_text(json.dumps(root))
    assert component_folders(folder)["llm"] == tmp_path / "language"
    assert read_config(folder) == read_config(CHECKPOINT)


def test_reading_the_configuration_loads_no_torch() -> None:
    code = (
        "import sys; from meddam_core.dam.config import read_config; "
        f"read_config({str(CHECKPOINT)!r}); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
