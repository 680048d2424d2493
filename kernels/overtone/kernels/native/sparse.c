/* u[t] = K_t z[t]: each row of a batch by the sparse core of its own adapter. Nothing is copied when a core comes or goes: the
   batch is a table of addresses. */
#include "vector.h"

#define LINE 16    /* numbers in a line of the cache */
#define TOGETHER 4 /* rows of one core that share what is read of it */

/* n entries: K[rows[e], cols[e]] = values[e]. */
typedef struct {
  const int32_t *rows, *cols;
  const float *values;
  int64_t entries;
} Core;

/* next: what is read afterwards; its memory is asked for meanwhile, a line for a line. */
INLINE void apply(const int count, const Core *core, const Core *next, const float *z, int64_t ldz, float *u, int64_t ldu) {
  for (int64_t start = 0; start < core->entries; start += LINE) {
    const int64_t stop = core->entries - start < LINE ? core->entries : start + LINE;
    if (start < next->entries) {
      __builtin_prefetch(next->rows + start);
      __builtin_prefetch(next->cols + start);
      __builtin_prefetch(next->values + start);
    }
    for (int64_t e = start; e < stop; e++) {
      const int64_t row = core->rows[e], col = core->cols[e];
      const float value = core->values[e];
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) u[i * ldu + row] += value * z[i * ldz + col];
    }
  }
}

/* cores: (m), entries == 0 where u[t] = 0; z: (m, q), rows ldz apart; u: (m, p), contiguous. */
void sparse_rows(int64_t m, int64_t p, const Core *cores, const float *z, int64_t ldz, float *u) {
#pragma omp parallel for schedule(dynamic) if (m > 1)
  for (int64_t first = 0; first < m; first += TOGETHER) {
    const int64_t count = m - first < TOGETHER ? m - first : TOGETHER;
    const Core *core = cores + first;
    const float *from = z + first * ldz;
    float *to = u + first * p;
    __builtin_memset(to, 0, (size_t)(count * p) * sizeof(float));
    int same = count == TOGETHER;
    for (int64_t i = 1; i < count; i++) same = same && core[i].values == core->values && core[i].entries == core->entries;
    const int64_t after = first + 2 * TOGETHER < m ? first + TOGETHER : first; /* a guess at this thread's next rows */
    if (same) apply(TOGETHER, core, cores + after, from, ldz, to, p);
    else
      for (int64_t i = 0; i < count; i++)
        apply(1, core + i, i + 1 < count ? core + i + 1 : cores + after, from + i * ldz, ldz, to + i * p, p);
  }
}
