# SPDX-License-Identifier: Apache-2.0
"""Checkpoints changed at random as real ones are, and what `verify` and loading say about them."""
