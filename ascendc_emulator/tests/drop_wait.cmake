# SPDX-License-Identifier: Apache-2.0
# Copies INPUT to OUTPUT without the line that waits for MTE2.
file(READ ${INPUT} text)
string(REPLACE "    WaitFlag<HardEvent::MTE2_V>(0);\n" "" changed "${text}")
if(changed STREQUAL text)
  message(FATAL_ERROR "${INPUT} has no WaitFlag<HardEvent::MTE2_V>(0)")
endif()
file(WRITE ${OUTPUT} "${changed}")
