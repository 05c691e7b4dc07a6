// What masks mean, key by key.
#include "case.h"

namespace manyheads {

int64_t position_of(const Forward& call, int64_t b, int64_t row) {
  if (call.positions) return call.positions[b * call.positions_stride + row];
  return call.query_start.at(b) + row;
}

bool allows(const Forward& call, int64_t b, int64_t head, int64_t row, int64_t key) {
  const Mask& mask = call.mask;
  if (mask.kind == PlanKind::full) return true;
  if (mask.kind == PlanKind::dense) {
    const int64_t (&stride)[3] = mask.allowed_stride;
    return mask.allowed[b * stride[0] + head * stride[1] + row * stride[2] + key] != 0;
  }
  if (mask.kind == PlanKind::intervals) {
    const int64_t (&stride)[3] = mask.ranges_stride;
    const int32_t* range = mask.ranges + b * stride[0] + head * stride[1] + row * stride[2];
    for (int64_t r = 0; r < mask.num_ranges; ++r)
      if (range[2 * r] <= key && key < range[2 * r + 1]) return true;
    return false;
  }
  const int64_t position = position_of(call, b, row);
  const int64_t left = mask.left.at(b), right = mask.right.at(b), start = mask.key_start.at(b);
  const bool below_right = right == kUnbounded || key <= position + right;
  const bool above_left = left == kUnbounded || key >= position - left;
  const bool first = key < start + mask.first_n.at(b) && (below_right || !mask.first_within_right);
  return start <= key && key < mask.key_end.at(b) && ((below_right && above_left) || first);
}

}  // namespace manyheads
