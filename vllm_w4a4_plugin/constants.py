# SPDX-License-Identifier: Apache-2.0
"""Names, versions and ranges that more than one part of the package needs. Imports nothing."""

VERSION = "0.1.0"
"""Version of this package, which is written nowhere else; the build reads it from here."""

DISTRIBUTION = "vllm-w4a4-plugin"

METHOD = "ascend"
"""Name of the quantization method: that of vllm-ascend, so that one command line serves on CPUs and on NPUs."""

LOGGER = "vllm.plugins.w4a4"
"""Name of the package's only logger, a child of "vllm", so that vLLM's logging configuration applies to it."""

PROVIDER = "w4a4_cpu"
"""Our name in vLLM's list of implementations of an operator."""

DESCRIPTION_FILE = "quant_model_description.json"
INDEX_SUFFIX = ".safetensors.index.json"

SAVED_STATE_FILE = "w4a4_sharded_state.json"
"""Lies beside the parameters of a model that were saved for `--load-format sharded_state`."""

LOAD_FORMAT = "w4a4"
"""Name of our model loader among vLLM's load formats."""

STREAMED_LOAD_FORMAT = "w4a4-runai"
"""The same with Run:ai's streamer reading the files."""

SAVED_LOAD_FORMAT = "w4a4-sharded-state"
"""Our loader of vLLM's `sharded_state`."""

TESTED_VLLM = ("0.23", "0.33")
"""First and last minor version of vLLM that the tests run with; these two without a C extension, so without engines."""

SUPPORTED_VLLM_ASCEND = ("0.20", "0.30")
"""First and last minor version of vllm-ascend that has all that we use; 0.18 and 0.19 pin torch 2.9. The tests run
with 0.23 and 0.30."""

INT4_MIN, INT4_MAX = -8, 7

INT4_GROUP_MULTIPLE = 8
"""Input features in one block of the CPU kernels; the size of a scale group must be a multiple of it."""
