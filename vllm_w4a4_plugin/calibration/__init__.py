# SPDX-License-Identifier: Apache-2.0
"""FlatQuant calibration: from a float Hugging Face model to a checkpoint of int4 weights and online transforms."""
