"""Configuration keys that the reference's inference code never reads, by file (NVlabs/describe-anything, 153ad3d).

A key stands here only if its value cannot change a caption. Everything else is read, checked, or refused (config.py).
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HOUSEKEEPING = _names("""
    _name_or_path _commit_hash _from_model_config auto_map transformers_version torch_dtype dtype return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 pruned_heads is_encoder_decoder is_decoder
    cross_attention_hidden_size add_cross_attention tie_encoder_decoder chunk_size_feed_forward task_specific_params
    problem_type finetuning_task id2label label2id tokenizer_class prefix initializer_range initializer_factor
    use_cache max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sep_token_id
    decoder_start_token_id tf_legacy_loss
""")
"""What Hugging Face's configuration classes write into every file. Generation settings come with each request."""

ROOT = _names("""
    hidden_size mm_hidden_size interpolate_mode vision_resolution num_video_frames s2 s2_scales s2_max_split_size
    mm_use_im_start_end mm_use_im_patch_token resume_path model_dtype mm_projector_type mm_vision_tower drop_path_rate
""")
LLM = _names("model_max_length tokenizer_padding_side pretraining_tp attention_dropout bos_token_id pad_token_id")
"""`model_max_length` is overwritten by the reference's loader, so it never scales the rotary positions."""
VISION = _names("attention_dropout vision_use_head")
PROJECTOR = _names("architectures")
CONTEXT = _names("""
    architectures num_channels num_mask_channels image_size attention_dropout residual_dropout
    crop_position_single_embedding trainable_crop_position_embedding crop_embedding_mode
""")
PREPROCESSOR = _names("do_convert_rgb do_resize resample image_processor_type processor_class feature_extractor_type")
"""The reference resizes with PIL before its processor does, so the processor's own filter never acts."""
