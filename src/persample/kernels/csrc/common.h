// What all kernels share. They are plain functions of pointers and sizes: no header of PyTorch or Python, no exception,
// no memory that outlives a call.

#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#define PERSAMPLE_EXPORT extern "C" __attribute__((visibility("default")))

// Returns how many pieces of `piece` entries, the last one shorter, cover `size` entries.
inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Made inside a parallel region: the number of the thread, and how many there are.
struct Team {
#ifdef _OPENMP
  int number = omp_get_thread_num(), size = omp_get_num_threads();
#else
  int number = 0, size = 1;
#endif
};
