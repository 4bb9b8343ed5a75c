// SPDX-License-Identifier: Apache-2.0
// Selects the active mutant: all of them are compiled into one program.
#pragma once

namespace mutation {

inline int active = 0;  // 0: none

inline bool is(int mutant) { return active == mutant; }

}  // namespace mutation
