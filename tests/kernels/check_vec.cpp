// Compiled once per instruction set, with MANYHEADS_VEC_HEADER and MANYHEADS_CHECK_VEC set: the
// same rule as for the kernels holds, so nothing of the standard library is used here.
#include "check_vec.h"

#include <cstdint>

#include "memory.h"

#include MANYHEADS_VEC_HEADER

namespace {

using manyheads::Expect;
using manyheads::give_back;
using manyheads::take_exactly;

constexpr int W = Vec::kLanes;
constexpr float kInfinity = __builtin_inff(), kNan = __builtin_nanf("");

uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The same number, NaN being one; 0 and -0 being two.
bool same(float a, float b) { return a != a ? b != b : float_bits(a) == float_bits(b); }

template <class Each>
bool all_lanes(Vec x, Each expected) {
  float lanes[W];
  store(lanes, x);
  bool fine = true;
  for (int i = 0; i < W; ++i) fine &= same(lanes[i], expected(i));
  return fine;
}

template <class Each>
bool all_lanes(Lanes x, Each expected) {
  return all_lanes(select(x, set(1), set(0)), [&](int i) { return expected(i) ? 1.0f : 0.0f; });
}

// Lanes of each(i), from memory that ends where they do.
template <class Each>
Vec made(Each each) {
  float* const data = static_cast<float*>(take_exactly(W * sizeof(float), alignof(float)));
  for (int i = 0; i < W; ++i) data[i] = each(i);
  const Vec x = load(data);
  give_back(data, W * sizeof(float));
  return x;
}

template <class Each>
VecI made_int(Each each) {
  int32_t* const data = static_cast<int32_t*>(take_exactly(W * sizeof(int32_t), alignof(int32_t)));
  for (int i = 0; i < W; ++i) data[i] = each(i);
  const VecI x = load_int(data);
  give_back(data, W * sizeof(int32_t));
  return x;
}

float odd(int i) { return float(i % 2); }
float counted(int i) { return float(i) - 2.5f; }

void check_memory(Expect expect) {
  expect(all_lanes(zero(), [](int) { return 0.0f; }), "zero");
  expect(all_lanes(set(-3), [](int) { return -3.0f; }), "set");
  expect(all_lanes(made(counted), counted), "load");
  for (int n = 1; n <= W; ++n) {
    const size_t bytes = size_t(n) * sizeof(float);
    float* const data = static_cast<float*>(take_exactly(bytes, alignof(float)));
    for (int i = 0; i < n; ++i) data[i] = counted(i);
    const Vec some = load_some(data, n);
    expect(all_lanes(some, [&](int i) { return i < n ? counted(i) : 0.0f; }), "load_some");
    store_some(data, set(7), n);
    bool stored = true;
    for (int i = 0; i < n; ++i) stored &= data[i] == 7;
    expect(stored, "store_some stores the first lanes");
    give_back(data, bytes);

    float whole[W + 1];
    for (float& x : whole) x = -1;
    store_some(whole, set(7), n);
    expect(whole[n] == -1, "store_some stores no more");
  }
  for (int n = 1; n <= W + 2; ++n) {
    uint8_t* const data = static_cast<uint8_t*>(take_exactly(size_t(n), 1));
    for (int i = 0; i < n; ++i) data[i] = uint8_t(255 - i);
    const auto byte = [&](int i) { return i < n ? float(255 - i) : 0.0f; };
    expect(all_lanes(load_bytes(data, n), byte), "load_bytes");
    give_back(data, size_t(n));
  }
}

void check_arithmetic(Expect expect) {
  const Vec a = made(counted), b = made([](int i) { return 3.0f - 2 * float(i % 3); });
  const auto rest = [](int i) { return 3.0f - 2 * float(i % 3); };
  expect(all_lanes(a + b, [&](int i) { return counted(i) + rest(i); }), "+");
  expect(all_lanes(a - b, [&](int i) { return counted(i) - rest(i); }), "-");
  expect(all_lanes(a * b, [&](int i) { return counted(i) * rest(i); }), "*");
  expect(all_lanes(a / b, [&](int i) { return counted(i) / rest(i); }), "/");
  expect(all_lanes(fma(a, b, set(10)), [&](int i) { return counted(i) * rest(i) + 10; }), "fma");
  // (1 + e)(1 - e) - 1 = -e^2, which a product rounded by itself would lose.
  const Vec one_rounding = fma(set(1 + 0x1p-13f), set(1 - 0x1p-13f), set(-1));
  expect(all_lanes(one_rounding, [](int) { return -0x1p-26f; }), "fma rounds once");
  const auto larger = [&](int i) { return counted(i) > rest(i) ? counted(i) : rest(i); };
  expect(all_lanes(max(a, b), larger), "max");
  expect(all_lanes(max(a, set(kNan)), [](int) { return kNan; }), "max(x, NaN) is NaN");
  expect(all_lanes(max(set(kNan), a), counted), "max(NaN, x) is x");
  expect(all_lanes(abs(a), [](int i) { return __builtin_fabsf(counted(i)); }), "abs");
  expect(all_lanes(abs(set(-0.0f)), [](int) { return 0.0f; }), "abs(-0)");
}

void check_lanes(Expect expect) {
  const Vec a = made(odd), mixed = made([](int i) { return i % 2 ? kNan : -0.0f; });
  const auto is_odd = [](int i) { return i % 2 == 1; };
  const auto is_even = [](int i) { return i % 2 == 0; };
  const Lanes odds = equal(a, set(1)), none = equal(a, set(2)), every = less(a, set(2));
  expect(all_lanes(odds, is_odd), "equal");
  expect(all_lanes(less(a, set(1)), is_even), "less");
  expect(all_lanes(less(mixed, set(1)), is_even), "less of NaN");
  expect(all_lanes(equal(mixed, mixed), is_even), "equal of NaN");
  expect(all_lanes(is_nan(mixed), is_odd), "is_nan");
  expect(all_lanes(has_sign(made([](int i) { return i % 2 ? -0.0f : 0.0f; })), is_odd),
         "has_sign of zeros");
  expect(all_lanes(has_sign(made([](int i) { return i % 2 ? -kNan : kNan; })), is_odd),
         "has_sign of NaN");
  expect(all_lanes(both(odds, every), is_odd) && all_lanes(both(odds, none), [](int) { return 0; }),
         "both");
  expect(all_lanes(either(odds, none), is_odd) &&
             all_lanes(either(odds, every), [](int) { return 1; }),
         "either");
  expect(any(odds) && any(every) && !any(none), "any");
  expect(all(every) && !all(odds) && !all(none), "all");
  expect(bits(every) == (1u << W) - 1 && bits(none) == 0, "bits");
  for (int lane = 0; lane < W; ++lane) {
    const Lanes one = equal(made([&](int i) { return i == lane ? 1.0f : 0.0f; }), set(1));
    expect(any(one) && !all(one), "any and all of one lane");
    expect(bits(one) == 1u << lane, "bits of one lane");
  }
  expect(all_lanes(select(odds, set(5), mixed), [](int i) { return i % 2 ? 5 : -0.0f; }), "select");
}

void check_integers(Expect expect) {
  const auto number = [](int i) { return int32_t(100 * (i % 3) - 70 - i); };
  const VecI a = made_int(number), b = set_int(-5);
  const auto expected = [&](auto each) { return [=](int i) { return float(each(number(i))); }; };
  expect(all_lanes(to_float(a), expected([](int32_t x) { return x; })), "to_float");
  int32_t stored[W];
  store_int(stored, a);
  expect(all_lanes(to_float(load_int(stored)), expected([](int32_t x) { return x; })), "store_int");
  const Lanes odds = equal(made(odd), set(1));
  expect(
      all_lanes(to_float(select(odds, a, b)), [&](int i) { return float(i % 2 ? number(i) : -5); }),
      "select of integers");
  expect(all_lanes(to_float(a + b), expected([](int32_t x) { return x - 5; })), "integer +");
  expect(all_lanes(to_float(a - b), expected([](int32_t x) { return x + 5; })), "integer -");
  expect(all_lanes(to_float(min(a, b)), expected([](int32_t x) { return x < -5 ? x : -5; })),
         "integer min");
  expect(all_lanes(to_float(max(a, b)), expected([](int32_t x) { return x > -5 ? x : -5; })),
         "integer max");
  const VecI count = made_int([](int i) { return i; });
  expect(all_lanes(within(set_int(1), count, set_int(W - 1)),
                   [](int i) { return 1 <= i && i < W - 1; }),
         "within");
  expect(all_lanes(within(set_int(-(1 << 29)), count, set_int(1 << 29)), [](int) { return true; }),
         "within far bounds");
  const auto halves = [](int i) { return int32_t(0x80000000u + 0x01010003u * unsigned(i)); };
  const VecI h = made_int(halves);
  expect(
      all_lanes(to_float(low_half(h)), [&](int i) { return float(uint32_t(halves(i)) & 0xffff); }),
      "low_half");
  expect(all_lanes(to_float(high_half(h)), [&](int i) { return float(uint32_t(halves(i)) >> 16); }),
         "high_half");
  expect(all_lanes(to_float(h ^ made_int([&](int i) { return halves(i) ^ i; })),
                   [](int i) { return float(i); }),
         "^");
  const uint32_t factor = 0xd2511f53u;
  VecI high, low;
  multiply_wide(h, factor, high, low);
  const auto product = [&](int i) { return uint64_t(uint32_t(halves(i))) * factor; };
  expect(all_lanes(to_float(high ^ made_int([&](int i) { return int32_t(product(i) >> 32); })),
                   [](int) { return 0.0f; }),
         "multiply_wide's high half");
  expect(all_lanes(to_float(low ^ made_int([&](int i) { return int32_t(uint32_t(product(i))); })),
                   [](int) { return 0.0f; }),
         "multiply_wide's low half");
  float table[3 * W];
  for (int i = 0; i < 3 * W; ++i) table[i] = counted(i);
  const auto index = [](int i) { return (i * 7 + 3) % (2 * W) - W; };
  expect(
      all_lanes(gather(table + W, made_int(index)), [&](int i) { return counted(W + index(i)); }),
      "gather");
}

void check_exp2(Expect expect) {
  expect(all_lanes(exp2(set(0)), [](int) { return 1.0f; }), "exp2(0) is 1");
  expect(all_lanes(exp2(set(-0.0f)), [](int) { return 1.0f; }), "exp2(-0) is 1");
  expect(all_lanes(exp2(set(kNan)), [](int) { return kNan; }), "exp2(NaN) is NaN");
  expect(all_lanes(exp2(set(-kNan)), [](int) { return kNan; }), "exp2(-NaN) is NaN");
  expect(all_lanes(exp2(set(-kInfinity)), [](int) { return 0.0f; }), "exp2(-inf) is 0");
  expect(all_lanes(exp2(set(-__FLT_MAX__)), [](int) { return 0.0f; }), "exp2(-max) is 0");
  const float below = __builtin_nextafterf(kNothing, -kInfinity);
  expect(all_lanes(exp2(set(below)), [](int) { return 0.0f; }), "exp2 below kNothing is 0");
  expect(all_lanes(exp2(set(kNothing)), [](int) { return __builtin_ldexpf(1, int(kNothing)); }),
         "exp2(kNothing)");
  const Vec mixed = exp2(made([](int i) { return i % 2 ? kNan : -kInfinity; }));
  expect(all_lanes(mixed, [](int i) { return i % 2 ? kNan : 0.0f; }), "exp2 lane by lane");
  bool fine = true;
  for (float x = kNothing; x < 1; x += 0.00731f * W) {
    float lanes[W];
    const auto at = [&](int i) { return x + 0.00731f * float(i); };
    store(lanes, exp2(made(at)));
    for (int i = 0; i < W; ++i) {
      const double exact = __builtin_exp2(double(at(i)));
      fine &= __builtin_fabs(double(lanes[i]) - exact) <= double(__FLT_EPSILON__) * exact;
    }
  }
  expect(fine, "exp2 within one part in 2^23");
}

void check_half_types(Expect expect) {
  // 1, the smallest step above it, a subnormal, inf: bits and what they mean.
  const uint16_t bfloat16[] = {0x3f80, 0x3f81, 0x8001, 0x7f80};
  const float as_bfloat16[] = {1, 1 + 0x1p-7f, -0x1p-133f, kInfinity};
  const uint16_t float16[] = {0x3c00, 0x3c01, 0x8001, 0x7c00};
  const float as_float16[] = {1, 1 + 0x1p-10f, -0x1p-24f, kInfinity};
  uint16_t* const data = static_cast<uint16_t*>(take_exactly(W * sizeof(uint16_t), 2));
  const auto holds = [&](const uint16_t* bits) {
    bool fine = true;
    for (int i = 0; i < W; ++i) fine &= data[i] == bits[i % 4];
    return fine;
  };
  for (int i = 0; i < W; ++i) data[i] = bfloat16[i % 4];
  expect(all_lanes(load_bfloat16(data), [&](int i) { return as_bfloat16[i % 4]; }),
         "load_bfloat16");
  uint16_t two[2 * W];
  for (int i = 0; i < 2 * W; ++i) two[i] = uint16_t(0x3f80 + i);
  Vec first, second;
  load_two_bfloat16(two, first, second);
  const auto counted = [](int i) { return 1 + float(i) * 0x1p-7f; };
  expect(all_lanes(first, counted) && all_lanes(second, [&](int i) { return counted(W + i); }),
         "load_two_bfloat16");
  for (int i = 0; i < W; ++i) data[i] = float16[i % 4];
  expect(all_lanes(load_float16(data), [&](int i) { return as_float16[i % 4]; }), "load_float16");
  store_bfloat16(data, made([&](int i) { return as_bfloat16[i % 4]; }));
  expect(holds(bfloat16), "store_bfloat16");
  store_float16(data, made([&](int i) { return as_float16[i % 4]; }));
  expect(holds(float16), "store_float16");
  // Half way goes to the even neighbour, too large becomes inf, NaN stays NaN.
  const uint16_t bfloat16_rounded[] = {0x3f80, 0x3f82, 0x7f80, 0x3f81};
  const float to_bfloat16[] = {1 + 0x1p-8f, 1 + 3 * 0x1p-8f, __FLT_MAX__, 1 + 0x1.002p-8f};
  store_bfloat16(data, made([&](int i) { return to_bfloat16[i % 4]; }));
  expect(holds(bfloat16_rounded), "store_bfloat16 rounds to even");
  const uint16_t float16_rounded[] = {0x3c00, 0x3c02, 0x7c00, 0x0001};
  const float to_float16[] = {1 + 0x1p-11f, 1 + 3 * 0x1p-11f, 65520, 0x1.8p-25f};
  store_float16(data, made([&](int i) { return to_float16[i % 4]; }));
  expect(holds(float16_rounded), "store_float16 rounds to even");
  store_bfloat16(data, set(kNan));
  expect((data[0] & 0x7fff) > 0x7f80, "store_bfloat16 of NaN");
  store_float16(data, set(kNan));
  expect((data[0] & 0x7fff) > 0x7c00, "store_float16 of NaN");
  give_back(data, W * sizeof(uint16_t));

  for (int n = 0; n < W; ++n) {  // into memory that ends there
    const size_t bytes = size_t(n) * sizeof(uint16_t);
    uint16_t* const some = static_cast<uint16_t*>(take_exactly(bytes, 2));
    for (int i = 0; i < n; ++i) some[i] = bfloat16[i % 4];
    expect(all_lanes(load_some_bfloat16(some, n),
                     [&](int i) { return i < n ? as_bfloat16[i % 4] : 0; }),
           "load_some_bfloat16");
    for (int i = 0; i < n; ++i) some[i] = float16[i % 4];
    expect(
        all_lanes(load_some_float16(some, n), [&](int i) { return i < n ? as_float16[i % 4] : 0; }),
        "load_some_float16");
    give_back(some, bytes);
  }
}

void check_across_lanes(Expect expect) {
  const auto count = [](int i) { return float(7 + i); };
  expect(all_lanes(to_float(count_up(7)), count), "count_up");
  const float sum = 7 * W + W * (W - 1) / 2;
  expect(sum_of_lanes(made(count)) == sum, "sum_of_lanes");
  for (int lane = 0; lane < W; ++lane) {
    const Vec x = made([&](int i) { return i == lane ? -2.0f : -3.0f - float(i); });
    expect(largest_lane(x) == -2, "largest_lane");
  }
  expect(largest_lane(set(-kInfinity)) == -kInfinity, "largest_lane of -inf");
  Vec rows[W];
  for (int i = 0; i < W; ++i) rows[i] = made([&](int j) { return float(i * 100 + j * j); });
  const auto row_sum = [](int i) { return float(i * 100 * W + (W - 1) * W * (2 * W - 1) / 6); };
  expect(all_lanes(sum_lanes(rows), row_sum), "sum_lanes");
}

void check_transpose(Expect expect) {
  Vec rows[W];
  for (int i = 0; i < W; ++i) rows[i] = made([&](int j) { return float(i * 100 + j); });
  transpose(rows);
  bool fine = true;
  for (int i = 0; i < W; ++i) fine &= all_lanes(rows[i], [&](int j) { return float(j * 100 + i); });
  expect(fine, "transpose");
}

}  // namespace

void manyheads::MANYHEADS_CHECK_VEC(Expect expect) {
  check_memory(expect);
  check_arithmetic(expect);
  check_lanes(expect);
  check_integers(expect);
  check_exp2(expect);
  check_transpose(expect);
  check_half_types(expect);
  check_across_lanes(expect);
}
