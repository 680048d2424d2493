/* The orthonormal DCT-II and its inverse along rows. */
#include "lanes.h"
#include <stdlib.h>

INLINE const float *row_of(const float *x, int64_t ldx, int64_t m, int64_t row) { return row < m ? x + row * ldx : NULL; }

/* y = the transform of x, LANES rows after LANES. Returns 0 if memory is short. */
static int transform(const int inverse, const Plan *plan, int64_t m, const float *x, int64_t ldx, float *y, int64_t ldy) {
  const int64_t n = plan->n;
  int done = 1;
#pragma omp parallel if (m > LANES) reduction(&& : done)
  {
    cvec *work = aligned_alloc(64, ((size_t)room(n) * sizeof(cvec) + (size_t)n * sizeof(vec) + 63) / 64 * 64);
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
      vec *numbers = (vec *)(work + room(n));
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
