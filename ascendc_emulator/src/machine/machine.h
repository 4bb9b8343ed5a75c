// SPDX-License-Identifier: Apache-2.0
// The machine that a launch runs on. Its cores are fibers; instructions run in program order, one core until it has to
// wait for another. What the hardware may reorder is found by vector clocks, not by chance: a pipe's clock says up to
// which instruction of every pipe of every core everything has finished before the pipe's next instruction starts.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ascendc_emulator/options.h"
#include "core.h"
#include "fibers.h"
#include "global_memory.h"
#include "violations.h"

namespace ascendc_emulator {

class Machine {
 public:
  Machine(uint32_t blocks, const Options& options, L2Lines::Pass pass, Allocations& allocations);

  Report Run(const std::function<void()>& kernel);

  static Machine& current() { return *current_; }
  static bool is_running() { return current_ != nullptr; }
  const Options& options() const { return options_; }
  bool is_full() const { return options_.mode == Mode::kFull; }
  uint32_t blocks() const { return blocks_; }
  uint32_t device_cores() const { return options_.device_cores ? options_.device_cores : blocks_; }
  Core& core() { return *core_; }  // the running one
  Core& core(uint32_t index) { return *cores_[index]; }
  const std::vector<std::unique_ptr<Core>>& cores() const { return cores_; }
  Cost& cost() { return cost_; }

  void ReportViolation(Detector detector, const std::string& what, const Location& at) {
    violations_.Add(detector, core_->text(), what, at);
  }
  void Yield();  // the running core, until a cross-core flag that it waits for is set
  Allocation* Find(const uint8_t* address);
  // For operands outside their buffer. Several may share it: their values do not matter any more.
  uint8_t* Scratch(uint64_t bytes);

  // Clocks, in clocks.cpp.
  void Issue(Core& core, Pipe pipe);                                        // the scalar unit hands over an instruction
  Completion CompletionOf(Core& core, Pipe pipe) const;                     // of everything that the pipe was given
  void WaitFor(Core& core, Pipe pipe, const Completion& completion) const;  // before the pipe's next instruction
  void Join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) const;

 private:
  bool CanRun(const Core& core) const;
  void Finish(Core& core);
  void CheckLeftOver();
  void SummarizeCost();

  static Machine* current_;
  const uint32_t blocks_;
  const Options options_;
  Allocations& allocations_;
  Allocation* last_found_ = nullptr;
  std::vector<std::unique_ptr<Core>> cores_;
  Core* core_ = nullptr;
  Fibers* fibers_ = nullptr;
  Violations violations_;
  Cost cost_;
  std::vector<uint8_t> scratch_;
};

}  // namespace ascendc_emulator
