# SPDX-License-Identifier: Apache-2.0
"""Memory, kernels and lower bounds of step times on NPUs, known before a checkpoint is served. Imports no vLLM."""
