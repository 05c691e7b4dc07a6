// One random call of the kernels, with everything it points to.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "random.h"

namespace manyheads {

// What a call can be differentiated by, in the order of the operator's results.
enum Gradient : int {
  kGradQuery,
  kGradKey,
  kGradValue,
  kGradSinks,
  kGradSlopes,
  kGradDistanceValues,
  kGradDense,
  kGradients
};

// What the backward pass of a call is given, and asked for.
struct Training {
  const float* grad_out = nullptr;  // [B, Hq, Lq, Dv]; null: the case has no backward pass
  const float* grad_lse = nullptr;  // [B, Hq, Lq] or null
  int64_t grad_out_stride[3]{};
  bool wanted[kGradients]{};
  int64_t size[kGradients]{};  // elements of each from its first to its last
  int64_t stride[3][3]{};      // of dQ, dK and dV, over b, h, row
  int64_t dense_stride[4]{};   // over b, h, row, key; 0 where broadcast
};

struct Case {
  std::string name;                   // what is in it, and the seed that makes it again
  std::vector<std::string> features;  // each of those that a call may have or not
  Forward call{};
  Training back;
  std::vector<Array<float>> floats;
  std::vector<Array<int32_t>> ints;
  std::vector<Array<uint8_t>> bytes;
};

// A call that many features have been drawn for. The same seed makes the same call.
Case random_case(uint64_t seed);

// The same for a call that is differentiated, with fewer products.
Case random_training_case(uint64_t seed);

// More keys than fit one level of sums (kernel/tile.h: kSpan), which no random case has.
Case long_case();

// More keys, or more queries, than the backward pass sums at once.
std::vector<Case> long_training_cases();

// The array of the case that `data` is the beginning of.
const Array<float>& owner_of(const Case& made, const void* data);

// Whether the call's mask lets `row` of `head` attend to `key`: the meanings of manyheads/spec.py.
bool allows(const Forward& call, int64_t b, int64_t head, int64_t row, int64_t key);

// The position of a query row among the keys.
int64_t position_of(const Forward& call, int64_t b, int64_t row);

}  // namespace manyheads
