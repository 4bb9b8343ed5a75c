# SPDX-License-Identifier: Apache-2.0
"""Checkpoints changed at random in the ways of the wild, and what `verify` and loading say of them."""
