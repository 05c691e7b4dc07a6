#include "half_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

namespace manyheads {
namespace {

#ifdef __aarch64__
using Float16 = __fp16;  // GCC 12 has no _Float16 in C++ there
#else
using Float16 = _Float16;
#endif

}  // namespace

uint16_t narrowed(Type type, float x) {
  uint16_t half;
  if (type == Type::float16) {
    const auto nearest = static_cast<Float16>(x);
    std::memcpy(&half, &nearest, sizeof half);
    return half;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float widened(Type type, uint16_t half) {
  if (type == Type::float16) {
    Float16 x;
    std::memcpy(&x, &half, sizeof half);
    return static_cast<float>(x);
  }
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

HalfCase::HalfCase(const Case& made, Type type) : half(made.call), wide(made.call) {
  half.type = type;
  half.lse = wide.lse = nullptr;
  for (const void* Forward::* tensor : {&Forward::query, &Forward::key, &Forward::value})
    add(made, made.call.*tensor, half.*tensor, wide.*tensor);
  if (made.back.grad_out) add(made, made.back.grad_out, half_grad_out, wide_grad_out);
  const int64_t size = owner_of(made, made.call.out).size();
  half.out = halves.emplace_back(size).data();
  wide.out = floats.emplace_back(size).data();
  for (int64_t i = 0; i < size; ++i) {
    floats.back()[i] = 1;  // where nothing is written, both stay 1
    halves.back()[i] = narrowed(type, 1);
  }
}

void HalfCase::add(const Case& made, const void* data, const void*& half_data,
                   const void*& wide_data) {
  const Array<float>& numbers = owner_of(made, data);
  Array<uint16_t>& narrow = halves.emplace_back(numbers.size());
  Array<float>& again = floats.emplace_back(numbers.size());
  for (int64_t i = 0; i < numbers.size(); ++i) {
    narrow[i] = narrowed(half.type, numbers[i]);
    again[i] = widened(half.type, narrow[i]);
  }
  half_data = narrow.data();
  wide_data = again.data();
}

std::vector<float> HalfCase::results() const {
  std::vector<float> all;
  for (int64_t i = 0; i < half.B * half.Hq * half.Lq; ++i) {
    const uint16_t* const row =
        static_cast<const uint16_t*>(half.out) + i / (half.Hq * half.Lq) * half.out_stride[0] +
        i / half.Lq % half.Hq * half.out_stride[1] + i % half.Lq * half.out_stride[2];
    for (int64_t d = 0; d < half.Dv; ++d) all.push_back(widened(half.type, row[d]));
  }
  return all;
}

bool rounds_weights(const Kernels& kernels, Type type) {
  const std::string name = kernels.name;
  if (type == Type::float16) return name == "amx_fp16";
  return name == "amx_fp16" || name == "amx" || name == "avx512_bf16";
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](float x, float y) { return std::memcmp(&x, &y, sizeof x) == 0; });
}

bool same_numbers(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](float x, float y) { return x == y || (std::isnan(x) && std::isnan(y)); });
}

}  // namespace manyheads
