// SPDX-License-Identifier: Apache-2.0
// The machine under the emulated instructions: cores as fibres, on-chip memories with shadows, pipes with vector
// clocks, flags. Instructions run in program order, one core until it waits for another; what the hardware may reorder
// is found by the clocks, not by chance.
//
// A pipe's clock says, for every pipe of every core, up to which of its instructions everything is known to be finished
// before the pipe's next instruction starts. An access is a hazard if an earlier conflicting one is not known finished.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <string_view>
#include <vector>

#include "cost.h"
#include "report.h"

namespace emulation {

using Location = std::source_location;

enum class Memory : uint8_t { kUb, kL1, kL0a, kL0b, kL0c };
inline constexpr uint32_t kMemories = 5;
inline constexpr uint32_t kMemoryBytes[kMemories] = {196608, 524288, 65536, 65536, 131072};
inline constexpr uint32_t kGranule = 32;
inline constexpr uint32_t kEventIds = 8;
inline constexpr uint32_t kCrossCoreIds = 16;
inline constexpr uint32_t kMaxOutstanding = 15;
inline constexpr uint32_t kVectorsPerCube = 2;

enum class CoreKind : uint8_t { kCube, kVector };
enum class Mode : uint8_t { kFull, kCostOnly };

struct Options {
  Mode mode = Mode::kFull;  // kCostOnly: no data is moved and nothing is checked but what costs nothing
  Rates rates;
  bool is_l2_warm = false;    // what earlier launches touched need not come from HBM
  bool is_counting = false;   // Launch runs predictions twice: first to see which cores share which lines
  uint32_t device_cores = 0;  // cube cores that share the HBM; 0: those launched
};

// What one pipe tells another.
struct Message {
  std::vector<uint32_t> clock;
  double time = 0;
};

struct Granule {
  uint32_t write = 0;
  uint32_t read[3] = {0, 0, 0};  // by reader_slot()
  uint8_t writer = 0;            // pipe
  uint8_t reader[3] = {0, 0, 0};
};

// Cores may write neighbouring bytes of global memory at the same time: accesses are kept with the bytes they touch.
struct GlobalAccess {
  uint32_t who;  // core * kPipes + pipe
  uint32_t index;
  uint32_t bytes;  // one bit each
};
struct GlobalGranule {
  std::vector<GlobalAccess> writers, readers;  // without those that nothing can conflict with any more
};

struct Allocation {
  uint8_t* begin;
  uint64_t bytes;
  bool is_input;  // written by the host alone
  std::string name;
  std::vector<uint8_t> valid;                                       // per byte; empty for inputs
  std::vector<std::unique_ptr<std::vector<GlobalGranule>>> shadow;  // pages of kPageGranules
  // Per line of kLineBytes, one bit a block. What several blocks read comes from the HBM once, and each pays its part.
  std::vector<uint64_t> sharers, paid;
  std::vector<bool> in_l2;  // from an earlier launch
};

class Instruction;

struct Issued {
  Location at;
  const char* name;
};

struct PipeState {
  std::vector<uint32_t> clock;
  uint32_t issued = 0;
  uint64_t scalar_version = 0;
  double free_at = 0;  // when the next instruction may start
  double done_at = 0;  // when the results of the last one are there
  double busy = 0;
  double memory_at = 0;     // until when its share of the HBM is used up
  std::vector<Issued> log;  // log[i - 1] is instruction i
};

struct EventFlag {
  bool is_set = false;
  Message message;
  Location set_at;
};

struct Core {
  uint32_t index;  // among all cores of the launch
  uint32_t block;
  CoreKind kind;
  uint32_t sub;  // of an AIV in its block
  std::vector<uint8_t> data[kMemories], valid[kMemories];
  std::vector<Granule> shadow[kMemories];
  uint32_t allocated[kMemories] = {};
  PipeState pipes[kPipes];
  uint64_t scalar_version = 1;
  std::map<uint32_t, EventFlag> flags;  // event * kEventIds + id
  std::deque<Message> counters[kCrossCoreIds];
  std::deque<Message> pending[3][kCrossCoreIds];  // sets of mode 0, 1, 2 that wait for those of other cores
  bool is_finished = false;
  int waits_for = -1;  // cross-core id
  Location waits_at;

  std::string text() const;
  const char* kind_text() const { return kind == CoreKind::kCube ? "AIC" : "AIV"; }
};

class Machine {
 public:
  Machine(uint32_t blocks, const Options& options, std::map<const uint8_t*, Allocation>& allocations);
  ~Machine();

