// SPDX-License-Identifier: Apache-2.0
// What a kernel asks of the core that it runs on, other than instructions: flags, barriers, buffers and its number.
#pragma once

#include <cstdint>

#include "../options.h"
#include "../report.h"
#include "location.h"
#include "memory.h"

namespace ascendc_emulator {

inline constexpr uint32_t kVectorCoresPerBlock = 2;

bool is_cube_core();
uint32_t block_count();
uint32_t block_index();
uint32_t sub_block_index();  // of an AIV in its block

// Options of the launch.
int division_ulps();
FixpipeRounding fixpipe_rounding();

// Flags between two pipes of a core: each pair of pipes, an `event`, has flags with the ids 0 to 7.
void set_flag(uint32_t event, Pipe from, int id, const Location& at);
void wait_flag(uint32_t event, Pipe to, int id, const Location& at);
void pipe_barrier(Pipe pipe, const Location& at);
void pipe_barrier_all();

// Flags between cores, with the ids 0 to 15. Mode 0: all cores of one kind; 1: the AIVs of a block; 2: from the AIC of
// a block to its AIVs, or from these to the AIC.
void cross_core_set_flag(uint32_t mode, Pipe pipe, uint32_t id, const Location& at);
void cross_core_wait_flag(uint32_t id, const Location& at);
void sync_all(bool vectors_only, const Location& at);

// Where the buffer begins.
uint32_t allocate(Memory memory, uint32_t bytes, const Location& at);

}  // namespace ascendc_emulator
