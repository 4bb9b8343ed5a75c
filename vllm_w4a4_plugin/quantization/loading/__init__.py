# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint's tensors reach a model: the model loader, biases that vLLM's model has no place for, accounting.

Registered as the load format `w4a4`, which the CPU platform uses in place of vLLM's formats for safetensors.
"""
