# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker, with what pipelines and quantized models need of it."""

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_w4a4_plugin.constants import METHOD


class W4A4CpuWorker(CPUWorker):
    """Serves a stage of a pipeline in eager mode, and saves the sharded state of a quantized model."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model; then allocate the buffers into which a stage after the first copies what it receives.

        vLLM allocates them only in its warm-up, of which there is none in eager mode. Drop this when vLLM's CPU worker
        serves pipelines without it.
        """
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    def save_sharded_state(self, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        if self.model_config.quantization != METHOD:
            super().save_sharded_state(path, pattern, max_size)
            return
        from vllm_w4a4_plugin.quantization.loading.sharded_state import save

        save(self.vllm_config, self.model_runner.model, path, pattern, max_size)
