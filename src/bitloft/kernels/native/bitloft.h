/* The C interface of bitloft's native kernels: what kernels/cpu.py binds through ctypes.
 *
 * Rules for every function here:
 *   - returns 0, or -1 and leaves one sentence in bl_error() (per thread); sizes are checked again on this side, so a
 *     wrong size is an error and never a crash;
 *   - keeps no pointer after it returns and owns none that it was given;
 *   - uses at most `threads` threads, the caller being one of them; results do not depend on how many.
 */
#ifndef BITLOFT_H
#define BITLOFT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BL_API __attribute__((visibility("default")))
#define BL_INTERFACE 1 /* raised whenever a struct or a signature here changes; cpu.py refuses another number */

/* dtypes of activations and of decoded values */
enum { BL_F32 = 0, BL_BF16 = 1, BL_F16 = 2 };

/* flags of bl_matrix */
enum {
  BL_HALF = 1,     /* codes are fp16 values; no level table */
  BL_DQ = 2,       /* scales are 8-bit codes: low[b] + step[b] * code, b = (row * groups + group) / 256 */
  BL_TENSOR = 4,   /* one scale and one shift for the whole matrix */
  BL_ARRANGED = 8, /* codes (and scales, zeros, shifts) of every 64 rows are interleaved: see arrange.cpp */
};

/* One packed matrix: PackedTensor of packed.py, part by part. value = scale * (level[code] - zero) + shift.
 * All parts are contiguous and row-major (but see BL_ARRANGED); a part that the format lacks is NULL with 0 bytes.
 * The meaning of every part is written in formats.layout and packed.py; halves are fp16 patterns in units of
 * 2**exponent. `exponent` and `learned` are pointers, so that the struct stays true when their contents change. */
typedef struct bl_matrix {
  int64_t rows, columns;
  int64_t width;  /* columns with padding: a multiple of 8 and of the group */
  int64_t group;  /* values that share a scale; equal to width for one scale a row, a tensor or none */
  int64_t groups; /* scales stored per row; 0: none, the scale is 1 */
  int32_t bits;   /* 1, 2, 3, 4, 8, 16 */
  int32_t flags;
  const uint8_t *codes;
  int64_t codes_bytes;
  const void *scales; /* fp16, or uint8 codes under BL_DQ */
  int64_t scales_bytes;
  const uint8_t *zeros; /* integer zero points of `bits` bits, 4 where codes take 3 */
  int64_t zeros_bytes;
  const uint16_t *shifts; /* fp16 */
  int64_t shifts_bytes;
  const uint16_t *low, *step; /* fp16, one per 256 scales, under BL_DQ */
  int64_t range_bytes;        /* of each of the two */
  const float *levels;        /* the format's 2**bits levels; NULL under BL_HALF */
  const uint16_t *learned;    /* fp16 levels stored with the tensor, instead of `levels`; or NULL */
  const int32_t *exponent;
} bl_matrix;

/* ---- the library ------------------------------------------------------------------------------------------------ */

BL_API int bl_interface(void);        /* BL_INTERFACE of the library */
BL_API const char *bl_error(void);    /* what went wrong in this thread's last call that returned -1 */
BL_API const char *bl_isa(void);      /* "avx512+bf16", "avx512", "avx2" or "portable": chosen once; NULL on error */

/* Take threads from an OpenMP runtime by its GOMP_parallel (torch's own, so that two pools never compete for the same
 * cores); NULL: from this library's own pool. */
BL_API void bl_use_openmp(void *gomp_parallel);

/* Check a matrix: sizes of all parts against rows, columns and format. Every other function does so itself. */
BL_API int bl_check(const bl_matrix *matrix);

#ifdef __cplusplus
}
#endif
#endif
