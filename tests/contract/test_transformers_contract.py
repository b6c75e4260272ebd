"""What we rely on in transformers: names and behavior that are not promised to stay."""

import inspect

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import bitloft
from bitloft.integrations.transformers import BitloftConfig, BitloftQuantizer


def test_registration_is_by_two_mappings() -> None:
    bitloft.register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bitloft"] is BitloftConfig
    assert AUTO_QUANTIZER_MAPPING["bitloft"] is BitloftQuantizer


def test_the_quantizer_hooks_that_we_override_exist() -> None:
    ours = {name for name in vars(BitloftQuantizer) if not name.startswith("__")}
    known = set(dir(HfQuantizer)) | {"quantization_config", "_abc_impl"}
    assert ours <= known


def test_a_quantize_op_gets_what_ours_reads() -> None:
    assert "input_dict" in inspect.signature(ConversionOps.convert).parameters
    source = inspect.getsource(inspect.getmodule(ConversionOps))  # type: ignore[arg-type]
    assert "missing_keys" in source
    assert "full_layer_name" in source


def test_models_are_saved_through_their_quantizer() -> None:
    source = inspect.getsource(PreTrainedModel.save_pretrained)
    assert "is_serializable" in source
    assert "get_state_dict_and_metadata" in source


def test_integer_buffers_survive_casting() -> None:
    """torch's module casts touch floating tensors only: scales live in integers because of it."""
    module = torch.nn.Module()
    module.register_buffer("scales", torch.ones(3, dtype=torch.int16))
    assert module.half().get_buffer("scales").dtype == torch.int16
    assert module.to(torch.bfloat16).get_buffer("scales").dtype == torch.int16
