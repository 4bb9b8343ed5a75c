# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 eval --against` on the micro checkpoint, compared with transformers models: two engine starts in all."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import MICRO
from tests.engine.oracle import reference_model
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.cli import main

WINDOW, WINDOWS = 48, 4
HAS_HARNESS = find_spec("lm_eval") is not None
QUESTIONS = [
    {"question": f"Sum of {a} and {b} is", "choices": [" one", " two", " <b>three</b>"], "answer": (a * b) % 3}
    for a in range(3)
    for b in range(4)
]
TASK = """\
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_float(directory: Path) -> Any:
    """The float model that the micro checkpoint would be made from: its weights with the transforms undone."""
    reader = CheckpointReader(MICRO)
    directory.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for module in reader.description.modules:
        weight = reader.load(f"{module}.weight").float()
        if f"{module}.weight_scale" in reader.tensors:
            weight = weight * reader.load(f"{module}.weight_scale")
        if f"{module}.left_trans" in reader.tensors:
            left, right = reader.load(f"{module}.left_trans"), reader.load(f"{module}.right_trans")
            weight = weight @ torch.kron(left, right).T
        tensors[f"{module}.weight"] = weight.contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((MICRO / "config.json").read_text())
    config.pop("quantize", None)
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32", "dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).write_bytes((MICRO / name).read_bytes())
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
    model.load_state_dict(tensors)
    return model


def log_probabilities(model: Any, ids: list[int]) -> np.ndarray:
    """float64 [len(ids) - 1, vocabulary]: predictions of all tokens but the first."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def accuracy(model: Any, tokenizer: Any) -> float:
    right = 0
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            context = tokenizer(question["question"], add_special_tokens=False).input_ids
            ids = tokenizer(question["question"] + choice, add_special_tokens=False).input_ids
            logprobs = log_probabilities(model, ids)
            scores.append(sum(logprobs[place - 1, ids[place]] for place in range(len(context), len(ids))))
        right += int(np.argmax(scores)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command prints and writes, and the oracles' numbers."""
    folder = tmp_path_factory.mktemp("eval")
    models = write_float(folder / "float"), reference_model(MICRO)
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    ids = torch.randint(3, 500, (WINDOW * WINDOWS * 3,), generator=torch.Generator().manual_seed(0)).tolist()
    text = "<script>alert(1)</script> & " + tokenizer.decode(ids)
    (folder / "text.txt").write_text(text)
    (folder / "tasks").mkdir()
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "tasks" / "sums.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
    command = ["eval", str(MICRO), "--against", str(folder / "float"), "--text", str(folder / "text.txt")]
    command += ["--window", str(WINDOW), "--windows", str(WINDOWS), "--dtype", "float32", "--json"]
    command += ["--html", str(folder / "page.html")]
    if HAS_HARNESS:
        command += ["--tasks", "sums", "--task-dir", str(folder / "tasks"), "--max-length", "64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        captured = _printed(command)
    ids = tokenizer((folder / "text.txt").read_text(), add_special_tokens=False).input_ids
    rows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]
    found = {"json": json.loads(captured), "page": (folder / "page.html").read_text(), "rows": rows}
    predictions = [[log_probabilities(model, row) for row in rows] for model in models]
    return found | {"float": predictions[0], "model": predictions[1], "tasks": [accuracy(m, tokenizer) for m in models]}


def _printed(command: list[str]) -> str:
    import contextlib
    import io

    # With a file descriptor, as every real standard output; vLLM asks for it.
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(command) == 0
    return output.getvalue()


@pytest.mark.engine
def test_perplexities(evaluation: dict[str, Any]) -> None:
    for key, name in (("float", "reference"), ("model", "model")):
        losses = [
            -logprobs[place, row[place + 1]]
            for logprobs, row in zip(evaluation[key], evaluation["rows"], strict=True)
            for place in range(WINDOW - 1)
        ]
        assert evaluation["json"][name]["tokens"] == len(losses) == WINDOWS * (WINDOW - 1)
        assert evaluation["json"][name]["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=2e-3)


@pytest.mark.engine
def test_divergence(evaluation: dict[str, Any]) -> None:
    pairs = list(zip(evaluation["float"], evaluation["model"], strict=True))
    divergences = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in pairs])
    same = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in pairs])
    found = evaluation["json"]["divergence"]
    assert found["mean"] == pytest.approx(divergences.mean(), rel=0.03)
    assert found["mean_error"] == pytest.approx(divergences.std(ddof=1) / len(divergences) ** 0.5, rel=0.1)
    assert found["percentiles"]["99"] == pytest.approx(np.quantile(divergences, 0.99), rel=0.1)
    assert abs(found["agreement"] - same.mean()) <= 3 / len(same)  # of near ties
    assert sum(entry["tokens"] for entry in evaluation["json"]["histogram"]) == len(divergences)


@pytest.mark.engine
def test_worst_passages(evaluation: dict[str, Any]) -> None:
    passages = evaluation["json"]["worst_passages"]
    means = [passage["mean_divergence"] for passage in passages]
    assert means == sorted(means, reverse=True)
    worst = passages[0]
    p, q = (evaluation[key][worst["window"]] for key in ("float", "model"))
    expected = (np.exp(p) * (p - q)).sum(-1)
    first = worst["first_token"] - 1
    places = range(first, first + len(worst["tokens"]))
    assert worst["mean_divergence"] == pytest.approx(expected[places].mean(), rel=0.05)


@pytest.mark.engine
def test_the_page_is_whole_and_escaped(evaluation: dict[str, Any]) -> None:
    page = evaluation["page"]
    assert page.startswith("<!DOCTYPE html>")
    assert page.endswith("</body></html>\n")
    assert "<script" not in page
    assert page.count("<svg") == 1
    assert f"{evaluation['json']['divergence']['mean']:.5f}" in page


@pytest.mark.engine
@pytest.mark.skipif(not HAS_HARNESS, reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
def test_tasks(evaluation: dict[str, Any]) -> None:
    for name, expected in zip(("reference", "model"), evaluation["tasks"], strict=True):
        found = evaluation["json"][name]["tasks"]["sums"]["acc"]
        assert found["value"] == pytest.approx(expected)
        spread = (expected * (1 - expected) / (len(QUESTIONS) - 1)) ** 0.5
        assert found["standard_error"] == pytest.approx(spread)
