// Compiled once per instruction set: its table of kernels.
#include "kernels.hpp"

#define BL_NAME_(isa) #isa
#define BL_NAME(isa) BL_NAME_(isa)
#define BL_TABLE_(isa) kernels_##isa
#define BL_TABLE(isa) BL_TABLE_(isa)

namespace bl {

const Kernels BL_TABLE(BL_ISA) = {
    .name = BL_NAME(BL_ISA),
};

}  // namespace bl
