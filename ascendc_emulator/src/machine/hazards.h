// SPDX-License-Identifier: Apache-2.0
// Shadow memories: who accessed which bytes last. Two accesses to the same bytes of which at least one writes are a
// hazard unless the later instruction's clock says that the earlier instruction has finished.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "ascendc_emulator/report.h"

namespace ascendc_emulator {

inline constexpr uint32_t kGranuleBytes = 32;

// An instruction that accesses memory.
struct Accessor {
  uint32_t core;
  Pipe pipe;
  uint32_t index;                      // among the instructions of its pipe, from 1
  const std::vector<uint32_t>& clock;  // of its pipe
  bool allows_overlap;                 // with other instructions of its pipe

  uint32_t clock_slot() const { return core * kPipes + static_cast<uint32_t>(pipe); }
};

// The earlier of two accesses that nothing orders, and the bytes that both touch.
struct Conflict {
  const char* what;  // what the later access does to the bytes
  uint32_t core;
  Pipe pipe;
  uint32_t index;
  uint64_t begin;
  uint64_t bytes;
};
using OnConflict = std::function<void(const Conflict&)>;

// Of one on-chip memory, which only its own core accesses. Accesses are tracked in granules of 32 bytes.
class LocalShadow {
 public:
  void Resize(uint32_t bytes) { granules_.resize(bytes / kGranuleBytes); }
  void Read(const Accessor& accessor, uint64_t offset, uint64_t bytes, const OnConflict& on_conflict);
  void Write(const Accessor& accessor, uint64_t offset, uint64_t bytes, const OnConflict& on_conflict);

 private:
  struct Granule {
    uint32_t write = 0;            // index of the last instruction that wrote
    uint32_t read[3] = {0, 0, 0};  // indices of the last that read, by reader_slot()
    uint8_t writer = 0;            // pipes
    uint8_t reader[3] = {0, 0, 0};
  };
  void CheckWriter(const Granule& granule, const Accessor& accessor, const char* what, uint64_t begin,
                   const OnConflict& on_conflict) const;
  std::vector<Granule> granules_;
};

// Of one allocation of global memory. Cores may write neighbouring bytes at the same time, so accesses are tracked
// with the bytes that they touch.
class GlobalShadow {
 public:
  void Clear() { pages_.clear(); }
  // `size`: of the allocation.
  void Access(const Accessor& accessor, uint64_t size, uint64_t offset, uint64_t bytes, bool is_write,
              const OnConflict& on_conflict);

 private:
  struct PastAccess {
    uint32_t slot;  // Accessor::clock_slot()
    uint32_t index;
    uint32_t bytes;  // of the granule, one bit each
  };
  struct Granule {
    std::vector<PastAccess> writers, readers;  // except those that no later access can conflict with
  };
  Granule& GranuleAt(uint64_t number, uint64_t size);
  std::vector<std::unique_ptr<std::vector<Granule>>> pages_;
};

}  // namespace ascendc_emulator
