/* The orthonormal DCT-II and its inverse of LANES rows at once, and the rows' way into lanes and out of them.

   The transform follows from a real FFT after J. Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP 28
   (1980), and that from a complex one of half the size. */
#pragma once
#include "vector.h"
#include <stdlib.h>

typedef struct { vec re, im; } cvec;

/* n: size of the cosine transform, even; factors: of n / 2, `count` of them, each 2, 4, 8 or odd and at most LARGEST_RADIX;
   roots: (n, 2), exp(-2 pi i k / n); phases: (n, 2), s_k / 2 times cos and sin of pi k / 2 n, s_0 = sqrt(1 / n), else
   s_k = sqrt(2 / n). */
typedef struct {
  int64_t n, count;
  const int64_t *factors;
  const float *roots, *phases;
} Plan;

/* Where Makhoul puts number j of a row: even ones ascending, then odd ones descending. */
INLINE int64_t place(int64_t j, int64_t n) { return j % 2 ? n - 1 - j / 2 : j / 2; }

/* rows[i], NULL for a missing one: zeros, into lane i; reordered: number j to place(j). to: (n) vectors. */
INLINE void gather(const int reordered, int64_t n, const float *const rows[LANES], vec *to) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    vec block[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) block[i] = rows[i] ? load(rows[i] + j) : (vec){0};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) to[reordered ? place(j + i, n) : j + i] = block[i];
  }
  for (; j < n; j++)
    for (int i = 0; i < LANES; i++) to[reordered ? place(j, n) : j][i] = rows[i] ? rows[i][j] : 0.0f;
}

/* Lane i to rows[i], added to what is there if `adds`; NULL: nowhere. paired: number j comes from place(j), exchanged with the other
   number of its pair. */
INLINE void scatter(const int paired, const int adds, int64_t n, const vec *from, float *const rows[LANES]) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    vec block[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) block[i] = from[paired ? place(j + i, n) ^ 1 : j + i];
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (rows[i]) store(rows[i] + j, adds ? load(rows[i] + j) + block[i] : block[i]);
  }
  for (; j < n; j++)
    for (int i = 0; i < LANES; i++)
      if (rows[i]) rows[i][j] = (adds ? rows[i][j] : 0.0f) + from[paired ? place(j, n) ^ 1 : j][i];
}

/* The two buffers of the FFT are this far apart: a multiple of 4096 bytes would make every store hide a load. */
INLINE int64_t apart(int64_t n) { return n / 2 + 3; }

/* How many cvecs are needed to work in. */
INLINE int64_t room(int64_t n) { return n / 2 + apart(n) + 1; }

/* That room, and behind it n vectors, of which the caller disposes; NULL if memory is short. */
INLINE cvec *allocate(int64_t n) {
  return aligned_alloc(64, ((size_t)room(n) * sizeof(cvec) + (size_t)n * sizeof(vec) + 63) / 64 * 64);
}
INLINE vec *numbers_in(cvec *work, int64_t n) { return (vec *)(work + room(n)); }

/* z = C x of rows as for `gather`. z: (n) vectors; work: `room`. Both in transform.c. */
HIDDEN void forward(const Plan *plan, const float *const x[LANES], vec *z, cvec *work);

/* C^T u: its numbers are where `scatter` looks for paired ones. u: (n) vectors, not in `work`; the result is in it. */
HIDDEN const vec *backward(const Plan *plan, const vec *u, cvec *work);
