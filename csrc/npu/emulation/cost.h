// SPDX-License-Identifier: Apache-2.0
// Rates of the cost model. "Published" ones are from CANN's platform tables for the 910B2; the others are assumptions,
// and a prediction must say which of the two sets it was made with.
#pragma once

namespace emulation {

struct Rates {
  // A core has its share of the HBM over any span of so many microseconds, not at every instant: the others do not all
  // want theirs just then.
  double hbm_share_us = 1;

  // Published.
  double clock_mhz = 1800;
  double hbm_bytes_per_us = 1.6e6;  // 1.6 TB/s
  double gm_to_l1 = 135;            // GiB/s of one core, as are the following
  double gm_to_ub = 101;
  double ub_to_gm = 188;
  double l0c_to_gm = 70;
  double l0c_to_l1 = 128;
  double l1_to_l0a = 441;
  double l1_to_l0b = 220;

  // Assumptions; zero where only published rates shall count.
  double gm_latency_us = 0;  // from the end of a transfer's turn to its data being there
  double cross_core_us = 0;  // from a CrossCoreSetFlag to its CrossCoreWaitFlag
  double start_cycles = 0;   // of each instruction of V, M, MTE1
  double issue_cycles = 0;   // of the scalar unit, each instruction
};

// No publication gives these; they are what the authors of public kernels plan with.
inline Rates with_assumed_latencies() {
  Rates rates;
  rates.gm_latency_us = 0.5;
  rates.cross_core_us = 0.3;
  rates.start_cycles = 16;
  rates.issue_cycles = 8;
  return rates;
}

}  // namespace emulation
