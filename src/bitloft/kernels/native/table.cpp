// Compiled once per instruction set: its table of kernels.
#include "kernels.hpp"

#if defined(BL_HAS_avx512)
#define BL_HAS_PAIRS true
#define BL_TWO_BLOCKS true
#define BL_HAS_BYTES true
#else
#define BL_HAS_PAIRS false
#define BL_TWO_BLOCKS false
#define BL_HAS_BYTES false
#endif

#define BL_NAME_(isa) #isa
#define BL_NAME(isa) BL_NAME_(isa)
#define BL_TABLE_(isa) kernels_##isa
#define BL_TABLE(isa) BL_TABLE_(isa)

namespace bl::BL_ISA {
void gather(const Block& block, uint32_t* words);
void arrange(const Block& block, uint8_t* codes, uint16_t* scales, bool back);
void turn_scales(const Block& block, bool arranged, float* scales, float* offsets);
void read_levels(const bl_matrix& matrix, float* levels);
void prepare(const Preparation& p);
void product(const Product& p);
bool tame(const void* x, int64_t count, int32_t dtype);
void finish(const Finish& f);
void prepare_column_input(const ColumnInput& in);
void column_product(const ColumnProduct& p);
void move_columns(const ColumnMove& move);
void column_tile(const ColumnTile& tile);
void lora_tile(const LoraTile& tile);
void encode_groups(GroupTile& tile);
void encode_halves(const Halves& job);
void encode_scale_block(const ScaleBlock& job);
void encode_trellis(TrellisRow& row);
void dequantize_row(const DequantizeRow& job);
void residual_row(const ResidualRow& job);
void keep(const Attention& job);
void attend(const Attention& job);
void add_and_norm(float* x, const float* added, const float* weight, float* y, int64_t width, float eps);
void dense_rows(const Dense& job);
void gate(float* gate, const float* up, int64_t width);
}  // namespace bl::BL_ISA

namespace bl {

const Kernels BL_TABLE(BL_ISA) = {
    .name = BL_NAME(BL_ISA),
    .pairs = BL_HAS_PAIRS,
    .two_blocks = BL_TWO_BLOCKS,
    .bytes = BL_HAS_BYTES,
    .gather = BL_ISA::gather,
    .arrange = BL_ISA::arrange,
    .turn_scales = BL_ISA::turn_scales,
    .read_levels = BL_ISA::read_levels,
    .prepare = BL_ISA::prepare,
    .product = BL_ISA::product,
    .tame = BL_ISA::tame,
    .finish = BL_ISA::finish,
    .prepare_column_input = BL_ISA::prepare_column_input,
    .column_product = BL_ISA::column_product,
    .move_columns = BL_ISA::move_columns,
    .column_tile = BL_ISA::column_tile,
    .lora_tile = BL_ISA::lora_tile,
    .encode_groups = BL_ISA::encode_groups,
    .encode_halves = BL_ISA::encode_halves,
    .encode_scale_block = BL_ISA::encode_scale_block,
    .encode_trellis = BL_ISA::encode_trellis,
    .dequantize_row = BL_ISA::dequantize_row,
    .residual_row = BL_ISA::residual_row,
    .keep = BL_ISA::keep,
    .attend = BL_ISA::attend,
    .add_and_norm = BL_ISA::add_and_norm,
    .dense_rows = BL_ISA::dense_rows,
    .gate = BL_ISA::gate,
};

}  // namespace bl
