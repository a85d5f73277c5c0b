"""GGUF files made of Hugging Face checkpoints, by hand, for the tests of what reads them.

Written with the gguf package's writer and quantizers; names, order of rows and keys are spelled out
here as llama.cpp's converter writes them, not taken from edgemoe.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[Any]
Pick = Callable[[str, tuple[int, ...]], str]
"""Name and shape of a tensor -> name of its type."""

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "mixtral": "llama",
    "granitemoe": "granitemoe",
}

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_ROLES = {
    "input_norm": "attn_norm.weight",
    "post_norm": "ffn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "router": "ffn_gate_inp.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "shared_router": "ffn_gate_inp_shexp.weight",
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
}
_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_PARTS |= {"w1": "gate", "w3": "up", "w2": "down"}


def read_hugging_face(directory: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """config.json and every tensor, float32."""
    raw = json.loads((directory / "config.json").read_text())
    tensors: dict[str, Array] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensors[name] = opened.get_tensor(name).float().numpy()
    return raw, tensors


def to_gguf_tensors(raw: Mapping[str, Any], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors as a GGUF holds them: its names, experts stacked, rows of q and k permuted."""
    out: dict[str, Array] = {}
    experts: dict[tuple[str, str], dict[int, Array]] = {}
    top = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    top |= {"model.norm.weight": "output_norm.weight"}
    for name, array in tensors.items():
        if name in top:
            out[top[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        blk = f"blk.{layer}."
        if rest.endswith(("experts.gate_up_proj", "input_linear.weight")):
            half = array.shape[1] // 2
            out[blk + "ffn_gate_exps.weight"] = array[:, :half]
            out[blk + "ffn_up_exps.weight"] = array[:, half:]
        elif rest.endswith(("experts.down_proj", "output_linear.weight")):
            out[blk + "ffn_down_exps.weight"] = array
        elif ".experts." in rest:
            _, _, number, part = rest.removesuffix(".weight").rsplit(".", 3)
            experts.setdefault((blk, _PARTS[part]), {})[int(number)] = array
        else:
            stem, _, kind = rest.rpartition(".")
            role = _NAMES[stem]
            if raw["model_type"] in ("mixtral", "granitemoe") and role in ("attn_q", "attn_k"):
                key = "num_attention_heads" if role == "attn_q" else "num_key_value_heads"
                array = permute(array, raw[key])
            if role == "ffn_gate_inp_shexp":
                array = array[0]
            out[f"{blk}{role}.{kind}"] = array
    for (blk, part), found in experts.items():
        out[f"{blk}ffn_{part}_exps.weight"] = np.stack([found[e] for e in range(len(found))])
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def permute(array: Array, heads: int) -> Array:
    """Rows in the order of RoPE over neighbours: half 0 and half 1 of each head interleaved."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(array.shape)


def expected(name: str, raw: Mapping[str, Any], stored: Mapping[str, Array]) -> Array:
    """What a non-expert tensor by edgemoe's name must be, given what the file's tensors hold."""
    if "." not in name:
        return stored[
            {"embed": "token_embd", "lm_head": "output", "norm": "output_norm"}[name] + ".weight"
        ]
    _, layer, role = name.split(".")
    array = stored[f"blk.{layer}.{_ROLES[role]}"]
    if raw["model_type"] in ("mixtral", "granitemoe") and role[:1] in "qk" and "norm" not in role:
        heads = raw["num_attention_heads" if role[0] == "q" else "num_key_value_heads"]
        order = permute(np.arange(len(array)), heads)
        back = np.empty_like(array)
        back[order] = array
        return back
    return array[None] if role == "shared_router" else array


def add_keys(writer: gguf.GGUFWriter, raw: Mapping[str, Any]) -> None:
    """The architecture's keys."""
    family = raw["model_type"]
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    rope = raw.get("rope_parameters") or raw
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_count(raw.get("num_experts", raw.get("num_local_experts")))
    writer.add_expert_used_count(raw["num_experts_per_tok"])
    writer.add_vocab_size(raw["vocab_size"])
    if raw.get("head_dim"):
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
        writer.add_rope_dimension_count(raw["head_dim"])
    if family.startswith("qwen"):
        writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
        writer.add_expert_weights_norm(raw["norm_topk_prob"])
    if family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(raw["shared_expert_intermediate_size"])
    if family == "olmoe":
        writer.add_expert_weights_norm(raw["norm_topk_prob"])
        if raw.get("clip_qkv") is not None:
            writer.add_clamp_kqv(raw["clip_qkv"])
    if family == "granitemoe":
        writer.add_attention_scale(raw["attention_multiplier"])
        writer.add_embedding_scale(raw["embedding_multiplier"])
        writer.add_residual_scale(raw["residual_multiplier"])
        writer.add_logit_scale(raw["logits_scaling"])
    if raw.get("sliding_window") and raw.get("use_sliding_window", True):
        writer.add_sliding_window(raw["sliding_window"])
        if family == "qwen2_moe":
            slides = [kind == "sliding_attention" for kind in raw["layer_types"]]
            writer.add_sliding_window_pattern(slides)


def add_tokenizer(writer: gguf.GGUFWriter, raw: Mapping[str, Any]) -> None:
    """Single printable characters, as tiny.byte_tokenizer has them."""
    size = raw["vocab_size"]
    tokens = [chr(33 + i) for i in range(94)] + ["Ġ", "Ċ"]
    tokens += [f"tok{i}" for i in range(96, size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens[:size])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["tok9 6"])
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for add, token in zip((writer.add_eos_token_id, writer.add_eot_token_id), ids, strict=False):
        add(token)
    if raw.get("bos_token_id") is not None:
        writer.add_bos_token_id(raw["bos_token_id"])


def all_of(kind: str) -> Pick:
    """Matrices of one type where their rows are whole blocks; else, and vectors, float32."""
    block = gguf.GGML_QUANT_SIZES[Type[kind]][0]
    return lambda name, shape: kind if len(shape) > 1 and shape[-1] % block == 0 else "F32"


def encode(array: Array, kind: str, seed: int = 0) -> Array:
    """Blocks of a type: of these values where gguf can quantize to it, else random sound ones."""
    try:
        return quantize(array.astype(np.float32), Type[kind])
    except NotImplementedError:
        return random_blocks(array.shape, kind, np.random.default_rng(seed))


_SCALES = {"Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82)}
_SCALES |= {"IQ4_NL": (0,)}
"""Where the float16 scales of a block stand."""


def random_blocks(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> Array:
    """Random bytes with finite scales."""
    length, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // length, size), dtype=np.uint8)
    for at in _SCALES[kind]:
        values = rng.uniform(0.001, 0.01, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = values[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Array],
    pick: Pick | None = None,
    *,
    tokenizer: bool = True,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
    **split: int,
) -> dict[str, Array]:
    """Write a model; returns what its tensors decode to. `split`: GGUFWriter's split_* options."""
    pick = pick or all_of("F32")
    writer = gguf.GGUFWriter(path, ARCHITECTURES[raw["model_type"]], **split)
    add_keys(writer, raw)
    if tokenizer:
        add_tokenizer(writer, raw)
    if extra is not None:
        extra(writer)
    decoded: dict[str, Array] = {}
    for name, array in tensors.items():
        kind = pick(name, array.shape)
        if kind == "F32":
            writer.add_tensor(name, array)
            decoded[name] = array
        else:
            blocks = encode(array, kind, len(decoded))
            writer.add_tensor(name, blocks, raw_dtype=Type[kind])
            decoded[name] = dequantize(blocks, Type[kind]).astype(np.float32).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


# A file of any content, sound or not.

U8, I8, U16, I16, U32, I32, FLOAT32, BOOL, STRING, ARRAY, U64, I64, FLOAT64 = range(13)
_PACK = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", FLOAT32: "<f", BOOL: "<B"}
_PACK |= {U64: "<Q", I64: "<q", FLOAT64: "<d"}


def string(text: str | bytes) -> bytes:
    """A GGUF string."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int, what: Any) -> bytes:
    """A scalar or string, without its type."""
    return string(what) if kind == STRING else struct.pack(_PACK[kind], what)


def entry(key: str | bytes, kind: int, what: Any) -> bytes:
    """A key-value."""
    return string(key) + struct.pack("<I", kind) + value(kind, what)


def array_entry(key: str, kind: int, values: Iterable[Any], count: int | None = None) -> bytes:
    """A key-value that is an array; `count` is what it claims to hold."""
    packed = [value(kind, v) for v in values]
    count = len(packed) if count is None else count
    return string(key) + struct.pack("<IIQ", ARRAY, kind, count) + b"".join(packed)


def info(name: str | bytes, shape: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    """An entry of the tensor table; `shape` innermost first, as it stands in the file."""
    axes = list(shape)
    return (
        string(name)
        + struct.pack("<I", len(axes))
        + b"".join(struct.pack("<Q", n) for n in axes)
        + struct.pack("<IQ", kind, offset)
    )


def raw_gguf(
    keys: Iterable[bytes] = (),
    infos: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    alignment: int = 32,
) -> bytes:
    """A file of these pieces; `counts` are claims of how many tensors and keys there are."""
    keys, infos = list(keys), list(infos)
    tensors = len(infos) if counts[0] is None else counts[0]
    pairs = len(keys) if counts[1] is None else counts[1]
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join([*keys, *infos])
    return head + bytes(-len(head) % alignment) + data
