# SPDX-License-Identifier: Apache-2.0
"""vLLM's other commands: batches from a file, and its benchmarks."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import random_model
from benchmarks.shapes import Model
from tests.conftest import MICRO
from tests.engine.oracle import prompt_logprobs
from tests.engine.serving import NAME, VLLM, serving
from tools.demo import MODEST_MEMORY

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.environ.get("W4A4_COMMANDS") != "1", reason="minutes of CI: W4A4_COMMANDS=1 runs it"),
]
ENGINE = ["--model", str(MICRO), "--quantization", "ascend", "--dtype", "float32", "--max-model-len", "128"]
ENGINE += ["--enforce-eager", *MODEST_MEMORY]
RANDOM = ["--dataset-name", "random", "--random-input-len", "20", "--random-output-len", "8", "--num-prompts", "6"]


def run(*command: str) -> str:
    """Its output, log included."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    result = subprocess.run([VLLM, *command], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def assert_quantized_layers_ran(log: str) -> None:
    assert re.search(r"W4A4_FLATQUANT_DYNAMIC +\d+ .*vllm_w4a4::(norm_|silu_)?flatquant_linear", log)


@pytest.mark.feature("`vllm run-batch`", flag="W4A4_COMMANDS")
def test_run_batch(tmp_path: Path) -> None:
    """The file of answers has one for each line, with the log probabilities of the reference."""
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    texts = ["what is a large language model?", "the weather", "a b c d e f g"]
    lines = []
    for number, text in enumerate(texts):
        body: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 16}
        body |= {"temperature": 0, "logprobs": True, "return_token_ids": True, "ignore_eos": True}
        lines.append({"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body})
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    files = ["-i", str(requests), "-o", str(answers), "--chat-template", str(template)]
    run("run-batch", *files, *ENGINE, "--served-model-name", NAME)
    found = {answer["custom_id"]: answer for answer in map(json.loads, answers.read_text().splitlines())}
    assert set(found) == {"0", "1", "2"}
    for answer in found.values():
        body = answer["response"]["body"]
        (choice,) = body["choices"]
        expected = prompt_logprobs(MICRO, body["prompt_token_ids"] + choice["token_ids"])[-16:]
        logprobs = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
        assert (logprobs - expected).abs().median() < 0.02


@pytest.mark.feature("`vllm bench latency`", flag="W4A4_COMMANDS")
def test_bench_latency(tmp_path: Path) -> None:
    """It asks for token numbers up to 10000, which the micro checkpoint does not have."""
    model, file = tmp_path / "model", tmp_path / "latency.json"
    shape = Model("small", hidden=192, intermediate=384, heads=4, kv_heads=2, head_dim=64, vocabulary=10000)
    random_model.make(model, shape, layers=2, recipe="all-w4a4")
    sizes = ["--input-len", "16", "--output-len", "4", "--batch-size", "2", "--num-iters-warmup", "1"]
    text = ["--skip-tokenizer-init", "--disable-detokenize"]
    options = [*ENGINE, "--model", str(model), *sizes, *text, "--num-iters", "3", "--load-format", "dummy"]
    log = run("bench", "latency", *options, "--output-json", str(file))
    assert_quantized_layers_ran(log)
    assert len(json.loads(file.read_text())["latencies"]) == 3


@pytest.mark.feature("`vllm bench throughput`", flag="W4A4_COMMANDS")
def test_bench_throughput(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    log = run("bench", "throughput", *ENGINE, *RANDOM, "--output-json", str(file))
    assert_quantized_layers_ran(log)
    result = json.loads(file.read_text())
    assert result["num_requests"] == 6
    assert result["total_num_tokens"] >= 6 * 20


@pytest.mark.feature("`vllm bench serve`", flag="W4A4_COMMANDS")
def test_bench_serve(tmp_path: Path) -> None:
    with serving("--dtype", "float32") as port:
        server = ["--base-url", f"http://localhost:{port}", "--model", NAME, "--tokenizer", str(MICRO)]
        saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "serve.json"]
        run("bench", "serve", *server, *RANDOM, "--ignore-eos", *saved)
    result = json.loads((tmp_path / "serve.json").read_text())
    assert result["completed"] == 6
    assert result["failed"] == 0
    assert result["total_output_tokens"] == 6 * 8
