# SPDX-License-Identifier: Apache-2.0
"""Quality of `vllm-w4a4 quantize` over several seeds: every figure is that of a saved checkpoint, verified and served.

python -m benchmarks.calibration MODEL --text FILE --calib-file FILE --work DIR [--docs docs/calibration.md]
"""
