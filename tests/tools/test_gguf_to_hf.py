# SPDX-License-Identifier: Apache-2.0
"""A GGUF file written by the package `gguf`, as llama.cpp's converter lays one out, and read back by the tool."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.torch import load_file

from tools.gguf_to_hf import convert

HIDDEN, HEADS, KV_HEADS, HEAD, MLP = 64, 4, 2, 16, 96
TOKENS = ["<unk>", "<s>", "</s>", "<pad>", *"abc", "ab"]
MATRICES = {
    "blk.0.attn_q.weight": (HEADS * HEAD, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD),
    "blk.0.ffn_gate.weight": (MLP, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, MLP),
    "token_embd.weight": (len(TOKENS), HIDDEN),
}
NORMS = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")


def write_gguf(file: Path, tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]], model: str = "llama") -> Path:
    writer = GGUFWriter(file, model)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 4 + [TokenType.NORMAL] * 4)
    writer.add_token_merges(["a b"])
    for add, number in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 3)):
        getattr(writer, f"add_{add}_token_id")(number)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def random_blocks(shape: tuple[int, int], size: int, seed: int) -> np.ndarray:
    """Blocks of 32 values in `size` bytes; their scale (and minimum) in float16 is first and small."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (shape[0], shape[1] // 32, size), dtype=np.uint8)
    headers = generator.uniform(-0.1, 0.1, (*data.shape[:2], 2)).astype(np.float16)
    bytes_of_headers = headers.view(np.uint8)
    header = 4 if size == 20 else 2
    data[..., :header] = bytes_of_headers[..., :header]
    return data.reshape(shape[0], -1)


def value(data: np.ndarray, kind: GGMLQuantizationType, row: int, column: int) -> float:
    """One value by the format's definition: ggml-common.h's block_q4_0, block_q4_1, block_q8_0."""
    size = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q4_1: 20, GGMLQuantizationType.Q8_0: 34}[kind]
    block = data[row].tobytes()[column // 32 * size :][:size]
    place = column % 32
    scale = float(np.frombuffer(block[:2], np.float16)[0])
    if kind is GGMLQuantizationType.Q8_0:
        return scale * int.from_bytes(block[2 + place : 3 + place], signed=True)
    header = 4 if kind is GGMLQuantizationType.Q4_1 else 2
    code = block[header + place % 16] >> (4 if place >= 16 else 0) & 15
    return scale * code + float(np.frombuffer(block[2:4], np.float16)[0]) if header == 4 else scale * (code - 8)


def interleaved_row(row: int) -> int:
    """Where llama.cpp puts a row of q or k: rotary pairs (i, i + d/2) of a head become neighbours."""
    head, place = divmod(row, HEAD)
    half, pair = divmod(place, HEAD // 2)
    return head * HEAD + 2 * pair + half


def floats(seed: int = 0) -> dict[str, tuple[np.ndarray, GGMLQuantizationType]]:
    generator = np.random.default_rng(seed)
    kinds = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    tensors = {}
    for i, (name, shape) in enumerate({**MATRICES, **dict.fromkeys(NORMS, (HIDDEN,))}.items()):
        dtype = np.float16 if i % 2 else np.float32
        tensors[name] = generator.standard_normal(shape).astype(np.float16).astype(dtype), kinds[i % 2]
    return tensors


def test_names_types_and_row_order(tmp_path: Path) -> None:
    tensors = floats()
    convert(write_gguf(tmp_path / "model.gguf", tensors), tmp_path / "model")
    found = {name: t.float().numpy() for name, t in load_file(tmp_path / "model/model.safetensors").items()}
    down, norm = found["model.layers.0.mlp.down_proj.weight"], found["model.norm.weight"]
    assert sorted(found) == sorted(
        ["model.embed_tokens.weight", "model.norm.weight"]
        + [f"model.layers.0.{norm}_layernorm.weight" for norm in ("input", "post_attention")]
        + [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"]
        + [f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "down")]
    )
    # bfloat16 keeps 8 bits of the mantissa.
    near = {"rtol": 2**-8, "atol": 0}
    np.testing.assert_allclose(down, tensors["blk.0.ffn_down.weight"][0], **near)
    np.testing.assert_allclose(norm, tensors["output_norm.weight"][0], **near)
    for part in "qk":
        stored = tensors[f"blk.0.attn_{part}.weight"][0]
        rows = [interleaved_row(row) for row in range(len(stored))]
        np.testing.assert_allclose(found[f"model.layers.0.self_attn.{part}_proj.weight"], stored[rows], **near)


@pytest.mark.parametrize(("kind", "size"), [("Q4_0", 18), ("Q4_1", 20), ("Q8_0", 34)])
def test_quantized_tensors(tmp_path: Path, kind: str, size: int) -> None:
    quant_type, data = GGMLQuantizationType[kind], random_blocks((MLP, HIDDEN), size, seed=1)
    tensors = {**floats(), "blk.0.ffn_gate.weight": (data, quant_type)}
    convert(write_gguf(tmp_path / "model.gguf", tensors), tmp_path / "model")
    found = load_file(tmp_path / "model/model.safetensors")["model.layers.0.mlp.gate_proj.weight"].float().numpy()
    expected = [[value(data, quant_type, row, column) for column in range(HIDDEN)] for row in range(MLP)]
    np.testing.assert_allclose(found, np.array(expected), rtol=2**-8, atol=1e-9)


def test_configuration_and_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    directory = tmp_path / "model"
    convert(write_gguf(tmp_path / "model.gguf", floats()), directory)
    config = AutoConfig.from_pretrained(directory)
    assert (config.hidden_size, config.num_key_value_heads, config.vocab_size) == (HIDDEN, KV_HEADS, len(TOKENS))
    assert config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer("<s>abca</s>")["input_ids"] == [1, 7, 6, 4, 2]
    assert tokenizer.decode([7, 6, 4]) == "abca"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 2


def test_other_models_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", floats(), model="gemma")
    with pytest.raises(SystemExit, match="only llama-type models"):
        convert(file, tmp_path / "model")


@pytest.mark.parametrize("data", [b"", b"GGU", b"PK" * 100, b"GGUF" + bytes(20)])
def test_files_that_are_no_gguf(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(SystemExit, match=r"model\.gguf: cannot be read as GGUF"):
        convert(tmp_path / "model.gguf", tmp_path / "model")
