// Sums of the gradients of single samples and of their squares, and their norms, for convolutions and linear layers.
//
// g_i = Σ_l δ_il x_i,l+eᵀ: rows of outputs, one vector of them at a time, times entries e of the window. A tile of both
// stays in registers over all positions l of a sample; then it is added to the sums, or squared into the norm, so that
// g_i never goes through memory. For that the channels must lie side by side: where they do not, a few samples at a time
// are copied so, with the padding around them. Where each channel is a group of its own, the vector runs along channels,
// and entries are vectors, too.
//
// Each thread has sums of its own for its samples, which are added up in the order of the threads.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "vector.h"

namespace {

// What the caller passes, all of it as int64, in this order. Strides count entries, not bytes.
struct Layer {
  int64_t batch, images, groups, inputs, outputs;  // inputs and outputs of a group
  int64_t size[3], positions[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t x_image, x_channel, x_pixel[3];
  int64_t delta_image, delta_channel, delta_pixel[3];
};

// An image or an output gradient with its channels side by side.
template <typename T>
struct View {
  const T* data;
  int64_t image, group, pixel[3];
};

// A copy of images that is such a view; what is never written is zero: padding, and lanes without a channel.
template <typename T>
struct Copy {
  int64_t width[3], channels, pitch, groups;  // pitch: channels and empty lanes
  T* data = nullptr;

