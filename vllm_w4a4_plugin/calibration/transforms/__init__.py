# SPDX-License-Identifier: Apache-2.0
"""Kronecker-factored transforms: their sizes, their closed-form solution, and the rotations in them."""
