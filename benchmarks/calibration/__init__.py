# SPDX-License-Identifier: Apache-2.0
"""Quality of `vllm-w4a4 quantize` over seeds: every figure from a saved checkpoint, verified and served by vLLM.

python -m benchmarks.calibration MODEL --text FILE --calib-file FILE --work DIR [--docs docs/calibration.md]
"""
