// Kernels for a CPU: 3×3 convolutions by Winograd's algorithm, and GroupNorm with SiLU, forwards and backwards.
//
// Tensors are channels last, x[b][h][w][c] without gaps, and numbers of channels are multiples of `panel()`.
// build.py compiles this file on the machine where it runs; ops.py checks shapes and calls it.
//
// Results do not depend on the number of threads: threads divide what is computed, never a sum.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 12;  // of 32 registers 24 hold sums, 2 a row of B, 1 an element of A
#else
constexpr int LANES = 8, MAX_ROWS = 6;
#endif
constexpr int PANEL = 2 * LANES;  // columns of a product that are computed together
using Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias)) = float;
using Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias)) = int32_t;
using Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias)) = uint16_t;
using Index = int64_t;

static inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
static inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
static inline Vector all(float value) { return value - Vector{}; }

// bfloat16 is the upper half of a float32; halves are rounded to even.
static inline Vector load(const uint16_t* p) {
  Integers bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Integers) << 16;
  return (Vector)bits;
}
static inline void store(uint16_t* p, Vector v) {
  Integers bits = (Integers)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(bits, Halves);
}

// Memory that a thread keeps: pages are slow to get anew.
static float* workspace(size_t floats) {
  static thread_local std::vector<float> memory;
  if (memory.size() < floats) memory.resize(floats);
  return memory.data();
}

// ---- Winograd's F(4×4, 3×3): 16 outputs of a 3×3 filter from 36 products (Lavin & Gray 2016, Section 4.3) -----------
//
// Interpolated at 0, ±P, ±Q and ∞. With 5/8 and 3/2 a sum over 128 channels is off by 1.1e-6, relative, and with the
// usual 1 and 2 by 2.4e-6; all products of them are exact in float32.

constexpr float P = 0.625f, Q = 1.5f, P2 = P * P, Q2 = Q * Q;
constexpr int TILE = 4, SIDE = 6, PRODUCTS = SIDE * SIDE;
constexpr double NORM_P = 2 * P2 * (P2 - Q2), NORM_Q = 2 * Q2 * (Q2 - P2);
constexpr double G[SIDE][3] = {
    {1.0 / (P2 * Q2), 0, 0},
    {1 / NORM_P, P / NORM_P, P2 / NORM_P},
    {1 / NORM_P, -P / NORM_P, P2 / NORM_P},
    {1 / NORM_Q, Q / NORM_Q, Q2 / NORM_Q},
    {1 / NORM_Q, -Q / NORM_Q, Q2 / NORM_Q},
    {0, 0, 1},
};

// Bᵀ d, of six inputs
static inline void transform_input(const Vector d[SIDE], Vector v[SIDE]) {
  v[0] = P2 * Q2 * d[0] - (P2 + Q2) * d[2] + d[4];
  Vector even = d[4] - Q2 * d[2], odd = P * (d[3] - Q2 * d[1]);
  v[1] = even + odd, v[2] = even - odd;
  even = d[4] - P2 * d[2], odd = Q * (d[3] - P2 * d[1]);
  v[3] = even + odd, v[4] = even - odd;
  v[5] = P2 * Q2 * d[1] - (P2 + Q2) * d[3] + d[5];
}

// Aᵀ m, four outputs
static inline void transform_output(const Vector m[SIDE], Vector y[TILE]) {
  Vector sum_p = m[1] + m[2], sum_q = m[3] + m[4], difference_p = m[1] - m[2], difference_q = m[3] - m[4];
  y[0] = m[0] + sum_p + sum_q;
  y[1] = P * difference_p + Q * difference_q;
  y[2] = P2 * sum_p + Q2 * sum_q;
  y[3] = P * P2 * difference_p + Q * Q2 * difference_q + m[5];
}

// A y, of the gradient of four outputs
static inline void transform_gradient(const Vector y[TILE], Vector m[SIDE]) {
  m[0] = y[0];
  Vector even = y[0] + P2 * y[2], odd = P * (y[1] + P2 * y[3]);
  m[1] = even + odd, m[2] = even - odd;
  even = y[0] + Q2 * y[2], odd = Q * (y[1] + Q2 * y[3]);
  m[3] = even + odd, m[4] = even - odd;
  m[5] = y[3];
}

// Where the tiles of a batch of images lie.
struct Tiles {
  Index height, width, rows, columns, per_image, count;

  Tiles(Index batch, Index height, Index width)
      : height(height), width(width), rows((height + TILE - 1) / TILE), columns((width + TILE - 1) / TILE),
        per_image(rows * columns), count(batch * per_image) {}
  Index image(Index tile) const { return tile / per_image; }
  Index top(Index tile) const { return tile % per_image / columns * TILE; }
  Index left(Index tile) const { return tile % columns * TILE; }
};

