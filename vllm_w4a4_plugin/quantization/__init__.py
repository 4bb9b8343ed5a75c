# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls to serve a checkpoint: the quantization configuration, linear methods, parameters, model loader."""
