"""Keys of Hugging Face configs that do not change what a causal language model computes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# What wrote the file, and how it likes to be loaded and reported on.
_LOADING = """
    architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path
    _commit_hash tokenizer_class unsloth_version unsloth_fixed attn_implementation
    _attn_implementation _attn_implementation_autoset experts_implementation
    _experts_implementation use_cache torchscript use_bfloat16 return_dict output_attentions
    output_hidden_states output_router_logits return_dict_in_generate output_scores
    tf_legacy_loss chunk_size_feed_forward is_decoder tie_encoder_decoder prefix
    cross_attention_hidden_size tie_last_hidden_states
"""

# Training, and heads for other tasks.
_TRAINING = """
    initializer_range attention_dropout router_aux_loss_coef router_jitter_noise finetuning_task
    id2label label2id num_labels problem_type task_specific_params
"""

# Defaults of generation: generation_config.json and the command line decide these.
_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens pad_token_id sep_token_id decoder_start_token_id
"""

INERT_KEYS = frozenset((_LOADING + _TRAINING + _GENERATION).split())
"""Keys whose value is never looked at."""

FIXED_KEYS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "hidden_act": ("silu", "swish"),
        "quantization_config": (None,),
        "quantization": (None,),
        "compression_config": (None,),
        "auto_map": (None, {}),
        "pruned_heads": (None, {}),
        "per_layer_config": (None, {}),
        "is_encoder_decoder": (None, False),
        "add_cross_attention": (None, False),
        "mlp_bias": (None, False),
        "qkv_bias": (None, False),
        "pretraining_tp": (None, 1),
        "partial_rotary_factor": (None, 1),
        "shared_expert_intermediate_size": (None, 0),
    }
)
"""Keys that a family which does not read them itself takes only with one of these values."""

ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "quantization_config": "use the unquantized (bf16, f16 or f32) checkpoint",
        "quantization": "use the unquantized (bf16, f16 or f32) checkpoint",
        "compression_config": "use the unquantized (bf16, f16 or f32) checkpoint",
        "auto_map": "models with code of their own cannot be run",
        "rope_scaling": "only plain RoPE is; set it to null to use the model's native context",
        "rope_parameters": "only plain RoPE (rope_type default) is",
        "use_sliding_window": "give layer_types, the kind of attention of every layer",
        "max_window_layers": "a sliding window must cover all layers (max_window_layers 0)",
    }
)
"""What to do about a value that is not supported, by key."""
