/* The orthonormal DCT-II and its inverse along rows. */
#include "fft.h"
#include <stdlib.h>

/* V, the FFT of the reordered row, from that of its pairs, Z, h = n / 2:
   2 V[k] = Z[k] + conj Z[h - k] - i w^k (Z[k] - conj Z[h - k]);  z[k] = s_k Re(e^(-i pi k / 2 n) V[k]), z[n - k] likewise.
   Where V[k] is sum - i turned, V[h - k] is conj sum - i conj turned. */
void forward(const Plan *plan, const float *const x[LANES], vec *z, cvec *work) {
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

/* Z[k] = V[k] + conj V[h - k] +
   i w^-k (V[k] - conj V[h - k]), whose inverse FFT has the pairs. Where Z[k] is sum + i turned, Z[h - k] is conj sum + i conj
   turned. The inverse FFT is the forward one with real and imaginary parts exchanged, before and after. */
const vec *backward(const Plan *plan, const vec *u, cvec *work) {
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

INLINE const float *row_of(const float *x, int64_t ldx, int64_t m, int64_t row) { return row < m ? x + row * ldx : NULL; }

/* y = the transform of x, LANES rows after LANES. Returns 0 if memory is short. */
static int transform(const int inverse, const Plan *plan, int64_t m, const float *x, int64_t ldx, float *y, int64_t ldy) {
  const int64_t n = plan->n;
  int done = 1;
#pragma omp parallel if (m > LANES) reduction(&& : done)
  {
    cvec *work = allocate(n);
    done = work != NULL;
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < m; first += LANES) {
      const float *from[LANES];
      float *to[LANES];
      if (!work) continue;
      for (int64_t i = 0; i < LANES; i++) {
        from[i] = row_of(x, ldx, m, first + i);
        to[i] = (float *)row_of(y, ldy, m, first + i);
      }
      vec *numbers = numbers_in(work, n);
      if (inverse) {
        gather(0, n, from, numbers);
        scatter(1, 0, n, backward(plan, numbers, work), to);
      } else {
        forward(plan, from, numbers, work);
        scatter(0, 0, n, numbers, to);
      }
    }
    free(work);
  }
  return done;
}

/* z = C x. x, z: (m, n), rows ldx and ldz apart. */
int dct(int64_t m, const Plan *plan, const float *x, int64_t ldx, float *z, int64_t ldz) {
  return transform(0, plan, m, x, ldx, z, ldz);
}

/* y = C^T u. */
int inverse_dct(int64_t m, const Plan *plan, const float *u, int64_t ldu, float *y, int64_t ldy) {
  return transform(1, plan, m, u, ldu, y, ldy);
}

int64_t largest_radix(void) { return LARGEST_RADIX; }
