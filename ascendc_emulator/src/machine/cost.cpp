// SPDX-License-Identifier: Apache-2.0
// The cost model: how long an instruction occupies its pipe, and the summary of a launch.
#include <algorithm>

#include "ascendc_emulator/machine/instruction.h"
#include "ascendc_emulator/machine/running_core.h"
#include "machine.h"

namespace ascendc_emulator {
namespace {

double bytes_per_us(double gib_per_second) { return gib_per_second * 1073741824.0 / 1e6; }

double rate_of(Path path, const Rates& rates) {
  const double by_path[] = {rates.gm_to_l1,  rates.gm_to_ub,  rates.ub_to_gm, rates.l0c_to_gm,
                            rates.l0c_to_l1, rates.l1_to_l0a, rates.l1_to_l0b};
  return bytes_per_us(by_path[static_cast<uint32_t>(path)]);
}

bool is_global(Path path) {
  return path == Path::kGmToL1 || path == Path::kGmToUb || path == Path::kUbToGm || path == Path::kL0cToGm;
}

}  // namespace

void Instruction::CountGlobal(Allocation& allocation, uint64_t offset, uint64_t bytes) {
  hbm_bytes_ += allocation.lines.Access(offset, bytes, allocation.bytes, core_.index / kCoresPerBlock);
}

void Instruction::Occupy(double microseconds, double latency) {
  state_.free_at += microseconds;
  state_.busy += microseconds;
  state_.done_at = std::max(state_.done_at, state_.free_at + latency);
}

void Instruction::Compute(uint64_t cycles) {
  const Rates& rates = machine_.options().rates;
  Cost& cost = machine_.cost();
  (pipe_ == Pipe::kM ? cost.cube_cycles : cost.vector_cycles) += cycles;
  Occupy((static_cast<double>(cycles) + rates.start_cycles) / rates.clock_mhz, 0);
}

void Instruction::Transfer(Path path, uint64_t bytes) {
  const Rates& rates = machine_.options().rates;
  Cost& cost = machine_.cost();
  cost.bytes[static_cast<uint32_t>(path)] += bytes;
  cost.memory_bytes += hbm_bytes_;
  const double on_path = static_cast<double>(bytes) / rate_of(path, rates);
  // Blocks have equal shares of the HBM's bandwidth: a cube core that of its block, each vector core its part of it.
  const uint32_t sharers = machine_.device_cores() * (core_.kind == CoreKind::kCube ? 1 : kVectorCoresPerBlock);
  const double on_hbm = hbm_bytes_ * sharers / rates.hbm_bytes_per_us;
  state_.hbm_at = std::max(state_.hbm_at, state_.free_at - rates.hbm_share_us) + on_hbm;
  const double start = path == Path::kL1ToL0a || path == Path::kL1ToL0b ? rates.start_cycles / rates.clock_mhz : 0;
  Occupy(std::max(on_path, hbm_bytes_ > 0 ? state_.hbm_at - state_.free_at : 0) + start,
         is_global(path) ? rates.gm_latency_us : 0);
}

void Machine::SummarizeCost() {
  for (const auto& core : cores_) {
    for (uint32_t pipe = 0; pipe < kPipes; ++pipe) {
      const PipeState& state = core->pipes[pipe];
      cost_.critical_path = std::max({cost_.critical_path, state.free_at, state.done_at});
      cost_.busiest[pipe] = std::max(cost_.busiest[pipe], state.busy);
    }
  }
  cost_.memory_bound = cost_.memory_bytes / options_.rates.hbm_bytes_per_us;
  cost_.cube_bound = static_cast<double>(cost_.cube_cycles) / device_cores() / options_.rates.clock_mhz;
}

}  // namespace ascendc_emulator
