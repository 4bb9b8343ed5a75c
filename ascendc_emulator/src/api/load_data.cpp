// SPDX-License-Identifier: Apache-2.0
// L1 -> L0A, L0B.
#include <cstring>

#include "fractal.h"

namespace ascendc_emulator {

void load_2d(const Region& target, const Region& source, const AscendC::LoadData2DParams& p, ElementType type,
             const Location& at) {
  Instruction load(Pipe::kMte1, "LoadData", at);
  load.Check(source.memory == Memory::kL1 && (target.memory == Memory::kL0a || target.memory == Memory::kL0b),
             Detector::kParameter, "L1 -> L0A or L0B only");
  load.Check(!p.ifTranspose || size_of(type) == 2, Detector::kParameter, "ifTranspose takes 16-bit types only");
  load.Check(p.addrMode == 0, Detector::kParameter, "addrMode must be 0");
  load.Check(target.begin % kFractalBytes == 0, Detector::kAlignment, "the target must be 512-byte aligned");
  load.Check(source.begin % 32 == 0, Detector::kAlignment, "the source must be 32-byte aligned");
  const uint32_t repeats = p.repeatTimes;
  const uint64_t source_stride = uint64_t{p.srcStride} * kFractalBytes,
                 target_stride = (uint64_t{p.dstGap} + 1) * kFractalBytes;
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    const uint64_t from = source.begin + uint64_t{p.startIndex} * kFractalBytes + repeat * source_stride;
    const uint64_t to = target.begin + repeat * target_stride;
    const uint8_t* values = load.Read(source.memory, from, kFractalBytes, source.end, false);
    uint8_t* written = load.Write(target.memory, to, kFractalBytes, target.end, false);
    const uint8_t* valid_from = load.Validity(source.memory, from, kFractalBytes);
    uint8_t* valid_to = load.Validity(target.memory, to, kFractalBytes);
    if (!load.is_full() || !valid_from || !valid_to) continue;
    if (!p.ifTranspose) {
      std::memcpy(written, values, kFractalBytes);
      std::memcpy(valid_to, valid_from, kFractalBytes);
      continue;
    }
    for (uint32_t i = 0; i < 16; ++i) {
      for (uint32_t j = 0; j < 16; ++j) {
        std::memcpy(written + (j * 16 + i) * 2, values + (i * 16 + j) * 2, 2);
        std::memcpy(valid_to + (j * 16 + i) * 2, valid_from + (i * 16 + j) * 2, 2);
      }
    }
  }
  load.Transfer(target.memory == Memory::kL0a ? Path::kL1ToL0a : Path::kL1ToL0b, uint64_t{repeats} * kFractalBytes);
}

}  // namespace ascendc_emulator
