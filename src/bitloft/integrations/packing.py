"""Dense modules of a transformers model replaced by packed ones, and back, whatever their kind.

    linear     nn.Linear [out, in]        QuantLinear
    conv1d     Conv1D [in, out]           QuantConv1D [out, in]
    embedding  nn.Embedding               QuantEmbedding; modules tied to it TiedEmbedding, TiedHead
    experts    a 3-D parameter            QuantExperts in place of its module, one matrix per expert

Who quantizes a model (on load, in place, streamed) asks here which matrices a tensor holds, in which orientation, and
under which names a solution is stored; nobody else knows about kinds.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from bitloft.checkpoint import read_header
from bitloft.errors import CheckpointError
from bitloft.formats import Format
from bitloft.modules.embedding import QuantEmbedding, Table, TiedEmbedding, TiedHead, scale_of
from bitloft.modules.experts import QuantExperts, matrices
from bitloft.modules.linear import QuantConv1D, QuantLinear, replace_module
from bitloft.modules.parts import load_tensors
from bitloft.modules.select import tied_modules
from bitloft.rules import StoredModule

Packed = QuantLinear | QuantEmbedding | QuantExperts
DENSE: dict[str, type[nn.Module]] = {"linear": nn.Linear, "conv1d": Conv1D, "embedding": nn.Embedding}


def owner_of(name: str, kind: str) -> tuple[str, str]:
    """The module that holds a chosen weight, and the parameter's name in it."""
    if kind != "experts":
        return name, "weight"
    parent, _, leaf = name.rpartition(".")
    return parent, leaf


def matrices_of(
    model: nn.Module, name: str, kind: str, weight: Float[Tensor, "*experts _ _"]
) -> Iterator[tuple[str, Float[Tensor, "rows columns"]]]:
    """Name and value [out, in] of every matrix that a chosen module's dense tensor holds.

    ``weight`` is as the checkpoint and the model have it. Experts give one matrix each, named by their number.
    """
    if kind == "experts":
        owner = model.get_submodule(owner_of(name, kind)[0])
        yield from ((f"{name}.{index}", matrix) for index, matrix in enumerate(matrices(owner, weight)))
    else:
        yield name, weight.T if kind == "conv1d" else weight


def pack(model: PreTrainedModel, name: str, stored: StoredModule) -> Packed:
    """Replace one dense module by its packed form, zeroed, on the same device, and what is tied to it.

    Raises CheckpointError where the model has another kind of module there.
    """
    owner, leaf = owner_of(name, stored.kind)
    dense = model.get_submodule(owner)
    if stored.kind == "experts":
        experts = dense if isinstance(dense, QuantExperts) else QuantExperts(dense)
        experts.pack(leaf, stored)
        replace_module(model, owner, experts)
        return experts
    if not isinstance(dense, DENSE[stored.kind]):
        found = type(dense).__name__
        raise CheckpointError(f"the config packs {name} as {stored.kind}, but in this model class it is a {found}.")
    if isinstance(dense, nn.Embedding):
        return _pack_table(model, name, dense, stored)
    layer = _linear(dense, stored)
    replace_module(model, name, layer)
    return layer


def _linear(dense: nn.Module, stored: StoredModule) -> QuantLinear:
    weight, bias = dense.get_parameter("weight"), dense.bias
    kind, (rows, columns) = (
        (QuantConv1D, weight.shape[::-1]) if stored.kind == "conv1d" else (QuantLinear, weight.shape)
    )
    return kind(
        columns,
        rows,
        Format.parse(stored.format),
        bias=bias.data if isinstance(bias, Tensor) else None,
        rank=stored.rank,
        scaling=stored.scaling,
        start_format=Format.parse(stored.start_format),
        rotated=stored.rotated,
        device=weight.device,
    )


def _pack_table(model: PreTrainedModel, name: str, dense: nn.Embedding, stored: StoredModule) -> QuantEmbedding:
    table = QuantEmbedding(
        dense.num_embeddings,
        dense.embedding_dim,
        stored,
        padding_idx=dense.padding_idx,
        scale=scale_of(dense),
        dtype=dense.weight.dtype,
        device=dense.weight.device,
    )
    table.source = type(dense)
    replace_module(model, name, table)
    for other in (follower for follower, owner in tied_modules(model).items() if owner == name):
        module = model.get_submodule(other)
        if isinstance(module, nn.Embedding):
            tied = TiedEmbedding(table, padding_idx=module.padding_idx, scale=scale_of(module))
            tied.source = type(module)
            replace_module(model, other, tied)
        else:
            bias = getattr(module, "bias", None)
            replace_module(model, other, TiedHead(table, bias=bias.data if isinstance(bias, Tensor) else None))
    return table


