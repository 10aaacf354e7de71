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

// `from` moved towards `to` by the share `weight`, rounded as by `torch.lerp`.
template <typename T>
T lerp(T from, T to, T weight) {
  return weight < T(0.5) ? std::fma(weight, to - from, from) : std::fma(weight - T(1), to - from, to);
}

// The numbers of an update, in the order in which `step.py` passes them.
template <typename T>
struct Settings {
  T new_curvature, new_gradient, mass, averaged_prior, prior, prior_mean, shift, lr, max_update;
  bool order_updated;

  explicit Settings(const double* given)
      : new_curvature(T(given[0])),
        new_gradient(T(given[1])),
        mass(T(given[2])),
        averaged_prior(T(given[3])),
        prior(T(given[4])),
        prior_mean(T(given[5])),
        shift(T(given[6])),
        lr(T(given[7])),
        max_update(T(given[8])),
        order_updated(given[9] != 0) {}
};

// Lines 6 and 7, see `VOGN`. Comparisons are such that a NaN stays one.
template <bool MOMENTUM, bool CLIP, typename T>
void update(const Settings<T> of, const T* __restrict mean, const T* __restrict curvature, const T* __restrict momentum,
            const T* __restrict gradient, const T* __restrict second_moment, T* __restrict new_mean,
            T* __restrict new_curvature, T* __restrict new_momentum, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const T updated = lerp(curvature[i], second_moment[i], of.new_curvature);
    new_curvature[i] = updated;
    const T from_prior = mean[i] - of.prior_mean;
    T numerator = std::fma(from_prior, of.averaged_prior, gradient[i]);
    if (MOMENTUM) {
      const T average = lerp(momentum[i], numerator, of.new_gradient);
      new_momentum[i] = average;
      numerator = average / of.mass;
    }
    numerator = std::fma(from_prior, of.prior, numerator);
    const T divisor = (of.order_updated ? updated : curvature[i]) + of.shift;
    if (CLIP) {
      T change = numerator / divisor;
      change = change > of.max_update ? of.max_update : change;
      change = change < -of.max_update ? -of.max_update : change;
      new_mean[i] = std::fma(change, -of.lr, mean[i]);
    } else {
      new_mean[i] = mean[i] + (-of.lr * numerator) / divisor;
    }
  }
}

template <bool MOMENTUM, bool CLIP, typename T>
void update_all(const double* settings, const T* const* mean, const T* const* curvature, const T* const* momentum,
                const T* const* gradient, const T* const* second_moment, T* const* new_mean, T* const* new_curvature,
                T* const* new_momentum, const int64_t* sizes, int64_t count, int threads) {
  const Settings<T> of(settings);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t tensor = 0; tensor < count; ++tensor) {
#pragma omp for nowait schedule(static)
    for (int64_t piece = 0; piece < pieces(sizes[tensor], PIECE); ++piece) {
      const int64_t begin = piece * PIECE;
      update<MOMENTUM, CLIP>(of, mean[tensor] + begin, curvature[tensor] + begin,
                             MOMENTUM ? momentum[tensor] + begin : nullptr, gradient[tensor] + begin,
                             second_moment[tensor] + begin, new_mean[tensor] + begin, new_curvature[tensor] + begin,
                             MOMENTUM ? new_momentum[tensor] + begin : nullptr,
                             std::min(PIECE, sizes[tensor] - begin));
    }
  }
}

// Chooses the loop without branches. A limit that is infinite is none.
template <typename T, typename... Rest>
void update_any(const double* settings, const T* const* mean, const T* const* curvature, const T* const* momentum,
                Rest... rest) {
  const bool clip = settings[8] < HUGE_VAL;
  if (momentum != nullptr) {
    (clip ? update_all<true, true, T> : update_all<true, false, T>)(settings, mean, curvature, momentum, rest...);
  } else {
    (clip ? update_all<false, true, T> : update_all<false, false, T>)(settings, mean, curvature, momentum, rest...);
  }
}

// Whether no entry is infinite or a NaN: x - x is 0 for all others.
template <typename T>
bool all_finite(const T* const* tensors, const int64_t* sizes, int64_t count) {
  for (int64_t tensor = 0; tensor < count; ++tensor) {
    int bad = 0;
    for (int64_t i = 0; i < sizes[tensor]; ++i) {
      const T x = tensors[tensor][i];
      bad |= !(x - x == T(0));
    }
    if (bad) return false;
  }
  return true;
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

PERSAMPLE_EXPORT void persample_update_float(const double* settings, const float* const* mean,
                                           const float* const* curvature, const float* const* momentum,
                                           const float* const* gradient, const float* const* second_moment,
                                           float* const* new_mean, float* const* new_curvature,
                                           float* const* new_momentum, const int64_t* sizes, int64_t count,
                                           int threads) {
  update_any(settings, mean, curvature, momentum, gradient, second_moment, new_mean, new_curvature, new_momentum, sizes,
             count, threads);
}

PERSAMPLE_EXPORT void persample_update_double(const double* settings, const double* const* mean,
                                           const double* const* curvature, const double* const* momentum,
                                           const double* const* gradient, const double* const* second_moment,
                                           double* const* new_mean, double* const* new_curvature,
                                           double* const* new_momentum, const int64_t* sizes, int64_t count,
                                           int threads) {
  update_any(settings, mean, curvature, momentum, gradient, second_moment, new_mean, new_curvature, new_momentum, sizes,
             count, threads);
}

PERSAMPLE_EXPORT void persample_all_finite_float(const float* const* tensors, const int64_t* sizes, int64_t count,
                                               int* result) {
  *result = all_finite(tensors, sizes, count);
}

PERSAMPLE_EXPORT void persample_all_finite_double(const double* const* tensors, const int64_t* sizes, int64_t count,
                                               int* result) {
  *result = all_finite(tensors, sizes, count);
}