  int64_t group() const { return width[0] * width[1] * width[2] * pitch; }
  int64_t image() const { return groups * group(); }
  View<T> view() const { return {data, image(), group(), {width[1] * width[2] * pitch, width[2] * pitch, pitch}}; }
};

// to[w][c] = from[c][w]
template <typename T>
void transpose(const T* from, int64_t channel, int64_t pixel, int64_t channels, int64_t pixels, T* to, int64_t pitch) {
  int64_t c = 0;
  if (channels == 1 && pixel == 1 && pitch == 1) {
    std::memcpy(to, from, pixels * sizeof(T));
    return;
  }
  if (channel == 1) {
    for (int64_t w = 0; w < pixels; ++w) std::memcpy(to + w * pitch, from + w * pixel, channels * sizeof(T));
    return;
  }
  if (pixel == 1) {
    typedef T four __attribute__((vector_size(4 * sizeof(T))));
    typedef T loose __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> index_t;
    typedef index_t index __attribute__((vector_size(4 * sizeof(T))));
    for (; c + 4 <= channels; c += 4) {
      const T* f = from + c * channel;
      int64_t w = 0;
      for (; w + 4 <= pixels; w += 4) {
        four a = *(const loose*)(f + w), b = *(const loose*)(f + channel + w);
        four d = *(const loose*)(f + 2 * channel + w), e = *(const loose*)(f + 3 * channel + w);
        four ab = __builtin_shuffle(a, b, index{0, 4, 1, 5}), de = __builtin_shuffle(d, e, index{0, 4, 1, 5});
        four AB = __builtin_shuffle(a, b, index{2, 6, 3, 7}), DE = __builtin_shuffle(d, e, index{2, 6, 3, 7});
        T* t = to + w * pitch + c;
        *(loose*)(t) = __builtin_shuffle(ab, de, index{0, 1, 4, 5});
        *(loose*)(t + pitch) = __builtin_shuffle(ab, de, index{2, 3, 6, 7});
        *(loose*)(t + 2 * pitch) = __builtin_shuffle(AB, DE, index{0, 1, 4, 5});
        *(loose*)(t + 3 * pitch) = __builtin_shuffle(AB, DE, index{2, 3, 6, 7});
      }
      for (; w < pixels; ++w)
        for (int k = 0; k < 4; ++k) to[w * pitch + c + k] = f[k * channel + w];
    }
  }
  for (; c < channels; ++c)
    for (int64_t w = 0; w < pixels; ++w) to[w * pitch + c] = from[c * channel + w * pixel];
}

template <typename T>
void copy_image(const T* from, int64_t channel, const int64_t* pixel, const int64_t* size, const int64_t* padding,
                const Copy<T>& copy, T* to) {
  const bool flat = padding[1] == 0 && padding[2] == 0 && size[2] == copy.width[2] && size[1] == copy.width[1] &&
                    pixel[1] == size[2] * pixel[2];  // rows behind each other are one long row
  const int64_t rows = flat ? 1 : size[1], length = flat ? size[1] * size[2] : size[2];
  for (int64_t group = 0; group < copy.groups; ++group)
    for (int64_t d = 0; d < size[0]; ++d)
      for (int64_t h = 0; h < rows; ++h) {
        T* row = to + group * copy.group() +
                 (((d + padding[0]) * copy.width[1] + h + padding[1]) * copy.width[2] + padding[2]) * copy.pitch;
        transpose(from + group * copy.channels * channel + d * pixel[0] + h * pixel[1], channel, pixel[2],
                  copy.channels, length, row, copy.pitch);
      }
}

// A tile in the sums: the first entry of the window, in which row of the window, how many.
struct Entries {
  int64_t offset, first;
  int count;
};

// Adds the tiles of one sample up: COUNT entries by VECTORS vectors of outputs. `x` and `delta` are of its first image.
template <typename T, int VECTORS, int COUNT, bool DEPTHWISE>
void tile(const Layer& y, const View<T>& x, const View<T>& delta, const T* from, const T* d, int64_t step, T* sum,
          T* squares, T* norm) {
  constexpr int V = Vector<T>::size;
  vec<T> g[VECTORS][COUNT] = {};
  const int64_t stride = y.stride[2] * x.pixel[2], next = delta.pixel[2];
  for (int64_t image = 0; image < y.images; ++image)
    for (int64_t p = 0; p < y.positions[0]; ++p)
      for (int64_t q = 0; q < y.positions[1]; ++q) {
        const T* a = from + image * x.image + p * y.stride[0] * x.pixel[0] + q * y.stride[1] * x.pixel[1];
        const T* b = d + image * delta.image + p * delta.pixel[0] + q * delta.pixel[1];
        for (int64_t w = 0; w < y.positions[2]; ++w, a += stride, b += next) {
          vec<T> left[VECTORS];
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; ++v) left[v] = load(b + v * V);
#pragma GCC unroll 32
          for (int e = 0; e < COUNT; ++e) {
            const vec<T> right = DEPTHWISE ? load(a + e * step) : a[e] - vec<T>{};
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) g[v][e] = fma(left[v], right, g[v][e]);
          }
        }
      }
  if (norm != nullptr) {
    vec<T> total = {};
    for (int v = 0; v < VECTORS; ++v)
      for (int e = 0; e < COUNT; ++e) total = fma(g[v][e], g[v][e], total);
    for (int lane = 0; lane < V; ++lane) *norm += total[lane];
  }
  if (sum == nullptr) return;
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 32
    for (int e = 0; e < COUNT; ++e) {
      const int64_t at = (v * COUNT + e) * V;
      store(sum + at, load(sum + at) + g[v][e]);
      store(squares + at, fma(g[v][e], g[v][e], load(squares + at)));
    }
}

template <typename T>
using Tile = void (*)(const Layer&, const View<T>&, const View<T>&, const T*, const T*, int64_t, T*, T*, T*);

template <typename T, int VECTORS, bool DEPTHWISE, int COUNT>
Tile<T> tile_of(int count) {
  if constexpr (COUNT == 0) {
    return nullptr;
  } else {
    return count == COUNT ? tile<T, VECTORS, COUNT, DEPTHWISE> : tile_of<T, VECTORS, DEPTHWISE, COUNT - 1>(count);
  }
}

// The rows of the window whose entries lie side by side, cut into tiles of at most `most`.
struct Window {
  int64_t rows, length;  // of entries
  bool by_column;        // each column is a row of its own, where dilation sets them apart
  int64_t pieces, most;

