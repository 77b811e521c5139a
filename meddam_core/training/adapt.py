"""What is trained: everything, LoRA on the language model, the language model beside its projector, or the adapters and
projector only.

    adapt(dam, "lora", rank=16)        # before training
    merge_lora(dam)                    # before writing: the official layout has no LoRA

Invariant: weights that the network never runs (its last layer where an earlier one is selected, the last norm, the
pooling head) are never trained, so that they leave as they came.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from meddam_core.dam.model import Dam

Mode = Literal["full", "lora", "language", "projector"]
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(dam: Dam, mode: Mode, *, rank: int = 16, alpha: int | None = None) -> None:
    """Sets which parameters are trained; for LoRA also adds its own, in float32, starting as no change at all.

    Raises ValueError for an unknown mode, and for LoRA where peft is not installed.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"there is no way of training {mode!r}; use one of {', '.join(get_args(Mode))}")
    dam.requires_grad_(mode == "full")
    if mode == "lora":
        peft = import_peft()
        config = peft.LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=LORA_TARGETS, lora_dropout=0.0)
        peft.inject_adapter_in_model(config, dam.llm)
    if mode == "language":
        dam.llm.requires_grad_(True)
    if mode != "full":
        dam.mm_projector.requires_grad_(True)
    if mode in ("lora", "projector"):
        dam.context_provider.requires_grad_(True)
    for module in dead_modules(dam):
        module.requires_grad_(False)


def import_peft() -> Any:
    """The library. Raises ValueError where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ValueError("--train lora needs peft: pip install 'meddam[train]', or use --train language") from error
    return peft


def dead_modules(dam: Dam) -> list[nn.Module]:
    """Parts whose output nothing reads (facts of the reference: it selects features of an earlier layer)."""
    tower = dam.vision_tower.vision_model
    used = dam.config.num_used_layers
    return [tower.post_layernorm, tower.head, *tower.encoder.layers[used:], *dam.context_provider.adapters[used:]]


def merge_lora(dam: Dam) -> None:
    """Adds LoRA's changes to the weights they belong to and takes its modules away. Nothing where there are none."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(dam.llm.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(dam.llm.get_submodule(parent), leaf, layer.get_base_layer())
    dam.requires_grad_(True)
