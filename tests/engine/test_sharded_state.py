# SPDX-License-Identifier: Apache-2.0
"""`--load-format sharded_state`: each rank's parameters, weights packed, saved and loaded again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import get_current_vllm_config

from tests.conftest import MICRO
from tests.engine.engines import engine
from tests.engine.texts import greedy, prompts
from tests.loading import engine_config, loaded_model
from tests.mixtures import write_mixture
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.constants import SAVED_STATE_FILE
from vllm_w4a4_plugin.quantization.loading import sharded_state

FORMAT = {"load_format": "sharded_state"}
ONE_FILE = "model-rank-0-part-0.safetensors"


def copy_other_files(source: Path, directory: Path) -> Path:
    """What vLLM's own example of saving a sharded state does after it."""
    directory.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix not in (".bin", ".pt", ".safetensors"):
            shutil.copy(file, directory)
    return directory


def saved(source: Path, directory: Path, **arguments: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """The directory with the saved state of `source`, and the parameters of the model from which it was saved."""
    copy_other_files(source, directory)
    with loaded_model(source, **arguments) as model:
        config = get_current_vllm_config()
        with patch("vllm.config.vllm._current_vllm_config", None):  # as in a worker that is asked to save
            sharded_state.save(config, model, str(directory), None, None)
        return directory, copy_of(model)


def copy_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(MICRO, tmp_path_factory.mktemp("state"))[0]


@pytest.fixture
def state_copy(state: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(state, tmp_path / "copy"))


@pytest.mark.feature("`--load-format sharded_state`, saved by `save_sharded_state`")
@pytest.mark.parametrize("is_mixture", [False, True], ids=["linears", "experts"])
def test_the_parameters_come_back(tmp_path: Path, is_mixture: bool) -> None:
    source = MICRO
    if is_mixture:
        source = tmp_path / "mixture"
        write_mixture(source)
    directory, expected = saved(source, tmp_path / "state", dtype="float32")
    with loaded_model(directory, dtype="float32", **FORMAT) as model:
        found = copy_of(model)
        with pytest.raises(CheckpointError, match="loaded from a sharded state, into which a checkpoint's tensors"):
            model.load_weights([])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_int4_weights_take_half_the_bytes(state: Path) -> None:
    stored = load_file(state / ONE_FILE)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    parts = [CheckpointReader(MICRO).load(name.replace("gate_up", part)) for part in ("gate", "up")]
    assert stored[name].nbytes * 2 == sum(part.nbytes for part in parts)


def test_other_numbers_of_ranks(state: Path) -> None:
    with pytest.raises(CheckpointError, match=r"saved with tensor_parallel_size = 2, found 1\. Start vLLM with the"):
        engine_config(state, tensor_parallel_size=2, **FORMAT)


def test_a_tensor_is_missing(state_copy: Path) -> None:
    tensors = load_file(state_copy / ONE_FILE)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, state_copy / ONE_FILE)
    with (
        pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight and 0 more"),
        loaded_model(state_copy, **FORMAT),
    ):
        pass


def test_a_tensor_has_another_shape(state_copy: Path) -> None:
    tensors = load_file(state_copy / ONE_FILE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    save_file(tensors, state_copy / ONE_FILE)
    with (
        pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight: expected .*\[192\], found .*\[191\]"),
        loaded_model(state_copy, **FORMAT),
    ):
        pass


def test_the_file_beside_it_is_damaged(state_copy: Path) -> None:
    (state_copy / SAVED_STATE_FILE).write_text('{"settings": {}}')
    with pytest.raises(CheckpointError, match="expected settings, zero_biases and tensors"):
        engine_config(state_copy, **FORMAT)


def test_states_and_checkpoints_are_told_apart(state: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has a sharded state .*: use --load-format sharded_state"):
        engine_config(state)
    with pytest.raises(CheckpointError, match=r"has no sharded state .*: save one first"):
        engine_config(MICRO, **FORMAT)
    with pytest.raises(CheckpointError, match="the parameters of ranks, not a checkpoint"):
        CheckpointReader(state).tensors  # noqa: B018 - reads them


def test_only_the_checkpoint_itself_is_saved(micro_copy: Path, tmp_path: Path) -> None:
    """Not what a trainer has loaded since."""
    reader = CheckpointReader(MICRO)
    with loaded_model(micro_copy) as model:
        model.load_weights((name, reader.load(name)) for name in reader.tensors)
        with pytest.raises(CheckpointError, match="other weights were loaded since vLLM started"):
            sharded_state.save(get_current_vllm_config(), model, str(tmp_path), None, None)


@pytest.mark.engine
@pytest.mark.skipif(os.environ.get("W4A4_RANKS") != "1", reason="two engines of two ranks: W4A4_RANKS=1 runs it")
def test_two_ranks(tmp_path: Path) -> None:
    directory = copy_other_files(MICRO, tmp_path / "state")

    def texts(source: Path, after: Callable[[Any], object] = lambda llm: None, **arguments: Any) -> list[Any]:
        with engine(source, tensor_parallel_size=2, **arguments) as llm:
            after(llm)
            return [text.token_ids for text in greedy(llm, prompts(20), 64)]

    expected = texts(MICRO, lambda llm: llm.llm_engine.engine_core.save_sharded_state(str(directory)))
    assert texts(directory, **FORMAT) == expected
    print([file.stat().st_size for file in directory.glob("*.safetensors")])
