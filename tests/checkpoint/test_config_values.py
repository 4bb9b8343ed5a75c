# SPDX-License-Identifier: Apache-2.0
"""config.json with any value under any key: an answer soon, in little memory, and in no traceback."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cases import write_case
from tests.conftest import MICRO
from tests.fuzz.answers import findings
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, remarks
from vllm_w4a4_plugin.cli import main

VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 0.5, 10**9, 1e308, 2**70, "", "x", [], {}, [[]], [None], {"a": {}})
SELDOM = (
    "auto_map", "text_config", "mlp_only_layers", "num_experts", "num_local_experts", "n_routed_experts", "layer_types",
    "decoder_sparse_step", "num_nextn_predict_layers", "head_dim", "quantization_config", "moe_intermediate_size",
)  # fmt: skip
"""Keys that the small checkpoints lack."""
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
EXTRA_MEMORY, SECONDS = 300e6, 120


@pytest.fixture(autouse=True)
def _in_little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < EXTRA_MEMORY


def write(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").unlink(missing_ok=True)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", ["micro", "c4_moe_mixed"])
def test_any_value_of_any_key(micro_copy: Path, tmp_path: Path, name: str) -> None:
    directory = micro_copy if name == "micro" else tmp_path / name
    if name != "micro":
        write_case(name, directory)
    config = json.loads((directory / "config.json").read_text())
    for key in [*config, *SELDOM] if name == "micro" else [*SIZES, *SELDOM]:
        for value in VALUES:
            write(directory, {**config, key: value})
            reader = CheckpointReader(directory)
            found = list(header_findings(reader)) or list(remarks(reader))
            assert all(isinstance(text, str) for text in found), (key, value)


@pytest.mark.timeout(SECONDS)
def test_any_size_of_a_model_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor` plans a model from its config.json alone."""
    config = json.loads((MICRO / "config.json").read_text())
    for key in SIZES:
        for value in VALUES:
            write(tmp_path, {**config, key: value})
            assert main(["doctor", str(tmp_path)]) in (0, 1), (key, value)
    assert "must be at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": [[]]}, "architectures must be a list of names"),
        ({"architectures": 1}, "architectures must be a list of names"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000"),
        ({"num_hidden_layers": 9000}, "the files hold"),
        ({"max_position_embeddings": 2**70}, "max_position_embeddings must be at most"),
        ({"rope_theta": [[]]}, "rope_theta must be a positive number"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"hidden_act": ""}, "hidden_act must be 'silu'"),
    ],
    ids=str,
)  # fmt: skip
def test_values_with_which_vllm_cannot_compute(micro_copy: Path, change: dict[str, Any], words: str) -> None:
    write(micro_copy, {**json.loads((MICRO / "config.json").read_text()), **change})
    (found,) = findings(micro_copy)
    assert found.startswith(f"{micro_copy / 'config.json'}: ")
    assert words in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_only_layers": "x"}, "mlp_only_layers must be a list"),
        ({"num_experts": 10**9}, "num_experts must be at most 10000"),
        ({"num_experts": 9000, "num_hidden_layers": 9000}, "the files hold"),
    ],
    ids=str,
)
def test_of_mixtures(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write_case("c4_moe_mixed", tmp_path)
    write(tmp_path, {**json.loads((tmp_path / "config.json").read_text()), **change})
    assert words in findings(tmp_path)[0]