  Window(const Layer& y, int64_t channels, int64_t registers) {
    by_column = y.dilation[2] != 1 && y.kernel[2] != 1;
    rows = y.kernel[0] * y.kernel[1] * (by_column ? y.kernel[2] : 1);
    length = (by_column ? 1 : y.kernel[2]) * channels;
    pieces = ::pieces(length, registers);
    most = ::pieces(length, pieces);
  }
  int count(int64_t piece) const { return int(std::min(most, length - piece * most)); }
};

template <typename T>
void products(const Layer& y, const T* x, const T* delta, T* total, T* squares, T* norms, int threads) {
  constexpr int V = Vector<T>::size;
  const bool depthwise = y.groups > 1 && y.inputs == 1 && y.outputs == 1;
  const int64_t groups = depthwise ? 1 : y.groups, inputs = depthwise ? y.groups : y.inputs;
  const int64_t outputs = depthwise ? y.groups : y.outputs, lanes = rounded_up(outputs, V), blocks = lanes / V;
  const bool pairs = !depthwise && blocks > 1;
  const Window window(y, depthwise ? 1 : inputs, pairs ? REGISTERS / 2 : REGISTERS);
  const int64_t part = groups * lanes * window.rows * window.length;  // of sums

  Copy<T> xs{{}, inputs, depthwise ? lanes : inputs, groups}, ds{{}, outputs, lanes, groups};
  bool padded = false;
  for (int i = 0; i < 3; ++i) {
    xs.width[i] = y.size[i] + 2 * y.padding[i];
    ds.width[i] = y.positions[i];
    padded = padded || y.padding[i] > 0;
  }
  const bool side_by_side = y.x_pixel[2] == inputs || y.kernel[2] == 1 || window.by_column;
  const bool x_lies_so = groups == 1 && !padded && y.x_channel == 1 && side_by_side && (!depthwise || inputs == lanes);
  const bool delta_lies_so = groups == 1 && y.delta_channel == 1 && outputs == lanes;
  const int64_t bytes = (xs.image() + ds.image()) * y.images * int64_t(sizeof(T));
  // As many samples at a time as stay in the cache; more where the sums are large, which each time go through memory.
  const int64_t cache = std::clamp(part * int64_t(sizeof(T)), int64_t(1) << 18, int64_t(1) << 20);
  const int64_t samples = std::clamp(cache / std::max<int64_t>(1, bytes), int64_t(1), std::max<int64_t>(1, y.batch));
  const int64_t no_padding[3] = {};

  T* sums = nullptr;
  if (total != nullptr) sums = static_cast<T*>(std::calloc(2 * part * threads + 1, sizeof(T)));

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team;
    Copy<T> own_x = xs, own_d = ds;
    if (!x_lies_so) own_x.data = static_cast<T*>(std::calloc(xs.image() * y.images * samples + V, sizeof(T)));
    if (!delta_lies_so) own_d.data = static_cast<T*>(std::calloc(ds.image() * y.images * samples + V, sizeof(T)));
    View<T> vx = own_x.view(), vd = own_d.view();
    if (x_lies_so) vx = {nullptr, y.x_image, 0, {y.x_pixel[0], y.x_pixel[1], y.x_pixel[2]}};
    if (delta_lies_so) vd = {nullptr, y.delta_image, 0, {y.delta_pixel[0], y.delta_pixel[1], y.delta_pixel[2]}};
    // Should there be fewer threads than were asked for, each takes the part of several.
    for (int share = team.number; share < threads; share += team.size) {
      const int64_t begin = y.batch * share / threads, end = y.batch * (share + 1) / threads;
      for (int64_t start = begin; start < end; start += samples) {
        const int64_t stop = std::min(end, start + samples);
        for (int64_t image = start * y.images; image < stop * y.images; ++image) {
          const int64_t place = image - start * y.images;
          if (!x_lies_so)
            copy_image(x + image * y.x_image, y.x_channel, y.x_pixel, y.size, y.padding, own_x,
                       own_x.data + place * xs.image());
          if (!delta_lies_so)
            copy_image(delta + image * y.delta_image, y.delta_channel, y.delta_pixel, y.positions, no_padding, own_d,
                       own_d.data + place * ds.image());
        }
        const T* first_x = x_lies_so ? x + start * y.images * y.x_image : own_x.data;
        const T* first_d = delta_lies_so ? delta + start * y.images * y.delta_image : own_d.data;
        T* sum = sums == nullptr ? nullptr : sums + 2 * part * share;
        T* square = sums == nullptr ? nullptr : sum + part;
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t block = 0; block < blocks;) {
            const int vectors = pairs && block + 1 < blocks ? 2 : 1;
            for (int64_t row = 0; row < window.rows; ++row) {
              const int64_t column = window.by_column ? row % y.kernel[2] : 0;
              const int64_t line = window.by_column ? row / y.kernel[2] : row;
              const int64_t offset = line / y.kernel[1] * y.dilation[0] * vx.pixel[0] +
                                     line % y.kernel[1] * y.dilation[1] * vx.pixel[1] +
                                     column * y.dilation[2] * vx.pixel[2] + group * vx.group +
                                     (depthwise ? block * V : 0);
              for (int64_t piece = 0; piece < window.pieces; ++piece) {
                const int count = window.count(piece);
                const int64_t step = depthwise ? vx.pixel[2] : 1;
                const Tile<T> add = depthwise      ? tile_of<T, 1, true, REGISTERS>(count)
                                    : vectors == 2 ? tile_of<T, 2, false, REGISTERS / 2>(count)
                                                   : tile_of<T, 1, false, REGISTERS>(count);
                const T* a = first_x + offset + piece * window.most * step;
                const T* b = first_d + group * vd.group + block * V;
                for (int64_t sample = 0; sample < stop - start; ++sample)
                  add(y, vx, vd, a + sample * y.images * vx.image, b + sample * y.images * vd.image, step, sum, square,
                      norms == nullptr ? nullptr : norms + start + sample);
                if (sum != nullptr) sum += vectors * count * V, square += vectors * count * V;
              }
            }
            block += vectors;
          }
      }
    }
    std::free(own_x.data);
    std::free(own_d.data);
  }
  if (sums == nullptr) return;

  // The sums lie as the tiles came: back to (O, C/G, *K).
  const int64_t entries = y.kernel[0] * y.kernel[1] * y.kernel[2];
  const int64_t channels = depthwise ? 1 : inputs;
  int64_t at = 0;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t block = 0; block < blocks;) {
      const int vectors = pairs && block + 1 < blocks ? 2 : 1;
      for (int64_t row = 0; row < window.rows; ++row)
        for (int64_t piece = 0; piece < window.pieces; ++piece)
          for (int v = 0; v < vectors; ++v)
            for (int e = 0; e < window.count(piece); ++e, at += V) {
              const int64_t entry = piece * window.most + e, c = entry % channels;
              const int64_t k = window.by_column ? row : row * y.kernel[2] + entry / channels;
              for (int lane = 0; lane < V; ++lane) {
                const int64_t o = (block + v) * V + lane;
                if (o >= outputs) break;
                T first = 0, second = 0;
                for (int thread = 0; thread < threads; ++thread) {
                  first += sums[2 * part * thread + at + lane];
                  second += sums[2 * part * thread + part + at + lane];
                }
                const int64_t to = ((group * outputs + o) * channels + c) * entries + k;
                total[to] = first;
                squares[to] = second;
              }
            }
      block += vectors;
    }
  std::free(sums);
}

}  // namespace

// Writes Σ g_i and Σ g_i², each (O, C/G, *K), unless they are null, and adds ‖g_i‖² to `norms`, unless it is null.
PERSAMPLE_EXPORT void persample_products_float(const int64_t* layer, const float* x, const float* delta, float* total,
                                               float* squares, float* norms, int threads) {
  products(*reinterpret_cast<const Layer*>(layer), x, delta, total, squares, norms, threads);
}

PERSAMPLE_EXPORT void persample_products_double(const int64_t* layer, const double* x, const double* delta,
                                                double* total, double* squares, double* norms, int threads) {
  products(*reinterpret_cast<const Layer*>(layer), x, delta, total, squares, norms, threads);
}
