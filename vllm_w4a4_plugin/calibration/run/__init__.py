# SPDX-License-Identifier: Apache-2.0
"""One run over a whole model: estimate, work directory, order of the steps, and report."""
