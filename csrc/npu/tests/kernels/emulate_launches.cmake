# SPDX-License-Identifier: Apache-2.0
# Copies INPUT to OUTPUT with the launches of a device build as launches of the emulator, which g++ can parse; if
# WITHOUT_MODE is set, without the scheduling mode of the kernels.
file(READ ${INPUT} text)
string(REGEX REPLACE "([A-Za-z_]+)<<<([a-z]+), nullptr, ([a-z]+)>>>"
  "ascendc_emulator::LaunchQueue::At(\\3)->Launch(\\1, \\2)" changed "${text}")
if(changed STREQUAL text)
  message(FATAL_ERROR "${INPUT} launches nothing by <<<cores, nullptr, stream>>>")
endif()
if(WITHOUT_MODE)
  string(REPLACE "__schedmode__(1)" "" unscheduled "${changed}")
  if(unscheduled STREQUAL changed)
    message(FATAL_ERROR "${INPUT} has no __schedmode__(1)")
  endif()
  set(changed "${unscheduled}")
endif()
file(WRITE ${OUTPUT} "#include \"ascendc_emulator/launch.h\"\n${changed}")
