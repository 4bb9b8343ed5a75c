# SPDX-License-Identifier: Apache-2.0
"""Quantization of one decoder block."""
