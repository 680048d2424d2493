/* The orthonormal DCT-II and its inverse along rows, by a complex FFT that transforms 2 LANES rows at once.

   Each number of the textbook is a vector here, one row a lane; one half of the rows are the real parts, the other half the
   imaginary ones, and the two are told apart by symmetry afterwards. The FFT is Stockham's, decimating in frequency: no
   reordering at its end. The DCT follows from it after J. Makhoul, "A fast cosine transform in one and two dimensions", IEEE
   Trans. ASSP 28 (1980). A row's result does not depend on its neighbours: lanes never meet. */
#include "vector.h"
#include <stdlib.h>

#define GROUP (2 * LANES)
#define LARGEST_RADIX 64

typedef struct { vec re, im; } cvec;

/* n: size; factors: of n, `count` of them, each at most LARGEST_RADIX; roots: (n, 2), exp(-2 pi i k / n); phases: (n, 2),
   s_k / 2 times cos and sin of pi k / 2 n, s_0 = sqrt(1 / n), else s_k = sqrt(2 / n). */
typedef struct {
  int64_t n, count;
  const int64_t *factors;
  const float *roots, *phases;
} Plan;

INLINE cvec add(cvec a, cvec b) { return (cvec){a.re + b.re, a.im + b.im}; }
INLINE cvec subtract(cvec a, cvec b) { return (cvec){a.re - b.re, a.im - b.im}; }
INLINE cvec times(cvec a, float re, float im) { return (cvec){a.re * re - a.im * im, a.re * im + a.im * re}; }
INLINE cvec over_i(cvec a) { return (cvec){a.im, -a.re}; }

INLINE void butterfly2(const cvec *a, cvec *b) {
  b[0] = add(a[0], a[1]);
  b[1] = subtract(a[0], a[1]);
}

INLINE void butterfly3(const cvec *a, cvec *b) {
  const float half_root3 = 0.866025403784438647f;
  cvec sum = add(a[1], a[2]), apart = over_i(subtract(a[1], a[2]));
  cvec middle = {a[0].re - 0.5f * sum.re, a[0].im - 0.5f * sum.im};
  apart = (cvec){half_root3 * apart.re, half_root3 * apart.im};
  b[0] = add(a[0], sum);
  b[1] = add(middle, apart);
  b[2] = subtract(middle, apart);
}

INLINE void butterfly4(const cvec *a, cvec *b) {
  cvec even = add(a[0], a[2]), odd = add(a[1], a[3]);
  cvec low = subtract(a[0], a[2]), high = over_i(subtract(a[1], a[3]));
  b[0] = add(even, odd);
  b[1] = add(low, high);
  b[2] = subtract(even, odd);
  b[3] = subtract(low, high);
}

INLINE void butterfly8(const cvec *a, cvec *b) {
  const float half_root2 = 0.707106781186547524f;
  const cvec even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
  cvec e[4], o[4];
  butterfly4(even, e);
  butterfly4(odd, o);
  o[1] = (cvec){half_root2 * (o[1].re + o[1].im), half_root2 * (o[1].im - o[1].re)};
  o[2] = over_i(o[2]);
  o[3] = (cvec){half_root2 * (o[3].im - o[3].re), -half_root2 * (o[3].re + o[3].im)};
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    b[k] = add(e[k], o[k]);
    b[k + 4] = subtract(e[k], o[k]);
  }
}

/* Any radix: its own small transform, by the definition. step: n / radix. */
static void butterfly(int64_t radix, const Plan *plan, const cvec *a, cvec *b) {
  const int64_t step = plan->n / radix;
  for (int64_t k = 0; k < radix; k++) {
    cvec total = a[0];
    for (int64_t j = 1; j < radix; j++) {
      const float *root = plan->roots + 2 * (j * k % radix * step);
      total = add(total, times(a[j], root[0], root[1]));
    }
    b[k] = total;
  }
}

