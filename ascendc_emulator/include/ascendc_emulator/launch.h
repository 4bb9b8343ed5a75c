// SPDX-License-Identifier: Apache-2.0
// The host's side: global memory and kernel launches.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

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

// The number of instructions that all launches of this process have issued so far.
uint64_t instructions_issued();

}  // namespace ascendc_emulator
