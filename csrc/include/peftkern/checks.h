// Refusing bad arguments. For baseline files only: what is included per instruction set must not
// use the standard library's inline functions.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace peftkern {
namespace {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline void require(bool ok, const char* field, int64_t got, const std::string& wanted) {
  if (!ok) fail(std::string(field) + ": got " + std::to_string(got) + ", expected " + wanted);
}

inline void require_aligned(const void* p, uintptr_t bytes, const char* name) {
  if (!p) fail(std::string(name) + ": null pointer");
  require(reinterpret_cast<uintptr_t>(p) % bytes == 0, name,
          static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % bytes),
          "an address that is a multiple of " + std::to_string(bytes));
}

}  // namespace
}  // namespace peftkern
