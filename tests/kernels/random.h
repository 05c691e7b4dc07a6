// Random numbers that are the same on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace manyheads {

class Random {  // splitmix64: Steele, Lea and Flood 2014
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  int64_t integer(int64_t low, int64_t high) {  // both may come
    return low + int64_t(bits() % uint64_t(high - low + 1));
  }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }
  float normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return float(radius * std::cos(6.283185307179586 * uniform()));
  }
  template <class T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[integer(0, int64_t(choices.size()) - 1)];
  }

 private:
  uint64_t state_;
};

}  // namespace manyheads
