/* y = z + x W^T: a matrix of activations times a frozen weight.

   The weight lies in panels of COLUMNS outputs: (panels, q, COLUMNS), zeros beyond the last output. Each sum runs over q in
   ascending order, in parts of DEPTH, whatever the number of rows: a row's result does not depend on its neighbours. */
#include "vector.h"

#define DEPTH 2048   /* of a panel that stays in the second-level cache */
#define ROW_BLOCK 240 /* rows that stay there meanwhile; a multiple of ROWS */

/* rows x (COLUMN_VECTORS * panels) sums in registers. z == NULL: zero. */
INLINE void tile(const int rows, const int panels, int64_t depth, const float *x, int64_t ldx, const float *w,
                 int64_t panel, const float *z, int64_t ldz, float *y, int64_t ldy) {
  vec sums[rows][panels][COLUMN_VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
    for (int c = 0; c < panels; c++)
#pragma GCC unroll 16
      for (int v = 0; v < COLUMN_VECTORS; v++) sums[i][c][v] = (vec){0};
  for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 16
    for (int c = 0; c < panels; c++) {
      vec b[COLUMN_VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < COLUMN_VECTORS; v++) b[v] = load(w + c * panel + k * COLUMNS + v * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        float a = x[i * ldx + k];
#pragma GCC unroll 16
        for (int v = 0; v < COLUMN_VECTORS; v++) sums[i][c][v] += a * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
    for (int c = 0; c < panels; c++)
#pragma GCC unroll 16
      for (int v = 0; v < COLUMN_VECTORS; v++) {
        int64_t at = c * COLUMNS + v * LANES;
        store(y + i * ldy + at, z ? load(z + i * ldz + at) + sums[i][c][v] : sums[i][c][v]);
      }
}

/* One panel, at most ROWS rows. */
static void strip(int64_t rows, int64_t depth, const float *x, int64_t ldx, const float *w, const float *z, int64_t ldz,
                  float *y, int64_t ldy) {
#define CASE(n) case n: tile(n, 1, depth, x, ldx, w, 0, z, ldz, y, ldy); break;
  switch (rows) {
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
    CASE(7) CASE(8)
#endif
#if ROWS > 8
    CASE(9) CASE(10) CASE(11) CASE(12)
#endif
  }
#undef CASE
}

/* At most three rows of several panels, which are `panel` apart. */
static void strips(int64_t rows, int64_t depth, const float *x, int64_t ldx, const float *w, int64_t panel, const float *z,
                   int64_t ldz, float *y, int64_t ldy) {
  switch (rows) {
    case 1: tile(1, 4, depth, x, ldx, w, panel, z, ldz, y, ldy); break;
    case 2: tile(2, 2, depth, x, ldx, w, panel, z, ldz, y, ldy); break;
    case 3: tile(3, 2, depth, x, ldx, w, panel, z, ldz, y, ldy); break;
  }
}

/* The last panel, of which only `columns` are outputs. */
static void narrow(int64_t columns, int64_t rows, int64_t depth, const float *x, int64_t ldx, const float *w,
                   const float *z, int64_t ldz, float *y, int64_t ldy) {
  float found[ROWS * COLUMNS];
  strip(rows, depth, x, ldx, w, NULL, 0, found, COLUMNS);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) y[i * ldy + j] = (z ? z[i * ldz + j] : 0.0f) + found[i * COLUMNS + j];
}

/* Rows [0, m) of one panel, in strips of like height. */
static void panel_rows(int64_t m, int64_t columns, int64_t depth, const float *x, int64_t ldx, const float *w,
                       const float *z, int64_t ldz, float *y, int64_t ldy) {
  int64_t strips = (m + ROWS - 1) / ROWS;
  for (int64_t left = strips, at = 0; left; left--) {
    int64_t rows = (m - at + left - 1) / left;
    const float *from = z ? z + at * ldz : NULL;
    if (columns >= COLUMNS)
      strip(rows, depth, x + at * ldx, ldx, w, from, ldz, y + at * ldy, ldy);
    else
      narrow(columns, rows, depth, x + at * ldx, ldx, w, from, ldz, y + at * ldy, ldy);
    at += rows;
  }
}

/* x: (m, q), rows ldx apart; w: panels of p outputs; z: (m, p), rows ldz apart (0: the same for all), or NULL; y: (m, p). */
void product(int64_t m, int64_t p, int64_t q, const float *x, int64_t ldx, const float *w, const float *z, int64_t ldz,
             float *y, int64_t ldy) {
  const int64_t panels = (p + COLUMNS - 1) / COLUMNS, blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK;
  /* Few rows wait for memory: several panels at once, so that it gives more. */
  const int64_t wide = m == 1 ? 4 : m <= 3 ? 2 : 1, jobs = (panels + wide - 1) / wide;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t job = 0; job < jobs; job++) {
      const int64_t row = block * ROW_BLOCK, rows = m - row < ROW_BLOCK ? m - row : ROW_BLOCK;
      const int64_t first = job * wide, last = first + wide < panels ? first + wide : panels;
      for (int64_t k = 0; k < q; k += DEPTH) {
        const int64_t depth = q - k < DEPTH ? q - k : DEPTH;
        const float *from = k ? y : z;
        const int64_t ldf = k ? ldy : ldz;
        const float *panel = w + (first * q + k) * COLUMNS;
        const int64_t column = first * COLUMNS;
        if (wide > 1 && p - column >= wide * COLUMNS)
          strips(m, depth, x + k, ldx, panel, q * COLUMNS, from ? from + column : NULL, ldf, y + column, ldy);
        else for (int64_t c = first; c < last; c++)
          panel_rows(rows, p - c * COLUMNS, depth, x + row * ldx + k, ldx, w + (c * q + k) * COLUMNS,
                     from ? from + row * ldf + c * COLUMNS : NULL, ldf, y + row * ldy + c * COLUMNS, ldy);
      }
    }
}

/* Into panels of COLUMNS, zeros beyond p. weight: (p, q), contiguous. */
void pack(int64_t p, int64_t q, const float *weight, float *panels) {
  const int64_t count = (p + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for
  for (int64_t c = 0; c < count; c++)
    for (int64_t k = 0; k < q; k++)
      for (int64_t j = 0; j < COLUMNS; j++) {
        const int64_t row = c * COLUMNS + j;
        panels[(c * q + k) * COLUMNS + j] = row < p ? weight[row * q + k] : 0.0f;
      }
}

int64_t columns(void) { return COLUMNS; }
