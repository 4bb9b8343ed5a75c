# SPDX-License-Identifier: Apache-2.0
"""A worker of the device check in which packing never returns and the first product kills the process."""

import os
import sys
import time

import torch_npu

from vllm_w4a4_plugin.device_check import worker


def hang(*args: object) -> None:
    time.sleep(600)


def abort(*args: object, **kwargs: object) -> None:
    print("aicore exception", file=sys.stderr, flush=True)
    os.abort()


if __name__ == "__main__":
    torch_npu.npu_convert_weight_to_int4pack = hang
    torch_npu.npu_dynamic_quant = abort
    sys.exit(worker.main())