/* One pass: y[q + s (r p + k)] = w^(s p k) sum_j x[q + s (p + m j)] w^(j k n / r), w = exp(-2 pi i / n), m = n / (r s). */
INLINE void pass(const int64_t radix, const int fixed, const Plan *plan, int64_t s, const cvec *x, cvec *y) {
  const int64_t m = plan->n / (radix * s);
  cvec a[fixed ? fixed : LARGEST_RADIX], b[fixed ? fixed : LARGEST_RADIX];
  for (int64_t p = 0; p < m; p++)
    for (int64_t q = 0; q < s; q++) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < radix; j++) a[j] = x[q + s * (p + m * j)];
      if (fixed == 2) butterfly2(a, b);
      else if (fixed == 3) butterfly3(a, b);
      else if (fixed == 4) butterfly4(a, b);
      else if (fixed == 8) butterfly8(a, b);
      else butterfly(radix, plan, a, b);
      y[q + s * radix * p] = b[0];
#pragma GCC unroll 8
      for (int64_t k = 1; k < radix; k++) {
        const float *root = plan->roots + 2 * (s * p * k);
        y[q + s * (radix * p + k)] = times(b[k], root[0], root[1]);
      }
    }
}

/* Forward FFT of x; the result is in the one returned of x and y. */
static cvec *fft(const Plan *plan, cvec *x, cvec *y) {
  int64_t s = 1;
  for (int64_t i = 0; i < plan->count; i++) {
    const int64_t radix = plan->factors[i];
    switch (radix) {
      case 2: pass(2, 2, plan, s, x, y); break;
      case 3: pass(3, 3, plan, s, x, y); break;
      case 4: pass(4, 4, plan, s, x, y); break;
      case 8: pass(8, 8, plan, s, x, y); break;
      default: pass(radix, 0, plan, s, x, y);
    }
    s *= radix;
    cvec *other = x;
    x = y;
    y = other;
  }
  return x;
}

/* Where Makhoul puts number j of a row: even ones ascending, then odd ones descending. */
INLINE int64_t place(int64_t j, int64_t n) { return j % 2 ? n - 1 - j / 2 : j / 2; }

/* `count` rows (at most LANES) into the lanes of every second vector from `to` on, zeros for missing ones; reordered: number
   j to place(j). */
INLINE void gather_half(const int reordered, int64_t n, int64_t count, const float *x, int64_t ldx, float *to) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    vec block[LANES];
    for (int row = 0; row < LANES; row++) block[row] = row < count ? load(x + row * ldx + j) : (vec){0};
    transpose(block);
    for (int i = 0; i < LANES; i++) store(to + (reordered ? place(j + i, n) : j + i) * GROUP, block[i]);
  }
  for (; j < n; j++)
    for (int row = 0; row < LANES; row++)
      to[(reordered ? place(j, n) : j) * GROUP + row] = row < count ? x[row * ldx + j] : 0.0f;
}

INLINE void gather(const int reordered, int64_t n, int64_t count, const float *x, int64_t ldx, cvec *to) {
  const int64_t half = count < LANES ? count : LANES;
  gather_half(reordered, n, half, x, ldx, (float *)to);
  gather_half(reordered, n, count - half, x + LANES * ldx, ldx, (float *)to + LANES);
}

/* What becomes of the rows that leave the lanes. */
typedef struct {
  float *y;            /* rows ldy apart */
  int64_t ldy;
  const int64_t *rows; /* where each goes, or NULL: 0, 1, ... */
  const float *gain;   /* (rows, n), or NULL */
  int64_t adds;
} Target;

/* `count` rows, from row `first` on, out of the lanes of every second vector from `from` on. */
INLINE void scatter_half(const int reordered, int64_t n, int64_t first, int64_t count, const float *from, const Target *to) {
  for (int64_t j = 0; j < n; j += LANES) {
    const int64_t columns = n - j < LANES ? n - j : LANES;
    vec block[LANES];
    for (int i = 0; i < LANES; i++)
      block[i] = i < columns ? load(from + (reordered ? place(j + i, n) : j + i) * GROUP) : (vec){0};
    transpose(block);
    for (int64_t row = first; row < first + count; row++) {
      float *y = to->y + (to->rows ? to->rows[row] : row) * to->ldy + j;
      vec numbers = block[row - first];
      if (columns == LANES) {
        if (to->gain) numbers *= load(to->gain + row * n + j);
        store(y, to->adds ? load(y) + numbers : numbers);
      } else
        for (int64_t i = 0; i < columns; i++) {
          const float number = to->gain ? numbers[i] * to->gain[row * n + j + i] : numbers[i];
          y[i] = to->adds ? y[i] + number : number;
        }
    }
  }
}

