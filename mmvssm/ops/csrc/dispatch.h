// What the operators have in common outside their kernels: the choice of instruction set, threads.

#pragma once

#include <atomic>
#include <exception>
#include <new>

#include "dtypes.h"

namespace {

// Binaries move between machines, so the machine's best is chosen when running.
enum InstructionSet : int { kBaseline, kAvx2, kAvx512 };

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

InstructionSet instruction_set = best_instruction_set();

InstructionSet limit_instruction_set(int limit) {
  const InstructionSet best = best_instruction_set();
  return instruction_set = limit < best ? (InstructionSet)limit : best;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Notes that function(i) threw, as it does where memory runs out: an exception that leaves a thread ends the process.
template <class Function>
void note_failure(std::atomic<bool>& failed, const Function& function, int64_t i) noexcept {
  try {
    function(i);
  } catch (...) {
    failed = true;
  }
}

template <class Function>
void parallel_for(int64_t count, int64_t threads, const Function& function) {
  if (threads > count) threads = count;
  std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) note_failure(failed, function, i);
  if (failed) throw std::bad_alloc();
}

// For callers that know no exceptions: returns what `function` does, or `out_of_memory`.
template <class Function>
int status_or(int out_of_memory, const Function& function) {
  try {
    return function();
  } catch (const std::exception&) {
    return out_of_memory;
  }
}

}  // namespace
