// Tests of the kernels alone: no torch, no Python, so that sanitizers and emulators can watch.
//
//   check_kernels [cases [first seed]]
//
// runs `cases` random calls, on every instruction set that this machine has, and says what broke. A
// new kernel gets a check_*.cpp of its own and a line in check_case.
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "attention.h"
#include "case.h"
#include "check_backward.h"
#include "check_forward.h"
#include "check_product.h"
#include "check_queue.h"
#include "check_statistics.h"
#include "check_vec.h"

namespace manyheads {
namespace {

int passed = 0, failed = 0;
std::string subject;  // what is being checked

void expect(bool fine, const char* what) {
  ++(fine ? passed : failed);
  if (fine) return;
  std::printf("FAILED %s: %s\n", subject.c_str(), what);
  std::fflush(stdout);
}

// Names what was being checked when a sanitizer or the machine stopped the program.
void name_subject() {
  for (const std::string& text : {std::string("STOPPED in "), subject, std::string("\n")})
    if (write(STDOUT_FILENO, text.data(), text.size()) < 0) return;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
void name_subject_when_stopped() { __sanitizer_set_death_callback(name_subject); }
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }
#else
void name_subject_when_stopped() {
  for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
    std::signal(number, [](int stopped) {
      name_subject();
      std::signal(stopped, SIG_DFL);
      std::raise(stopped);
    });
}
#endif

std::vector<const Kernels*> kernels_here() {
  std::vector<const Kernels*> found;
  std::istringstream names(detected_isas());
  for (std::string name; names >> name;) found.push_back(kernels_named(name.c_str()));
  return found;
}

void check_vectors(const std::string& isa) {
  subject = "vectors of " + isa;
#define X(name) \
  if (isa == #name) return check_vec_##name(expect);
  MANYHEADS_VECS
#undef X
}

void check_queues() {
  for (const int64_t threads : {1, 2, 3, 7}) {
    for (const int64_t items : {1, 2, 5, 64, 97, 1009}) {
      subject = "queue of " + std::to_string(items) + " for " + std::to_string(threads);
      const std::string wrong = check_queue(items, threads);
      expect(wrong.empty(), wrong.c_str());
    }
  }
}

void check_case(const std::vector<const Kernels*>& all, const Case& made, uint64_t seed) {
  const Expected expected = expect_of(made);
  const ExpectedMeasures measures = expect_measures_of(made);
  for (const Kernels* kernels : all) {
    subject = std::string(kernels->name) + ", " + made.name;
    Random random(seed);
    const std::string wrong = check_forward(*kernels, made, expected, random);
    expect(wrong.empty(), wrong.c_str());
    subject = std::string(kernels->name) + ", statistics, " + made.name;
    const std::string unlike = check_statistics(*kernels, made, measures, random);
    expect(unlike.empty(), unlike.c_str());
    subject = std::string(kernels->name) + ", product of seed " + std::to_string(seed);
    const std::string untrue = check_product(*kernels, random);
    expect(untrue.empty(), untrue.c_str());
  }
}

void check_training_case(const std::vector<const Kernels*>& all, const Case& made, uint64_t seed) {
  const ExpectedGradients expected = expect_gradients_of(made);
  for (const Kernels* kernels : all) {
    subject = std::string(kernels->name) + ", backward, " + made.name;
    Random random(seed);
    const std::string wrong = check_backward(*kernels, made, expected, random);
    expect(wrong.empty(), wrong.c_str());
  }
}

// A feature that no case has is not tested, whatever the count of cases says.
using Seen = std::map<std::string, int>;
void check_coverage(const Seen& seen, const Seen& seen_backward) {
  const char* const every[] = {
      "full",         "band",      "intervals",  "dense mask",  "causal",      "window",
      "first keys",   "key range", "per batch",  "positions",   "grouped",     "one query",
      "[B, L, H, D]", "expanded",  "lse",        "softcap",     "sinks",       "alibi",
      "relative",     "-inf bias", "dense bias", "padded rows", "broken rows", "negative scale",
      "long",         "dropout"};
  const char* const backward[] = {"dQ",
                                  "dK",
                                  "dV",
                                  "d sinks",
                                  "d slopes",
                                  "d distances",
                                  "d bias",
                                  "grad of lse",
                                  "heads share a bias",
                                  "batches share a bias",
                                  "bias by key",
                                  "bias by row"};
  subject = "coverage";
  for (const char* feature : every) {
    expect(seen.count(feature) > 0, feature);
    expect(seen_backward.count(feature) > 0, feature);
  }
  for (const char* feature : backward) expect(seen_backward.count(feature) > 0, feature);
}

int run(int64_t cases, uint64_t first) {
  name_subject_when_stopped();
  const std::vector<const Kernels*> all = kernels_here();
  std::printf("instruction sets: %s\n", detected_isas());
  std::fflush(stdout);
  for (const Kernels* kernels : all) {
    check_vectors(kernels->name);
    subject = std::string("peak of ") + kernels->name;
    expect(kernels->multiply_add(100) != 0 && kernels->flops_per_step > 0, "multiply_add");
    const bool pairs = kernels->multiply_pairs != nullptr;
    expect(pairs == (kernels->pair_flops_per_step > 0) && (!pairs || kernels->multiply_pairs(100)),
           "multiply_pairs");
  }
  check_queues();
  Seen seen, seen_backward;
  for (int64_t i = 0; i <= cases; ++i) {
    const uint64_t seed = first + uint64_t(i);
    const Case made = i < cases ? random_case(seed) : long_case();
    for (const std::string& feature : made.features) ++seen[feature];
    check_case(all, made, seed);
  }
  const auto check_training = [&](const Case& made, uint64_t seed) {
    for (const std::string& feature : made.features) ++seen_backward[feature];
    check_training_case(all, made, seed);
  };
  for (const Case& made : long_training_cases()) check_training(made, first);
  for (uint64_t seed = first; seed < first + uint64_t(cases); ++seed)
    check_training(random_training_case(seed), seed);
  if (cases >= 100) check_coverage(seen, seen_backward);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace manyheads

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 400;
  const uint64_t first = argc > 2 ? uint64_t(std::atoll(argv[2])) : 0;
  return manyheads::run(cases, first);
}
