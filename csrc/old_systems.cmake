# SPDX-License-Identifier: Apache-2.0
# A library that a new compiler built for an old Linux, as wheels must be (`make wheels`; vLLM's are manylinux_2_28).

# w4a4_run_on_old_systems(target): no symbol of the shared library is newer than glibc 2.28 and GCC 8's libstdc++.
function(w4a4_run_on_old_systems target)
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
    return()
  endif()
  target_sources(${target} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/old_systems.cpp)
  # Conversions of half precision come from the static half of GCC's runtime. The unwinder stays shared: exceptions cross
  # into torch.
  target_link_libraries(${target} PRIVATE -l:libgcc.a)
  # torch finds everything through what the library registers when it is loaded.
  set(exports ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/no_exports.map)
  target_link_options(${target} PRIVATE -Wl,--version-script=${exports})
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${exports})
endfunction()
