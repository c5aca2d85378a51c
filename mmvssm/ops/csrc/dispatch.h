// What the operators have in common outside their kernels: the choice of instruction set, threads.

#pragma once

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

template <class Function>
void parallel_for(int64_t count, int64_t threads, const Function& function) {
  if (threads > count) threads = count;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) function(i);
}

}  // namespace
