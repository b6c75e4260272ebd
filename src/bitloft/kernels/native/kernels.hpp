// What one instruction set provides: a table of plain functions, filled by sources that are compiled once per set.
//
// A kernel source wraps everything in `namespace bl::BL_ISA` and neither uses std containers nor algorithms: an inline
// function of the standard library compiled with AVX-512 could be the copy that the linker keeps for all.
// Kernels are serial; who runs which chunk is decided by the sources that are compiled once (linear.cpp, ...).
#pragma once

#include <cstdint>

#include "bitloft.h"

namespace bl {

struct Kernels {
  const char* name;
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;

// The table for this machine, or for BITLOFT_ISA if that is set; nullptr after fail().
const Kernels* kernels();

}  // namespace bl
