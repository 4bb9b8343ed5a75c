// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <sstream>

#include "field.h"

namespace emulation {
namespace {

constexpr uint32_t kPageGranules = 1024;
constexpr uint64_t kLineBytes = 512;
constexpr size_t kStackBytes = 512 * 1024;
constexpr uint8_t kPoison = 0xA5;
constexpr size_t kMaxReported = 200;

std::string line_of(const Location& at) {
  const std::string_view path = at.file_name();
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(at.line());
}

const char* name_of(Memory memory) {
  constexpr const char* kNames[] = {"UB", "L1", "L0A", "L0B", "L0C"};
  return kNames[static_cast<uint32_t>(memory)];
}

std::string range_of(const std::string& where, uint64_t begin, uint64_t bytes) {
  return where + " [" + std::to_string(begin) + ", " + std::to_string(begin + bytes) + ")";
}

bool has_pipe(CoreKind kind, Pipe pipe) {
  switch (pipe) {
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

// Which of a granule's readers a pipe is: those that read the same memory have slots of their own.
uint32_t reader_slot(Pipe pipe) {
  switch (pipe) {
    case Pipe::kS:
      return 2;
    case Pipe::kMte3:
    case Pipe::kFix:
      return 1;
    default:
      return 0;
  }
}

double gib_per_us(double gib) { return gib * 1073741824.0 / 1e6; }

}  // namespace

const char* name_of(Detector detector) {
  constexpr const char* kNames[] = {"capacity",      "bounds", "alignment",  "parameter", "core",
                                    "uninitialised", "flag",   "cross-core", "hazard",    "deadlock"};
  return kNames[static_cast<uint32_t>(detector)];
}

const char* name_of(Pipe pipe) {
  constexpr const char* kNames[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX"};
  return kNames[static_cast<uint32_t>(pipe)];
}

const char* name_of(Path path) {
  constexpr const char* kNames[] = {"GM->L1", "GM->UB", "UB->GM", "L0C->GM", "L0C->L1", "L1->L0A", "L1->L0B"};
  return kNames[static_cast<uint32_t>(path)];
}

bool Report::has(Detector detector) const {
  return std::any_of(violations.begin(), violations.end(), [&](const Violation& v) { return v.detector == detector; });
}

std::string Report::text() const {
  std::ostringstream out;
  for (const Violation& violation : violations) {
    out << name_of(violation.detector) << ": " << violation.text;
    if (violation.count > 1) out << " (" << violation.count << " times)";
    out << '\n';
  }
  return out.str();
}

void report_truncated(int64_t value, int64_t largest, const std::source_location& at) {
  if (!Machine::is_running()) return;
  Machine::current().Violate(Detector::kParameter,
                             "a field that holds at most " + std::to_string(largest) +
                                 " is given a larger value, such as " + std::to_string(value),
                             at);
}

std::string Core::text() const {
  return std::string(kind == CoreKind::kCube ? "AIC " : "AIV ") +
         std::to_string(kind == CoreKind::kCube ? block : block * kVectorsPerCube + sub);
}

// --- fibres ---

struct Machine::Fibres {
  ucontext_t scheduler;
  std::vector<ucontext_t> contexts;
  std::vector<std::unique_ptr<char[]>> stacks;
  const std::function<void()>* kernel = nullptr;
};

struct Fibre {
  static void Enter() {
    Machine& machine = *Machine::current_;
    (*machine.fibres_->kernel)();
    machine.Finish(*machine.core_);
    swapcontext(&machine.fibres_->contexts[machine.core_->index], &machine.fibres_->scheduler);
  }
};

Machine* Machine::current_ = nullptr;

Machine::Machine(uint32_t blocks, const Options& options, std::map<const uint8_t*, Allocation>& allocations)
    : blocks_(blocks), options_(options), allocations_(allocations), fibres_(std::make_unique<Fibres>()) {
  const uint32_t per_block = 1 + kVectorsPerCube;
  for (uint32_t index = 0; index < blocks * per_block; ++index) {
    auto core = std::make_unique<Core>();
    core->index = index;
    core->block = index / per_block;
    core->kind = index % per_block == 0 ? CoreKind::kCube : CoreKind::kVector;
    core->sub = index % per_block == 0 ? 0 : index % per_block - 1;
    for (PipeState& pipe : core->pipes) pipe.clock.assign(size_t{blocks} * per_block * kPipes, 0);
    if (is_full()) {
      for (uint32_t memory = 0; memory < kMemories; ++memory) {
        if ((memory == 0) != (core->kind == CoreKind::kVector)) continue;
        core->data[memory].assign(kMemoryBytes[memory], kPoison);
        core->valid[memory].assign(kMemoryBytes[memory], 0);
        core->shadow[memory].resize(kMemoryBytes[memory] / kGranule);
      }
    }
    cores_.push_back(std::move(core));
  }
  // What an earlier launch wrote, it wrote before this one.
  for (auto& [begin, allocation] : allocations_) {
    allocation.shadow.clear();
    if (options_.mode == Mode::kFull || options_.is_counting) {
      allocation.in_l2.resize(allocation.bytes / kLineBytes + 1);
      for (size_t line = 0; line < allocation.in_l2.size(); ++line) {
        const bool was_touched = line < allocation.sharers.size() && allocation.sharers[line];
        allocation.in_l2[line] = options_.is_l2_warm && (allocation.in_l2[line] || was_touched);
      }
      allocation.sharers.assign(allocation.in_l2.size(), 0);
    }
    allocation.paid.assign(allocation.sharers.size(), 0);
  }
}

Machine::~Machine() = default;

void Machine::Resume(Core& core) {
  core_ = &core;
  swapcontext(&fibres_->scheduler, &fibres_->contexts[core.index]);
}

void Machine::Yield() {
  Core& core = *core_;
  swapcontext(&fibres_->contexts[core.index], &fibres_->scheduler);
  core_ = &core;
}

Report Machine::Run(const std::function<void()>& kernel) {
  current_ = this;
  fibres_->kernel = &kernel;
  fibres_->contexts.resize(cores_.size());
  for (auto& core : cores_) {
    fibres_->stacks.emplace_back(new char[kStackBytes]);
    ucontext_t& context = fibres_->contexts[core->index];
    getcontext(&context);
    context.uc_stack.ss_sp = fibres_->stacks.back().get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, Fibre::Enter, 0);
  }
  for (bool is_progressing = true; is_progressing;) {
    is_progressing = false;
    for (auto& core : cores_) {
      if (core->is_finished || (core->waits_for >= 0 && core->counters[core->waits_for].empty())) continue;
      is_progressing = true;
      Resume(*core);
    }
  }
  bool is_dead = false;
  for (auto& core : cores_) {
    if (core->is_finished) continue;
    core_ = core.get();
    is_dead = true;
    Violate(Detector::kDeadlock, "waits for ever for flag " + std::to_string(core->waits_for), core->waits_at);
  }
  for (auto& core : cores_) {
    if (is_dead) break;
    core_ = core.get();
    for (uint32_t id = 0; id < kCrossCoreIds; ++id) {
      size_t left = core->counters[id].size();
      for (const auto& pending : core->pending) left += pending[id].size();
      if (left > 0) {
        Violate(
            Detector::kCrossCore,
            "flag " + std::to_string(id) + " was set " + std::to_string(left) + " times more than it was waited for",
            Location());
      }
    }
  }
  Cost& cost = report_.cost;
  cost.instructions = issued_;
  for (auto& core : cores_) {
    for (uint32_t pipe = 0; pipe < kPipes; ++pipe) {
      cost.critical_path = std::max({cost.critical_path, core->pipes[pipe].free_at, core->pipes[pipe].done_at});
      cost.busiest[pipe] = std::max(cost.busiest[pipe], core->pipes[pipe].busy);
    }
  }
  const uint32_t device_cores = options_.device_cores ? options_.device_cores : blocks_;
  cost.memory_bound = cost.memory_bytes / options_.rates.hbm_bytes_per_us;
  cost.cube_bound = static_cast<double>(cost.cube_cycles) / device_cores / options_.rates.clock_mhz;
  current_ = nullptr;
  return std::move(report_);
}

// --- reports ---

void Machine::Violate(Detector detector, const std::string& what, const Location& at) {
  std::string text;
  if (at.line() > 0) text = line_of(at) + ": ";
  text += core_->text() + ": " + what;
  // The same fault of another core or a later round is the same fault.
  const auto key = std::make_tuple(detector, (uint64_t{at.line()} << 32) | at.column(),
                                   std::string(at.file_name()) + what.substr(0, what.find('[')));
  const auto [seen, is_new] = seen_.emplace(key, report_.violations.size());
  if (!is_new) {
    ++report_.violations[seen->second].count;
  } else if (report_.violations.size() < kMaxReported) {
    report_.violations.push_back({detector, std::move(text)});
  } else {
    seen_.erase(seen);
  }
}

// --- clocks and flags ---

void Machine::Join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) {
  if (!is_full() || other.empty()) return;
  uint32_t* to = clock.data();
  const uint32_t* from = other.data();
  for (size_t i = 0; i < clock.size(); ++i) to[i] = std::max(to[i], from[i]);
}

// The scalar unit hands instructions to the pipes: what it knows, they know.
void Machine::Issue(Core& core, Pipe pipe) {
  ++issued_;
  PipeState& scalar = core.pipes[0];
  PipeState& state = core.pipes[static_cast<uint32_t>(pipe)];
  scalar.free_at += options_.rates.issue_cycles / options_.rates.clock_mhz;
  state.free_at = std::max(state.free_at, scalar.free_at);
  if (pipe == Pipe::kS || state.scalar_version == core.scalar_version) return;
  Join(state.clock, scalar.clock);
  state.scalar_version = core.scalar_version;
}

// Everything that the pipe was given is finished, and whatever that came after.
Message Machine::MessageOf(PipeState& state, Core& core, Pipe pipe) {
  Message message;
  message.time = std::max(state.free_at, state.done_at);
  if (!is_full()) return message;
  message.clock = state.clock;
  message.clock[core.index * kPipes + static_cast<uint32_t>(pipe)] = state.issued;
  return message;
}

void Machine::Tell(Core& core, Pipe pipe, const Message& message) {
  PipeState& state = core.pipes[static_cast<uint32_t>(pipe)];
  Join(state.clock, message.clock);
  state.free_at = std::max(state.free_at, message.time);
  if (pipe == Pipe::kS) ++core.scalar_version;
}

void Machine::SetFlag(uint32_t event, Pipe from, int id, const Location& at) {
  Core& core = *core_;
  Issue(core, from);
  if (!has_pipe(core.kind, from)) return Violate(Detector::kCore, "SetFlag from a pipe that the core lacks", at);
  if (id < 0 || id >= static_cast<int>(kEventIds)) {
    return Violate(Detector::kFlag, "event " + std::to_string(id) + " is not in [0, 7]", at);
  }
  EventFlag& flag = core.flags[event * kEventIds + static_cast<uint32_t>(id)];
  if (flag.is_set) {
    Violate(
        Detector::kFlag,
        "SetFlag of event " + std::to_string(id) + ", which " + line_of(flag.set_at) + " set and nothing waited for",
        at);
  }
  flag.is_set = true;
  flag.message = MessageOf(core.pipes[static_cast<uint32_t>(from)], core, from);
  flag.set_at = at;
}

void Machine::WaitFlag(uint32_t event, Pipe to, int id, const Location& at) {
  Core& core = *core_;
  Issue(core, to);
  if (!has_pipe(core.kind, to)) return Violate(Detector::kCore, "WaitFlag on a pipe that the core lacks", at);
  if (id < 0 || id >= static_cast<int>(kEventIds)) {
    return Violate(Detector::kFlag, "event " + std::to_string(id) + " is not in [0, 7]", at);
  }
  EventFlag& flag = core.flags[event * kEventIds + static_cast<uint32_t>(id)];
  if (!flag.is_set) {
    return Violate(Detector::kFlag, "WaitFlag of event " + std::to_string(id) + ", which nothing set", at);
  }
  flag.is_set = false;
  Tell(core, to, flag.message);
}

void Machine::PipeBarrier(int pipe, const Location& at) {
  Core& core = *core_;
  if (pipe >= 0) {
    if (!has_pipe(core.kind, static_cast<Pipe>(pipe))) {
      return Violate(Detector::kCore, "PipeBarrier of a pipe that the core lacks", at);
    }
    PipeState& state = core.pipes[pipe];
    Issue(core, static_cast<Pipe>(pipe));
    if (is_full()) state.clock[core.index * kPipes + static_cast<uint32_t>(pipe)] = state.issued;
    state.free_at = std::max(state.free_at, state.done_at);
    return;
  }
  for (uint32_t other = 1; other < kPipes; ++other) {
    Tell(core, Pipe::kS, MessageOf(core.pipes[other], core, static_cast<Pipe>(other)));
  }
}

void Machine::Deliver(Core& core, uint32_t id, const Message& message, const Location& at) {
  core.counters[id].push_back(message);
  if (core.counters[id].size() > kMaxOutstanding) {
    Violate(
        Detector::kCrossCore,
        "flag " + std::to_string(id) + " of " + core.text() + " counts more than " + std::to_string(kMaxOutstanding),
        at);
  }
}

// Once all of `from` have set the flag, it counts for all of `to`.
void Machine::Exchange(const std::vector<Core*>& from, const std::vector<Core*>& to, uint32_t mode, uint32_t id,
                       const Location& at) {
  for (const Core* core : from) {
    if (core->pending[mode][id].empty()) return;
  }
  Message all;
  all.clock.assign(is_full() ? cores_.size() * kPipes : 0, 0);
  for (Core* core : from) {
    const Message& message = core->pending[mode][id].front();
    Join(all.clock, message.clock);
    all.time = std::max(all.time, message.time);
    core->pending[mode][id].pop_front();
  }
  for (Core* core : to) Deliver(*core, id, all, at);
}

void Machine::CrossCoreSetFlag(uint32_t mode, Pipe pipe, uint32_t id, const Location& at) {
  Core& core = *core_;
  Issue(core, pipe);
  if (!has_pipe(core.kind, pipe)) return Violate(Detector::kCore, "CrossCoreSetFlag on a pipe that the core lacks", at);
  if (id >= kCrossCoreIds)
    return Violate(Detector::kCrossCore, "flag " + std::to_string(id) + " is not in [0, 15]", at);
  Message message = MessageOf(core.pipes[static_cast<uint32_t>(pipe)], core, pipe);
  message.time += options_.rates.cross_core_us;
  core.pending[mode][id].push_back(std::move(message));
  if (core.pending[mode][id].size() > kMaxOutstanding) {
    Violate(Detector::kCrossCore,
            "flag " + std::to_string(id) + " was set " + std::to_string(core.pending[mode][id].size()) +
                " times before the other cores of its group set it",
            at);
  }
  std::vector<Core*> same_kind, vectors, cube;
  for (auto& other : cores_) {
    if (other->kind == core.kind) same_kind.push_back(other.get());
    if (other->block == core.block) (other->kind == CoreKind::kCube ? cube : vectors).push_back(other.get());
  }
  if (mode == 0) {
    Exchange(same_kind, same_kind, mode, id, at);
  } else if (mode == 1) {
    if (core.kind != CoreKind::kVector) return Violate(Detector::kCore, "mode 1 is for AIVs", at);
    Exchange(vectors, vectors, mode, id, at);
  } else {
    core.kind == CoreKind::kCube ? Exchange(cube, vectors, mode, id, at) : Exchange(vectors, cube, mode, id, at);
  }
}

void Machine::CrossCoreWaitFlag(uint32_t id, const Location& at) {
  Core& core = *core_;
  if (id >= kCrossCoreIds)
    return Violate(Detector::kCrossCore, "flag " + std::to_string(id) + " is not in [0, 15]", at);
  core.waits_for = static_cast<int>(id);
  core.waits_at = at;
  while (core.counters[id].empty()) Yield();
  core.waits_for = -1;
  const Message message = std::move(core.counters[id].front());
  core.counters[id].pop_front();
  Tell(core, Pipe::kS, message);
}

// As the hardware's: by flags of its own.
void Machine::SyncAll(bool vectors_only, const Location& at) {
  Core& core = *core_;
  if (vectors_only && core.kind != CoreKind::kVector) {
    return Violate(Detector::kCore, "SyncAll<true> is for kernels of AIVs alone", at);
  }
  PipeBarrier(-1, at);
  const Pipe pipe = core.kind == CoreKind::kCube ? Pipe::kFix : Pipe::kMte3;
  CrossCoreSetFlag(0, pipe, 11, at);
  CrossCoreWaitFlag(11, at);
  if (vectors_only) return;
  CrossCoreSetFlag(2, pipe, 12, at);
  CrossCoreWaitFlag(12, at);
}

uint32_t Machine::Allocate(Memory memory, uint32_t bytes, const Location& at) {
  Core& core = *core_;
  const uint32_t which = static_cast<uint32_t>(memory);
  if ((memory == Memory::kUb) != (core.kind == CoreKind::kVector)) {
    Violate(Detector::kCore, std::string("a buffer in ") + name_of(memory) + ", which the core lacks", at);
  }
  const uint32_t begin = core.allocated[which];
  core.allocated[which] += (bytes + 31) / 32 * 32;
  if (core.allocated[which] > kMemoryBytes[which]) {
    Violate(Detector::kCapacity,
            std::string(name_of(memory)) + " has " + std::to_string(kMemoryBytes[which]) + " bytes, buffers need " +
                std::to_string(core.allocated[which]),
            at);
  }
  return begin;
}

void Machine::Finish(Core& core) {
  for (const auto& [key, flag] : core.flags) {
    if (!flag.is_set) continue;
    Violate(Detector::kFlag, "SetFlag of event " + std::to_string(key % kEventIds) + " that nothing waits for",
            flag.set_at);
  }
  core.is_finished = true;
}

Allocation* Machine::Find(const uint8_t* address) {
  if (last_ && address >= last_->begin && address < last_->begin + last_->bytes) return last_;
  auto next = allocations_.upper_bound(address);
  if (next == allocations_.begin()) return nullptr;
  Allocation& allocation = std::prev(next)->second;
  if (address >= allocation.begin + allocation.bytes) return nullptr;
  return last_ = &allocation;
}

// --- instructions ---

Instruction::Instruction(Pipe pipe, const char* name, const Location& at)
    : machine_(*Machine::current_),
      core_(*machine_.core_),
      state_(core_.pipes[static_cast<uint32_t>(pipe)]),
      pipe_(pipe),
      name_(name),
      at_(at) {
  machine_.Issue(core_, pipe);
  index_ = ++state_.issued;
  if (pipe == Pipe::kS) {
    // The scalar unit finishes one access before it does anything else.
    if (is_full()) state_.clock[core_.index * kPipes] = index_ - 1;
    ++core_.scalar_version;
  }
  if (is_full()) state_.log.push_back({at, name});
  if (!has_pipe(core_.kind, pipe)) Violate(Detector::kCore, "is not for this kind of core");
}

void Instruction::Violate(Detector detector, const std::string& what) const {
  machine_.Violate(detector, std::string(name_) + " (" + name_of(pipe_) + "): " + what, at_);
}

uint8_t* Instruction::Scratch(uint64_t bytes) {
  // Several operands of one instruction may share it: their values do not matter any more.
  if (machine_.scratch_.size() < bytes) machine_.scratch_.resize(bytes);
  return machine_.scratch_.data();
}

bool Instruction::InBounds(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, const char* verb) {
  const uint64_t capacity = kMemoryBytes[static_cast<uint32_t>(memory)];
  if (bytes == 0 || (offset + bytes <= limit && offset + bytes <= capacity)) return bytes > 0;
  Violate(Detector::kBounds, std::string(verb) + " " + range_of(name_of(memory), offset, bytes) +
                                 ", but the buffer ends at " + std::to_string(std::min(limit, capacity)));
  return false;
}

void Instruction::Hazard(const char* kind, const std::string& where, uint32_t other_core, Pipe other_pipe,
                         uint32_t other) const {
  const Core& core = *machine_.cores_[other_core];
  const auto& log = core.pipes[static_cast<uint32_t>(other_pipe)].log;
  const Issued& earlier = log[other - 1];
  Violate(Detector::kHazard, std::string(kind) + " after " + earlier.name + " (" + name_of(other_pipe) +
                                 (other_core == core_.index ? "" : ", " + core.text()) + ") at " + line_of(earlier.at) +
                                 ", which nothing orders before it: " + where);
}

void Instruction::CheckRead(Granule& granule, Memory memory, uint64_t offset) {
  const uint32_t base = core_.index * kPipes;
  const bool is_same = granule.writer == static_cast<uint8_t>(pipe_);
  if (granule.write > state_.clock[base + granule.writer] &&
      !(is_same && (granule.write == index_ || allows_overlap_))) {
    Hazard("reads", range_of(name_of(memory), offset, kGranule), core_.index, static_cast<Pipe>(granule.writer),
           granule.write);
  }
  const uint32_t slot = reader_slot(pipe_);
  granule.read[slot] = index_;
  granule.reader[slot] = static_cast<uint8_t>(pipe_);
}

void Instruction::CheckWrite(Granule& granule, Memory memory, uint64_t offset) {
  const uint32_t base = core_.index * kPipes;
  const bool is_same = granule.writer == static_cast<uint8_t>(pipe_);
  if (granule.write > state_.clock[base + granule.writer] &&
      !(is_same && (granule.write == index_ || allows_overlap_))) {
    Hazard("writes", range_of(name_of(memory), offset, kGranule), core_.index, static_cast<Pipe>(granule.writer),
           granule.write);
  }
  for (uint32_t slot = 0; slot < 3; ++slot) {
    const uint8_t reader = granule.reader[slot];
    if (granule.read[slot] <= state_.clock[base + reader]) continue;
    const bool is_own = reader == static_cast<uint8_t>(pipe_);
    if (is_own && (granule.read[slot] == index_ || allows_overlap_)) continue;
    Hazard("overwrites what is read", range_of(name_of(memory), offset, kGranule), core_.index,
           static_cast<Pipe>(reader), granule.read[slot]);
  }
  granule.write = index_;
  granule.writer = static_cast<uint8_t>(pipe_);
}

const uint8_t* Instruction::Read(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, bool needs_values) {
  if (!InBounds(memory, offset, bytes, limit, "reads")) return Scratch(bytes);
  if (!is_full()) return nullptr;
  const uint32_t which = static_cast<uint32_t>(memory);
  if (core_.data[which].empty()) return Scratch(bytes);
  Granule* shadow = core_.shadow[which].data();
  for (uint64_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) {
    CheckRead(shadow[g], memory, g * kGranule);
  }
  if (needs_values) {
    const uint8_t* valid = core_.valid[which].data() + offset;
    if (const void* hole = std::memchr(valid, 0, bytes)) {
      const uint64_t at = offset + static_cast<uint64_t>(static_cast<const uint8_t*>(hole) - valid);
      Violate(Detector::kUninitialised, "reads what nothing has written: " + range_of(name_of(memory), at, 1));
    }
  }
  return core_.data[which].data() + offset;
}

uint8_t* Instruction::Write(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, bool is_valid) {
  if (!InBounds(memory, offset, bytes, limit, "writes")) return Scratch(bytes);
  if (!is_full()) return nullptr;
  const uint32_t which = static_cast<uint32_t>(memory);
  if (core_.data[which].empty()) return Scratch(bytes);
  Granule* shadow = core_.shadow[which].data();
  for (uint64_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) {
    CheckWrite(shadow[g], memory, g * kGranule);
  }
  if (is_valid) std::memset(core_.valid[which].data() + offset, 1, bytes);
  return core_.data[which].data() + offset;
}

uint8_t* Instruction::Validity(Memory memory, uint64_t offset, uint64_t bytes) {
  const uint32_t which = static_cast<uint32_t>(memory);
  if (!is_full() || offset + bytes > core_.valid[which].size()) return nullptr;
  return core_.valid[which].data() + offset;
}

void Instruction::Touch(Allocation& allocation, uint64_t offset, uint64_t bytes) {
  const uint64_t block = uint64_t{1} << core_.block % 64;
  for (uint64_t line = offset / kLineBytes; line <= (offset + bytes - 1) / kLineBytes; ++line) {
    uint64_t& sharers = allocation.sharers[line];
    if (machine_.options_.mode == Mode::kFull ? sharers != 0 : (allocation.paid[line] & block) != 0) continue;
    if (machine_.is_full() || machine_.options_.is_counting) sharers |= block;
    allocation.paid[line] |= block;
    if (allocation.in_l2[line]) continue;
    const uint64_t end = std::min((line + 1) * kLineBytes, allocation.bytes);
    memory_bytes_ += static_cast<double>(end - line * kLineBytes) / std::popcount(sharers);
  }
}

void Instruction::CheckGlobal(Allocation& allocation, uint64_t offset, uint64_t bytes, bool is_write) {
  if (allocation.shadow.empty()) allocation.shadow.resize(allocation.bytes / kGranule / kPageGranules + 1);
  const uint32_t own = core_.index * kPipes + static_cast<uint32_t>(pipe_);
  const uint64_t last = (offset + bytes - 1) / kGranule;
  for (uint64_t g = offset / kGranule; g <= last; ++g) {
    auto& page = allocation.shadow[g / kPageGranules];
    if (!page) page = std::make_unique<std::vector<GlobalGranule>>(kPageGranules);
    GlobalGranule& granule = (*page)[g % kPageGranules];
    const uint64_t begin = std::max(offset, g * kGranule) - g * kGranule;
    const uint64_t end = std::min(offset + bytes, (g + 1) * kGranule) - g * kGranule;
    const uint32_t touched = static_cast<uint32_t>(((uint64_t{1} << end) - 1) & ~((uint64_t{1} << begin) - 1));
    const auto is_ordered = [&](const GlobalAccess& access) {
      return access.index <= state_.clock[access.who] || (access.who == own && access.index == index_);
    };
    const auto check = [&](const std::vector<GlobalAccess>& accesses, const char* kind) {
      for (const GlobalAccess& access : accesses) {
        if (!(access.bytes & touched) || is_ordered(access)) continue;
        Hazard(kind, range_of(allocation.name, g * kGranule + begin, end - begin), access.who / kPipes,
               static_cast<Pipe>(access.who % kPipes), access.index);
      }
    };
    check(granule.writers, is_write ? "writes" : "reads");
    if (is_write) check(granule.readers, "overwrites what is read");
    // Whatever is ordered before this access cannot conflict on its bytes with what is ordered after it.
    const auto forget = [&](std::vector<GlobalAccess>& accesses) {
      std::erase_if(accesses, [&](const GlobalAccess& a) { return (a.bytes & ~touched) == 0 && is_ordered(a); });
    };
    if (is_write) forget(granule.writers);
    forget(granule.readers);
    (is_write ? granule.writers : granule.readers).push_back({own, index_, touched});
  }
}

const uint8_t* Instruction::ReadGlobal(const void* address, uint64_t bytes, bool needs_values) {
  const uint8_t* begin = static_cast<const uint8_t*>(address);
  Allocation* allocation = machine_.Find(begin);
  if (bytes == 0) return Scratch(1);
  if (!allocation || begin + bytes > allocation->begin + allocation->bytes) {
    Violate(Detector::kBounds,
            allocation
                ? "reads " + range_of(allocation->name, static_cast<uint64_t>(begin - allocation->begin), bytes) +
                      ", which has " + std::to_string(allocation->bytes) + " bytes"
                : "reads global memory that is not allocated");
    return Scratch(bytes);
  }
  const uint64_t offset = static_cast<uint64_t>(begin - allocation->begin);
  Touch(*allocation, offset, bytes);
  if (!is_full() || allocation->is_input) return begin;
  CheckGlobal(*allocation, offset, bytes, false);
  if (needs_values) {
    const uint8_t* valid = allocation->valid.data() + offset;
    if (const void* hole = std::memchr(valid, 0, bytes)) {
      const uint64_t at = offset + static_cast<uint64_t>(static_cast<const uint8_t*>(hole) - valid);
      Violate(Detector::kUninitialised, "reads what nothing has written: " + range_of(allocation->name, at, 1));
    }
  }
  return begin;
}

uint8_t* Instruction::WriteGlobal(void* address, uint64_t bytes) {
  uint8_t* begin = static_cast<uint8_t*>(address);
  Allocation* allocation = machine_.Find(begin);
  if (bytes == 0) return Scratch(1);
  if (!allocation || begin + bytes > allocation->begin + allocation->bytes) {
    Violate(Detector::kBounds,
            allocation
                ? "writes " + range_of(allocation->name, static_cast<uint64_t>(begin - allocation->begin), bytes) +
                      ", which has " + std::to_string(allocation->bytes) + " bytes"
                : "writes global memory that is not allocated");
    return Scratch(bytes);
  }
  const uint64_t offset = static_cast<uint64_t>(begin - allocation->begin);
  if (allocation->is_input) {
    Violate(Detector::kBounds, "writes an input: " + range_of(allocation->name, offset, bytes));
    return Scratch(bytes);
  }
  Touch(*allocation, offset, bytes);
  if (!is_full()) return begin;
  CheckGlobal(*allocation, offset, bytes, true);
  std::memset(allocation->valid.data() + offset, 1, bytes);
  return begin;
}

void Instruction::Occupy(double microseconds, double latency) {
  state_.free_at += microseconds;
  state_.busy += microseconds;
  state_.done_at = std::max(state_.done_at, state_.free_at + latency);
}

void Instruction::Compute(uint64_t cycles) {
  Cost& cost = machine_.report_.cost;
  (pipe_ == Pipe::kM ? cost.cube_cycles : cost.vector_cycles) += cycles;
  Occupy((static_cast<double>(cycles) + machine_.rates().start_cycles) / machine_.rates().clock_mhz, 0);
}

void Instruction::Transfer(Path path, uint64_t bytes) {
  const Rates& rates = machine_.rates();
  const double path_rates[] = {rates.gm_to_l1,  rates.gm_to_ub,  rates.ub_to_gm, rates.l0c_to_gm,
                               rates.l0c_to_l1, rates.l1_to_l0a, rates.l1_to_l0b};
  Cost& cost = machine_.report_.cost;
  cost.bytes[static_cast<uint32_t>(path)] += bytes;
  cost.memory_bytes += memory_bytes_;
  const double on_path = static_cast<double>(bytes) / gib_per_us(path_rates[static_cast<uint32_t>(path)]);
  // Cores get equal shares of the HBM: cubes that of their block, the vector cores of a block half of it each.
  const uint32_t sharers = (machine_.options_.device_cores ? machine_.options_.device_cores : machine_.blocks_) *
                           (core_.kind == CoreKind::kCube ? 1 : kVectorsPerCube);
  const double from_memory = memory_bytes_ * sharers / rates.hbm_bytes_per_us;
  state_.memory_at = std::max(state_.memory_at, state_.free_at - rates.hbm_share_us) + from_memory;
  const bool is_global =
      path == Path::kGmToL1 || path == Path::kGmToUb || path == Path::kUbToGm || path == Path::kL0cToGm;
  const double start = path == Path::kL1ToL0a || path == Path::kL1ToL0b ? rates.start_cycles / rates.clock_mhz : 0;
  Occupy(std::max(on_path, memory_bytes_ > 0 ? state_.memory_at - state_.free_at : 0) + start,
         is_global ? rates.gm_latency_us : 0);
}

}  // namespace emulation
