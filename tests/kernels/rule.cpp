#include "rule.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace manyheads {

std::string breaks_rule(const std::vector<float>& actual, const std::vector<double>& oracle,
                        const std::vector<float>& plain, int64_t heads, int64_t size,
                        double floor) {
  struct Head {
    double error = 0, plain_error = 0, largest = 0;
  };
  std::vector<Head> each(static_cast<size_t>(heads));
  for (size_t i = 0; i < oracle.size(); ++i) {
    const bool finite = std::isfinite(oracle[i]);
    if (std::isfinite(actual[i]) != finite)
      return "element " + std::to_string(i) + " is " + std::to_string(actual[i]) +
             " where the oracle has " + std::to_string(oracle[i]);
    if (!finite) continue;
    Head& head = each[i / size_t(size) % size_t(heads)];
    const double plain_error = std::abs(double(plain[i]) - oracle[i]);
    head.error = std::max(head.error, std::abs(double(actual[i]) - oracle[i]));
    if (std::isfinite(plain_error)) head.plain_error = std::max(head.plain_error, plain_error);
    head.largest = std::max(head.largest, std::abs(oracle[i]));
  }
  for (int64_t h = 0; h < heads; ++h) {
    const Head& head = each[size_t(h)];
    const double eps = std::numeric_limits<float>::epsilon();
    const double allowed = 2 * (head.plain_error + eps * head.largest) + floor;
    if (head.error <= allowed) continue;
    char text[200];
    std::snprintf(text, sizeof text,
                  "head %d: error %.3e is more than the allowed %.3e; plain float32's own: %.3e",
                  int(h), head.error, allowed, head.plain_error);
    return text;
  }
  return "";
}

}  // namespace manyheads
