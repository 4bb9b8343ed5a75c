// SPDX-License-Identifier: Apache-2.0
// The host's side: global memory and kernel launches.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "options.h"
#include "report.h"

namespace ascendc_emulator {

// Owns global memory. Addresses are page-aligned. Memory from `allocate` is uninitialised until a kernel writes it;
// kernels must not write memory from `copy`. Reports use the names.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory();
  uint8_t* allocate(uint64_t bytes, const std::string& name = "allocated");
  uint8_t* copy(const void* values, uint64_t bytes, const std::string& name = "input");
  // For Mode::kCostOnly: an address range without contents.
  uint8_t* reserve(uint64_t bytes, const std::string& name = "reserved");

 private:
  uint8_t* add(uint64_t bytes, bool is_input, bool has_values, const std::string& name);
  std::map<const uint8_t*, uint64_t> mapped_;
};

// Runs `kernel` on `block_dim` AICs, each with two AIVs, until all have finished or none can continue.
Report Launch(uint32_t block_dim, const std::function<void()>& kernel, const Options& options = {});

// One of several launches that are under way at the same time.
struct StreamLaunch {
  uint32_t stream;  // launches of one stream run one after the other, in their order in the vector
  uint32_t block_dim;
  std::function<void()> kernel;
  // Scheduling mode 1: the kernel starts when there are free cores for all of its blocks. In mode 0 its blocks start
  // one by one as cores become free.
  bool is_batch = false;
};

// Runs all of them on a device with Options::device_cores cores (0: enough for all blocks). In mode 0, blocks of
// several streams get cores in turn, so that kernels whose cores wait for each other can deadlock.
Report LaunchOnStreams(const std::vector<StreamLaunch>& launches, const Options& options = {});

// Whether a kernel is declared __schedmode__(1).
bool is_batch_kernel(const void* kernel);

// The launches that `kernel<<<block_dim, l2ctrl, stream>>>(arguments...)` would make on several streams. A test
// replaces that syntax by `LaunchQueue::At(stream)->Launch(kernel, block_dim)(arguments...)`.
class LaunchQueue {
 public:
  // What a test passes as `stream`.
  struct Stream {
    LaunchQueue* queue;
    uint32_t index;
    template <typename... Parameters>
    auto Launch(void (*kernel)(Parameters...), uint32_t block_dim) const {
      return [this, kernel, block_dim](Parameters... arguments) {
        queue->launches_.push_back(
            {index, block_dim, [=] { kernel(arguments...); }, is_batch_kernel(reinterpret_cast<const void*>(kernel))});
      };
    }
  };
  static const Stream* At(void* stream) { return static_cast<const Stream*>(stream); }
  // Runs everything that has been launched.
  Report Synchronize(const Options& options = {});

 private:
  std::vector<StreamLaunch> launches_;
};

// The number of instructions that all launches of this process have issued so far.
uint64_t instructions_issued();

}  // namespace ascendc_emulator
