// Argument checks that throw std::invalid_argument. For baseline files only: what is included per
// instruction set must not use the standard library's inline functions.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace peftkern {
namespace {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline void require(bool ok, const char* message) {
  if (!ok) fail(message);
}
inline void require(bool ok, const char* field, int64_t got, const char* wanted) {
  if (!ok) fail(std::string(field) + ": got " + std::to_string(got) + ", expected " + wanted);
}
// `wanted` is a number and `unit` what it counts: no string is built unless the check fails.
inline void require(bool ok, const char* field, int64_t got, int64_t wanted, const char* unit) {
  if (!ok) require(ok, field, got, (std::to_string(wanted) + " " + unit).c_str());
}

inline void require_aligned(const void* p, uintptr_t bytes, const char* name) {
  if (!p) fail(std::string(name) + ": null pointer");
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % bytes);
  if (past == 0) return;
  require(false, name, past, ("an address that is a multiple of " + std::to_string(bytes)).c_str());
}

}  // namespace
}  // namespace peftkern
