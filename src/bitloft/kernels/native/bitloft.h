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
#define BL_INTERFACE 4 /* raised whenever a struct or a signature here changes; cpu.py refuses another number */

/* dtypes of activations and of decoded values */
enum { BL_F32 = 0, BL_BF16 = 1, BL_F16 = 2 };

/* flags of bl_matrix */
enum {
  BL_HALF = 1,     /* codes are fp16 values; no level table */
  BL_DQ = 2,       /* scales are 8-bit codes: low[b] + step[b] * code, b = (row * groups + group) / 256 */
  BL_TENSOR = 4,   /* one scale and one shift for the whole matrix */
  BL_TRELLIS = 16, /* codes are those of trellis.hpp, `bits` planes a row; no levels, at most one scale a row */
  BL_COLUMNS = 32, /* with BL_TRELLIS: the codes of a column lie together, `bits` planes of ceil(rows / 8) bytes, scales as ever */
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

/* ---- encode.cpp, dequantize.cpp --------------------------------------------------------------------------------------------- */

/* Where the scale of a group comes from; what each rule is, is defined in kernels/search.py. */
enum {
  BL_GIVEN = 0,          /* there is none: levels as they are */
  BL_LARGEST = 1,        /* largest magnitude (8 bits: a 127th of it) */
  BL_MEAN = 2,           /* mean of magnitudes */
  BL_SPLIT = 3,          /* least squared error over all splits of the magnitudes, 2 bits */
  BL_SEARCH = 4,         /* least squared error among candidates */
  BL_RANGE = 5,          /* an even grid from least to greatest value */
  BL_RANGE_SEARCHED = 6, /* the same, ends drawn in to the least squared error */
};

/* Quantize x [rows, columns], contiguous, `values` of them: writes every part that `out` points at but `levels` and
 * `learned` (the const of its pointers is for all other functions). `given`: scale and shift of the one range of a
 * BL_TENSOR matrix, whose stored scale and shift are left to the caller; else NULL. Returns 1 where a value is NaN or
 * infinite. Bytes depend neither on the instruction set nor on `threads`. */
BL_API int bl_encode(const float *x, int64_t values, const bl_matrix *out, int rule, const float *given, int threads);

/* Trellis codes of x [rows, columns], contiguous, in `bits` planes of whole bytes a row. With `scales` each row has one,
 * written there; without, rows are coded as they are. `weights` [columns]: what an error of each column costs; NULL: all alike. Returns 1
 * where a value is NaN or infinite. Bytes depend neither on the instruction set nor on `threads`. */
BL_API int bl_encode_trellis(const float *x, const float *weights, int64_t rows, int64_t columns, int32_t bits,
                             uint8_t *codes, int64_t codes_bytes, float *scales, int threads);

/* Numbers of `count` rows, [count, columns] of `dtype`, contiguous: of those listed in `rows`, or of all (NULL). Rounded
 * to the dtype after each step, as torch does. Returns 1 (with a sentence) for a row that does not exist. */
BL_API int bl_dequantize(const bl_matrix *matrix, const int64_t *rows, int64_t count, void *out, int64_t out_bytes,
                         int32_t dtype, int threads);

/* Numbers of `rows` rows of a BL_COLUMNS matrix, from `row` on (a multiple of 64), turned over: [columns, rows] of `dtype`,
 * contiguous; rounded likewise. */
BL_API int bl_dequantize_columns(const bl_matrix *matrix, int64_t row, int64_t rows, void *out, int64_t out_bytes,
                                 int32_t dtype, int threads);

/* x minus the matrix, `values` float32 each: written to `out` unless that is NULL (it may be x), and the sum of the
 * squares to `square`. The sum does not depend on `threads`. */
BL_API int bl_residual(const bl_matrix *matrix, const float *x, int64_t values, float *out, double *square, int threads);

/* ---- products with packed matrices (linear.cpp) --------------------------------------------------------------------- */

/* Activations [rows, columns], rows `stride` values apart. */
typedef struct bl_input {
  const void *values;
  int64_t rows, columns, stride;
  int32_t dtype;
} bl_input;

/* out = x weight^T + bias + addend, summed in float32 and rounded once to `dtype`. */
typedef struct bl_product {
  const bl_matrix *weight;
  const float *bias;   /* [weight rows] or NULL */
  const float *addend; /* [rows of x, weight rows] or NULL */
  void *out;           /* [rows of x, weight rows], rows `stride` values apart */
  int64_t stride;
  int32_t dtype;
} bl_product;

/* flags of a call */
enum {
  BL_INVARIANT = 1, /* what a row gets does not depend on how many rows there are */
  BL_INT8 = 2,      /* rows of the input in 8 bits, a scale for each, times levels in 8 bits; AVX-512 only */
  BL_WIDE = 4,      /* of bl_packed_linear_one: the output is float32 */
};

/* Products of one input with several matrices, at most the wanted precision: float32 input is multiplied in float32, bfloat16
 * input with levels rounded to bfloat16 (where the processor has such dot products; not where codes of 1 and 2 bits are looked up
 * as whole numbers) and summed in float32. */
BL_API int bl_packed_linear(const bl_input *x, const bl_product *products, int64_t count, int32_t flags, int threads);

/* The same for one matrix, rows of x [rows, weight columns] and out [rows, weight rows] without gaps, out of x's dtype (but see BL_WIDE). */
BL_API int bl_packed_linear_one(const void *x, int32_t dtype, int64_t rows, const bl_matrix *weight, const float *bias,
                                const float *addend, void *out, int32_t flags, int threads);

/* 1 if bl_packed_linear takes this matrix, 0 if not (then bl_error says nothing: other codes are decoded first). */
BL_API int bl_multiplies(const bl_matrix *matrix);

/* Bring codes (and fp16 scales, or NULL) into the order that the kernels read fastest, or `back`; in place, same size. The
 * matrix describes them before the call; afterwards BL_ARRANGED must be set, or not. Rows beyond the last whole sixty-four
 * keep their order. */
BL_API int bl_arrange(bl_matrix *matrix, uint8_t *codes, void *scales, int back, int threads);

/* ---- low-rank products of many adapters (multi_lora.cpp) ----------------------------------------------------------- */

/* Components as rows, [rows, columns]: packed, or plain numbers of `dtype` where `packed` is NULL. */
typedef struct bl_factor {
  int64_t rows, columns;
  const bl_matrix *packed;
  const void *plain;
  int64_t plain_bytes;
  int32_t dtype;
} bl_factor;

/* delta[out] = scaling * sum_k bt[k, out] * (sum_in a[k, in] * x[in]) */
typedef struct bl_block {
  bl_factor a, bt;
  float scaling;
} bl_block;

typedef struct bl_blocks {
  int64_t count;
  const bl_block *block;
} bl_blocks;

/* One matrix of a call: the blocks of all rows (the start of a base), those of each segment, and where the sum goes. */
typedef struct bl_lora {
  int64_t columns; /* of the output */
  bl_blocks shared;
  const bl_blocks *own; /* one for each segment */
  void *out;            /* [rows of x, columns], rows `out_stride` values apart */
  int64_t out_stride;
  int32_t out_dtype;
  int32_t accumulate; /* add to what `out` holds, in float32, then round; else overwrite */
} bl_lora;

/* Which rows of a batch belong together: segment s has rows[begin[s] .. begin[s + 1]), no row twice. Each stands for
 * `repeat` rows of x, row * repeat and those behind it (the tokens of a sequence). */
typedef struct bl_segments {
  int64_t count, repeat;
  const int64_t *begin; /* count + 1 */
  const int32_t *rows;
} bl_segments;

/* The deltas of `count` matrices that share the input x [rows, columns], rows `stride` values apart. Rows that no segment
 * lists are left as they are. What a row gets does not depend on the others. */
BL_API int bl_multi_lora(const void *x, int32_t dtype, int64_t rows, int64_t columns, int64_t stride,
                         const bl_segments *segments, const bl_lora *matrices, int64_t count, int threads);

/* ---- products with a plain float32 matrix (dense.cpp) -------------------------------------------------------------------- */

/* out [rows, outputs] = x [rows, columns] weight^T, weight [outputs, columns]; 16 divides the columns. All are contiguous.
 * What a row gets does not depend on the others. */
BL_API int bl_dense_linear(const float *x, int64_t rows, int64_t columns, const float *weight, int64_t outputs, float *out,
                           int threads);

/* ---- one step of a decoder of Llama's shape (decoder.cpp) -------------------------------------------------------------- */

/* Matrices that share an input: y = x W^T + bias, and what `deltas` add. */
typedef struct bl_products {
  int64_t count;
  const bl_matrix *weights;
  const float *const *biases; /* one each, NULL where there is none */
  const bl_lora *deltas;      /* one each, `out` and `out_stride` being set by the step; or NULL */
} bl_products;

typedef struct bl_layer {
  const float *input_norm, *inner_norm; /* [width] */
  bl_products attention;                /* queries, keys, values */
  bl_products output;
  bl_products gates; /* gate, up */
  bl_products down;
} bl_layer;

typedef struct bl_decoder {
  int64_t count; /* of layers */
  const bl_layer *layers;
  const float *norm;
  int64_t width, inner, heads, key_heads, head_width; /* multiples of 16, but for the two counts of heads */
  float eps, scale;                                   /* of the norms; of a query times a key */
  const float *cos, *sin;                             /* [positions, head_width] */
  int64_t positions;
  int32_t flags; /* of the products: BL_INVARIANT */
} bl_decoder;

/* What one row has seen: keys [layers, key_heads, head_width, capacity] and values [layers, key_heads, capacity,
 * head_width], `length` tokens of them. The capacity is a multiple of 64. Rows may be one text's tokens in order, each with
 * the same memory and a `length` one greater than the one before: each then sees those before it. */
typedef struct bl_cache {
  float *keys, *values;
  int64_t capacity, length;
} bl_cache;

/* Floats of memory that a step of these rows needs. */
BL_API int64_t bl_decode_floats(const bl_decoder *decoder, const bl_cache *caches, int64_t rows);

/* Run one token for each row: `hidden` [rows, width] is what the embedding gave and becomes the normed final state; keys
 * and values are written to slot `length` of each cache. The caller counts `length` up. */
BL_API int bl_decode(const bl_decoder *decoder, float *hidden, const bl_cache *caches, int64_t rows,
                     const bl_segments *segments, float *scratch, int64_t floats, int threads);

#ifdef __cplusplus
}
#endif
#endif
