# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls: the quantization configuration, its linear methods and their parameters."""
