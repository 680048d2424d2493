/* The orthonormal DCT-II and its inverse along rows, LANES rows at once.

   Each number of the textbook is a vector here, one row a lane: lanes never meet, so a row's result does not depend on its
   neighbours. The transform follows from a real FFT after J. Makhoul, "A fast cosine transform in one and two dimensions",
   IEEE Trans. ASSP 28 (1980), that from a complex one of half the size, and that is Stockham's, decimating in frequency: no
   reordering at its end. */
#include "vector.h"
#include <stdlib.h>

#define LARGEST_RADIX 32

typedef struct { vec re, im; } cvec;

/* n: size, even; factors: of n / 2, `count` of them, each at most LARGEST_RADIX; roots: (n, 2), exp(-2 pi i k / n); phases:
   (n, 2), s_k / 2 times cos and sin of pi k / 2 n, s_0 = sqrt(1 / n), else s_k = sqrt(2 / n). */
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

/* One pass of the FFT of size h = n / 2, w = exp(-2 pi i / h), m = h / (r s), r the radix:
   y[q + s (r p + k)] = w^(s p k) sum_j x[q + s (p + m j)] w^(j k h / r). */
INLINE void pass(const int64_t radix, const int fixed, const Plan *plan, int64_t s, const cvec *x, cvec *y) {
  const int64_t m = plan->n / 2 / (radix * s);
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
        const float *root = plan->roots + 2 * (2 * s * p * k);
        y[q + s * (radix * p + k)] = times(b[k], root[0], root[1]);
      }
    }
}

/* Forward FFT of size n / 2; the result is in the one returned of x and y. */
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

/* `count` rows (at most LANES) into lanes, zeros for missing ones; reordered: number j to place(j). */
INLINE void gather(const int reordered, int64_t n, int64_t count, const float *x, int64_t ldx, float *to) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    vec block[LANES];
    for (int row = 0; row < LANES; row++) block[row] = row < count ? load(x + row * ldx + j) : (vec){0};
    transpose(block);
    for (int i = 0; i < LANES; i++) store(to + (reordered ? place(j + i, n) : j + i) * LANES, block[i]);
  }
  for (; j < n; j++)
    for (int row = 0; row < LANES; row++)
      to[(reordered ? place(j, n) : j) * LANES + row] = row < count ? x[row * ldx + j] : 0.0f;
}

/* What becomes of the rows that leave the lanes. */
typedef struct {
  float *y;            /* rows ldy apart */
  int64_t ldy;
  const int64_t *rows; /* where each goes, or NULL: 0, 1, ... */
  int64_t adds;
} Target;

/* `count` rows, from row `first` on, out of lanes; reordered: number j from place(j), its pair exchanged. */
INLINE void scatter(const int reordered, int64_t n, int64_t first, int64_t count, const float *from, const Target *to) {
  for (int64_t j = 0; j < n; j += LANES) {
    const int64_t columns = n - j < LANES ? n - j : LANES;
    vec block[LANES];
    for (int i = 0; i < LANES; i++)
      block[i] = i < columns ? load(from + (reordered ? place(j + i, n) ^ 1 : j + i) * LANES) : (vec){0};
    transpose(block);
    for (int64_t row = first; row < first + count; row++) {
      float *y = to->y + (to->rows ? to->rows[row] : row) * to->ldy + j;
      const vec numbers = block[row - first];
      if (columns == LANES) {
        store(y, to->adds ? load(y) + numbers : numbers);
      } else
        for (int64_t i = 0; i < columns; i++) {
          y[i] = to->adds ? y[i] + numbers[i] : numbers[i];
        }
    }
  }
}

/* The two buffers of the FFT are this far apart: a multiple of 4096 bytes would make every store hide a load. */
INLINE int64_t apart(int64_t n) { return n / 2 + 3; }

/* z = C x of at most LANES rows, from row `first` on. V, the FFT of the reordered row, from that of its pairs, Z, h = n / 2:
   2 V[k] = Z[k] + conj Z[h - k] - i w^k (Z[k] - conj Z[h - k]);  z[k] = s_k Re(e^(-i pi k / 2 n) V[k]), z[n - k] likewise. */
