# SPDX-License-Identifier: Apache-2.0
"""Compares the CPU operators with their alternatives in vLLM and llama.cpp and with the machine's limits."""
