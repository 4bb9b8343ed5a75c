// SPDX-License-Identifier: Apache-2.0
// What the small kernels of the tests share.
#pragma once

#include <string>
#include <vector>

#include "ascendc_emulator/launch.h"
#include "check.h"
#include "kernel_operator.h"

using namespace AscendC;
using ascendc_emulator::Detector;
using ascendc_emulator::DeviceMemory;
using ascendc_emulator::Launch;
using ascendc_emulator::Report;

// All memories of an AIC.
struct CubeMemories {
  LocalTensor<uint8_t> l1, l0a, l0b, l0c;
};

// Calls body(CubeMemories), on an AIC.
template <typename Body>
void with_cube_memories(const Body& body) {
  TPipe pipe;
  TBuf<TPosition::A1> l1;
  TBuf<TPosition::A2> l0a;
  TBuf<TPosition::B2> l0b;
  TBuf<TPosition::CO1> l0c;
  pipe.InitBuffer(l1, 512 * 1024);
  pipe.InitBuffer(l0a, 64 * 1024);
  pipe.InitBuffer(l0b, 64 * 1024);
  pipe.InitBuffer(l0c, 128 * 1024);
  body(CubeMemories{l1.Get<uint8_t>(), l0a.Get<uint8_t>(), l0b.Get<uint8_t>(), l0c.Get<uint8_t>()});
}

// Runs `body` on the AIC of one block.
template <typename Body>
Report run_on_cube(const Body& body, const ascendc_emulator::Options& options = {}) {
  return Launch(
      1,
      [&] {
        if ASCEND_IS_AIC {
          with_cube_memories(body);
        }
      },
      options);
}

// The AIC sets flag 1 `rounds` times, up to `ahead` + 1 times before its AIVs answer by flag 2.
inline Report pingpong(int rounds, int ahead, const ascendc_emulator::Options& options = {}) {
  return Launch(
      1,
      [=] {
        if ASCEND_IS_AIC {
          for (int i = 0; i < rounds; ++i) {
            CrossCoreSetFlag<2, PIPE_FIX>(1);
            if (i >= ahead) CrossCoreWaitFlag(2);
          }
          for (int i = 0; i < ahead; ++i) CrossCoreWaitFlag(2);
        }
        if ASCEND_IS_AIV {
          for (int i = 0; i < rounds; ++i) {
            CrossCoreWaitFlag(1);
            CrossCoreSetFlag<2, PIPE_MTE3>(2);
          }
        }
      },
      options);
}

// Runs `body(ub)` on the first AIV of one block.
template <typename Body>
Report run_on_vector(const Body& body, const ascendc_emulator::Options& options = {}) {
  return Launch(
      1,
      [&] {
        if ASCEND_IS_AIV {
          if (GetSubBlockIdx() != 0) return;
          TPipe pipe;
          TBuf<TPosition::VECCALC> ub;
          pipe.InitBuffer(ub, 192 * 1024);
          body(ub.Get<uint8_t>());
        }
      },
      options);
}

template <typename T>
LocalTensor<T> at(const LocalTensor<uint8_t>& memory, uint32_t byte) {
  return memory[byte].ReinterpretCast<T>();
}

template <typename T>
GlobalTensor<T> global(uint8_t* address) {
  GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer(reinterpret_cast<T*>(address));
  return tensor;
}

template <HardEvent kEvent>
void set_and_wait(int id = 3) {
  SetFlag<kEvent>(id);
  WaitFlag<kEvent>(id);
}

// `bytes` of global memory to UB and back.
template <typename T>
void load(const LocalTensor<T>& to, uint8_t* from, uint32_t count) {
  DataCopyExtParams copy;
  copy.blockLen = static_cast<uint32_t>(ascendc_emulator::bytes_of<T>(count));
  DataCopyPad(to.template ReinterpretCast<uint8_t>(), global<uint8_t>(from), copy,
              DataCopyPadExtParams<uint8_t>{false, 0, 0, 0});
}
template <typename T>
void store(uint8_t* to, const LocalTensor<T>& from, uint32_t count) {
  DataCopyExtParams copy;
  copy.blockLen = static_cast<uint32_t>(ascendc_emulator::bytes_of<T>(count));
  DataCopyPad(global<uint8_t>(to), from.template ReinterpretCast<uint8_t>(), copy);
}

inline bool expect_clean(const Report& report, const std::string& what) {
  return check(report.clean(), what + ": " + report.text());
}

// Exactly the detectors in `expected`, and no other.
inline bool expect_violations(const Report& report, std::initializer_list<Detector> expected, const std::string& what) {
  bool is_right = true;
  for (const Detector detector : expected) is_right = is_right && report.has(detector);
  for (const auto& violation : report.violations) {
    bool is_expected = false;
    for (const Detector detector : expected) is_expected = is_expected || detector == violation.detector;
    is_right = is_right && is_expected;
  }
  return check(is_right, what + ": found " + (report.clean() ? "nothing" : report.text()));
}
