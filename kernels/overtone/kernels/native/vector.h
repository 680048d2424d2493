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

#define HIDDEN __attribute__((visibility("hidden"))) /* the library's own, whatever else the process has loaded */
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
INLINE vec choose(ivec which, vec yes, vec no) {
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
  return choose((ivec)(x < -87.0f), (vec){0}, p * power);
}

/* Shuffles of two vectors, the second's elements numbered on: what each is left with when blocks of a width are exchanged across
   the diagonal. Spelled out, because only constants become single instructions. */
#if LANES == 16
#define NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define LOW_1 {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}
#define HIGH_1 {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}
#define LOW_2 {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}
#define HIGH_2 {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}
#define LOW_4 {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}
#define HIGH_4 {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}
#define LOW_8 {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}
#define HIGH_8 {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}
#elif LANES == 8
#define NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#define LOW_1 {0, 8, 2, 10, 4, 12, 6, 14}
#define HIGH_1 {1, 9, 3, 11, 5, 13, 7, 15}
#define LOW_2 {0, 1, 8, 9, 4, 5, 12, 13}
#define HIGH_2 {2, 3, 10, 11, 6, 7, 14, 15}
#define LOW_4 {0, 1, 2, 3, 8, 9, 10, 11}
#define HIGH_4 {4, 5, 6, 7, 12, 13, 14, 15}
#else
#define NUMBERS {0, 1, 2, 3}
#define LOW_1 {0, 4, 2, 6}
#define HIGH_1 {1, 5, 3, 7}
#define LOW_2 {0, 1, 4, 5}
#define HIGH_2 {2, 3, 6, 7}
#endif

#define EXCHANGE(width) \
  _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & width)) { \
    const vec a = v[i], b = v[i + width]; \
    v[i] = __builtin_shuffle(a, b, (ivec)LOW_##width); \
    v[i + width] = __builtin_shuffle(a, b, (ivec)HIGH_##width); \
  }

/* LANES vectors as a square matrix, transposed. */
INLINE void transpose(vec v[LANES]) {
  EXCHANGE(1)
  EXCHANGE(2)
#if LANES > 4
  EXCHANGE(4)
#endif
#if LANES > 8
  EXCHANGE(8)
#endif
}
