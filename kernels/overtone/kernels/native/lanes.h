/* The orthonormal DCT-II and the orthonormal real DFT, and their inverses, of LANES rows at once, and the rows' way into lanes and
   out of them.

   The DCT follows from a real FFT after J. Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP 28
   (1980), and that from a complex one of half the size. */
#pragma once
#include "vector.h"
#include <stdlib.h>

typedef struct { vec re, im; } cvec;

/* n: numbers of a row, even; coefficients: of its spectrum, n of a DCT; of a DFT n + 2, the real parts of n / 2 + 1, then their
   imaginary parts; factors: of n / 2, `count` of them, each 2, 4, 8 or odd and at most LARGEST_RADIX; roots: (n, 2),
   exp(-2 pi i k / n); phases: of a DCT (n, 2), s_k / 2 times cos and sin of pi k / 2 n, s_0 = sqrt(1 / n), else s_k = sqrt(2 / n);
   of a DFT one number, sqrt(1 / n). */
typedef struct {
  int64_t n, coefficients, count;
  const int64_t *factors;
  const float *roots, *phases;
} Plan;

INLINE int is_dft(const Plan *plan) { return plan->coefficients > plan->n; }

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

/* Where number j of a row is among the vectors: at j, or exchanged with the other number of its pair, after reordering or not. */
enum { AS_IT_IS, EXCHANGED, REORDERED_AND_EXCHANGED };
INLINE int64_t found_at(const int order, int64_t j, int64_t n) {
  return order == AS_IT_IS ? j : (order == EXCHANGED ? j : place(j, n)) ^ 1;
}

/* Lane i to rows[i], added to what is there if `adds`; NULL: nowhere. */
INLINE void scatter(const int order, const int adds, int64_t n, const vec *from, float *const rows[LANES]) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    vec block[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) block[i] = from[found_at(order, j + i, n)];
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (rows[i]) store(rows[i] + j, adds ? load(rows[i] + j) + block[i] : block[i]);
  }
  for (; j < n; j++)
    for (int i = 0; i < LANES; i++)
      if (rows[i]) rows[i][j] = (adds ? rows[i][j] : 0.0f) + from[found_at(order, j, n)][i];
}

/* The two buffers of the FFT are this far apart: a multiple of 4096 bytes would make every store hide a load. */
INLINE int64_t apart(int64_t n) { return n / 2 + 3; }

/* How many cvecs are needed to work in. */
INLINE int64_t room(int64_t n) { return n / 2 + apart(n) + 1; }

/* That room, and behind it as many vectors as a spectrum has, of which the caller disposes; NULL if memory is short. */
INLINE cvec *allocate(int64_t n) {
  return aligned_alloc(64, ((size_t)room(n) * sizeof(cvec) + (size_t)(n + 2) * sizeof(vec) + 63) / 64 * 64);
}
INLINE vec *numbers_in(cvec *work, int64_t n) { return (vec *)(work + room(n)); }

/* z = F x of rows as for `gather`. z: (coefficients) vectors; work: `room`. Both in transform.c. */
HIDDEN void forward(const Plan *plan, const float *const x[LANES], vec *z, cvec *work);

/* F^-1 u, as `scatter_result` takes it. u: (coefficients) vectors, not in `work`; the result is in it. */
HIDDEN const vec *backward(const Plan *plan, const vec *u, cvec *work);

INLINE void scatter_result(const Plan *plan, const int adds, const vec *from, float *const rows[LANES]) {
  if (is_dft(plan)) scatter(EXCHANGED, adds, plan->n, from, rows);
  else scatter(REORDERED_AND_EXCHANGED, adds, plan->n, from, rows);
}
