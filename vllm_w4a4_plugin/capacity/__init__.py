# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint will need on NPUs, before it is served: memory, kernels, bounds of speed. Imports no vLLM."""
