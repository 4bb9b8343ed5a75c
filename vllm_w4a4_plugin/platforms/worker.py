# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker, for pipelines."""

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class PipelineCpuWorker(CPUWorker):
    """A stage after the first copies what it receives into buffers, which vLLM allocates only in its warm-up.

    There is no warm-up in eager mode. Drop this class when vLLM's CPU worker serves pipelines without it.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
