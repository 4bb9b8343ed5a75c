# SPDX-License-Identifier: Apache-2.0
"""The table of what a step is made of, from shares made by hand."""

from benchmarks.report import end_to_end
from tests.benchmarks.test_report import run


def test_the_parts_of_a_step_are_shares_of_times_without_a_profiler() -> None:
    result = run(36)
    ours = result["records"]["all-w4a4 bfloat16"]
    shares = {"vllm_w4a4::norm_flatquant_linear": 0.5, "vllm_w4a4::flatquant_linear": 0.1, "aten::copy_": 0.25,
              "_C::rms_norm": 0.05, "Python in the model": 0.1}  # fmt: skip
    ours[0] |= {f"profile {name}": shares for name in ("prefill", "decode 1", "decode 16")}
    ours[0]["quantize share"] = {"prefill": 0.5, "decode 1": 0.25, "decode 16": 0.1}
    lines = end_to_end([result]).splitlines()
    first = lines.index("Where all-w4a4 bfloat16 spends a prefill and a step:") + 2
    # Medians: 2 s, 300 ms and 1 s.
    assert lines[first : first + 4] == [
        "| part | prefill | decode 1 | decode 16 |",
        "| --- | --- | --- | --- |",
        "| linear layers: products | 30.0%, 600.00 ms | 45.0%, 135.00 ms | 54.0%, 540.00 ms |",
        "| linear layers: transform and quantization | 30.0%, 600.00 ms | 15.0%, 45.00 ms | 6.0%, 60.00 ms |",
    ]
    rest = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[2] for line in lines[first + 4 :]}
    assert rest["other operators"] == "25.0%, 75.00 ms"
    assert rest["norms"] == "5.0%, 15.00 ms"
    assert rest["Python in the model"] == "10.0%, 30.00 ms"
    assert rest["attention"] == "0.0%, 0.00 ms"
