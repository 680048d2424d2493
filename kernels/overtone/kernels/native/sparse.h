/* The sparse core of an adapter. */
#pragma once
#include "vector.h"

#define LINE 16   /* numbers in a line of the cache */
#define STREAMS 4 /* places of a core that are read at once: entries of one row follow each other, and each waits for the last */

/* n entries: K[rows[e], cols[e]] = values[e]. */
typedef struct {
  const int32_t *rows, *cols;
  const float *values;
  int64_t entries;
} Core;

static const Core none __attribute__((unused)) = {NULL, NULL, NULL, 0};

/* Asks for line `start / LINE` of a core that is read afterwards. */
INLINE void fetch(const Core *next, int64_t start) {
  if (start >= next->entries) return;
  __builtin_prefetch(next->rows + start);
  __builtin_prefetch(next->cols + start);
  __builtin_prefetch(next->values + start);
}

/* u = K z: ENTRY(e) for each entry e, in an order that the core alone decides. next: what is read afterwards. */
#define FOR_ENTRIES(core, next, ENTRY) \
  do { \
    const int64_t part = (core)->entries / STREAMS; \
    for (int64_t at = 0; at < part; at++) { \
      if (at % (LINE / STREAMS) == 0) fetch(next, at * STREAMS); \
      _Pragma("GCC unroll 4") for (int64_t stream = 0; stream < STREAMS; stream++) ENTRY(stream * part + at); \
    } \
    for (int64_t e = STREAMS * part; e < (core)->entries; e++) ENTRY(e); \
  } while (0)

/* One row; its numbers are `apart` apart. */
INLINE void apply_row(const int apart, const Core *core, const Core *next, const float *z, float *u) {
#define ENTRY(e) u[core->rows[e] * apart] += core->values[e] * z[core->cols[e] * apart]
  FOR_ENTRIES(core, next, ENTRY);
#undef ENTRY
}