// `N`×`N` pixels from (top, left) of LANES channels through `transform` along both sides, to SIDE×SIDE values that lie
// `stride` apart; outside the image are zeros. `x` is `scale` times smaller than the image it stands for.
template <int N>
static inline void transform_tile(void (*transform)(const Vector*, Vector*), const float* x, Index channels, Index top,
                                  Index left, Index height, Index width, int scale, float* out, Index stride) {
  Vector half[SIDE][N];
  for (int j = 0; j < N; j++) {
    Vector pixels[N], column[SIDE];
    Index w = left + j;
    for (int i = 0; i < N; i++) {
      Index h = top + i;
      bool inside = h >= 0 && h < height && w >= 0 && w < width;
      pixels[i] = inside ? load(x + (h / scale * (width / scale) + w / scale) * channels) : Vector{};
    }
    transform(pixels, column);
    for (int i = 0; i < SIDE; i++) half[i][j] = column[i];
  }
  for (int i = 0; i < SIDE; i++) {
    Vector row[SIDE];
    transform(half[i], row);
    for (int j = 0; j < SIDE; j++) store(out + (i * SIDE + j) * stride, row[j]);
  }
}

// ---- products of matrices ------------------------------------------------------------------------------------------

// C[ROWS][PANEL] = Σ_k A(m, k) B[k][PANEL], plus C where `add`
template <int ROWS>
static void product_of(Index depth, const float* a, Index a_row, Index a_column, const float* b, float* c, bool add) {
  Vector sum[ROWS][2] = {};
  for (Index k = 0; k < depth; k++) {
    Vector left = load(b + k * PANEL), right = load(b + k * PANEL + LANES);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      Vector element = all(a[m * a_row + k * a_column]);
      sum[m][0] += element * left, sum[m][1] += element * right;
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < 2; n++) {
      float* to = c + m * PANEL + n * LANES;
      store(to, add ? load(to) + sum[m][n] : sum[m][n]);
    }
}

// The same for any number of rows, in parts that fit into the registers.
static void product(Index rows, Index depth, const float* a, Index a_row, Index a_column, const float* b, float* c,
                    bool add) {
  const Index parts = (rows + MAX_ROWS - 1) / MAX_ROWS;
  for (Index part = 0, m = 0; part < parts; part++) {
    const Index here = (rows - m + parts - part - 1) / (parts - part);
    const float* a_part = a + m * a_row;
    float* c_part = c + m * PANEL;
    switch (here) {
#define ROWS_ARE(n) \
  case n: product_of<n>(depth, a_part, a_row, a_column, b, c_part, add); break;
      ROWS_ARE(1) ROWS_ARE(2) ROWS_ARE(3) ROWS_ARE(4) ROWS_ARE(5) ROWS_ARE(6)
#if defined(__AVX512F__)
      ROWS_ARE(7) ROWS_ARE(8) ROWS_ARE(9) ROWS_ARE(10) ROWS_ARE(11) ROWS_ARE(12)
#endif
#undef ROWS_ARE
    }
    m += here;
  }
}

// ---- SiLU ----------------------------------------------------------------------------------------------------------

// 1 / (1 + exp(−x)), relative error 2e-7
static inline Vector sigmoid(Vector x) {
  x = x > 87.0f ? all(87.0f) : x;
  x = x < -87.0f ? all(-87.0f) : x;
  const Vector shift = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  Vector n = (x * -1.44269504f + shift) - shift, r = -x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector e = 1.0f / 5040 * r + 1.0f / 720;
  for (float next : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) e = e * r + next;
  Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return 1.0f / (1.0f + e * (Vector)power);
}

