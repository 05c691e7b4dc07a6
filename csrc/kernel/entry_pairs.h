// What the table of an ISA with instructions for pairs of bfloat16 points at, beside entry.h: those
// are for bfloat16 only, and decoding has no use for them, since reading K and V is all of its
// time.
#pragma once

#include "entry.h"
#include "pairs.h"

namespace {

inline bool uses_pairs(const Forward& call) {
  return call.type == Type::bfloat16 && !decodes(call);
}

template <class Unit>
int64_t pair_scratch_bytes(const Forward& call) {
  return uses_pairs(call) ? lay_out<Pairs<Unit>>(call, nullptr).bytes : scratch_bytes(call);
}

template <class Unit>
void pair_begin(const Forward& call, void* scratch) {
  uses_pairs(call) ? forget_slots<Pairs<Unit>>(call, scratch) : begin(call, scratch);
}

template <class Unit>
void pair_forward(const Forward& call, int64_t item, int64_t likely_next, void* scratch,
                  void* shared) {
  if (!uses_pairs(call)) return forward(call, item, likely_next, scratch, shared);
  Unit::begin_item();
  attend_item<Pairs<Unit>>(call, item, likely_next, scratch);
  Unit::end_item();
}

}  // namespace
