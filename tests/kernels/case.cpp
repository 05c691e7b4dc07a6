#include "case.h"

#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

namespace manyheads {
namespace {

constexpr int64_t kMostProducts = 2'000'000;  // of one call: the plain loop computes them too

class Maker {
 public:
  explicit Maker(uint64_t seed) : random_(seed) { made_.name = "seed " + std::to_string(seed); }

  Case random() {
    draw_sizes();
    draw_tensors();
    draw_positions();
    draw_mask();
    draw_scores();
    draw_broken_rows();
    return std::move(made_);
  }

  Case long_keys() {
    call_.B = 1, call_.Hq = 2, call_.Hkv = 1, call_.Lq = 5, call_.Lk = 16384 + 131;
    call_.D = 3, call_.Dv = 5;
    note("long");
    draw_tensors();
    set_full();
    draw_scores();
    return std::move(made_);
  }

 private:
  void note(const std::string& feature) {
    made_.name += ", " + feature;
    made_.features.push_back(feature);
  }
  void note(const char* what, int64_t number) {
    made_.name += std::string(" ") + what + " " + std::to_string(number);
  }

  float* new_floats(int64_t size, float scale = 1) {
    Array<float>& array = made_.floats.emplace_back(size);
    for (float& x : array) x = random_.normal() * scale;
    return array.data();
  }
  template <class Draw>
  const int32_t* new_ints(int64_t size, Draw draw) {
    Array<int32_t>& array = made_.ints.emplace_back(size);
    for (int32_t& x : array) x = int32_t(draw());
    return array.data();
  }

  void draw_sizes() {
    const std::initializer_list<int64_t> widths = {1,  2,  3,  5,  7,  8,  13, 15, 16,
                                                   17, 29, 31, 32, 61, 64, 67, 131};
    do {
      call_.B = random_.integer(1, 3);
      call_.Hkv = random_.integer(1, 3);
      call_.Hq = call_.Hkv * random_.one_of<int64_t>({1, 1, 2, 3, 5});
      call_.Lq =
          random_.one_of<int64_t>({1, 1, 2, 3, 4, 5, 7, 13, 17, 37, 47, 48, 49, 67, 101, 199});
      call_.Lk =
          random_.one_of<int64_t>({1, 2, 3, 5, 29, 53, 127, 128, 129, 131, 211, 311, 577, 1031});
      call_.D = random_.one_of(widths);
      call_.Dv = random_.chance(0.3) ? call_.D : random_.one_of(widths);
    } while (call_.B * call_.Hq * call_.Lq * call_.Lk * (call_.D + call_.Dv) > kMostProducts);
    note("B", call_.B), note("Hq", call_.Hq), note("Hkv", call_.Hkv), note("Lq", call_.Lq);
    note("Lk", call_.Lk), note("D", call_.D), note("Dv", call_.Dv);
    if (call_.Hq > call_.Hkv) note("grouped");
    if (call_.Lq == 1) note("one query");
  }

  // Strides of a [B, H, L, width] tensor in one of the layouts that a caller may have; the number
  // of elements from the first to the last.
  int64_t draw_layout(int64_t heads, int64_t rows, int64_t width, bool may_repeat,
                      int64_t (&stride)[3]) {
    const int64_t padded = width + (random_.chance(0.25) ? random_.integer(1, 5) : 0);
    if (padded > width) note("padded rows");
    if (random_.chance(0.35)) {
      note("[B, L, H, D]");
      stride[0] = rows * heads * padded, stride[1] = padded, stride[2] = heads * padded;
    } else {
      stride[0] = heads * rows * padded, stride[1] = rows * padded, stride[2] = padded;
    }
    if (may_repeat && random_.chance(0.1)) {
      note("expanded");
      stride[random_.integer(0, 1)] = 0;
    }
    return (call_.B - 1) * stride[0] + (heads - 1) * stride[1] + (rows - 1) * stride[2] + width;
  }

