// SPDX-License-Identifier: Apache-2.0
// The machine that launches run on. Its cores are fibers; instructions run in program order, one core until it has to
// wait for another (scheduler.h). What the hardware may reorder is found by vector clocks, not by chance: a pipe's
// clock says up to which instruction of every pipe of every core everything has finished before the pipe's next
// instruction starts. Launches that are under way at the same time have cores of their own, whatever cores the device
// has.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ascendc_emulator/launch.h"
#include "core.h"
#include "fibers.h"
#include "global_memory.h"
#include "violations.h"

namespace ascendc_emulator {

class Machine {
 public:
  Machine(const std::vector<StreamLaunch>& launches, const Options& options, L2Lines::Pass pass,
          Allocations& allocations);

  Report Run();

  static Machine& current() { return *current_; }
  static bool is_running() { return current_ != nullptr; }
  const Options& options() const { return options_; }
  bool is_full() const { return options_.mode == Mode::kFull; }
  const std::vector<StreamLaunch>& launches() const { return launches_; }
  const StreamLaunch& launch() const { return launches_[core_->launch]; }  // of the running core
  uint32_t device_cores() const { return options_.device_cores ? options_.device_cores : blocks_; }
  Core& core() { return *core_; }  // the running one
  Core& core(uint32_t index) { return *cores_[index]; }
  const std::vector<std::unique_ptr<Core>>& cores() const { return cores_; }
  Cost& cost() { return cost_; }

  void ReportViolation(Detector detector, const std::string& what, const Location& at) {
    violations_.Add(detector, core_->text(), what, at);
  }
  void Select(Core& core) { core_ = &core; }  // as the one that violations are reported of
  void Resume(Core& core);                    // until it waits for a cross-core flag or ends
  void Yield();                               // the running core, until a cross-core flag that it waits for is set
  Allocation* Find(const uint8_t* address);
  // For operands outside their buffer. Several may share it: their values do not matter any more.
  uint8_t* Scratch(uint64_t bytes);

  // Clocks, in clocks.cpp.
  void Issue(Core& core, Pipe pipe);                                        // the scalar unit hands over an instruction
  Completion CompletionOf(Core& core, Pipe pipe) const;                     // of everything that the pipe was given
  void WaitFor(Core& core, Pipe pipe, const Completion& completion) const;  // before the pipe's next instruction
  void Join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) const;

 private:
  void AddCore(uint32_t launch, uint32_t block, uint32_t in_block);
  void Finish(Core& core);
  void CheckLeftOver();
  void SummarizeCost();

  static Machine* current_;
  const std::vector<StreamLaunch> launches_;
  uint32_t blocks_ = 0;  // of all launches
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
