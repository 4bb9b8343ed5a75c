// SPDX-License-Identifier: Apache-2.0
// Functions that take turns on one thread: each runs until it yields or ends.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace ascendc_emulator {

class Fibers {
 public:
  Fibers(uint32_t count, std::function<void(uint32_t)> body);  // fiber i runs body(i)
  Fibers(const Fibers&) = delete;
  ~Fibers();
  void Resume(uint32_t index);  // until the fiber yields or ends
  void Yield();                 // from within the running fiber

 private:
  static void Enter();
  struct Contexts;
  std::function<void(uint32_t)> body_;
  std::unique_ptr<Contexts> contexts_;
  uint32_t running_ = 0;
};

}  // namespace ascendc_emulator