INLINE void scatter(const int reordered, const int swapped, int64_t n, int64_t first, int64_t count, const cvec *from,
                    const Target *to) {
  const int64_t half = count < LANES ? count : LANES;
  const float *lanes = (const float *)from;
  scatter_half(reordered, n, first, half, lanes + (swapped ? LANES : 0), to);
  scatter_half(reordered, n, first + half, count - half, lanes + (swapped ? 0 : LANES), to);
}

/* The two buffers of the FFT are this far apart: a multiple of 4096 bytes would make every store hide a load. */
INLINE int64_t apart(int64_t n) { return n + 3; }

/* z = C x of at most GROUP rows, from row `first` on. */
static void forward(const Plan *plan, int64_t first, int64_t count, const float *x, int64_t ldx, const Target *to, cvec *work) {
  const int64_t n = plan->n;
  gather(1, n, count, x + first * ldx, ldx, work);
  const cvec *found = fft(plan, work, work + apart(n));
  cvec *result = found == work ? work + apart(n) : work;
  for (int64_t k = 0; k < n; k++) {
    const cvec a = found[k], b = found[k ? n - k : 0];
    const float c = plan->phases[2 * k], s = plan->phases[2 * k + 1];
    result[k].re = c * (a.re + b.re) + s * (a.im - b.im);
    result[k].im = c * (a.im + b.im) - s * (a.re - b.re);
  }
  scatter(0, 0, n, first, count, result, to);
}

/* C^T u of the same. */
static void backward(const Plan *plan, int64_t first, int64_t count, const float *u, int64_t ldu, const Target *to, cvec *work) {
  const int64_t n = plan->n;
  gather(0, n, count, u + first * ldu, ldu, work);
  cvec *spectrum = work + apart(n);
  /* The inverse FFT is the forward one with real and imaginary parts exchanged, before and after. */
  spectrum[0] = (cvec){2 * plan->phases[0] * work[0].im, 2 * plan->phases[0] * work[0].re};
  for (int64_t k = 1; k < n; k++) {
    const cvec a = work[k], b = work[n - k];
    const float c = plan->phases[2 * k], s = plan->phases[2 * k + 1];
    spectrum[k].im = c * (a.re + b.im) + s * (b.re - a.im);
    spectrum[k].re = c * (a.im - b.re) + s * (a.re + b.im);
  }
  scatter(1, 1, n, first, count, fft(plan, spectrum, work), to);
}

/* All rows, a group after another. Returns 0 if memory is short. */
static int transform(const int inverse, const Plan *plan, int64_t m, const float *x, int64_t ldx, const Target *to) {
  int done = 1;
#pragma omp parallel if (m > GROUP) reduction(&& : done)
  {
    cvec *work = aligned_alloc(64, ((size_t)(plan->n + apart(plan->n)) * sizeof(cvec) + 63) / 64 * 64);
    done = work != NULL;
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < m; first += GROUP) {
      const int64_t count = m - first < GROUP ? m - first : GROUP;
      if (!work) continue;
      if (inverse) backward(plan, first, count, x, ldx, to, work);
      else forward(plan, first, count, x, ldx, to, work);
    }
    free(work);
  }
  return done;
}

/* z = C x, the orthonormal DCT-II. x, z: (m, n), rows ldx and ldz apart. For the plan see above. */
int dct(int64_t m, int64_t n, int64_t count, const int64_t *factors, const float *roots, const float *phases, const float *x,
        int64_t ldx, float *z, int64_t ldz) {
  const Plan plan = {n, count, factors, roots, phases};
  const Target to = {z, ldz, NULL, NULL, 0};
  return transform(0, &plan, m, x, ldx, &to);
}

/* y[rows[i]] += gain[i] (C^T u[i]) if `adds`, else y[rows[i]] = that. u: (m, n); rows: (m), different, or NULL: 0, 1, ...;
   gain: (m, n), contiguous, or NULL. */
int inverse_dct(int64_t m, int64_t n, int64_t count, const int64_t *factors, const float *roots, const float *phases,
                const float *u, int64_t ldu, const float *gain, const int64_t *rows, int64_t adds, float *y, int64_t ldy) {
  const Plan plan = {n, count, factors, roots, phases};
  const Target to = {y, ldy, rows, gain, adds};
  return transform(1, &plan, m, u, ldu, &to);
}