  void draw_tensors() {
    const auto [B, Hq, Hkv] = std::tuple(call_.B, call_.Hq, call_.Hkv);
    call_.query = new_floats(draw_layout(Hq, call_.Lq, call_.D, true, call_.query_stride));
    call_.key = new_floats(draw_layout(Hkv, call_.Lk, call_.D, true, call_.key_stride));
    call_.value = new_floats(draw_layout(Hkv, call_.Lk, call_.Dv, true, call_.value_stride));
    call_.out = new_floats(draw_layout(Hq, call_.Lq, call_.Dv, false, call_.out_stride));
    if (random_.chance(0.5)) {
      note("lse");
      call_.lse = new_floats(B * Hq * call_.Lq);
    }
  }

  template <class Draw>
  PerBatch draw_number(Draw draw) {
    if (!random_.chance(0.25)) return {draw(), nullptr};
    note("per batch");
    return {0, new_ints(call_.B, draw)};
  }

  void draw_positions() {
    const int64_t bottom_right = call_.Lk - call_.Lq;
    const int64_t far = random_.one_of<int64_t>({kUnbounded, -kUnbounded});
    call_.query_start = draw_number([&] {
      if (random_.chance(0.05)) return far;
      return random_.one_of<int64_t>({0, bottom_right, bottom_right + 2, random_.integer(-40, 40)});
    });
    if (random_.chance(0.15)) {
      note("positions");
      const bool shared = random_.chance(0.5);
      call_.positions = new_ints((shared ? 1 : call_.B) * call_.Lq,
                                 [&] { return random_.integer(-7, call_.Lk + 7); });
      call_.positions_stride = shared ? 0 : call_.Lq;
    }
  }

  void set_full() {
    call_.mask.kind = PlanKind::full;
    call_.mask.left = call_.mask.right = call_.mask.key_end = {kUnbounded, nullptr};
  }

  void draw_mask() {
    set_full();
    switch (random_.integer(0, 5)) {
      case 0:
        note("full");
        break;
      case 1:
        draw_intervals();
        break;
      case 2:
        draw_allowed();
        break;
      default:
        draw_band();
    }
  }

  void draw_band() {
    Mask& mask = call_.mask;
    mask.kind = PlanKind::band;
    note("band");
    if (random_.chance(0.8)) {
      note("causal");
      mask.right =
          draw_number([&] { return random_.one_of<int64_t>({0, 0, 0, 3, 17, kUnbounded}); });
    }
    if (random_.chance(0.5)) {
      note("window");
      mask.left = draw_number([&] { return random_.one_of<int64_t>({0, 2, 31, 64, 150}); });
    }
    if (random_.chance(0.3)) {
      note("first keys");
      mask.first_n = draw_number([&] { return random_.integer(0, 40); });
      mask.first_within_right = random_.chance(0.5);
    }
    if (random_.chance(0.3)) {
      note("key range");
      mask.key_start = draw_number([&] { return random_.integer(0, call_.Lk / 2); });
      mask.key_end = draw_number([&] { return random_.integer(call_.Lk / 3, call_.Lk + 3); });
    }
  }

  void draw_intervals() {
    Mask& mask = call_.mask;
    mask.kind = PlanKind::intervals;
    mask.num_ranges = random_.integer(1, kMaxRanges);
    note("intervals");
    const bool per_batch = random_.chance(0.5), per_head = random_.chance(0.5);
    const int64_t row = mask.num_ranges * 2, head = call_.Lq * row;
    mask.ranges_stride[0] = per_batch ? (per_head ? call_.Hq : 1) * head : 0;
    mask.ranges_stride[1] = per_head ? head : 0;
    mask.ranges_stride[2] = row;
    const int64_t heads = (per_batch ? call_.B : 1) * (per_head ? call_.Hq : 1);
    mask.ranges = new_ints(heads * head, [&] { return random_.integer(-3, call_.Lk + 3); });
  }

