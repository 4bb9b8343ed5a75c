// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <algorithm>

#include "ascendc_emulator/api/field.h"
#include "ascendc_emulator/machine/running_core.h"
#include "scheduler.h"

namespace ascendc_emulator {
namespace {

constexpr uint8_t kPoison = 0xA5;  // what uninitialised memory holds

}  // namespace

Machine* Machine::current_ = nullptr;

Machine::Machine(const std::vector<StreamLaunch>& launches, const Options& options, L2Lines::Pass pass,
                 Allocations& allocations)
    : launches_(launches), options_(options), allocations_(allocations) {
  for (const StreamLaunch& launch : launches_) blocks_ += launch.block_dim;
  for (uint32_t launch = 0; launch < launches_.size(); ++launch) {
    for (uint32_t in_launch = 0; in_launch < launches_[launch].block_dim * kCoresPerBlock; ++in_launch) {
      AddCore(launch, in_launch / kCoresPerBlock, in_launch % kCoresPerBlock);
    }
  }
  for (auto& [begin, allocation] : allocations_) {
    allocation.shadow.Clear();  // earlier launches have finished
    allocation.lines.Begin(pass, allocation.bytes, options_.is_l2_warm);
  }
}

void Machine::AddCore(uint32_t launch, uint32_t block, uint32_t in_block) {
  auto core = std::make_unique<Core>();
  core->index = static_cast<uint32_t>(cores_.size());
  core->launch = launch;
  core->block = block;
  core->kind = in_block == 0 ? CoreKind::kCube : CoreKind::kVector;
  core->sub_block = in_block == 0 ? 0 : in_block - 1;
  if (launches_.size() > 1) core->of_launch = " of launch " + std::to_string(launch);
  for (PipeState& pipe : core->pipes) pipe.clock.assign(size_t{blocks_} * kCoresPerBlock * kPipes, 0);
  if (is_full()) {
    for (uint32_t memory = 0; memory < kMemories; ++memory) {
      if ((static_cast<Memory>(memory) == Memory::kUb) != (core->kind == CoreKind::kVector)) continue;
      core->data[memory].assign(kMemoryBytes[memory], kPoison);
      core->valid[memory].assign(kMemoryBytes[memory], 0);
      core->shadow[memory].Resize(kMemoryBytes[memory]);
    }
  }
  cores_.push_back(std::move(core));
}

Report Machine::Run() {
  current_ = this;
  Fibers fibers(static_cast<uint32_t>(cores_.size()), [&](uint32_t index) {
    Core& core = *cores_[index];
    launches_[core.launch].kernel();
    Finish(core);
  });
  fibers_ = &fibers;
  Scheduler(*this).Run();
  CheckLeftOver();
  SummarizeCost();
  current_ = nullptr;
  return {violations_.Take(), cost_};
}

void Machine::Resume(Core& core) {
  Select(core);
  fibers_->Resume(core.index);
}

void Machine::Yield() { fibers_->Yield(); }

void Machine::Finish(Core& core) {
  for (const auto& [key, flag] : core.flags) {
    if (!flag.is_set) continue;
    ReportViolation(Detector::kFlag, "SetFlag of event " + std::to_string(key % kEventIds) + " that nothing waits for",
                    flag.set_at);
  }
  core.is_finished = true;
}

// Blocks that never start and cores that wait for ever; if there are none, cross-core flags that nothing waited for.
void Machine::CheckLeftOver() {
  bool is_dead = false;
  for (uint32_t launch = 0; launch < launches_.size(); ++launch) {
    uint32_t unstarted = 0;
    for (const auto& core : cores_) unstarted += core->launch == launch && !core->is_started;
    if (unstarted == 0) continue;
    is_dead = true;
    violations_.Add(
        Detector::kDeadlock, "launch " + std::to_string(launch),
        std::to_string(unstarted / kCoresPerBlock) + " of its " + std::to_string(launches_[launch].block_dim) +
            " blocks never start, since blocks that wait for ever hold the cores, or the device has too few",
        Location());
  }
  for (auto& core : cores_) {
    if (core->is_finished || !core->is_started) continue;
    core_ = core.get();
    is_dead = true;
    ReportViolation(Detector::kDeadlock, "waits for ever for flag " + std::to_string(core->waits_for), core->waits_at);
  }
  if (is_dead) return;
  for (auto& core : cores_) {
    core_ = core.get();
    for (uint32_t id = 0; id < kCrossCoreIds; ++id) {
      size_t left = core->counters[id].size();
      for (const auto& pending : core->pending) left += pending[id].size();
      if (left == 0) continue;
      ReportViolation(
          Detector::kCrossCore,
          "flag " + std::to_string(id) + " was set " + std::to_string(left) + " times more than it was waited for",
          Location());
    }
  }
}

Allocation* Machine::Find(const uint8_t* address) {
  if (last_found_ && address >= last_found_->begin && address < last_found_->begin + last_found_->bytes) {
    return last_found_;
  }
  auto next = allocations_.upper_bound(address);
  if (next == allocations_.begin()) return nullptr;
  Allocation& allocation = std::prev(next)->second;
  if (address >= allocation.begin + allocation.bytes) return nullptr;
  return last_found_ = &allocation;
}

uint8_t* Machine::Scratch(uint64_t bytes) {
  if (scratch_.size() < bytes) scratch_.resize(bytes);
  return scratch_.data();
}

bool Core::has_pipe(Pipe which) const {
  switch (which) {
    case Pipe::kS:
    case Pipe::kMte2:
    case Pipe::kMte3:
      return true;
    case Pipe::kV:
      return kind == CoreKind::kVector;
    default:
      return kind == CoreKind::kCube;
  }
}

std::string Core::text() const {
  return (kind == CoreKind::kCube ? "AIC " + std::to_string(block)
                                  : "AIV " + std::to_string(block * kVectorCoresPerBlock + sub_block)) +
         of_launch;
}

void report_truncated(int64_t value, int64_t largest, const Location& at) {
  if (!Machine::is_running()) return;
  Machine::current().ReportViolation(Detector::kParameter,
                                     "a field that holds at most " + std::to_string(largest) +
                                         " is given a larger value, such as " + std::to_string(value),
                                     at);
}

}  // namespace ascendc_emulator
