"""Every verb's options as frozen dataclasses, without torch: the CLI is made from them, and so is the Python API.

A field's ``help`` becomes the flag's help text. Values are checked here, once, before any file is touched.
"""

from bitloft.options.compress import METHODS, CompressOptions, RebaseOptions
from bitloft.options.convert import CODES, CONTAINS, DENSE_DTYPES, TARGETS, ConvertOptions, MergeOptions
from bitloft.options.fields import BASE_MISMATCH, DTYPES, option, require
from bitloft.options.generate import ADMIN_KEY_VARIABLE, KEY_VARIABLE, LOOPBACK, GenerateOptions, ServeOptions
from bitloft.options.load import LoadOptions
from bitloft.options.plan import PlanOptions
from bitloft.options.quantize import SOLVERS, QuantizeOptions
from bitloft.options.recipe import REGIMES, Recipe, read_recipe
from bitloft.options.train import SCHEDULES, STARTS, EvalOptions, TrainOptions

__all__ = [
    "ADMIN_KEY_VARIABLE",
    "BASE_MISMATCH",
    "CODES",
    "CONTAINS",
    "DENSE_DTYPES",
    "DTYPES",
    "KEY_VARIABLE",
    "LOOPBACK",
    "METHODS",
    "REGIMES",
    "SCHEDULES",
    "SOLVERS",
    "STARTS",
    "TARGETS",
    "CompressOptions",
    "ConvertOptions",
    "EvalOptions",
    "GenerateOptions",
    "LoadOptions",
    "MergeOptions",
    "PlanOptions",
    "QuantizeOptions",
    "RebaseOptions",
    "Recipe",
    "ServeOptions",
    "TrainOptions",
    "option",
    "read_recipe",
    "require",
]
