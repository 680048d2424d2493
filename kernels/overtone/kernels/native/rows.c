/* What a decoder layer does to each token by itself, between its products. */
#include "vector.h"

#define SERIAL 4096 /* numbers below which waking other threads takes longer than the work */

INLINE float root_mean_square(const float *x, int64_t n, float epsilon) {
  vec squares = {0};
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) squares += load(x + j) * load(x + j);
  float total = sum(squares);
  for (; j < n; j++) total += x[j] * x[j];
  return __builtin_sqrtf(total / (float)n + epsilon);
}

INLINE void norm_row(const float *x, int64_t n, const float *weight, float epsilon, float *y) {
  const float scale = 1.0f / root_mean_square(x, n, epsilon);
  for (int64_t j = 0; j < n; j++) y[j] = x[j] * scale * weight[j];
}

/* y = x / sqrt(mean(x^2) + epsilon) * weight. x: (m, n), rows ldx apart; y: (m, n), contiguous. */
void rms_norm(int64_t m, int64_t n, const float *x, int64_t ldx, const float *weight, float epsilon, float *y) {
#pragma omp parallel for if (m * n >= SERIAL)
  for (int64_t i = 0; i < m; i++) norm_row(x + i * ldx, n, weight, epsilon, y + i * n);
}

/* y = silu(gate) * up, silu(g) = g / (1 + exp(-g)). x: (m, 2 n), gate then up, contiguous; y: (m, n). */
void silu_times(int64_t m, int64_t n, const float *x, float *y) {
#pragma omp parallel for if (m * n >= SERIAL)
  for (int64_t i = 0; i < m; i++) {
    const float *gate = x + 2 * i * n, *up = gate + n;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
      vec g = load(gate + j);
      g = choose((ivec)(g < -88.0f), all(-88.0f), g); /* silu is -5e-37 there: as good as 0 */
      store(y + i * n + j, g / (1.0f + exp_of(-g)) * load(up + j));
    }
    for (; j < n; j++) {
      const float g = gate[j] < -88.0f ? -88.0f : gate[j];
      y[i * n + j] = g / (1.0f + exp_of(all(-g))[0]) * up[j];
    }
  }
}

/* rope(x) = x cos + swap(x) sin, swap: the halves of the head exchanged, the sine's first half negated. */
INLINE void rotate(float *restrict x, int64_t dim, const float *restrict cos, const float *restrict sin) {
  const int64_t half = dim / 2;
  for (int64_t j = 0; j < half; j++) {
    const float a = x[j], b = x[j + half];
    x[j] = a * cos[j] + b * sin[j];
    x[j + half] = b * cos[j + half] + a * sin[j + half];
  }
}

INLINE void norm_heads(float *x, int64_t heads, int64_t dim, const float *weight, float epsilon) {
  if (weight)
    for (int64_t h = 0; h < heads; h++) norm_row(x + h * dim, dim, weight, epsilon, x + h * dim);
}

/* Rotates queries and keys in place, each head first normed where there are norms, and writes keys and values to the cache.

   qkv: (m, heads + 2 kv_heads, dim), rows ldx apart; cos, sin: (m, dim), the sine signed; slots: (m); cache: (slots, 2,
   kv_heads, dim); query_norm, key_norm: (dim), or NULL. */
void rotate_and_write(int64_t m, int64_t heads, int64_t kv_heads, int64_t dim, float *qkv, int64_t ldx, const float *cos,
                      const float *sin, const float *query_norm, const float *key_norm, float epsilon,
                      const int64_t *slots, float *cache) {
  const int64_t written = kv_heads * dim;
#pragma omp parallel for if (m * ldx >= SERIAL)
  for (int64_t i = 0; i < m; i++) {
    float *query = qkv + i * ldx, *key = query + heads * dim;
    norm_heads(query, heads, dim, query_norm, epsilon);
    norm_heads(key, kv_heads, dim, key_norm, epsilon);
    for (int64_t h = 0; h < heads + kv_heads; h++) rotate(query + h * dim, dim, cos + i * dim, sin + i * dim);
    __builtin_memcpy(cache + slots[i] * 2 * written, key, 2 * (size_t)written * sizeof(float));
  }
}
