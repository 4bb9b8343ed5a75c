// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <vector>

#include "ascendc_emulator/launch.h"
#include "kernel_operator.h"

using namespace AscendC;

constexpr uint32_t kCount = 256;  // elements for each vector core

__global__ __aicore__ void scale_and_shift(GM_ADDR x, GM_ADDR y) {
  if ASCEND_IS_AIV {
    GlobalTensor<float> in, out;
    in.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x) + GetBlockIdx() * kCount);
    out.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y) + GetBlockIdx() * kCount);
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, kCount * sizeof(float));
    LocalTensor<float> values = buffer.Get<float>();
    DataCopy(values, in, kCount);
    SetFlag<HardEvent::MTE2_V>(0);
    WaitFlag<HardEvent::MTE2_V>(0);
    Muls(values, values, 2.0f, kCount);
    PipeBarrier<PIPE_V>();
    Adds(values, values, 1.0f, kCount);
    SetFlag<HardEvent::V_MTE3>(0);
    WaitFlag<HardEvent::V_MTE3>(0);
    DataCopy(out, values, kCount);
  }
}

int main() {
  const std::vector<float> x(4 * kCount, 3.0f);  // two blocks, each with two vector cores
  ascendc_emulator::DeviceMemory memory;
  uint8_t* in = memory.copy(x.data(), x.size() * sizeof(float), "x");
  uint8_t* out = memory.allocate(x.size() * sizeof(float), "y");
  const ascendc_emulator::Report report = ascendc_emulator::Launch(2, [&] { scale_and_shift(in, out); });
  const float* y = reinterpret_cast<const float*>(out);
  const bool is_right = std::all_of(y, y + x.size(), [](float value) { return value == 7.0f; });
  std::printf("%sresults are %s, predicted %.2f us\n", report.text().c_str(), is_right ? "right" : "wrong",
              report.cost.microseconds());
  return report.clean() && is_right ? 0 : 1;
}
