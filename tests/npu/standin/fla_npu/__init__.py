# SPDX-License-Identifier: Apache-2.0
"""A stand-in for fla_npu, operators of linear attention that vllm-ascend imports from 0.30 on, for tests."""
