# SPDX-License-Identifier: Apache-2.0
"""The float model, one decoder block at a time, and the structure of its blocks."""
