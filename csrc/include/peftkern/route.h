// Pairs of token and expert, sorted by expert: a stable counting sort. Torch-free.
//
// Two passes over the ids, on one thread: 16,384 pairs are 128 KB of them.
#pragma once

#include "peftkern/base.h"

namespace peftkern {

struct RouteArgs {
  int64_t T = 0, top = 0, E = 0;
  const void* index = nullptr;  // [T, top] of int64, or of int32
  bool wide = true;
  const void* weights = nullptr;  // [T, top], or null
  int64_t itemsize = 4;           // of a weight: 1, 2, 4 or 8 bytes, which are copied
  int32_t* rows = nullptr;        // [T * top]: the token of each sorted pair
  int32_t* offsets = nullptr;     // [E]: the ends of the experts' pairs; ids from E on come last
  int64_t* inverse = nullptr;     // [T, top]: the place of each pair
  void* row_weights = nullptr;    // [T * top]: the weights in the order of rows
};
// Returns the smallest id if it is below 0, where nothing is written, else 0.
int64_t route(const RouteArgs& args);

}  // namespace peftkern
