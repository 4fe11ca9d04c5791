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

// (packed, packed_bytes, absmax, absmax_len, nested, nested_absmax, nested_absmax_len, nested_code,
//  nested_offset, blocksize, nested_blocksize, numel): nested_offset is the caller's to read, for
// it is a float or its address.
constexpr size_t kNestedOffset = 8;
template <class View>
View view_from_tuple(const pybind11::tuple& t) {
  if (t.size() != 12) throw std::invalid_argument("w: expected 12 fields");
  View w;
  w.packed = pointer<const uint8_t>(t[0].cast<uintptr_t>());
  w.packed_bytes = t[1].cast<int64_t>();
  w.absmax = pointer<const void>(t[2].cast<uintptr_t>());
  w.absmax_len = t[3].cast<int64_t>();
  w.nested = t[4].cast<bool>();
  w.nested_absmax = pointer<const float>(t[5].cast<uintptr_t>());
  w.nested_absmax_len = t[6].cast<int64_t>();
  w.nested_code = pointer<const float>(t[7].cast<uintptr_t>());
  w.blocksize = t[9].cast<int64_t>();
  w.nested_blocksize = t[10].cast<int64_t>();
  w.numel = t[11].cast<int64_t>();
  return w;
}

}  // namespace
}  // namespace peftkern
