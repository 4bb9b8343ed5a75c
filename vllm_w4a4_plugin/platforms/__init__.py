# SPDX-License-Identifier: Apache-2.0
"""What vLLM's platform hooks call, and how the method is registered on each platform."""
