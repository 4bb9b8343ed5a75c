# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 doctor --device-check`: does this NPU compute what the plugin needs?

`plan` says what is checked, without torch; a `worker` process executes it step by step; `run` starts workers, watches
their time and collects what they find. Never run on an NPU so far.
"""
