# SPDX-License-Identifier: Apache-2.0
"""The operators on Ascend NPUs: which kernel a layer gets (`select`), CANN's operators and the project's fused one.

`select` and `nz` need no NPU. Importing `cann` or `fused` registers their operators, which needs no torch_npu yet.
"""