  Report Run(const std::function<void()>& kernel);

  static Machine& current() { return *current_; }
  static bool is_running() { return current_ != nullptr; }
  Core& core() { return *core_; }
  uint32_t blocks() const { return blocks_; }
  bool is_full() const { return options_.mode == Mode::kFull; }
  const Rates& rates() const { return options_.rates; }

  void Violate(Detector detector, const std::string& what, const Location& at);

  void SetFlag(uint32_t event, Pipe from, int id, const Location& at);
  void WaitFlag(uint32_t event, Pipe to, int id, const Location& at);
  void PipeBarrier(int pipe, const Location& at);  // -1: all
  void CrossCoreSetFlag(uint32_t mode, Pipe pipe, uint32_t id, const Location& at);
  void CrossCoreWaitFlag(uint32_t id, const Location& at);
  void SyncAll(bool vectors_only, const Location& at);
  uint32_t Allocate(Memory memory, uint32_t bytes, const Location& at);

 private:
  friend class Instruction;
  friend struct Fibre;
  void Resume(Core& core);
  void Yield();
  void Join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other);
  Message MessageOf(PipeState& pipe, Core& core, Pipe which);
  void Tell(Core& core, Pipe pipe, const Message& message);
  void Issue(Core& core, Pipe pipe);
  void Deliver(Core& core, uint32_t id, const Message& message, const Location& at);
  void Exchange(const std::vector<Core*>& from, const std::vector<Core*>& to, uint32_t mode, uint32_t id,
                const Location& at);
  void Finish(Core& core);
  Allocation* Find(const uint8_t* address);

  static Machine* current_;
  uint32_t blocks_;
  Options options_;
  std::map<const uint8_t*, Allocation>& allocations_;
  Allocation* last_ = nullptr;
  std::vector<std::unique_ptr<Core>> cores_;
  Core* core_ = nullptr;
  Report report_;
  std::map<std::tuple<Detector, uint64_t, std::string>, size_t> seen_;
  struct Fibres;
  std::unique_ptr<Fibres> fibres_;
  std::vector<uint8_t> scratch_;
  uint64_t issued_ = 0;  // instructions, flags and barriers
};

// One instruction of the running core: its accesses, then its cost. Accesses outside of a buffer are reported and go to
// scratch memory.
class Instruction {
 public:
  Instruction(Pipe pipe, const char* name, const Location& at);
  Instruction(const Instruction&) = delete;

  bool is_full() const { return machine_.is_full(); }
  void Violate(Detector detector, const std::string& what) const;
  bool Check(bool is_right, Detector detector, const char* what) const {
    if (!is_right) Violate(detector, what);
    return is_right;
  }

  // `needs_values`: every byte must have been written. `limit`: where the buffer ends.
  const uint8_t* Read(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, bool needs_values = true);
  uint8_t* Write(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, bool is_valid = true);
  const uint8_t* ReadGlobal(const void* address, uint64_t bytes, bool needs_values = true);
  uint8_t* WriteGlobal(void* address, uint64_t bytes);
  // Whether each byte has been written; null outside of a buffer.
  uint8_t* Validity(Memory memory, uint64_t offset, uint64_t bytes);

  // Same-pipe accesses to L0C are in order without a barrier from here on (large Mmads).
  void AllowOverlap() { allows_overlap_ = true; }

  void Transfer(Path path, uint64_t bytes);  // its global bytes are counted by ReadGlobal and WriteGlobal
  void Compute(uint64_t cycles);

 private:
  bool InBounds(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, const char* verb);
  void CheckRead(Granule& granule, Memory memory, uint64_t offset);
  void CheckWrite(Granule& granule, Memory memory, uint64_t offset);
  void CheckGlobal(Allocation& allocation, uint64_t offset, uint64_t bytes, bool is_write);
  void Hazard(const char* kind, const std::string& where, uint32_t other_core, Pipe other_pipe, uint32_t other) const;
  void Touch(Allocation& allocation, uint64_t offset, uint64_t bytes);
  void Occupy(double microseconds, double latency);
  uint8_t* Scratch(uint64_t bytes);

  Machine& machine_;
  Core& core_;
  PipeState& state_;
  const Pipe pipe_;
  const char* const name_;
  const Location at_;
  uint32_t index_;
  bool allows_overlap_ = false;
  double memory_bytes_ = 0;
};

}  // namespace emulation
