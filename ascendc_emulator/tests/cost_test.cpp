// SPDX-License-Identifier: Apache-2.0
// The cost model on kernels whose time can be computed by hand.
#include <cmath>

#include "small_kernels.h"

namespace {

constexpr double kGiB = 1073741824.0 / 1e6;  // bytes a microsecond

bool near(double found, double expected, const std::string& what) {
  return check(std::fabs(found - expected) <= 1e-9 + 1e-6 * expected,
               what + ": expected " + std::to_string(expected) + ", found " + std::to_string(found));
}

ascendc_emulator::Options on_rates(double hbm = 1e12) {
  ascendc_emulator::Options options;
  options.mode = ascendc_emulator::Mode::kCostOnly;
  options.rates.hbm_bytes_per_us = hbm;
  return options;
}

// 64 KiB to L1 and a product of 16 x 4080 x 64 in int4: 255 cycles.
ascendc_emulator::Cost run(bool is_ordered, const ascendc_emulator::Options& options) {
  DeviceMemory memory;
  uint8_t* in = memory.reserve(65536);
  const Report report = run_on_cube(
      [&](const CubeMemories& c) {
        DataCopyParams copy;
        copy.blockLen = 2048;
        DataCopy(at<int8_t>(c.l1, 0), global<int8_t>(in), copy);
        if (is_ordered) set_and_wait<HardEvent::MTE2_MTE1>();
        if (is_ordered) set_and_wait<HardEvent::MTE1_M>();
        MmadParams p;
        p.m = 16, p.n = 4080, p.k = 64;
        Mmad(at<int32_t>(c.l0c, 0), at<int4b_t>(c.l0a, 0), at<int4b_t>(c.l0b, 0), p);
      },
      options);
  check(report.cost.bytes[0] == 65536, "bytes to L1");
  check(report.cost.cube_cycles == 255, "cube cycles");
  return report.cost;
}

void test_overlap() {
  const double copy = 65536 / (135 * kGiB), product = 255 / 1800.0;
  near(run(true, on_rates()).microseconds(), copy + product, "a product after its copy");
  near(run(false, on_rates()).microseconds(), std::max(copy, product), "a product during a copy");
  near(run(false, on_rates(65536)).microseconds(), 1.0, "a copy at the HBM's rate");
  ascendc_emulator::Options shared = on_rates(65536);
  shared.device_cores = 4;
  near(run(false, shared).microseconds(), 4.0, "a copy at a quarter of the HBM's rate");
  ascendc_emulator::Options late = on_rates();
  late.rates.gm_latency_us = 2;
  near(run(true, late).microseconds(), 2 + copy + product, "a copy's latency");
}

// A core that left its share of the HBM unused for a microsecond has it at once, and no more than that.
void test_share() {
  DeviceMemory memory;
  uint8_t* in = memory.reserve(2 * 65536);
  const Report report = run_on_cube(
      [&](const CubeMemories& c) {
        MmadParams p;
        p.m = 128, p.n = 4080, p.k = 64;
        Mmad(at<int32_t>(c.l0c, 0), at<int4b_t>(c.l0a, 0), at<int4b_t>(c.l0b, 0), p);
        set_and_wait<HardEvent::M_MTE1>();
        set_and_wait<HardEvent::MTE1_MTE2>();
        DataCopyParams copy;
        copy.blockLen = 2048;
        for (uint32_t i = 0; i < 2; ++i) {
          DataCopy(at<int8_t>(c.l1, i * 65536), global<int8_t>(in + i * 65536), copy);
        }
      },
      on_rates(65536));
  // The first copy goes at its path's rate, the second waits for what both need of the HBM.
  const double product = 8 * 255 / 1800.0;
  near(report.cost.microseconds(), product - 1 + 2, "copies after a pause");
}

// What one core read another need not read from the HBM.
void test_l2() {
  DeviceMemory memory;
  uint8_t* in = memory.reserve(65536);
  const auto read = [&] {
    if ASCEND_IS_AIC {
      TPipe pipe;
      TBuf<TPosition::A1> l1;
      pipe.InitBuffer(l1, 65536);
      DataCopyParams copy;
      copy.blockLen = 2048;
      DataCopy(l1.Get<int8_t>(), global<int8_t>(in), copy);
    }
  };
  near(Launch(3, read, on_rates()).cost.memory_bytes, 65536, "three cores read the HBM once");
  // Each of three cores has a third of the rate and needs a third of the bytes.
  near(Launch(3, read, on_rates(65536)).cost.microseconds(), 1.0, "three cores that share what they read");
  ascendc_emulator::Options warm = on_rates();
  warm.is_l2_warm = true;
  check(Launch(3, read, warm).cost.memory_bytes == 0, "what an earlier launch read");
  near(Launch(3, read, on_rates()).cost.memory_bytes, 65536, "a cold launch");
}

// AIC and AIV work at the same time, and wait for each other.
void test_between_cores() {
  const auto run = [](bool waits) {
    return Launch(
               1,
               [=] {
                 TPipe pipe;
                 if ASCEND_IS_AIC {
                   TBuf<TPosition::CO1> l0c;
                   TBuf<TPosition::A2> l0a;
                   TBuf<TPosition::B2> l0b;
                   pipe.InitBuffer(l0c, 131072);
                   pipe.InitBuffer(l0a, 65536);
                   pipe.InitBuffer(l0b, 65536);
                   MmadParams p;
                   p.m = 16, p.n = 1600, p.k = 64;
                   Mmad(l0c.Get<int32_t>(), l0a.Get<int4b_t>(), l0b.Get<int4b_t>(), p);
                   set_and_wait<HardEvent::M_FIX>();
                   CrossCoreSetFlag<2, PIPE_FIX>(0);
                 }
                 if ASCEND_IS_AIV {
                   TBuf<TPosition::VECCALC> ub;
                   pipe.InitBuffer(ub, 65536);
                   if (waits) CrossCoreWaitFlag(0);
                   Duplicate(ub.Get<float>(), 1.0f, 12800);  // 200 repeats
                   if (!waits) CrossCoreWaitFlag(0);
                 }
               },
               on_rates())
        .cost.microseconds();
  };
  near(run(true), 300 / 1800.0, "an AIV after the AIC");
  near(run(false), 200 / 1800.0, "an AIV at the same time as the AIC");
}

}  // namespace

int main() {
  test_overlap();
  test_share();
  test_l2();
  test_between_cores();
  return finish("cost_test");
}
