"""The typed configuration of a DAM, read from the official checkpoint folder.

Layout (NVlabs/describe-anything, commit 153ad3d):

    ROOT/config.json            which components there are, and how their features are chosen
    ROOT/llm/config.json        Llama
    ROOT/vision_tower/config.json, preprocessor_config.json    SigLIP with a mask channel
    ROOT/mm_projector/config.json
    ROOT/context_provider/config.json

Rules:
- JSON only: importing this file loads neither torch nor transformers.
- Never guess silently. Every key is either read, checked against the one value that is implemented, or on the list of
  keys that the reference's inference code never reads. Anything else stops the load with one error that lists it all.
- A key that is absent takes the default of the reference's configuration class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meddam_core.dam import unread_keys as unread
from meddam_core.dam.architecture import ContextConfig, DamConfig, LlmConfig, ViewConfig, VisionConfig

__all__ = [
    "COMPONENTS",
    "ContextConfig",
    "DamConfig",
    "LlmConfig",
    "ViewConfig",
    "VisionConfig",
    "component_folders",
    "parse_config",
    "read_config",
    "read_json",
]

COMPONENTS = ("llm", "vision_tower", "mm_projector", "context_provider")


def component_folders(folder: Path) -> dict[str, Path]:
    """Where each component lies: ROOT/<name> if `<name>_cfg` is a dict, the path it names if it is a string.

    A relative path counts from the checkpoint folder, or from the working directory if it is not there.
    Raises ValueError that lists every component that is not there.
    """
    root = read_json(folder / "config.json")
    found, problems = {}, []
    for name in COMPONENTS:
        entry = root.get(f"{name}_cfg")
        if isinstance(entry, Mapping):
            path = folder / name
        elif isinstance(entry, str):
            path = folder / entry if (folder / entry).is_dir() else Path(entry)
        else:
            problems.append(f"config.json: {name}_cfg is {entry!r}; a DAM needs a dict or a path there")
            continue
        if not (path / "config.json").is_file():
            problems.append(f"{name}: there is no {path / 'config.json'}")
        found[name] = path
    _raise(folder, problems)
    return found


def read_config(folder: str | Path) -> DamConfig:
    """Read and check the configuration of the checkpoint in `folder`.

    Raises ValueError that lists every file that is missing and every key or value that is not implemented.
    """
    folder = Path(folder)
    parts = component_folders(folder)
    files = {"config.json": read_json(folder / "config.json")}
    for name, path in parts.items():
        files[f"{name}/config.json"] = read_json(path / "config.json")
    preprocessor = parts["vision_tower"] / "preprocessor_config.json"
    if not preprocessor.is_file():
        raise ValueError(f"{preprocessor} is missing: it says how pixels are scaled")
    files["vision_tower/preprocessor_config.json"] = read_json(preprocessor)
    generation = parts["llm"] / "generation_config.json"
    if generation.is_file():
        files["llm/generation_config.json"] = read_json(generation)
    return parse_config(files, origin=str(folder))


def parse_config(files: Mapping[str, Mapping[str, Any]], origin: str = "the checkpoint") -> DamConfig:
    """The configuration from its JSON documents, keyed by path relative to the checkpoint folder."""
    problems: list[str] = []
    select_layer = _read_root(_Keys(files["config.json"], "config.json", problems))
    llm = _read_llm(
        _Keys(files["llm/config.json"], "llm/config.json", problems), files.get("llm/generation_config.json", {})
    )
    vision = _read_vision(_Keys(files["vision_tower/config.json"], "vision_tower/config.json", problems))
    name = "vision_tower/preprocessor_config.json"
    view = _read_view(_Keys(files[name], name, problems))
    name = "context_provider/config.json"
    context = _read_context(_Keys(files[name], name, problems), vision)
    projector = _Keys(files["mm_projector/config.json"], "mm_projector/config.json", problems)
    projector.must_be("mm_projector_type", "mlp_downsample", default=None)
    projector.must_be("model_type", "v2l_projector", default="v2l_projector")
    projector.finish(unread.PROJECTOR)
    config = DamConfig(llm=llm, vision=vision, context=context, view=view, select_layer=select_layer, files=dict(files))
    problems += _inconsistent(config)
    _raise(origin, problems)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError that names the file if it is missing or something else."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: this is not a DAM checkpoint folder (config.json, llm/, vision_tower/, ...)"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def _raise(origin: object, problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  - {p}" for p in problems)
        raise ValueError(f"{origin} cannot be loaded as it is:{listed}")


class _Keys:
    """Takes keys out of one JSON object and notes everything that is missing, of the wrong type, or left over."""

    def __init__(self, values: Mapping[str, Any], file: str, problems: list[str]) -> None:
        self.values, self.file, self.problems = values, file, problems
        self.seen: set[str] = set()

    def take(self, key: str, kind: type, default: Any = None, *, at_least: float | None = None) -> Any:
        """The value of `key`; a problem if it is not a `kind`, or absent without a default."""
        self.seen.add(key)
        value = self.values.get(key, default)
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if value is None or not fits or (isinstance(value, bool) and kind is not bool):
            state = f"is {value!r}" if key in self.values else "is missing"
            self.problems.append(f"{self.file}: {key} {state}; expected a {kind.__name__}")
            return kind(1)
        if at_least is not None and not value >= at_least:
            self.problems.append(f"{self.file}: {key} is {value!r}; expected at least {at_least}")
            return kind(1)
        return value

    def must_be(self, key: str, *allowed: Any, default: Any) -> None:
        """A problem unless `key` (or the reference's default for it) is one of the implemented values."""
        self.seen.add(key)
        value = self.values.get(key, default)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            state = f"is {value!r}" if key in self.values else f"is missing, which means {default!r}"
            self.problems.append(f"{self.file}: {key} {state}; implemented: {', '.join(map(repr, allowed))}")

    def finish(self, ignored: frozenset[str], also: Callable[[str], bool] = lambda key: False) -> None:
        """Every key that nobody asked for and that is not known to be unread is a problem."""
        for key in sorted(set(self.values) - self.seen - ignored - unread.HOUSEKEEPING):
            if not also(key):
                self.problems.append(
                    f"{self.file}: {key} = {_short(self.values[key])} is not a key this implementation knows; "
                    "remove it from the file if it has no effect at inference"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_root(keys: _Keys) -> int:
    keys.must_be("model_type", "llava_llama", default=None)
    keys.must_be("architectures", ["LlavaLlamaModel"], default=["LlavaLlamaModel"])
    keys.must_be("image_aspect_ratio", "resize", default=None)
    keys.must_be("mm_vision_select_feature", "cls_patch", default="patch")
    keys.must_be("mask_encoder_cfg", None, default=None)
    select_layer = keys.take("mm_vision_select_layer", int)
    keys.seen.update(f"{name}_cfg" for name in COMPONENTS)
    keys.finish(unread.ROOT, also=lambda key: key.startswith("tune_") or key.endswith("_lr"))
    return int(select_layer)


def _read_llm(keys: _Keys, generation: Mapping[str, Any]) -> LlmConfig:
    keys.must_be("model_type", "llama", default=None)
    keys.must_be("architectures", ["LlamaForCausalLM"], default=["LlamaForCausalLM"])
    keys.must_be("hidden_act", "silu", default="silu")
    for key in ("attention_bias", "mlp_bias"):
        keys.must_be(key, False, default=False)
    num_heads = keys.take("num_attention_heads", int, at_least=1)
    hidden_size = keys.take("hidden_size", int, at_least=1)
    keys.must_be("head_dim", hidden_size // num_heads, None, default=None)
    longest = keys.values.get("tokenizer_model_max_length")
    keys.seen.add("tokenizer_model_max_length")
    kv_heads = keys.values.get("num_key_value_heads")  # an explicit null means: as many as there are heads
    keys.seen.add("num_key_value_heads")
    config = LlmConfig(
        vocab_size=keys.take("vocab_size", int, at_least=1),
        hidden_size=hidden_size,
        intermediate_size=keys.take("intermediate_size", int, at_least=1),
        num_layers=keys.take("num_hidden_layers", int, at_least=1),
        num_heads=num_heads,
        num_kv_heads=num_heads if kv_heads is None else keys.take("num_key_value_heads", int, at_least=1),
        rms_norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        rope_theta=_read_rope(keys),
        tie_word_embeddings=keys.take("tie_word_embeddings", bool, False),
        max_position_embeddings=keys.take("max_position_embeddings", int, 2048, at_least=1),
        tokenizer_model_max_length=None
        if longest is None
        else keys.take("tokenizer_model_max_length", int, at_least=1),
        eos_token_ids=_eos_ids(generation.get("eos_token_id", keys.values.get("eos_token_id", 2))),
    )
    keys.seen.add("eos_token_id")
    keys.finish(unread.LLM)
    return config


def _read_rope(keys: _Keys) -> float:
    """rope_theta, from its own key or from transformers 5's `rope_parameters`; scaled rotary positions are refused."""
    for key in ("rope_scaling", "rope_parameters"):
        keys.seen.add(key)
        scaling = keys.values.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        extra = {k: v for k, v in scaling.items() if k not in ("rope_type", "type", "rope_theta")}
        if kind != "default" or extra:
            keys.problems.append(
                f"{keys.file}: {key} is {_short(scaling)}; scaled rotary positions are not implemented"
            )
    nested = (keys.values.get("rope_parameters") or {}).get("rope_theta")
    if "rope_theta" not in keys.values and isinstance(nested, int | float):
        return float(nested)
    return float(keys.take("rope_theta", float, 10000.0))


def _eos_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _read_vision(keys: _Keys) -> VisionConfig:
    architectures = keys.values.get("architectures") or [""]
    keys.seen.add("architectures")
    if "siglip" not in str(architectures[0]).lower():
        keys.problems.append(f"{keys.file}: architectures is {architectures!r}; implemented: a SigLIP vision model")
    keys.must_be("model_type", "siglip_vision_model", default="siglip_vision_model")
    keys.must_be("hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    keys.must_be("num_channels", 3, default=3)
    keys.must_be("num_mask_channels", 1, default=0)
    config = VisionConfig(
        hidden_size=keys.take("hidden_size", int, at_least=1),
        intermediate_size=keys.take("intermediate_size", int, at_least=1),
        num_layers=keys.take("num_hidden_layers", int, at_least=1),
        num_heads=keys.take("num_attention_heads", int, at_least=1),
        image_size=keys.take("image_size", int, at_least=1),
        patch_size=keys.take("patch_size", int, at_least=1),
        layer_norm_eps=keys.take("layer_norm_eps", float, 1e-6),
    )
    keys.finish(unread.VISION)
    return config


def _read_view(keys: _Keys) -> ViewConfig:
    for key in ("do_rescale", "do_normalize"):
        keys.must_be(key, True, default=True)
    size = keys.take("size", dict)
    if set(size) != {"height", "width"} or size["height"] != size["width"] or not isinstance(size["height"], int):
        keys.problems.append(f"{keys.file}: size is {_short(size)}; expected equal height and width")
        size = {"height": 1}
    mean, std = (_three(keys, key) for key in ("image_mean", "image_std"))
    config = ViewConfig(
        size=size["height"], mean=mean, std=std, rescale_factor=keys.take("rescale_factor", float, 1 / 255)
    )
    keys.finish(unread.PREPROCESSOR)
    return config


def _three(keys: _Keys, key: str) -> tuple[float, float, float]:
    values = keys.take(key, list)
    if len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        keys.problems.append(f"{keys.file}: {key} is {values!r}; expected three numbers")
        return 0.5, 0.5, 0.5
    return float(values[0]), float(values[1]), float(values[2])


def _read_context(keys: _Keys, vision: VisionConfig) -> ContextConfig:
    keys.must_be("model_type", "context_provider", default="context_provider")
    keys.must_be("context_provider_type", "cross_attn_end_to_all", default=None)
    keys.must_be("hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    # Any other value makes the reference build no adapter at all (an enumerate tuple is compared with ints).
    keys.must_be("context_provider_layer_indices", None, default=None)
    keys.must_be("hidden_size", vision.hidden_size, default=768)
    keys.must_be("num_hidden_layers", vision.num_layers, default=12)
    config = ContextConfig(
        num_layers=vision.num_layers,
        num_heads=keys.take("num_attention_heads", int, 12, at_least=1),
        intermediate_size=keys.take("intermediate_size", int, 3072, at_least=1),
        patch_size=keys.take("patch_size", int, 16, at_least=1),
        layer_norm_eps=keys.take("layer_norm_eps", float, 1e-6),
        zero_init_output=keys.take("zero_init_output", bool, True),
        context_image_as_queries=keys.take("context_image_as_queries", bool, False),
        masked_cross_attn=keys.take("masked_cross_attn", bool, False),
        treat_image_as_cimage=keys.take("treat_image_as_cimage", bool, False),
    )
    keys.finish(unread.CONTEXT)
    return config


def _inconsistent(config: DamConfig) -> list[str]:
    """What each file allows on its own but the files together do not."""
    llm, vision, context, view = config.llm, config.vision, config.context, config.view
    problems = []
    if llm.hidden_size % llm.num_heads or llm.num_heads % llm.num_kv_heads or llm.head_dim % 2:
        problems.append(
            f"llm/config.json: {llm.num_heads} heads and {llm.num_kv_heads} key-value heads do not divide a hidden "
            f"size of {llm.hidden_size} into even heads"
        )
    for name, heads in (("vision_tower", vision.num_heads), ("context_provider", context.num_heads)):
        if vision.hidden_size % heads:
            problems.append(f"{name}/config.json: {heads} heads do not divide a hidden size of {vision.hidden_size}")
    if view.size // vision.patch_size != vision.grid or vision.grid < 1:
        problems.append(
            f"vision_tower: views of {view.size} pixels do not make the {vision.grid} x {vision.grid} patches that the "
            "position embeddings are for"
        )
    if not 0 <= config.num_used_layers <= vision.num_layers:
        problems.append(
            f"config.json: mm_vision_select_layer {config.select_layer} is outside the vision tower's layers"
        )
    if context.context_image_as_queries and context.masked_cross_attn:
        problems.append("context_provider/config.json: masked_cross_attn is not defined with context_image_as_queries")
    if context.masked_cross_attn and context.patch_size != vision.patch_size:
        problems.append("context_provider/config.json: patch_size differs from the vision tower's")
    return problems