extern "C" {

int panel() { return PANEL; }

// U = G w Gᵀ, [36][O / PANEL][I][PANEL], of w [O][I][3][3]; `turned`, of the filters of the gradient, which are turned
// by 180° and have inputs for outputs: [36][I / PANEL][O][PANEL].
void winograd_filters(const float* weight, float* filters, Index outputs, Index inputs, int turned) {
  const Index rows = turned ? outputs : inputs, panels = (turned ? inputs : outputs) / PANEL;
#pragma omp parallel for collapse(2)
  for (Index panel = 0; panel < panels; panel++)
    for (Index row = 0; row < rows; row++) {
      double w[9][PANEL], half[SIDE][3][PANEL];
      for (int lane = 0; lane < PANEL; lane++) {
        const Index column = panel * PANEL + lane;
        const float* from = weight + (turned ? row * inputs + column : column * inputs + row) * 9;
        for (int tap = 0; tap < 9; tap++) w[tap][lane] = from[turned ? 8 - tap : tap];
      }
      for (int i = 0; i < SIDE; i++)
        for (int b = 0; b < 3; b++)
          for (int lane = 0; lane < PANEL; lane++)
            half[i][b][lane] = G[i][0] * w[b][lane] + G[i][1] * w[3 + b][lane] + G[i][2] * w[6 + b][lane];
      for (int k = 0; k < PRODUCTS; k++) {
        const double(*h)[PANEL] = half[k / SIDE], *g = G[k % SIDE];
        float* to = filters + ((k * panels + panel) * rows + row) * PANEL;
        for (int lane = 0; lane < PANEL; lane++)
          to[lane] = float(h[0][lane] * g[0] + h[1][lane] * g[1] + h[2][lane] * g[2]);
      }
    }
}

// y [B][H][W][O] = x [B][H / scale][W / scale][I] (each pixel repeated `scale` times) * filters, padded with zeros,
// plus bias[b * bias_stride + o] and a residual [B][H][W][O], where these are given.
void winograd(const float* x, const float* filters, const float* bias, Index bias_stride, const float* residual,
              float* y, Index batch, Index height, Index width, Index inputs, Index outputs, int scale, Index block) {
  const Tiles tiles(batch, height, width);
  const Index panels = outputs / PANEL, pixels = height * width, sources = pixels / (scale * scale);
  float* v = workspace(PRODUCTS * block * (inputs + outputs));  // [36][block][I]
  float* m = v + PRODUCTS * block * inputs;                     // [36][O / PANEL][block][PANEL]
#pragma omp parallel
  for (Index first = 0; first < tiles.count; first += block) {
    const Index count = std::min(block, tiles.count - first);
#pragma omp for collapse(2)
    for (Index i = 0; i < count; i++)
      for (Index c = 0; c < inputs; c += LANES) {
        const Index tile = first + i;
        transform_tile<SIDE>(transform_input, x + tiles.image(tile) * sources * inputs + c, inputs, tiles.top(tile) - 1,
                             tiles.left(tile) - 1, height, width, scale, v + i * inputs + c, block * inputs);
      }
#pragma omp for collapse(2)
    for (Index k = 0; k < PRODUCTS; k++)
      for (Index p = 0; p < panels; p++)
        product(count, inputs, v + k * block * inputs, inputs, 1, filters + (k * panels + p) * inputs * PANEL,
                m + (k * panels + p) * block * PANEL, false);
#pragma omp for collapse(2)
    for (Index i = 0; i < count; i++)
      for (Index c = 0; c < outputs; c += LANES) {
        const Index tile = first + i, image = tiles.image(tile), top = tiles.top(tile), left = tiles.left(tile);
        const float* from = m + (c / PANEL * block + i) * PANEL + c % PANEL;
        const Vector shift = bias ? load(bias + image * bias_stride + c) : Vector{};
        Vector half[TILE][SIDE];
        for (int j = 0; j < SIDE; j++) {
          Vector column[SIDE], out[TILE];
          for (int a = 0; a < SIDE; a++) column[a] = load(from + (a * SIDE + j) * block * outputs);
          transform_output(column, out);
          for (int a = 0; a < TILE; a++) half[a][j] = out[a];
        }
        for (int a = 0; a < TILE && top + a < height; a++) {
          Vector row[TILE];
          transform_output(half[a], row);
          for (int b = 0; b < TILE && left + b < width; b++) {
            const Index at = (image * pixels + (top + a) * width + left + b) * outputs + c;
            const Vector value = row[b] + shift;
            store(y + at, residual ? value + load(residual + at) : value);
          }
        }
      }
  }
}

// dw [O][I][3][3] = Gᵀ (Σ over tiles of (Bᵀ d B) (A dy Aᵀ)) G, of x [B][H][W][I] and dy [B][H][W][O]
void winograd_weight_gradient(const float* x, const float* dy, float* dw, Index batch, Index height, Index width,
                              Index inputs, Index outputs, Index block) {
  const Tiles tiles(batch, height, width);
  const Index panels = outputs / PANEL, pixels = height * width;
  float* v = workspace(PRODUCTS * (block * (inputs + outputs) + inputs * outputs));  // [36][block][I]
  float* m = v + PRODUCTS * block * inputs;                                          // [36][O / PANEL][block][PANEL]
  float* du = m + PRODUCTS * block * outputs;                                        // [36][O / PANEL][I][PANEL]
#pragma omp parallel
  {
    for (Index first = 0; first < tiles.count; first += block) {
      const Index count = std::min(block, tiles.count - first);
#pragma omp for
      for (Index i = 0; i < count; i++) {
        const Index tile = first + i, image = tiles.image(tile) * pixels, top = tiles.top(tile), left = tiles.left(tile);
        for (Index c = 0; c < inputs; c += LANES)
          transform_tile<SIDE>(transform_input, x + image * inputs + c, inputs, top - 1, left - 1, height, width, 1,
                               v + i * inputs + c, block * inputs);
        for (Index c = 0; c < outputs; c += LANES)
          transform_tile<TILE>(transform_gradient, dy + image * outputs + c, outputs, top, left, height, width, 1,
                               m + (c / PANEL * block + i) * PANEL + c % PANEL, block * outputs);
      }
#pragma omp for collapse(2)
      for (Index k = 0; k < PRODUCTS; k++)
        for (Index p = 0; p < panels; p++)
          product(inputs, count, v + k * block * inputs, 1, inputs, m + (k * panels + p) * block * PANEL,
                  du + (k * panels + p) * inputs * PANEL, first > 0);
    }
#pragma omp for collapse(2)
    for (Index p = 0; p < panels; p++)
      for (Index i = 0; i < inputs; i++)
        for (int lane = 0; lane < PANEL; lane += LANES) {
          Vector half[3][SIDE] = {};
          for (int k = 0; k < PRODUCTS; k++)
            for (int a = 0; a < 3; a++)
              half[a][k % SIDE] += float(G[k / SIDE][a]) * load(du + ((k * panels + p) * inputs + i) * PANEL + lane);
          for (int a = 0; a < 3; a++)
            for (int b = 0; b < 3; b++) {
              Vector sum = {};
              for (int j = 0; j < SIDE; j++) sum += float(G[j][b]) * half[a][j];
              for (int n = 0; n < LANES; n++) dw[((p * PANEL + lane + n) * inputs + i) * 9 + a * 3 + b] = sum[n];
            }
        }
  }
}

}  // extern "C"

