"""One family of errors, so that one handler prints them all."""

import inspect

from bitloft import errors


def test_every_error_is_a_bitloft_error_with_a_meaning() -> None:
    found = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert len(found) >= 7
    for kind in found:
        assert issubclass(kind, errors.BitloftError)
        assert inspect.getdoc(kind)
