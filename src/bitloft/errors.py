"""The errors that bitloft raises on purpose: one sentence that names the thing, the value and the remedy.

The CLI prints that sentence and exits with 2. Anything else that escapes is a bug and keeps its traceback.
"""


class BitloftError(Exception):
    """Bad input or a state that the user can mend."""


class OptionError(BitloftError):
    """An option's value cannot be used."""


class FormatError(BitloftError):
    """A number format that does not exist or does not fit a tensor."""


class CheckpointError(BitloftError):
    """A model folder, weight file or bundle that is missing, damaged, unsafe or of another version."""


class AdapterError(BitloftError):
    """An adapter that cannot be read, does not fit its base or uses a LoRA variant that bitloft does not know."""


class DataError(BitloftError):
    """A data file or row that cannot be used; the message gives file and line."""


class KernelError(BitloftError):
    """An operator called with shapes, dtypes or devices that it does not take."""
