# SPDX-License-Identifier: Apache-2.0
# A stand-in for CANN's CMake package ASC: the language, and what the package does to the build's flags.
list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR})
set(CMAKE_CXX_FLAGS_RELEASE "" CACHE STRING "emptied, as CANN does" FORCE)
