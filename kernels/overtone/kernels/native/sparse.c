/* u[t] = K_t z[t]: each row of a batch by the sparse core of its own adapter. Nothing is copied when a core comes or goes: the
   batch is a table of addresses. */
#include "sparse.h"

/* cores: (m), entries == 0 where u[t] = 0; z: (m, q), rows ldz apart; u: (m, p), contiguous. */
void sparse_rows(int64_t m, int64_t p, const Core *cores, const float *z, int64_t ldz, float *u) {
#pragma omp parallel for schedule(static) if (m > 1)
  for (int64_t row = 0; row < m; row++) {
    __builtin_memset(u + row * p, 0, (size_t)p * sizeof(float));
    apply_row(1, cores + row, row + 1 < m ? cores + row + 1 : &none, z + row * ldz, u + row * p);
  }
}
