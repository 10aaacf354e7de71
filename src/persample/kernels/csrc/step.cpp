// The optimizer's step, in one pass over memory each: draws of the weights, and the update of the posterior.
//
// The tensors of a model come as arrays of pointers. Pieces of PIECE entries are computed by one thread each, and begin
// at multiples of PIECE whatever the number of threads, so that the same instructions serve each entry.

#include <algorithm>
#include <cmath>

#include "common.h"

namespace {

constexpr int64_t PIECE = 4096;

// w = μ + ε / sqrt(precision)
template <typename T>
void draw(T* __restrict weights, const T* __restrict mean, const T* __restrict precision, const T* __restrict noise,
          int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    weights[i] = std::fma(T(1) / std::sqrt(precision[i]), noise[i], mean[i]);
  }
}

template <typename T>
void draw_all(T* const* weights, const T* const* mean, const T* const* precision, const T* const* noise,
              const int64_t* sizes, int64_t count, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t tensor = 0; tensor < count; ++tensor) {
#pragma omp for nowait schedule(static)
    for (int64_t piece = 0; piece < pieces(sizes[tensor], PIECE); ++piece) {
      const int64_t begin = piece * PIECE;
      draw(weights[tensor] + begin, mean[tensor] + begin, precision[tensor] + begin, noise[tensor] + begin,
           std::min(PIECE, sizes[tensor] - begin));
    }
  }
}

}  // namespace

PERSAMPLE_EXPORT void persample_draw_float(float* const* weights, const float* const* mean,
                                           const float* const* precision, const float* const* noise,
                                           const int64_t* sizes, int64_t count, int threads) {
  draw_all(weights, mean, precision, noise, sizes, count, threads);
}

PERSAMPLE_EXPORT void persample_draw_double(double* const* weights, const double* const* mean,
                                            const double* const* precision, const double* const* noise,
                                            const int64_t* sizes, int64_t count, int threads) {
  draw_all(weights, mean, precision, noise, sizes, count, threads);
}