def packed_at(model: nn.Module, name: str) -> tuple[str, str] | None:
    """(name, kind) of the chosen weight that the parameter ``name`` of a model is; of a tied one the table's.

    None for a parameter that is not packed.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, QuantExperts):
        return (name, "experts") if leaf in module.parts else None
    if leaf != "weight":
        return None
    if isinstance(module, TiedEmbedding | TiedHead):
        table = module.table[0]
        return next(n for n, m in model.named_modules() if m is table), "embedding"
    if isinstance(module, QuantEmbedding):
        return path, "embedding"
    return (
        (path, "conv1d" if isinstance(module, QuantConv1D) else "linear") if isinstance(module, QuantLinear) else None
    )


def packed_names(model: nn.Module) -> dict[str, str]:
    """Name -> kind of everything packed in a model, in model order; tied modules left out."""
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        at = packed_at(model, name)
        if at is not None:
            found[at[0]] = at[1]
    return found


def local_name(model: PreTrainedModel, name: str, kind: str) -> str | None:
    """The path of a listed module in this class: a headless class lacks the ``model.`` prefix, another may add it.

    None where this class has no such module at all, such as a head that a headless class drops.
    """
    prefix = f"{model.base_model_prefix}."
    for local in (name, name.removeprefix(prefix), prefix + name):
        owner, leaf = owner_of(local, kind)
        try:
            if hasattr(model.get_submodule(owner), leaf):
                return local
        except AttributeError:
            continue
    return None


def weights_in(model: PreTrainedModel, files: Sequence[str] | None) -> set[str] | None:
    """The model's tensors that a checkpoint's files hold, by the model's names; None where there are no files.

    Raises CheckpointError for a pickle.
    """
    if files is None:
        return None
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file} is no safetensors file; convert the checkpoint to quantize it on load.")
    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    held = [name for file in files for name in read_header(file) if name != "__metadata__"]
    prefix = model.base_model_prefix
    renamed = {rename_source_key(name, renamings, converters, prefix, state)[0] for name in held}
    return renamed | {rename_source_key(name, [], [], prefix, state)[0] for name in held}


def refuse_resize(*args: object, **kwargs: object) -> None:
    """What a model's ``resize_token_embeddings`` becomes where its table or head is packed."""
    raise CheckpointError(
        "the token table or the output head of this model is packed and cannot be resized; resize the dense model and "
        "quantize it again."
    )


def forbid_resize(model: PreTrainedModel) -> None:
    """Refuse to resize a packed table: transformers would copy its codes as if they were rows of numbers."""
    if any(isinstance(m, Table | QuantLinear) for m in (model.get_input_embeddings(), model.get_output_embeddings())):
        model.resize_token_embeddings = refuse_resize


def forget_conversions(model: PreTrainedModel) -> None:
    """Have packed experts saved as they are: transformers would split them into a file's tensors per expert."""
    experts = [name for name, kind in packed_names(model).items() if kind == "experts"]
    if experts:
        known = getattr(model, "_weight_conversions", None)
        conversions = get_model_conversion_mapping(model, add_legacy=False) if known is None else known
        model._weight_conversions = [c for c in conversions if not _gives(c, experts)]


def _gives(conversion: object, names: list[str]) -> bool:
    targets = conversion.target_patterns if isinstance(conversion, WeightConverter) else []
    return any(name.endswith(target.lstrip(".")) for name in names for target in targets)


def unpack(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every packed module by a dense one of its first class, weights Q + s0 * B0 @ A0 in ``dtype``."""
    vars(model).pop("resize_token_embeddings", None)
    tables: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantExperts):
            replace_module(model, name, module.unpacked(dtype))
        elif isinstance(module, QuantLinear):
            replace_module(model, name, dense_linear(module, module.dense().to(dtype)))
        elif isinstance(module, QuantEmbedding):
            tables[id(module)] = weight = nn.Parameter(module.dense().to(dtype), requires_grad=False)
            replace_module(model, name, _dense_table(module, weight))
    for name, module in list(model.named_modules()):
        if isinstance(module, TiedEmbedding):
            replace_module(model, name, _dense_table(module, tables[id(module.table[0])]))
        elif isinstance(module, TiedHead):
            with torch.device("meta"):
                head = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            head.weight, head.bias = tables[id(module.table[0])], module.bias
            replace_module(model, name, head)


def dense_of(model: nn.Module, name: str, kind: str, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*experts _ _"]:
    """Q + s0 * B0 @ A0 in float32 of one chosen weight from its stored ``tensors``, shaped as the dense model has it.

    ``model`` holds the packed module, on any device; it stays as it is.
    """
    owner, leaf = owner_of(name, kind)
    module: Any = deepcopy(model.get_submodule(owner))
    load_tensors(module, {key.removeprefix(f"{owner}."): tensor for key, tensor in tensors.items()})
    if isinstance(module, QuantExperts):
        return matrices(module, module.dense(leaf)).contiguous()
    dense: Tensor = module.dense()
    return dense.T.contiguous() if kind == "conv1d" else dense


def dense_linear(layer: QuantLinear, weight: Float[Tensor, "rows columns"]) -> nn.Module:
    """The dense module that a packed linear was made of, holding ``weight`` [out, in]."""
    turned = isinstance(layer, QuantConv1D)
    with torch.device("meta"):
        dense = (
            Conv1D(layer.out_features, layer.in_features)
            if turned
            else nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        )
    dense.weight = nn.Parameter(weight.T.contiguous() if turned else weight, requires_grad=False)
    dense.bias = layer.bias
    return dense


def _dense_table(table: QuantEmbedding | TiedEmbedding, weight: nn.Parameter) -> nn.Embedding:
    scale = table.scale
    extra: dict[str, Any] = {} if scale is None else {"embed_scale": scale.value}
    with torch.device("meta"):
        dense: nn.Embedding = table.source(
            table.num_embeddings, table.embedding_dim, padding_idx=table.padding_idx, **extra
        )
    dense.weight = weight
    if scale is not None and isinstance(dense.embed_scale, Tensor):
        dense.embed_scale = torch.tensor(scale.value, device=weight.device)
    return dense
