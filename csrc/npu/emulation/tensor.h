// SPDX-License-Identifier: Apache-2.0
// Tensors, buffers and the pipe object that hands buffers out.
#pragma once

#include <type_traits>

#include "machine.h"
#include "parameters.h"

namespace emulation {

template <typename T>
inline constexpr bool kIsInt4 = std::is_same_v<T, AscendC::int4b_t>;
// Elements of 32 bytes, and bytes of elements.
template <typename T>
inline constexpr uint32_t kBlockElements = kIsInt4<T> ? 64 : 32 / sizeof(T);
template <typename T>
constexpr uint64_t bytes_of(uint64_t elements) {
  return kIsInt4<T> ? elements / 2 : elements * sizeof(T);
}

constexpr Memory memory_of(AscendC::TPosition position) {
  switch (position) {
    case AscendC::TPosition::A1:
    case AscendC::TPosition::B1:
    case AscendC::TPosition::C1:
      return Memory::kL1;
    case AscendC::TPosition::A2:
      return Memory::kL0a;
    case AscendC::TPosition::B2:
      return Memory::kL0b;
    case AscendC::TPosition::CO1:
      return Memory::kL0c;
    default:
      return Memory::kUb;
  }
}

// Bytes [begin, end) of an on-chip memory.
struct Place {
  Memory memory = Memory::kUb;
  uint64_t begin = 0;
  uint64_t end = 0;
};

}  // namespace emulation

namespace AscendC {

using emulation::Location;

template <typename T>
class LocalTensor {
 public:
  using PrimType = T;
  LocalTensor() = default;
  explicit LocalTensor(const emulation::Place& place) : place_(place) {}

  LocalTensor operator[](uint32_t offset) const {
    return LocalTensor({place_.memory, place_.begin + emulation::bytes_of<T>(offset), place_.end});
  }
  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(place_);
  }
  uint32_t GetSize() const {
    return static_cast<uint32_t>((place_.end - place_.begin) / emulation::bytes_of<T>(2) * 2);
  }

  T GetValue(uint32_t index, Location at = Location::current()) const {
    emulation::Instruction read(emulation::Pipe::kS, "GetValue", at);
    T value;
    const uint64_t from = place_.begin + emulation::bytes_of<T>(index);
    std::memcpy(&value, read.Read(place_.memory, from, sizeof(T), place_.end), sizeof(T));
    return value;
  }
  void SetValue(uint32_t index, T value, Location at = Location::current()) const {
    emulation::Instruction write(emulation::Pipe::kS, "SetValue", at);
    const uint64_t to = place_.begin + emulation::bytes_of<T>(index);
    std::memcpy(write.Write(place_.memory, to, sizeof(T), place_.end), &value, sizeof(T));
  }

  const emulation::Place& place() const { return place_; }

 private:
  emulation::Place place_;
};

template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;
  void SetGlobalBuffer(__gm__ T* buffer) { data_ = buffer; }
  void SetGlobalBuffer(__gm__ T* buffer, uint64_t) { data_ = buffer; }
  GlobalTensor operator[](uint64_t offset) const {
    GlobalTensor tensor;
    tensor.data_ = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(data_) + emulation::bytes_of<T>(offset));
    return tensor;
  }
  // Scalar accesses go through the scalar unit's data cache, which nothing keeps coherent: reads of inputs only.
  T GetValue(uint64_t index, Location at = Location::current()) const {
    emulation::Instruction read(emulation::Pipe::kS, "GetValue", at);
    T value;
    std::memcpy(&value, read.ReadGlobal((*this)[index].data_, sizeof(T)), sizeof(T));
    return value;
  }
  void SetL2CacheHint(CacheMode) {}
  const T* GetPhyAddr() const { return data_; }
  uint8_t* address() const { return reinterpret_cast<uint8_t*>(data_); }

 private:
  T* data_ = nullptr;
};

template <TPosition kPosition = TPosition::VECCALC>
class TBuf {
 public:
  template <typename T>
  LocalTensor<T> Get() const {
    return LocalTensor<T>(place_);
  }
  template <typename T>
  LocalTensor<T> Get(uint32_t elements) const {
    return LocalTensor<T>({place_.memory, place_.begin, place_.begin + emulation::bytes_of<T>(elements)});
  }

 private:
  friend class TPipe;
  emulation::Place place_;
};

// On an AIC the public header's TPipe sets the flags M_MTE1 0, 1 and 2 when it is made and waits for them when it goes:
// a kernel must use others.
class TPipe {
 public:
  explicit TPipe(Location at = Location::current());
  ~TPipe();
  TPipe(const TPipe&) = delete;

  template <TPosition kPosition>
  bool InitBuffer(TBuf<kPosition>& buffer, uint32_t bytes, Location at = Location::current()) {
    constexpr emulation::Memory kMemory = emulation::memory_of(kPosition);
    const uint32_t begin = emulation::Machine::current().Allocate(kMemory, bytes, at);
    buffer.place_ = {kMemory, begin, uint64_t{begin} + bytes};
    return true;
  }

 private:
  Location at_;
};

}  // namespace AscendC
