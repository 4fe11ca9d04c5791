// Parsing of Python's arguments in both modules, for bind.cpp alone: nothing else sees pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include "peftkern/checks.h"
#include "peftkern/nf4.h"

namespace peftkern {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Reads a tuple of `count` numbers front to back.
class Fields {
 public:
  Fields(const pybind11::tuple& tuple, const char* name, size_t count) : tuple_(tuple.ptr()) {
    require(tuple.size() == count, name, static_cast<int64_t>(tuple.size()),
            static_cast<int64_t>(count), "fields");
  }
  int64_t size() { return checked(PyLong_AsLongLong(next())); }
  float real() { return static_cast<float>(checked(PyFloat_AsDouble(next()))); }
  DType dtype() { return dtype_from_code(static_cast<int>(size())); }
  template <class T>
  T* address() {
    return pointer<T>(static_cast<uintptr_t>(size()));
  }

 private:
  PyObject* next() { return PyTuple_GET_ITEM(tuple_, index_++); }
  template <class T>
  static T checked(T value) {
    if (value == T(-1) && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }

  PyObject* tuple_;
  Py_ssize_t index_ = 0;
};

// A quantized weight as peftkern/backends/pointers.py describes it: its format, then what that
// format needs. Addresses are of the memory that the kernels run on: a CPU's or a device's.
inline NF4View view_of(const pybind11::tuple& weight) {
  Fields fields(weight, "w", 13);
  const int64_t format = fields.size();
  require(format >= 0 && format < kFormatCount, "w: format", format, "0 to 4");
  NF4View w;
  w.format = static_cast<Format>(format);
  w.numel = fields.size();
  w.blocksize = fields.size();
  w.nested = fields.size() != 0;
  w.nested_blocksize = fields.size();
  w.packed = fields.address<const uint8_t>();
  w.packed_bytes = fields.size();
  w.absmax = fields.address<const void>();
  w.absmax_len = fields.size();
  const float* aux = fields.address<const float>();
  const int64_t aux_len = fields.size();
  if (format <= static_cast<int64_t>(Format::kFP4)) {
    w.nested_absmax = aux, w.nested_absmax_len = aux_len;
  } else {
    (w.format == Format::kINT4 ? w.zero : w.tensor_scale) = aux, w.aux_len = aux_len;
  }
  w.nested_code = fields.address<const float>();
  w.nested_offset = fields.address<const float>();
  return w;
}

}  // namespace
}  // namespace peftkern
