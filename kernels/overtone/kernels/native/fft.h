/* The complex FFT of LANES signals at once.

   Each number of the textbook is a vector here, one signal a lane: lanes never meet, so a signal's result does not depend on its
   neighbours. Stockham's algorithm, decimating in frequency: no reordering at its end. */
#pragma once
#include "lanes.h"

#define LARGEST_RADIX 31

INLINE cvec add(cvec a, cvec b) { return (cvec){a.re + b.re, a.im + b.im}; }
INLINE cvec subtract(cvec a, cvec b) { return (cvec){a.re - b.re, a.im - b.im}; }
INLINE cvec times(cvec a, vec re, vec im) { return (cvec){a.re * re - a.im * im, a.re * im + a.im * re}; }
INLINE cvec over_i(cvec a) { return (cvec){a.im, -a.re}; }
INLINE cvec conjugate(cvec a) { return (cvec){a.re, -a.im}; }

INLINE void butterfly2(const cvec *a, cvec *b) {
  b[0] = add(a[0], a[1]);
  b[1] = subtract(a[0], a[1]);
}

INLINE void butterfly4(const cvec *a, cvec *b) {
  const cvec even = add(a[0], a[2]), odd = add(a[1], a[3]);
  const cvec low = subtract(a[0], a[2]), high = over_i(subtract(a[1], a[3]));
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

/* Odd r, by sums and differences of the pairs a[j], a[r - j]: b[k], b[r - k] = a[0] + sum_j cos (a[j] + a[r - j]) -+ i sum_j
   sin (a[j] - a[r - j]) at 2 pi j k / r. step: n / r. */
INLINE void butterfly_odd(const int64_t radix, const float *roots, int64_t step, const cvec *a, cvec *b) {
  cvec sums[LARGEST_RADIX / 2 + 1], apart[LARGEST_RADIX / 2 + 1];
  b[0] = a[0];
#pragma GCC unroll 4
  for (int64_t j = 1; j <= radix / 2; j++) {
    sums[j] = add(a[j], a[radix - j]);
    apart[j] = over_i(subtract(a[j], a[radix - j]));
    b[0] = add(b[0], sums[j]);
  }
#pragma GCC unroll 4
  for (int64_t k = 1; k <= radix / 2; k++) {
    cvec even = a[0], odd = {(vec){0}, (vec){0}};
#pragma GCC unroll 4
    for (int64_t j = 1; j <= radix / 2; j++) {
      const float *root = roots + 2 * (j * k % radix * step);
      even = (cvec){even.re + root[0] * sums[j].re, even.im + root[0] * sums[j].im};
      odd = (cvec){odd.re - root[1] * apart[j].re, odd.im - root[1] * apart[j].im};
    }
    b[k] = add(even, odd);
    b[radix - k] = subtract(even, odd);
  }
}

INLINE void butterfly(const int64_t radix, const Plan *plan, const cvec *a, cvec *b) {
  if (radix == 2) butterfly2(a, b);
  else if (radix == 4) butterfly4(a, b);
  else if (radix == 8) butterfly8(a, b);
  else butterfly_odd(radix, plan->roots, plan->n / radix, a, b);
}

/* One pass of the FFT of size h = n / 2, w = exp(-2 pi i / h), m = h / (r s), r the radix:
   y[q + s (r p + k)] = w^(s p k) sum_j x[q + s (p + m j)] w^(j k h / r). The last one has m = 1: its factors are 1. */
INLINE void pass(const int64_t radix, const int last, const Plan *plan, int64_t s, const cvec *restrict x, cvec *restrict y) {
  const int64_t m = plan->n / 2 / (radix * s);
  for (int64_t p = 0; p < m; p++) {
    const float *root = plan->roots;
    const cvec *from = x + s * p;
    cvec *to = y + s * radix * p;
    vec re[LARGEST_RADIX], im[LARGEST_RADIX];
    if (!last)
#pragma GCC unroll 8
      for (int64_t k = 1; k < radix; k++) {
        root += 4 * s * p;
        re[k] = all(root[0]);
        im[k] = all(root[1]);
      }
    for (int64_t q = 0; q < s; q++) {
      cvec a[LARGEST_RADIX], b[LARGEST_RADIX];
#pragma GCC unroll 8
      for (int64_t j = 0; j < radix; j++) a[j] = from[q + s * m * j];
      butterfly(radix, plan, a, b);
      to[q] = b[0];
#pragma GCC unroll 8
      for (int64_t k = 1; k < radix; k++) to[q + s * k] = last ? b[k] : times(b[k], re[k], im[k]);
    }
  }
}

INLINE void pass_of(int64_t radix, const int last, const Plan *plan, int64_t s, const cvec *x, cvec *y) {
  switch (radix) {
    case 2: pass(2, last, plan, s, x, y); break;
    case 3: pass(3, last, plan, s, x, y); break;
    case 4: pass(4, last, plan, s, x, y); break;
    case 5: pass(5, last, plan, s, x, y); break;
    case 7: pass(7, last, plan, s, x, y); break;
    case 8: pass(8, last, plan, s, x, y); break;
    default: pass(radix, last, plan, s, x, y);
  }
}

/* Forward FFT of size n / 2; the result is in the one returned of x and y. */
static cvec *fft(const Plan *plan, cvec *x, cvec *y) {
  int64_t s = 1;
  for (int64_t i = 0; i < plan->count; i++) {
    const int64_t radix = plan->factors[i];
    if (i + 1 < plan->count) pass_of(radix, 0, plan, s, x, y);
    else pass_of(radix, 1, plan, s, x, y);
    s *= radix;
    cvec *other = x;
    x = y;
    y = other;
  }
  return x;
}
