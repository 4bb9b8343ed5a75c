// SPDX-License-Identifier: Apache-2.0
// Flags between pipes, barriers, flags between cores, and the number of the running core.
#pragma once

#include "../machine/running_core.h"
#include "parameters.h"

namespace ascendc_emulator {

constexpr Pipe pipe_of(pipe_t pipe) {
  switch (pipe) {
    case PIPE_V:
      return Pipe::kV;
    case PIPE_M:
      return Pipe::kM;
    case PIPE_MTE1:
      return Pipe::kMte1;
    case PIPE_MTE2:
      return Pipe::kMte2;
    case PIPE_MTE3:
      return Pipe::kMte3;
    case PIPE_FIX:
      return Pipe::kFix;
    default:
      return Pipe::kS;
  }
}

struct Event {
  Pipe from, to;
};

constexpr Event event_of(AscendC::HardEvent event) {
  using E = AscendC::HardEvent;
  switch (event) {
    case E::MTE2_MTE1:
      return {Pipe::kMte2, Pipe::kMte1};
    case E::MTE1_MTE2:
      return {Pipe::kMte1, Pipe::kMte2};
    case E::MTE1_M:
      return {Pipe::kMte1, Pipe::kM};
    case E::M_MTE1:
      return {Pipe::kM, Pipe::kMte1};
    case E::MTE2_V:
      return {Pipe::kMte2, Pipe::kV};
    case E::V_MTE2:
      return {Pipe::kV, Pipe::kMte2};
    case E::MTE3_V:
      return {Pipe::kMte3, Pipe::kV};
    case E::V_MTE3:
      return {Pipe::kV, Pipe::kMte3};
    case E::M_FIX:
      return {Pipe::kM, Pipe::kFix};
    case E::FIX_M:
      return {Pipe::kFix, Pipe::kM};
    case E::FIX_MTE1:
      return {Pipe::kFix, Pipe::kMte1};
    case E::FIX_MTE2:
      return {Pipe::kFix, Pipe::kMte2};
    case E::MTE2_FIX:
      return {Pipe::kMte2, Pipe::kFix};
    case E::MTE3_MTE2:
      return {Pipe::kMte3, Pipe::kMte2};
    case E::MTE2_MTE3:
      return {Pipe::kMte2, Pipe::kMte3};
    case E::FIX_MTE3:
      return {Pipe::kFix, Pipe::kMte3};
    case E::S_V:
      return {Pipe::kS, Pipe::kV};
    case E::V_S:
      return {Pipe::kV, Pipe::kS};
    case E::S_MTE2:
      return {Pipe::kS, Pipe::kMte2};
    case E::MTE2_S:
      return {Pipe::kMte2, Pipe::kS};
    case E::S_MTE3:
      return {Pipe::kS, Pipe::kMte3};
    case E::MTE3_S:
      return {Pipe::kMte3, Pipe::kS};
    case E::M_S:
      return {Pipe::kM, Pipe::kS};
    default:
      return {Pipe::kFix, Pipe::kS};
  }
}

}  // namespace ascendc_emulator

namespace AscendC {

using ascendc_emulator::Location;

template <HardEvent kEvent>
inline void SetFlag(int32_t id, Location at = Location::current()) {
  ascendc_emulator::set_flag(static_cast<uint32_t>(kEvent), ascendc_emulator::event_of(kEvent).from, id, at);
}

template <HardEvent kEvent>
inline void WaitFlag(int32_t id, Location at = Location::current()) {
  ascendc_emulator::wait_flag(static_cast<uint32_t>(kEvent), ascendc_emulator::event_of(kEvent).to, id, at);
}

template <pipe_t kPipe>
inline void PipeBarrier(Location at = Location::current()) {
  static_assert(kPipe != PIPE_S, "the scalar pipe is always in order; on a device this is a hardware error");
  if constexpr (kPipe == PIPE_ALL) {
    ascendc_emulator::pipe_barrier_all();
  } else {
    ascendc_emulator::pipe_barrier(ascendc_emulator::pipe_of(kPipe), at);
  }
}

template <uint8_t kMode, pipe_t kPipe>
inline void CrossCoreSetFlag(uint16_t id, Location at = Location::current()) {
  static_assert(kMode <= 2, "modes 0, 1 and 2");
  static_assert(kPipe != PIPE_S && kPipe != PIPE_ALL, "a flag between cores is set by one pipe other than S");
  ascendc_emulator::cross_core_set_flag(kMode, ascendc_emulator::pipe_of(kPipe), id, at);
}

template <uint8_t kMode = 0, pipe_t kPipe = PIPE_S>
inline void CrossCoreWaitFlag(uint16_t id, Location at = Location::current()) {
  ascendc_emulator::cross_core_wait_flag(id, at);
}

template <bool kIsAIVOnly = true>
inline void SyncAll(Location at = Location::current()) {
  ascendc_emulator::sync_all(kIsAIVOnly, at);
}

inline int64_t GetBlockNum() { return ascendc_emulator::block_count(); }
inline int64_t GetSubBlockNum() { return ascendc_emulator::kVectorCoresPerBlock; }
inline int64_t GetSubBlockIdx() { return ascendc_emulator::sub_block_index(); }
inline int64_t GetBlockIdx() {
  const uint32_t block = ascendc_emulator::block_index();
  if (ascendc_emulator::is_cube_core()) return block;
  return block * ascendc_emulator::kVectorCoresPerBlock + ascendc_emulator::sub_block_index();
}

}  // namespace AscendC

// A device compiler compiles a kernel once for each kind of core. So do the two passes of the type check.
#if defined(ASCENDC_EMULATOR_PASS_AIC)
#define ASCEND_IS_AIC constexpr(true)
#define ASCEND_IS_AIV constexpr(false)
#elif defined(ASCENDC_EMULATOR_PASS_AIV)
#define ASCEND_IS_AIC constexpr(false)
#define ASCEND_IS_AIV constexpr(true)
#else
#define ASCEND_IS_AIC (ascendc_emulator::is_cube_core())
#define ASCEND_IS_AIV (!ascendc_emulator::is_cube_core())
#endif

#define KERNEL_TYPE_MIX_AIC_1_2 0
#define KERNEL_TASK_TYPE_DEFAULT(TYPE) static_assert((TYPE) == KERNEL_TYPE_MIX_AIC_1_2)