static void forward(const Plan *plan, int64_t first, int64_t count, const float *x, int64_t ldx, const Target *to, cvec *work) {
  const int64_t n = plan->n, half = n / 2;
  gather(1, n, count, x + first * ldx, ldx, (float *)work);
  const cvec *found = fft(plan, work, work + apart(n));
  vec *result = (vec *)(found == work ? work + apart(n) : work);
  for (int64_t k = 0; k <= half; k++) {
    const cvec a = found[k % half], b = found[(half - k) % half];
    const cvec sum = {a.re + b.re, a.im - b.im}, apart = {a.re - b.re, a.im + b.im};
    const cvec v = add(sum, over_i(times(apart, plan->roots[2 * k], plan->roots[2 * k + 1])));
    const float c = plan->phases[2 * k], s = plan->phases[2 * k + 1];
    result[k] = c * v.re + s * v.im;
    if (k && k < half) result[n - k] = s * v.re - c * v.im;
  }
  scatter(0, n, first, count, (const float *)result, to);
}

/* V[k], by symmetry from u[k] and u[n - k]; all of it is 1 / n of what the FFT would give. */
INLINE cvec spectrum_at(const Plan *plan, const vec *u, int64_t k) {
  const float c = plan->phases[2 * k], s = plan->phases[2 * k + 1];
  if (!k) return (cvec){2 * c * u[0], (vec){0}};
  const vec a = u[k], b = u[plan->n - k];
  return (cvec){c * a + s * b, s * a - c * b};
}

/* C^T u of the same. Z[k] = V[k] + conj V[h - k] + i w^-k (V[k] - conj V[h - k]), whose inverse FFT has the pairs. */
static void backward(const Plan *plan, int64_t first, int64_t count, const float *u, int64_t ldu, const Target *to, cvec *work) {
  const int64_t n = plan->n, half = n / 2;
  gather(0, n, count, u + first * ldu, ldu, (float *)work);
  cvec *spectrum = work + apart(n);
  for (int64_t k = 0; k < half; k++) {
    const cvec a = spectrum_at(plan, (const vec *)work, k), b = spectrum_at(plan, (const vec *)work, half - k);
    const cvec sum = {a.re + b.re, a.im - b.im}, apart = {a.re - b.re, a.im + b.im};
    const cvec turned = times(apart, plan->roots[2 * k], -plan->roots[2 * k + 1]);
    /* The inverse FFT is the forward one with real and imaginary parts exchanged, before and after. */
    spectrum[k] = (cvec){sum.im + turned.re, sum.re - turned.im};
  }
  scatter(1, n, first, count, (const float *)fft(plan, spectrum, work), to);
}

/* All rows, LANES after LANES. Returns 0 if memory is short. */
static int transform(const int inverse, const Plan *plan, int64_t m, const float *x, int64_t ldx, const Target *to) {
  int done = 1;
#pragma omp parallel if (m > LANES) reduction(&& : done)
  {
    cvec *work = aligned_alloc(64, ((size_t)(plan->n / 2 + apart(plan->n) + 1) * sizeof(cvec) + 63) / 64 * 64);
    done = work != NULL;
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < m; first += LANES) {
      const int64_t count = m - first < LANES ? m - first : LANES;
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
  const Target to = {z, ldz, NULL, 0};
  return transform(0, &plan, m, x, ldx, &to);
}

/* y[rows[i]] += C^T u[i] if `adds`, else y[rows[i]] = that. u: (m, n); rows: (m), different, or NULL: 0, 1, ... */
int inverse_dct(int64_t m, int64_t n, int64_t count, const int64_t *factors, const float *roots, const float *phases,
                const float *u, int64_t ldu, const int64_t *rows, int64_t adds, float *y, int64_t ldy) {
  const Plan plan = {n, count, factors, roots, phases};
  const Target to = {y, ldy, rows, adds};
  return transform(1, &plan, m, u, ldu, &to);
}

int64_t largest_radix(void) { return LARGEST_RADIX; }
