# SPDX-License-Identifier: Apache-2.0
"""What vLLM's platform hooks call, and the registration of the quantization method on each platform."""
