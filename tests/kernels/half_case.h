// A random call in a half type.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "case.h"
#include "memory.h"

namespace manyheads {

uint16_t narrowed(Type type, float x);
float widened(Type type, uint16_t half);

// The case in a half type: its numbers rounded to it, once as they are and once widened.
struct HalfCase {
  HalfCase(const Case& made, Type type);

  // What `half` left, in the order of Result::out.
  std::vector<float> results() const;

  Forward half, wide;
  const void *half_grad_out = nullptr, *wide_grad_out = nullptr;  // of a case with a backward pass
  std::vector<Array<uint16_t>> halves;
  std::vector<Array<float>> floats;

 private:
  void add(const Case& made, const void* data, const void*& half_data, const void*& wide_data);
};

// Kernels that multiply a half type as it is round weights to it; others widen, compute in float32
// and round once.
bool rounds_weights(const Kernels& kernels, Type type);

bool same_bits(const std::vector<float>& a, const std::vector<float>& b);
// Likewise, but one NaN and one zero are as good as another.
bool same_numbers(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace manyheads
