// SPDX-License-Identifier: Apache-2.0
// Counts checks and prints those that fail.
#pragma once

#include <cstdio>
#include <string>

inline int checks = 0;
inline int failures = 0;

inline bool check(bool is_right, const std::string& what) {
  ++checks;
  if (!is_right) {
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
  }
  return is_right;
}

inline int finish(const char* name) {
  std::printf("%s: %d checks, %d failures\n", name, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}
