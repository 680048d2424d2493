/* Vectors of the machine's width by the compiler's own extension, and what is computed with them. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* LANES: floats in a vector. ROWS x COLUMN_VECTORS sums and what feeds them fill the registers: 16 with AVX2, else 32. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define ROWS 6
#else
#define LANES 4
#define ROWS 8
#endif
#define COLUMN_VECTORS 2
#define COLUMNS (COLUMN_VECTORS * LANES)

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* anywhere in memory */
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *at) { return *(const loose *)at; }
INLINE void store(float *at, vec x) { *(loose *)at = x; }
INLINE vec all(float x) { return x - (vec){0}; }

/* The lanes' sum, in a fixed order. */
INLINE float sum(vec x) {
  float parts[LANES];
  store(parts, x);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) parts[i] += parts[i + width];
  return parts[0];
}

INLINE vec bits(ivec x) { union { ivec i; vec f; } u = {.i = x}; return u.f; }
INLINE vec select(ivec which, vec yes, vec no) {
  union { vec f; ivec i; } a = {.f = yes}, b = {.f = no};
  return bits((a.i & which) | (b.i & ~which));
}

/* exp(x) for x <= 88, to about 2 units in the last place; 0 below -87. NaN stays NaN.
   exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; exp(r) by a polynomial of degree 6 (Cephes, expf.c). */
INLINE vec exp_of(vec x) {
  const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits. */
  vec shifted = x * 1.44269504088896341f + round;
  vec n = shifted - round;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  union { vec f; ivec i; } u = {.f = shifted};
  vec power = bits((u.i << 23) + 0x3f800000);
  return select((ivec)(x < -87.0f), (vec){0}, p * power);
}