// ---- GroupNorm and SiLU --------------------------------------------------------------------------------------------

constexpr Index CHUNK = 128;  // pixels whose sum is float32's; sums of chunks are float64's

// Σ f(pixel) and Σ g(pixel) over all pixels of LANES channels
template <class Terms>
static inline void sums_of(Index pixels, Terms terms, double* first, double* second) {
  for (int n = 0; n < LANES; n++) first[n] = second[n] = 0;
  for (Index start = 0; start < pixels; start += CHUNK) {
    Vector f = {}, g = {};
    for (Index i = start; i < std::min(pixels, start + CHUNK); i++) terms(i, f, g);
    for (int n = 0; n < LANES; n++) first[n] += f[n], second[n] += g[n];
  }
}

// y = (x − mean) / √(variance + eps) · weight + bias, then SiLU; x, y [B][pixels][C]. Mean and 1 / √… go to
// moments [B][groups][2].
template <class Element>
static void norm_forward(const Element* x, Element* y, const float* weight, const float* bias, float* moments, Index batch,
                         Index pixels, Index channels, Index groups, double eps, bool silu) {
  const Index width = channels / groups;
  double* sums = reinterpret_cast<double*>(workspace(4 * batch * channels + 2 * batch * channels));
  float* affine = reinterpret_cast<float*>(sums + 2 * batch * channels);
#pragma omp parallel
  {
#pragma omp for collapse(2)
    for (Index b = 0; b < batch; b++)
      for (Index c = 0; c < channels; c += LANES) {
        const Element* from = x + b * pixels * channels + c;
        const Vector first = load(from);  // near the mean: what is left of the difference keeps its digits
        double* to = sums + 2 * b * channels + c;
        sums_of(pixels, [&](Index i, Vector& f, Vector& g) {
          Vector d = load(from + i * channels) - first;
          f += d, g += d * d;
        }, to, to + channels);
        for (int n = 0; n < LANES; n++) {  // mean, and the sum of squared distances from it
          const double mean = to[n] / pixels;
          to[channels + n] -= mean * to[n];
          to[n] = first[n] + mean;
        }
      }
#pragma omp for collapse(2)
    for (Index b = 0; b < batch; b++)
      for (Index group = 0; group < groups; group++) {
        const double *means = sums + 2 * b * channels + group * width, *squares = means + channels;
        double mean = 0, square = 0;
        for (Index c = 0; c < width; c++) mean += means[c] / width;
        for (Index c = 0; c < width; c++) square += squares[c] + pixels * (means[c] - mean) * (means[c] - mean);
        const double inverse = 1 / std::sqrt(square / (pixels * width) + eps);
        float* scales = affine + 2 * b * channels + group * width;
        for (Index c = 0; c < width; c++) {
          scales[c] = weight[group * width + c] * inverse;
          scales[channels + c] = bias[group * width + c] - mean * weight[group * width + c] * inverse;
        }
        if (moments) moments[(b * groups + group) * 2] = mean, moments[(b * groups + group) * 2 + 1] = inverse;
      }
#pragma omp for collapse(2)
    for (Index b = 0; b < batch; b++)
      for (Index i = 0; i < pixels; i++) {
        const float *scales = affine + 2 * b * channels, *shifts = scales + channels;
        const Index at = (b * pixels + i) * channels;
        for (Index c = 0; c < channels; c += LANES) {
          Vector z = load(x + at + c) * load(scales + c) + load(shifts + c);
          store(y + at + c, silu ? z * sigmoid(z) : z);
        }
      }
  }
}

