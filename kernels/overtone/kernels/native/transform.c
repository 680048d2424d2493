/* The orthonormal DCT-II, the orthonormal real DFT, and their inverses along rows. */
#include "fft.h"
#include <stdlib.h>

/* z[k] and z[n - k] of a DCT, k <= n / 2. twice: 2 V[k]. */
INLINE void put_cosines(const Plan *plan, int64_t k, cvec twice, vec *z) {
  const float *at = plan->phases + 2 * k;
  z[k] = at[0] * twice.re + at[1] * twice.im;
  if (k && 2 * k < plan->n) z[plan->n - k] = at[1] * twice.re - at[0] * twice.im;
}

INLINE void put_fourier(const Plan *plan, int64_t k, cvec twice, vec *z) {
  const float scale = 0.5f * plan->phases[0];
  z[k] = scale * twice.re;
  z[plan->n / 2 + 1 + k] = scale * twice.im;
}

/* V, the FFT of the row, for a DCT of the reordered one, from that of its pairs, Z, h = n / 2:
   2 V[k] = Z[k] + conj Z[h - k] - i w^k (Z[k] - conj Z[h - k]);  for a DCT z[k] = s_k Re(e^(-i pi k / 2 n) V[k]), z[n - k] likewise.
   Where V[k] is sum - i turned, V[h - k] is conj sum - i conj turned. */
INLINE void forward_by(const int dft, const Plan *plan, const float *const x[LANES], vec *z, cvec *work) {
  const int64_t n = plan->n, half = n / 2;
  const float *roots = plan->roots;
  gather(!dft, n, x, (vec *)work);
  const cvec *found = fft(plan, work, work + apart(n));
  for (int64_t k = 0; k <= half / 2; k++) {
    const cvec a = found[k], b = conjugate(found[k ? half - k : 0]);
    const cvec sum = add(a, b), turned = times(subtract(a, b), all(roots[2 * k]), all(roots[2 * k + 1]));
    const cvec low = add(sum, over_i(turned)), high = add(conjugate(sum), over_i(conjugate(turned)));
    if (dft) put_fourier(plan, k, low, z);
    else put_cosines(plan, k, low, z);
    if (2 * k == half) break;
    if (dft) put_fourier(plan, half - k, high, z);
    else put_cosines(plan, half - k, high, z);
  }
}

void forward(const Plan *plan, const float *const x[LANES], vec *z, cvec *work) {
  if (is_dft(plan)) forward_by(1, plan, x, z, work);
  else forward_by(0, plan, x, z, work);
}

/* V[k], for a DCT by symmetry from u[k] and u[n - k]; all of it is 1 / n of what the FFT would give. The ends of a DFT are real: what
   u says of their imaginary parts does not count. */
INLINE cvec spectrum_at(const int dft, const Plan *plan, const vec *u, int64_t k) {
  if (dft) {
    const float scale = plan->phases[0];
    const int64_t half = plan->n / 2;
    return (cvec){scale * u[k], k && k < half ? scale * u[half + 1 + k] : (vec){0}};
  }
  const float c = plan->phases[2 * k], s = plan->phases[2 * k + 1];
  if (!k) return (cvec){2 * c * u[0], (vec){0}};
  const vec a = u[k], b = u[plan->n - k];
  return (cvec){c * a + s * b, s * a - c * b};
}

/* Z[k] = V[k] + conj V[h - k] +
   i w^-k (V[k] - conj V[h - k]), whose inverse FFT has the pairs. Where Z[k] is sum + i turned, Z[h - k] is conj sum + i conj
   turned. The inverse FFT is the forward one with real and imaginary parts exchanged, before and after. */
INLINE const vec *backward_by(const int dft, const Plan *plan, const vec *u, cvec *work) {
  const int64_t half = plan->n / 2;
  for (int64_t k = 0; k <= half / 2; k++) {
    const cvec a = spectrum_at(dft, plan, u, k), b = conjugate(spectrum_at(dft, plan, u, half - k));
    const cvec sum = add(a, b);
    const cvec turned = times(subtract(a, b), all(plan->roots[2 * k]), all(-plan->roots[2 * k + 1]));
    work[k] = (cvec){sum.im + turned.re, sum.re - turned.im};
    if (k) work[half - k] = (cvec){turned.re - sum.im, sum.re + turned.im};
  }
  return (const vec *)fft(plan, work, work + apart(plan->n));
}

const vec *backward(const Plan *plan, const vec *u, cvec *work) {
  return is_dft(plan) ? backward_by(1, plan, u, work) : backward_by(0, plan, u, work);
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
        gather(0, plan->coefficients, from, numbers);
        scatter_result(plan, 0, backward(plan, numbers, work), to);
      } else {
        forward(plan, from, numbers, work);
        scatter(AS_IT_IS, 0, plan->coefficients, numbers, to);
      }
    }
    free(work);
  }
  return done;
}

/* z = F x. x: (m, n), z: (m, coefficients), rows ldx and ldz apart. */
int analyse(int64_t m, const Plan *plan, const float *x, int64_t ldx, float *z, int64_t ldz) {
  return transform(0, plan, m, x, ldx, z, ldz);
}

/* y = F^-1 u. u: (m, coefficients), y: (m, n). */
int synthesise(int64_t m, const Plan *plan, const float *u, int64_t ldu, float *y, int64_t ldy) {
  return transform(1, plan, m, u, ldu, y, ldy);
}

int64_t largest_radix(void) { return LARGEST_RADIX; }
