"""QuantConv1D: what a transformers ``Conv1D`` (GPT-2's linear layer, weight [in, out]) becomes when it is packed.

The matrix is transposed once, while it is quantized: groups and the start then lie along the input axis as in any other
linear, and kernels, banks and PEFT see nothing but a QuantLinear. The class only remembers what to turn back into.
PEFT's ``fan_in_fan_out`` concerns the stored orientation of a dense weight; adapters for the dense model have the same
shapes here and load as they are.
"""

from bitloft.modules.linear import QuantLinear


class QuantConv1D(QuantLinear):
    """A QuantLinear [out, in] made from a Conv1D [in, out]; ``nx`` and ``nf`` are a Conv1D's names for its widths."""

    @property
    def nx(self) -> int:
        return self.in_features

    @property
    def nf(self) -> int:
        return self.out_features
