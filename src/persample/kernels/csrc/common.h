// What all kernels share. They are plain functions of pointers and sizes: no header of PyTorch or Python, no exception,
// no memory that outlives a call.

#pragma once

#include <cstdint>

#define PERSAMPLE_EXPORT extern "C" __attribute__((visibility("default")))

// Returns how many pieces of `piece` entries, the last one shorter, cover `size` entries.
inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
