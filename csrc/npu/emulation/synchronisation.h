// SPDX-License-Identifier: Apache-2.0
// Flags between pipes, barriers, flags between cores, and who a core is.
#pragma once

#include "machine.h"
#include "parameters.h"

namespace emulation {

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

}  // namespace emulation

namespace AscendC {

template <HardEvent kEvent>
inline void SetFlag(int32_t id, emulation::Location at = emulation::Location::current()) {
  emulation::Machine::current().SetFlag(static_cast<uint32_t>(kEvent), emulation::event_of(kEvent).from, id, at);
}

template <HardEvent kEvent>
inline void WaitFlag(int32_t id, emulation::Location at = emulation::Location::current()) {
  emulation::Machine::current().WaitFlag(static_cast<uint32_t>(kEvent), emulation::event_of(kEvent).to, id, at);
}

template <pipe_t kPipe>
inline void PipeBarrier(emulation::Location at = emulation::Location::current()) {
  static_assert(kPipe != PIPE_S, "the scalar pipe orders itself; on a device this is a hardware error");
  emulation::Machine::current().PipeBarrier(kPipe == PIPE_ALL ? -1 : static_cast<int>(emulation::pipe_of(kPipe)), at);
}

template <uint8_t kMode, pipe_t kPipe>
inline void CrossCoreSetFlag(uint16_t id, emulation::Location at = emulation::Location::current()) {
  static_assert(kMode <= 2, "modes 0, 1 and 2");
  static_assert(kPipe != PIPE_S && kPipe != PIPE_ALL, "a flag between cores is set by one pipe other than S");
  emulation::Machine::current().CrossCoreSetFlag(kMode, emulation::pipe_of(kPipe), id, at);
}

template <uint8_t kMode = 0, pipe_t kPipe = PIPE_S>
inline void CrossCoreWaitFlag(uint16_t id, emulation::Location at = emulation::Location::current()) {
  emulation::Machine::current().CrossCoreWaitFlag(id, at);
}

template <bool kIsAIVOnly = true>
inline void SyncAll(emulation::Location at = emulation::Location::current()) {
  emulation::Machine::current().SyncAll(kIsAIVOnly, at);
}

inline int64_t GetBlockNum() { return emulation::Machine::current().blocks(); }
inline int64_t GetSubBlockNum() { return emulation::kVectorsPerCube; }
inline int64_t GetSubBlockIdx() { return emulation::Machine::current().core().sub; }
inline int64_t GetBlockIdx() {
  const emulation::Core& core = emulation::Machine::current().core();
  return core.kind == emulation::CoreKind::kCube ? core.block : core.block * emulation::kVectorsPerCube + core.sub;
}

}  // namespace AscendC

// A device compiler makes one program for each kind of core. So do the two passes of the type check.
#if defined(W4A4_PASS_AIC)
#define ASCEND_IS_AIC constexpr(true)
#define ASCEND_IS_AIV constexpr(false)
#elif defined(W4A4_PASS_AIV)
#define ASCEND_IS_AIC constexpr(false)
#define ASCEND_IS_AIV constexpr(true)
#else
#define ASCEND_IS_AIC (emulation::Machine::current().core().kind == emulation::CoreKind::kCube)
#define ASCEND_IS_AIV (emulation::Machine::current().core().kind == emulation::CoreKind::kVector)
#endif

#define KERNEL_TYPE_MIX_AIC_1_2 0
#define KERNEL_TASK_TYPE_DEFAULT(TYPE) static_assert((TYPE) == KERNEL_TYPE_MIX_AIC_1_2)
