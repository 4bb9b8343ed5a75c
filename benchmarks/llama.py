# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as a contestant of the end-to-end benchmark: `python -m benchmarks.llama FILE.gguf THREADS`.

The model has random weights in Q4_0 and a tied head in Q8_0, the format of llama.cpp that is nearest to W4A4 in size.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .limits import BUILD
from .random_model import MLP, router_values, shapes, uses
from .shapes import Model
from .workload import MOST_REQUESTS, PREFILL, PROMPT, RESULT, STEPS, peak_memory, tokens_of

PACKAGES = ("llama-cpp-python==0.3.36", "diskcache")
"""The second is what the first imports and vLLM does not bring."""

SITE = BUILD / "llama"

Q4_0_BYTES, Q8_0_BYTES, BLOCK = 18, 34, 32
"""Bytes of a block of 32 weights: a half-precision scale and 4 or 8 bits each."""

TENSORS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down",
}  # fmt: skip


class LlamaUnavailable(RuntimeError):
    """llama.cpp could not be downloaded or built; the text says why."""


def install() -> Path:
    """Build llama.cpp for this CPU, about ten minutes the first time. Returns the directory to import it from.

    Raises:
        LlamaUnavailable: the package cannot be downloaded or built.
    """
    if not (SITE / "llama_cpp").exists():
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-deps", "--target", str(SITE),
            *PACKAGES,
        ]  # fmt: skip
        # A cached package may have been built with other flags.
        # Without AMX, for the reason given in native/ggml/CMakeLists.txt.
        no_amx = "-mno-amx-int8" if platform.machine().lower() in ("x86_64", "amd64") else ""
        flags = {
            "CMAKE_ARGS": f"-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS={no_amx} -DCMAKE_C_FLAGS={no_amx}",
            "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        }
        result = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
        if result.returncode != 0:
            raise LlamaUnavailable(f"pip install {' '.join(PACKAGES)} failed: {result.stderr.strip()[-300:]}")
    return SITE


def write(file: Path, model: Model, layers: int) -> None:
    """Write a Qwen3 or Qwen3-MoE model in GGUF with the shape of `random_model.make`'s."""
    import gguf

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3" if model.experts is None else "qwen3moe")
    if model.experts is not None:
        writer.add_expert_count(model.experts.count)
        writer.add_expert_used_count(model.experts.top_k)
        writer.add_expert_feed_forward_length(model.intermediate)
    writer.add_context_length(40960)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(model.vocabulary)
    writer.add_tokenizer_model("no_vocab")

    random = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...], block_bytes: int, kind: gguf.GGMLQuantizationType) -> None:
        *rows, columns = shape
        blocks = random.integers(0, 256, (math.prod(shape) // BLOCK, block_bytes), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(0.2 / columns**0.5 / 8).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(*rows, columns // BLOCK * block_bytes), raw_dtype=kind)

    types = gguf.GGMLQuantizationType
    add("token_embd.weight", (model.vocabulary, model.hidden), Q8_0_BYTES, types.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(model.hidden, np.float32))
    for index in range(layers):
        for norm, size in (("attn_norm", model.hidden), ("ffn_norm", model.hidden),
                           ("attn_q_norm", model.head_dim), ("attn_k_norm", model.head_dim)):  # fmt: skip
            writer.add_tensor(f"blk.{index}.{norm}.weight", np.ones(size, np.float32))
        for short, size in shapes(model).items():
            if model.experts is None or short not in MLP:
                add(f"blk.{index}.{TENSORS[short]}.weight", size, Q4_0_BYTES, types.Q4_0)
            else:
                add(f"blk.{index}.{TENSORS[short]}_exps.weight", (model.experts.count, *size), Q4_0_BYTES, types.Q4_0)
        if model.experts is not None:
            router = random.standard_normal((model.experts.count, model.hidden), np.float32)
            writer.add_tensor(f"blk.{index}.ffn_gate_inp.weight", router)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def step_bytes(model: Model, layers: int) -> int:
    """Bytes of weights that a decode step of one request reads; a router has floats of four bytes."""
    values = sum(uses(model, short) * rows * columns for short, (rows, columns) in shapes(model).items())
    inner = values // BLOCK * Q4_0_BYTES + 4 * router_values(model)
    return layers * inner + model.vocabulary * model.hidden // BLOCK * Q8_0_BYTES


def measure(file: Path, threads: int) -> dict[str, Any]:
    """What `engine.measure` measures, through llama.cpp's own interface: the sequences of a step are one batch."""
    begin = time.perf_counter()
    import llama_cpp

    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_parameters)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch = PREFILL + 64, PREFILL
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.n_seq_max, parameters.kv_unified = MOST_REQUESTS, True
    context = llama_cpp.llama_init_from_model(model, parameters)
    memory = llama_cpp.llama_get_memory(context)

    def decode(tokens: list[tuple[int, int, int]], logits: int) -> float:
        """Run (token, position, sequence)s as one batch and compute the logits of the last `logits` of them."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i >= len(tokens) - logits
        start = time.perf_counter()
        failed = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_synchronize(context)
        duration = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        return duration

    def prefill(request: int, count: int) -> float:
        prompt = enumerate(tokens_of(request, count))
        return decode([(token, position, request) for position, token in prompt], 1)

    def step(requests: int) -> float:
        llama_cpp.llama_memory_clear(memory, True)
        for request in range(requests):
            prefill(request, PROMPT)
        # Each request has tokens of its own, which choose experts of their own.
        tokens = [tokens_of(request, PROMPT + STEPS) for request in range(requests)]
        steps = [
            decode([(tokens[request][at], at, request) for request in range(requests)], requests)
            for at in range(PROMPT, PROMPT + STEPS)
        ]
        return sum(steps) / STEPS

    prefill(0, PROMPT)
    result: dict[str, Any] = {"ready": time.perf_counter() - begin}
    llama_cpp.llama_memory_clear(memory, True)
    result["prefill"] = prefill(0, PREFILL)
    result["decode 1"] = step(1)
    result["decode 16"] = step(MOST_REQUESTS)
    return result | {"memory": peak_memory()}


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    sys.path.append(str(install()))
    print(RESULT + json.dumps(measure(options.file, options.threads)))
