"""QuantEmbedding: a packed table with its start, looked up by row, and what is tied to it.

    y = scale * (Q[ids] + s0 * B0[ids] A0)        Q [count, width] packed, B0 [count, rank], A0 [rank, width]

Only the rows that are asked for are decoded. A table that is also the output head (or the table of a decoder) stays
one matrix: ``TiedHead`` and ``TiedEmbedding`` hold its codes as their ``weight``, as transformers ties any other
weight, and read scales and start from the table itself. The alternative, a second QuantLinear with equal bytes, would
store the largest matrix of many models twice.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitloft.formats import Format
from bitloft.kernels.lora import Start
from bitloft.kernels.ops import decode, decode_columns, decode_rows
from bitloft.kernels.product import packed_product
from bitloft.modules.parts import Device, Held, load_tensors, solution_tensors
from bitloft.packed import PackedTensor
from bitloft.rules import StoredModule
from bitloft.solvers.base import Solution


class Scale(NamedTuple):
    """What a model multiplies the rows of its table by; Gemma 3 rounds the number to the dtype of the rows first."""

    value: float
    rounded: bool = False


def scale_of(dense: nn.Embedding) -> Scale | None:
    """The scale of a dense table that has one (``embed_scale``, in transformers a number or a buffer of one)."""
    if hasattr(dense, "scalar_embed_scale"):
        return Scale(float(dense.scalar_embed_scale), rounded=True)  # type: ignore[arg-type]
    return Scale(float(dense.embed_scale)) if hasattr(dense, "embed_scale") else None  # type: ignore[arg-type]


class Table(nn.Embedding):
    """What an nn.Embedding tells those who ask about it; its own constructor would allocate the dense table.

    ``source`` is the class to turn back into.
    """

    like: Tensor
    source: type[nn.Embedding] = nn.Embedding

    def __init__(
        self,
        count: int,
        width: int,
        padding_idx: int | None,
        scale: Scale | None,
        dtype: torch.dtype | None,
        device: Device,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = count, width, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        # an empty float buffer: the only thing that .to(dtype) casts here, hence the dtype that the rows come in
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.scale = scale
        if scale is not None:  # a tensor: PEFT would cast a plain number to the dtype of the weight, int8
            self.embed_scale = torch.tensor(scale.value, device="cpu")

    def scaled(self, rows: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch columns"]:
        """The rows times ``scale``."""
        if self.scale is None:
            return rows
        value = self.scale.value
        return rows * (torch.tensor(value, dtype=rows.dtype) if self.scale.rounded else value)


class QuantEmbedding(Table):
    """A frozen table [num_embeddings, embedding_dim] in ``stored.format``.

    ``scale`` multiplies every row (Gemma 3, BART). The rows come in the dtype that ``.to(dtype)`` last asked for,
    as a dense table's would.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        stored: StoredModule,
        *,
        padding_idx: int | None = None,
        scale: Scale | None = None,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, scale, dtype, device)
        self.parts = Held(self, "weight", (num_embeddings, embedding_dim), stored, device)
        self.start_enabled = True

    @property
    def format(self) -> Format:
        return self.parts.format

    @property
    def rank(self) -> int:
        return self.parts.rank

    @property
    def scaling(self) -> float:
        return self.parts.scaling

    def packed_weight(self) -> PackedTensor:
        """Q [num_embeddings, embedding_dim] as stored; shares memory with the module."""
        return self.parts.weight(self)

    def packed_start(self) -> tuple[PackedTensor, PackedTensor] | None:
        """A0 [rank, embedding_dim] and B0^T [rank, num_embeddings] as stored, or None without a start."""
        return self.parts.start(self)

    def dense(self) -> Float[Tensor, "rows columns"]:
        """Q + s0 * B0 @ A0 (Q alone while the start is disabled) in float32, without ``scale``."""
        return self.parts.dense(self, start=self.start_enabled)

    def rows(self, ids: Int[Tensor, "*batch"], dtype: torch.dtype) -> Float[Tensor, "*batch columns"]:
        """Rows of the table in ``dtype``, without ``scale``."""
        flat = ids.reshape(-1)
        found = decode_rows(self.packed_weight(), flat, dtype)
        start = self.packed_start() if self.start_enabled else None
        if start is not None:
            found = found + self.scaling * (decode_columns(start[1], flat, dtype).T @ decode(start[0], dtype))
        return found.view(*ids.shape, self.embedding_dim)

    def product(self, x: Float[Tensor, "*batch columns"], bias: Tensor | None) -> Float[Tensor, "*batch rows"]:
        """x @ table^T + bias: what a tied output head computes."""
        start = self.packed_start() if self.start_enabled else None
        return packed_product(
            x, self.packed_weight(), None if start is None else Start(*start, self.scaling), bias=bias
        )

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch columns"]:
        return self.scaled(self.rows(input, self.like.dtype))

    def extra_repr(self) -> str:
        start = f", start=rank {self.rank} in {self.parts.start_format}" if self.rank else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}{start}"

    def tensors_of(self, solution: Solution) -> dict[str, Tensor]:
        """The module tensors, by name, that hold a solution of this table's shape and formats."""
        return solution_tensors(solution, "weight", "a0", "b0")

    def load_solution(self, solution: Solution) -> None:
        """Take over a solver's result."""
        load_tensors(self, self.tensors_of(solution))


class TiedEmbedding(Table):
    """Another place where ``table`` is looked up (a decoder's tokens), with a scale of its own."""

    def __init__(self, table: QuantEmbedding, *, padding_idx: int | None = None, scale: Scale | None = None) -> None:
        device = table.weight.device
        count, width = table.num_embeddings, table.embedding_dim
        super().__init__(count, width, padding_idx, scale, table.like.dtype, device)
        self.weight = table.weight
        self.table = (table,)  # in a tuple: not a child, or its tensors would be saved twice

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch columns"]:
        return self.scaled(self.table[0].rows(input, self.like.dtype))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tied, format={self.table[0].format}"


class TiedHead(nn.Linear):
    """The output head that is ``table``: y = x @ table^T + bias."""

    def __init__(self, table: QuantEmbedding, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings
        self.weight = table.weight
        self.table = (table,)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        return self.table[0].product(input, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied, format={self.table[0].format}"
