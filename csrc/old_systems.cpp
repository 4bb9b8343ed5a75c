// SPDX-License-Identifier: Apache-2.0
// What a library for an old Linux takes from itself instead of from the C and C++ libraries (old_systems.cmake).
#include <sstream>

// Newer versions of libstdc++ have newer names for the constructors of these and for str().
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// glibc 2.32 and later tell libstdc++'s reference counts here whether the process has one thread only. "No" is always a
// correct answer.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
