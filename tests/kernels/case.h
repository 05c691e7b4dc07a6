// One random call of the forward kernel, with everything it points to.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "random.h"

namespace manyheads {

struct Case {
  std::string name;                   // what is in it, and the seed that makes it again
  std::vector<std::string> features;  // each of those that a call may have or not
  Forward call{};
  std::vector<Array<float>> floats;
  std::vector<Array<int32_t>> ints;
  std::vector<Array<uint8_t>> bytes;
};

// A call that many features have been drawn for. The same seed makes the same call.
Case random_case(uint64_t seed);

// More keys than fit one level of sums (kernel/tile.h: kSpan), which no random case has.
Case long_case();

// Whether the call's mask lets `row` of `head` attend to `key`: the meanings of manyheads/spec.py.
bool allows(const Forward& call, int64_t b, int64_t head, int64_t row, int64_t key);

// The position of a query row among the keys.
int64_t position_of(const Forward& call, int64_t b, int64_t row);

}  // namespace manyheads
