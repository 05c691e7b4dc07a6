#include "rule.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace manyheads {

std::string breaks_rule(const std::vector<float>& actual, const std::vector<double>& oracle,
                        const std::vector<std::vector<float>>& plain, double floor, double eps) {
  double error = 0, plain_error = 0, largest = 0;
  size_t worst = 0;
  for (size_t i = 0; i < oracle.size(); ++i) {
    const bool finite = std::isfinite(oracle[i]);
    if (std::isfinite(actual[i]) != finite)
      return "number " + std::to_string(i) + " is " + std::to_string(actual[i]) +
             " where the oracle has " + std::to_string(oracle[i]);
    if (!finite) continue;
    const double here = std::abs(double(actual[i]) - oracle[i]);
    if (here > error) worst = i;
    error = std::max(error, here);
    largest = std::max(largest, std::abs(oracle[i]));
    for (const std::vector<float>& one : plain) {
      const double distance = std::abs(double(one[i]) - oracle[i]);
      if (std::isfinite(distance)) plain_error = std::max(plain_error, distance);
    }
  }
  const double allowed = 2 * (plain_error + eps * largest) + floor;
  if (error <= allowed) return "";
  char text[200];
  std::snprintf(text, sizeof text,
                "number %zu: error %.3e is more than the allowed %.3e; plain attention's own: %.3e",
                worst, error, allowed, plain_error);
  return text;
}

}  // namespace manyheads