extern "C" {

void norm_silu(const float* x, float* y, const float* weight, const float* bias, float* moments, Index batch,
               Index pixels, Index channels, Index groups, double eps, int silu) {
  norm_forward(x, y, weight, bias, moments, batch, pixels, channels, groups, eps, silu);
}
void norm_silu_bfloat16(const uint16_t* x, uint16_t* y, const float* weight, const float* bias, float* moments,
                        Index batch, Index pixels, Index channels, Index groups, double eps, int silu) {
  norm_forward(x, y, weight, bias, moments, batch, pixels, channels, groups, eps, silu);
}

// The gradient of `norm_silu`: dx [B][pixels][C], and each image's part of the others, dweight and dbias [B][C].
void norm_silu_gradient(const float* x, const float* dy, const float* weight, const float* bias, const float* moments,
                        float* dx, float* dweight, float* dbias, Index batch, Index pixels, Index channels, Index groups,
                        int silu) {
  const Index width = channels / groups;
  float* factors = workspace(3 * batch * channels);
#pragma omp parallel
  {
#pragma omp for collapse(2)
    for (Index b = 0; b < batch; b++)
      for (Index c = 0; c < channels; c += LANES) {
        Vector mean, inverse;
        for (int n = 0; n < LANES; n++) {
          const float* moment = moments + (b * groups + (c + n) / width) * 2;
          mean[n] = moment[0], inverse[n] = moment[1];
        }
        const Vector scale = load(weight + c) * inverse, shift = load(bias + c) - mean * scale;
        const Index at = b * pixels * channels + c;
        double first[LANES], second[LANES];
        sums_of(pixels, [&](Index i, Vector& f, Vector& g) {
          const Vector value = load(x + at + i * channels);
          Vector dz = load(dy + at + i * channels);
          if (silu) {
            const Vector z = value * scale + shift, s = sigmoid(z);
            dz *= s * (1.0f + z * (1.0f - s));
            store(dx + at + i * channels, dz);
          }
          f += dz, g += dz * ((value - mean) * inverse);
        }, first, second);
        for (int n = 0; n < LANES; n++) {
          dbias[b * channels + c + n] = first[n];
          dweight[b * channels + c + n] = second[n];
        }
      }
#pragma omp for collapse(2)
    for (Index b = 0; b < batch; b++)
      for (Index group = 0; group < groups; group++) {  // dx = dz · by_dz − x · by_x + constant
        double first = 0, second = 0;
        for (Index c = group * width; c < (group + 1) * width; c++) {
          first += double(weight[c]) * dbias[b * channels + c] / (pixels * width);
          second += double(weight[c]) * dweight[b * channels + c] / (pixels * width);
        }
        const float* moment = moments + (b * groups + group) * 2;
        const double mean = moment[0], inverse = moment[1];
        for (Index c = group * width; c < (group + 1) * width; c++) {
          float* factor = factors + 3 * b * channels + c;
          factor[0] = weight[c] * inverse;
          factor[channels] = inverse * inverse * second;
          factor[2 * channels] = inverse * (inverse * second * mean - first);
        }
      }
#pragma omp for collapse(2)
    for (Index b = 0; b < batch; b++)
      for (Index i = 0; i < pixels; i++) {
        const float *by_dz = factors + 3 * b * channels, *by_x = by_dz + channels, *constant = by_x + channels;
        const Index at = (b * pixels + i) * channels;
        const float* dz = silu ? dx : dy;
        for (Index c = 0; c < channels; c += LANES)
          store(dx + at + c, load(dz + at + c) * load(by_dz + c) - load(x + at + c) * load(by_x + c) + load(constant + c));
      }
  }
}

}  // extern "C"
