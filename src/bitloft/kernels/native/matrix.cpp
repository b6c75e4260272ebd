// Checks of a packed matrix: every part has the bytes that its format asks for.
#include "matrix.hpp"

#include "errors.hpp"

namespace bl {

int64_t zero_bits(const bl_matrix& m) { return m.bits == 3 ? 4 : m.bits; }

int check(const bl_matrix* matrix) {
  if (matrix == nullptr) return fail("a packed matrix is missing.");
  const bl_matrix& m = *matrix;
  const bool half = (m.flags & BL_HALF) != 0;
  if (m.rows < 0 || m.columns < 0 || m.rows > (int64_t{1} << 40) || m.columns > (int64_t{1} << 31))
    return fail("a packed matrix has %lld rows and %lld columns.", (long long)m.rows, (long long)m.columns);
  if (!(m.bits == 1 || m.bits == 2 || m.bits == 3 || m.bits == 4 || m.bits == 8 || m.bits == 16) ||
      half != (m.bits == 16))
    return fail("no packed matrix has codes of %d bits with flags %d.", m.bits, m.flags);
  if (m.width < m.columns || m.width % 8 != 0 || m.group < 0 || (m.width > 0 && (m.group == 0 || m.width % m.group)))
    return fail("a packed matrix of %lld columns has width %lld and groups of %lld.", (long long)m.columns,
                (long long)m.width, (long long)m.group);
  // beyond any memory, and below what the products that follow could overflow at
  if (m.width > (int64_t{1} << 40) || (m.rows > 0 && m.width > (int64_t{1} << 56) / m.rows))
    return fail("a packed matrix has %lld rows of width %lld.", (long long)m.rows, (long long)m.width);
  const bool whole = (m.flags & BL_TENSOR) != 0;
  const int64_t groups = m.group > 0 ? m.width / m.group : 0;
  if (m.groups != 0 && m.groups != groups)
    return fail("a packed matrix of width %lld stores %lld scales a row.", (long long)m.width, (long long)m.groups);
  const int64_t scaled = (whole ? (m.rows > 0 ? 1 : 0) : m.rows) * m.groups;
  const bool dq = (m.flags & BL_DQ) != 0;
  const bool by_column = (m.flags & BL_COLUMNS) != 0;
  if (by_column && m.rows > (int64_t{1} << 30)) return fail("no packed matrix has columns of %lld rows.", (long long)m.rows);
  const int64_t codes = by_column ? m.columns * ((m.rows + 7) / 8 * m.bits) : m.rows * (m.width * m.bits / 8);
  if (m.codes_bytes != codes || (m.codes_bytes > 0 && m.codes == nullptr))
    return fail("a packed matrix of %lld x %lld has %lld bytes of codes.", (long long)m.rows, (long long)m.width,
                (long long)m.codes_bytes);
  if (m.scales_bytes != scaled * (dq ? 1 : 2) || (m.scales_bytes > 0 && m.scales == nullptr))
    return fail("a packed matrix with %lld scales has %lld bytes of them.", (long long)scaled,
                (long long)m.scales_bytes);
  if (m.zeros != nullptr && m.zeros_bytes != m.rows * ((m.groups * zero_bits(m) + 7) / 8))
    return fail("a packed matrix has %lld bytes of zero points.", (long long)m.zeros_bytes);
  if (m.shifts != nullptr && m.shifts_bytes != scaled * 2)
    return fail("a packed matrix has %lld bytes of shifts.", (long long)m.shifts_bytes);
  if (dq && (m.range_bytes != (scaled + 255) / 256 * 2 || (scaled > 0 && (m.low == nullptr || m.step == nullptr))))
    return fail("a packed matrix has %lld bytes of scale ranges.", (long long)m.range_bytes);
  const bool trellis = (m.flags & BL_TRELLIS) != 0;
  if (by_column && (!trellis || (m.width > 0 && m.groups == 0)))
    return fail("codes that run down columns are those of a trellis and have scales; a packed matrix has flags %d.", m.flags);
  const int32_t known = BL_TRELLIS | (by_column ? BL_COLUMNS | BL_ARRANGED : 0);
  if (trellis && (m.bits > 4 || (m.flags & ~known) != 0 || (m.groups > 1 && !by_column) || m.zeros != nullptr || m.shifts != nullptr || m.learned != nullptr))
    return fail("no trellis codes have %d bits, flags %d or %lld scales a row.", m.bits, m.flags, (long long)m.groups);
  if (m.exponent == nullptr || (!half && !trellis && m.levels == nullptr && m.learned == nullptr))
    return fail("a packed matrix lacks its exponent or its levels.");
  return 0;
}

}  // namespace bl

extern "C" int bl_check(const bl_matrix* matrix) { return bl::check(matrix); }
