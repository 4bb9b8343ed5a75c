# SPDX-License-Identifier: Apache-2.0
"""How far a checkpoint is from its float model: both served by vLLM, on text and on tasks of lm-evaluation-harness."""
