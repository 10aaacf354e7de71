// Sums of outer products g_i = δ_i a_iᵀ and of their squares δ_i² (a_i²)ᵀ over the samples: linear layers on one position.
//
// A tile of both sums stays in registers over the samples, so that one sweep gives them both. Rows of δ and columns of a
// are copied so that a tile finds them, and their squares, side by side. Each entry is added up by one thread, sample
// after sample, so that results do not depend on the number of threads.

#include <algorithm>
#include <cstdlib>

#include "vector.h"

namespace {

constexpr int ROWS = REGISTERS / 4;  // of a tile, which is two vectors wide, and has two sums
constexpr int64_t PANEL = 8 * ROWS;  // rows for which the columns are copied once
constexpr int64_t SAMPLES = 256;     // at a time, so that what is copied stays in the cache

// What the caller passes, all of it as int64, in this order. Strides count entries, not bytes.
struct Outer {
  int64_t batch, groups, outputs, inputs;  // inputs and outputs of a group
  int64_t x_sample, x_group, x_input;
  int64_t delta_sample, delta_group, delta_output;
};

// For each tile of rows, for each sample: the rows, then their squares; zeros where there are no more rows.
template <typename T>
void copy_rows(const T* delta, const Outer& y, int64_t samples, int64_t rows, T* to) {
  for (int64_t row = 0; row < rounded_up(rows, ROWS); ++row) {
    T* tile = to + row / ROWS * samples * 2 * ROWS + row % ROWS;
    for (int64_t sample = 0; sample < samples; ++sample, tile += 2 * ROWS) {
      const T d = row < rows ? delta[sample * y.delta_sample + row * y.delta_output] : T(0);
      tile[0] = d;
      tile[ROWS] = d * d;
    }
  }
}

// For each sample: as many columns as two vectors have entries, then their squares; zeros where there are no more.
template <typename T>
void copy_columns(const T* x, const Outer& y, int64_t samples, int64_t columns, T* to) {
  constexpr int V = Vector<T>::size;
  for (int64_t sample = 0; sample < samples; ++sample, x += y.x_sample, to += 4 * V) {
    if (columns == 2 * V && y.x_input == 1) {
      const vec<T> first = load(x), second = load(x + V);
      store(to, first), store(to + V, second);
      store(to + 2 * V, first * first), store(to + 3 * V, second * second);
      continue;
    }
    for (int64_t column = 0; column < 2 * V; ++column) {
      const T a = column < columns ? x[column * y.x_input] : T(0);
      to[column] = a;
      to[2 * V + column] = a * a;
    }
  }
}

template <typename T>
inline void add(T* to, vec<T> value, bool first) {
  store(to, first ? value : load(to) + value);
}

// Adds the samples up in one tile of both sums, whose rows are `pitch` entries apart; the first ones are written.
template <typename T>
void tile(const T* rows, const T* columns, int64_t samples, bool first, T* total, T* squares, int64_t pitch) {
  constexpr int V = Vector<T>::size;
  vec<T> g[ROWS][2] = {}, h[ROWS][2] = {};
  for (int64_t sample = 0; sample < samples; ++sample, rows += 2 * ROWS, columns += 4 * V) {
    const vec<T> a = load(columns), b = load(columns + V);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const vec<T> d = rows[row] - vec<T>{};
      g[row][0] = fma(d, a, g[row][0]);
      g[row][1] = fma(d, b, g[row][1]);
    }
    const vec<T> a_squared = load(columns + 2 * V), b_squared = load(columns + 3 * V);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const vec<T> d = rows[ROWS + row] - vec<T>{};
      h[row][0] = fma(d, a_squared, h[row][0]);
      h[row][1] = fma(d, b_squared, h[row][1]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
    add(total + row * pitch, g[row][0], first), add(total + row * pitch + V, g[row][1], first);
    add(squares + row * pitch, h[row][0], first), add(squares + row * pitch + V, h[row][1], first);
  }
}

// The same for a tile at the edge, of which some rows and columns are outside of the sums.
template <typename T>
void tile_at_edge(const T* rows, const T* columns, int64_t samples, bool first, T* total, T* squares, int64_t pitch,
                  int64_t height, int64_t width) {
  constexpr int V = Vector<T>::size;
  T own[2][ROWS * 2 * V];
  tile(rows, columns, samples, true, own[0], own[1], 2 * V);
  for (int64_t row = 0; row < height; ++row)
    for (int64_t column = 0; column < width; ++column) {
      const int64_t from = row * 2 * V + column, to = row * pitch + column;
      total[to] = first ? own[0][from] : total[to] + own[0][from];
      squares[to] = first ? own[1][from] : squares[to] + own[1][from];
    }
}

template <typename T>
void outer(const Outer& y, const T* x, const T* delta, T* total, T* squares, int threads) {
  constexpr int V = Vector<T>::size;
  const int64_t panels = pieces(y.outputs, PANEL), strips = pieces(y.inputs, 2 * V);
  const int64_t blocks = y.groups * panels * strips, most = std::min(y.batch, SAMPLES);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team;
    const int64_t begin = blocks * team.number / team.size, end = blocks * (team.number + 1) / team.size;
    T* rows = static_cast<T*>(std::aligned_alloc(BYTES, rounded_up((most * 2 * PANEL + 1) * sizeof(T), BYTES)));
    T* columns = static_cast<T*>(std::aligned_alloc(BYTES, rounded_up((most * 4 * V + 1) * sizeof(T), BYTES)));
    for (int64_t start = 0; start == 0 || start < y.batch; start += SAMPLES) {
      const int64_t samples = std::min(SAMPLES, y.batch - start);
      int64_t held = -1;  // of the panels
      for (int64_t block = begin; block < end; ++block) {
        const int64_t panel = block / strips, group = panel / panels;
        const int64_t top = panel % panels * PANEL, left = block % strips * 2 * V;
        const int64_t height = std::min(PANEL, y.outputs - top), width = std::min<int64_t>(2 * V, y.inputs - left);
        if (panel != held)
          copy_rows(delta + start * y.delta_sample + group * y.delta_group + top * y.delta_output, y, samples, height,
                    rows);
        held = panel;
        copy_columns(x + start * y.x_sample + group * y.x_group + left * y.x_input, y, samples, width, columns);
        for (int64_t row = 0; row < height; row += ROWS) {
          const int64_t to = (group * y.outputs + top + row) * y.inputs + left;
          const T* own = rows + row * samples * 2;
          if (height - row >= ROWS && width == 2 * V)
            tile(own, columns, samples, start == 0, total + to, squares + to, y.inputs);
          else
            tile_at_edge(own, columns, samples, start == 0, total + to, squares + to, y.inputs,
                         std::min<int64_t>(ROWS, height - row), width);
        }
      }
    }
    std::free(rows);
    std::free(columns);
  }
}

}  // namespace

// Writes Σ g_i and Σ g_i², each (G, O, I), for x of (B, G, I) and δ of (B, G, O).
PERSAMPLE_EXPORT void persample_outer_float(const int64_t* sizes, const float* x, const float* delta, float* total,
                                            float* squares, int threads) {
  outer(*reinterpret_cast<const Outer*>(sizes), x, delta, total, squares, threads);
}

PERSAMPLE_EXPORT void persample_outer_double(const int64_t* sizes, const double* x, const double* delta, double* total,
                                             double* squares, int threads) {
  outer(*reinterpret_cast<const Outer*>(sizes), x, delta, total, squares, threads);
}
