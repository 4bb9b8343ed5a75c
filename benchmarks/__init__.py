# SPDX-License-Identifier: Apache-2.0
"""Measures the CPU operators beside the machine's limits and beside what a user would pick instead."""
