// Vectors of the widest registers, in which the products of single samples are added up.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common.h"

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 24;  // of accumulators
#else
constexpr int BYTES = 32, REGISTERS = 12;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef T loose __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));  // in memory, wherever it lies
  static constexpr int size = BYTES / sizeof(T);
};

template <typename T>
using vec = typename Vector<T>::type;

template <typename T>
inline vec<T> load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(from);
}

template <typename T>
inline void store(T* to, vec<T> value) {
  *reinterpret_cast<typename Vector<T>::loose*>(to) = value;
}

#if defined(__AVX512F__)
inline vec<float> fma(vec<float> a, vec<float> b, vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline vec<double> fma(vec<double> a, vec<double> b, vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
inline vec<float> fma(vec<float> a, vec<float> b, vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline vec<double> fma(vec<double> a, vec<double> b, vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <typename V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

inline int64_t rounded_up(int64_t number, int64_t to) { return pieces(number, to) * to; }

}  // namespace
