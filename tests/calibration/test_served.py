# SPDX-License-Identifier: Apache-2.0
"""What calibration believes of a checkpoint is what vLLM serves."""

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_w4a4_plugin.calibration.selfwrite import write_text

from tests.calibration.test_pipeline import quantize
from vllm_w4a4_plugin.calibration.model import StreamedModel
from vllm_w4a4_plugin.calibration.simulate import float_logits, perplexity, quantized_logits
from vllm_w4a4_plugin.cli import eval as eval_command

WINDOW = 64


@pytest.mark.engine
@pytest.mark.parametrize("recipe", ["tutorial", "all-w4a4", "w4a4-dynamic"])
def test_served_perplexity_is_the_simulated_one(recipe: str, float_model: Callable[..., Path], tmp_path: Path) -> None:
    directory = float_model(
        "qwen2", hidden_size=128, head_dim=32, intermediate_size=192, initializer_range=0.15, use_sliding_window=False
    )
    # Text of the model's own is what a random model can predict, so that rounding shows in its perplexity.
    windows = write_text(directory, "cpu", 48, WINDOW, 0, False)
    output = quantize(directory, tmp_path / "out", windows, recipe)
    exact = perplexity(float_logits(StreamedModel(directory), windows), windows)
    simulated = perplexity(quantized_logits(StreamedModel(directory), output, windows), windows)
    assert simulated > 1.02 * exact, "rounding must show, or the comparison below would prove nothing"
    served = eval_command.perplexity(output, windows.tolist(), "float32")
    assert served.tokens == windows.numel() - len(windows)
    assert served.value == pytest.approx(simulated, rel=0.01)
