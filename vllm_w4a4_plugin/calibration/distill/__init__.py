# SPDX-License-Identifier: Apache-2.0
"""Training of the quantized model towards the float model's predictions."""
