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

}  // namespace
}  // namespace peftkern
