# SPDX-License-Identifier: Apache-2.0
"""What every fresh process of the tests has imported: vLLM up to where plugins and platform begin to register."""

import torch
import vllm.engine.arg_utils
from vllm.platforms import current_platform

assert type(current_platform).__name__ == "NPUPlatform"
assert not vllm.plugins.plugins_loaded
torch.set_num_threads(1)
