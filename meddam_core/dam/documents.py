"""The configuration as the JSON documents of a checkpoint folder, and the dimensions of the published model.

`parse_config(documents(config)) == config` for every configuration, so what is saved here is what is loaded there, by
us and by the reference.
"""

from __future__ import annotations

from typing import Any

from meddam_core.dam.architecture import ContextConfig, DamConfig, LlmConfig, ViewConfig, VisionConfig

# NVlabs/describe-anything with VILA1.5-3B's parts: Sheared-LLaMA 2.7B and SigLIP so400m at 384 pixels.
DAM_3B = DamConfig(
    llm=LlmConfig(
        vocab_size=32000,
        hidden_size=2560,
        intermediate_size=6912,
        num_layers=32,
        num_heads=20,
        num_kv_heads=20,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        tokenizer_model_max_length=4096,
        eos_token_ids=(2,),
    ),
    vision=VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_layers=27, num_heads=16, image_size=384, patch_size=14
    ),
    context=ContextConfig(num_layers=27, num_heads=16, intermediate_size=4304, patch_size=14),
    view=ViewConfig(size=384),
)


def documents(config: DamConfig) -> dict[str, dict[str, Any]]:
    """JSON documents by path relative to the checkpoint folder; keys of the files it was read from are kept."""
    parts = {
        "llm/config.json": _llm(config.llm),
        "vision_tower/config.json": _vision(config.vision),
        "vision_tower/preprocessor_config.json": _view(config.view),
        "mm_projector/config.json": {
            "architectures": ["MultimodalProjector"],
            "model_type": "v2l_projector",
            "mm_projector_type": "mlp_downsample",
        },
        "context_provider/config.json": _context(config.context, config.vision),
        "llm/generation_config.json": {"eos_token_id": list(config.llm.eos_token_ids) or None},
    }
    for name, written in parts.items():
        parts[name] = {**config.files.get(name, {}), **written}
    root = {
        **config.files.get("config.json", {}),
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "image_aspect_ratio": "resize",
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": "cls_patch",
        "hidden_size": config.llm.hidden_size,
        "mm_hidden_size": config.vision.hidden_size,
        "resume_path": "./",  # the reference reads the component folders only where this is not empty
        "model_dtype": "torch.float16",
        **{f"{name.split('/')[0]}_cfg": parts[name] for name in parts if name.endswith("/config.json")},
    }
    return {"config.json": root, **parts}


def _llm(llm: LlmConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "max_position_embeddings": llm.max_position_embeddings,
        "tokenizer_model_max_length": llm.tokenizer_model_max_length,
        "eos_token_id": list(llm.eos_token_ids) or None,
    }


def _vision(vision: VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "num_mask_channels": 1,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
    }


def _view(view: ViewConfig) -> dict[str, Any]:
    return {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_processor_type": "SiglipImageProcessor",
        "resample": 3,
        "size": {"height": view.size, "width": view.size},
        "image_mean": list(view.mean),
        "image_std": list(view.std),
        "rescale_factor": view.rescale_factor,
    }


def _context(context: ContextConfig, vision: VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["ContextProvider"],
        "model_type": "context_provider",
        "context_provider_type": "cross_attn_end_to_all",
        "context_provider_layer_indices": None,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden_size,
        "intermediate_size": context.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": context.num_heads,
        "num_channels": 3,
        "num_mask_channels": 1,
        "image_size": vision.image_size,
        "patch_size": context.patch_size,
        "layer_norm_eps": context.layer_norm_eps,
        "zero_init_output": context.zero_init_output,
        "context_image_as_queries": context.context_image_as_queries,
        "masked_cross_attn": context.masked_cross_attn,
        "treat_image_as_cimage": context.treat_image_as_cimage,
    }
