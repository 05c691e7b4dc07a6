// What the table of an ISA with instructions for pairs of half-precision numbers points at, beside
// entry.h. Each of its `Units` (pairs.h) is for one type. Decoding has no use for them, since
// reading K and V is all of its time.
#pragma once

#include "entry.h"
#include "pairs.h"

namespace {

// Nor is a type used for a call that a backward pass will follow which has to widen: that one finds
// the same scores again only if they were widened here.
template <class Unit>
inline bool multiplies(const Forward& call) {
  using Half = typename Unit::Half;
  return call.type == Half::kType && !decodes(call) && (Half::kHasBackward || !call.row_max);
}

template <class... Units>
int64_t pair_scratch_bytes(const Forward& call) {
  int64_t bytes = 0;
  const bool found =
      ((multiplies<Units>(call) && (bytes = lay_out<Pairs<Units>>(call, nullptr).bytes)) || ...);
  return found ? bytes : scratch_bytes(call);
}

template <class... Units>
void pair_begin(const Forward& call, void* scratch) {
  const bool found =
      ((multiplies<Units>(call) && (forget_slots<Pairs<Units>>(call, scratch), true)) || ...);
  if (!found) begin(call, scratch);
}

template <class Unit>
void attend_item_with(const Forward& call, int64_t item, int64_t likely_next, void* scratch) {
  Unit::begin_item();
  attend_item<Pairs<Unit>>(call, item, likely_next, scratch);
  Unit::end_item();
}

template <class... Units>
void pair_forward(const Forward& call, int64_t item, int64_t likely_next, void* scratch,
                  void* shared) {
  const bool found = ((multiplies<Units>(call) &&
                       (attend_item_with<Units>(call, item, likely_next, scratch), true)) ||
                      ...);
  if (!found) forward(call, item, likely_next, scratch, shared);
}

}  // namespace
