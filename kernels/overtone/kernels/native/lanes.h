/* The orthonormal DCT-II and its inverse of LANES rows at once, and the rows' way into lanes and out of them.

   The transform follows from a real FFT after J. Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP 28
   (1980), and that from a complex one of half the size. */
#pragma once
#include "fft.h"

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

/* z = C x. x: rows as for `gather`; z: (n) vectors. V, the FFT of the reordered row, from that of its pairs, Z, h = n / 2:
   2 V[k] = Z[k] + conj Z[h - k] - i w^k (Z[k] - conj Z[h - k]);  z[k] = s_k Re(e^(-i pi k / 2 n) V[k]), z[n - k] likewise.
   Where V[k] is sum - i turned, V[h - k] is conj sum - i conj turned. */
static void forward(const Plan *plan, const float *const x[LANES], vec *z, cvec *work) {
  const int64_t n = plan->n, half = n / 2;
  const float *roots = plan->roots, *phases = plan->phases;
  gather(1, n, x, (vec *)work);
  const cvec *found = fft(plan, work, work + apart(n));
  for (int64_t k = 0; k <= half / 2; k++) {
    const cvec a = found[k], b = conjugate(found[k ? half - k : 0]);
    const cvec sum = add(a, b), turned = times(subtract(a, b), all(roots[2 * k]), all(roots[2 * k + 1]));
    const cvec low = add(sum, over_i(turned)), high = add(conjugate(sum), over_i(conjugate(turned)));
    const float *at = phases + 2 * k, *from_half = phases + 2 * (half - k);
    z[k] = at[0] * low.re + at[1] * low.im;
    if (k) z[n - k] = at[1] * low.re - at[0] * low.im;
    if (2 * k == half) break;
    z[half - k] = from_half[0] * high.re + from_half[1] * high.im;
    if (k) z[half + k] = from_half[1] * high.re - from_half[0] * high.im;
  }
}

/* V[k], by symmetry from u[k] and u[n - k]; all of it is 1 / n of what the FFT would give. */
INLINE cvec spectrum_at(const Plan *plan, const vec *u, int64_t k) {
  const float c = plan->phases[2 * k], s = plan->phases[2 * k + 1];
  if (!k) return (cvec){2 * c * u[0], (vec){0}};
  const vec a = u[k], b = u[plan->n - k];
  return (cvec){c * a + s * b, s * a - c * b};
}

/* C^T u: its numbers are where `scatter` looks for paired ones. u: (n) vectors, not in `work`. Z[k] = V[k] + conj V[h - k] +
   i w^-k (V[k] - conj V[h - k]), whose inverse FFT has the pairs. Where Z[k] is sum + i turned, Z[h - k] is conj sum + i conj
   turned. The inverse FFT is the forward one with real and imaginary parts exchanged, before and after. */
static const vec *backward(const Plan *plan, const vec *u, cvec *work) {
  const int64_t half = plan->n / 2;
  for (int64_t k = 0; k <= half / 2; k++) {
    const cvec a = spectrum_at(plan, u, k), b = conjugate(spectrum_at(plan, u, half - k));
    const cvec sum = add(a, b);
    const cvec turned = times(subtract(a, b), all(plan->roots[2 * k]), all(-plan->roots[2 * k + 1]));
    work[k] = (cvec){sum.im + turned.re, sum.re - turned.im};
    if (k) work[half - k] = (cvec){turned.re - sum.im, sum.re + turned.im};
  }
  return (const vec *)fft(plan, work, work + apart(plan->n));
}
