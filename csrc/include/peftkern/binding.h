// What both modules read of Python's arguments, for bind.cpp alone: nothing else sees pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "peftkern/nf4.h"

namespace peftkern {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (format, numel, blocksize, nested, nested_blocksize, packed, packed_bytes, absmax, absmax_len,
//  nested_absmax, nested_absmax_len, nested_code, nested_offset): peftkern/backends/pointers.py
// makes it. nested_offset is an address, the caller's to read.
constexpr size_t kNestedOffset = 12;
template <class View>
View view_from_tuple(const pybind11::tuple& t) {
  if (t.size() != 13) throw std::invalid_argument("w: expected 13 fields");
  if (t[0].cast<int64_t>() != 0) throw std::invalid_argument("w: the format is not NF4");
  View w;
  w.numel = t[1].cast<int64_t>();
  w.blocksize = t[2].cast<int64_t>();
  w.nested = t[3].cast<int64_t>() != 0;
  w.nested_blocksize = t[4].cast<int64_t>();
  w.packed = pointer<const uint8_t>(t[5].cast<uintptr_t>());
  w.packed_bytes = t[6].cast<int64_t>();
  w.absmax = pointer<const void>(t[7].cast<uintptr_t>());
  w.absmax_len = t[8].cast<int64_t>();
  w.nested_absmax = pointer<const float>(t[9].cast<uintptr_t>());
  w.nested_absmax_len = t[10].cast<int64_t>();
  w.nested_code = pointer<const float>(t[11].cast<uintptr_t>());
  return w;
}

}  // namespace
}  // namespace peftkern
