#include "check_product.h"

#include <cstdint>
#include <vector>

#include "check_queue.h"
#include "half_case.h"
#include "memory.h"
#include "plain.h"
#include "queue.h"
#include "rule.h"
#include "run_forward.h"

namespace manyheads {
namespace {

// A product and its numbers: as floats, and in memory of its type that ends where they end.
struct Product {
  RowProduct call{};
  std::vector<Array<char>> memory;
  std::vector<float> weight, x, bias;  // bias: zeros where there is none

  Product(Type type, int64_t rows, int64_t width, bool biased, Random& random) {
    call.type = type;
    call.rows = rows;
    call.width = width;
    call.weight = draw(weight, rows * width, random);
    call.x = draw(x, width, random);
    if (biased)
      call.bias = draw(bias, rows, random);
    else
      bias.assign(size_t(rows), 0);
    call.out = memory.emplace_back(rows * size_of(type), size_of(type)).data();
  }

  std::vector<float> results() const {
    std::vector<float> found;
    for (int64_t i = 0; i < call.rows; ++i) found.push_back(number(call.out, i));
    return found;
  }
  void wipe_results() { wipe(call.out, call.rows * size_of(call.type)); }

 private:
  float number(const void* data, int64_t i) const {
    return call.type == Type::float32 ? static_cast<const float*>(data)[i]
                                      : widened(call.type, static_cast<const uint16_t*>(data)[i]);
  }
  const void* draw(std::vector<float>& numbers, int64_t size, Random& random) {
    char* const data = memory.emplace_back(size * size_of(call.type), size_of(call.type)).data();
    for (int64_t i = 0; i < size; ++i) {
      const float x = random.normal();
      if (call.type == Type::float32)
        reinterpret_cast<float*>(data)[i] = x;
      else
        reinterpret_cast<uint16_t*>(data)[i] = narrowed(call.type, x);
      numbers.push_back(number(data, i));
    }
    return data;
  }
};

template <class T>
std::vector<T> plain_product(const Product& made, Order order) {
  const RowProduct& call = made.call;
  std::vector<T> found;
  for (int64_t row = 0; row < call.rows; ++row) {
    T sum = 0;
    for (int64_t i = 0; i < call.width; ++i) {
      const int64_t at = nth(order, i, call.width);
      sum += T(made.weight[size_t(row * call.width + at)]) * T(made.x[size_t(at)]);
    }
    found.push_back(sum + T(made.bias[size_t(row)]));
  }
  return found;
}

void run_in_random_order(const Kernels& kernels, const RowProduct& call, Random& random) {
  const Array<float> x(call.width);
  kernels.widen_x(call, x.data());
  for (const int64_t item : shuffled(kernels.num_product_items(call), random))
    kernels.multiply_rows(call, item, x.data());
}

void run_on_threads(const Kernels& kernels, const RowProduct& call, int64_t threads) {
  const auto begin = [&](void* scratch) { kernels.widen_x(call, static_cast<float*>(scratch)); };
  const auto work = [&](int64_t item, int64_t, void* scratch, void*) {
    kernels.multiply_rows(call, item, static_cast<const float*>(scratch));
  };
  run_queue(
      kernels.num_product_items(call), {call.width * int64_t(sizeof(float)), 0}, threads,
      [](void*) {}, begin, work, PlainThreads{});
}

}  // namespace

std::string check_product(const Kernels& kernels, Random& random) {
  // Around the lanes, the numbers taken at once (64) and the rows of an item (64).
  const int64_t width = random.chance(0.5) ? random.integer(1, 150) : random.integer(1, 9) * 64;
  const int64_t rows = random.chance(0.5) ? random.integer(1, 40) : random.integer(50, 300);
  const bool biased = random.chance(0.5);
  for (const Type type : {Type::float32, Type::bfloat16, Type::float16}) {
    Product made(type, rows, width, biased, random);
    const std::string name = "type " + std::to_string(int(type)) + ", " + std::to_string(rows) +
                             "x" + std::to_string(width) + ": ";
    std::vector<std::vector<float>> plain;
    for (const Order order : {Order::ascending, Order::descending, Order::odd_first})
      plain.push_back(plain_product<float>(made, order));
    made.wipe_results();
    run_in_random_order(kernels, made.call, random);
    const std::vector<float> found = made.results();
    const double eps = type == Type::float32 ? 0x1p-23 : type == Type::bfloat16 ? 0x1p-7 : 0x1p-10;
    const std::string wrong =
        breaks_rule(found, plain_product<double>(made, Order::ascending), plain, 0, eps);
    if (!wrong.empty()) return name + wrong;
    made.wipe_results();
    run_on_threads(kernels, made.call, random.integer(1, 4));
    if (!same_bits(made.results(), found)) return name + "other bits on threads";
  }
  return "";
}

}  // namespace manyheads
