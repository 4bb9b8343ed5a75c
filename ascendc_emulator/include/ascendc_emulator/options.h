// SPDX-License-Identifier: Apache-2.0
// How a launch is emulated, and the rates of the cost model. "Published" rates are from CANN's platform tables for the
// 910B2; the others are assumptions, and a prediction must say which of the two sets it was made with.
#pragma once

#include <cstdint>

namespace ascendc_emulator {

struct Rates {
  // A core may use its share of the HBM's bandwidth unevenly within a span of this length, since not all cores load at
  // the same instant.
  double hbm_share_us = 1;

  // Published.
  double clock_mhz = 1800;
  double hbm_bytes_per_us = 1.6e6;  // 1.6 TB/s
  double gm_to_l1 = 135;            // GiB/s of one core, like all rates below
  double gm_to_ub = 101;
  double ub_to_gm = 188;
  double l0c_to_gm = 70;
  double l0c_to_l1 = 128;
  double l1_to_l0a = 441;
  double l1_to_l0b = 220;

  // Assumptions; zero by default, so that only published rates count.
  double gm_latency_us = 0;  // from the end of a transfer until its data can be used
  double cross_core_us = 0;  // from a CrossCoreSetFlag to its CrossCoreWaitFlag
  double start_cycles = 0;   // of each instruction of V, M and MTE1
  double issue_cycles = 0;   // of the scalar unit, for each instruction
};

// No publication gives these latencies; they are the values that authors of public kernels plan with.
inline Rates with_assumed_latencies() {
  Rates rates;
  rates.gm_latency_us = 0.5;
  rates.cross_core_us = 0.3;
  rates.start_cycles = 16;
  rates.issue_cycles = 8;
  return rates;
}

enum class Mode : uint8_t {
  kFull,     // moves data and checks everything
  kCostOnly  // moves no data and checks only bounds, parameters and flags: for predictions of large shapes
};

// How a result that leaves L0C is rounded to 16 bits.
enum class FixpipeRounding : uint8_t { kNearestEven, kNearestAway, kTowardsZero };

struct Options {
  Mode mode = Mode::kFull;
  Rates rates;
  bool is_l2_warm = false;    // what earlier launches accessed need not come from the HBM
  uint32_t device_cores = 0;  // cube cores that share the HBM and run blocks; 0: as many as are launched

  // What no document promises. A kernel should be run with several values of each.
  //
  // In which order things happen that the hardware does not order: the flags that a core sets with several
  // CrossCoreSetFlag, the cores themselves, and the start of blocks. 0: each core runs until it has to wait, and flags
  // complete at once; every other number stands for a random order.
  uint64_t order = 0;
  int division_ulps = 0;  // units of the last place by which Div misses the correctly rounded quotient
  FixpipeRounding fixpipe_rounding = FixpipeRounding::kNearestEven;
};

}  // namespace ascendc_emulator