  void draw_allowed() {
    Mask& mask = call_.mask;
    mask.kind = PlanKind::dense;
    note("dense mask");
    const bool per_batch = random_.chance(0.5), per_head = random_.chance(0.5);
    const int64_t head = call_.Lq * call_.Lk;
    mask.allowed_stride[0] = per_batch ? (per_head ? call_.Hq : 1) * head : 0;
    mask.allowed_stride[1] = per_head ? head : 0;
    mask.allowed_stride[2] = call_.Lk;
    const int64_t heads = (per_batch ? call_.B : 1) * (per_head ? call_.Hq : 1);
    Array<uint8_t>& allowed = made_.bytes.emplace_back(heads * head);
    const double density = random_.one_of({0.02, 0.5, 0.98, 1.0});
    // A byte of True may hold any bits.
    for (uint8_t& x : allowed)
      x = random_.chance(density) ? random_.one_of<uint8_t>({1, 1, 1, 2, 128, 255}) : uint8_t(0);
    mask.allowed = allowed.data();
  }

  void draw_scores() {
    call_.scale = float(random_.one_of({1.0, 0.3, -1.0, 3.0}) / std::sqrt(double(call_.D)));
    if (call_.scale < 0) note("negative scale");
    if (random_.chance(0.2)) {
      note("softcap");
      call_.softcap = float(random_.one_of({0.5, 3.0, 50.0}));
    }
    if (random_.chance(0.2)) {
      note("sinks");
      call_.sinks = new_floats(call_.Hq, 3);
    }
    Bias& bias = call_.bias;
    if (random_.chance(0.2)) {
      note("alibi");
      bias.slopes = new_floats(call_.Hq, 0.2f);
    }
    if (random_.chance(0.2)) {
      note("relative");
      bias.num_distances = random_.one_of<int64_t>({1, 2, 23, 64, 401});
      bias.distance_offset = random_.integer(-3, bias.num_distances + 3);
      bias.distance_values = new_floats(call_.Hq * bias.num_distances);
    }
    if (random_.chance(0.2)) draw_dense_bias();
  }

  void draw_dense_bias() {
    note("dense bias");
    const int64_t full[4] = {call_.B, call_.Hq, call_.Lq, call_.Lk};
    int64_t size = 1;
    for (int axis = 3; axis >= 0; --axis) {
      const bool broadcast = random_.chance(0.3);
      call_.bias.dense_stride[axis] = broadcast ? 0 : size;
      if (!broadcast) size *= full[axis];
    }
    float* dense = new_floats(size);
    call_.bias.dense = dense;
    if (!random_.chance(0.4)) return;
    note("-inf bias");
    for (int64_t i = 0; i < size; ++i)
      if (random_.chance(0.2)) dense[i] = -std::numeric_limits<float>::infinity();
  }

  // A key or value that is not finite must not reach rows that may not attend to it.
  void draw_broken_rows() {
    if (!random_.chance(0.2)) return;
    note("broken rows");
    const float infinity = std::numeric_limits<float>::infinity();
    const auto spoil = [&](const void* data, const int64_t (&stride)[3], int64_t width, float x) {
      const int64_t at = random_.integer(0, call_.B - 1) * stride[0] +
                         random_.integer(0, call_.Hkv - 1) * stride[1] +
                         random_.integer(0, call_.Lk - 1) * stride[2] +
                         random_.integer(0, width - 1);
      static_cast<float*>(const_cast<void*>(data))[at] = x;
    };
    if (random_.chance(0.5)) spoil(call_.key, call_.key_stride, call_.D, infinity - infinity);
    spoil(call_.value, call_.value_stride, call_.Dv,
          random_.one_of({infinity, -infinity, infinity - infinity}));
  }

  Random random_;
  Case made_;
  Forward& call_ = made_.call;
};

}  // namespace

Case random_case(uint64_t seed) { return Maker(seed).random(); }
Case long_case() { return Maker(1).long_keys(); }

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
