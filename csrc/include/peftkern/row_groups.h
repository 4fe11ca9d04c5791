// Rows sorted by group, as those of a mixture's experts. Torch-free.
#pragma once

#include <cstdint>

namespace peftkern {

struct RowGroups {
  int64_t R = 0, E = 0, T = 0;       // sorted rows, groups, rows of the activation
  const int32_t* offsets = nullptr;  // [E]: where each group ends; rows past the last are nobody's
  const int32_t* rows = nullptr;     // [R]: rows of the activation; null: each its own, R = T
};

// Throws std::invalid_argument unless offsets ascend within [0, R] and rows are those of the
// activation. Returns the end of the last group.
int64_t validate(const RowGroups& groups);

}  // namespace peftkern
