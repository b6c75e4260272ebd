"""The operators as everybody calls them: native or plain, the results are the definition's."""

from bitloft.kernels import ops


def test_every_name_is_public_and_there() -> None:
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
