// Rows sorted by group: argument checks.
#include "peftkern/row_groups.h"

#include "peftkern/checks.h"

namespace peftkern {

int64_t validate(const RowGroups& groups) {
  require(groups.R >= 0 && groups.E >= 0 && groups.T >= 0, "R, E, T: expected at least 0");
  require(groups.E == 0 || groups.offsets, "offsets: null pointer");
  int64_t end = 0;
  for (int64_t e = 0; e < groups.E; ++e) {
    require(groups.offsets[e] >= end, "offsets: expected to ascend from 0");
    end = groups.offsets[e];
  }
  require(end <= groups.R, "offsets", end, groups.R, "rows at most");
  if (!groups.rows) {
    // No address may be that of an empty `rows`, too.
    require(groups.R == 0 || groups.R == groups.T, "x: rows", groups.T, groups.R,
            "sorted rows without `rows`");
    return end;
  }
  for (int64_t i = 0; i < end; ++i) {
    require(groups.rows[i] >= 0 && groups.rows[i] < groups.T, "rows", groups.rows[i], "a row of x");
  }
  return end;
}

}  // namespace peftkern
